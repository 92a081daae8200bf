"""Drawn scenes: what is said is true of one shape only, by an independent reading of the sentence."""

import hashlib
import math
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from modeling_restr.data.drawn_scenes import (
    DrawnScenes,
    draw_scene,
    kind_needs_context,
    load_backgrounds,
    paint_shapes,
    vocabulary_words,
)


KINDS = {
    "circle": "circle", "circles": "circle", "disc": "circle", "discs": "circle", "dot": "circle", "dots": "circle",
    "square": "square", "squares": "square", "rectangle": "rectangle", "rectangles": "rectangle",
    "triangle": "triangle", "triangles": "triangle", "star": "star", "stars": "star", "heart": "heart",
    "hearts": "heart", "ring": "ring", "rings": "ring", "donut": "ring", "donuts": "ring", "cross": "cross",
    "crosses": "cross", "plus": "cross", "pluses": "cross", "diamond": "diamond", "diamonds": "diamond",
    "crescent": "crescent", "crescents": "crescent", "moon": "crescent", "moons": "crescent",
}  # fmt: skip
ANYTHING = {"shape", "shapes", "thing", "things", "object", "objects", "one", "ones"}
COLORS = {"red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "gray"}
SIZES = {"small": "small", "little": "small", "medium": "medium", "large": "large", "big": "large"}
TEXTURES = {"striped": "striped", "dotted": "dotted", "spotted": "dotted"}
ENDINGS = {"with stripes": "striped", "with dots": "dotted", "with spots": "dotted"}
RANKS = {"first": 1, "second": 2, "third": 3, "fourth": 4, "fifth": 5}
RANKS |= {"1st": 1, "2nd": 2, "3rd": 3, "4th": 4, "5th": 5}
PLACES = {
    "left": r"leftmost|far left|left", "right": r"rightmost|far right|right",
    "top": r"topmost|highest|top|upper", "bottom": r"bottommost|lowest|bottom|lower",
}  # fmt: skip


class Reader:
    """Reads a sentence against a scene's geometry. Doubt counts: it returns every shape that could be meant."""

    def __init__(self, scene):
        self.shapes = scene.shapes
        self.height, self.width = scene.image.shape[:2]
        self.areas = scene.masks.sum(axis=(1, 2))

    def read(self, text):
        """(the shapes that could be meant, the shapes that the words about the target itself match)"""
        text = text.removeprefix("the ")
        for reading in (self.order, self.between, self.nearest, self.direction, self.place):
            found = reading(text)
            if found is not None:
                return found
        matches = self.matches(text)
        return matches, matches

    def matches(self, phrase):
        words = phrase.removeprefix("the ")
        conditions = {}
        for ending, texture in ENDINGS.items():
            if words.endswith(ending):
                words, conditions["texture"] = words.removesuffix(ending), texture
        color = re.fullmatch(r"(.*) (?:that is|in) (\w+)", words)
        if color:
            words, conditions["color"] = color.groups()
        *adjectives, noun = words.split()
        if noun in ("box", "boxes"):
            conditions["kind"] = ("square", "rectangle")
        elif noun not in ANYTHING:
            conditions["kind"] = KINDS[noun]
        for adjective in adjectives:
            if adjective in COLORS:
                conditions["color"] = adjective
            elif adjective in SIZES:
                conditions["size"] = SIZES[adjective]
            else:
                conditions["texture"] = TEXTURES[adjective]
        conditions = {field: (value,) if isinstance(value, str) else value for field, value in conditions.items()}
        return [i for i, shape in enumerate(self.shapes) if all(getattr(shape, f) in v for f, v in conditions.items())]

    def the_one(self, phrase):
        (anchor,) = self.matches(phrase)  # an anchor must be unique
        return anchor

    def place_of(self, index, end):
        """Distance from one end of the image, as a share of that side."""
        x, y = self.shapes[index].center[0] / self.width, self.shapes[index].center[1] / self.height
        return {"left": x, "right": 1 - x, "top": y, "bottom": 1 - y}[end]

    def order(self, text):
        found = re.fullmatch(
            r"(?:(.+) that is (\w+)|(\w+) (.+?))(?: counting)? from the (left|right|top|bottom)", text
        )
        if not found:
            return None
        other_phrase, behind, before, phrase, end = found.groups()
        matches = self.matches(phrase or other_phrase)
        ranked = sorted(matches, key=lambda i: self.place_of(i, end))
        wanted = ranked[RANKS[before or behind] - 1]
        assert len(matches) >= 3
        return [i for i in matches if abs(self.place_of(i, end) - self.place_of(wanted, end)) < 0.1], matches

    def between(self, text):
        found = re.fullmatch(r"(.+?) (?:in )?between (.+)", text)
        if not found:
            return None
        phrase, anchors = found.groups()
        if anchors.startswith("the two "):
            first, second = self.matches(anchors.removeprefix("the two "))
        else:
            first, second = map(self.the_one, anchors.split(" and "))
        matches = self.matches(phrase)
        return [i for i in matches if i not in (first, second) and self.lies_between(i, first, second)], matches

    def lies_between(self, index, first, second):
        a, b, p = (np.array(self.shapes[i].center) for i in (first, second, index))
        along = (p - a) @ (b - a) / ((b - a) @ (b - a))
        aside = np.linalg.norm(p - a - along * (b - a)) / np.linalg.norm(b - a)
        return 0 <= along <= 1 and aside < 0.4

    def nearest(self, text):
        found = re.fullmatch(r"(.+) (?:closest to|nearest to|nearest|next to|close to|near|by) (.+)", text)
        if not found or found[2] in ("the top", "the bottom"):
            return None
        matches, anchor = self.matches(found[1]), self.the_one(found[2])
        distances = {i: self.distance(i, anchor) for i in matches if i != anchor}
        assert len(distances) > 1
        return [i for i in distances if distances[i] < 1.3 * min(distances.values())], matches

    def distance(self, first, second):
        return math.dist(self.shapes[first].center, self.shapes[second].center)

    def direction(self, text):
        found = re.fullmatch(
            r"(.+?)(?: that is)? (?:(?:to the |on the )?(left|right)(?: side)? of|(above|over)|(below|under\w*|beneath))"
            r" (.+)",
            text,
        )
        if not found:
            return None
        phrase, side, above, _, anchor_phrase = found.groups()
        direction = side or ("top" if above else "bottom")
        matches, anchor = self.matches(phrase), self.the_one(anchor_phrase)
        found = [i for i in matches if i != anchor and self.lies(i, direction, anchor)]
        for index in found:  # what is meant must be so beyond doubt
            assert self.lies(index, direction, anchor, least=0.119, steepness=1 / 1.19)
        return found, matches

    def lies(self, index, direction, anchor, least=0.04, steepness=2.5):
        """Whether a shape lies to one side of an anchor; by default in the widest sense."""
        (x, y), (x0, y0) = self.shapes[index].center, self.shapes[anchor].center
        along, across = (x - x0, y - y0) if direction in ("left", "right") else (y - y0, x - x0)
        share = self.place_of(anchor, direction) - self.place_of(index, direction)
        return share > least and abs(across) < steepness * abs(along)

    def place(self, text):
        for reading in (self.extreme_size, self.middle, self.corner, self.side):
            found = reading(text)
            if found is not None:
                return found
        return None

    def extreme_size(self, text):
        found = re.fullmatch(r"(?:(biggest|largest|bigger|larger)|smallest|littlest|smaller) (.+)", text)
        if not found:
            return None
        matches = self.matches(found[2])
        if text.split()[0] in ("bigger", "larger", "smaller"):
            assert len(matches) == 2
        sign = 1 if found[1] else -1
        by_area = max(matches, key=lambda i: sign * self.areas[i])
        return [i for i in matches if (self.shapes[by_area].radius / self.shapes[i].radius) ** sign < 1.2], matches

    def middle(self, text):
        found = re.fullmatch(r"(?:middle|center) (.+)|(.+) in the (?:middle|center)", text)
        if not found:
            return None
        matches = self.matches(found[1] or found[2])
        assert len(matches) == 3
        spread = {end: np.ptp([self.place_of(i, end) for i in matches]) for end in ("left", "top")}
        ranked = sorted(matches, key=lambda i: self.place_of(i, max(spread, key=spread.get)))
        central = min(matches, key=lambda i: math.hypot(self.place_of(i, "left") - 0.5, self.place_of(i, "top") - 0.5))
        return sorted({ranked[1], central}), matches

    def corner(self, text):
        corner = r"(top|upper|bottom|lower) (left|right)"
        found = re.fullmatch(rf"{corner} (.+)|(.+) (?:in|at) the {corner}(?: corner)?", text)
        if not found:
            return None
        vertical, side = found[1] or found[5], found[2] or found[6]
        vertical = {"upper": "top", "lower": "bottom"}.get(vertical, vertical)
        matches = self.matches(found[3] or found[4])
        return [i for i in matches if self.place_of(i, vertical) < 0.5 and self.place_of(i, side) < 0.5], matches

    def side(self, text):
        for end, words in PLACES.items():
            before = re.fullmatch(rf"(?:{words}) (.+)", text)
            behind = re.fullmatch(
                rf"(.+?) (?:(?:on|to|at|closest to|furthest to) the (?:far )?|on ){end}(?: side)?", text
            )
            if before or behind:
                matches = self.matches((before or behind)[1])
                least = min(self.place_of(i, end) for i in matches)
                return [i for i in matches if self.place_of(i, end) < least + 0.1], matches
        return None


def photographs():
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (3, 9, 12, 3), dtype=np.uint8)
    return [np.asarray(Image.fromarray(pixels).resize((140, 110), Image.Resampling.BICUBIC)) for pixels in coarse]


@pytest.fixture(scope="module")
def scenes():
    dataset = DrawnScenes(500, seed=11, backgrounds=photographs())
    return [dataset[index] for index in range(len(dataset))]


def fingerprint(scene):
    digest = hashlib.sha256(scene.image.tobytes() + scene.masks.tobytes())
    digest.update(repr((scene.shapes, scene.expressions)).encode())
    return digest.hexdigest()


def test_each_sentence_is_true_of_its_target_alone(scenes):
    read = Counter()
    for scene in scenes:
        reader = Reader(scene)
        for expression in scene.expressions:
            meant, described = reader.read(expression.text)
            assert meant == [expression.target], expression.text
            assert expression.target in described
            # Place, order and relation are needed: what is said of the shape itself fits others, too.
            assert (len(described) > 1) == kind_needs_context(expression.kind), expression.text
            read[expression.kind] += 1
    assert min(read.values()) > 300


def test_reader_tells_wrong_targets(scenes):
    """The test above could not fail if the reader agreed with any target."""
    wrong = 0
    for scene in scenes[:100]:
        reader = Reader(replace(scene, shapes=scene.shapes[::-1], masks=scene.masks[::-1]))
        for expression in scene.expressions:
            try:
                wrong += reader.read(expression.text)[0] != [expression.target]
            except (AssertionError, ValueError):
                wrong += 1
    assert wrong > 0.8 * 8 * 100


def test_mix_of_kinds_and_targets(scenes):
    kinds = Counter(expression.kind for scene in scenes for expression in scene.expressions)
    total = sum(kinds.values())
    assert total == 8 * len(scenes)
    wanted = {"attribute": 0.35, "place": 0.25, "order": 0.15, "relation": 0.25}
    assert {kind: pytest.approx(share, abs=0.05) for kind, share in wanted.items()} == {
        kind: count / total for kind, count in kinds.items()
    }
    assert np.mean([len(scene.shapes) for scene in scenes]) >= 4
    same = [a.target == b.target for s in scenes for i, a in enumerate(s.expressions) for b in s.expressions[:i]]
    assert np.mean(same) < 0.25
    assert np.mean([len({e.text for e in scene.expressions}) for scene in scenes]) > 7.5


def test_scenes_are_as_described(scenes):
    ratios = []
    for scene in scenes:
        height, width = scene.image.shape[:2]
        ratios.append(width / height)
        assert scene.image.dtype == np.uint8
        assert max(height, width) == 96 and 0.59 < ratios[-1] < 1.69
        assert 3 <= len(scene.shapes) <= 7
        assert scene.masks.shape == (len(scene.shapes), height, width) and scene.masks.dtype == bool
        for edge in (scene.masks[:, 0], scene.masks[:, -1], scene.masks[:, :, 0], scene.masks[:, :, -1]):
            assert not edge.any()
    assert 0.55 < np.mean([ratio == 1 for ratio in ratios]) < 0.78
    assert min(ratios) < 0.75 and max(ratios) > 1.35


def test_masks_are_disjoint_and_shapes_mostly_visible(scenes):
    overlaps = 0
    for scene in scenes:
        assert scene.masks.sum(axis=0).max() == 1
        canvas = np.zeros_like(scene.image)
        for shape, mask in zip(scene.shapes, scene.masks):
            whole = paint_shapes(canvas, [shape])[1][0]
            assert not (mask & ~whole).any()
            assert mask.sum() >= 0.8 * whole.sum()
            overlaps += mask.sum() < whole.sum()
    assert overlaps > 0  # some do overlap a little


def test_masks_are_where_the_pixels_change(scenes):
    """A pixel is of the mask when the shape makes up more than half of it: with and without the shape, they differ."""
    canvas_color = np.array((255.0, 0.0, 255.0))  # no shape has this colour
    for scene in scenes[:60]:
        canvas = np.broadcast_to(canvas_color, scene.image.shape)
        flat = [replace(shape, texture="plain", shading=0.0) for shape in scene.shapes]
        everything, masks, _ = paint_shapes(canvas, flat)
        assert np.array_equal(masks, scene.masks)
        for index, mask in enumerate(masks):
            without, others, _ = paint_shapes(canvas, flat[:index] + flat[index + 1 :])
            alone = ~dilated(dilated(others.any(axis=0)))
            change = np.linalg.norm(everything.astype(float) - without, axis=2)
            share = change / np.linalg.norm(flat[index].rgb - canvas_color)
            assert np.array_equal((share > 0.5)[alone], mask[alone])
            assert alone[mask].mean() > 0.3


def dilated(mask):
    padded = np.pad(mask, 1)
    height, width = mask.shape
    return np.any([padded[y : y + height, x : x + width] for y in range(3) for x in range(3)], axis=0)


def test_shapes_look_as_they_are_called(scenes):
    """Names against pixels: plain colours, the centre, the size and the hole of a ring."""
    anchors = {
        "red": (200, 30, 30), "orange": (240, 130, 25), "yellow": (240, 215, 45), "green": (55, 155, 60),
        "blue": (45, 95, 200), "purple": (120, 50, 165), "pink": (245, 145, 190), "brown": (110, 65, 32),
        "black": (15, 15, 15), "white": (240, 240, 240), "gray": (128, 128, 128),
    }  # fmt: skip
    names, colors = list(anchors), np.array(list(anchors.values()))
    for scene in scenes:
        short_side = min(scene.image.shape[:2])
        for shape, mask in zip(scene.shapes, scene.masks):
            rows, columns = np.nonzero(mask)
            assert math.dist((columns.mean() + 0.5, rows.mean() + 0.5), shape.center) < 0.2 * shape.radius + 0.5
            low, high = {"small": (0.105, 0.12), "medium": (0.15, 0.17), "large": (0.21, 0.24)}[shape.size]
            assert low <= shape.radius / short_side <= high
            if shape.kind != "crescent":  # its centre is at its very edge
                assert mask[int(shape.center[1]), int(shape.center[0])] == (shape.kind != "ring")
            if shape.texture == "plain":
                color = np.median(scene.image[mask], axis=0)
                assert names[((colors - color) ** 2).sum(axis=1).argmin()] == shape.color


def test_striped_and_dotted_shapes_are_not_plain(scenes):
    deviations = {"plain": [], "striped": [], "dotted": []}
    for scene in scenes:
        for shape, mask in zip(scene.shapes, scene.masks):
            if shape.texture in deviations:
                deviations[shape.texture].append(scene.image[mask].std(axis=0).max())
    plain = np.quantile(deviations["plain"], 0.95)
    assert np.quantile(deviations["striped"], 0.05) > plain
    assert np.quantile(deviations["dotted"], 0.05) > plain


def test_shapes_stand_out_from_what_is_behind_them(scenes):
    contrasts = []
    for scene in scenes:
        background = ~scene.masks.any(axis=0)
        for shape, mask in zip(scene.shapes, scene.masks):
            ring = dilated(dilated(dilated(mask))) & ~dilated(mask) & background
            if ring.any():
                contrasts.append(np.linalg.norm(scene.image[ring].mean(axis=0) - shape.rgb))
    assert np.quantile(contrasts, 0.01) > 60


def test_vocabulary_holds_every_word(scenes):
    vocabulary = vocabulary_words()
    assert vocabulary == sorted(set(vocabulary))
    talkative = DrawnScenes(800, seed=12, image_size=54, expressions_per_scene=60)
    expressions = [e for source in (scenes, talkative) for scene in source for e in scene.expressions]
    said = [word for expression in expressions for word in re.split(r"\W+", expression.text)]
    assert set(said) <= set(vocabulary)
    unsaid = set(vocabulary) - set(said)
    assert len(unsaid) < 10 and all(word.endswith("s") for word in unsaid)  # rare plurals alone
    assert "the" in vocabulary and "diamonds" in vocabulary
    texts = [expression.text for expression in expressions]
    assert all(text == text.lower() and len(text.split()) <= 20 for text in texts)


def test_a_scene_depends_on_seed_and_index_alone():
    dataset = DrawnScenes(100, seed=3, backgrounds=photographs())
    first = [fingerprint(dataset[index]) for index in (0, 7, 42)]
    assert [fingerprint(dataset[index]) for index in (42, 7, 0)] == first[::-1]
    assert fingerprint(DrawnScenes(10**9, seed=3, backgrounds=photographs())[7]) == first[1]
    assert fingerprint(dataset[-1]) == fingerprint(dataset[99])
    others = [fingerprint(DrawnScenes(100, seed=seed, backgrounds=photographs())[0]) for seed in range(4, 8)]
    assert len({*first, *others}) == 7


def test_a_fresh_process_draws_the_same():
    script = (
        "from test_drawn_scenes import *\n"
        "dataset = DrawnScenes(100, seed=3, backgrounds=photographs())\n"
        "print(*[fingerprint(dataset[index]) for index in (5, 1)])"
    )
    root = Path(__file__).parent.parent
    paths = {"PYTHONPATH": f"{root}:{root / 'tests'}", "PYTHONHASHSEED": "123"}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=paths)
    dataset = DrawnScenes(100, seed=3, backgrounds=photographs())
    assert run.stdout.split() == [fingerprint(dataset[5]), fingerprint(dataset[1])]


def test_draw_scene_takes_size_background_and_number():
    photograph = np.zeros((50, 200, 3), dtype=np.uint8)
    photograph[:, :, 1] = 200
    scene = draw_scene(np.random.default_rng(0), (40, 80), photograph, expressions_per_scene=3)
    assert scene.image.shape == (40, 80, 3) and len(scene.expressions) == 3
    # Where the tip of a shape is thinner than a pixel, it reaches a little beyond its mask.
    background = scene.image[~dilated(dilated(scene.masks.any(axis=0)))]
    assert np.ptp(background, axis=0).max() == 0 and background[0].argmax() == 1
    many = draw_scene(np.random.default_rng(0), (200, 150), expressions_per_scene=200)
    assert len(many.expressions) == 200 and many.image.shape == (200, 150, 3)


def test_no_background_is_too_hard():
    """Scenes come to an end, even where hardly a colour stands out."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[::2] = 255
    for background in (noise, stripes, np.full((1, 1, 3), 128, dtype=np.uint8)):
        for seed in range(10):
            assert len(draw_scene(np.random.default_rng(seed), (32, 64), background).shapes) >= 3


def test_load_backgrounds(tmp_path):
    for name, size in (("b.png", (300, 200)), ("a.jpg", (200, 400)), ("c.png", (20, 30))):
        Image.new("RGB" if name != "c.png" else "L", size, 200).save(tmp_path / name)
    rotated = Image.new("RGB", (400, 200))
    exif = rotated.getexif()
    exif[0x0112] = 6  # a camera that was held upright
    rotated.save(tmp_path / "d.jpg", exif=exif)
    (tmp_path / "notes.txt").write_text("no photograph")
    backgrounds = load_backgrounds(tmp_path, 96)
    assert [b.shape for b in backgrounds] == [(192, 96, 3), (96, 144, 3), (30, 20, 3), (192, 96, 3)]
    assert all(background.dtype == np.uint8 for background in backgrounds)
    assert [b.shape for b in load_backgrounds([tmp_path / "c.png"], 96)] == [(30, 20, 3)]
    assert DrawnScenes(3, backgrounds=backgrounds)[0].image.shape[2] == 3


def test_bad_arguments_are_told(tmp_path):
    rng = np.random.default_rng(0)
    for size in ((16, 16), (96,), (96, 300), (0, 96)):
        with pytest.raises(ValueError, match="size must be"):
            draw_scene(rng, size)
    for background in (np.zeros((9, 9), np.uint8), np.zeros((9, 9, 3)), np.zeros((0, 9, 3), np.uint8)):
        with pytest.raises(ValueError, match="background must be"):
            draw_scene(rng, background=background)
        with pytest.raises(ValueError, match="background must be"):
            DrawnScenes(1, backgrounds=[background])
    with pytest.raises(ValueError, match="expressions_per_scene must be at least 1"):
        draw_scene(rng, expressions_per_scene=0)
    for arguments in ({"num_scenes": 0}, {"seed": -1}, {"image_size": 40}, {"expressions_per_scene": 0}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            DrawnScenes(**{"num_scenes": 1} | arguments)
    with pytest.raises(IndexError):
        DrawnScenes(5)[5]
    with pytest.raises(ValueError, match="No photographs"):
        load_backgrounds(tmp_path, 96)
    with pytest.raises(ValueError, match="kind of expression"):
        kind_needs_context("colour")
