"""
Augmentation of an image with its masks and expressions: scale, crop, colour and mirror, each off by default.

The paper uses none, because "left" is wrong in a mirrored image. This module changes an image only in ways that keep
all of its sentences true, as `expression_rules.py` judges by their words.

    augment = Augmentation(crop=0.5, mirror=0.5)
    image, masks, texts = augment(image, masks, texts, np.random.default_rng((seed, epoch, index)))
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from ..image_processing_restr import ReSTRImageProcessor
from ..visualization import read_photo
from .expression_rules import mirror_expression, names_color, needs_whole_image


_CROP_MARGIN = 0.1  # on each side, as a share of the targets' extent: keeps what a person wears or holds in the image


@dataclass(frozen=True)
class Augmentation:
    """
    Random changes of an image that keep its masks and expressions correct. All are off by default.

    Args:
        scale: Probability of showing everything smaller. The image is centred on a larger black canvas and keeps its
            pixels. (The processor's letterbox would undo a resize.)
        crop: Probability of a crop, which keeps all masks whole. An image is cropped only if none of its sentences
            depends on the rest of the image ([`needs_whole_image`]).
        color: Probability of changing brightness and contrast, and unless a sentence names a colour ([`names_color`])
            saturation and hue.
        mirror: Probability of mirroring image and masks and swapping left and right in the sentences. An image is
            mirrored only if all of its sentences can be ([`mirror_expression`]).
        scale_range: Range of the scale factor, in (0, 1].
        crop_range: Range of the share of each side to keep, in (0, 1]. Masks may need more.
        brightness, contrast, saturation: Largest relative change.
        hue: Largest rotation of the hue, as a share of the colour wheel.

    Raises:
        ValueError: A probability, range or strength is out of bounds.
    """

    scale: float = 0.0
    crop: float = 0.0
    color: float = 0.0
    mirror: float = 0.0
    scale_range: tuple[float, float] = (0.5, 1.0)
    crop_range: tuple[float, float] = (0.6, 1.0)
    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2
    hue: float = 0.02

    def __post_init__(self) -> None:
        for name in ("scale", "crop", "color", "mirror", "brightness", "contrast", "saturation", "hue"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"Expected {name} from 0 to 1, got {getattr(self, name)}.")
        for name in ("scale_range", "crop_range"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise ValueError(f"Expected {name} as (low, high) with 0 < low <= high <= 1, got {(low, high)}.")

    def __call__(
        self, image: Image.Image, masks: Sequence[np.ndarray], texts: Sequence[str], rng: np.random.Generator
    ) -> tuple[Image.Image, list[np.ndarray], list[str]]:
        """
        Args:
            image: Image of any mode.
            masks: One mask per text, (height, width) bool, of the upright image (with its EXIF orientation applied).
            texts: The expressions drawn for this image.
            rng: The only source of randomness.

        Returns:
            Image, masks and texts. If nothing changes, they are returned as they are. Otherwise the image is RGB, and
            the masks have its size. No mask loses a pixel.

        Raises:
            ValueError: There is not one mask per text, or a mask is not bool or not of the image's size.
        """
        masks, texts = list(masks), list(texts)
        if len(masks) != len(texts):
            raise ValueError(f"Expected one mask per text, got {len(masks)} masks and {len(texts)} texts.")
        color, mirror, crop, scale = rng.random(4) < (self.color, self.mirror, self.crop, self.scale)
        mirrored = [mirror_expression(text) for text in texts] if mirror else []
        crop = crop and not any(needs_whole_image(text) for text in texts)
        mirror = mirror and None not in mirrored
        if not (color or mirror or crop or scale):
            return image, masks, texts
        image = read_photo(image, _get_image_processor())  # without EXIF data, which would rotate it again
        _check_masks(masks, image)
        if color:
            image = self._change_color(image, any(names_color(text) for text in texts), rng)
        if mirror:
            image = ImageOps.mirror(image)
            masks = _change_each(masks, lambda mask: mask[:, ::-1].copy())  # tensors have no negative strides
            texts = [text for text in mirrored if text is not None]
        if crop:
            image, masks = self._crop(image, masks, rng)
        if scale:
            image, masks = self._shrink(image, masks, rng)
        return image, masks, texts

    def _change_color(self, image: Image.Image, keep_hue: bool, rng: np.random.Generator) -> Image.Image:
        brightness, contrast, saturation, hue = rng.uniform(-1, 1, 4)
        image = ImageEnhance.Brightness(image).enhance(1 + brightness * self.brightness)
        image = ImageEnhance.Contrast(image).enhance(1 + contrast * self.contrast)
        if keep_hue:
            return image
        image = ImageEnhance.Color(image).enhance(1 + saturation * self.saturation)
        return _turn_hue(image, round(hue * self.hue * 256))

    def _crop(
        self, image: Image.Image, masks: list[np.ndarray], rng: np.random.Generator
    ) -> tuple[Image.Image, list[np.ndarray]]:
        share = rng.uniform(*self.crop_range)
        covered = np.zeros((image.height, image.width), dtype=bool)
        for mask in masks:
            covered |= mask
        top, bottom = _draw_interval(np.flatnonzero(covered.any(axis=1)), image.height, share, rng)
        left, right = _draw_interval(np.flatnonzero(covered.any(axis=0)), image.width, share, rng)
        cut = _change_each(masks, lambda mask: mask[top:bottom, left:right].copy())
        return image.crop((left, top, right, bottom)), cut

    def _shrink(
        self, image: Image.Image, masks: list[np.ndarray], rng: np.random.Generator
    ) -> tuple[Image.Image, list[np.ndarray]]:
        factor = rng.uniform(*self.scale_range)
        width, height = round(image.width / factor), round(image.height / factor)
        left, top = (width - image.width) // 2, (height - image.height) // 2
        canvas = Image.new("RGB", (width, height))
        canvas.paste(image, (left, top))
        margins = ((top, height - image.height - top), (left, width - image.width - left))
        return canvas, _change_each(masks, lambda mask: np.pad(mask, margins))


@cache
def _get_image_processor() -> ReSTRImageProcessor:
    return ReSTRImageProcessor()


def _change_each(masks: list[np.ndarray], change: Callable[[np.ndarray], np.ndarray]) -> list[np.ndarray]:
    """Change each mask. A mask that several texts share is changed once and stays shared."""
    distinct = {id(mask): mask for mask in masks}
    changed = {key: change(mask) for key, mask in distinct.items()}
    return [changed[id(mask)] for mask in masks]


def _check_masks(masks: list[np.ndarray], image: Image.Image) -> None:
    for mask in masks:
        if mask.shape != (image.height, image.width) or mask.dtype != bool:
            raise ValueError(
                f"Expected bool masks of their image's (height, width) {(image.height, image.width)}, got {mask.dtype} of"
                f" {mask.shape}."
            )


def _turn_hue(image: Image.Image, steps: int) -> Image.Image:
    """Rotate the hue by `steps` of 256."""
    if steps == 0:
        return image
    hue, saturation, value = image.convert("HSV").split()
    hue = hue.point([(level + steps) % 256 for level in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def _draw_interval(covered: np.ndarray, size: int, share: float, rng: np.random.Generator) -> tuple[int, int]:
    """A random interval of at least `share` of a side that includes all covered pixels and a margin."""
    first, stop = (int(covered[0]), int(covered[-1]) + 1) if covered.size else (size, 0)
    margin = round(_CROP_MARGIN * max(stop - first, 0))
    first, stop = max(first - margin, 0), min(stop + margin, size)
    length = max(round(share * size), stop - first, 1)
    start = int(rng.integers(max(stop - length, 0), min(first, size - length), endpoint=True))
    return start, start + length
