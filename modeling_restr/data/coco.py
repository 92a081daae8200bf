"""Referring expressions for any COCO instances file: generated from category, place, order and size.

Every expression is true of exactly one annotated instance, by construction: each statement is checked against the
geometry with a margin before it is put into words, and an instance that allows none is left out.

    images = read_coco("instances.json", "photos", split="train")
    dataset = build_dataset(images)
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from .canonical import AnnotatedImage, AnnotatedReference, decode_mask
from .coco_file import MAX_EXPRESSIONS, CocoFile, CocoObject
from .expressions import Instance, generate_expressions, measure_mask
from .records import Problems


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
    The images of a COCO instances file, in the order of their ids, with generated expressions or its own captions.

    Masks may be polygons or RLEs. What an image gets depends on `seed`, its id and its annotations only, not on the
    rest of the file or its order. Left out are instances that allow no unambiguous expression, and images without
    any. Nothing is said of a category in an image where it has a crowd (`iscrowd`), LVIS's mark that not all of it
    is annotated, or an annotation without a mask that fits the image. What is left out is counted by reason.

    Args:
        instances_path: The file: `images` (id, file_name, and height and width unless the image files are there to
            tell), `annotations` (id, image_id, category_id, segmentation) and `categories` (id, name).
        image_dir: The folder that the file names are relative to; as for [`read_refer`], COCO's usual folders below
            it are looked into.
        expressions_per_instance: The most for each instance, 1 to 100; some allow fewer.
        seed: A whole number from 0; another seed gives other expressions.
        min_area_share: Share of the image's area below which instances are not referred to themselves.
        split: "train" or "val" for a part of the file, `None` for all. An image's part depends on its id only, so it
            stays when the file grows or another seed is taken.
        val_share: The expected share of the images in "val", 0 to 1.
        crowds_as_instances: Whether annotations marked as crowds are read as one object each. Some tools mark every
            mask that was drawn with a brush.
        captions: Whether the `caption` of each annotation, a text or a list of texts, is taken instead of generated
            expressions. Whatever it is about, its mask is the annotation's; annotations without one are left out.
        problems: Takes note of what is left out; by default that is logged as one warning.
        progress: Whether to show a progress bar.

    Returns:
        Images without pixels, for [`build_dataset`]; those that cannot be used are among them without references, and
        building their rows says what is wrong.

    Raises:
        ValueError: for a file that is no COCO instances file (the message says what is missing or wrong, and where),
            for two images of one file, for an argument out of its range, and when no expression at all can be made.
    """
    _check_arguments(expressions_per_instance, seed, min_area_share, split, val_share)
    found = Problems() if problems is None else problems
    file = CocoFile(Path(instances_path), image_dir, found, need_categories=not captions)
    refer: _CaptionReader | _Generator = (
        _CaptionReader(file)
        if captions
        else _Generator(file, expressions_per_instance, seed, min_area_share, crowds_as_instances)
    )
    images = []
    for image_id in tqdm(
        _select_images(file, split, val_share), desc="Expressions", unit="image", disable=not progress
    ):
        image, is_usable = file.describe_image(image_id)
        if is_usable:
            image = replace(image, references=tuple(refer(image)))
        if image.references or not is_usable:  # building its row will say what is wrong
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
    if not 0 <= val_share <= 1:
        raise ValueError(f"val_share must be between 0 and 1, got {val_share}.")


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


def draw_share(name: object) -> float:
    """A number from 0 to 1, drawn for the id or the name of an image: always the same one."""
    return int.from_bytes(hashlib.sha256(str(name).encode()).digest()[:8]) / 2**64


def split_of(name: object, val_share: float) -> str:
    """The split of an image, by its id or name alone."""
    return "val" if draw_share(name) < val_share else "train"


def _to_noun(name: str) -> str:
    """A category's name as it is said: "traffic light" for "Traffic_Light", "bow" for LVIS's "bow_(weapon)"."""
    return " ".join(re.sub(r"\(.*?\)|_", " ", name).lower().split())


def _build_reference(file: CocoFile, instance: CocoObject, texts: Sequence[str]) -> AnnotatedReference:
    assert instance.mask is not None
    number = instance.number
    expressions = tuple((number * MAX_EXPRESSIONS + index, text) for index, text in enumerate(texts))
    return AnnotatedReference(number, number, file.category_of(instance.annotation), instance.mask, expressions)


@dataclass(frozen=True)
class _CaptionReader:
    """Refers to objects by the captions of their annotations."""

    file: CocoFile

    def __call__(self, image: AnnotatedImage) -> Iterator[AnnotatedReference]:
        assert image.size is not None
        for instance in self.file.read_objects(image.image_id, image.size, read_crowds=True):
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
    """Refers to objects by generated expressions."""

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
                raise ValueError(f"{file.path}: category {number} has no name that can be said, got {name!r}.")

    def __call__(self, image: AnnotatedImage) -> Iterator[AnnotatedReference]:
        assert image.size is not None
        objects = self.file.read_objects(image.image_id, image.size, self.crowds_as_instances)
        unclear_nouns = {self.nouns[number] for number in self.file.incomplete_categories(image.image_id)}
        unclear_nouns |= {self._noun_of(instance) for instance in objects if instance.mask is None}
        clear = [instance for instance in objects if instance.mask is not None]
        instances = [
            measure_mask(self._noun_of(instance), decode_mask(instance.mask), self.min_area_share)
            for instance in clear
            if instance.mask is not None
        ]
        rng = np.random.default_rng((self.seed, image.image_id))
        said = generate_expressions(instances, rng, self.expressions_per_instance, unclear_nouns)
        for index, (instance, measured) in enumerate(zip(clear, instances)):
            if index in said:
                yield _build_reference(self.file, instance, [expression.text for expression in said[index]])
            else:
                self.file.problems.add(self._why_not(measured, unclear_nouns), f"annotation {instance.number}")

    def _noun_of(self, instance: CocoObject) -> str:
        return self.nouns[instance.annotation["category_id"]]

    def _why_not(self, instance: Instance, unclear_nouns: Collection[str]) -> str:
        if not instance.can_be_target:
            return f"objects below {self.min_area_share:.2%} of their image (min_area_share)"
        if instance.noun in unclear_nouns:
            return "objects of categories of which their image has more, such as crowds, without a mask"
        return "objects that nothing tells apart from others of their image"
