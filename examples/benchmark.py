"""
Measure ReSTR at the paper's size (ViT-B/16, 480x480, random weights): its answers against what it is made of, and
what a training step of 8 (image, expression) pairs costs with 1, 4 and 8 sentences per image:

    python examples/benchmark.py
    python examples/benchmark.py --what training
    python examples/benchmark.py --what gpu --output_dir runs/gpu

The last is for a GPU, takes four minutes, and writes `gpu.json` and `gpu.md`; `--tiny --device cpu` rehearses it.
All variants run alternately in one process, so that a noisy machine slows all of them alike; medians are compared.
"""

import copy
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from measuring import VOCAB_SIZE, create_model, describe_hardware, measure, peak_memory
from torch import nn
from transformers import ViTConfig, ViTModel

from modeling_restr import ReSTRForImageSegmentation
from modeling_restr.arguments import ArgumentParser, add_options, choose_device
from modeling_restr.training.recipe import create_optimizer


NUM_EXPRESSIONS = 8


def upsample_then_map(self: Any, projected_vision_embeds, patch_embeds, patch_logits, image_indices) -> torch.Tensor:
    """The pixel decoder as the paper draws it: every expression's features upsampled before each channel map."""
    grid = patch_logits.shape[1:]
    masked = patch_embeds * patch_logits.flatten(1)[..., None]
    hidden_states = torch.cat([projected_vision_embeds[image_indices], masked], dim=2)
    hidden_states = hidden_states.transpose(1, 2).unflatten(2, grid)
    for block, layer in enumerate(self.layers):
        hidden_states = self._upsample(hidden_states, block, grid)
        hidden_states = self.activation_fn(F.conv2d(hidden_states, layer.weight[..., None, None]))
    return F.conv2d(hidden_states, self.head.weight[..., None, None]).squeeze(1)  # (N, H, W)


class StraightforwardReSTR(nn.Module):
    """The same weights and numbers: image encoded for every sentence, upsampling first, eager attention."""

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


def create_models(dtype: torch.dtype, device: torch.device, image_size: int) -> tuple[nn.Module, nn.Module, nn.Module]:
    model = create_model(image_size).eval().to(device, dtype)
    vit = ViTModel(ViTConfig(image_size=image_size), add_pooling_layer=False).eval().to(device, dtype)
    return model, vit, StraightforwardReSTR(model)


@torch.inference_mode()
def benchmark(dtype: torch.dtype, device: torch.device, image_size: int, runs: int) -> None:
    torch.manual_seed(0)
    model, vit, straightforward = create_models(dtype, device, image_size)
    pixels = torch.randn(1, 3, image_size, image_size, device=device, dtype=dtype)
    words = torch.randint(4, VOCAB_SIZE, (NUM_EXPRESSIONS, 20), device=device)

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
    medians = measure(variants, device, runs)
    difference = (straightforward(pixels, words) - model(pixel_values=pixels, input_ids=words).logits).abs().max()
    scale = model(pixel_values=pixels, input_ids=words).logits.abs().max()

    print(f"\n{str(dtype).removeprefix('torch.')}: medians of {runs} alternated runs")
    for name, value in medians.items():
        peak = f"   peak memory {memory[name]:.2f} GiB" if name in memory else ""
        print(f"  {name:<30} {value * 1000:9.1f} ms{peak}")
    one, eight = medians["1 sentence"], medians["8 sentences, one call"]
    print(f"  1 sentence / bare ViT                          {one / medians['bare ViT-B/16 (sdpa)']:.2f}")
    print(f"  8 sentences, 8 calls / one call                {medians['8 sentences, 8 calls'] / eight:.2f}")
    print(f"  1 sentence, straightforward / ours             {medians['1 sentence, straightforward'] / one:.2f}")
    print(f"  8 sentences, straightforward / ours            {medians['8 sentences, straightforward'] / eight:.2f}")
    print(f"  largest difference of the logits, relative     {(difference / scale).item():.1e}")


def benchmark_training(dtype: torch.dtype, device: torch.device, image_size: int, runs: int) -> None:
    """Forward, backward and optimizer step of the paper's recipe, float32 weights."""
    torch.manual_seed(0)
    model = create_model(image_size).train().to(device)
    optimizer = create_optimizer(model)
    pixels = torch.randn(NUM_EXPRESSIONS, 3, image_size, image_size, device=device)
    words = torch.randint(4, VOCAB_SIZE, (NUM_EXPRESSIONS, 20), device=device)
    labels = torch.randint(0, 2, (NUM_EXPRESSIONS, image_size, image_size), device=device)

    def step(sentences_per_image: int) -> None:
        num_images = NUM_EXPRESSIONS // sentences_per_image
        indices = torch.arange(num_images, device=device).repeat_interleave(sentences_per_image)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            outputs = model(pixel_values=pixels[:num_images], input_ids=words, image_indices=indices, labels=labels)
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    medians = measure({f"{k} an image": partial(step, k) for k in (1, 4, 8)}, device, runs)
    print(f"\ntraining, {str(dtype).removeprefix('torch.')}: steps of {NUM_EXPRESSIONS} pairs, medians of {runs} runs")
    for name, value in medians.items():
        ratio = medians["1 an image"] / value
        print(
            f"  {name:<12} {value * 1000:9.1f} ms a step {value * 1000 / NUM_EXPRESSIONS:9.1f} ms a pair {ratio:6.2f} x"
        )


def main() -> None:
    parser = ArgumentParser(description="Time ReSTR at the paper's size against a bare ViT and plain ReSTR.")
    parser.add_argument("--what", default="inference", choices=["inference", "training", "gpu"])
    parser.add_argument("--image_size", type=int, default=480)
    parser.add_argument("--runs", type=int, default=5, help="alternated runs of every variant (default: 5)")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    add_options(parser, "device", "num_threads")
    gpu = parser.add_argument_group("--what gpu")
    add_options(gpu, output_dir={"default": Path("runs/gpu"), "help": "for gpu.json and gpu.md (default: runs/gpu)"})
    gpu.add_argument("--time_limit", type=float, default=220, help="seconds, without the imports (default: 220)")
    gpu.add_argument("--tiny", action="store_true", help="a tiny model, measured for an instant: a rehearsal")
    gpu.add_argument("--compile_backend", default="inductor", help="of torch.compile (default: inductor)")
    args = parser.parse_args()
    try:
        device = choose_device(args)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    if args.what == "gpu":
        from benchmark_gpu import benchmark_gpu

        failures = benchmark_gpu(device, args.output_dir, args.time_limit, args.tiny, args.compile_backend)
        sys.exit("\n".join(failures) or None)
    now = datetime.now(UTC)
    print(
        f"{describe_hardware(device)}; torch {torch.__version__}, transformers {transformers.__version__}; {now:%Y-%m-%d}"
    )
    for dtype in args.dtypes:
        function = benchmark if args.what == "inference" else benchmark_training
        function(getattr(torch, dtype), device, args.image_size, args.runs)


if __name__ == "__main__":
    main()
