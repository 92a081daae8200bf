"""Small annotated images for tests of data preparation. They are noise, so that no two files are equal."""

from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from modeling_restr.data.canonical import AnnotatedImage, AnnotatedReference, decode_mask


TWO_BOXES = [[2, 1, 12, 1, 12, 9, 2, 9], [20, 10, 30, 10, 30, 20, 20, 20]]  # polygons of 10 x 8 and 10 x 10 pixels


def coco_name(image_id: int) -> str:
    return f"COCO_train2014_{image_id:012d}.jpg"


def write_photo(path: Path, seed: int, size: tuple[int, int] = (40, 50)) -> Path:
    """A file of `size` (height, width)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    return path


def make_image(folder: Path, image_id: int, name: str | None = None, first_id: int = 0) -> AnnotatedImage:
    """Two references: one to two boxes with two expressions, one to nothing. The size depends on the id."""
    name = name or coco_name(image_id)
    size = (40 + image_id % 7, 50)
    path = folder / name if (folder / name).exists() else write_photo(folder / name, image_id, size)
    ref_id = first_id + 2 * image_id
    return AnnotatedImage(
        image_id,
        name,
        path,
        (
            AnnotatedReference(ref_id, image_id, "dog", TWO_BOXES, ((2 * ref_id, "two"), (2 * ref_id + 1, "boxes"))),
            AnnotatedReference(ref_id + 1, -1, "", [], ((2 * ref_id + 2, "nothing"),)),
        ),
        size,
    )


def make_images(folder: Path, image_ids) -> list[AnnotatedImage]:
    return [make_image(folder, image_id) for image_id in image_ids]


def read_rows(folder: Path, split: str, cache: Path) -> list[dict]:
    """The rows as a user loads them. Checks that each mask has the size of its decoded image."""
    rows = list(datasets.load_dataset(str(folder), split=split, cache_dir=str(cache)))
    for row in rows:
        height, width = np.asarray(row["image"]).shape[:2]
        for reference in row["references"]:
            assert reference["mask"]["size"] == [height, width]
            assert decode_mask(reference["mask"]).shape == (height, width)
    return rows
