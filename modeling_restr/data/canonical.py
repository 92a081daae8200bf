"""
The canonical form of referring-expression data: one row an image, with all references to it and all their expressions.

Readers of every layout (`refer.py`, `referit.py`, ...) yield [`AnnotatedImage`]s, which hold no pixels; [`build_row`]
checks one against its decoded image and makes the row, [`build_dataset`] a `datasets.Dataset` of many.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
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

# Polygons as [[x0, y0, x1, y1, ...], ...], a COCO RLE (compressed or not), a list of RLEs, or a mask (height, width);
# an empty list is an expression that refers to nothing in the image.
Segmentation = list[list[float]] | dict[str, Any] | list[dict[str, Any]] | np.ndarray


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
    if isinstance(segmentation, np.ndarray):
        rles = [encode_mask(segmentation)]
    elif isinstance(segmentation, dict):
        rles = [_compress(segmentation)]
    elif len(segmentation) == 0:
        return encode_mask(np.zeros(size, dtype=bool))
    elif isinstance(segmentation[0], dict):
        rles = [_compress(part) for part in segmentation]  # type: ignore[arg-type]
    else:
        rles = coco_mask.frPyObjects(_check_polygons(segmentation), *size)
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


def _compress(rle: dict[str, Any]) -> dict[str, Any]:
    """COCO's crowd regions come as lists of run lengths, all else as compressed text or bytes."""
    if isinstance(rle["counts"], list):
        return coco_mask.frPyObjects(rle, *rle["size"])
    return {"size": list(rle["size"]), "counts": rle["counts"]}


def _check_polygons(polygons: Any) -> list[list[float]]:
    for polygon in polygons:
        if len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(f"A polygon must be [x0, y0, x1, y1, ...] of at least 3 points, got {polygon}.")
    return [[float(number) for number in polygon] for polygon in polygons]


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
    try:
        encoded = read_image(annotated.image)
        encoded, size, changed = _decode_upright(encoded, annotated.size)
    except FileNotFoundError as error:
        raise BadImage(f"{annotated.file_name}: missing ({error.filename})") from None
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadImage(f"{annotated.file_name}: cannot be decoded ({error})") from error
    if annotated.size is not None and size != tuple(annotated.size):
        raise BadImage(
            f"{annotated.file_name}: decodes to {size} (height, width), its annotations are for {annotated.size}"
        )
    by_path = not embed and not changed and isinstance(annotated.image, Path)
    return {
        "image": {"bytes": None, "path": str(annotated.image)}
        if by_path
        else {"bytes": encoded, "path": annotated.file_name},
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
        quality = {"quality": "keep"} if image.format == "JPEG" else {}
        image.save(buffer, format=image.format, exif=exif, **quality)
        return buffer.getvalue(), (image.height, image.width), True


def _build_reference(reference: AnnotatedReference, size: tuple[int, int], file_name: str) -> dict[str, Any]:
    try:
        rle = segmentation_to_rle(reference.segmentation, size)
    except ValueError as error:
        raise BadImage(f"{file_name}: ref_id {reference.ref_id}: {error}") from error
    bbox = coco_mask.toBbox(rle).tolist() if reference.bbox is None else [float(side) for side in reference.bbox]
    return {
        "ref_id": reference.ref_id,
        "ann_id": reference.ann_id,
        "category": reference.category,
        "bbox": bbox,
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
    return datasets.Dataset.from_list(rows, features=FEATURES)


def report_bad_images(bad: Sequence[str], skip_bad: bool) -> None:
    """Name every bad image: in an error, or in a warning when they are left out."""
    listing = "\n".join(f"  {problem}" for problem in bad)
    if not skip_bad:
        raise BadImage(f"{len(bad)} images cannot be used; skip_bad=True leaves them out:\n{listing}")
    datasets.logging.get_logger(__name__).warning(f"Left out {len(bad)} images:\n{listing}")
