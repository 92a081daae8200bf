"""A panel of validation images with the masks that the model finds at the moment: progress that can be seen."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..visualization import add_legend, arrange_in_grid, draw_masks


MAX_SENTENCES = 3  # per image
TILE_SIZE = 320  # pixels, the longer side of an image in the panel
TILES_PER_ROW = 4


@torch.no_grad()
def draw_overlays(model: Any, processor: Any, rows: Iterable[Mapping[str, Any]]) -> Image.Image | None:
    """
    One tile per image: the masks of its first few sentences, about different objects as far as there are any. None
    where no image has a sentence.

    Args:
        model: Called once per image, so that it may be a wrapped one; in evaluation mode.
        processor: Its [`ReSTRProcessor`].
        rows: Of a dataset in the canonical form; those without sentences are left out.
    """
    device = next(model.parameters()).device
    tiles = []
    for row in rows:
        texts = choose_sentences(row)
        if not texts:
            continue
        inputs = processor(images=row["image"], text=texts, return_tensors="pt").to(device)
        sizes = inputs.pop("original_sizes")[inputs["image_indices"].cpu()]
        results = processor.post_process_referring_segmentation(model(**inputs), sizes)
        masks = [Image.fromarray(result["mask"].cpu().numpy()) for result in results]
        tiles.append(_draw_tile(row["image"], masks, [f"{t} ({r['score']:.2f})" for t, r in zip(texts, results)]))
    return arrange_in_grid(tiles, TILES_PER_ROW) if tiles else None


def choose_sentences(row: Mapping[str, Any]) -> list[str]:
    """The first sentence of each reference, then the second of each, and so on, until there are enough."""
    sentences = [
        (place, number, expression["text"])
        for number, reference in enumerate(row["references"])
        for place, expression in enumerate(reference["expressions"])
    ]
    return [text for *_, text in sorted(sentences)[:MAX_SENTENCES]]


def _draw_tile(image: Image.Image, masks: list[Image.Image], labels: list[str]) -> Image.Image:
    size = tuple(
        np.maximum(1, np.round(np.array(masks[0].size) * TILE_SIZE / max(masks[0].size))).astype(int).tolist()
    )
    small = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    return add_legend(draw_masks(small, [mask.resize(size, Image.Resampling.NEAREST) for mask in masks]), labels)


__all__ = ["choose_sentences", "draw_overlays"]
