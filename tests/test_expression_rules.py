"""Mirrored sentences, against a table and the geometry of random masks, and words that forbid crops and new colours."""

import random

import numpy as np
import pytest
from test_coco import Reader, random_masks

from modeling_restr.data.expressions import generate_expressions, measure_mask
from modeling_restr.training.expression_rules import mirror_expression, names_color, needs_whole_image


MIRRORED = {
    # Sides
    "left guy": "right guy", "guy on left": "guy on right", "guy left": "guy right", "Left": "Right",
    "GUY ON THE LEFT": "GUY ON THE RIGHT", "woman on Right side": "woman on Left side",
    "man on the LEFT with a TV": "man on the RIGHT with a TV", "leftmost zebra": "rightmost zebra",
    "the right-most elephant": "the left-most elephant", "Rightmost kid in blue": "Leftmost kid in blue",
    "lefthand bear": "righthand bear", "right-hand side giraffe": "left-hand side giraffe",
    "left handed batter": "right handed batter", "leftside couch": "rightside couch",
    "dog's left ear": "dog's right ear", "top left pizza": "top right pizza",
    "bottom right corner, half a donut": "bottom left corner, half a donut", "far left bus": "far right bus",
    "far right behind the fence": "far left behind the fence", "front right cow": "front left cow",
    "upper left sandwich half": "upper right sandwich half", "guy on lft": "guy on rt", "rt girl": "lft girl",
    "lhs sheep": "rhs sheep", "cow facing left": "cow facing right", "man looking right": "man looking left",
    "person to the left of the bike": "person to the right of the bike",
    "chair left of the lamp": "chair right of the lamp", "cat just right of the vase": "cat just left of the vase",
    "the left one": "the right one", "left.": "right.", "right/middle horse": "left/middle horse",
    "black cat, left": "black cat, right", "person cut off on the left edge": "person cut off on the right edge",
    "second from the left": "second from the right", "2nd from right": "2nd from left",
    "third guy from left in blue": "third guy from right in blue",
    "counting left to right, the third vase": "counting right to left, the third vase",
    "1st zebra from right to left": "1st zebra from left to right",
    "second person to the right of the man in the left chair": "second person to the left of the man in the right chair",
    "guy on the right behind the counter": "guy on the left behind the counter",
    "girl on left in white shirt": "girl on right in white shirt", "third guy on right": "third guy on left",
    "second left person": "second right person",
    "woman on the left in front of the cake": "woman on the right in front of the cake",
    "man on the right next to the left door": "man on the left next to the right door",
    "hand on left that is holding phone": "hand on right that is holding phone",
    # Positions on a clock
    "donut at 3 o'clock": "donut at 9 o'clock", "slice at 2 o'clock": "slice at 10 o'clock",
    "broccoli at 11 oclock": "broccoli at 1 oclock", "slice at 8 o clock": "slice at 4 o clock",
    "5oclock piece": "7oclock piece", "the one at 3:00": "the one at 9:00",
    "7 o\u2019clock position": "5 o\u2019clock position", "Ten o'clock slice": "Two o'clock slice",
    "slice at one o'clock": "slice at eleven o'clock", "top slice, 12 o'clock": "top slice, 12 o'clock",
    "carrot at six o'clock": "carrot at six o'clock",
    "cup to the left of the 4 o'clock slice": "cup to the right of the 8 o'clock slice",
    # Nothing to swap
    "man in red shirt": "man in red shirt", "bright yellow bus under the light": "bright yellow bus under the light",
    "person standing straight": "person standing straight", "container of leftovers": "container of leftovers",
    "couch at the bottom": "couch at the bottom", "third shelf from the top": "third shelf from the top",
    "second row, guy with t-shirt": "second row, guy with t-shirt", "second tallest guy": "second tallest guy",
    "it's the girl that isn't smiling": "it's the girl that isn't smiling",
    "chair next to the window": "chair next to the window",
    # "Just"
    "man standing right next to the car": "man standing right next to the car",
    "cat sitting right behind the left lamp": "cat sitting right behind the right lamp",
    "the cup that is right in front of her": "the cup that is right in front of her",
    "bird is right above the roof on the right": "bird is right above the roof on the left",
}  # fmt: skip

NOT_MIRRORED = [
    # Ambiguous
    "man right in front", "right behind the fence", "lamp on right behind the bed", "kid sitting up right",
    "man right by the tree", "right next to the woman", "girl right there", "the guy right now", "all right guys",
    "standing left next to the bus", "dog looking right at the camera", "turtle right side up",
    "facing the right way", "right?", "slice left", "what is left of the cake", "what's left of the pizza",
    "the pizza that is left", "bag left behind", "the left over pizza", "bike left on the road",
    "umbrella left alone", "bus that just left the station", "guy left in blue", "only one left",
    # Slips and missing spaces
    "guy on lwft", "rigth one", "leht horse", "theleft bus", "man onleft", "righr side", "lt blue shirt",
    "letfmost kid", "lEFt guy",
    # Text, letters, numbers
    "player number 7 on left", "boy with 23 on his back", "#5", "bus that says express", "stop sign on right",
    "shirt that reads hello", 'left cup "starbucks"', "guy in 'obey' hat", "man with NY hat", "L shaped couch",
    "s-shaped bench on left", "keys j and k", "player two on the left", "word left of the logo",
    "clock at 3 o'clock", "train leaving at 3:00 pm",
    # Counting without a start
    "second guy", "3rd from end", "last horse", "second row third seat", "first kid, not the one on the right",
    "second guy on left side", "the next one",
    # Words that imply a side
    "player at third base", "west side of the field", "pitcher in the southeast",
    "clockwise from the fork, left slice", "driver's side door", "between 2 and 3 o'clock",
    "slice between two and three o'clock", "half past 3:30",
    # Not English
    "le chat \u00e0 gauche", "man \u2192",
]  # fmt: skip


@pytest.mark.parametrize("text", MIRRORED)
def test_mirrored_sentences(text):
    assert mirror_expression(text) == MIRRORED[text]
    assert mirror_expression(MIRRORED[text]) == text


@pytest.mark.parametrize("text", NOT_MIRRORED)
def test_ambiguous_sentences_are_not_mirrored(text):
    assert mirror_expression(text) is None


WORDS = [
    "left", "right", "left", "right", "leftmost", "Right", "LEFT", "lft", "rt", "hand", "side", "of", "on", "the", "from",
    "to", "in", "next", "behind", "front", "is", "sitting", "standing", "man", "slice", "one", "second", "2nd", "first",
    "last", "over", "corner", "top", ",", ".", "-", "3", "o'clock", "three", "oclock", "with", "blue", "what",
]  # fmt: skip


def test_mirroring_twice_gives_the_sentence_back():
    rng = np.random.default_rng(0)
    mirrored = 0
    for _ in range(8_000):
        text = " ".join(rng.choice(WORDS, rng.integers(1, 8)))
        other = mirror_expression(text)
        if other is not None:
            assert mirror_expression(other) == text
            mirrored += other != text
    assert mirrored > 800


def random_rows():
    """Masks of random instances, and generated sentences about each."""
    rng = random.Random(0)
    for seed in range(150):
        masks = dict(enumerate(mask for mask in random_masks(rng) if mask.any()))
        if masks:
            instances = [measure_mask("hot dog", mask) for mask in masks.values()]
            yield masks, generate_expressions(instances, np.random.default_rng(seed), expressions_per_instance=8)


def test_mirrored_sentences_are_true_of_mirrored_images():
    expressions = mirrored = 0
    for masks, generated in random_rows():
        reader = Reader({index: mask[:, ::-1] for index, mask in masks.items()}, dict.fromkeys(masks, "hot dog"))
        for target, expression in ((target, expression) for target, row in generated.items() for expression in row):
            text = mirror_expression(expression.text)
            expressions += 1
            if text is not None:
                assert reader.read(text)[1] == {target}, (expression.text, text)
                assert (text != expression.text) == ("left" in expression.text or "right" in expression.text)
                mirrored += 1
    assert mirrored > 0.95 * expressions > 100


@pytest.mark.parametrize(
    "text",
    [
        "man in red shirt", "girl with the long hair holding an umbrella",
        "the woman wearing a vest and a chest strap", "zebra facing the camera", "Almost naked guy",
        "person on bike", "straight yellow banana",
    ],
)  # fmt: skip
def test_sentences_about_the_target_alone_allow_a_crop(text):
    assert not needs_whole_image(text)


@pytest.mark.parametrize(
    "text",
    [
        "second from the left", "person on the right", "lft guy", "rigth guy", "cow on L", "east end of the train",
        "man in the MIDDLE", "biggest bear", "Closest to us", "taller woman", "small dog", "bottommost slice",
        "cat next to the vase", "horse behind fence", "the other cow", "both kids", "three people", "2 people",
        "slice at one o'clock", "blurry one in the background", "person cut off by the frame", "last horse",
        "only half visible",
    ],
)  # fmt: skip
def test_sentences_that_need_the_whole_image(text):
    assert needs_whole_image(text)


def test_sentences_about_place_order_or_size_need_the_whole_image():
    for _, generated in random_rows():
        for expression in (expression for row in generated.values() for expression in row):
            needs_it = expression.statement.kind != "category"
            assert needs_whole_image(expression.text) >= needs_it, expression.text


def test_names_color():
    colored = ["red shirt", "the Greenish one", "darkblue car", "guy in gray", "multicolored kite", "blonde", "orange"]
    plain = ["man with hat", "tired player", "colt", "third horse", "old ladies"]
    assert [names_color(text) for text in colored] == [True] * len(colored)
    assert [names_color(text) for text in plain] == [False] * len(plain)
