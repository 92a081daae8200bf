"""Drawn scenes with referring expressions, without end: coloured shapes on plain, textured or photographic backgrounds.

Every expression of a scene is true of exactly one shape, by construction: each statement is checked against the
geometry with a margin before it is put into words, so that no reader would dispute it.

    scenes = DrawnScenes(num_scenes=1_000_000, seed=0, image_size=96)
    scene = scenes[7]
    scene.expressions[0].text, scene.masks[scene.expressions[0].target]
"""

from __future__ import annotations

import bisect
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageDraw, ImageOps


T = TypeVar("T")

MIN_SIDE = 32  # pixels; below this a small shape is a blob
MAX_ASPECT_RATIO = 2.0
MIN_SHAPES = 3
MIN_VISIBLE_SHARE = 0.8

# The radius of a shape over the image's short side. The gaps between the ranges keep the three names apart.
SIZE_RANGES = {"small": (0.105, 0.12), "medium": (0.15, 0.17), "large": (0.21, 0.24)}

# Two ends of the range that each name covers, in RGB.
COLOR_RANGES = {
    "red": ((176, 16, 22), (232, 44, 44)),
    "orange": ((236, 116, 8), (255, 152, 40)),
    "yellow": ((240, 206, 20), (255, 236, 76)),
    "green": ((22, 120, 46), (88, 196, 80)),
    "blue": ((22, 50, 160), (64, 136, 240)),
    "purple": ((90, 28, 134), (150, 76, 200)),
    "pink": ((244, 118, 176), (255, 176, 206)),
    "brown": ((94, 54, 22), (136, 86, 46)),
    "black": ((4, 4, 6), (26, 26, 28)),
    "white": ((238, 238, 236), (255, 255, 255)),
    "gray": ((112, 114, 116), (150, 150, 152)),
}
# Colours that are too dark for darker stripes. A lighter red is no choice for red: it is pink.
LIGHT_STRIPED = ("green", "blue", "purple", "brown", "black")
MIN_CONTRAST = 88.0  # Euclidean RGB distance between a shape and what is behind it

# Names as people say them; the first is the name of the kind.
NOUNS = {
    "circle": ("circle", "disc", "dot"),
    "square": ("square", "box"),
    "rectangle": ("rectangle",),
    "triangle": ("triangle",),
    "star": ("star",),
    "ring": ("ring", "donut"),
    "cross": ("cross", "plus"),
    "heart": ("heart",),
    "diamond": ("diamond",),
    "crescent": ("crescent", "moon"),
}
ANY_NOUNS = ("shape", "thing", "object")
PLURALS = {"box": "boxes", "cross": "crosses", "plus": "pluses"}
TEXTURES = ("plain", "noisy", "striped", "dotted")
SIZE_WORDS = {"small": ("small", "little"), "medium": ("medium",), "large": ("large", "big")}
TEXTURE_WORDS = {"striped": ("striped",), "dotted": ("dotted", "spotted")}
TEXTURE_ENDINGS = {"striped": ("with stripes",), "dotted": ("with dots", "with spots")}
COLOR_ENDINGS = ("that is {}", "in {}")
ORDINALS = (("first", "1st"), ("second", "2nd"), ("third", "3rd"), ("fourth", "4th"), ("fifth", "5th"))

# {0} is the group that the target is one of, {1} and {2} are the anchors.
PLACE_PHRASES = {
    "leftmost": ("leftmost {0}", "{0} furthest to the left", "far left {0}", "{0} on the far left"),
    "rightmost": ("rightmost {0}", "{0} furthest to the right", "far right {0}", "{0} on the far right"),
    "topmost": ("topmost {0}", "highest {0}", "{0} closest to the top"),
    "bottommost": ("lowest {0}", "bottommost {0}", "{0} closest to the bottom"),
    "left": ("left {0}", "{0} on the left", "{0} on the left side", "{0} to the left"),
    "right": ("right {0}", "{0} on the right", "{0} on the right side", "{0} to the right"),
    "top": ("top {0}", "{0} at the top", "upper {0}", "{0} on top"),
    "bottom": ("bottom {0}", "{0} at the bottom", "lower {0}", "{0} on the bottom"),
    "middle": ("middle {0}", "{0} in the middle", "center {0}", "{0} in the center"),
    "biggest": ("biggest {0}", "largest {0}"),
    "smallest": ("smallest {0}", "littlest {0}"),
    "bigger": ("bigger {0}", "larger {0}"),
    "smaller": ("smaller {0}",),
    **{
        f"{vertical} {side}": (
            f"{vertical} {side} {{0}}",
            f"{{0}} in the {vertical} {side}",
            f"{{0}} in the {vertical} {side} corner",
            f"{{0}} at the {vertical} {side}",
            f"{other} {side} {{0}}",
            f"{{0}} in the {other} {side} corner",
        )
        for vertical, other in (("top", "upper"), ("bottom", "lower"))
        for side in ("left", "right")
    },
}
ORDER_PHRASES = {
    end: (f"{{1}} {{0}} from the {end}", f"{{0}} that is {{1}} from the {end}", f"{{1}} {{0}} counting from the {end}")
    for end in ("left", "right", "top", "bottom")
}
RELATION_PHRASES = {
    "left": ("{0} left of {1}", "{0} to the left of {1}", "{0} on the left of {1}", "{0} on the left side of {1}"),
    "right": (
        "{0} right of {1}",
        "{0} to the right of {1}",
        "{0} on the right of {1}",
        "{0} on the right side of {1}",
    ),
    "above": ("{0} above {1}", "{0} over {1}", "{0} that is above {1}"),
    "below": ("{0} below {1}", "{0} under {1}", "{0} that is below {1}", "{0} beneath {1}", "{0} underneath {1}"),
    "nearest": ("{0} closest to {1}", "{0} nearest to {1}", "{0} nearest {1}"),
    "next": ("{0} next to {1}", "{0} close to {1}", "{0} near {1}", "{0} by {1}"),
    "between": ("{0} between {1} and {2}", "{0} in between {1} and {2}"),
    "between two": ("{0} between the two {1}", "{0} in between the two {1}"),
}

# How often each kind is asked for in a scene that offers it. Not every scene offers an order, so its weight is above
# the share that it ends with (about 35 % attribute, 25 % place, 15 % order, 25 % relation).
EXPRESSION_WEIGHTS = {"attribute": 0.35, "place": 0.235, "order": 0.195, "relation": 0.255}

CLEAR_GAP = 0.12  # of the image's side, between shapes that a place, an order or a side tells apart


@dataclass(frozen=True)
class Shape:
    """One drawn shape: what it is called, where it is, and all that is needed to draw it again.

    `kind` is a key of `NOUNS`, `color` of `COLOR_RANGES`, `size` of `SIZE_RANGES`; `texture` one of
    `TEXTURES`. `center` is (x, y) and `radius` is half the shape's extent, both in pixels. `rotation` and
    `texture_angle` are in radians; `shading` is the share of brightness lost from one side to the other.
    """

    kind: str
    color: str
    size: str
    texture: str
    center: tuple[float, float]
    radius: float
    rotation: float
    rgb: tuple[float, float, float]
    texture_angle: float
    shading: float


@dataclass(frozen=True)
class Expression:
    """A sentence that is true of exactly one shape: `target` is its index in the scene's masks and shapes.

    `kind` is "attribute", "place", "order" or "relation".
    """

    text: str
    target: int
    kind: str


@dataclass(frozen=True)
class Scene:
    """`image`: (height, width, 3) uint8; `masks`: (num_shapes, height, width) bool, the visible part of each shape."""

    image: np.ndarray
    masks: np.ndarray
    shapes: tuple[Shape, ...]
    expressions: tuple[Expression, ...]


def kind_needs_context(kind: str) -> bool:
    """Whether expressions of this kind can only be resolved by looking at the other shapes, too."""
    if kind not in EXPRESSION_WEIGHTS:
        raise ValueError(f"Unknown kind of expression: expected one of {list(EXPRESSION_WEIGHTS)}, got {kind!r}.")
    return kind != "attribute"


def vocabulary_words() -> list[str]:
    """Every word that an expression can hold, sorted."""
    nouns = {noun for names in NOUNS.values() for noun in names} | {*ANY_NOUNS, "one"}
    tables = (SIZE_WORDS, TEXTURE_WORDS, TEXTURE_ENDINGS, PLACE_PHRASES, ORDER_PHRASES, RELATION_PHRASES)
    phrases = [phrase for table in tables for phrases in table.values() for phrase in phrases]
    phrases += [*COLOR_ENDINGS, *COLOR_RANGES, *itertools.chain(*ORDINALS), *nouns, *map(_plural, nouns), "the"]
    return sorted({word for phrase in phrases for word in re.findall(r"\w+", re.sub(r"\{\d?\}", " ", phrase))})


def draw_scene(
    rng: np.random.Generator,
    size: tuple[int, int] = (96, 96),
    background: np.ndarray | None = None,
    expressions_per_scene: int = 8,
) -> Scene:
    """Draw one scene of 3 to 7 shapes and put `expressions_per_scene` statements about them into words.

    Args:
        rng: the source of all chance; equal states give equal scenes.
        size: (height, width) in pixels, each at least 32, the longer at most twice the shorter.
        background: a photograph, (any height, any width, 3) uint8, of which a random crop is put behind the shapes;
            without it the background is plain, a gradient or a texture.
        expressions_per_scene: how many expressions; a scene that offers fewer distinct ones repeats some.

    Raises:
        ValueError: for a size, a background or a number of expressions that is not as described.
    """
    _check_size(size)
    _check_positive("expressions_per_scene", expressions_per_scene)
    if background is not None:
        _check_background(background)
    canvas = _paint_background(rng, size) if background is None else _crop_photograph(rng, size, background)
    min_contrast = MIN_CONTRAST
    while True:
        shapes = _place_shapes(rng, canvas, min_contrast)
        min_contrast *= 0.93  # a background on which little stands out must not be tried for ever
        if len(shapes) < MIN_SHAPES:
            continue
        image, masks, areas = paint_shapes(canvas, shapes)
        if (masks.sum(axis=(1, 2)) < MIN_VISIBLE_SHARE * areas).any():
            continue
        expressions = _express(rng, _Geometry(shapes, areas, size), expressions_per_scene)
        if expressions:
            return Scene(image, masks, tuple(shapes), expressions)


class DrawnScenes:
    """Drawn scenes as a map-style dataset: `scenes[i]` depends on `(seed, i)` only, in any process and any order.

    Two thirds of the scenes are square, the others wide or tall (ratios 0.6 to 1.67) with `image_size` as the longer
    side. With `backgrounds` (see [`load_backgrounds`]), two thirds of the scenes stand on a crop of a photograph.

    Args:
        num_scenes: length of the dataset; nothing is drawn before it is asked for.
        seed: non-negative; another seed gives other scenes.
        image_size: the longer side in pixels, at least 54.
        backgrounds: photographs, each (any height, any width, 3) uint8.
        expressions_per_scene: number of expressions of each scene.

    Raises:
        ValueError: for a number that is too small or a background that is not an RGB uint8 array.
    """

    def __init__(
        self,
        num_scenes: int,
        seed: int = 0,
        image_size: int = 96,
        backgrounds: Sequence[np.ndarray] | None = None,
        expressions_per_scene: int = 8,
    ):
        _check_positive("num_scenes", num_scenes)
        _check_positive("expressions_per_scene", expressions_per_scene)
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}.")
        if image_size < math.ceil(MIN_SIDE / 0.6):
            raise ValueError(f"image_size must be at least {math.ceil(MIN_SIDE / 0.6)} pixels, got {image_size}.")
        for background in backgrounds or ():
            _check_background(background)
        self.num_scenes = num_scenes
        self.seed = seed
        self.image_size = image_size
        self.backgrounds = backgrounds or ()
        self.expressions_per_scene = expressions_per_scene

    def __len__(self) -> int:
        return self.num_scenes

    def __getitem__(self, index: int) -> Scene:
        index = range(self.num_scenes)[index]  # negative indices and IndexError as a list has them
        rng = np.random.default_rng((self.seed, index))
        size = self._draw_size(rng)
        on_photograph = self.backgrounds and rng.random() < 2 / 3
        background = _pick(rng, self.backgrounds) if on_photograph else None
        return draw_scene(rng, size, background, self.expressions_per_scene)

    def _draw_size(self, rng: np.random.Generator) -> tuple[int, int]:
        short_side = self.image_size
        if rng.random() < 1 / 3:
            short_side = round(self.image_size * rng.uniform(0.6, 0.95))
        size = (short_side, self.image_size)
        return size if rng.random() < 0.5 else size[::-1]


def load_backgrounds(folder_or_paths: str | Path | Sequence[str | Path], image_size: int) -> list[np.ndarray]:
    """Read photographs as backgrounds: RGB uint8 arrays, made small (the shorter side at most `image_size` pixels).

    Args:
        folder_or_paths: a folder, of which every .jpg, .jpeg, .png and .webp file is read in the order of the names,
            or the files themselves.
        image_size: the longer side of the scenes that will be drawn.

    Raises:
        ValueError: when there is no photograph.
    """
    if isinstance(folder_or_paths, str | Path):
        suffixes = (".jpg", ".jpeg", ".png", ".webp")
        paths = sorted(path for path in Path(folder_or_paths).iterdir() if path.suffix.lower() in suffixes)
    else:
        paths = [Path(path) for path in folder_or_paths]
    if not paths:
        raise ValueError(f"No photographs (.jpg, .jpeg, .png, .webp) in {folder_or_paths}.")
    return [_load_background(path, image_size) for path in paths]


def _load_background(path: Path, image_size: int) -> np.ndarray:
    with Image.open(path) as image:
        scale = min(1.0, image_size / min(image.size))
        image.draft("RGB", (math.ceil(image.width * scale), math.ceil(image.height * scale)))  # a fast coarse JPEG
        upright = ImageOps.exif_transpose(image).convert("RGB")
    scale = min(1.0, image_size / min(upright.size))
    small = (max(1, round(upright.width * scale)), max(1, round(upright.height * scale)))
    return np.asarray(upright.resize(small, Image.Resampling.BOX))


def _check_positive(name: str, number: int) -> None:
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}.")


def _check_size(size: tuple[int, int]) -> None:
    if len(size) != 2 or min(size) < MIN_SIDE or max(size) > MAX_ASPECT_RATIO * min(size):
        raise ValueError(
            f"size must be (height, width), each at least {MIN_SIDE} pixels and the longer at most "
            f"{MAX_ASPECT_RATIO:g} times the shorter, got {tuple(size)}."
        )


def _check_background(background: np.ndarray) -> None:
    if background.ndim != 3 or background.shape[2] != 3 or background.dtype != np.uint8 or background.size == 0:
        raise ValueError(
            f"A background must be a (height, width, 3) array of uint8, got {background.shape} of {background.dtype}."
        )


def _pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    """One item with equal chances; Generator.choice is fifty times slower."""
    return items[int(rng.random() * len(items))]


def _pick_weighted(rng: np.random.Generator, weights: dict[T, float]) -> T:
    thresholds = list(itertools.accumulate(weights.values()))
    return list(weights)[bisect.bisect(thresholds, rng.random() * thresholds[-1])]


def _sample(rng: np.random.Generator, items: Sequence[T], count: int) -> list[T]:
    return [items[index] for index in rng.permutation(len(items))[:count]]


# --- Backgrounds ------------------------------------------------------------------------------------------------------


@cache
def _noise_field() -> Image.Image:
    """A fixed 256 x 256 field of noise at three scales; scenes cut their textures from it, faster than drawing anew."""
    rng = np.random.default_rng(0)
    field = np.zeros((256, 256), dtype=np.float32)
    for cells in (16, 64, 256):
        noise = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
        field += np.asarray(noise.resize((256, 256), Image.Resampling.BICUBIC))
    return Image.fromarray(field / np.abs(field).max())


def _noise(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """(height, width) float32 in [-1, 1]."""
    side = rng.uniform(32, 160)
    left, top = rng.uniform(0, 256 - side, 2)
    box = (left, top, left + side, top + side)
    return np.asarray(_noise_field().resize(size[::-1], Image.Resampling.BILINEAR, box=box))


def _ramp(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """A plane in a random direction, (height, width) float32 in [-1, 1]."""
    angle = rng.uniform(0, 2 * math.pi)
    rows = np.linspace(-1, 1, size[0], dtype=np.float32)[:, None] * math.sin(angle)
    columns = np.linspace(-1, 1, size[1], dtype=np.float32)[None, :] * math.cos(angle)
    return (rows + columns) / (abs(math.sin(angle)) + abs(math.cos(angle)))


def _paint_background(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """A plain colour, a gradient or a noise texture, (height, width, 3) float32 in [0, 255]."""
    style = _pick_weighted(rng, {"plain": 0.3, "gradient": 0.3, "noise": 0.4})
    brightness, hue = rng.uniform(15, 240), rng.uniform(-1, 1, 3)
    middle = np.clip(brightness + (hue - hue.mean()) * rng.uniform(0, 90), 15, 240)
    if style == "plain":
        field = np.zeros(size, dtype=np.float32)
    else:
        field = _ramp(rng, size) if style == "gradient" else _noise(rng, size)
    reach = rng.uniform(10, 40) + rng.uniform(-12, 12, 3)
    return np.clip(middle + field[..., None] * reach, 0, 255).astype(np.float32)


def _crop_photograph(rng: np.random.Generator, size: tuple[int, int], photograph: np.ndarray) -> np.ndarray:
    """A random crop with the scene's aspect ratio, perhaps mirrored, a little dimmer and greyer than it was."""
    height, width = photograph.shape[:2]
    scale = min(height / size[0], width / size[1]) * rng.uniform(0.6, 1.0)
    crop_height, crop_width = size[0] * scale, size[1] * scale
    left, top = rng.uniform(0, width - crop_width), rng.uniform(0, height - crop_height)
    box = (left, top, left + crop_width, top + crop_height)
    crop = Image.fromarray(photograph).resize(size[::-1], Image.Resampling.BILINEAR, box=box, reducing_gap=2.0)
    pixels = np.asarray(crop, dtype=np.float32)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    gray = pixels.mean(axis=2, keepdims=True)
    pixels = gray + (pixels - gray) * np.float32(rng.uniform(0.3, 0.9))
    mean = pixels.mean()
    pixels = mean + (pixels - mean) * np.float32(rng.uniform(0.5, 0.95))
    return np.clip(pixels * np.float32(rng.uniform(0.5, 1.2)), 0, 255)


# --- Shapes -----------------------------------------------------------------------------------------------------------


def _polygon(corners: int, first_angle: float = -90.0, radii: tuple[float, ...] = (1.0,)) -> np.ndarray:
    """Corners around the origin, (corners, 2) as (x, y) with y down; `radii` repeat from corner to corner."""
    angles = np.radians(first_angle + 360.0 * np.arange(corners) / corners)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.resize(radii, corners)[:, None]


def _heart() -> np.ndarray:
    # The usual parametric heart curve, 17 units high and 16 wide to either side, scaled to the unit circle.
    angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    x = 16 * np.sin(angles) ** 3
    y = -(13 * np.cos(angles) - 5 * np.cos(2 * angles) - 2 * np.cos(3 * angles) - np.cos(4 * angles))
    return np.stack([x, y + 0.85], axis=1) / 15.5  # 0.85 centres the area


def _crescent(outer: float = 1.1, inner: float = 0.9, shift: float = 0.5) -> np.ndarray:
    """A disc of radius `outer` without the disc of radius `inner` whose centre is `shift` to the right of its own."""
    tip = (outer**2 - inner**2 + shift**2) / (2 * shift)  # x where the circles meet
    outer_angle, inner_angle = math.acos(tip / outer), math.acos((tip - shift) / inner)
    outward = np.linspace(outer_angle, 2 * math.pi - outer_angle, 32)
    inward = np.linspace(2 * math.pi - inner_angle, inner_angle, 24)
    x = np.concatenate([outer * np.cos(outward), inner * np.cos(inward) + shift])
    y = np.concatenate([outer * np.sin(outward), inner * np.sin(inward)])
    return np.stack([x + 0.46, y], axis=1)  # 0.46 centres the area


def _plus(arm: float = 0.34, reach: float = 1.05) -> np.ndarray:
    quarter = np.array([(arm, -arm), (arm, -reach), (-arm, -reach)])
    quarter_turn = np.array([(0, -1), (1, 0)])
    return np.concatenate([quarter @ np.linalg.matrix_power(quarter_turn, turns) for turns in range(4)])


# What is filled and then what is cut out, in units of the radius and around the centre of the filled area.
OUTLINES: dict[str, tuple[np.ndarray, ...]] = {
    "circle": (_polygon(48),),
    "square": (_polygon(4, 45.0, (1.25,)),),
    "rectangle": (np.array([(-1.2, -0.62), (1.2, -0.62), (1.2, 0.62), (-1.2, 0.62)]),),
    "triangle": (_polygon(3, radii=(1.22,)),),
    "star": (_polygon(10, radii=(1.22, 0.54)),),
    "ring": (_polygon(48, radii=(1.05,)), _polygon(48, radii=(0.52,))),
    "cross": (_plus(),),
    "heart": (_heart(),),
    "diamond": (np.array([(0, -1.28), (0.8, 0), (0, 1.28), (-0.8, 0)]),),
    "crescent": (_crescent(),),
}
# The reach of each outline from the centre, in units of the radius.
REACHES = {kind: float(np.hypot(*outlines[0].T).max()) for kind, outlines in OUTLINES.items()}
# The largest rotation in degrees that leaves the name alone: a square on its tip would be a diamond.
MAX_ROTATIONS = {"square": 12.0, "cross": 14.0, "diamond": 10.0, "heart": 25.0}
SUPERSAMPLING = 3


def _coverage(shape: Shape, left: int, top: int, side: int) -> np.ndarray:
    """How much of each pixel the whole shape covers, (side, side) uint8, in the window that starts at (left, top)."""
    cosine, sine = math.cos(shape.rotation), math.sin(shape.rotation)
    turn = np.array([(cosine, sine), (-sine, cosine)]) * (shape.radius * SUPERSAMPLING)
    origin = np.array([shape.center[0] - left, shape.center[1] - top]) * SUPERSAMPLING - 0.5
    window = Image.new("L", (side * SUPERSAMPLING, side * SUPERSAMPLING))
    draw = ImageDraw.Draw(window)
    for outline, fill in zip(OUTLINES[shape.kind], (255, 0)):
        draw.polygon((outline @ turn + origin).ravel().tolist(), fill=fill)
    return np.asarray(window.reduce(SUPERSAMPLING))


def _second_color(color: str, rgb: np.ndarray) -> np.ndarray:
    """The colour of stripes and dots: the shape's own, clearly lighter or darker."""
    if color in LIGHT_STRIPED:
        return rgb + (255 - rgb) * np.float32(0.5)
    return rgb * np.float32(0.5)


def _texture(shape: Shape, left: int, top: int, side: int) -> np.ndarray:
    """The shape's colours in the window, (side, side, 3) float32."""
    x = np.arange(left, left + side, dtype=np.float32)[None, :] + 0.5 - shape.center[0]
    y = np.arange(top, top + side, dtype=np.float32)[:, None] + 0.5 - shape.center[1]
    cosine, sine = math.cos(shape.texture_angle), math.sin(shape.texture_angle)
    along, across = x * cosine + y * sine, y * cosine - x * sine  # (side, side) each
    rgb = np.array(shape.rgb, dtype=np.float32)
    light = 1.0 - shape.shading * (0.5 + 0.5 * across / shape.radius)
    if shape.texture == "noisy":
        light += 0.3 * _speckles(shape.texture_angle, side)
    colors = rgb * light[..., None]
    if shape.texture in TEXTURE_WORDS:
        share = _stripes(along, shape.radius) if shape.texture == "striped" else _dots(along, across, shape.radius)
        colors += (_second_color(shape.color, rgb) - rgb) * share[..., None]
    return colors


def _speckles(angle: float, side: int) -> np.ndarray:
    """A window of the noise field, (side, side) in [-1, 1]; the angle decides where it is cut."""
    field = np.asarray(_noise_field())
    indices = (np.arange(side) + int(1000 * angle)) % len(field)
    return field[indices[:, None], indices]


def _stripes(along: np.ndarray, radius: float) -> np.ndarray:
    period = max(4.5, 0.5 * radius)
    return np.clip(0.35 + 1.5 * np.sin(along * (2 * math.pi / period)), 0, 1)


def _dots(along: np.ndarray, across: np.ndarray, radius: float) -> np.ndarray:
    rate = 2 * math.pi / max(5.5, 0.55 * radius)
    return np.clip(2.0 * (np.cos(along * rate) + np.cos(across * rate) - 0.45), 0, 1)


def paint_shapes(canvas: np.ndarray, shapes: Sequence[Shape]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Paint shapes onto a canvas, later ones over earlier ones; no chance is involved.

    Args:
        canvas: (height, width, 3) in [0, 255]; it is left as it is.
        shapes: what to paint; each must lie inside the canvas.

    Returns:
        The image (height, width, 3) uint8, the visible part of each shape (num_shapes, height, width) bool, and the
        number of pixels of each whole shape, visible or not, (num_shapes,).
    """
    pixels = canvas.astype(np.float32)
    masks = np.zeros((len(shapes), *canvas.shape[:2]), dtype=bool)
    areas = np.zeros(len(shapes))
    for index, shape in enumerate(shapes):
        reach = shape.radius * REACHES[shape.kind] + 1
        left, top = max(0, math.floor(shape.center[0] - reach)), max(0, math.floor(shape.center[1] - reach))
        side = math.ceil(2 * reach) + 1
        window = (slice(top, top + side), slice(left, left + side))
        height, width = masks[index][window].shape
        coverage = _coverage(shape, left, top, side)[:height, :width]
        covered = coverage > 127
        areas[index] = covered.sum()
        masks[:index, window[0], window[1]] &= ~covered
        masks[index][window] = covered
        share = coverage[..., None] * np.float32(1 / 255)
        pixels[window] += (_texture(shape, left, top, side)[:height, :width] - pixels[window]) * share
    image = np.clip(pixels + 0.5, 0, 255).astype(np.uint8)
    return image, masks, areas


# --- Layout -----------------------------------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """What is to be drawn before it has a place; `along` fixes x or y as a share of the side, for clear orders."""

    kind: str
    color: str
    size: str
    along: tuple[int, float] | None = None


def _plan_shapes(rng: np.random.Generator, colors: Sequence[str]) -> list[_Plan]:
    """Shapes that share kinds and colours on purpose: else a single word would tell them apart.

    Some scenes hold a group of look-alikes, scattered or in an order; all draw the rest from a few kinds and colours.
    """
    count = _pick_weighted(rng, {3: 0.08, 4: 0.22, 5: 0.35, 6: 0.25, 7: 0.1})
    kinds = _sample(rng, list(NOUNS), int(rng.integers(2, 5)))
    colors = _sample(rng, colors, int(rng.integers(2, 6)))
    layout = _pick_weighted(rng, {"mixed": 0.3, "twins": 0.3, "line": 0.4})
    group: list[_Plan] = []
    if layout != "mixed":
        group = _plan_group(rng, kinds, colors, min(count, int(rng.integers(2, 5))), layout == "line")
    rest = [_Plan(_pick(rng, kinds), _pick(rng, colors), _plan_size(rng, count)) for _ in range(count - len(group))]
    # Large shapes find no place once the small ones have theirs.
    return sorted(group + rest, key=lambda plan: (plan.along is None, -SIZE_RANGES[plan.size][0]))


def _plan_size(rng: np.random.Generator, count: int) -> str:
    return _pick_weighted(rng, {"small": 0.36, "medium": 0.36, "large": 0.28 if count < 6 else 0.16})


def _plan_group(
    rng: np.random.Generator, kinds: Sequence[str], colors: Sequence[str], count: int, in_line: bool
) -> list[_Plan]:
    shared = _pick_weighted(rng, {("kind", "color"): 0.6, ("kind",): 0.25, ("color",): 0.15})
    same_size = rng.random() < 0.6
    kind, color, size = _pick(rng, kinds), _pick(rng, colors), _plan_size(rng, 3 + count)
    group = [
        _Plan(
            kind if "kind" in shared else _pick(rng, kinds),
            color if "color" in shared else _pick(rng, colors),
            size if same_size else _plan_size(rng, 3 + count),
        )
        for _ in range(max(count, 3) if in_line else count)
    ]
    if not in_line:
        return group
    axis = int(rng.integers(2))
    spots = (np.arange(len(group)) + 0.5 + rng.uniform(-0.15, 0.15, len(group))) / len(group)
    return [plan._replace(along=(axis, float(spot))) for plan, spot in zip(group, spots)]


def _place_shapes(rng: np.random.Generator, canvas: np.ndarray, min_contrast: float) -> list[Shape]:
    """Give each planned shape a place inside the frame, clear of the others and of backgrounds of its own colour."""
    backdrop = _Backdrop(canvas)
    colors = backdrop.colors_apart(min_contrast)
    if len(colors) < 2:
        return []
    looseness = rng.uniform(0.94, 1.15)  # under 1 a shape may overlap its neighbour a little
    sizes = ("large", "medium", "small")
    shapes: list[Shape] = []
    for plan in _plan_shapes(rng, colors):
        for size in sizes[sizes.index(plan.size) :]:  # where the planned size has no room, a smaller shape may have
            shape = _dress(rng, plan._replace(size=size), min(canvas.shape[:2]))
            center = _find_place(rng, plan, shape, shapes, backdrop, looseness, min_contrast)
            if center is not None:
                shapes.append(replace(shape, center=center))
                break
    order = rng.permutation(len(shapes))  # which lies over which, and the order of the masks
    return [shapes[index] for index in order]


def _dress(rng: np.random.Generator, plan: _Plan, short_side: int) -> Shape:
    """The planned shape with its exact size, colour and texture, not yet at a place."""
    dark, bright = np.array(COLOR_RANGES[plan.color], dtype=np.float64)
    red, green, blue = np.clip(dark + (bright - dark) * rng.random() + rng.uniform(-6, 6, 3), 0, 255).tolist()
    textures = {"plain": 0.6, "noisy": 0.14}
    if plan.size != "small":  # on a small shape stripes cannot be made out, nor dots on a thin one
        textures |= {"striped": 0.13, "dotted": 0.0 if plan.kind == "crescent" else 0.13}
    return Shape(
        kind=plan.kind,
        color=plan.color,
        size=plan.size,
        texture=_pick_weighted(rng, textures),
        center=(0.0, 0.0),
        radius=float(rng.uniform(*SIZE_RANGES[plan.size])) * short_side,
        rotation=math.radians(rng.uniform(-1, 1) * MAX_ROTATIONS.get(plan.kind, 180.0)),
        rgb=(red, green, blue),
        texture_angle=float(rng.uniform(0, 2 * math.pi)),
        shading=float(rng.uniform(0, 0.15)),
    )


class _Backdrop:
    """The canvas seen coarsely: the mean colour of each cell, to tell whether a shape would stand out."""

    def __init__(self, canvas: np.ndarray):
        self.size = canvas.shape[:2]
        self.cell = max(1, min(self.size) // 12)
        rows, columns = self.size[0] // self.cell, self.size[1] // self.cell
        blocks = canvas[: rows * self.cell, : columns * self.cell]
        self.cells = blocks.reshape(rows, self.cell, columns, self.cell, 3).mean(axis=(1, 3))

    def colors_apart(self, min_contrast: float) -> list[str]:
        """The names of the colours that differ from most of the cells."""
        middles = np.mean(list(COLOR_RANGES.values()), axis=1)  # (num_colors, 3)
        distances = ((self.cells.reshape(-1, 1, 3) - middles) ** 2).sum(axis=-1)  # (num_cells, num_colors)
        shares = (distances > min_contrast**2).mean(axis=0)
        return [name for name, share in zip(COLOR_RANGES, shares) if share > 0.6]

    def is_apart(self, centers: np.ndarray, shape: Shape, min_contrast: float) -> np.ndarray:
        """For each of (n, 2) centres whether the cells behind the shape differ from its colour: (n,) bool."""
        probes = centers[:, None] + np.array([(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1)]) * (0.7 * shape.radius)
        columns, rows = (probes / self.cell).astype(int).transpose(2, 0, 1)  # (n, 5) each
        rows, columns = np.minimum(rows, len(self.cells) - 1), np.minimum(columns, self.cells.shape[1] - 1)
        distances = ((self.cells[rows, columns] - np.array(shape.rgb)) ** 2).sum(axis=-1)  # (n, 5)
        return (distances > min_contrast**2).all(axis=1)


def _find_place(
    rng: np.random.Generator,
    plan: _Plan,
    shape: Shape,
    placed: Sequence[Shape],
    backdrop: _Backdrop,
    looseness: float,
    min_contrast: float,
    tries: int = 120,
) -> tuple[float, float] | None:
    """The first of some random places that will do, as (x, y) in pixels, or None."""
    reach = shape.radius * REACHES[shape.kind]
    extent = np.array(backdrop.size[::-1]) - 2 * (reach + 1)  # (width, height) that the centre may move in
    spots = rng.random((tries, 2))
    if plan.along is not None:
        axis, spot = plan.along
        spots[:, axis] = spot
    centers = reach + 1 + spots * extent
    fits = backdrop.is_apart(centers, shape, min_contrast)
    for other in placed:
        apart = looseness * (reach + other.radius * REACHES[other.kind])
        fits &= ((centers - other.center) ** 2).sum(axis=1) > apart**2
    if not fits.any():
        return None
    x, y = centers[int(fits.argmax())]
    return float(x), float(y)


# --- Expressions ------------------------------------------------------------------------------------------------------


class _Description(NamedTuple):
    """What is said of a shape itself; None where nothing is said."""

    size: str | None = None
    texture: str | None = None
    color: str | None = None
    kind: str | None = None


class _Geometry:
    """Centres as shares of the image (`places`) and in units of its short side (`points`); radii in the latter."""

    def __init__(self, shapes: Sequence[Shape], areas: np.ndarray, size: tuple[int, int]):
        height, width = size
        short = min(size)
        self.shapes = shapes
        self.places = [(shape.center[0] / width, shape.center[1] / height) for shape in shapes]
        self.points = [(shape.center[0] / short, shape.center[1] / short) for shape in shapes]
        self.radii = [shape.radius / short for shape in shapes]
        self.areas = areas.tolist()


class _Fact(NamedTuple):
    """A statement that tells `target` from the other `members`: a phrase, and the anchors that it speaks of."""

    kind: str
    target: int
    members: tuple[int, ...]
    phrases: tuple[str, ...]
    anchors: tuple[tuple[int, ...], ...] = ()
    rank: int = 0


DESCRIBED_FIELDS = (
    ("kind",),
    ("color",),
    ("color", "kind"),
    ("size", "kind"),
    ("size", "color"),
    ("size", "color", "kind"),
    ("texture",),
    ("texture", "kind"),
    ("texture", "color", "kind"),
    (),
)


def _describe(shapes: Sequence[Shape]) -> dict[tuple[int, ...], list[_Description]]:
    """For each set of shapes that can be named, as indices, the descriptions that match exactly these shapes."""
    members: dict[_Description, list[int]] = {}
    for index, shape in enumerate(shapes):
        for fields in DESCRIBED_FIELDS:
            if "texture" in fields and shape.texture not in TEXTURE_WORDS:
                continue
            members.setdefault(_Description(**{field: getattr(shape, field) for field in fields}), []).append(index)
    groups: dict[tuple[int, ...], list[_Description]] = {}
    for description, indices in members.items():
        groups.setdefault(tuple(indices), []).append(description)
    return groups


def _express(rng: np.random.Generator, geometry: _Geometry, count: int) -> tuple[Expression, ...]:
    """`count` expressions, spread over kinds and shapes; none when the scene offers no statement at all."""
    shapes = geometry.shapes
    groups = _describe(shapes)
    facts: dict[str, dict[int, list[_Fact]]] = {}
    for fact in _facts(geometry, groups):
        facts.setdefault(fact.kind, {}).setdefault(fact.target, []).append(fact)
    if not facts:
        return ()
    speaker = _Speaker(rng, shapes, groups)
    times_said = [0.0] * len(shapes)
    expressions: dict[str, Expression] = {}
    for _ in range(4 * count):
        kind = _pick_weighted(rng, {kind: EXPRESSION_WEIGHTS[kind] for kind in facts})
        # The shape that was spoken of least, with a little chance so that ties do not fall on the first.
        target = min(facts[kind], key=lambda index: times_said[index] + rng.random())
        text = speaker.say(_pick_specific(rng, facts[kind][target], len(shapes)))
        if text not in expressions:
            times_said[target] += 1
            expressions[text] = Expression(text, target, kind)
        if len(expressions) == count:
            break
    return tuple(itertools.islice(itertools.cycle(expressions.values()), count))


def _pick_specific(rng: np.random.Generator, facts: Sequence[_Fact], num_shapes: int) -> _Fact:
    """A fact of a target's; "the leftmost shape" of all comes up less often than "the leftmost star"."""
    fact = _pick(rng, facts)
    return _pick(rng, facts) if len(fact.members) == num_shapes and rng.random() < 0.8 else fact


def _facts(geometry: _Geometry, groups: dict[tuple[int, ...], list[_Description]]) -> Iterator[_Fact]:
    for members in groups:
        if len(members) == 1:
            yield _Fact("attribute", members[0], members, ())
            continue
        yield from _side_facts(geometry, members)
        yield from _corner_facts(geometry, members)
        yield from _middle_facts(geometry, members)
        yield from _size_facts(geometry, members)
        yield from _order_facts(geometry, members)
        for anchor in (group for group in groups if len(group) == 1):
            yield from _direction_facts(geometry, members, anchor)
            yield from _nearness_facts(geometry, members, anchor)
        yield from _between_facts(geometry, members, groups)


SIDES = (("left", "right"), ("top", "bottom"))


def _side_facts(geometry: _Geometry, members: tuple[int, ...]) -> Iterator[_Fact]:
    """The leftmost, rightmost, topmost and bottommost of a group, where it is by a clear gap."""
    for axis, ends in enumerate(SIDES):
        for end, sign in zip(ends, (1, -1)):
            # Distances from the frame's side that is asked about.
            ranked = sorted((geometry.places[m][axis] * sign + (sign < 0), m) for m in members)
            (first, target), (second, _) = ranked[:2]
            if second - first < CLEAR_GAP:
                continue
            phrases = PLACE_PHRASES[f"{end}most"]
            # "On the left" also says something of the picture: the shape must be there, a third one must not.
            if first < 0.5 and (len(members) == 2 or second > 0.45):
                phrases = PLACE_PHRASES[end] + phrases
            yield _Fact("place", target, members, phrases)


def _corner_facts(geometry: _Geometry, members: tuple[int, ...]) -> Iterator[_Fact]:
    for side, vertical in itertools.product(*SIDES):
        near, others = [], 0
        for member in members:
            x, y = geometry.places[member]
            farther = max(x if side == "left" else 1 - x, y if vertical == "top" else 1 - y)
            if farther < 0.38:
                near.append(member)
            elif farther < 0.55:
                others += 1
        if len(near) == 1 and not others:
            yield _Fact("place", near[0], members, PLACE_PHRASES[f"{vertical} {side}"])


def _middle_facts(geometry: _Geometry, members: tuple[int, ...]) -> Iterator[_Fact]:
    """The middle one of three in a row or a column, when it is also the one nearest to the middle of the picture."""
    if len(members) != 3:
        return
    for axis in (0, 1):
        first, target, last = sorted(members, key=lambda m: geometry.places[m][axis])
        along = [geometry.places[m][axis] for m in (first, target, last)]
        across = [geometry.places[m][1 - axis] for m in members]
        clear = min(along[1] - along[0], along[2] - along[1]) >= CLEAR_GAP
        in_line = max(across) - min(across) < 0.5 * (along[2] - along[0])
        offsets = [math.dist(geometry.places[m], (0.5, 0.5)) for m in (target, first, last)]
        if clear and in_line and offsets[0] < 0.8 * min(offsets[1:]):
            yield _Fact("place", target, members, PLACE_PHRASES["middle"])


def _size_facts(geometry: _Geometry, members: tuple[int, ...]) -> Iterator[_Fact]:
    """The biggest and the smallest of a group: of another size than all others and of clearly another area."""
    for sign, superlative, comparative in ((-1, "biggest", "bigger"), (1, "smallest", "smaller")):
        target, *others = sorted(members, key=lambda m: sign * geometry.radii[m])
        # A large crescent may have less area than a medium square: then neither is the bigger one.
        ratios = [(geometry.areas[other] / geometry.areas[target]) ** sign for other in others]
        if geometry.shapes[target].size != geometry.shapes[others[0]].size and min(ratios) > 1.3:
            phrases = PLACE_PHRASES[superlative] + PLACE_PHRASES[comparative] * (len(members) == 2)
            yield _Fact("place", target, members, phrases)


def _order_facts(geometry: _Geometry, members: tuple[int, ...]) -> Iterator[_Fact]:
    """Ranks from either end among three or more, where all neighbours are clearly apart."""
    if not 3 <= len(members) <= len(ORDINALS):
        return
    for axis, ends in enumerate(SIDES):
        ranked = sorted(members, key=lambda m: geometry.places[m][axis])
        places = [geometry.places[m][axis] for m in ranked]
        if min(after - before for before, after in itertools.pairwise(places)) < CLEAR_GAP:
            continue
        for rank, (forward, backward) in enumerate(zip(ranked, reversed(ranked))):
            yield _Fact("order", forward, members, ORDER_PHRASES[ends[0]], rank=rank)
            yield _Fact("order", backward, members, ORDER_PHRASES[ends[1]], rank=rank)


def _direction_facts(geometry: _Geometry, members: tuple[int, ...], anchor: tuple[int, ...]) -> Iterator[_Fact]:
    """The one of the group that lies to one side of the anchor, when the others clearly do not."""
    anchor_point, anchor_place = geometry.points[anchor[0]], geometry.places[anchor[0]]
    candidates = [m for m in members if m != anchor[0]]
    for direction, axis, sign in (("left", 0, -1), ("right", 0, 1), ("above", 1, -1), ("below", 1, 1)):
        holding, doubtful = [], 0
        for member in candidates:
            share = (geometry.places[member][axis] - anchor_place[axis]) * sign
            along = (geometry.points[member][axis] - anchor_point[axis]) * sign
            across = abs(geometry.points[member][1 - axis] - anchor_point[1 - axis])
            if share >= CLEAR_GAP and along > 1.2 * across:
                holding.append(member)
            elif share > 0.03 and across < 3 * along:
                doubtful += 1
        if len(holding) == 1 and not doubtful:
            yield _Fact("relation", holding[0], members, RELATION_PHRASES[direction], (anchor,))


def _nearness_facts(geometry: _Geometry, members: tuple[int, ...], anchor: tuple[int, ...]) -> Iterator[_Fact]:
    """The one of the group nearest to the anchor, both from centre to centre and from edge to edge."""
    point, radius = geometry.points[anchor[0]], geometry.radii[anchor[0]]
    ranked = sorted((math.dist(geometry.points[m], point), m) for m in members if m != anchor[0])
    if len(ranked) < 2:
        return
    distance, target = ranked[0]
    gap = distance - geometry.radii[target] - radius
    other_gap = min(other - geometry.radii[m] - radius for other, m in ranked[1:])
    if ranked[1][0] > 1.4 * distance and other_gap > gap + 0.1:
        phrases = RELATION_PHRASES["nearest"] + RELATION_PHRASES["next"] * (gap < 0.15)
        yield _Fact("relation", target, members, phrases, (anchor,))


def _between_facts(
    geometry: _Geometry, members: tuple[int, ...], groups: dict[tuple[int, ...], list[_Description]]
) -> Iterator[_Fact]:
    """The one of the group between two anchors: two that are named singly, or a named pair."""
    singles = [group for group in groups if len(group) == 1]
    for first, second in itertools.combinations(singles, 2):
        target = _find_between(geometry, members, first[0], second[0])
        if target is not None:
            yield _Fact("relation", target, members, RELATION_PHRASES["between"], (first, second))
    for pair in groups:
        if len(pair) == 2 and not set(pair) & set(members):
            target = _find_between(geometry, members, *pair)
            if target is not None:
                yield _Fact("relation", target, members, RELATION_PHRASES["between two"], (pair,))


def _find_between(geometry: _Geometry, members: tuple[int, ...], first: int, second: int) -> int | None:
    (x0, y0), (x1, y1) = geometry.points[first], geometry.points[second]
    length = math.dist((x0, y0), (x1, y1))
    if length < 0.4:
        return None
    found = []
    for member in members:
        if member in (first, second):
            continue
        x, y = geometry.points[member]
        along = ((x - x0) * (x1 - x0) + (y - y0) * (y1 - y0)) / length**2
        across = abs((x - x0) * (y1 - y0) - (y - y0) * (x1 - x0)) / length**2
        if 0.25 <= along <= 0.75 and across <= 0.15:
            found.append(member)
        elif -0.05 < along < 1.05 and across < 0.45:
            return None  # neither clearly between them nor clearly not
    return found[0] if len(found) == 1 else None


class _Speaker:
    """Puts facts about one scene into words, by chance among the ways to say them."""

    def __init__(
        self,
        rng: np.random.Generator,
        shapes: Sequence[Shape],
        groups: dict[tuple[int, ...], list[_Description]],
    ):
        self.rng = rng
        self.groups = groups
        self.nouns = dict(NOUNS)
        if any(shape.kind == "rectangle" for shape in shapes):
            self.nouns["square"] = ("square",)  # a rectangle is a box, too

    def say(self, fact: _Fact) -> str:
        if fact.kind == "attribute":
            text = self._say_attributes(_pick(self.rng, self.groups[fact.members]))
        else:
            group = self._noun_phrase(self._choose_description(fact.members))
            extras = (
                [_pick(self.rng, ORDINALS[fact.rank])] if fact.kind == "order" else map(self._anchor, fact.anchors)
            )
            text = _pick(self.rng, fact.phrases).format(group, *extras)
        return f"the {text}" if self.rng.random() < 0.6 else text

    def _choose_description(self, members: tuple[int, ...]) -> _Description:
        """Mostly the shortest way to name these shapes: people say no more than is needed."""
        descriptions = self.groups[members]
        if self.rng.random() < 0.6:
            return min(descriptions, key=lambda words: sum(map(bool, words)) + self.rng.random())
        return _pick(self.rng, descriptions)

    def _anchor(self, members: tuple[int, ...]) -> str:
        phrase = self._noun_phrase(self._choose_description(members), plural=len(members) > 1)
        return phrase if len(members) > 1 or self.rng.random() < 0.1 else f"the {phrase}"

    def _noun_phrase(self, description: _Description, plural: bool = False) -> str:
        words = []
        if description.size:
            words.append(_pick(self.rng, SIZE_WORDS[description.size]))
        if description.texture:
            words.append(_pick(self.rng, TEXTURE_WORDS[description.texture]))
        if description.color:
            words.append(description.color)
        noun = self._noun(description.kind, has_adjective=bool(words))
        return " ".join([*words, _plural(noun) if plural else noun])

    def _noun(self, kind: str | None, has_adjective: bool) -> str:
        if kind is None:
            return _pick(self.rng, (*ANY_NOUNS, "one", "one") if has_adjective else ANY_NOUNS)
        return kind if self.rng.random() < 0.6 else _pick(self.rng, self.nouns[kind])

    def _say_attributes(self, description: _Description) -> str:
        """The description before the noun ("red circle") or one part of it behind ("circle that is red")."""
        if description.texture and self.rng.random() < 0.35:
            ending = _pick(self.rng, TEXTURE_ENDINGS[description.texture])
            return f"{self._noun_phrase(description._replace(texture=None))} {ending}"
        if description.color and description.kind and self.rng.random() < 0.25:
            ending = _pick(self.rng, COLOR_ENDINGS).format(description.color)
            return f"{self._noun_phrase(description._replace(color=None))} {ending}"
        return self._noun_phrase(description)


def _plural(noun: str) -> str:
    return PLURALS.get(noun, f"{noun}s")
