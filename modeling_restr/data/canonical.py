"""
The canonical form of referring-expression data: one row per image, with all references to it and their expressions.

Readers of every layout (`refer.py`, `referit.py`, ...) return [`AnnotatedImage`]s, which hold no pixels. [`build_row`]
compares one with its decoded image and makes the row. [`build_dataset`] makes a `datasets.Dataset` of many.
"""

import io
import reprlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from pycocotools import mask as coco_mask
from tqdm.auto import tqdm

from .image_files import is_file, resolve_image
from .records import Problems
from .segmentation import (
    Segmentation,
    SeveralObjects,
    are_numbers,
    count_stray_parts,
    decode_mask,  # noqa: F401  (the cards of earlier versions import both from here)
    encode_mask,  # noqa: F401
    object_to_rle,
)


logger = datasets.logging.get_logger(__name__)
_UNDECODABLE = "images that cannot be decoded"

NO_TARGET = -1  # gRefCOCO's annotation id for expressions that refer to nothing
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


class BadImage(ValueError):
    """
    An image that cannot be used with its annotations: it is missing, unreadable or of another size than they say, or
    an object in it has no mask. `problem` is the kind of problem, in the plural.
    """

    def __init__(self, message: str, problem: str = "bad images"):
        super().__init__(message)
        self.problem = problem


@dataclass(frozen=True)
class ImageInDataset:
    """An image in a dataset: `column` of `row`, a `datasets.Image` feature that is not decoded."""

    dataset: datasets.Dataset
    row: int
    column: str = "image"


@dataclass(frozen=True)
class AnnotatedReference:
    """One referred object. `bbox` is [x, y, width, height] in pixels, by default the mask's."""

    ref_id: int
    ann_id: int
    category: str
    segmentation: Segmentation | SeveralObjects
    expressions: tuple[tuple[int, str], ...]  # (sent_id, text)
    bbox: Sequence[float] | None = None

    @property
    def refers_to_nothing(self) -> bool:
        """Whether the expressions refer to nothing, as in gRefCOCO. Any other empty mask is a mistake."""
        return self.ann_id == NO_TARGET or (isinstance(self.segmentation, list | tuple) and not self.segmentation)


@dataclass(frozen=True)
class AnnotatedImage:
    """
    An image as its annotations describe it. `size` is (height, width) if they state it. A file must be in `image_dir`
    if that is given.
    """

    image_id: int
    file_name: str
    image: Path | ImageInDataset
    references: tuple[AnnotatedReference, ...]
    size: tuple[int, int] | None = None
    image_dir: Path | None = None


def check_images(images: Sequence[AnnotatedImage], place: Any) -> None:
    """Refuse images that share a file, and warn about ids that occur more than once in `place`, a file or folder."""
    check_distinct_files(images)
    files = dict.fromkeys((image.image_id, image.file_name) for image in images)  # in order, without repetitions
    _warn_about_repeated_ids(place, "images", (image_id for image_id, _ in files))
    _warn_about_repeated_ids(place, "references", (ref.ref_id for image in images for ref in image.references))


def _warn_about_repeated_ids(place: Any, table: str, ids: Iterable[int]) -> None:
    repeated = [number for number, count in Counter(ids).items() if count > 1]
    if repeated:
        logger.warning(
            f"{place}: {len(repeated)} ids of {table} occur more than once, and each occurrence is counted "
            f"({', '.join(map(str, repeated[:10]))}{', ...' if len(repeated) > 10 else ''})."
        )


def check_distinct_files(images: Iterable[AnnotatedImage]) -> None:
    """Raise a `ValueError` if two images share a file: the annotations of one of them belong to another picture."""
    first: dict[Path, AnnotatedImage] = {}
    for image in images:
        if not isinstance(image.image, Path):
            continue
        other = first.setdefault(image.image, image)
        if other.image_id != image.image_id and is_file(image.image):
            raise ValueError(
                f"Expected one file per image, found {image.image} for image {other.image_id} ({other.file_name}) "
                f"and for image {image.image_id} ({image.file_name}): give a folder in which each has its own."
            )


def read_image(source: Path | ImageInDataset, image_dir: Path | None = None) -> bytes:
    """Read the encoded file of an image. It must be in `image_dir` if that is given. Raises as [`resolve_image`]."""
    if isinstance(source, ImageInDataset):
        image = source.dataset[source.row][source.column] or {"bytes": None, "path": None}
        if image["bytes"] is not None:
            return image["bytes"]
        if not image["path"]:
            raise ValueError("its row holds no image")
        source = Path(image["path"])
    return resolve_image(source, image_dir).read_bytes()


def build_row(annotated: AnnotatedImage, embed: bool = True, problems: Problems | None = None) -> dict[str, Any]:
    """
    Build the canonical row of an image. The whole image is decoded, and its masks have the decoded size.

    With `embed=False` the row names the image's file instead of holding its bytes, if possible. Everything that is
    dropped or doubtful is added to `problems`.

    Raises:
        BadImage: The image is missing, cannot be decoded, or is of another size than its annotations, or an object has
            a damaged or empty mask.
    """
    problems = Problems() if problems is None else problems
    name = f"{annotated.file_name:.200}"
    stated: Any = None if annotated.size is None else tuple(annotated.size)
    try:
        encoded = read_image(annotated.image, annotated.image_dir)
    except FileNotFoundError as error:
        raise BadImage(f"{name}: missing ({error.filename})", "missing images") from None
    except (OSError, ValueError) as error:
        raise BadImage(f"{name}: cannot be read ({error})", "images that cannot be read") from error
    try:
        encoded, size, changed = _decode_upright(encoded, stated)
    except UnidentifiedImageError:
        raise BadImage(
            f"{name}: cannot be decoded (not of a known format, such as JPEG or PNG)", _UNDECODABLE
        ) from None
    except Exception as error:  # Pillow raises nearly anything on a damaged file
        raise BadImage(f"{name}: cannot be decoded ({error})", _UNDECODABLE) from error
    if stated not in (None, size):
        raise BadImage(
            f"{name}: decodes to {size} (height, width), its annotations are for {stated}",
            "images of another size than their annotations",
        )
    if changed:
        problems.add("images with an EXIF rotation that the annotations ignore (look at some)", name)
    if not embed and not changed and isinstance(annotated.image, Path):
        image: dict[str, Any] = {"bytes": None, "path": str(annotated.image.absolute())}
    else:
        image = {"bytes": encoded, "path": annotated.file_name}
    return {
        "image": image,
        "image_id": annotated.image_id,
        "file_name": annotated.file_name,
        "references": [_build_reference(reference, size, name, problems) for reference in annotated.references],
    }


def _decode_upright(encoded: bytes, annotated_size: tuple[int, int] | None) -> tuple[bytes, tuple[int, int], bool]:
    """
    The file's bytes, its size (height, width) as `datasets` will decode it, and whether the bytes had to be changed.

    `datasets` rotates an image by its EXIF orientation. Annotations of the image as stored would then no longer fit, so
    such a file is written again without the orientation.
    """
    with Image.open(io.BytesIO(encoded)) as image:
        if image.format == "EPS":
            raise ValueError("EPS files are programs, which are not run")
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


def _build_reference(
    reference: AnnotatedReference, size: tuple[int, int], file_name: str, problems: Problems
) -> dict[str, Any]:
    place = f"{file_name}: ref_id {reference.ref_id}"
    try:
        rle = object_to_rle(reference.segmentation, size, may_be_empty=reference.refers_to_nothing)
        bbox = _check_bbox(coco_mask.toBbox(rle) if reference.bbox is None else reference.bbox)
        num_stray = count_stray_parts(reference.segmentation)
    except ValueError as error:
        raise BadImage(f"{place}: {error}", "images with an object without a usable mask or box") from error
    problems.add("polygons of one or two points, dropped", *[place] * num_stray)
    return {
        "ref_id": reference.ref_id,
        "ann_id": reference.ann_id,
        "category": reference.category,
        "bbox": bbox,
        "mask": rle,
        "expressions": [{"sent_id": sent_id, "text": text} for sent_id, text in reference.expressions],
    }


def _check_bbox(bbox: Any) -> list[float]:
    if not are_numbers(bbox) or len(bbox) != 4 or not all(abs(number) < 2**31 for number in bbox):
        raise ValueError(f"A bbox must be [x, y, width, height], got {reprlib.repr(bbox)}.")
    return np.asarray(bbox, dtype=np.float32).tolist()


def build_row_or_error(annotated: AnnotatedImage, problems: Problems, embed: bool = True) -> dict[str, Any] | BadImage:
    """Return the row from [`build_row`] or its error, and add the problems of both to `problems`."""
    found = Problems()
    try:
        row = build_row(annotated, embed, found)
    except BadImage as error:
        problems.add(error.problem, f"{annotated.file_name:.200}")
        return error
    problems.extend(found)
    return row


def build_dataset(images: Iterable[AnnotatedImage], skip_bad: bool = False, progress: bool = True) -> datasets.Dataset:
    """
    Build a dataset in the canonical form. Images stay in their files until the dataset is pushed or written.

    Raises:
        BadImage: Some images cannot be used. The message lists all of them. `skip_bad=True` leaves them out instead,
            with one warning that sums up what was dropped.
    """
    problems = Problems()
    bar = tqdm(list(images), desc="Images", unit="image", disable=not progress)
    results = [build_row_or_error(image, problems, embed=False) for image in bar]
    bad = [f"  {result}" for result in results if isinstance(result, BadImage)]
    if bad and not skip_bad:
        listing = "\n".join(bad)
        raise BadImage(f"{len(bad)} images cannot be used; skip_bad=True leaves them out:\n{listing}")
    if problems:
        left_out = [f"Left out {len(bad)} images:", *bad] if bad else []
        logger.warning("\n".join([*left_out, "In total:", problems.summary()]))
    rows = [result for result in results if not isinstance(result, BadImage)]
    return datasets.Dataset.from_dict({name: [row[name] for row in rows] for name in FEATURES}, features=FEATURES)
