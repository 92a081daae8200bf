"""
Referring expressions for any COCO instances file: generated from category, place, order and size, or its captions.

Every generated expression is true of exactly one annotated instance: each statement is checked against the geometry
with a margin before it is put into words, and an instance that allows none is left out.

    images = read_coco("instances.json", "photos", split="train")
    dataset = build_dataset(images)
"""

import hashlib
import logging
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from .canonical import AnnotatedImage, AnnotatedReference
from .coco_file import MAX_EXPRESSIONS, CocoFile, CocoObject
from .expressions import Instance, generate_expressions, measure_mask
from .records import Problems
from .segmentation import decode_mask


logger = logging.getLogger(__name__)

SPLITS = ("train", "val")


def read_coco(
    instances_path: str | Path,
    image_dir: str | Path,
    *,
    expressions_per_instance: int = 3,
    seed: int = 0,
    min_area_share: float = 0.005,
    split: str | None = None,
    val_share: float = 0.1,
    crowds_as_instances: bool = False,
    captions: bool = False,
    problems: Problems | None = None,
    progress: bool = True,
) -> list[AnnotatedImage]:
    """
    The images of a COCO instances file, sorted by id, with generated expressions or its own captions.

    Masks may be polygons or RLEs. The expressions of an image depend on `seed`, its id and its annotations only, not
    on the rest of the file or its order. Instances that allow no unambiguous expression are left out, and so are
    images without any. No expression of an image mentions a category with a crowd in it (`iscrowd`), a category that
    LVIS marks as not fully annotated there, or one with an annotation without a mask that fits the image. Everything
    that is left out is counted by reason.

    Args:
        instances_path: The file: `images` (id, file_name, and height and width unless the image files can be read),
            `annotations` (id, image_id, category_id, segmentation) and `categories` (id, name).
        image_dir: The folder that the file names are relative to. As in [`read_refer`], COCO's usual folders below it
            are also searched.
        expressions_per_instance: Maximum number per instance, 1 to 100. Some allow fewer.
        seed: Seed of the generated expressions, 0 or more.
        min_area_share: Share of the image's area below which no expression refers to an instance.
        split: "train" or "val" for a part of the file, `None` for all. An image's split depends on its id only, so it
            stays the same when the file grows or the seed changes.
        val_share: Expected share of the images in "val", 0 to 1.
        crowds_as_instances: Whether annotations marked as crowds are read as one object each. Some tools mark every
            mask that was drawn with a brush.
        captions: Whether to take the `caption` of each annotation, a text or a list of texts, instead of generated
            expressions. The mask is the annotation's in any case. Annotations without a caption are left out.
        problems: Collects what is left out. By default this is logged as one warning.
        progress: Whether to show a progress bar.

    Returns:
        Images without pixels, for [`build_dataset`]. Unusable images are included without references, and building
        their rows raises the error.

    Raises:
        ValueError: The file is not a COCO instances file (the message says what is missing or wrong, and where), two
            images share a file, an argument is out of its range, or no expression at all can be made.
    """
    _check_arguments(expressions_per_instance, seed, min_area_share, split, val_share)
    found = Problems() if problems is None else problems
    file = CocoFile(Path(instances_path), image_dir, found, need_categories=not captions)
    refer: _CaptionReader | _Generator = (
        _CaptionReader(file)
        if captions
        else _Generator(file, expressions_per_instance, seed, min_area_share, crowds_as_instances)
    )
    selected = _select_images(file, split, val_share)
    images = []
    for image_id in tqdm(selected, desc="Expressions", unit="image", disable=not progress):
        image, is_usable = file.describe_image(image_id)
        if is_usable:
            image = replace(image, references=tuple(refer(image)))
        if image.references or not is_usable:
            images.append(image)
        else:
            found.add("images in which nothing is referred to", f"image {image_id}")
    if not images:
        raise ValueError(
            f"Expected an object in {instances_path} that can be referred to, found none:\n{found.summary()}"
        )
    if found and problems is None:
        logger.warning("Left out of %s:\n%s", instances_path, found.summary())
    return images


def _check_arguments(
    expressions_per_instance: int, seed: int, min_area_share: float, split: str | None, val_share: float
) -> None:
    if not 1 <= expressions_per_instance <= MAX_EXPRESSIONS:
        raise ValueError(
            f"expressions_per_instance must be between 1 and {MAX_EXPRESSIONS}, got {expressions_per_instance}."
        )
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}.")
    if not 0 <= min_area_share < 1:
        raise ValueError(f"min_area_share must be at least 0 and below 1, got {min_area_share}.")
    if split is not None and split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS} or None, got {split!r}.")
    check_val_share(val_share)


def check_val_share(val_share: float) -> None:
    if not 0 <= val_share <= 1:
        raise ValueError(f"val_share must be between 0 and 1, got {val_share}.")


def draw_share(name: object) -> float:
    """A pseudo-random number from 0 to 1 that depends on the id or name of an image only."""
    return int.from_bytes(hashlib.sha256(str(name).encode()).digest()[:8]) / 2**64


def split_of(name: object, val_share: float) -> str:
    """The split of an image, which depends on its id or name only."""
    return "val" if draw_share(name) < val_share else "train"


def _select_images(file: CocoFile, split: str | None, val_share: float) -> list[int]:
    """The ids of the images of a split that have annotations."""
    image_ids = [image_id for image_id in sorted(file.images) if split in (None, split_of(image_id, val_share))]
    if not image_ids:
        raise ValueError(
            f"None of the {len(file.images)} images of {file.path} are in split {split!r} with val_share {val_share}: "
            "choose another share, or one file for each split."
        )
    for image_id in image_ids:
        if image_id not in file.annotations:
            file.problems.add("images without annotations", f"image {image_id}")
    return [image_id for image_id in image_ids if image_id in file.annotations]


def _build_reference(file: CocoFile, instance: CocoObject, texts: Sequence[str]) -> AnnotatedReference:
    assert instance.mask is not None
    number = instance.number
    expressions = tuple((number * MAX_EXPRESSIONS + index, text) for index, text in enumerate(texts))
    return AnnotatedReference(number, number, file.category_of(instance.annotation), instance.mask, expressions)


@dataclass(frozen=True)
class _CaptionReader:
    """Refers to the objects of an image by the captions of their annotations."""

    file: CocoFile

    def __call__(self, image: AnnotatedImage) -> Iterator[AnnotatedReference]:
        for instance in self.file.read_objects(image, read_crowds=True):
            captions = self.file.captions_of(instance.annotation)
            texts = [text for text in captions if re.search(r"\w", text)]
            if len(texts) > MAX_EXPRESSIONS:
                raise ValueError(
                    f"{self.file.path}: expected at most {MAX_EXPRESSIONS} captions of an annotation, got {len(texts)} "
                    f"of annotation {instance.number}."
                )
            problem = "captions without words" if captions else "annotations without a caption"
            if len(texts) < max(len(captions), 1):
                self.file.problems.add(problem, f"annotation {instance.number}")
            if texts and instance.mask is not None:
                yield _build_reference(self.file, instance, texts)


class _Generator:
    """Refers to the objects of an image by generated expressions."""

    def __init__(
        self,
        file: CocoFile,
        expressions_per_instance: int,
        seed: int,
        min_area_share: float,
        crowds_as_instances: bool,
    ) -> None:
        self.file, self.seed, self.crowds_as_instances = file, seed, crowds_as_instances
        self.expressions_per_instance, self.min_area_share = expressions_per_instance, min_area_share
        self.nouns = {number: _to_noun(category["name"]) for number, category in file.categories.items()}
        for number, noun in self.nouns.items():
            if not re.search(r"\w", noun):
                name = file.categories[number]["name"]
                raise ValueError(f"{file.path}: expected a category's name to have words, got {name!r} for {number}.")

    def __call__(self, image: AnnotatedImage) -> Iterator[AnnotatedReference]:
        objects = self.file.read_objects(image, self.crowds_as_instances)
        unclear_nouns = {self.nouns[number] for number in self.file.incomplete_categories(image.image_id)}
        unclear_nouns |= {self._noun_of(instance) for instance in objects if instance.mask is None}
        measured = {
            instance: measure_mask(self._noun_of(instance), decode_mask(instance.mask), self.min_area_share)
            for instance in objects
            if instance.mask is not None
        }
        rng = np.random.default_rng((self.seed, image.image_id))
        chosen = generate_expressions(list(measured.values()), rng, self.expressions_per_instance, unclear_nouns)
        for index, (instance, measures) in enumerate(measured.items()):
            if index in chosen:
                yield _build_reference(self.file, instance, [expression.text for expression in chosen[index]])
            else:
                self.file.problems.add(self._why_not(measures, unclear_nouns), f"annotation {instance.number}")

    def _noun_of(self, instance: CocoObject) -> str:
        return self.nouns[instance.annotation["category_id"]]

    def _why_not(self, instance: Instance, unclear_nouns: Collection[str]) -> str:
        if not instance.can_be_target:
            return f"objects below {self.min_area_share:.2%} of their image (min_area_share)"
        if instance.noun in unclear_nouns:
            return "objects of a category that has others in their image without a mask, such as crowds"
        return "objects that cannot be told apart from others in their image"


def _to_noun(name: str) -> str:
    """A category's name in plain words: "traffic light" for "Traffic_Light", "bow" for LVIS's "bow_(weapon)"."""
    return " ".join(re.sub(r"\(.*?\)|_", " ", name).lower().split())
