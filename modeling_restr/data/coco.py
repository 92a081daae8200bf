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
from typing import NamedTuple

import numpy as np
from tqdm.auto import tqdm

from .canonical import AnnotatedImage, AnnotatedReference, decode_mask
from .coco_file import MAX_EXPRESSIONS, CocoFile, CocoObject
from .records import Problems


logger = logging.getLogger(__name__)

SPLITS = ("train", "val")

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
