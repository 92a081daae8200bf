"""A few photographs in COCO's layout, for tests of scenes and training. Each pixel encodes its position."""

import json
from pathlib import Path

import numpy as np
from coco_annotations import compress
from PIL import Image


CATEGORIES = ["person", "dog", "elephant", "skirt"]
COLORS = {"person": (30, 60, 220), "dog": (120, 70, 30), "elephant": (128, 128, 128), "skirt": (220, 20, 30)}


def write_photographs(
    folder: Path, number: int = 12, size: tuple[int, int] = (96, 128), colored: bool = False
) -> Path:
    """
    Write `instances.json` and `images/`. Pixel (row, column) of photograph i is (column, row, 10 * i), or with
    `colored` the colour of its category, on green. Photograph i has 2 or 3 boxes. Its id is i + 1, so the tenth is
    held out.
    """
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    height, width = size
    for index in range(number):
        rng = np.random.default_rng(index)
        rows, columns = np.mgrid[:height, :width]
        pixels = np.stack([columns, rows, np.full(size, 10 * index)], axis=2).astype(np.uint8)
        if colored:
            pixels[:] = (20, 120, 40)
        name = f"photo{index}.png"
        for number_of_box in range(2 + index % 2):
            category = CATEGORIES[(index + (number_of_box == 2)) % 3]
            x, y = 6 + 40 * number_of_box, int(rng.integers(8, 40))
            mask = np.zeros(size, np.uint8)
            mask[y : y + 36 + 6 * number_of_box, x : x + 26] = 1
            if colored:
                pixels[mask > 0] = COLORS[category]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": CATEGORIES.index(category) + 1,
                    "segmentation": compress(mask),
                    "iscrowd": 0,
                }
            )
        Image.fromarray(pixels).save(folder / "images" / name)
        credit = {"license": "Attribution License", "flickr_url": f"https://example.org/{index}"}
        images.append({"id": index + 1, "file_name": name, "height": height, "width": width, **credit})
    categories = [{"id": number, "name": name} for number, name in enumerate(CATEGORIES, start=1)]
    path = folder / "instances.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path
