"""Referring expressions for any COCO instances file: generated from category, place, order and size.

Every expression is true of exactly one annotated instance, by construction: each statement is checked against the
geometry with a margin before it is put into words, and an instance that allows none is left out.

    images = read_coco("instances.json", "photos", split="train")
    dataset = build_dataset(images)

The generator stands alone: [`find_statements`] and [`generate_expressions`] take [`Instance`]s from any source.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image
from pycocotools import mask as coco_mask
from tqdm.auto import tqdm

from .canonical import AnnotatedImage, AnnotatedReference, decode_mask, segmentation_to_rle
from .refer import image_finder, read_json


logger = logging.getLogger(__name__)

SPLITS = ("train", "val")
MAX_EXPRESSIONS = 100  # of an instance, so that sent_id = 100 * ann_id + index is unique

# {0} is the noun, {1} the ordinal.
PHRASES = {
    "only": ("{0}",),
    "leftmost": ("leftmost {0}", "{0} furthest to the left"),
    "rightmost": ("rightmost {0}", "{0} furthest to the right"),
    "topmost": ("topmost {0}", "highest {0}", "{0} closest to the top"),
    "bottommost": ("bottommost {0}", "lowest {0}", "{0} closest to the bottom"),
    "left of all": ("left {0}", "{0} on the left", "{0} to the left", "{0} on the left side"),
    "right of all": ("right {0}", "{0} on the right", "{0} to the right", "{0} on the right side"),
    "above all": ("top {0}", "upper {0}", "{0} at the top"),
    "below all": ("bottom {0}", "lower {0}", "{0} at the bottom"),
    "on the left": ("{0} on the left", "{0} on the left side"),
    "on the right": ("{0} on the right", "{0} on the right side"),
    "at the top": ("{0} at the top",),
    "at the bottom": ("{0} at the bottom",),
    "in the middle": ("{0} in the middle", "{0} in the center"),
    "middle of all": ("middle {0}", "center {0}", "{0} in the middle", "{0} in the center"),
    "biggest": ("biggest {0}", "largest {0}"),
    "smallest": ("smallest {0}",),
    "bigger": ("bigger {0}", "larger {0}", "big {0}"),
    "smaller": ("smaller {0}", "small {0}"),
    **{
        f"{vertical} {side}": (f"{vertical} {side} {{0}}", f"{{0}} in the {vertical} {side}", f"{other} {side} {{0}}")
        for vertical, other in (("top", "upper"), ("bottom", "lower"))
        for side in ("left", "right")
    },
    **{
        f"from the {end}": (f"{{1}} {{0}} from the {end}", f"{{0}} that is {{1}} from the {end}")
        for end in ("left", "right", "top", "bottom")
    },
}
ORDINALS = (("first", "1st"), ("second", "2nd"), ("third", "3rd"), ("fourth", "4th"), ("fifth", "5th"))
KIND_WEIGHTS = {"category": 0.3, "place": 0.35, "order": 0.2, "size": 0.15}
_PHRASE_WORDS = frozenset(
    word for text in (*itertools.chain(*PHRASES.values()), *itertools.chain(*ORDINALS)) for word in text.split()
)

# Lengths are shares of the image's width or height, areas shares of the image.
CLEAR_GAP = 0.06  # between the centres of instances that a place or an order tells apart
CLEAR_EDGE = 0.01  # between their edges on either side
CLEAR_OVERLAP = 0.4  # of the narrower one's extent, that the centres must also be apart
CLEAR_RATIO = 2.0  # between areas, of instances that size tells apart
FRAME = 0.012  # an instance this near to the image's edge may go on beyond it
OWN_PLACE = 0.3  # from the image's edge, where the only one of its category is on that side of the image
COUNTED_RATIO = 0.2  # of the largest area of its category, below which some would not count an instance


# --- Expressions ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Instance:
    """
    One object of an image.

    noun: What it is called, in lower case; instances of equal nouns are told apart.
    box: (left, top, right, bottom) as shares of the image's width and height.
    center: (x, y) of the mask's centroid, in the same unit.
    area: The mask's share of the image.
    can_be_target: `False` for what others are told apart from, but is never referred to itself.
    """

    noun: str
    box: tuple[float, float, float, float]
    center: tuple[float, float]
    area: float
    can_be_target: bool = True

    @property
    def middle(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    @property
    def extent(self) -> tuple[float, float]:
        return self.box[2] - self.box[0], self.box[3] - self.box[1]

    @property
    def touches_frame(self) -> bool:
        return min(self.box) < FRAME or max(self.box) > 1 - FRAME


class Statement(NamedTuple):
    """
    What is true of the instance of index `target` and of no other instance of its noun.

    `kind` is "category", "place", "order" or "size", `name` a key of `PHRASES`, `rank` from 0 for an order.
    """

    kind: str
    name: str
    target: int
    rank: int = 0


class Expression(NamedTuple):
    """A statement in words."""

    text: str
    statement: Statement


def measure_mask(noun: str, mask: np.ndarray, min_area_share: float = 0.0) -> Instance:
    """
    The instance of a mask (height, width) bool; it can be a target from `min_area_share` of the image on.

    Raises:
        ValueError: for an empty mask.
    """
    if not mask.any():
        raise ValueError("An instance's mask must not be empty.")
    spans = []
    for axis in (0, 1):
        counts = mask.sum(axis=axis)  # the mask's pixels in each column, then in each row
        places = np.arange(len(counts)) + 0.5
        inside = places[counts > 0] / len(counts)
        half = 0.5 / len(counts)
        spans.append((inside[0] - half, inside[-1] + half, places @ counts / counts.sum() / len(counts)))
    (left, right, x), (top, bottom, y) = spans
    area = float(counts.sum() / mask.size)
    return Instance(noun, (left, top, right, bottom), (x, y), area, can_be_target=area >= min_area_share)


def generate_expressions(
    instances: Sequence[Instance],
    rng: np.random.Generator,
    expressions_per_instance: int = 3,
    unclear_nouns: Collection[str] = (),
) -> dict[int, list[Expression]]:
    """
    Up to `expressions_per_instance` different expressions for each instance that allows any, by its index.

    `unclear_nouns` are those of which the image may hold instances that are not given, a crowd for example: nothing
    is said about them.
    """
    statements = defaultdict(list)
    for statement in find_statements(instances, unclear_nouns):
        statements[statement.target].append(statement)
    return {
        target: _choose_expressions(rng, statements[target], instances[target].noun, expressions_per_instance)
        for target in sorted(statements)
    }


def _choose_expressions(
    rng: np.random.Generator, statements: Sequence[Statement], noun: str, count: int
) -> list[Expression]:
    """Each statement once before any is said in other words, in an order drawn by the weights of the kinds."""
    num_of_kind = Counter(statement.kind for statement in statements)
    # Sampling without replacement (Efraimidis and Spirakis, 2006): the largest of u ** (1 / weight) come first.
    keys = [rng.random() ** (num_of_kind[s.kind] / KIND_WEIGHTS[s.kind]) for s in statements]
    ordered = [statement for _, statement in sorted(zip(keys, statements), reverse=True)]
    expressions: dict[str, Expression] = {}
    for statement in ordered * 4:
        text = say(rng, statement, noun)
        article = "the " if rng.random() < 0.5 else ""
        expressions.setdefault(text, Expression(article + text, statement))
        if len(expressions) == count:
            break
    return list(expressions.values())


def say(rng: np.random.Generator, statement: Statement, noun: str) -> str:
    """One of the ways to put a statement about an instance of this noun, without an article before it."""
    phrases, ordinals = PHRASES[statement.name], ORDINALS[statement.rank]
    return phrases[rng.integers(len(phrases))].format(noun, ordinals[rng.integers(len(ordinals))])


def find_statements(instances: Sequence[Instance], unclear_nouns: Collection[str] = ()) -> Iterator[Statement]:
    """Every statement that is clearly true of one instance only. No chance is involved."""
    members_of = defaultdict(list)
    for index, instance in enumerate(instances):
        members_of[instance.noun].append(index)
    for noun, members in members_of.items():
        others = itertools.chain(members_of, unclear_nouns)
        if noun in unclear_nouns or any(other.endswith(f" {noun}") for other in others):
            continue  # a "teddy bear" may be taken for a "bear"
        for statement in _find_in_group(instances, members):
            if instances[statement.target].can_be_target:
                yield statement


def _find_in_group(instances: Sequence[Instance], members: Sequence[int]) -> Iterator[Statement]:
    if len(members) == 1:
        yield Statement("category", "only", members[0])
    if _PHRASE_WORDS & set(instances[members[0]].noun.split()):
        return  # "left hand" or "top" of a category would read as a place
    group = {index: instances[index] for index in members}
    yield from _corner_statements(group)
    if len(group) == 1:
        yield from _own_place_statements(group)
        return
    yield from _middle_statements(group)
    yield from _size_statements(group, instances)
    for axis, ends in enumerate((("left", "right"), ("top", "bottom"))):
        for end, from_start in zip(ends, (True, False)):
            yield from _end_statements(group, axis, end, from_start)
            yield from _order_statements(group, axis, end, from_start)


Group = Mapping[int, Instance]  # the instances of one noun, by their index


def is_before(first: Instance, second: Instance, axis: int) -> bool:
    """Whether anyone would say that `first` is left of (axis 0) or above (axis 1) `second`."""
    gaps = [second.center[axis] - first.center[axis], second.middle[axis] - first.middle[axis]]
    across = abs(second.center[1 - axis] - first.center[1 - axis])
    least = max(CLEAR_GAP, CLEAR_OVERLAP * min(first.extent[axis], second.extent[axis]), across * (0.3, 0.8)[axis])
    edges = [second.box[edge] - first.box[edge] for edge in (axis, axis + 2)]
    return min(gaps) >= least and min(edges) >= CLEAR_EDGE


def _is_nearer(first: Instance, second: Instance, axis: int, from_start: bool) -> bool:
    """Whether `first` is clearly nearer to the start (left, top) of the axis, or to its end."""
    return is_before(first, second, axis) if from_start else is_before(second, first, axis)


def _offsets(instance: Instance, axis: int, from_start: bool) -> tuple[float, float]:
    """How far its centre is from the start (left, top) of the axis or from its end: the least and the most."""
    places = (instance.center[axis], instance.middle[axis])
    return (min(places), max(places)) if from_start else (1 - max(places), 1 - min(places))


def _end_statements(group: Group, axis: int, end: str, from_start: bool) -> Iterator[Statement]:
    """The leftmost, rightmost, topmost and bottommost."""
    target = min(group, key=lambda index: _offsets(group[index], axis, from_start))
    others = [instance for index, instance in group.items() if index != target]
    if not all(_is_nearer(group[target], other, axis, from_start) for other in others):
        return
    if axis == 1 and not _is_counted(group[target], group):
        return  # what is small for being far away lies high in the image, but not high up
    yield Statement("place", f"{end}most", target)
    # "On the left" also says something of the picture: the target must be there, the others must not.
    offset = _offsets(group[target], axis, from_start)[1]
    least = min(_offsets(other, axis, from_start)[0] for other in others)
    if (offset < 0.4 and least > 0.45) or (len(others) == 1 and offset < 0.45 and least > 0.4):
        name = {"left": "left of all", "right": "right of all", "top": "above all", "bottom": "below all"}[end]
        yield Statement("place", name, target)


def _order_statements(group: Group, axis: int, end: str, from_start: bool) -> Iterator[Statement]:
    """Ranks from one end in a row of three or more, up to the middle one and the fifth."""
    if len(group) < 3:
        return
    ranked = sorted(group, key=lambda index: _offsets(group[index], axis, from_start))
    row = [group[index] for index in ranked]
    for rank in range(min(len(row) // 2 + 1, len(ORDINALS))):
        if not _is_counted(row[rank], group):
            return  # some would leave it out of the count
        if not all(_is_nearer(row[rank], other, axis, from_start) for other in row[rank + 1 :]):
            return
        if _is_in_line(row[: rank + 2], axis):
            yield Statement("order", f"from the {end}", ranked[rank], rank)


def _is_counted(instance: Instance, group: Group) -> bool:
    return instance.can_be_target and instance.area >= COUNTED_RATIO * max(other.area for other in group.values())


def _is_in_line(row: Sequence[Instance], axis: int) -> bool:
    places = np.array([instance.center for instance in row])  # (num_instances, 2)
    extents = np.ptp(places, axis=0)
    return bool(extents[1 - axis] <= 0.6 * extents[axis])


def _middle_statements(group: Group) -> Iterator[Statement]:
    """The middle one of three or five in a row or a column, when it is also the one nearest to the image's middle."""
    if len(group) not in (3, 5) or not all(_is_counted(instance, group) for instance in group.values()):
        return
    for axis in (0, 1):
        ranked = sorted(group, key=lambda index: group[index].center[axis])
        row = [group[index] for index in ranked]
        clear = all(is_before(first, second, axis) for first, second in itertools.pairwise(row))
        away = [abs(instance.center[axis] - 0.5) for instance in row]
        own = away.pop(len(row) // 2)
        if clear and _is_in_line(row, axis) and own < 0.15 and min(away) > own + 0.1:
            yield Statement("place", "middle of all", ranked[len(row) // 2])


def _corner_statements(group: Group) -> Iterator[Statement]:
    """The one in a corner of the image, when the others clearly are not."""
    near_share = 0.36 if len(group) > 1 else OWN_PLACE
    sides, verticals = (("left", True), ("right", False)), (("top", True), ("bottom", False))
    for (side, from_left), (vertical, from_top) in itertools.product(sides, verticals):
        near, doubtful = [], 0
        for index, instance in group.items():
            offsets = (_offsets(instance, 0, from_left), _offsets(instance, 1, from_top))
            if max(most for _, most in offsets) < near_share and max(instance.extent) < 0.6:
                near.append(index)
            elif max(least for least, _ in offsets) < 0.55:
                doubtful += 1
        if len(near) == 1 and not doubtful:
            yield Statement("place", f"{vertical} {side}", near[0])


def _own_place_statements(group: Group) -> Iterator[Statement]:
    """Where in the image the only one of its category is."""
    ((index, instance),) = group.items()
    for axis, names in enumerate((("on the left", "on the right"), ("at the top", "at the bottom"))):
        for name, from_start in zip(names, (True, False)):
            if _offsets(instance, axis, from_start)[1] < OWN_PLACE and instance.extent[axis] < 0.5:
                yield Statement("place", name, index)
    places = (*instance.center, *instance.middle)
    if all(abs(place - 0.5) < 0.1 for place in places) and max(instance.extent) < 0.7:
        yield Statement("place", "in the middle", index)


def _size_statements(group: Group, everything: Sequence[Instance]) -> Iterator[Statement]:
    """The biggest and the smallest, by the mask and by the box, where nothing is likely to hide any of their size."""
    ranked = sorted(group, key=lambda index: group[index].area)
    *others, biggest = (group[index] for index in ranked)
    if all(_is_bigger(biggest, other) for other in others):
        yield Statement("size", "biggest" if len(others) > 1 else "bigger", ranked[-1])
    smallest, *others = (group[index] for index in ranked)
    hidden = any(_share_inside(smallest.box, other.box) > 0.2 for other in everything if other is not smallest)
    if not hidden and all(_is_bigger(other, smallest) for other in others):
        yield Statement("size", "smallest" if len(others) > 1 else "smaller", ranked[0])


def _share_inside(box: Sequence[float], other: Sequence[float]) -> float:
    """The share of a box that lies inside another one."""
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    return max(width, 0.0) * max(height, 0.0) / ((box[2] - box[0]) * (box[3] - box[1]))


def _is_bigger(first: Instance, second: Instance) -> bool:
    extents = [own / other for own, other in zip(first.extent, second.extent)]
    ratios = [first.area / second.area, math.prod(extents)]
    return not second.touches_frame and min(ratios) >= CLEAR_RATIO and min(extents) >= 0.8


# --- Files ------------------------------------------------------------------------------------------------------------


def read_coco(
    instances_path: str | Path,
    image_dir: str | Path,
    *,
    expressions_per_instance: int = 3,
    seed: int = 0,
    min_area_share: float = 0.005,
    split: str | None = None,
    val_share: float = 0.1,
    progress: bool = True,
) -> list[AnnotatedImage]:
    """
    The images of a COCO instances file, in the order of their ids, with generated expressions.

    Masks may be polygons or RLEs. What an image gets depends on `seed`, its id and its annotations only, not on the
    rest of the file or its order. Left out are instances that allow no unambiguous expression, and images without
    any. Nothing is said of a category in an image where it has a crowd (`iscrowd`), LVIS's mark that not all of it
    is annotated, or an annotation without a mask that fits the image; how many of these there are is logged.

    Args:
        instances_path: the file: `images` (id, file_name, and height and width unless the image files are there to
            tell), `annotations` (id, image_id, category_id, segmentation) and `categories` (id, name).
        image_dir: the folder that the file names are relative to; as for [`read_refer`], COCO's usual folders below
            it are looked into.
        expressions_per_instance: at most so many for each instance, 1 to 100; some allow fewer.
        seed: non-negative; another seed gives other expressions.
        min_area_share: smaller instances, as a share of the image's area, are not referred to themselves.
        split: "train" or "val" for a part of the file, `None` for all. An image's part depends on its id only, so it
            stays when the file grows or another seed is taken.
        val_share: the expected share of the images in "val", 0 to 1.
        progress: whether to show a progress bar.

    Raises:
        ValueError: for a file that is no COCO instances file (the message says what is missing or wrong, and where),
            for an argument out of its range, and when no expression at all can be made.
    """
    _check_arguments(expressions_per_instance, seed, min_area_share, split, val_share)
    reader = _Reader(Path(instances_path), image_dir, min_area_share)
    image_ids = [image_id for image_id in sorted(reader.images) if split in (None, _split_of(image_id, val_share))]
    if not image_ids:
        raise ValueError(
            f"None of the {len(reader.images)} images of {instances_path} are in split {split!r} with val_share "
            f"{val_share}: choose another share, or one file for each split."
        )
    images = []
    for image_id in tqdm(image_ids, desc="Expressions", unit="image", disable=not progress):
        rng = np.random.default_rng((seed, image_id))
        image = reader.annotate(image_id, rng, expressions_per_instance)
        if image.references or image.size is None:  # without a size: building its row will say what is wrong
            images.append(image)
    reader.report_problems()
    if not any(image.references for image in images):
        raise ValueError(
            f"No instance of {instances_path} allows an unambiguous expression: each must have a mask of at least "
            f"{min_area_share:.2%} of its image (min_area_share) and be told apart from others of its category."
        )
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


def _split_of(image_id: int, val_share: float) -> str:
    digest = hashlib.sha256(str(image_id).encode()).digest()
    return "val" if int.from_bytes(digest[:8]) < val_share * 2**64 else "train"


def _to_noun(name: Any) -> str:
    """A category's name as it is said: "traffic light" for "Traffic_Light", "bow" for LVIS's "bow_(weapon)"."""
    return " ".join(re.sub(r"\(.*?\)|_", " ", name).lower().split()) if isinstance(name, str) else ""


class _Reader:
    """A COCO instances file, checked and indexed by ids."""

    def __init__(self, path: Path, image_dir: str | Path, min_area_share: float):
        self.path = path
        self.find_image = image_finder(image_dir)
        self.min_area_share = min_area_share
        content = read_json(path)
        self.images = self._index(content, "images")
        self.categories = self._index(content, "categories")
        self.nouns = {number: _to_noun(category.get("name")) for number, category in self.categories.items()}
        for number, noun in self.nouns.items():
            if not re.search(r"\w", noun):
                name = self.categories[number].get("name")
                raise ValueError(f"{path}: category {number} has no name that can be said, got {name!r}.")
        self.problems: dict[str, list[int]] = defaultdict(list)  # what is wrong with which annotations
        self.annotations: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for number, annotation in sorted(self._index(content, "annotations").items()):
            if annotation.get("category_id") not in self.categories:
                got = annotation.get("category_id")
                raise ValueError(f"{path}: annotation {number} is of category {got!r}, which is not in the file.")
            if annotation.get("image_id") in self.images:
                self.annotations[annotation["image_id"]].append(annotation)
            else:
                self.problems["are of images that are not in the file: they are passed over"].append(number)

    def _index(self, content: Any, table: str) -> dict[int, dict[str, Any]]:
        records = content.get(table) if isinstance(content, dict) else None
        if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
            raise ValueError(f"{self.path} is not in COCO's format: expected a list of {table}.")
        indexed: dict[int, dict[str, Any]] = {}
        for record in records:
            number = record.get("id")
            if not isinstance(number, int) or number < 0:
                raise ValueError(f"{self.path}: the ids of {table} must be whole numbers from 0 on, got {number!r}.")
            if number in indexed:
                raise ValueError(f"{self.path}: the ids of {table} must be unique, {number} is there twice.")
            indexed[number] = record
        return indexed

    def annotate(self, image_id: int, rng: np.random.Generator, expressions_per_instance: int) -> AnnotatedImage:
        """The image with its references. Its size is `None` when not even its file tells it."""
        file_name = self._file_name(image_id)
        path = self.find_image(file_name)
        size = self._stated_size(image_id) or _read_size(path)
        image = AnnotatedImage(image_id, file_name, path, (), size)
        if size is None:
            return image
        instances: list[Instance] = []
        sources: list[tuple[dict[str, Any], dict[str, Any]]] = []  # each instance's annotation and mask
        unclear_nouns = self._not_exhaustive(image_id)
        for annotation in self.annotations[image_id]:
            noun = self.nouns[annotation["category_id"]]
            mask = None if annotation.get("iscrowd") else self._read_mask(annotation, size)
            if mask is None:
                unclear_nouns.add(noun)
            else:
                instances.append(measure_mask(noun, decode_mask(mask), self.min_area_share))
                sources.append((annotation, mask))
        said = generate_expressions(instances, rng, expressions_per_instance, unclear_nouns)
        references = (self._refer(*sources[target], expressions) for target, expressions in said.items())
        return replace(image, references=tuple(references))

    def _file_name(self, image_id: int) -> str:
        """LVIS names no files, its images lie in COCO's folders `train2017` and `val2017`."""
        image = self.images[image_id]
        if isinstance(image.get("file_name"), str):
            return image["file_name"]
        if isinstance(image.get("coco_url"), str):
            return "/".join(image["coco_url"].split("/")[-2:])
        raise ValueError(f"{self.path}: image {image_id} has no file_name.")

    def _stated_size(self, image_id: int) -> tuple[int, int] | None:
        """(height, width) as the image or one of its RLEs has it."""
        image = self.images[image_id]
        sizes: list[Any] = [(image.get("height"), image.get("width"))]
        for annotation in self.annotations[image_id]:
            if isinstance(annotation.get("segmentation"), dict):
                sizes.append(annotation["segmentation"].get("size", ()))
        for size in sizes:
            if (
                isinstance(size, Sequence)
                and len(size) == 2
                and all(isinstance(side, int) and side > 0 for side in size)
            ):
                return size[0], size[1]
        return None

    def _not_exhaustive(self, image_id: int) -> set[str]:
        """The nouns of which LVIS says that the image holds more than is annotated."""
        numbers = self.images[image_id].get("not_exhaustive_category_ids", ())
        return {self.nouns[number] for number in numbers if number in self.nouns}

    def _read_mask(self, annotation: dict[str, Any], size: tuple[int, int]) -> dict[str, Any] | None:
        """The mask as a compressed RLE; `None` for one that is missing, malformed, empty or of another size."""
        try:
            mask = segmentation_to_rle(annotation.get("segmentation") or [], size)
            if coco_mask.area(mask) > 0:
                return mask
        except (ValueError, TypeError):
            pass
        self.problems["have no mask that fits their image: nothing is said of their categories there"].append(
            annotation["id"]
        )
        return None

    def _refer(
        self, annotation: dict[str, Any], mask: dict[str, Any], expressions: Sequence[Expression]
    ) -> AnnotatedReference:
        number = annotation["id"]
        texts = tuple((number * MAX_EXPRESSIONS + index, said.text) for index, said in enumerate(expressions))
        return AnnotatedReference(number, number, self.categories[annotation["category_id"]]["name"], mask, texts)

    def report_problems(self) -> None:
        for problem, numbers in self.problems.items():
            shown = ", ".join(map(str, numbers[:10])) + (", ..." if len(numbers) > 10 else "")
            logger.warning("%s: %d annotations %s (ids %s).", self.path, len(numbers), problem, shown)


def _read_size(path: Path) -> tuple[int, int] | None:
    """(height, width) of an image file as it is shown, `None` when it cannot be read."""
    try:
        with Image.open(path) as image:
            is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            return image.size if is_turned else image.size[::-1]
    except (OSError, SyntaxError, Image.DecompressionBombError):
        return None
