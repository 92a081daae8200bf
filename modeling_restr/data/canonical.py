"""
The canonical form of referring-expression data: one row an image, with all references to it and all their expressions.

Readers of every layout (`refer.py`, `referit.py`, ...) yield [`AnnotatedImage`]s, which hold no pixels; [`build_row`]
checks one against its decoded image and makes the row, [`build_dataset`] a `datasets.Dataset` of many.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from pycocotools import mask as coco_mask
from tqdm.contrib.concurrent import thread_map


MASK_FEATURE = {"size": datasets.List(datasets.Value("int32")), "counts": datasets.Value("string")}
FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "image_id": datasets.Value("int64"),
        "file_name": datasets.Value("string"),
        "references": datasets.List(
            {
                "ref_id": datasets.Value("int64"),
                "ann_id": datasets.Value("int64"),
                "category": datasets.Value("string"),
                "bbox": datasets.List(datasets.Value("float32")),
                "mask": MASK_FEATURE,
                "expressions": datasets.List({"sent_id": datasets.Value("int64"), "text": datasets.Value("string")}),
            }
        ),
    }
)

# A polygon [x0, y0, x1, y1, ...] or a COCO RLE (compressed or not).
Part = list[float] | dict[str, Any]
# An RLE, a list of parts (an empty one is an expression that refers to nothing in the image), a mask (height, width),
# or a function that loads a mask, called when the row is built.
Segmentation = dict[str, Any] | Sequence[Part] | np.ndarray | Callable[[], np.ndarray]


class BadImage(ValueError):
    """An image that cannot be used with its annotations: missing, unreadable, or of another size than they say."""


@dataclass(frozen=True)
class ImageInDataset:
    """An image that a dataset holds: `column` of `row`, of a `datasets.Image` feature that is not decoded."""

    dataset: datasets.Dataset
    row: int
    column: str = "image"


@dataclass(frozen=True)
class AnnotatedReference:
    """One referred object. `bbox` is [x, y, width, height] in pixels; `None` takes the mask's."""

    ref_id: int
    ann_id: int
    category: str
    segmentation: Segmentation
    expressions: tuple[tuple[int, str], ...]  # (sent_id, text)
    bbox: Sequence[float] | None = None


@dataclass(frozen=True)
class AnnotatedImage:
    """An image as its annotations describe it. `size` is (height, width) where they state it."""

    image_id: int
    file_name: str
    image: Path | ImageInDataset
    references: tuple[AnnotatedReference, ...]
    size: tuple[int, int] | None = None


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """A mask (height, width), non-zero inside, as {"size": [height, width], "counts": compressed RLE as text}."""
    if mask.ndim != 2:
        raise ValueError(f"A mask must be of shape (height, width), got {mask.shape}.")
    return _as_text(coco_mask.encode(np.asfortranarray(mask != 0, dtype=np.uint8)))


def decode_mask(rle: dict[str, Any]) -> np.ndarray:
    """The inverse of [`encode_mask`]: (height, width) bool."""
    return coco_mask.decode({"size": list(rle["size"]), "counts": rle["counts"]}).astype(bool)


def segmentation_to_rle(segmentation: Segmentation, size: tuple[int, int]) -> dict[str, Any]:
    """
    Any form of a segmentation as one compressed RLE; the parts of an object are united.

    Raises:
        ValueError: for a mask or RLE whose size is not the image's (height, width), and for polygons that are none.
    """
    if callable(segmentation):
        segmentation = segmentation()
    if isinstance(segmentation, np.ndarray):
        rles = [encode_mask(segmentation)]
    elif len(segmentation) == 0:
        return encode_mask(np.zeros(size, dtype=bool))
    else:
        parts = [segmentation] if isinstance(segmentation, dict) else segmentation
        rles = [_part_to_rle(part, size) for part in parts]
    for rle in rles:
        if tuple(rle["size"]) != tuple(size):
            raise ValueError(f"The mask is of size {tuple(rle['size'])} (height, width), its image of {tuple(size)}.")
    return _as_text(coco_mask.merge(rles))


def _as_text(rle: dict[str, Any]) -> dict[str, Any]:
    counts = rle["counts"]
    return {
        "size": [int(side) for side in rle["size"]],
        "counts": counts.decode() if isinstance(counts, bytes) else counts,
    }


def _part_to_rle(part: Part, size: tuple[int, int]) -> dict[str, Any]:
    if not isinstance(part, dict):
        return coco_mask.frPyObjects([_check_polygon(part)], *size)[0]
    if not {"size", "counts"} <= part.keys():
        raise ValueError(f"An RLE must have size and counts, got {sorted(part)}.")
    is_compressed = not isinstance(part["counts"], list)  # COCO's crowd regions come as lists of run lengths
    rle = _as_text(part if is_compressed else coco_mask.frPyObjects(part, *part["size"]))
    if (covered := _count_pixels(rle["counts"])) != rle["size"][0] * rle["size"][1]:
        raise ValueError(f"The runs of an RLE of size {rle['size']} cover {covered} pixels.")
    return rle


def _check_polygon(polygon: Sequence[float]) -> list[float]:
    numbers = np.asarray(polygon, dtype=np.float64)
    if numbers.ndim != 1 or numbers.size < 6 or numbers.size % 2 or not np.isfinite(numbers).all():
        raise ValueError(f"A polygon must be [x0, y0, x1, y1, ...] of at least 3 points, got {polygon}.")
    return numbers.tolist()


def _count_pixels(counts: str) -> int:
    """
    How many pixels the runs of a compressed RLE cover. pycocotools does not look: it decodes too few of them to
    whatever is in memory, and merges them without end.

    A run is written in digits of base 32, the lowest first; bit 5 says that another digit follows, bit 4 of the last is
    the sign. From the fourth run on it is the change since the last but one.
    """
    runs: list[int] = []
    run = shift = 0
    for digit in (byte - 48 for byte in counts.encode()):
        if not 0 <= digit < 64:
            raise ValueError(f"The counts of an RLE are damaged: {counts[:40]!r}.")
        run |= (digit & 31) << shift
        shift += 5
        if not digit & 32:
            run -= (digit & 16) << (shift - 4)
            runs.append(run + (runs[-2] if len(runs) > 2 else 0))
            run = shift = 0
    if shift or min(runs, default=0) < 0:
        raise ValueError(f"The counts of an RLE are damaged: {counts[:40]!r}.")
    return sum(runs)


def read_image(source: Path | ImageInDataset) -> bytes:
    """The encoded file of an image."""
    if isinstance(source, ImageInDataset):
        image = source.dataset[source.row][source.column]
        return image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
    return source.read_bytes()


def build_row(annotated: AnnotatedImage, embed: bool = True) -> dict[str, Any]:
    """
    The canonical row of an image, after decoding it to the last pixel: the masks are of the decoded image's size.

    With `embed=False` the row names the image's file instead of holding its bytes, where it can.

    Raises:
        BadImage: for an image that is missing, cannot be decoded, or is of another size than its annotations.
    """
    stated = None if annotated.size is None else (annotated.size[0], annotated.size[1])
    try:
        encoded, size, changed = _decode_upright(read_image(annotated.image), stated)
    except FileNotFoundError as error:
        raise BadImage(f"{annotated.file_name}: missing ({error.filename})") from None
    except UnidentifiedImageError:
        raise BadImage(f"{annotated.file_name}: cannot be decoded (not an image)") from None
    except Exception as error:  # Pillow raises nearly anything on a damaged file
        raise BadImage(f"{annotated.file_name}: cannot be decoded ({error})") from error
    if stated not in (None, size):
        raise BadImage(f"{annotated.file_name}: decodes to {size} (height, width), its annotations are for {stated}")
    if not embed and not changed and isinstance(annotated.image, Path):
        image: dict[str, Any] = {"bytes": None, "path": str(annotated.image.absolute())}
    else:
        image = {"bytes": encoded, "path": annotated.file_name}
    return {
        "image": image,
        "image_id": annotated.image_id,
        "file_name": annotated.file_name,
        "references": [_build_reference(reference, size, annotated.file_name) for reference in annotated.references],
    }


def _decode_upright(encoded: bytes, annotated_size: tuple[int, int] | None) -> tuple[bytes, tuple[int, int], bool]:
    """
    The file's bytes, its size (height, width) as `datasets` will decode it, and whether the bytes had to be changed.

    `datasets` turns an image as its EXIF orientation says. Annotations that were made on the image as it is stored
    would then lie beside it: such a file is written anew without the orientation.
    """
    with Image.open(io.BytesIO(encoded)) as image:
        image.load()
        if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
            return encoded, (image.height, image.width), False
        upright = ImageOps.exif_transpose(image)
        if annotated_size in (None, (upright.height, upright.width)) or annotated_size != (image.height, image.width):
            return encoded, (upright.height, upright.width), False
        exif = image.getexif()
        del exif[ExifTags.Base.Orientation]
        buffer = io.BytesIO()
        image.save(buffer, format="TIFF" if image.mode == "CMYK" else "PNG", exif=exif)  # the same pixels
        return buffer.getvalue(), (image.height, image.width), True


def _build_reference(reference: AnnotatedReference, size: tuple[int, int], file_name: str) -> dict[str, Any]:
    try:
        rle = segmentation_to_rle(reference.segmentation, size)
        bbox = np.asarray(coco_mask.toBbox(rle) if reference.bbox is None else reference.bbox, dtype=np.float32)
        if bbox.shape != (4,) or not np.isfinite(bbox).all():
            raise ValueError(f"A bbox must be [x, y, width, height], got {reference.bbox}.")
    except (TypeError, ValueError) as error:
        raise BadImage(f"{file_name}: ref_id {reference.ref_id}: {error}") from error
    return {
        "ref_id": reference.ref_id,
        "ann_id": reference.ann_id,
        "category": reference.category,
        "bbox": bbox.tolist(),
        "mask": rle,
        "expressions": [{"sent_id": sent_id, "text": text} for sent_id, text in reference.expressions],
    }


def _build_row_or_error(annotated: AnnotatedImage, embed: bool) -> dict[str, Any] | BadImage:
    try:
        return build_row(annotated, embed)
    except BadImage as error:
        return error


def build_rows(
    images: Sequence[AnnotatedImage], embed: bool = True, num_threads: int = 1, progress: bool = True
) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of all images that are good, and what is wrong with each of the others, both in the order given."""
    build = partial(_build_row_or_error, embed=embed)
    results = thread_map(build, images, max_workers=num_threads, desc="Images", unit="image", disable=not progress)
    bad = [str(result) for result in results if isinstance(result, BadImage)]
    return [result for result in results if not isinstance(result, BadImage)], bad


def build_dataset(images: Iterable[AnnotatedImage], skip_bad: bool = False, progress: bool = True) -> datasets.Dataset:
    """
    A dataset in the canonical form. Images stay in their files until the dataset is pushed or written.

    Raises:
        BadImage: when images cannot be used, with the names of all of them; `skip_bad=True` warns and leaves them out.
    """
    rows, bad = build_rows(list(images), embed=False, progress=progress)
    if bad:
        report_bad_images(bad, skip_bad)
    return datasets.Dataset.from_dict({name: [row[name] for row in rows] for name in FEATURES}, features=FEATURES)


def report_bad_images(bad: Sequence[str], skip_bad: bool) -> None:
    """Name every bad image: in an error, or in a warning when they are left out."""
    listing = "\n".join(f"  {problem}" for problem in bad)
    if not skip_bad:
        raise BadImage(f"{len(bad)} images cannot be used; skip_bad=True leaves them out:\n{listing}")
    datasets.logging.get_logger(__name__).warning(f"Left out {len(bad)} images:\n{listing}")
