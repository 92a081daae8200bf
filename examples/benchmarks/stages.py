"""
The stages of an answer next to their floors: the time that their arithmetic takes at the rate of a large matrix product,
measured in the same alternated runs.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from .measuring import Row, create_batch, create_model, describe_dtype, time_alternately


MATRIX_SIDE = 2048
NUMBERS_OF_SENTENCES = (1, 8)


@torch.inference_mode()
def measure_stages(config: Any, device: torch.device, dtype: torch.dtype, runs: int) -> list[Row]:
    """Time the encoders, the fusion and the pixel decoder for one image and one or eight sentences."""
    left, right = torch.randn(2, MATRIX_SIDE, MATRIX_SIDE, dtype=dtype, device=device)
    stages = create_stages(config, device, dtype)
    medians = time_alternately({"product": lambda: left @ right, **stages}, device, runs)
    rate = 2 * MATRIX_SIDE**3 / medians.pop("product")
    flops = count_flops(create_stages(config, torch.device("meta"), dtype))
    section = f"stages, {describe_dtype(dtype)}"
    rows = [
        Row(section, f"{name}: {flops[name] / 1e9:.3g} GFLOP", medians[name], floor=flops[name] / rate)
        for name in flops
    ]
    return [Row(section, f"matrix product of {MATRIX_SIDE}x{MATRIX_SIDE}", rate / 1e9, "GFLOP/s"), *rows]


def create_stages(config: Any, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Functions that run a stage each, with the inputs that it gets in the model."""
    model: Any = create_model(config, device, dtype)
    model.set_attn_implementation("eager" if device.type == "meta" else "sdpa")  # meta devices count eager ones
    pixels = create_batch(config, device, 1, 1, dtype)["pixel_values"]
    vision_embeds = model.get_image_features(pixels).pooler_output
    stages: dict[str, Callable[[], Any]] = {"image encoder": lambda: model.get_image_features(pixels)}
    for number in NUMBERS_OF_SENTENCES:
        batch = create_batch(config, device, 1, number, dtype)
        words, indices = batch["input_ids"], batch["image_indices"]
        text_embeds = model.get_text_features(words).pooler_output
        fusion_inputs = (vision_embeds.flatten(1, 2), text_embeds, torch.ones_like(words), indices)
        outputs = model.model(vision_embeds=vision_embeds, input_ids=words)
        decoder_inputs = (outputs.projected_vision_embeds, outputs.patch_embeds, outputs.patch_logits, indices)
        kind = f"{number} sentence{'s' if number > 1 else ''}"
        stages |= {
            f"language encoder, {kind}": partial(model.get_text_features, words),
            f"fusion, {kind}": partial(model.model.fusion, *fusion_inputs),
            f"pixel decoder, {kind}": partial(model.pixel_decoder, *decoder_inputs),
        }
    block, patches = model.model.fusion.layers[0], outputs.projected_vision_embeds

    def project_patches() -> None:
        hidden_states = block.layer_norm1(patches)
        for projection in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj):
            projection(hidden_states)

    return stages | {"projections of the patches in the fusion's first block": project_patches}


def count_flops(stages: dict[str, Callable[[], Any]]) -> dict[str, int]:
    """Count the FLOPs of the matrix products of stages on the meta device, two per multiply-accumulate."""
    flops = {}
    for name, stage in stages.items():
        with FlopCounterMode(display=False) as counter:
            stage()
        flops[name] = counter.get_total_flops()
    return flops
