"""
Referring expressions from the geometry of instances: category, place, order and size.

Every expression is true of exactly one instance: each statement is checked with a margin before it is put into words,
and an instance that allows none is left out.

    instances = [measure_mask("dog", mask) for mask in masks]
    for target, expressions in generate_expressions(instances, np.random.default_rng(0)).items():
        print(target, [expression.text for expression in expressions])
"""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


# Ways to say each statement, separated by "|". {0} is the noun, {1} the ordinal, {2} the noun's plural. SIDE stands for
# left and right, END for left, right, top and bottom.
_WAYS = {
    "only": "{0}",
    "SIDEmost": "SIDEmost {0}|{0} furthest to the SIDE|far SIDE {0}|{0} far SIDE|{0} on the far SIDE|SIDE most {0}",
    "topmost": "topmost {0}|highest {0}|{0} closest to the top|very top {0}|uppermost {0}|top most {0}|{0} highest up|"
    "{0} nearest the top|{0} at the very top|{0} furthest up",
    "bottommost": "bottommost {0}|lowest {0}|{0} closest to the bottom|very bottom {0}|lowermost {0}|bottom most {0}|"
    "{0} lowest down|{0} nearest the bottom|{0} at the very bottom|{0} furthest down",
    "SIDE of all": "SIDE {0}|{0} on the SIDE|{0} to the SIDE|{0} on the SIDE side|{0} SIDE|SIDE side {0}|{0} on SIDE|"
    "{0} at SIDE|SIDE hand {0}|{0} at the SIDE|{0} on the SIDE hand side|{0} to the SIDE side|"
    "{0} on the SIDE side of the picture|SIDE one of the {2}",
    "above all": "top {0}|upper {0}|{0} at the top|{0} on top|{0} up top|{0} higher up|higher {0}|"
    "{0} at the top of the picture|top one of the {2}",
    "below all": "bottom {0}|lower {0}|{0} at the bottom|{0} bottom|{0} on the bottom|{0} lower down|"
    "{0} at the bottom of the picture|{0} down below|{0} on bottom|bottom one of the {2}",
    "SIDE half": "{0} in the SIDE half|{0} in the SIDE part",
    "top half": "{0} in the top half|{0} in the top part|{0} in the upper half|{0} in the upper part",
    "bottom half": "{0} in the bottom half|{0} in the bottom part|{0} in the lower half|{0} in the lower part",
    "on the SIDE": "{0} on the SIDE|{0} on the SIDE side|SIDE {0}|{0} SIDE|{0} on the SIDE hand side|"
    "{0} in the SIDE half|{0} at SIDE",
    "at the top": "{0} at the top|top {0}|upper {0}|{0} in the top half|{0} on top|{0} in the upper half",
    "at the bottom": "{0} at the bottom|bottom {0}|lower {0}|{0} in the bottom half|{0} in the lower half|"
    "{0} on the bottom",
    "in the middle": "{0} in the middle|{0} in the center|center {0}|middle {0}|central {0}|"
    "{0} in the middle of the picture",
    "middle of all": "middle {0}|center {0}|{0} in the middle|{0} in the center|{0} middle|{0} center|{0} in middle",
    "biggest": "biggest {0}|largest {0}",
    "smallest": "smallest {0}|littlest {0}|tiniest {0}",
    "bigger": "bigger {0}|larger {0}|big {0}|large {0}",
    "smaller": "smaller {0}|small {0}|little {0}",
    "SIDE of two": "{0} to the SIDE of the other {0}|{0} SIDE of the other one|SIDE one of the two {2}|"
    "SIDE {0} of the two|{0} on the SIDE of the other {0}",
    "top of two": "{0} above the other {0}|{0} above the other one|upper one of the two {2}|upper {0} of the two|"
    "top {0} of the two|{0} higher than the other {0}|{0} over the other one",
    "bottom of two": "{0} below the other {0}|{0} below the other one|lower one of the two {2}|lower {0} of the two|"
    "bottom {0} of the two|{0} lower than the other {0}|{0} under the other one",
    "top SIDE": "top SIDE {0}|{0} in the top SIDE|upper SIDE {0}|SIDE top {0}|{0} top SIDE|{0} at top SIDE",
    "bottom SIDE": "bottom SIDE {0}|{0} in the bottom SIDE|lower SIDE {0}|SIDE bottom {0}|{0} bottom SIDE|"
    "{0} at bottom SIDE",
    "from the END": "{1} {0} from the END|{0} that is {1} from the END|{1} {0} from END|{1} from END {0}|"
    "{0} {1} from the END",
}
_ENDS = {"SIDE": ("left", "right"), "END": ("left", "right", "top", "bottom")}


def _list_phrases() -> Iterator[tuple[str, tuple[str, ...]]]:
    for name, ways in _WAYS.items():
        placeholder = next((word for word in _ENDS if word in name), "NONE")
        for end in _ENDS.get(placeholder, [""]):
            yield name.replace(placeholder, end), tuple(ways.replace(placeholder, end).split("|"))


PHRASES = dict(_list_phrases())
# Irregular plurals.
PLURALS = {"man": "men", "woman": "women", "person": "people", "child": "children", "sheep": "sheep", "one": "ones"}
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
FRAME = 0.012  # an instance this close to the image's edge may continue beyond it
HALF_MARGIN = 0.06  # from the image's middle: closer to it, an instance is in neither half
OWN_PLACE = 0.3  # from the image's edge: the only instance of its category is on that side if it is closer
COUNTED_RATIO = 0.2  # of the largest area of its category, below which some would not count an instance


@dataclass(frozen=True)
class Instance:
    """
    One object of an image.

    noun: Its name in lower case. Expressions distinguish instances with the same noun.
    box: (left, top, right, bottom) as shares of the image's width and height.
    center: (x, y) of the mask's centroid, in the same unit.
    area: The mask's share of the image.
    can_be_target: Whether expressions may refer to it. Others are distinguished from it in any case.
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
    A statement that is true of the instance with the index `target`, and of no other instance with the same noun.

    `kind` is "category", "place", "order" or "size", `name` is a key of `PHRASES`, and the `rank` in an order starts
    at 0.
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
    Measure the instance of a mask (height, width) bool, which must not be empty. It can be a target if it covers
    `min_area_share` of the image.
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
    Generate {index of an instance: up to `expressions_per_instance` different expressions}. Instances that allow none
    are missing.

    No expression uses `unclear_nouns`: the image may contain other instances of them, such as a crowd.
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
    """Use each statement once before repeating any in other words, in a random order by the weights of the kinds."""
    num_of_kind = Counter(statement.kind for statement in statements)
    # Sampling without replacement (Efraimidis and Spirakis, 2006): the largest of u ** (1 / weight) come first.
    keys = [rng.random() ** (num_of_kind[s.kind] / KIND_WEIGHTS[s.kind]) for s in statements]
    ordered = [statement for _, statement in sorted(zip(keys, statements), reverse=True)]
    expressions: dict[str, Expression] = {}
    for statement in ordered * 4:
        text = say(rng, statement.name, noun, statement.rank)
        article = "the " if rng.random() < 0.5 else ""
        expressions.setdefault(text, Expression(article + text, statement))
        if len(expressions) == count:
            break
    return list(expressions.values())


def say(rng: np.random.Generator, name: str, noun: str, rank: int = 0) -> str:
    """One of the ways to say `PHRASES[name]` with this noun, without an article."""
    phrases, ordinals = PHRASES[name], ORDINALS[rank]
    text = phrases[rng.integers(len(phrases))].format(noun, ordinals[rng.integers(len(ordinals))], pluralize(noun))
    return " ".join(text.split())


def pluralize(noun: str) -> str:
    """The plural of a noun, by its last word."""
    *first, last = noun.split() or [""]
    if last in PLURALS:
        last = PLURALS[last]
    elif last.endswith("y") and last[-2:-1] not in ("a", "e", "o", "u"):
        last = f"{last[:-1]}ies"
    else:
        last += "es" if last.endswith(("s", "x", "ch", "sh")) else "s"
    return " ".join([*first, last])


def find_statements(instances: Sequence[Instance], unclear_nouns: Collection[str] = ()) -> Iterator[Statement]:
    """Every statement that is clearly true of one instance only, without randomness."""
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
        return  # a category such as "left hand" or "top" would read as a place
    group = {index: instances[index] for index in members}
    yield from _corner_statements(group)
    if len(group) == 1:
        yield from _own_place_statements(group)
        return
    if len(group) == 2:
        yield from _pair_statements(group)
    yield from _middle_statements(group)
    yield from _size_statements(group, instances)
    for axis, ends in enumerate((("left", "right"), ("top", "bottom"))):
        for end, from_start in zip(ends, (True, False)):
            yield from _end_statements(group, axis, end, from_start)
            yield from _order_statements(group, axis, end, from_start)


Group = Mapping[int, Instance]  # {index: instance} of one noun


def is_before(first: Instance, second: Instance, axis: int) -> bool:
    """Whether `first` is clearly left of (axis 0) or above (axis 1) `second`."""
    gaps = [second.center[axis] - first.center[axis], second.middle[axis] - first.middle[axis]]
    across = abs(second.center[1 - axis] - first.center[1 - axis])
    least = max(CLEAR_GAP, CLEAR_OVERLAP * min(first.extent[axis], second.extent[axis]), across * (0.3, 0.8)[axis])
    edges = [second.box[edge] - first.box[edge] for edge in (axis, axis + 2)]
    return min(gaps) >= least and min(edges) >= CLEAR_EDGE


def _is_nearer(first: Instance, second: Instance, axis: int, from_start: bool) -> bool:
    """Whether `first` is clearly nearer to the start (left, top) of the axis, or to its end."""
    return is_before(first, second, axis) if from_start else is_before(second, first, axis)


def _offsets(instance: Instance, axis: int, from_start: bool) -> tuple[float, float]:
    """The smallest and largest distance of its centre from the start (left, top) of the axis or from its end."""
    places = (instance.center[axis], instance.middle[axis])
    return (min(places), max(places)) if from_start else (1 - max(places), 1 - min(places))


def _end_statements(group: Group, axis: int, end: str, from_start: bool) -> Iterator[Statement]:
    """The leftmost, rightmost, topmost and bottommost."""
    target = min(group, key=lambda index: _offsets(group[index], axis, from_start))
    others = [instance for index, instance in group.items() if index != target]
    if not all(_is_nearer(group[target], other, axis, from_start) for other in others):
        return
    if axis == 1 and not _is_counted(group[target], group):
        return  # a small instance may be far away: it is high in the image, but not high up
    yield Statement("place", f"{end}most", target)
    # "On the left" also refers to the picture: the target must be there, the others must not.
    offset = _offsets(group[target], axis, from_start)[1]
    least = min(_offsets(other, axis, from_start)[0] for other in others)
    if offset < 0.5 - HALF_MARGIN and least > 0.5 + HALF_MARGIN:
        yield Statement("place", f"{end} half", target)
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
            return  # some people would not count it
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


def _pair_statements(group: Group) -> Iterator[Statement]:
    """Where one of two is relative to the other."""
    for axis, ends in enumerate((("left", "right"), ("top", "bottom"))):
        for first, second in itertools.permutations(group, 2):
            if is_before(group[first], group[second], axis):
                yield Statement("place", f"{ends[0]} of two", first)
                yield Statement("place", f"{ends[1]} of two", second)


def _middle_statements(group: Group) -> Iterator[Statement]:
    """The middle one of three or five in a row or a column, if it is also the one nearest to the image's middle."""
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
    """The one in a corner of the image, if the others clearly are not."""
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
    """The biggest and the smallest by mask and by box, if probably nothing hides a part of them."""
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
