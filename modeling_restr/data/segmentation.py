"""
Conversion of objects, in any form that annotation files contain, to masks in COCO's run-length encoding (RLE).

pycocotools checks nothing: it follows an outline wherever it leads, and reads runs that do not exist. So it only gets
outlines within bounds, and runs that add up to the size of the image.
"""

from __future__ import annotations

import itertools
import reprlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask


# A polygon [x0, y0, x1, y1, ...] or [[x0, y0], [x1, y1], ...], or a COCO RLE (compressed or not).
Part = Sequence[Any] | dict[str, Any]
# An RLE, a list of parts (empty for nothing in the image), one polygon, a mask (height, width), or a function that loads
# a mask, called when the row is built.
Segmentation = dict[str, Any] | Sequence[Any] | np.ndarray | Callable[[], np.ndarray]

_POLYGON = "A polygon must be [x0, y0, x1, y1, ...] of at least 3 points"
MAX_OUTLINE = 100  # times height + width: the longest outline of a polygon, in pixels


@dataclass(frozen=True)
class SeveralObjects:
    """The parts of each of several objects that are referred to together. Each needs a mask."""

    objects: tuple[Sequence[Part], ...]


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """Encode a mask (height, width), non-zero inside, as {"size": [height, width], "counts": compressed RLE as text}."""
    if mask.ndim != 2:
        raise ValueError(f"A mask must be of shape (height, width), got {mask.shape}.")
    # pycocotools encodes arrays in column order, and copying a mask to that order takes far longer than this.
    is_inside = mask if mask.dtype == bool else mask != 0
    before = np.zeros_like(is_inside)  # the pixel above, or for the first row the last one of the column before
    before[1:], before[:1, 1:] = is_inside[:-1], is_inside[-1:, :-1]
    rows, columns = np.divmod(np.flatnonzero(is_inside != before), max(mask.shape[1], 1))
    runs = np.diff(np.sort(columns * mask.shape[0] + rows), prepend=0, append=mask.size)
    return _as_text(coco_mask.frPyObjects({"size": mask.shape, "counts": runs.tolist()}, *mask.shape))


def decode_mask(rle: dict[str, Any]) -> np.ndarray:
    """
    The inverse of [`encode_mask`]: (height, width) bool.

    Raises:
        ValueError: The runs do not add up to the size, or the mask is larger than any image that Pillow opens.
    """
    (height, width), runs = _read_runs(rle)
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and height * width > 2 * limit:
        raise ValueError(f"A mask must have at most {2 * limit} pixels, got one of size {(height, width)}.")
    is_inside = np.arange(len(runs)) % 2 == 1
    return np.repeat(is_inside, runs).reshape(width, height).T


def object_to_rle(
    segmentation: Segmentation | SeveralObjects, size: tuple[int, int], may_be_empty: bool = False
) -> dict[str, Any]:
    """
    Convert an object, or the union of several, to one RLE. `ValueError` as from [`segmentation_to_rle`], or if an
    object covers no pixel, unless it `may_be_empty`.
    """
    objects: Iterable[Segmentation]
    objects = segmentation.objects if isinstance(segmentation, SeveralObjects) else (segmentation,)
    rles = [segmentation_to_rle(part, size) for part in objects]
    if not may_be_empty and not coco_mask.area(rles).all():
        raise ValueError("The object covers no pixel of its image.")
    return _as_text(coco_mask.merge(rles))


def segmentation_to_rle(segmentation: Segmentation, size: tuple[int, int]) -> dict[str, Any]:
    """
    Convert any form of a segmentation to one compressed RLE, which unites its parts.

    Stray polygons of one or two points, which annotation tools leave next to good ones, are dropped
    ([`count_stray_parts`] counts them). Masks are clipped to the image.

    Raises:
        ValueError: A mask or RLE has another size than the image's (height, width), a polygon is invalid or leads
            further out of the image than its size, or the segmentation is something else.
    """
    if callable(segmentation):
        segmentation = segmentation()
    if isinstance(segmentation, np.ndarray):
        _check_size(segmentation.shape, size)
        return encode_mask(segmentation)
    parts = _list_parts(segmentation)
    if not parts:
        return encode_mask(np.zeros(size, dtype=bool))
    good = [part for part in parts if not _is_stray(part)] or parts[:1]
    return _as_text(coco_mask.merge([_part_to_rle(part, size) for part in good]))


def count_stray_parts(segmentation: Segmentation | SeveralObjects) -> int:
    """The number of parts of a valid segmentation that [`segmentation_to_rle`] drops."""
    if isinstance(segmentation, SeveralObjects):
        return sum(map(count_stray_parts, segmentation.objects))
    if callable(segmentation) or isinstance(segmentation, np.ndarray):
        return 0
    return sum(map(_is_stray, _list_parts(segmentation)))


def are_numbers(values: Any) -> bool:
    """Whether this is a list of numbers, which may be infinite."""
    is_list = isinstance(values, list | tuple | np.ndarray)
    return is_list and all(issubclass(kind, Real) and kind is not bool for kind in set(map(type, values)))


def _list_parts(segmentation: Any) -> list[list[Any] | dict[str, Any]]:
    """RLEs and polygons [x0, y0, x1, y1, ...] with unchecked numbers."""
    if isinstance(segmentation, dict):
        return [segmentation]
    if not isinstance(segmentation, list | tuple):
        raise ValueError(f"A segmentation must be polygons, an RLE or a mask, got {reprlib.repr(segmentation)}.")
    is_polygon = are_numbers(segmentation) or _are_points(segmentation)
    parts = [segmentation] if segmentation and is_polygon else segmentation
    return [part if isinstance(part, dict) else _flatten_polygon(part) for part in parts]


def _are_points(values: Any) -> bool:
    return isinstance(values, list | tuple) and all(are_numbers(value) and len(value) == 2 for value in values)


def _flatten_polygon(part: Any) -> list[Any]:
    numbers = list(itertools.chain(*part)) if _are_points(part) else part
    if not are_numbers(numbers):
        others = [value for value in numbers if not are_numbers([value])] if isinstance(numbers, list) else [part]
        raise ValueError(f"{_POLYGON}, got {reprlib.repr(others[0])}.")
    if len(numbers) % 2:
        raise ValueError(f"{_POLYGON}, got {len(numbers)} numbers: {reprlib.repr(numbers)}.")
    return list(numbers)


def _is_stray(part: list[Any] | dict[str, Any]) -> bool:
    return isinstance(part, list) and len(part) < 6


def _part_to_rle(part: list[Any] | dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    if isinstance(part, list):
        _check_polygon(part, size)
        return coco_mask.frPyObjects([part], *size)[0]
    stated, runs = _read_runs(part)
    _check_size(stated, size)
    return coco_mask.frPyObjects({"size": stated, "counts": runs}, *size)


def _check_size(found: Iterable[int], size: tuple[int, int]) -> None:
    if tuple(found) != tuple(size):
        raise ValueError(f"The mask is of size {tuple(found)} (height, width), its image of {tuple(size)}.")


def _check_polygon(polygon: list[Any], size: tuple[int, int]) -> None:
    """Limit what pycocotools allocates, 40 bytes per pixel of the outline."""
    if _is_stray(polygon):
        raise ValueError(f"{_POLYGON}, got {polygon}.")
    height, width = size
    for number, side in zip(polygon, itertools.cycle((width, height))):
        if not -side <= number <= 2 * side:
            raise ValueError(
                f"A polygon must be of numbers and stay within one size of its image of {tuple(size)} (height, width), "
                f"got {reprlib.repr(number)}."
            )
    points = np.array(polygon, dtype=np.float64).reshape(-1, 2)
    length = np.abs(points - np.roll(points, 1, axis=0)).max(axis=1).sum()
    if length > (limit := MAX_OUTLINE * (height + width)):
        raise ValueError(f"The outline of a polygon must be of at most {limit} pixels, got {length:.0f}.")


def _read_runs(rle: dict[str, Any]) -> tuple[list[int], list[int]]:
    """[height, width] and the lengths of an RLE's runs, alternately outside and inside, which add up to the size."""
    if not {"size", "counts"} <= rle.keys():
        raise ValueError(f"An RLE must have size and counts, got {reprlib.repr(list(rle))}.")
    size, counts = rle["size"], rle["counts"]
    if not _are_whole(size) or len(size) != 2:
        raise ValueError(f"The size of an RLE must be [height, width], got {reprlib.repr(size)}.")
    if isinstance(counts, str | bytes):
        counts = _decompress(counts)
    elif not _are_whole(counts):  # COCO's crowd regions come as lists of run lengths
        raise ValueError(f"The counts of an RLE must be whole numbers from 0 on, got {reprlib.repr(counts)}.")
    height, width = map(int, size)
    runs = list(map(int, counts))
    if (covered := sum(runs)) != height * width:
        raise ValueError(f"The runs of an RLE of size {[height, width]} cover {covered} pixels.")
    return [height, width], runs


def _are_whole(values: Any) -> bool:
    return are_numbers(values) and all(value >= 0 and value % 1 == 0 for value in values)


def _decompress(counts: str | bytes) -> list[int]:
    """
    The runs of a compressed RLE.

    A run is written in digits of base 32, the lowest first. Bit 5 says that another digit follows, bit 4 of the last
    digit is the sign. From the fourth run on, the number is the change since the last run but one.
    """
    runs: list[int] = []
    run = shift = 0
    content = counts.encode(errors="surrogatepass") if isinstance(counts, str) else counts
    for digit in (byte - 48 for byte in content):
        if not 0 <= digit < 64 or shift > 60:
            raise ValueError(f"The counts of an RLE are damaged: {counts[:40]!r}.")
        run |= (digit & 31) << shift
        shift += 5
        if not digit & 32:
            run -= (digit & 16) << (shift - 4)
            runs.append(run + (runs[-2] if len(runs) > 2 else 0))
            run = shift = 0
    if shift or min(runs, default=0) < 0:
        raise ValueError(f"The counts of an RLE are damaged: {counts[:40]!r}.")
    return runs


def _as_text(rle: dict[str, Any]) -> dict[str, Any]:
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode()}
