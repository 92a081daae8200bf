"""
Any number of training scenes from photographs with instance masks in COCO's layout. They are cropped, mirrored and
recoloured, and instances of other photographs are pasted in. Scenes come with their annotations, so that `sentences.py`
can describe them.

    photographs = Photographs.load([Path("photos")], "train")
    scenes = PhotoScenes(photographs, num_scenes=1000, image_size=192, seed=0)
    scene = scenes[0]  # always the same one
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps
from tqdm.auto import tqdm

from modeling_restr.data.image_files import image_finder, resolve_image
from modeling_restr.data.records import read_json
from modeling_restr.data.segmentation import decode_mask, segmentation_to_rle


CATEGORIES = read_json(Path(__file__).with_name("categories.json"))
# Categories that do not belong to anything else in a photograph, so they may be pasted anywhere. If such a category is
# not annotated in a photograph, nothing is said about it.
UNMISTAKABLE = frozenset(CATEGORIES["unmistakable"])
PARTS_SOURCES = {"clothing-co-parsing", "car-parts"}  # annotate parts and clothing of one person or car
REGIONS_SOURCE = "labelme-facade"  # sky, road and walls as regions: two pieces may belong to one building
PER_IMAGE_SOURCE = "coco2017-lvis"  # its images differ in the categories that were annotated
# How often a source's images are drawn, relative to their number.
SOURCE_WEIGHTS = {
    "coco2017": 4.0,
    "coco2017-9-classes": 2.5,
    "coco2017-traffic-only": 2.5,
    "coco2017-lvis": 2.0,
    "balloon": 1.5,
    "coco2017-persons-only": 1.0,
    "clothing-co-parsing": 0.6,
    "labelme-facade": 0.3,
    "car-parts": 0.15,
}
SEEN_SHARE = 0.65  # an instance gets sentences if at least this share of its pixels is visible
CUT_SHARE = 0.04  # an instance is dropped if at most this share is visible
HELD_OUT = 10  # every tenth image, by its id
# Held-out photographs that the project shows. They are always part of the test.
SHOWN = frozenset([30, 370, 450, 540, 125870, 173350, 196610, 231460, 294920, 349860, 551780, 568290])


def part_of(image_id: int) -> str:
    """The part that a photograph belongs to: "train", or the held-out "validation" or "test"."""
    if image_id % HELD_OUT != 0:
        return "train"
    is_validation = image_id // HELD_OUT % 2 == 0 and image_id not in SHOWN
    return "validation" if is_validation else "test"


@dataclass(frozen=True)
class PhotoScene:
    """
    An image and its instances.

    image: (height, width, 3) uint8.
    masks: (instances, height, width) bool, the visible part of each instance.
    categories: Their names.
    is_clear: Whether enough of each instance is visible to ask for it.
    unclear_categories: Categories that may have more instances in the scene than `masks`.
    known: The categories that are annotated at all.
    is_clothing: Whether all instances except persons are their parts and clothing.
    """

    image: np.ndarray
    masks: np.ndarray
    categories: list[str]
    is_clear: list[bool]
    unclear_categories: set[str]
    known: frozenset[str]
    is_clothing: bool


@dataclass(frozen=True)
class Photograph:
    """A photograph (height, width, 3) uint8 in memory, with packed masks. The rest is as in [`PhotoScene`]."""

    image_id: int
    image: np.ndarray
    packed_masks: np.ndarray
    categories: list[str]
    crowds: set[str]
    known: frozenset[str]
    is_clothing: bool
    weight: float

    @property
    def masks(self) -> np.ndarray:
        """(instances, height, width) bool."""
        return np.unpackbits(self.packed_masks, axis=2, count=self.image.shape[1]).astype(bool)

    def find_pasteable(self) -> Iterator[int]:
        """The instances that are whole, large enough and not part of another one."""
        for index, (category, mask) in enumerate(zip(self.categories, self.masks)):
            if self.is_clothing and category != "person":
                continue
            left, top, right, bottom = find_box(mask)
            is_inside = top > 1 and left > 1 and right < mask.shape[1] - 1
            if is_inside and mask.mean() > 0.008 and bottom - top > 24 and right - left > 16:
                yield index


class Photographs(Sequence[Photograph]):
    """Photographs, and the instances that can be cut out of them: `pasteable`, pairs (photograph, instance)."""

    def __init__(self, photographs: Sequence[Photograph]):
        self._photographs = list(photographs)
        weights = np.array([photograph.weight for photograph in photographs])
        self.probabilities = weights / weights.sum()
        self.pasteable = [
            (index, instance) for index, photo in enumerate(photographs) for instance in photo.find_pasteable()
        ]

    @classmethod
    def load(cls, folders: Sequence[Path], part: str, progress: bool = True) -> Photographs:
        """
        Load the photographs of a part ("train", "validation" or "test"). Each folder has `instances.json` in COCO's
        layout, and the images next to it or in `images/`.

        Raises:
            ValueError: There is none.
        """
        photographs: list[Photograph] = []
        for folder in folders:
            content = read_json(folder / "instances.json")
            reader = _Reader(content, folder / "images" if (folder / "images").is_dir() else folder)
            images = [image for image in content["images"] if part_of(image["id"]) == part]
            with ThreadPoolExecutor() as pool:
                loaded = pool.map(reader.read, images)
                photographs += tqdm(loaded, total=len(images), desc=folder.name, disable=not progress)
        if not photographs:
            raise ValueError(f"Expected photographs of the part {part!r}, got none in {list(map(str, folders))}.")
        return cls(photographs)

    @property
    def image_ids(self) -> list[int]:
        return [photograph.image_id for photograph in self]

    def __len__(self) -> int:
        return len(self._photographs)

    def __getitem__(self, index):
        return self._photographs[index]


class _Reader:
    """Reads the photographs of an instances file."""

    def __init__(self, content: dict[str, Any], image_dir: Path):
        self.image_dir, self.find_image = image_dir, image_finder(image_dir)
        self.names = {category["id"]: category["name"] for category in content["categories"]}
        self.annotations = defaultdict(list)
        for annotation in content["annotations"]:
            self.annotations[annotation["image_id"]].append(annotation)
        # A source without any instance of a category did not annotate it.
        self.annotated: dict[str, set[str]] = defaultdict(set)
        for image in content["images"]:
            names = {self.names[annotation["category_id"]] for annotation in self.annotations[image["id"]]}
            self.annotated[image.get("source", "")] |= names

    def read(self, image: dict[str, Any]) -> Photograph:
        opened = Image.open(resolve_image(self.find_image(image["file_name"]), self.image_dir))
        pixels = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))  # upright, as its annotation is
        size = pixels.shape[:2]
        packed, categories, crowds = [], [], set()
        for annotation in self.annotations[image["id"]]:
            name = self.names[annotation["category_id"]]
            if annotation.get("not_exhaustive"):
                crowds.add(name)
            mask = decode_mask(segmentation_to_rle(annotation["segmentation"], size))
            if annotation.get("iscrowd") or not mask.any():
                crowds.add(name)  # without a mask, it is somewhere in the image
            else:
                packed.append(np.packbits(mask, axis=1))
                categories.append(name)
        source = image.get("source", "")
        if source == REGIONS_SOURCE:
            crowds |= {name for name in categories if categories.count(name) > 1}
        return Photograph(
            image_id=image["id"],
            image=pixels,
            packed_masks=np.array(packed, np.uint8).reshape(-1, size[0], math.ceil(size[1] / 8)),
            categories=categories,
            crowds=crowds,
            known=frozenset(categories) | crowds if source == PER_IMAGE_SOURCE else frozenset(self.annotated[source]),
            is_clothing=source in PARTS_SOURCES,
            weight=SOURCE_WEIGHTS.get(source, 1.0),
        )


class PhotoScenes:
    """
    Random scenes from photographs. Scene `index` depends on (seed, index) alone.

    Args:
        photographs: Sources of the scenes.
        num_scenes: Number of scenes.
        image_size: Longer side of each scene in pixels.
        seed: Seed of the scenes.
        augment: Whether to change the photographs; `False` gives them as they are, in their order.
        crop: Probability that a part of the photograph is cut out.
        mirror: Probability that the photograph is mirrored.
        paste: Probability that instances of other photographs are pasted in.
    """

    def __init__(
        self,
        photographs: Photographs,
        num_scenes: int,
        image_size: int,
        seed: int = 0,
        augment: bool = True,
        crop: float = 0.75,
        mirror: float = 0.5,
        paste: float = 0.5,
    ):
        self.photographs, self.num_scenes, self.image_size = photographs, num_scenes, image_size
        self.seed, self.augment, self.crop, self.mirror, self.paste = seed, augment, crop, mirror, paste
        # Rare categories are pasted more often than their share.
        self._pasteable_of: dict[str, list[int]] = defaultdict(list)  # category -> numbers in `pasteable`
        for number, (photo, instance) in enumerate(photographs.pasteable):
            self._pasteable_of[photographs[photo].categories[instance]].append(number)
        weights = np.zeros(len(photographs.pasteable))
        for numbers in self._pasteable_of.values():
            weights[numbers] = len(numbers) ** -0.6
        self._paste_probabilities = weights / max(weights.sum(), 1e-9)

    def __len__(self) -> int:
        return self.num_scenes

    def __getitem__(self, index: int) -> PhotoScene:
        return self.draw(index)

    def draw(self, index: int, attempt: int = 0) -> PhotoScene:
        """Draw scene `index`. Another `attempt` draws another scene in its place."""
        if not 0 <= index < self.num_scenes:
            raise IndexError(f"Expected an index below {self.num_scenes}, got {index}.")
        if not self.augment:
            return self._cut((index + attempt) % len(self.photographs), None, False)
        rng = np.random.default_rng((self.seed, index, attempt))
        photo = int(rng.choice(len(self.photographs), p=self.photographs.probabilities))
        scene = self._cut(photo, self._draw_crop(rng, photo), bool(rng.random() < self.mirror))
        image = _change_colors(rng, scene.image)
        if self.photographs.pasteable and rng.random() < self.paste:
            return self._paste(rng, scene, image)
        return replace(scene, image=image)

    def _draw_crop(self, rng: np.random.Generator, photo: int) -> tuple[int, int, int, int]:
        """Draw (top, left, height, width) of a crop, or of the whole photograph."""
        height, width = self.photographs[photo].image.shape[:2]
        if rng.random() >= self.crop:
            return 0, 0, height, width
        scale, stretch = math.exp(rng.uniform(math.log(0.4), 0.0)), math.exp(rng.uniform(-0.25, 0.25))
        crop_height = min(height, max(48, round(height * scale * stretch)))
        crop_width = min(width, max(48, round(width * scale / stretch)))
        top, left = rng.integers(height - crop_height + 1), rng.integers(width - crop_width + 1)
        return int(top), int(left), crop_height, crop_width

    def _cut(self, photo: int, crop: tuple[int, int, int, int] | None, mirror: bool) -> PhotoScene:
        photograph = self.photographs[photo]
        source, masks = photograph.image, photograph.masks
        top, left, height, width = crop or (0, 0, *source.shape[:2])
        scale = self.image_size / max(height, width)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        rows, columns = slice(top, top + height), slice(left, left + width)
        seen = masks[:, rows, columns]
        shares = seen.sum((1, 2)) / masks.sum((1, 2))
        cut = Image.fromarray(source[rows, columns])
        image = np.asarray(cut.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0))
        kept = [index for index in range(len(masks)) if shares[index] > CUT_SHARE]
        resized = [_resize_mask(seen[index], size) for index in kept]
        if mirror:
            image, resized = image[:, ::-1], [mask[:, ::-1] for mask in resized]
        alive = [(index, mask) for index, mask in zip(kept, resized) if mask.any()]
        return PhotoScene(
            image=image,
            masks=np.array([mask for _, mask in alive], bool).reshape(-1, *image.shape[:2]),
            categories=[photograph.categories[index] for index, _ in alive],
            is_clear=[bool(shares[index] >= SEEN_SHARE) for index, _ in alive],
            unclear_categories=set(photograph.crowds),
            known=photograph.known,
            is_clothing=photograph.is_clothing,
        )

    def _paste(self, rng: np.random.Generator, scene: PhotoScene, image: np.ndarray) -> PhotoScene:
        image, masks = image.copy(), list(scene.masks)
        categories, is_clear = list(scene.categories), list(scene.is_clear)
        unclear = set(scene.unclear_categories)
        before = [mask.sum() for mask in masks]
        for _ in range(rng.integers(1, 4)):
            photo, instance = self.photographs.pasteable[self._draw_pasteable(rng, categories)]
            label = self.photographs[photo].categories[instance]
            if label not in scene.known and label not in UNMISTAKABLE:
                continue
            pasted = self._place(rng, photo, instance, image.shape[:2])
            if pasted is None:
                continue
            pixels, where = pasted
            image[where] = pixels[where]
            masks = [mask & ~where for mask in masks] + [where]
            before.append(where.sum())
            categories.append(label)
            is_clear.append(True)
            if label not in scene.known:
                unclear.add(label)  # there may be another one, not annotated
        shares = [mask.sum() / full for mask, full in zip(masks, before)]
        alive = [index for index, share in enumerate(shares) if share > CUT_SHARE]
        return replace(
            scene,
            image=image,
            masks=np.array([masks[index] for index in alive], bool).reshape(-1, *image.shape[:2]),
            categories=[categories[index] for index in alive],
            is_clear=[bool(is_clear[index] and shares[index] >= SEEN_SHARE) for index in alive],
            unclear_categories=unclear,
        )

    def _draw_pasteable(self, rng: np.random.Generator, categories: list[str]) -> int:
        """Draw a number in `pasteable`; about every third time of a category that the scene already has."""
        if categories and rng.random() < 0.35:
            same = self._pasteable_of.get(categories[rng.integers(len(categories))])
            if same:
                return same[rng.integers(len(same))]
        return int(rng.choice(len(self._paste_probabilities), p=self._paste_probabilities))

    def _place(
        self, rng: np.random.Generator, photo: int, instance: int, size: tuple[int, int]
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Place an instance of another photograph on an empty canvas. Returns the canvas and the mask on it."""
        source, mask = self.photographs[photo].image, self.photographs[photo].masks[instance]
        left, top, right, bottom = find_box(mask)
        side = math.exp(rng.uniform(math.log(0.18), math.log(0.75))) * max(size)
        scale = min(side / max(bottom - top, right - left), 1.6 * self.image_size / max(source.shape))
        width, height = round((right - left) * scale), round((bottom - top) * scale)
        if min(width, height) < 4 or width > size[1] or height > size[0]:
            return None
        x, y = int(rng.integers(size[1] - width + 1)), int(rng.integers(size[0] - height + 1))
        cut = Image.fromarray(source[top:bottom, left:right]).resize((width, height), Image.Resampling.BILINEAR)
        pixels = _change_colors(rng, np.asarray(cut))
        small = _resize_mask(mask[top:bottom, left:right], (width, height))
        if rng.random() < 0.5:
            pixels, small = pixels[:, ::-1], small[:, ::-1]
        canvas, where = np.zeros((*size, 3), np.uint8), np.zeros(size, bool)
        canvas[y : y + height, x : x + width], where[y : y + height, x : x + width] = pixels, small
        return (canvas, where) if where.any() else None


def find_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a mask that is not empty. Right and bottom are exclusive."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    grey = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BILINEAR)
    return np.asarray(grey) > 127


def _change_colors(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Change brightness, contrast and saturation, little enough that a colour keeps its name."""
    picture = Image.fromarray(np.ascontiguousarray(image))
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        picture = enhance(picture).enhance(rng.uniform(0.7, 1.3))
    return np.asarray(picture)
