"""Validation during a run: pixel counts that can be gathered, metrics, and a panel of images with the model's masks."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import PartialState
from PIL import Image

from ..metrics import ReferringIoU
from ..visualization import TILES_PER_ROW, arrange_in_grid, draw_tile, save_image


PADDING = -100  # fills the places of expressions that an image does not have
MAX_SENTENCES = 3  # per image of the panel


def count_pixels(
    logits: torch.Tensor, labels: torch.Tensor, image_indices: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Count the pixels in the intersection and in the union of predicted (logit > 0) and true masks.

    Args:
        logits: Logits (N, h, w). They are resized if they are coarser than the labels.
        labels: Masks (N, height, width) of 0 and 1.
        image_indices: Image of each expression, (N,), in ascending order. With it, the counts have one row per image.

    Returns:
        Counts (N, 2), or with `image_indices` (images, largest number of expressions, 2), padded with -100. Tools that
        gather results expect one row per item of the dataset: an expression, or an image with its expressions.
    """
    if logits.shape != labels.shape:
        logits = F.interpolate(logits[:, None].float(), labels.shape[1:], mode="bilinear", align_corners=False)[:, 0]
    predicted, target = logits > 0, labels > 0
    counts = torch.stack([(predicted & target).sum((1, 2)), (predicted | target).sum((1, 2))], dim=1)  # (N, 2)
    if image_indices is None:
        return counts
    num_expressions = torch.bincount(image_indices)  # (images,)
    first = num_expressions.cumsum(0) - num_expressions
    places = torch.arange(len(counts), device=counts.device) - first[image_indices]  # (N,) within the image
    result = counts.new_full((len(num_expressions), int(num_expressions.max()), 2), PADDING)
    result[image_indices, places] = counts
    return result


def compute_metrics(counts: np.ndarray | torch.Tensor) -> dict[str, float]:
    """Compute the metrics of [`ReferringIoU`] over all expressions, from counts (..., 2) of [`count_pixels`]."""
    pairs = np.asarray(counts).reshape(-1, 2)
    predictions = [{"intersection": int(i), "union": int(u)} for i, u in pairs if i != PADDING]
    return ReferringIoU(keep_in_memory=True).compute(predictions=predictions)


def show_panel(
    model: Any,
    processor: Any,
    rows: Iterable[Mapping[str, Any]],
    output_dir: str | Path,
    step: int,
    tensorboard_writers: Iterable[Any] = (),
    with_trackio: bool = False,
) -> None:
    """
    Save the panel of [`draw_panel`] as OUTPUT_DIR/overlays/step-STEP.png and send it to trackers as "eval/overlays". All
    processes call this; only the main one has writers and uses them.
    """
    panel = draw_panel(model, processor, rows)
    if panel is None or not PartialState().is_main_process:
        return
    save_image(panel, Path(output_dir) / "overlays" / f"step-{step:07d}.png")
    for writer in tensorboard_writers:
        writer.add_image("eval/overlays", np.asarray(panel), step, dataformats="HWC")
        writer.flush()
    if with_trackio:
        import trackio

        trackio.log({"eval/overlays": trackio.Image(panel)}, step=step)


@torch.no_grad()
def draw_panel(model: Any, processor: Any, rows: Iterable[Mapping[str, Any]]) -> Image.Image | None:
    """
    Draw one tile per image with the masks of its first few sentences. None if no image has a sentence.

    Args:
        model: Model in evaluation mode. It is called once per image, so it may be a wrapped model.
        processor: Its [`ReSTRProcessor`].
        rows: Rows of a dataset in the canonical form. Those without sentences are skipped.
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
        masks = [result["mask"].cpu().numpy() for result in results]
        labels = [f"{text} ({result['score']:.2f})" for text, result in zip(texts, results)]
        tiles.append(draw_tile(row["image"], masks, labels))
    return arrange_in_grid(tiles, TILES_PER_ROW) if tiles else None


def choose_sentences(row: Mapping[str, Any]) -> list[str]:
    """The first sentence of each reference, then the second of each, and so on, up to `MAX_SENTENCES`."""
    sentences = [
        (place, number, expression["text"])
        for number, reference in enumerate(row["references"])
        for place, expression in enumerate(reference["expressions"])
    ]
    return [text for *_, text in sorted(sentences)[:MAX_SENTENCES]]
