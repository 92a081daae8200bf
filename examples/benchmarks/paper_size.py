"""ReSTR at the paper's size with random weights: answers compared with a bare ViT and a plain ReSTR, training steps."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import ViTConfig, ViTModel

from modeling_restr import ReSTRForImageSegmentation
from modeling_restr.training.recipe import create_optimizer

from .measuring import Row, create_batch, create_model, describe_dtype, list_sizes, time_alternately


NUM_EXPRESSIONS = 8


def upsample_then_map(self: Any, projected_vision_embeds, patch_embeds, patch_logits, image_indices) -> torch.Tensor:
    """Decode as the paper draws it: each expression's features are upsampled before each channel map."""
    last_size = [side * patch for side, patch in zip(patch_logits.shape[1:], self.patch_size)]
    masked = patch_embeds * patch_logits.flatten(1)[..., None]
    hidden_states = torch.cat([projected_vision_embeds[image_indices], masked], dim=2)  # (N, P, 2 * hidden)
    hidden_states = hidden_states.transpose(1, 2).unflatten(2, patch_logits.shape[1:])
    for layer in self.layers:
        size = last_size if layer is self.layers[-1] else [2 * side for side in hidden_states.shape[2:]]
        hidden_states = F.interpolate(hidden_states, size=size, mode="bilinear", align_corners=True)
        hidden_states = self.activation_fn(F.conv2d(hidden_states, layer.weight[..., None, None]))
    return F.conv2d(hidden_states, self.head.weight[..., None, None]).squeeze(1)  # (N, H, W)


class StraightforwardReSTR(nn.Module):
    """A ReSTR as it is usually written: the image encoded for each sentence, upsampling first, eager attention."""

    def __init__(self, model: ReSTRForImageSegmentation):
        super().__init__()
        config = copy.deepcopy(model.config)  # it keeps the attention implementation
        self.model = ReSTRForImageSegmentation._from_config(config, attn_implementation="eager").eval()
        self.model.to(device=model.device, dtype=model.dtype).load_state_dict(model.state_dict())
        decoder = self.model.pixel_decoder
        decoder.forward = upsample_then_map.__get__(decoder)

    def forward(self, pixel_values: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        logits = [self.model(pixel_values=pixel_values, input_ids=words[None]).logits for words in input_ids]
        return torch.cat(logits)


@torch.inference_mode()
def measure_answers(config: Any, device: torch.device, dtype: torch.dtype, runs: int) -> list[Row]:
    """Time one sentence and eight, next to a bare ViT of the same size and to [`StraightforwardReSTR`]."""
    model = create_model(config, device, dtype)
    vit_config = ViTConfig(**list_sizes(config.vision_config))
    vit = ViTModel(vit_config, add_pooling_layer=False).eval().to(device, dtype)
    straightforward = StraightforwardReSTR(model)
    batch = create_batch(config, device, 1, NUM_EXPRESSIONS, dtype)
    pixels, words = batch["pixel_values"], batch["input_ids"]

    def single_calls() -> None:
        for index in range(NUM_EXPRESSIONS):
            model(pixel_values=pixels, input_ids=words[index : index + 1])

    variants: dict[str, Callable[[], object]] = {
        "bare ViT": lambda: vit(pixel_values=pixels),
        "1 sentence": lambda: model(pixel_values=pixels, input_ids=words[:1]),
        "8 sentences, one call": lambda: model(pixel_values=pixels, input_ids=words),
        "8 sentences, 8 calls": single_calls,
        "1 sentence, straightforward": lambda: straightforward(pixels, words[:1]),
        "8 sentences, straightforward": lambda: straightforward(pixels, words),
    }
    baselines = {
        "1 sentence": "bare ViT",
        "8 sentences, 8 calls": "8 sentences, one call",
        "1 sentence, straightforward": "1 sentence",
        "8 sentences, straightforward": "8 sentences, one call",
    }
    medians = time_alternately(variants, device, runs)
    section, rows = f"answers, {describe_dtype(dtype)}", []
    for name, seconds in medians.items():
        baseline = baselines.get(name, "")
        ratio = seconds / medians[baseline] if baseline else None
        rows.append(Row(section, name, seconds, ratio=ratio, ratio_to=baseline))
    logits = model(pixel_values=pixels, input_ids=words).logits
    difference = (straightforward(pixels, words) - logits).abs().max() / logits.abs().max()
    rows.append(Row(section, "difference of the straightforward logits", difference.item(), "of the largest logit"))
    return rows


def measure_training(config: Any, device: torch.device, dtype: torch.dtype, runs: int) -> list[Row]:
    """Time forward, backward and optimizer step of the paper's recipe, with weights in float32."""
    model = create_model(config, device).train()
    optimizer = create_optimizer(model)

    def step(batch: dict[str, torch.Tensor]) -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            outputs = model(**batch)
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    batches = {k: create_batch(config, device, NUM_EXPRESSIONS // k, k, labels=True) for k in (1, 4, 8)}
    variants = {f"{NUM_EXPRESSIONS} pairs, {k} per image": partial(step, batch) for k, batch in batches.items()}
    medians = time_alternately(variants, device, runs)
    first, section = next(iter(medians)), f"training step, {describe_dtype(dtype)}"
    return [
        Row(section, name, seconds, ratio=seconds / medians[first], ratio_to=first)
        for name, seconds in medians.items()
    ]
