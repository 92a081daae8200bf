"""ReSTR at the paper's size with random weights: answers compared with a bare ViT and a plain ReSTR, training steps."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import ViTConfig, ViTModel

from modeling_restr import ReSTRConfig, ReSTRForImageSegmentation, ReSTRVisionConfig
from modeling_restr.training.recipe import create_optimizer

from .measuring import create_batch, create_model, peak_memory, time_alternately


NUM_EXPRESSIONS = 8


def upsample_then_map(self: Any, projected_vision_embeds, patch_embeds, patch_logits, image_indices) -> torch.Tensor:
    """Decode as the paper draws it: each expression's features are upsampled before each channel map."""
    grid = patch_logits.shape[1:]
    masked = patch_embeds * patch_logits.flatten(1)[..., None]
    hidden_states = torch.cat([projected_vision_embeds[image_indices], masked], dim=2)  # (N, P, 2 * hidden)
    hidden_states = hidden_states.transpose(1, 2).unflatten(2, grid)
    for block, layer in enumerate(self.layers):
        hidden_states = self._upsample(hidden_states, block, grid)
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
def benchmark_inference(dtype: torch.dtype, device: torch.device, image_size: int, runs: int) -> None:
    """Time one sentence and eight, and print how they compare with a bare ViT and with [`StraightforwardReSTR`]."""
    config = ReSTRConfig(vision_config=ReSTRVisionConfig(image_size=image_size))
    model = create_model(config, device, dtype)
    vit = ViTModel(ViTConfig(image_size=image_size), add_pooling_layer=False).eval().to(device, dtype)
    straightforward = StraightforwardReSTR(model)
    batch = create_batch(config, device, 1, NUM_EXPRESSIONS, dtype)
    pixels, words = batch["pixel_values"], batch["input_ids"]

    def single_calls() -> None:
        for index in range(NUM_EXPRESSIONS):
            model(pixel_values=pixels, input_ids=words[index : index + 1])

    variants: dict[str, Callable[[], object]] = {
        "bare ViT-B/16 (sdpa)": lambda: vit(pixel_values=pixels),
        "1 sentence": lambda: model(pixel_values=pixels, input_ids=words[:1]),
        "8 sentences, one call": lambda: model(pixel_values=pixels, input_ids=words),
        "8 sentences, 8 calls": single_calls,
        "1 sentence, straightforward": lambda: straightforward(pixels, words[:1]),
        "8 sentences, straightforward": lambda: straightforward(pixels, words),
    }
    memory = {name: peak_memory(function, device) for name, function in list(variants.items())[:3]}
    medians = time_alternately(variants, device, runs)
    logits = model(pixel_values=pixels, input_ids=words).logits
    difference = (straightforward(pixels, words) - logits).abs().max() / logits.abs().max()

    print(f"\n{str(dtype).removeprefix('torch.')}: medians of {runs} alternated runs")
    for name, value in medians.items():
        peak = f"   peak memory {memory[name]:.2f} GiB" if name in memory else ""
        print(f"  {name:<30} {value * 1000:9.1f} ms{peak}")
    one, eight = medians["1 sentence"], medians["8 sentences, one call"]
    print(f"  1 sentence / bare ViT                          {one / medians['bare ViT-B/16 (sdpa)']:.2f}")
    print(f"  8 sentences, 8 calls / one call                {medians['8 sentences, 8 calls'] / eight:.2f}")
    print(f"  1 sentence, straightforward / ours             {medians['1 sentence, straightforward'] / one:.2f}")
    print(f"  8 sentences, straightforward / ours            {medians['8 sentences, straightforward'] / eight:.2f}")
    print(f"  largest difference of the logits, relative     {difference.item():.1e}")


def benchmark_training(dtype: torch.dtype, device: torch.device, image_size: int, runs: int) -> None:
    """Time forward, backward and optimizer step of the paper's recipe, with weights in float32."""
    config = ReSTRConfig(vision_config=ReSTRVisionConfig(image_size=image_size))
    model = create_model(config, device).train()
    optimizer = create_optimizer(model)

    def step(batch: dict[str, torch.Tensor]) -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            outputs = model(**batch)
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    batches = {k: create_batch(config, device, NUM_EXPRESSIONS // k, k, labels=True) for k in (1, 4, 8)}
    variants = {f"{k} per image": partial(step, batch) for k, batch in batches.items()}
    medians = time_alternately(variants, device, runs)
    print(f"\ntraining, {str(dtype).removeprefix('torch.')}: steps of {NUM_EXPRESSIONS} pairs, medians of {runs} runs")
    for name, value in medians.items():
        milliseconds, ratio = value * 1000, medians["1 per image"] / value
        per_pair = milliseconds / NUM_EXPRESSIONS
        print(f"  {name:<12} {milliseconds:9.1f} ms per step {per_pair:9.1f} ms per pair {ratio:6.2f} x")
