"""
Short sentences about what a photograph's instances are, in the words that people type: category with its synonyms,
place, order, size, colour, and relation to another instance.

    for expression in express(scene, np.random.default_rng(0), count=4):
        print(expression.text, scene.masks[expression.target].sum())

Each is true of one instance only, by construction, as far as the annotation goes. What a person is called ("guy",
"woman", "kid") says nothing about which person: no annotation tells.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from . import coco
from .coco import Instance, Statement, find_statements, is_before, measure_mask
from .photo_scenes import PhotoScene


MIN_AREA_SHARE = 0.006  # of the picture, for a sentence about an instance
KIND_WEIGHTS = {"category": 0.2, "place": 0.36, "order": 0.14, "size": 0.08, "color": 0.12, "relation": 0.1}

# Beside the category's own name. One that two categories share is used only where the other is not in the picture.
SYNONYMS = {
    "person": ("man", "guy", "woman", "girl", "kid", "lady", "boy", "person", "guy", "man", "woman", "human"),
    "bicycle": ("bike",),
    "motorcycle": ("bike", "motorbike"),
    "airplane": ("plane", "jet"),
    "boat": ("ship",),
    "couch": ("sofa",),
    "tv": ("television", "screen", "monitor"),
    "laptop": ("computer",),
    "cell phone": ("phone", "mobile"),
    "dining table": ("table",),
    "potted plant": ("plant", "flower pot"),
    "donut": ("doughnut",),
    "wine glass": ("glass",),
    "cup": ("mug", "glass"),
    "handbag": ("bag", "purse"),
    "purse": ("bag", "handbag"),
    "backpack": ("bag", "rucksack"),
    "suitcase": ("bag", "luggage"),
    "refrigerator": ("fridge",),
    "sports ball": ("ball",),
    "tennis racket": ("racket",),
    "baseball bat": ("bat",),
    "cat": ("kitty",),
    "dog": ("puppy",),
    "teddy bear": ("stuffed animal", "teddy"),
    "pants": ("trousers",),
    "jeans": ("pants",),
    "leggings": ("pants", "tights"),
    "t-shirt": ("tee", "shirt"),
    "blouse": ("shirt", "top"),
    "sweater": ("pullover", "top"),
    "sweatshirt": ("sweater",),
    "blazer": ("jacket",),
    "coat": ("jacket",),
    "sneakers": ("shoes",),
    "boots": ("shoes",),
    "heels": ("shoes",),
    "sandals": ("shoes",),
    "hat": ("cap",),
}
# More general names; they tell instances of several categories apart.
GENERAL_NAMES = {
    "animal": ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe"),
    "vehicle": ("car", "motorcycle", "bus", "truck"),
    "fruit": ("banana", "apple", "orange"),
}
NEVER_SAID = {"skin", "accessories"}  # categories that nobody asks for by this name

# {0} is the noun, {1} the ordinal.
PHRASES: dict[str, tuple[str, ...]] = dict(coco.PHRASES)
for _name, _more in {
    "leftmost": ("far left {0}", "{0} far left", "{0} on the far left", "left most {0}", "first {0} from left"),
    "rightmost": ("far right {0}", "{0} far right", "{0} on the far right", "right most {0}", "first {0} from right"),
    "topmost": ("top {0}", "very top {0}"),
    "bottommost": ("bottom {0}", "very bottom {0}"),
    "left of all": ("left {0}", "{0} left", "left side {0}", "{0} on left", "{0} at left"),
    "right of all": ("right {0}", "{0} right", "right side {0}", "{0} on right", "{0} at right"),
    "above all": ("upper {0}", "{0} on top"),
    "below all": ("{0} bottom", "{0} on the bottom"),
    "on the left": ("left {0}", "{0} left"),
    "on the right": ("right {0}", "{0} right"),
    "in the middle": ("center {0}", "middle {0}"),
    "middle of all": ("{0} middle", "{0} center", "{0} in middle", "middle {0}"),
    "biggest": ("big {0}", "the large {0}"),
    "smallest": ("tiny {0}", "small {0}", "littlest {0}"),
    "smaller": ("little {0}",),
    **{
        f"{vertical} {side}": (f"{side} {vertical} {{0}}", f"{{0}} {vertical} {side}", f"{{0}} at {vertical} {side}")
        for vertical in ("top", "bottom")
        for side in ("left", "right")
    },
    **{
        f"from the {end}": (f"{{1}} {{0}} from {end}", f"{{1}} from {end} {{0}}", f"{{0}} {{1}} from the {end}")
        for end in ("left", "right", "top", "bottom")
    },
}.items():
    PHRASES[_name] = (*PHRASES[_name], *_more)

# {0} is the noun, {1} the colour.
COLOR_PHRASES = ("{1} {0}", "{1} {0}", "{1} {0}", "{0} that is {1}")
DRESS_PHRASES = ("{0} in {1}", "{0} in {1}", "{0} wearing {1}", "{0} dressed in {1}", "{0} with {1} clothes")
# {0} is the noun, {1} what it stands in relation to.
RELATION_PHRASES = {
    "left of": ("{0} left of {1}", "{0} to the left of {1}"),
    "right of": ("{0} right of {1}", "{0} to the right of {1}"),
    "above": ("{0} above {1}", "{0} over {1}"),
    "below": ("{0} below {1}", "{0} under {1}"),
    "next to": ("{0} next to {1}", "{0} by {1}", "{0} beside {1}", "{0} near {1}"),
    "with": ("{0} with {1}", "{0} holding {1}"),
    "on": ("{0} on {1}", "{0} riding {1}"),
    "sitting on": ("{0} on {1}", "{0} sitting on {1}"),
}
HELD = frozenset(
    [
        "handbag",
        "backpack",
        "suitcase",
        "umbrella",
        "tie",
        "frisbee",
        "kite",
        "skateboard",
        "surfboard",
        "phone",
        "remote",
        "laptop",
    ]
) | {"tennis racket", "baseball bat", "baseball glove", "sports ball", "cell phone", "wine glass", "teddy bear"}
RIDDEN = frozenset(["bicycle", "motorcycle", "horse", "elephant", "skateboard", "surfboard", "snowboard", "skis"])
SAT_ON = frozenset(["bench", "chair", "couch", "bed"])

COLORS = ("black", "white", "gray", "red", "orange", "brown", "yellow", "green", "blue", "purple", "pink")
CLEAR_COLOR = 0.5  # the share of its pixels from which an instance has a colour
OTHER_COLOR = 0.15  # and up to which another one clearly has not


class Expression(NamedTuple):
    """A sentence, its kind (a key of `KIND_WEIGHTS`) and the index of the instance that it refers to."""

    text: str
    kind: str
    target: int


class Fact(NamedTuple):
    """What is true of one instance of a noun: `value` is a key of phrases, a colour, or ..."""

    kind: str
    name: str
    target: int
    noun: str
    rank: int = 0
    color: str = ""
    anchor: str = ""


def express(scene: PhotoScene, rng: np.random.Generator, count: int) -> list[Expression]:
    """
    Up to `count` different sentences, spread over the instances, with kinds drawn by `KIND_WEIGHTS`. The list is
    empty where nothing unambiguous can be said.
    """
    facts_of: dict[int, dict[str, list[Fact]]] = defaultdict(lambda: defaultdict(list))
    for fact in find_facts(scene):
        facts_of[fact.target][fact.kind].append(fact)
    expressions: dict[str, Expression] = {}
    targets: list[int] = []
    names = _Names(scene)
    for _ in range(3 * count if facts_of else 0):
        if not targets:
            targets = [int(target) for target in rng.permutation(sorted(facts_of))]
        target = targets.pop()
        kinds = sorted(facts_of[target])
        weights = np.array([KIND_WEIGHTS[kind] for kind in kinds])
        facts = facts_of[target][kinds[rng.choice(len(kinds), p=weights / weights.sum())]]
        fact = facts[rng.integers(len(facts))]
        text = _say(rng, fact, names)
        expressions.setdefault(text, Expression(text, fact.kind, target))
        if len(expressions) == count:
            break
    return list(expressions.values())


def find_facts(scene: PhotoScene) -> Iterator[Fact]:
    """Everything that can be said of exactly one instance. No chance is involved."""
    instances = [
        _measure(category, mask, is_clear)
        for category, mask, is_clear in zip(scene.categories, scene.masks, scene.is_clear)
    ]
    unclear = set(scene.unclear_categories)
    for statement in find_statements(instances, unclear):
        is_said = instances[statement.target].noun not in NEVER_SAID
        if is_said and not (scene.is_clothing and statement.kind == "place"):  # clothes are where they are worn
            yield _to_fact(statement, instances[statement.target].noun)
    yield from _general_facts(instances, scene.known, unclear)
    groups = _groups(instances, unclear)
    yield from _color_facts(instances, groups, scene)
    yield from _relation_facts(instances, groups, scene)


def _measure(category: str, mask: np.ndarray, is_clear: bool) -> Instance:
    instance = measure_mask(category, mask, MIN_AREA_SHARE)
    return instance if is_clear else Instance(category, instance.box, instance.center, instance.area, False)


def _to_fact(statement: Statement, noun: str) -> Fact:
    return Fact(statement.kind, statement.name, statement.target, noun, statement.rank)


def _groups(instances: Sequence[Instance], unclear: Iterable[str]) -> dict[str, list[int]]:
    groups = defaultdict(list)
    for index, instance in enumerate(instances):
        if instance.noun not in unclear and instance.noun not in NEVER_SAID:
            groups[instance.noun].append(index)
    return dict(groups)


def _general_facts(instances: Sequence[Instance], known: Iterable[str], unclear: set[str]) -> Iterator[Fact]:
    known = frozenset(known)
    for general, categories in GENERAL_NAMES.items():
        if not known.issuperset(categories) or unclear & set(categories):
            continue
        renamed = [
            Instance(general if i.noun in categories else i.noun, i.box, i.center, i.area, i.can_be_target)
            for i in instances
        ]
        for statement in find_statements(renamed, unclear):
            if renamed[statement.target].noun == general:
                yield _to_fact(statement, general)


# --- Colours ----------------------------------------------------------------------------------------------------------


def name_colors(pixels: np.ndarray) -> np.ndarray:
    """The index in `COLORS` of each pixel of (pixels, 3) uint8, -1 where its name is open to dispute."""
    rgb = pixels.astype(np.float32) / 255
    value, low = rgb.max(1), rgb.min(1)
    spread = value - low
    saturation = spread / np.maximum(value, 1e-6)
    safe = np.maximum(spread, 1e-6)
    red, green, blue = rgb.T
    hue = np.select(
        [value == red, value == green],
        [((green - blue) / safe) % 6, (blue - red) / safe + 2],
        (red - green) / safe + 4,
    )
    hue = hue * 60
    is_reddish, is_warm = (hue < 14) | (hue > 342), (hue >= 14) & (hue < 42)
    rules = [
        (value < 0.2, "black"),
        ((saturation < 0.14) & (value > 0.78), "white"),
        ((saturation < 0.12) & (value > 0.3) & (value < 0.7), "gray"),
        (saturation < 0.25, ""),
        (is_reddish & (saturation > 0.55) & (value > 0.35), "red"),
        (is_reddish & (saturation < 0.5) & (value > 0.7), "pink"),
        (is_warm & (saturation > 0.7) & (value > 0.8) & (hue > 18), "orange"),
        (is_warm & (saturation > 0.35) & (value < 0.6), "brown"),
        ((hue >= 44) & (hue < 68) & (saturation > 0.45) & (value > 0.6), "yellow"),
        ((hue >= 75) & (hue < 165) & (saturation > 0.25), "green"),
        ((hue >= 190) & (hue < 252), "blue"),
        ((hue >= 262) & (hue < 300), "purple"),
        ((hue >= 305) & (hue <= 342) & (value > 0.5), "pink"),
    ]
    numbers = [COLORS.index(color) if color else -1 for _, color in rules]
    return np.select([condition for condition, _ in rules], numbers, -1)


def _color_shares(scene: PhotoScene, index: int) -> np.ndarray:
    """The share of each of `COLORS` in an instance; of a person, in what is most likely its clothing."""
    mask = scene.masks[index]
    if scene.categories[index] == "person":
        rows = mask.any(1).nonzero()[0]
        height = rows[-1] + 1 - rows[0]
        mask = mask.copy()
        mask[: rows[0] + round(0.22 * height)] = False
        mask[rows[0] + max(round(0.55 * height), 1) :] = False
    pixels = scene.image[mask]
    numbers = name_colors(pixels)
    return np.bincount(numbers[numbers >= 0], minlength=len(COLORS)) / max(len(numbers), 1)


def _color_facts(instances: Sequence[Instance], groups: Mapping[str, list[int]], scene: PhotoScene) -> Iterator[Fact]:
    for noun, members in groups.items():
        if len(members) > 12:
            continue
        shares = np.array([_color_shares(scene, index) for index in members])  # (members, colours)
        for color in range(len(COLORS)):
            ranked = shares[:, color].argsort()[::-1]
            is_clear = shares[ranked[0], color] >= CLEAR_COLOR
            if (
                is_clear
                and (shares[ranked[1:], color] < OTHER_COLOR).all()
                and instances[members[ranked[0]]].can_be_target
            ):
                yield Fact("color", COLORS[color], members[ranked[0]], noun, color=COLORS[color])


# --- Relations --------------------------------------------------------------------------------------------------------


def _relation_facts(
    instances: Sequence[Instance], groups: Mapping[str, list[int]], scene: PhotoScene
) -> Iterator[Fact]:
    anchors = [members[0] for members in groups.values() if len(members) == 1 and instances[members[0]].area > 0.01]
    for (noun, members), anchor in itertools.product(groups.items(), anchors):
        if scene.is_clothing or anchor in members or len(members) > 8 or scene.categories[anchor] == noun:
            continue
        for name, target in _relations(instances, members, anchor, scene):
            if instances[target].can_be_target:
                yield Fact("relation", name, target, noun, anchor=scene.categories[anchor])


def _relations(
    instances: Sequence[Instance], members: Sequence[int], anchor: int, scene: PhotoScene
) -> Iterator[tuple[str, int]]:
    other = instances[anchor]
    for axis, names in ((0, ("left of", "right of")), (1, ("above", "below"))):
        before = [index for index in members if is_before(instances[index], other, axis)]
        after = [index for index in members if is_before(other, instances[index], axis)]
        if len(before) == 1 and len(before) + len(after) == len(members):
            yield names[0], before[0]
        if len(after) == 1 and len(before) + len(after) == len(members):
            yield names[1], after[0]
    gaps = sorted((_gap(instances[index], other), index) for index in members)
    if gaps[0][0] < 0.04 and (len(gaps) == 1 or gaps[1][0] > gaps[0][0] + 0.12):
        yield "next to", gaps[0][1]
    if instances[members[0]].noun != "person":
        return
    shares = sorted(((_inside(other, instances[index]), index) for index in members), reverse=True)
    if shares[0][0] > 0.5 and (len(shares) == 1 or shares[1][0] < 0.1):
        target = instances[shares[0][1]]
        if other.noun in HELD and other.area < target.area:
            yield "with", shares[0][1]
        if target.middle[1] < other.middle[1] and other.noun in RIDDEN | SAT_ON:
            yield ("on" if other.noun in RIDDEN else "sitting on"), shares[0][1]


def _gap(first: Instance, second: Instance) -> float:
    """The distance between two boxes, 0 where they overlap."""
    gaps = [max(first.box[i] - second.box[i + 2], second.box[i] - first.box[i + 2], 0.0) for i in (0, 1)]
    return float(np.hypot(gaps[0], gaps[1]))


def _inside(inner: Instance, outer: Instance) -> float:
    """The share of one box that lies in another, widened by a tenth."""
    sides = []
    for i in (0, 1):
        margin = 0.1 * outer.extent[i]
        sides.append(
            max(0.0, min(inner.box[i + 2], outer.box[i + 2] + margin) - max(inner.box[i], outer.box[i] - margin))
        )
    return sides[0] * sides[1] / max(inner.extent[0] * inner.extent[1], 1e-9)


# --- Words ------------------------------------------------------------------------------------------------------------


class _Names:
    """The names that are unmistakable in a scene, by category."""

    def __init__(self, scene: PhotoScene):
        present = set(scene.categories) | set(scene.unclear_categories)
        counts: dict[str, int] = defaultdict(int)
        for category in present:
            for name in {category, *SYNONYMS.get(category, ())}:
                counts[name] += 1
        self.of = {
            category: [category] * 3
            + [name for name in SYNONYMS.get(category, ()) if counts[name] == 1 or category == "person"]
            for category in present
        }

    def draw(self, rng: np.random.Generator, category: str) -> str:
        names = self.of.get(category, [category])
        return names[rng.integers(len(names))]


def _say(rng: np.random.Generator, fact: Fact, names: _Names) -> str:
    noun = names.draw(rng, fact.noun)
    if fact.kind == "color":
        phrases: tuple[str, ...] = DRESS_PHRASES if fact.noun == "person" else COLOR_PHRASES
        values = (noun, fact.color)
    elif fact.kind == "relation":
        article = "the " if rng.random() < 0.6 else ""
        phrases, values = RELATION_PHRASES[fact.name], (noun, article + names.draw(rng, fact.anchor))
    else:
        ordinals = coco.ORDINALS[fact.rank]
        phrases, values = PHRASES[fact.name], (noun, ordinals[rng.integers(len(ordinals))])
    text = phrases[rng.integers(len(phrases))].format(*values)
    return f"the {text}" if rng.random() < 0.3 and not text.startswith("the ") else text
