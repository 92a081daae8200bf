"""Generated expressions for COCO files: an independent reader checks that each is true of one instance only."""

import json
import random
import re
from collections import Counter

import numpy as np
import pytest
from coco_annotations import CATEGORIES, HEIGHT, WIDTH, annotate, compress, draw, texts_of
from pycocotools import mask as coco_mask

from modeling_restr.data import read_coco
from modeling_restr.data.expressions import (
    PHRASES,
    Instance,
    Statement,
    find_statements,
    generate_expressions,
    measure_mask,
)


RANKS = {"first": 1, "second": 2, "third": 3, "fourth": 4, "fifth": 5}
RANKS |= {"1st": 1, "2nd": 2, "3rd": 3, "4th": 4, "5th": 5}
SIDES = {
    "left": r"left|leftmost", "right": r"right|rightmost",
    "top": r"top|upper|topmost|highest|uppermost", "bottom": r"bottom|lower|bottommost|lowest|lowermost",
}  # fmt: skip
# Variants and the plain form that the reader replaces them by.
FORMS = [
    (r"first (.+) from (left|right)", r"\2most \1"),
    (r"(?:far|very) (left|right|top|bottom) (.+)", r"\1most \2"),
    (r"(.+?)(?: on the)? far (left|right)", r"\2most \1"),
    (r"(left|right|top|bottom) most (.+)", r"\1most \2"),
    (r"(.+) (highest|lowest) (?:up|down)", r"\2 \1"),
    (r"(.+) (?:nearest the|closest to the|at the very) (top|bottom)", r"\2most \1"),
    (r"(.+) furthest up", r"topmost \1"),
    (r"(.+) furthest down", r"bottommost \1"),
    (r"(.+) (?:up top|higher up)", r"top \1"),
    (r"higher (.+)", r"top \1"),
    (r"(.+) (?:lower down|down below)", r"bottom \1"),
    (r"(left|right) (?:side|hand) (.+)", r"\1 \2"),
    (r"(.+) (?:on|to|at) the (left|right|top|bottom)(?: hand)?(?: side)?(?: of the picture)?", r"\1 on the \2"),
    (r"central (.+)", r"middle \1"),
    (r"(.+) in the (middle|center) of the picture", r"middle \1"),
    (r"(.+?) (?:in )?(middle|center)", r"middle \1"),
    (r"(?:littlest|tiniest) (.+)", r"smallest \1"),
    (r"little (.+)", r"small \1"),
    (r"large (.+)", r"big \1"),
    (r"(left|right) (top|bottom) (.+)", r"\2 \1 \3"),
    (r"(.+?)(?: at)? (top|bottom) (left|right)", r"\2 \3 \1"),
    (r"(\w+) from (left|right|top|bottom) (.+)", r"\1 \3 from the \2"),
    (r"(\w+) (.+) from (left|right|top|bottom)", r"\1 \2 from the \3"),
    (r"(.+) (\w+) from the (left|right|top|bottom)", r"\2 \1 from the \3"),
    (r"(.+?) (?:on |at )?(left|right|top|bottom)", r"\1 on the \2"),
]
RELATIONS = {
    "to the left of": "left", "left of": "left", "on the left of": "left", "above": "top", "over": "top",
    "to the right of": "right", "right of": "right", "on the right of": "right", "below": "bottom", "under": "bottom",
    "higher than": "top", "lower than": "bottom",
}  # fmt: skip
END = {word: end for end, words in SIDES.items() for word in words.split("|")}


KNOWN = [
    r"(?:biggest|largest|bigger|larger|big|smallest|smaller|small) .+",
    rf"(?:.+ that is \w+|(?:{'|'.join(RANKS)}) .+) from the (?:left|right|top|bottom)",
    r"(?:middle|center) .+|.+ in the (?:middle|center)",
    r"(?:top|upper|bottom|lower) (?:left|right) .+|.+ in the (?:top|upper|bottom|lower) (?:left|right)",
    *(rf"(?:{words}) (?!side |hand |most |top |bottom ).+" for words in SIDES.values()),
    r".+ (?:furthest|closest) to the (?:left|right|top|bottom)",
    r".+ (?:on|to|at) the (?:left|right|top|bottom)(?: side)?",
]


class Reader:
    """Compares a sentence with the masks of an image. If several instances could be meant, it returns all of them."""

    def __init__(self, masks: dict[int, np.ndarray], nouns: dict[int, str]):
        self.nouns = nouns
        self.masks = masks
        self.height, self.width = next(iter(masks.values())).shape
        self.measures = {index: self.measure(mask) for index, mask in masks.items()}
        self.areas = {index: int(mask.sum()) for index, mask in masks.items()}

    def measure(self, mask):
        """The position of a mask along x and y by each measure that people could use, as shares of the side."""
        rows, columns = np.nonzero(mask)
        return {
            axis: {
                "centroid": (places.mean() + 0.5) / side,
                "middle": (places.min() + places.max() + 1) / 2 / side,
                "start": places.min() / side,
                "end": (places.max() + 1) / side,
            }
            for axis, places, side in (("x", columns, self.width), ("y", rows, self.height))
        }

    def places(self, index, end):
        """The distance from one end of the image by each measure."""
        measures = self.measures[index]["x" if end in ("left", "right") else "y"]
        if end in ("left", "top"):
            return measures
        return {name: 1 - place for name, place in measures.items()}

    def read(self, text):
        text = text.removeprefix("the ")
        for reading in (self.half, self.pair, self.one_of_several):
            found = reading(text)
            if found is not None:
                return reading.__name__, set(found)
        if not re.fullmatch("|".join(known for known in KNOWN), text):
            text = next((re.sub(form, plain, text) for form, plain in FORMS if re.fullmatch(form, text)), text)
        for reading in (self.size, self.order, self.middle, self.corner, self.side):
            found = reading(text)
            if found is not None:
                return reading.__name__, set(found)
        return "category", set(self.matches(text))

    def matches(self, noun):
        """In the widest sense: a wine glass is a glass."""
        found = [index for index, name in self.nouns.items() if name == noun or name.endswith(f" {noun}")]
        assert found, f"there is no {noun!r}"
        return found

    def half(self, text):
        found = re.fullmatch(r"(.+) in the (left|right|top|upper|bottom|lower) (?:half|part)", text)
        if not found:
            return None
        return {i for i in self.matches(found[1]) if self.places(i, END[found[2]])["centroid"] < 0.53}

    def pair(self, text):
        """The one of two instances that is nearer to an end. Both if that is ambiguous."""
        relations = "|".join(sorted(RELATIONS, key=len, reverse=True))
        found = re.fullmatch(rf"(?P<noun>.+?) (?P<relation>{relations}) the other (?P<other>.+)", text)
        if found:
            noun, end = found["noun"], RELATIONS[found["relation"]]
            assert found["other"] in (noun, "one")
        elif found := re.fullmatch(r"(left|right|upper|top|lower|bottom) (.+) of the two", text):
            noun, end = found[2], END[found[1]]
        elif found := re.fullmatch(r"(left|right|upper|lower) one of the two (.+)", text):
            noun, end = self.singular(found[2]), END[found[1]]
        else:
            return None
        matches = self.matches(noun)
        assert len(matches) == 2
        gaps = [
            self.places(matches[0], end)[n] - self.places(matches[1], end)[n]
            for n in ("centroid", "middle", "start", "end")
        ]
        return {i for i, sign in zip(matches, (-1, 1)) if any(gap * sign >= -0.001 for gap in gaps)}

    def one_of_several(self, text):
        found = re.fullmatch(r"(left|right|top|bottom) one of the (.+)", text)
        return self.side(f"{found[1]} {self.singular(found[2])}") if found else None

    def singular(self, plural):
        return next(noun for noun in self.nouns.values() if plural in (f"{noun}s", f"{noun}es", f"{noun[:-1]}ies"))

    def size(self, text):
        found = re.fullmatch(r"(?:(biggest|largest|bigger|larger|big)|smallest|smaller|small) (.+)", text)
        if not found:
            return None
        matches = self.matches(found[2])
        assert (len(matches) == 2) == (not text.split()[0].endswith("est"))
        sign = 1 if found[1] else -1
        boxes = {
            i: np.prod([self.measures[i][axis]["end"] - self.measures[i][axis]["start"] for axis in "xy"])
            for i in matches
        }
        meant = set()
        for sizes in (self.areas, boxes):
            extreme = max(sizes[i] * sign for i in matches) * sign
            meant |= {i for i in matches if max(sizes[i] / extreme, extreme / sizes[i]) < 1.6}
        return meant

    def order(self, text):
        found = re.fullmatch(r"(?:(.+) that is (\w+)|(\w+) (.+)) from the (left|right|top|bottom)", text)
        if not found:
            return None
        matches = self.matches(found[1] or found[4])
        assert len(matches) >= 3
        rank, end = RANKS[found[2] or found[3]], found[5]
        largest = max(self.areas[i] for i in matches)
        meant = set()
        for counted in (
            matches,
            [i for i in matches if self.areas[i] > 0.1 * largest],
        ):  # small ones may be overlooked
            for name in ("centroid", "middle", "start", "end"):
                places = {i: self.places(i, end)[name] for i in counted}
                wanted = sorted(places.values())[rank - 1]
                tolerance = 0.05 if name in ("centroid", "middle") else 0.0
                meant |= {i for i in counted if abs(places[i] - wanted) <= tolerance}
        return meant

    def middle(self, text):
        found = re.fullmatch(r"(?:middle|center) (.+)|(.+) in the (?:middle|center)", text)
        if not found:
            return None
        matches = self.matches(found[1] or found[2])
        points = {i: [self.measures[i][axis]["centroid"] for axis in "xy"] for i in matches}
        meant = {i for i in matches if max(abs(place - 0.5) for place in points[i]) < 0.05}
        spread = np.ptp(list(points.values()), axis=0)
        along = int(spread[1] > spread[0])
        meant.add(min(matches, key=lambda i: abs(points[i][along] - 0.5)))
        assert len(matches) % 2
        for name in ("centroid", "middle"):
            ranked = sorted(matches, key=lambda i: self.measures[i]["xy"[along]][name])
            meant.add(ranked[len(ranked) // 2])
        return meant

    def corner(self, text):
        corner = r"(top|upper|bottom|lower) (left|right)"
        found = re.fullmatch(rf"{corner} (.+)|(.+) in the {corner}", text)
        if not found:
            return None
        ends = END[found[1] or found[5]], found[2] or found[6]
        matches = self.matches(found[3] or found[4])
        return {i for i in matches if max(self.places(i, end)["centroid"] for end in ends) < 0.5}

    def side(self, text):
        words = "|".join(SIDES.values())
        found = (
            re.fullmatch(rf"(?P<word>{words}) (?P<noun>.+)", text)
            or re.fullmatch(r"(?P<noun>.+) (?:furthest|closest) to the (?P<word>left|right|top|bottom)", text)
            or re.fullmatch(r"(?P<noun>.+) (?:on|to|at) the (?P<word>left|right|top|bottom)(?: side)?", text)
        )
        if not found:
            return None
        end, matches = END[found["word"]], self.matches(found["noun"])
        is_superlative = found["word"] not in ("left", "right", "top", "bottom", "upper", "lower") or "est to" in text
        meant = set()
        for name in ("centroid", "middle", "start", "end"):
            places = {i: self.places(i, end)[name] for i in matches}
            tolerance = 0.05 if name in ("centroid", "middle") else 0.0
            meant |= {i for i in matches if places[i] <= min(places.values()) + tolerance}
        if not is_superlative:  # of the picture
            meant |= {i for i in matches if self.places(i, end)["centroid"] < 0.4}
            assert all(self.places(i, end)["centroid"] < 0.5 for i in meant)
        return meant


def random_masks(rng):
    """Masks that are scattered, close together, in a row or in a column, some of them cut off by the frame."""
    layout = rng.choice(["scattered", "scattered", "close", "row", "column"])
    corner = [rng.uniform(0.1, 0.7), rng.uniform(0.1, 0.7)]
    count = rng.choice([1, 1, 2, 2, 3, 3, 4, 5])
    base = rng.uniform(0.04, 0.3) if layout == "scattered" else rng.uniform(0.04, 0.16)
    for position in range(count):
        place = [rng.uniform(0.03, 0.97), rng.uniform(0.03, 0.97)]
        if layout == "close":
            place = [corner[0] + rng.uniform(0, 0.15), corner[1] + rng.uniform(0, 0.15)]
        elif layout != "scattered":
            axis = int(layout == "column")
            place[axis] = (position + rng.uniform(0.3, 0.7)) / count
            place[1 - axis] = 0.5 + rng.uniform(-0.15, 0.15)
        scale = base * rng.choice([1, 1, 1, 0.5, 0.2, 2])
        half = [scale * rng.uniform(0.8, 1.2) / 2 * WIDTH, scale * rng.uniform(0.8, 1.2) / 2 * HEIGHT]
        x, y = place[0] * WIDTH, place[1] * HEIGHT
        box = [x - half[0], y - half[1], x + half[0], y + half[1]]
        mask = draw(rng.choice(["rectangle", "ellipse"]), box)
        if rng.random() < 0.3:  # an L: its centroid is not the middle of its box
            mask[: int(y), int(x) :] = False
        yield mask


def make_file(path, num_images, seed=0):
    """A COCO file and, for each image, the masks and nouns of its annotations and the nouns of its crowds."""
    rng = random.Random(seed)
    content = {"images": [], "annotations": [], "categories": []}
    content["categories"] = [{"id": number, "name": name} for number, name in CATEGORIES.items()]
    truth = {}
    for image_id in range(1, num_images + 1):
        content["images"].append({"id": image_id, "file_name": f"{image_id}.png", "height": HEIGHT, "width": WIDTH})
        masks, nouns, crowds = {}, {}, set()
        for category_id in rng.sample(sorted(CATEGORIES), rng.randint(1, 3)):
            noun = CATEGORIES[category_id].lower().replace("_", " ")
            for mask in random_masks(rng):
                if not mask.any():
                    continue
                number = len(content["annotations"]) + 1000
                iscrowd = int(rng.random() < 0.03)
                content["annotations"].append(annotate(number, image_id, mask, category_id, iscrowd))
                if iscrowd:
                    crowds.add(noun)
                else:
                    masks[number], nouns[number] = mask, noun
        truth[image_id] = masks, nouns, crowds
    path.write_text(json.dumps(content))
    return truth


@pytest.fixture(scope="module")
def random_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("random") / "instances.json"
    return path, make_file(path, num_images=250)


def read(path, **options):
    return read_coco(path, path.parent, progress=False, **options)


def test_each_expression_is_true_of_its_instance_only(random_file):
    path, truth = random_file
    kinds = Counter()
    for image in read(path, expressions_per_instance=8, min_area_share=0.004):
        masks, nouns, crowds = truth[image.image_id]
        reader = Reader(masks, nouns)
        for reference in image.references:
            assert not any(crowd.endswith(nouns[reference.ann_id]) for crowd in crowds)
            assert masks[reference.ann_id].mean() >= 0.004
            for _, text in reference.expressions:
                kind, meant = reader.read(text)
                assert meant == {reference.ann_id}, (image.image_id, text)
                assert re.search(rf"\b{nouns[reference.ann_id]}(s|es)?\b", text)
                kinds[kind] += 1
    assert min(kinds[kind] for kind in ("category", "size", "order", "middle", "corner", "side")) > 20, kinds


def test_every_statement_comes_up(random_file):
    _, truth = random_file
    names = set()
    for masks, nouns, _ in truth.values():
        instances = [measure_mask(nouns[number], mask) for number, mask in masks.items()]
        names |= {statement.name for statement in find_statements(instances)}
    assert names == set(PHRASES)


def box(left, top, right, bottom, noun="chair", center=None, can_be_target=True):
    center = center or ((left + right) / 2, (top + bottom) / 2)
    return Instance(noun, (left, top, right, bottom), center, (right - left) * (bottom - top), can_be_target)


def names_of(instances, **options):
    """The names of the statements about each instance; ranks count from 1."""
    statements = {index: set() for index in range(len(instances))}
    for statement in find_statements(instances, **options):
        rank = f"{statement.rank + 1} " if statement.kind == "order" else ""
        statements[statement.target].add(rank + statement.name)
    return list(statements.values())


def test_three_in_a_row():
    row = [box(0.1, 0.4, 0.2, 0.6), box(0.45, 0.4, 0.55, 0.6), box(0.8, 0.4, 0.9, 0.6)]
    assert names_of(row) == [
        {"leftmost", "left of all", "1 from the left"},
        {"2 from the left", "2 from the right", "middle of all"},
        {"rightmost", "right of all", "1 from the right"},
    ]


def test_a_big_and_a_small_one():
    pair = [box(0.1, 0.2, 0.5, 0.8), box(0.6, 0.45, 0.75, 0.65)]
    left, right = names_of(pair)
    assert left == {"leftmost", "left of all", "left half", "left of two", "bigger"}
    assert right == {"rightmost", "right of all", "right half", "right of two", "smaller"}


@pytest.mark.parametrize(
    ("instances", "disputable"),
    [
        pytest.param([box(0.40, 0.4, 0.43, 0.5), box(0.45, 0.4, 0.48, 0.5)], r"most|\ball\b", id="centres too near"),
        pytest.param([box(0.1, 0.4, 0.7, 0.6), box(0.25, 0.4, 0.85, 0.6)], r"most|\ball\b", id="one behind the other"),
        pytest.param([box(0.3, 0.4, 0.4, 0.5), box(0.1, 0.3, 0.8, 0.6)], r"most|\ball\b", id="one inside the other"),
        pytest.param([box(0.4, 0.1, 0.5, 0.2), box(0.5, 0.8, 0.6, 0.9)], "left|right", id="above, hardly left"),
        pytest.param([box(0.1, 0.4, 0.2, 0.5), box(0.7, 0.5, 0.8, 0.6)], "top|above|bottom|below", id="hardly above"),
        pytest.param(
            [box(0.1, 0.1, 0.6, 0.9, center=(0.5, 0.5)), box(0.4, 0.1, 0.9, 0.9, center=(0.5, 0.5))],
            r"most|\ball\b",
            id="boxes apart, masks not",
        ),
        pytest.param([box(0.1, 0.2, 0.4, 0.8), box(0.6, 0.2, 0.8, 0.7)], "gger|smaller", id="of nearly the same area"),
        pytest.param([box(0.1, 0.5, 0.9, 0.6), box(0.4, 0.1, 0.5, 0.4)], "gger|smaller", id="long but flat"),
        pytest.param([box(0.1, 0.2, 0.5, 0.8), box(0.85, 0.4, 1.0, 0.6)], "gger|smaller", id="cut by the frame"),
        pytest.param(
            [box(0.1, 0.2, 0.5, 0.8), box(0.6, 0.4, 0.75, 0.6), box(0.6, 0.5, 0.9, 0.9, noun="table")],
            "smaller",
            id="perhaps hidden",
        ),
        pytest.param(
            [box(0.1, 0.4, 0.2, 0.6), box(0.4, 0.45, 0.43, 0.48, can_be_target=False), box(0.8, 0.4, 0.9, 0.6)],
            "[23] from|middle",
            id="counted by some only",
        ),
        pytest.param(
            [box(0.1, 0.1, 0.2, 0.2), box(0.35, 0.8, 0.45, 0.9), box(0.6, 0.1, 0.7, 0.2)],
            "from the left|from the right|middle",
            id="no row",
        ),
        pytest.param([box(0.6, 0.4, 0.65, 0.6), box(0.8, 0.4, 0.85, 0.6)], "left of all", id="not on the left"),
        pytest.param([box(0.05, 0.05, 0.25, 0.25), box(0.2, 0.2, 0.45, 0.45)], "top left", id="two in the corner"),
        pytest.param([box(0.4, 0.4, 0.6, 0.6)], r"\bon\b|\bat\b|left|right", id="alone in the middle"),
    ],
)
def test_disputable_statements_are_not_made(instances, disputable):
    found = set().union(*names_of(instances))
    assert not [name for name in found if re.search(disputable, name)]


def test_clear_statements_are_made():
    """The statements of the cases above are made when the reason against them is removed."""
    assert "leftmost" in names_of([box(0.40, 0.4, 0.43, 0.5), box(0.50, 0.4, 0.53, 0.5)])[0]
    assert "leftmost" in names_of([box(0.1, 0.4, 0.5, 0.6), box(0.4, 0.4, 0.8, 0.6)])[0]
    assert "topmost" in names_of([box(0.4, 0.1, 0.5, 0.2), box(0.5, 0.8, 0.6, 0.9)])[0]
    assert "leftmost" in names_of([box(0.1, 0.1, 0.6, 0.9), box(0.4, 0.1, 0.9, 0.9)])[0]
    assert "smaller" in names_of([box(0.1, 0.2, 0.5, 0.8), box(0.8, 0.4, 0.95, 0.6)])[1]
    assert (
        "2 from the left" in names_of([box(0.1, 0.4, 0.2, 0.6), box(0.4, 0.4, 0.5, 0.6), box(0.8, 0.4, 0.9, 0.6)])[1]
    )
    assert names_of([box(0.4, 0.4, 0.6, 0.6)]) == [{"only", "in the middle"}]
    assert names_of([box(0.05, 0.05, 0.2, 0.2)]) == [{"only", "on the left", "at the top", "top left"}]


def test_tiny_instances_are_distinguished_but_not_referred_to():
    big, tiny = box(0.1, 0.2, 0.5, 0.8), box(0.8, 0.4, 0.82, 0.42, can_be_target=False)
    assert names_of([big, tiny]) == [{"leftmost", "left of all", "left half", "left of two", "bigger"}, set()]


def test_nouns_that_people_could_confuse():
    dog, hot_dog = box(0.1, 0.4, 0.2, 0.6, noun="dog"), box(0.7, 0.4, 0.8, 0.6, noun="hot dog")
    assert names_of([dog, hot_dog]) == [set(), {"only", "on the right"}]
    assert names_of([dog], unclear_nouns={"hot dog"}) == names_of([dog], unclear_nouns={"dog"}) == [set()]
    # A name with a place in it allows no other place.
    hands = [box(0.1, 0.4, 0.2, 0.6, noun="left hand"), box(0.7, 0.4, 0.8, 0.6, noun="left hand")]
    assert names_of(hands) == [set(), set()]
    assert names_of(hands[:1]) == [{"only"}]


def test_expressions_are_distinct_and_as_many_as_requested():
    row = [box(0.1, 0.4, 0.2, 0.6), box(0.45, 0.4, 0.55, 0.6), box(0.8, 0.4, 0.9, 0.6)]
    for seed in range(20):
        for expressions in generate_expressions(row, np.random.default_rng(seed), expressions_per_instance=4).values():
            assert len({expression.text.removeprefix("the ") for expression in expressions}) == 4
            assert len({expression.statement for expression in expressions}) == 3  # all of them before any is repeated
    alone = generate_expressions([box(0.3, 0.1, 0.9, 0.9)], np.random.default_rng(0))
    assert [expression.statement for expression in alone[0]] == [Statement("category", "only", 0)]


def test_measure_mask_agrees_with_pycocotools():
    mask = np.random.default_rng(0).random((40, 60)) > 0.5
    mask[:5], mask[:, 50:] = False, False
    x, y, width, height = coco_mask.toBbox(compress(mask))
    instance = measure_mask("cup", mask, min_area_share=0.3)
    np.testing.assert_allclose(instance.box, (x / 60, y / 40, (x + width) / 60, (y + height) / 40))
    rows, columns = np.nonzero(mask)
    np.testing.assert_allclose(instance.center, ((columns.mean() + 0.5) / 60, (rows.mean() + 0.5) / 40))
    assert instance.area == mask.sum() / 2400
    assert instance.can_be_target
    assert not measure_mask("cup", mask, min_area_share=0.5).can_be_target
    with pytest.raises(ValueError, match="must not be empty"):
        measure_mask("cup", np.zeros((4, 4), dtype=bool))


def test_nothing_depends_on_the_order_or_the_rest_of_the_file(random_file, tmp_path):
    path, _ = random_file
    images = read(path, seed=5)
    assert texts_of(images) == texts_of(read(path, seed=5))
    assert texts_of(images) != texts_of(read(path, seed=6))
    content = json.loads(path.read_text())
    for table in content.values():
        random.Random(0).shuffle(table)
    content["images"] = [image for image in content["images"] if image["id"] % 2]
    content["annotations"] = [annotation for annotation in content["annotations"] if annotation["image_id"] % 2]
    (tmp_path / "instances.json").write_text(json.dumps(content))
    odd = [(image.image_id, image.references) for image in images if image.image_id % 2]
    assert [(image.image_id, image.references) for image in read(tmp_path / "instances.json", seed=5)] == odd


def test_ids_are_unique(random_file):
    path, truth = random_file
    references = [reference for image in read(path, expressions_per_instance=9) for reference in image.references]
    assert len({reference.ref_id for reference in references}) == len(references)
    sent_ids = [sent_id for reference in references for sent_id, _ in reference.expressions]
    assert len(set(sent_ids)) == len(sent_ids) > len(references)
    assert {reference.ann_id for reference in references} <= {
        number for masks, *_ in truth.values() for number in masks
    }
    assert {reference.category for reference in references} == set(CATEGORIES.values())


def test_splits(tmp_path):
    path = tmp_path / "instances.json"
    make_file(path, num_images=60, seed=1)
    everything = {image.image_id for image in read(path)}
    train, val = ({image.image_id for image in read(path, split=split, val_share=0.3)} for split in ("train", "val"))
    assert train | val == everything
    assert not train & val
    assert 0.2 < len(val) / len(everything) < 0.4
    assert {image.image_id for image in read(path, split="val", val_share=0.5, seed=8)} > val
    with pytest.raises(ValueError, match=r"None of the 60 images .* are in split 'val' with val_share 0"):
        read(path, split="val", val_share=0)


@pytest.mark.parametrize(
    "options",
    [
        {"expressions_per_instance": 0},
        {"expressions_per_instance": 101},
        {"seed": -1},
        {"min_area_share": 1.0},
        {"split": "test"},
        {"val_share": 1.5},
    ],
    ids=str,
)
def test_arguments_out_of_range(random_file, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must .*got"):
        read(random_file[0], **options)
