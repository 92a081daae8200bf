"""The contact sheet of an evaluation: its best, median and worst masks."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import datasets
from PIL import Image

from ..data.canonical import decode_mask
from ..visualization import TILES_PER_ROW, arrange_in_grid, draw_tile
from .counts import predict_masks


def draw_contact_sheet(
    model: Any, processor: Any, dataset: datasets.Dataset, records: Sequence[tuple[int, dict]], threshold: float = 0.5
) -> Image.Image:
    """
    One row each of the best, median and worst masks, with the ground truth in one colour and the prediction in another.

    Args:
        model: The evaluated [`ReSTRForImageSegmentation`].
        processor: Its [`ReSTRProcessor`].
        dataset: The evaluated dataset.
        records: For each expression the index of its row in the dataset and its record of `evaluate_dataset`.
        threshold: Probability above which a pixel is in the mask.
    """
    examples = choose_examples(records)
    tiles = []
    for name, chosen in examples.items():
        for index, record in chosen:
            row = dataset[index]
            target = next(r["mask"] for r in row["references"] if r["ref_id"] == record["ref_id"])
            (result,) = predict_masks(model, processor, row["image"], [record["text"]], threshold=threshold)
            masks = [decode_mask(target), result["mask"].cpu().numpy()]
            labels = [f"{record['text']} (ground truth)", f"prediction, {name}: IoU {_iou(record):.2f}"]
            tiles.append(draw_tile(row["image"], masks, labels))
    return arrange_in_grid(tiles, columns=len(examples["best"]))


def choose_examples(
    records: Sequence[tuple[int, dict]], number: int = TILES_PER_ROW
) -> dict[str, list[tuple[int, dict]]]:
    """The `number` best, median and worst of (row, record), from different images as far as possible."""
    ordered = sorted(records, key=lambda item: (-_iou(item[1]), item[1]["image_id"], item[1]["sent_id"]))
    from_the_middle = sorted(range(len(ordered)), key=lambda position: abs(2 * position - len(ordered) + 1))
    ranked = {"best": ordered, "median": [ordered[position] for position in from_the_middle], "worst": ordered[::-1]}
    number = min(number, -(-len(ordered) // 3))
    return {name: _spread_over_images(items)[:number] for name, items in ranked.items()}


def _spread_over_images(items: Sequence[tuple[int, dict]]) -> list[tuple[int, dict]]:
    """The first of each image, then the second of each, and so on."""
    seen: Counter[int] = Counter()
    rounds = []
    for index, _ in items:
        rounds.append(seen[index])
        seen[index] += 1
    return [item for _, item in sorted(zip(rounds, items), key=lambda pair: pair[0])]


def _iou(record: dict[str, Any]) -> float:
    return record["intersection"] / record["union"] if record["union"] else 1.0


__all__ = ["choose_examples", "draw_contact_sheet"]
