"""
Reading of a COCO instances file from any tool: checks of its records, its image files and its masks.

A mistake that makes the whole file unusable, such as two records with one id, raises an error that names the file and
the record. An image or object with a mistake is left out and added to the [`Problems`].
"""

import reprlib
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import ExifTags, Image
from pycocotools import mask as coco_mask

from .canonical import AnnotatedImage, check_distinct_files
from .image_files import image_finder, resolve_image
from .records import ID, LIST, TEXT, TEXT_OR_TEXTS, Problems, check_fields, index_records, read_json
from .segmentation import are_numbers, count_stray_parts, segmentation_to_rle


MAX_EXPRESSIONS = 100  # per instance, so that sent_id = 100 * ann_id + index is unique
_LARGEST_ID = 2**63 - 1  # int64, as in the canonical form
_LARGEST_IDS = {"annotations": _LARGEST_ID // MAX_EXPRESSIONS - 1}
# The largest size to trust when there is no image file to compare it with: a mask takes one byte per pixel.
_MAX_UNSEEN_PIXELS = 2**27


class _FileSize(NamedTuple):
    """(height, width) of an image file as shown and as stored: EXIF may rotate it by 90 degrees."""

    shown: tuple[int, int]
    stored: tuple[int, int]


@dataclass(frozen=True, eq=False)
class CocoObject:
    """An annotation and its mask as a compressed RLE, or `None` if it has no usable mask."""

    annotation: dict[str, Any]
    mask: dict[str, Any] | None

    @property
    def number(self) -> int:
        return self.annotation["id"]


class CocoFile:
    """
    A COCO instances file: `images` and `categories` by id, and the `annotations` of each image, sorted by id.

    Args:
        path: The file.
        image_dir: The folder that file names are relative to; see [`image_finder`].
        problems: Collects what is left out.
        need_categories: Whether each annotation must have a category of the file.

    Raises:
        ValueError: The file is not a COCO instances file. The message says what is missing or wrong, and where.
    """

    def __init__(self, path: Path, image_dir: str | Path, problems: Problems, need_categories: bool = True) -> None:
        self.path, self.image_dir, self.problems = path, Path(image_dir), problems
        content = read_json(path)
        if isinstance(content, dict) and not need_categories:
            content = {"categories": [], **content}
        self.images = self._index(content, "images", {})
        self.categories = self._index(content, "categories", {"name": TEXT})
        kinds = {"image_id": ID, "category_id": ID} if need_categories else {"image_id": ID}
        annotations = self._index(content, "annotations", kinds)
        if need_categories:
            self._check_categories(annotations)
        self.annotations = self._group_by_image(annotations)
        find_image = image_finder(image_dir)
        self._paths = {number: find_image(self._file_name(number)) for number in self.images}
        check_distinct_files(self._image(number) for number in self.images)

    def _image(self, number: int, size: tuple[int, int] | None = None) -> AnnotatedImage:
        return AnnotatedImage(number, self._file_name(number), self._paths[number], (), size, self.image_dir)

    def _index(self, content: Any, table: str, kinds: dict[str, Any]) -> dict[int, dict[str, Any]]:
        indexed = index_records(content, table, self.path)
        largest = _LARGEST_IDS.get(table, _LARGEST_ID)
        for number, record in indexed.items():
            if not 0 <= number <= largest:
                raise ValueError(f"{self.path}: the ids of {table} must be from 0 to {largest}, got {number}.")
            check_fields(record, kinds, f"{self.path}: {table}, id {number}")
        return indexed

    def _check_categories(self, annotations: dict[int, dict[str, Any]]) -> None:
        for number, annotation in annotations.items():
            if annotation["category_id"] not in self.categories:
                raise ValueError(
                    f"{self.path}: annotation {number} is of category {annotation['category_id']}, which is not in the "
                    "file."
                )

    def _group_by_image(self, annotations: dict[int, dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
        grouped: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for _, annotation in sorted(annotations.items()):
            grouped[annotation["image_id"]].append(annotation)
        lost = [annotation["id"] for number in grouped.keys() - self.images.keys() for annotation in grouped[number]]
        if lost:  # assigned, not added: they are found again when another split of the same file is read
            self.problems["annotations of images that are not in the file"] = [f"annotation {n}" for n in sorted(lost)]
        return {number: grouped[number] for number in self.images if number in grouped}

    def _file_name(self, image_id: int) -> str:
        """The name of an image's file. LVIS gives only a URL, which ends in COCO's folder and the name."""
        image = self.images[image_id]
        field = "coco_url" if image.get("file_name") is None and "coco_url" in image else "file_name"
        check_fields(image, {field: TEXT}, f"{self.path}: image {image_id}")
        return image[field] if field == "file_name" else "/".join(image[field].split("/")[-2:])

    def category_of(self, annotation: dict[str, Any]) -> str:
        """The name of an annotation's category, "" for none."""
        number = annotation.get("category_id")
        return self.categories[number]["name"] if ID.matches(number) and number in self.categories else ""

    def captions_of(self, annotation: dict[str, Any]) -> list[str]:
        """The captions in the field `caption` of an annotation, which may be missing, a text or a list of texts."""
        if annotation.get("caption") is None:
            return []
        check_fields(annotation, {"caption": TEXT_OR_TEXTS}, f"{self.path}: annotation {annotation['id']}")
        captions = annotation["caption"]
        return captions if isinstance(captions, list) else [captions]

    def incomplete_categories(self, image_id: int) -> list[int]:
        """The categories that are not fully annotated in an image, according to LVIS's field."""
        image, field = self.images[image_id], "not_exhaustive_category_ids"
        if image.get(field) is None:
            return []
        check_fields(image, {field: LIST}, f"{self.path}: image {image_id}")
        return [number for number in image[field] if ID.matches(number) and number in self.categories]

    def describe_image(self, image_id: int) -> tuple[AnnotatedImage, bool]:
        """
        The image without references, and whether its masks can be decoded. For that, its file must confirm its size if
        it can be read. Building the row of an unusable image raises the error.
        """
        try:
            in_file = _read_size(self._paths[image_id], self.image_dir)
        except ValueError:
            in_file = None
        size = self._find_size(image_id, in_file)
        return self._image(image_id, size), size is not None if in_file is None else size in in_file

    def _find_size(self, image_id: int, in_file: _FileSize | None) -> tuple[int, int] | None:
        """(height, width) from the image's record, or else from its RLEs if they fit its file, or from the file."""
        image = self.images[image_id]
        segmentations = (annotation.get("segmentation") for annotation in self.annotations.get(image_id, ()))
        in_rles = [_as_size(rle.get("size")) for rle in segmentations if isinstance(rle, dict)]
        stated = _as_size([image.get("height"), image.get("width")])
        if in_file is None:
            sizes = (size for size in (stated, *in_rles) if size and size[0] * size[1] <= _MAX_UNSEEN_PIXELS)
            return next(sizes, None)
        return stated or (
            in_file.stored if in_file.stored in in_rles and in_file.shown not in in_rles else in_file.shown
        )

    def read_objects(self, image: AnnotatedImage, read_crowds: bool) -> list[CocoObject]:
        """The objects of a usable image, sorted by id. Without `read_crowds` those marked as crowds have no mask."""
        assert image.size is not None
        return [
            CocoObject(annotation, self._read_mask(annotation, image.size, read_crowds))
            for annotation in self.annotations.get(image.image_id, ())
        ]

    def _read_mask(
        self, annotation: dict[str, Any], size: tuple[int, int], read_crowds: bool
    ) -> dict[str, Any] | None:
        name, segmentation = f"annotation {annotation['id']}", annotation.get("segmentation")
        if self._is_crowd(annotation) and not read_crowds:
            self.problems.add(
                "annotations marked as crowds (iscrowd 1), which crowds_as_instances reads as one object each", name
            )
            return None
        if segmentation is None or segmentation in ([], {}, ""):
            self.problems.add("annotations without a mask", name)
            return None
        try:
            mask = segmentation_to_rle(segmentation, size)
        except ValueError as error:
            self.problems.add(
                "annotations with a mask that is damaged or of another size than their image", f"{name} ({error})"
            )
            return None
        self.problems.add("polygons of one or two points, dropped", *[name] * count_stray_parts(segmentation))
        if not coco_mask.area(mask):
            self.problems.add("annotations whose mask has no pixel in their image", name)
            return None
        return mask

    def _is_crowd(self, annotation: dict[str, Any]) -> bool:
        value = annotation.get("iscrowd")
        text = str(value).strip().lower()  # some tools write text or a truth value
        if text not in ("", "none", "0", "0.0", "false", "1", "1.0", "true"):
            raise ValueError(
                f"{self.path}: annotation {annotation['id']}: expected iscrowd to be 0 or 1, got {reprlib.repr(value)}."
            )
        return text in ("1", "1.0", "true")


def _read_size(path: Path, image_dir: Path) -> _FileSize:
    """The size in the header of an image file in `image_dir`; `ValueError` if it cannot be read."""
    try:
        with Image.open(resolve_image(path, image_dir)) as image:
            # Pillow would decode a whole PNG to look for EXIF after its pixels.
            has_exif = image.format != "PNG" or "exif" in image.info
            is_rotated = has_exif and image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            stored = (image.height, image.width)
    except Exception as error:  # Pillow raises nearly anything on a damaged file
        raise ValueError(f"{path} cannot be read ({error}).") from error
    return _FileSize(stored[::-1] if is_rotated else stored, stored)


def _as_size(value: Any) -> tuple[int, int] | None:
    """The value as a (height, width), or `None` if it is something else."""
    if are_numbers(value) and len(value) == 2 and all(isinstance(side, int) and side > 0 for side in value):
        return value[0], value[1]
    return None
