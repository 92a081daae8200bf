"""CLIPSeg of transformers, with the same vision encoder and random weights, next to ReSTR at CLIPSeg's image size."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import CLIPSegConfig, CLIPSegForImageSegmentation

from .measuring import Row, create_batch, create_model, describe_dtype, list_sizes, time_alternately


IMAGE_SIZE = 352
NUMBERS_OF_SENTENCES = (1, 8, 32)


@torch.inference_mode()
def measure_clipseg(config: Any, device: torch.device, dtype: torch.dtype, runs: int) -> list[Row]:
    """Time answers about one image for 1, 8 and 32 sentences. CLIPSeg takes the image once per sentence."""
    config = copy.deepcopy(config)
    config.vision_config.image_size = min(IMAGE_SIZE, config.vision_config.image_size)
    model, clipseg = create_model(config, device, dtype), create_clipseg(config.vision_config, device, dtype)
    variants: dict[str, Callable[[], object]] = {}
    for number in NUMBERS_OF_SENTENCES:
        batch = create_batch(config, device, 1, number, dtype)
        pixels, words = batch["pixel_values"], batch["input_ids"]
        kind = f"{number} sentence{'s' if number > 1 else ''}"
        inputs = {"pixel_values": pixels.expand(number, -1, -1, -1), "input_ids": words}
        variants[f"CLIPSeg, {kind}"] = partial(clipseg, **inputs)
        variants[f"ReSTR, {kind}"] = partial(model, pixel_values=pixels, input_ids=words)
    medians = time_alternately(variants, device, runs)
    section = f"CLIPSeg (ViT-B/16) and ReSTR at {config.vision_config.image_size} pixels, {describe_dtype(dtype)}"
    rows = []
    for name, seconds in medians.items():
        ours = name.replace("CLIPSeg", "ReSTR")
        ratio = seconds / medians[ours] if ours != name else None
        rows.append(Row(section, name, seconds, ratio=ratio, ratio_to=ours))
    return rows


def create_clipseg(vision_config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Create a CLIPSeg like clipseg-rd64-refined, but with this vision encoder, in evaluation mode."""
    depth = vision_config.num_hidden_layers
    config = CLIPSegConfig(
        vision_config=list_sizes(vision_config),
        text_config={"num_hidden_layers": depth},
        extract_layers=[depth * quarter // 4 for quarter in (1, 2, 3)],
        use_complex_transposed_convolution=True,
    )
    with device:
        model: Any = CLIPSegForImageSegmentation(config)
    return model.to(dtype).eval()
