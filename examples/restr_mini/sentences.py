"""
Short sentences about the instances of a photograph, in the words that people type. They name a category, place, order,
size, colour or relation to another instance, or two of these at once ("left guy in red").

    for expression in express(scene, np.random.default_rng(0), count=4):
        print(expression.text, scene.masks[expression.target].sum())

By construction each sentence is true of one instance only, as far as the annotation goes. Words for people ("guy",
"woman", "kid") do not tell people apart, because the annotation does not.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from scenes import CATEGORIES, PhotoScene

from modeling_restr.data.expressions import (
    ORDINALS,
    PHRASES,
    Instance,
    find_statements,
    is_before,
    measure_mask,
    pluralize,
    say,
)


# Other names of a category. One that two categories share is used only where the other category is not in the picture.
SYNONYMS: dict[str, list[str]] = CATEGORIES["synonyms"]
GENERAL_NAMES: dict[str, list[str]] = CATEGORIES["general_names"]  # they tell instances of several categories apart
HELD, WORN, CARRIED, RIDDEN, SAT_ON = (
    frozenset(CATEGORIES[name]) for name in ("held", "worn", "carried", "ridden", "sat_on")
)
ROLES: dict[str, list[str]] = CATEGORIES["roles"]  # names of a person on a bicycle, a skateboard and so on
NO_NAMES = ("one", "one", "")  # if all instances are of one category: "left one", "far right"
NEVER_SAID = {"skin", "accessories"}  # category names that people do not use in requests

MIN_AREA_SHARE = 0.006  # of the picture, the smallest instance to ask for
KIND_WEIGHTS = {"category": 0.2, "place": 0.36, "order": 0.14, "size": 0.08, "color": 0.12, "relation": 0.1}

# {0} is the noun.
DEPTH_PHRASES = {
    "nearest": (
        *("front {0}", "{0} in front", "closest {0}", "nearest {0}"),
        *("{0} in the foreground", "{0} closest to us"),
    ),
    "farthest": ("back {0}", "{0} in back", "{0} in the back", "farthest {0}", "{0} in the background"),
}

# {0} is the noun, {1} the colour, {2} a garment.
COLOR_PHRASES = ("{1} {0}",) * 5 + ("{0} that is {1}",)
DRESS_PHRASES = ("{0} in {1}",) * 5 + ("{0} wearing {1}", "{0} dressed in {1}", "{0} with {1} clothes")
# They mean the person, so they are used only if clothes are not instances themselves.
GARMENT_PHRASES = (
    *("{0} in {1} {2}", "{0} in {1} {2}", "{0} in the {1} {2}"),
    *("{0} with {1} {2}", "{1} {2} {0}", "{1} {2}"),
)
GARMENTS = ("shirt", "shirt", "shirt", "jacket", "top", "coat")
# {0} is the noun, {1} the noun that it is related to.
RELATION_PHRASES = {
    "left of": ("{0} left of {1}", "{0} to the left of {1}"),
    "right of": ("{0} right of {1}", "{0} to the right of {1}"),
    "above": ("{0} above {1}", "{0} over {1}"),
    "below": ("{0} below {1}", "{0} under {1}"),
    "next to": ("{0} next to {1}", "{0} by {1}", "{0} beside {1}", "{0} near {1}"),
    "holding": ("{0} with {1}", "{0} holding {1}"),
    "wearing": ("{0} in {1}", "{0} wearing {1}", "{0} with {1}"),
    "carrying": ("{0} with {1}", "{0} carrying {1}"),
    "having": ("{0} with {1}",),
    "on": ("{0} on {1}", "{0} riding {1}"),
    "sitting on": ("{0} on {1}", "{0} sitting on {1}"),
}

HAIR_COLORS = {
    "black": ("black", "dark"),
    "brown": ("brown",),
    "yellow": ("blond", "blonde"),
    "gray": ("gray", "grey"),
}
SPELLINGS = {"gray": ("gray", "grey"), "black": ("black", "black", "dark"), "white": ("white", "white", "light")}
COLORS = ("black", "white", "gray", "red", "orange", "brown", "yellow", "green", "blue", "purple", "pink")
CLEAR_COLOR = 0.5  # an instance has a colour from this share of its pixels
OTHER_COLOR = 0.15  # and clearly does not have it below this share
CLEAR_DEPTH = 1.6  # the least ratio of areas between a nearer and a farther instance

# {0} is the sentence; people also write whole requests.
REQUESTS = (
    *("find {0}", "show me {0}", "where is {0}", "{0} please", "segment {0}", "i mean {0}", "can you see {0}"),
    *("select {0}", "this is {0}", "look at {0}", "{0} in this photo", "{0} in the picture", "mark {0}", "only {0}"),
)
# Drawn more often: people say these words more often than photographs give reason to.
_VERTICAL = re.compile("top|bottom|above|below")


class Expression(NamedTuple):
    """A sentence, its kind (a key of `KIND_WEIGHTS`) and the index of the instance that it refers to."""

    text: str
    kind: str
    target: int


class Fact(NamedTuple):
    """
    A statement that is true of only one instance of a noun, or of a noun in a colour. `name` is a key of `PHRASES` or
    `DEPTH_PHRASES`, or of `RELATION_PHRASES` with an `anchor`, the category of the instance that it is related to. With
    the name "role", the anchor is what the person rides.
    """

    kind: str
    name: str
    target: int
    rank: int
    noun: str
    color: str = ""
    anchor: str = ""
    anchor_color: str = ""


def express(scene: PhotoScene, rng: np.random.Generator, count: int) -> list[Expression]:
    """
    Generate up to `count` different sentences, spread over the instances, with kinds drawn by `KIND_WEIGHTS`. The list
    is empty if nothing unambiguous can be said.
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
        fact = _draw_fact(facts_of[target], rng)
        text = _say(rng, fact, names)
        expressions.setdefault(text, Expression(text, fact.kind, target))
        if len(expressions) == count:
            break
    return list(expressions.values())


def _draw_fact(facts_of: Mapping[str, Sequence[Fact]], rng: np.random.Generator) -> Fact:
    kinds = sorted(facts_of)
    weights = np.array([KIND_WEIGHTS[kind] for kind in kinds])
    facts = facts_of[kinds[rng.choice(len(kinds), p=weights / weights.sum())]]
    weights = np.array([2.0 if _VERTICAL.search(fact.name) else 1.0 for fact in facts])
    return facts[rng.choice(len(facts), p=weights / weights.sum())]


def find_facts(scene: PhotoScene) -> Iterator[Fact]:
    """Find everything that can be said of exactly one instance. Nothing here is random."""
    instances = [
        _measure(category, mask, is_clear)
        for category, mask, is_clear in zip(scene.categories, scene.masks, scene.is_clear)
    ]
    unclear = set(scene.unclear_categories)
    for statement in find_statements(instances, unclear):
        is_said = instances[statement.target].noun not in NEVER_SAID
        if is_said and not (scene.is_clothing and statement.kind == "place"):  # clothes are where they are worn
            yield Fact(*statement, noun=instances[statement.target].noun)
    yield from _general_facts(instances, scene.known, unclear)
    groups = _group_by_noun(instances, unclear)
    yield from _depth_facts(instances, groups, scene)
    yield from _color_facts(instances, groups, scene)
    yield from _relation_facts(instances, groups, scene)
    yield from _clothing_facts(instances, groups, scene)


def _measure(category: str, mask: np.ndarray, is_clear: bool) -> Instance:
    instance = measure_mask(category, mask, MIN_AREA_SHARE)
    return instance if is_clear else replace(instance, can_be_target=False)


def _group_by_noun(instances: Sequence[Instance], unclear: Iterable[str]) -> dict[str, list[int]]:
    groups = defaultdict(list)
    for index, instance in enumerate(instances):
        if instance.noun not in unclear and instance.noun not in NEVER_SAID:
            groups[instance.noun].append(index)
    return dict(groups)


def _general_facts(instances: Sequence[Instance], known: Iterable[str], unclear: set[str]) -> Iterator[Fact]:
    """The facts about animals, vehicles and so on, if all of their categories are annotated."""
    known = frozenset(known)
    for general, categories in GENERAL_NAMES.items():
        if not known.issuperset(categories) or unclear & set(categories):
            continue
        renamed = [replace(i, noun=general) if i.noun in categories else i for i in instances]
        for statement in find_statements(renamed, unclear):
            if renamed[statement.target].noun == general:
                yield Fact(*statement, noun=general)


def name_colors(pixels: np.ndarray) -> np.ndarray:
    """Find the index in `COLORS` of each pixel (pixels, 3) uint8, or -1 if people may disagree."""
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
    """
    The share of each of `COLORS` in an instance. For a person only the part counts that is most likely clothing. If the
    head is hidden, the clothing cannot be located: all shares are then between having and not having a colour.
    """
    mask = scene.masks[index]
    if scene.categories[index] == "person":
        rows = mask.any(1).nonzero()[0]
        if rows[0] < 0.01 * len(mask) or not scene.is_clear[index]:
            return np.full(len(COLORS), (CLEAR_COLOR + OTHER_COLOR) / 2)
        height = rows[-1] + 1 - rows[0]
        mask = mask.copy()
        mask[: rows[0] + round(0.22 * height)] = False
        mask[rows[0] + max(round(0.55 * height), 1) :] = False
    pixels = scene.image[mask]
    numbers = name_colors(pixels)
    return np.bincount(numbers[numbers >= 0], minlength=len(COLORS)) / max(len(numbers), 1)


def _color_facts(instances: Sequence[Instance], groups: Mapping[str, list[int]], scene: PhotoScene) -> Iterator[Fact]:
    """The facts that distinguish the instances of a noun with the same colour. Often there is only one of them."""
    for noun, members in groups.items():
        if len(members) > 12:
            continue
        shares = np.array([_color_shares(scene, index) for index in members])  # (members, colours)
        for color, name in enumerate(COLORS):
            is_colored = shares[:, color] >= CLEAR_COLOR
            if (shares[~is_colored, color] >= OTHER_COLOR).any():
                continue
            colored = list(itertools.compress(members, is_colored))
            for statement in find_statements([instances[index] for index in colored]):
                if scene.is_clothing and statement.kind == "place":
                    continue
                # If only one has the colour, the colour alone identifies it, whatever else is said.
                kind = "color" if len(colored) == 1 else statement.kind
                yield Fact(kind, statement.name, colored[statement.target], statement.rank, noun, color=name)


def _depth_facts(instances: Sequence[Instance], groups: Mapping[str, list[int]], scene: PhotoScene) -> Iterator[Fact]:
    """The nearest and the farthest of a noun: nearer to the camera means bigger, and lower in the picture."""
    for noun, members in groups.items():
        if len(members) < 2 or scene.is_clothing:
            continue
        ranked = sorted(members, key=lambda index: instances[index].area, reverse=True)
        nearest, *others = (instances[index] for index in ranked)
        if nearest.can_be_target and all(_is_nearer(nearest, other) for other in others):
            yield Fact("place", "nearest", ranked[0], 0, noun)
        *others, farthest = (instances[index] for index in ranked)
        if farthest.can_be_target and all(_is_nearer(other, farthest) for other in others):
            yield Fact("place", "farthest", ranked[-1], 0, noun)


def _is_nearer(first: Instance, second: Instance) -> bool:
    heights = first.extent[1] / second.extent[1]
    return first.area > CLEAR_DEPTH * second.area and heights > 1.1 and first.box[3] > second.box[3] + 0.05


def _relation_facts(
    instances: Sequence[Instance], groups: Mapping[str, list[int]], scene: PhotoScene
) -> Iterator[Fact]:
    anchors = [members[0] for members in groups.values() if len(members) == 1 and instances[members[0]].area > 0.01]
    for (noun, members), anchor in itertools.product(groups.items(), anchors):
        if scene.is_clothing or anchor in members or len(members) > 8 or scene.categories[anchor] == noun:
            continue
        for name, target in _relations(instances, members, anchor, scene):
            if instances[target].can_be_target:
                yield Fact("relation", name, target, 0, noun, anchor=scene.categories[anchor])


def _relations(
    instances: Sequence[Instance], members: Sequence[int], anchor: int, scene: PhotoScene
) -> Iterator[tuple[str, int]]:
    other = instances[anchor]
    for axis, names in ((0, ("left of", "right of")), (1, ("above", "below"))):
        before = [index for index in members if is_before(instances[index], other, axis)]
        after = [index for index in members if is_before(other, instances[index], axis)]
        if len(before) + len(after) < len(members):
            continue
        if len(before) == 1:
            yield names[0], before[0]
        if len(after) == 1:
            yield names[1], after[0]
    gaps = sorted((_gap(instances[index], other), index) for index in members)
    if gaps[0][0] < 0.04 and (len(gaps) == 1 or gaps[1][0] > gaps[0][0] + 0.12):
        yield "next to", gaps[0][1]
    if instances[members[0]].noun != "person":
        return
    shares = sorted(((_inside(other, instances[index]), index) for index in members), reverse=True)
    if shares[0][0] > 0.5 and (len(shares) == 1 or shares[1][0] < 0.1):
        target = instances[shares[0][1]]
        if other.area < target.area:
            for name, nouns in (("holding", HELD), ("wearing", WORN), ("carrying", CARRIED)):
                if other.noun in nouns:
                    yield name, shares[0][1]
        if target.middle[1] < other.middle[1] and other.noun in RIDDEN:
            yield "on", shares[0][1]
            yield "role", shares[0][1]
        if target.middle[1] < other.middle[1] and other.noun in SAT_ON:
            yield "sitting on", shares[0][1]


def _clothing_facts(
    instances: Sequence[Instance], groups: Mapping[str, list[int]], scene: PhotoScene
) -> Iterator[Fact]:
    """The facts about the only person of a photograph in which clothes, hair and bags are annotated, by these."""
    people = groups.get("person", [])
    if not scene.is_clothing or len(people) != 1 or not instances[people[0]].can_be_target:
        return
    for noun, members in groups.items():
        if noun == "person" or not all(instances[index].can_be_target for index in members):
            continue
        name = "having" if noun == "hair" else "carrying" if noun in CARRIED else "wearing"
        yield Fact("relation", name, people[0], 0, noun="person", anchor=noun)
        shares = np.array([_color_shares(scene, index) for index in members])  # (members, colours)
        for color in np.flatnonzero((shares >= CLEAR_COLOR).all(0)):
            if noun != "hair" or COLORS[color] in HAIR_COLORS:
                yield Fact("relation", name, people[0], 0, "person", anchor=noun, anchor_color=COLORS[color])


def _gap(first: Instance, second: Instance) -> float:
    """The distance between two boxes, 0 if they overlap."""
    gaps = [max(first.box[i] - second.box[i + 2], second.box[i] - first.box[i + 2], 0.0) for i in (0, 1)]
    return float(np.hypot(gaps[0], gaps[1]))


def _inside(inner: Instance, outer: Instance) -> float:
    """The share of a box inside another box, widened by a tenth on each side."""
    sides = []
    for axis in (0, 1):
        margin = 0.1 * outer.extent[axis]
        end = min(inner.box[axis + 2], outer.box[axis + 2] + margin)
        sides.append(max(0.0, end - max(inner.box[axis], outer.box[axis] - margin)))
    return sides[0] * sides[1] / max(inner.extent[0] * inner.extent[1], 1e-9)


class _Names:
    """The names of each category that no other category of the scene shares."""

    def __init__(self, scene: PhotoScene):
        present = set(scene.categories) | set(scene.unclear_categories)
        counts = Counter(name for category in present for name in {category, *SYNONYMS.get(category, ())})
        self.of = {
            category: [category] * 3
            + [name for name in SYNONYMS.get(category, ()) if counts[name] == 1 or category == "person"]
            for category in present
        }
        self.is_clothing = scene.is_clothing
        is_all_known = all(scene.known.issuperset(categories) for categories in GENERAL_NAMES.values())
        self.needs_none = is_all_known and len(present) == 1 and len(scene.categories) > 1

    def draw(self, rng: np.random.Generator, category: str) -> str:
        names = self.of.get(category, [category])
        return names[rng.integers(len(names))]

    def draw_for(self, rng: np.random.Generator, fact: Fact) -> str:
        """Draw a name for the sentence's target. It may be empty or "one" if the scene has one category only."""
        if self.needs_none and fact.kind in ("place", "order", "size", "color") and rng.random() < 0.3:
            return NO_NAMES[rng.integers(len(NO_NAMES))]
        return self.draw(rng, fact.noun)


def _say(rng: np.random.Generator, fact: Fact, names: _Names) -> str:
    noun = names.draw_for(rng, fact)
    if fact.color:
        noun = _say_colored(rng, fact, noun, has_garments=fact.noun == "person" and not names.is_clothing)
    if fact.name == "role":
        text = _choose(rng, ROLES[fact.anchor])
    elif fact.anchor:
        article = "the " if rng.random() < 0.6 else ""
        anchor = f"{article}{_say_color(rng, fact)} {names.draw(rng, fact.anchor)}"
        text = _choose(rng, RELATION_PHRASES[fact.name]).format(noun, anchor)
    elif fact.name in DEPTH_PHRASES:
        text = _choose(rng, DEPTH_PHRASES[fact.name]).format(noun)
    else:
        text = say(rng, fact.name, noun, fact.rank)
    text = " ".join(text.split())  # a noun may be empty
    if not text.startswith("the ") and (chance := rng.random()) < 0.4:
        text = f"{'the' if chance < 0.34 else 'that' if chance < 0.37 else 'a'} {text}"
    return _choose(rng, REQUESTS).format(text) if rng.random() < 0.06 else text


def _choose(rng: np.random.Generator, phrases: Sequence[str]) -> str:
    return phrases[int(rng.integers(len(phrases)))]


def _say_color(rng: np.random.Generator, fact: Fact) -> str:
    """The colour of what a person wears or has, if it has one."""
    spellings = HAIR_COLORS if fact.anchor == "hair" else SPELLINGS
    return _choose(rng, spellings.get(fact.anchor_color, (fact.anchor_color,)))


def _say_colored(rng: np.random.Generator, fact: Fact, noun: str, has_garments: bool) -> str:
    phrases: tuple[str, ...] = DRESS_PHRASES if fact.noun == "person" else COLOR_PHRASES
    if has_garments and rng.random() < 0.5:
        phrases = GARMENT_PHRASES
    color = _choose(rng, SPELLINGS.get(fact.color, (fact.color,)))
    return _choose(rng, phrases).format(noun, color, _choose(rng, GARMENTS))


def mistype(text: str, rng: np.random.Generator) -> str:
    """Swap two letters of a longer word, or leave out or double a letter."""
    words = text.split()
    long = [index for index, word in enumerate(words) if len(word) > 3]
    if not long:
        return text
    index = long[rng.integers(len(long))]
    word, at = words[index], int(rng.integers(1, len(words[index]) - 1))
    swapped = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    words[index] = (swapped, word[:at] + word[at + 1 :], word[:at] + word[at] + word[at:])[rng.integers(3)]
    return " ".join(words)


def absent_categories(scene: PhotoScene, names: Iterable[str]) -> list[str]:
    """List those of `names` that the scene certainly does not show, under any of their synonyms."""
    shown = set(scene.categories) | set(scene.unclear_categories)
    shown_names = shown.union(*(SYNONYMS.get(category, ()) for category in shown))
    shown_words = {word for name in shown_names for word in name.split()}
    return [
        name
        for name in names
        if name in scene.known
        and name not in shown
        and not shown_words & {word for known_as in (name, *SYNONYMS.get(name, ())) for word in known_as.split()}
    ]


ABSENT_STATEMENTS = ("only", "only", "left of all", "right of all", "on the left", "on the right", "at the top")


def say_absent(scene: PhotoScene, names: Sequence[str], rng: np.random.Generator) -> str | None:
    """Generate a sentence about something that the scene does not show, or None if nothing is known to be absent."""
    absent = [] if scene.is_clothing else absent_categories(scene, names)
    if not absent:
        return None
    category = _choose(rng, absent)
    noun = _choose(rng, (category, category, *SYNONYMS.get(category, ())))
    text = say(rng, _choose(rng, ABSENT_STATEMENTS), noun)
    return f"the {text}" if rng.random() < 0.4 else text


def spoken_words(categories: Iterable[str]) -> set[str]:
    """List every word that a sentence about these categories may have."""
    nouns = [*categories, *itertools.chain(*SYNONYMS.values()), *GENERAL_NAMES, *NO_NAMES]
    by_name = (PHRASES, DEPTH_PHRASES, RELATION_PHRASES, SPELLINGS, HAIR_COLORS, ROLES)
    phrases = itertools.chain(
        *(ways for table in by_name for ways in table.values()),
        *(REQUESTS, COLOR_PHRASES, DRESS_PHRASES, GARMENT_PHRASES, GARMENTS, COLORS, *ORDINALS),
        *(nouns, map(pluralize, nouns), ["the that a"]),
    )
    return {word for phrase in phrases for word in phrase.split() if "{" not in word}


class NoiseWords:
    """
    Words that say nothing about the photograph, for robustness: people write more than the generator does ("guy
    standing there on left").

    Args:
        words: Words, the most frequent first, as in GloVe's files. They are drawn as often as texts have them. Words
            that the generator uses are left out.
        categories: Categories that the generator may name.
    """

    def __init__(self, words: Iterable[str], categories: Iterable[str]):
        used = spoken_words(categories) - {"the", "that", "this", "a", "is", "to", "of", "in", "on"}
        self.words = [word for word in words if word not in used and word.isalpha()]

    def insert(self, text: str, rng: np.random.Generator) -> str:
        """Insert one or two of these words somewhere in the sentence."""
        words = text.split()
        for _ in range(rng.integers(1, 3)):
            rank = int((len(self.words) + 1) ** rng.random()) - 1  # Zipf's law
            words.insert(int(rng.integers(len(words) + 1)), self.words[rank])
        return " ".join(words)
