"""Small COCO annotations for tests of their readers."""

import numpy as np
from pictures import make_exif
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask


HEIGHT, WIDTH = 96, 128
CATEGORIES = {1: "chair", 2: "Wine_Glass", 3: "glass", 4: "dog", 5: "hot dog", 6: "zebra"}


def draw(shape, box):
    mask = Image.new("L", (WIDTH, HEIGHT))
    getattr(ImageDraw.Draw(mask), shape)(box, fill=1)
    return np.asarray(mask, dtype=bool)


def compress(mask):
    """COCO's compressed RLE, as pycocotools writes it."""
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def run_lengths(mask):
    """COCO's uncompressed RLE by its definition: run lengths in column order, starting outside of the mask."""
    pixels = mask.flatten(order="F")
    starts = np.flatnonzero(np.diff(pixels)) + 1
    counts = np.diff([0, *starts, pixels.size]).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if pixels[0] else counts}


def annotate(number, image_id, mask, category_id=1, iscrowd=0):
    rle = compress(mask)
    fields = {"id": number, "image_id": image_id, "category_id": category_id, "iscrowd": iscrowd}
    return fields | {"segmentation": rle, "bbox": coco_mask.toBbox(rle).tolist(), "area": float(mask.sum())}


def ids_of(images):
    return [reference.ann_id for image in images for reference in image.references]


def texts_of(images):
    return [text for image in images for reference in image.references for _, text in reference.expressions]


LEFT, RIGHT, TINY = (draw("rectangle", corners) for corners in ([10, 30, 40, 60], [90, 30, 120, 60], [60, 5, 61, 6]))
LEFT_OUTLINE = [10, 30, 41, 30, 41, 61, 10, 61]  # of the pixels of LEFT


def save_image(path, size=(WIDTH, HEIGHT), orientation=None):
    """Write a file with the stored `size` (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "teal").save(path, exif=make_exif(orientation))
