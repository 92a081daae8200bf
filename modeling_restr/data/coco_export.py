"""Predicted masks as a COCO instances file, which pycocotools, CVAT, Label Studio and FiftyOne read."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from .segmentation import decode_mask


CATEGORY = {"id": 1, "name": "object", "supercategory": ""}


def build_instances(results: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """
    Build the content of an instances file: one annotation per mask, with the sentence as `caption`, and the `score`.

    Masks become polygons along the edges of the pixels, the one form that all these tools read. pycocotools converts
    them back to the same masks. Results without a mask, or with an empty one, are left out.

    Args:
        results: Dicts with `row` (the image's number), `file_name`, `text`, `score` and `mask` (COCO RLE, or None).
    """
    images: dict[int, dict[str, Any]] = {}
    annotations: list[dict[str, Any]] = []
    for result in results:
        if result["mask"] is None:
            continue
        height, width = result["mask"]["size"]
        number = result["row"] + 1
        name = result["file_name"] or f"{number:012d}"
        images.setdefault(number, {"id": number, "file_name": name, "height": height, "width": width})
        polygons = mask_to_polygons(decode_mask(result["mask"]))
        if polygons:
            annotation = {"id": len(annotations) + 1, "image_id": number, "category_id": CATEGORY["id"]}
            annotation |= {"segmentation": polygons, "iscrowd": 0, "area": float(coco_mask.area(result["mask"]))}
            annotation |= {"bbox": coco_mask.toBbox(result["mask"]).tolist(), "score": result["score"]}
            # CVAT reads fields that are not part of the format from `attributes`.
            annotations.append(annotation | {"caption": result["text"], "attributes": {"caption": result["text"]}})
    return {
        "info": {},
        "licenses": [],
        "categories": [CATEGORY],
        "images": [*images.values()],
        "annotations": annotations,
    }


def mask_to_polygons(mask: np.ndarray, first_column: int = 0) -> list[list[int]]:
    """
    Trace the outlines of a mask (height, width) along the edges of its pixels, each as [x0, y0, x1, y1, ...].

    A polygon cannot have a hole: a mask with holes is cut from top to bottom through each of them.

    Args:
        first_column: Offset that is added to each x.
    """
    loops = _trace_edges(mask)
    holes = [loop for loop in loops if _signed_area(loop) < 0]
    if holes:
        parts = np.split(mask, _place_cuts(holes), axis=1)
        starts = np.cumsum([first_column, *(part.shape[1] for part in parts)])
        return [polygon for part, start in zip(parts, starts) for polygon in mask_to_polygons(part, int(start))]
    return [[number for x, y in loop for number in (x + first_column, y)] for loop in loops]


def _place_cuts(holes: Iterable[list[tuple[int, int]]]) -> list[int]:
    """As few columns as possible so that each hole has one, in the middle of the holes that share it."""
    spans = sorted((max(x for x, _ in hole), min(x for x, _ in hole)) for hole in holes)
    shared = [spans[0]]  # (right, left) columns that a group of holes has in common
    for right, left in spans[1:]:
        common_right, common_left = shared[-1]
        if left > common_right:
            shared.append((right, left))
        else:
            shared[-1] = (common_right, max(common_left, left))
    return [(left + right + 1) // 2 for right, left in shared]


def _trace_edges(mask: np.ndarray) -> list[list[tuple[int, int]]]:
    """Closed loops of the corners (x, y) between inside and outside, clockwise on the screen, holes the other way."""
    inside = np.pad(mask.astype(bool), 1)
    core = inside[1:-1, 1:-1]
    steps: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)  # from a corner to the next ones
    # Outside neighbour, and the edge of the pixel (x, y) towards it: first corner and direction.
    sides = (
        (inside[:-2, 1:-1], (0, 0), (1, 0)),
        (inside[1:-1, 2:], (1, 0), (0, 1)),
        (inside[2:, 1:-1], (1, 1), (-1, 0)),
        (inside[1:-1, :-2], (0, 1), (0, -1)),
    )
    for neighbour, (left, top), direction in sides:
        for y, x in np.argwhere(core & ~neighbour).tolist():
            steps[x + left, y + top].append(direction)
    loops = []
    while steps:
        loops.append(_follow(steps))
    return loops


def _follow(steps: dict[tuple[int, int], list[tuple[int, int]]]) -> list[tuple[int, int]]:
    """Take one loop out of `steps`; only its corners are returned, not the points along straight edges."""
    start = corner = next(iter(steps))
    direction, loop = (0, 0), []
    while True:
        onward = steps[corner]
        right = _turn_right(direction)
        step = right if right in onward else onward[0]  # around the same pixel where two touch at a corner
        onward.remove(step)
        if not onward:
            del steps[corner]
        if step != direction:
            loop.append(corner)
        corner, direction = (corner[0] + step[0], corner[1] + step[1]), step
        if corner == start and _turn_right(direction) not in steps.get(start, ()):
            return loop


def _turn_right(direction: tuple[int, int]) -> tuple[int, int]:
    return -direction[1], direction[0]


def _signed_area(loop: list[tuple[int, int]]) -> float:
    """In pixels (the shoelace formula); positive for loops that are clockwise on the screen, where y points down."""
    x, y = np.array(loop, dtype=np.int64).T
    return float(np.dot(x, np.roll(y, -1)) - np.dot(np.roll(x, -1), y)) / 2
