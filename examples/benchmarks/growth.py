"""Time and peak memory of answers as sentences, image size and batch grow."""

import copy
from typing import Any

import torch
from transformers import BatchFeature

from modeling_restr import ReSTRImageProcessor, ReSTRProcessor, build_tokenizer
from modeling_restr.evaluation.counts import predict_batch
from modeling_restr.tokenization_restr import vocabulary_from_expressions

from .measuring import Row, create_batch, create_model, describe_dtype, peak_memory, time_calls


# Side of the image for a model of 480 pixels, images, sentences per image.
CELLS = (
    (224, 1, 1),
    (224, 1, 32),
    (224, 1, 256),
    (480, 1, 1),
    (480, 1, 32),
    (960, 1, 1),
    (224, 16, 1),
    (480, 16, 1),
)


def measure_growth(config: Any, device: torch.device, dtype: torch.dtype, runs: int) -> list[Row]:
    """Measure each cell once, whatever `runs` is: they take long."""
    section, rows = f"growth, {describe_dtype(dtype)}", []
    for side, num_images, num_sentences in CELLS:
        resized, patch_size = copy.deepcopy(config), config.vision_config.patch_size
        side = side * config.vision_config.image_size // 480 // patch_size * patch_size
        resized.vision_config.image_size = side
        seconds, peak = measure_cell(resized, device, dtype, num_images, num_sentences)
        name = f"{side}x{side} pixels, images: {num_images}, sentences per image: {num_sentences}"
        rows += [Row(section, name, seconds), Row(section, f"{name}: peak memory of the process", peak, "GiB")]
    return rows


def measure_cell(
    config: Any, device: torch.device, dtype: torch.dtype, num_images: int, num_sentences: int
) -> tuple[float, float]:
    """Measure seconds and peak memory in GiB, after an answer about one sentence to warm up."""
    model = create_model(config, device, dtype)
    answer(model, 1, 1)
    seconds: list[float] = []

    def run() -> None:
        seconds.append(time_calls(lambda: answer(model, num_images, num_sentences), device))

    peak = peak_memory(run, device)
    return seconds[0], peak


def answer(model: Any, num_images: int, num_sentences: int) -> None:
    """Answer as `restr evaluate` does: each image encoded once, 16 sentences at a time, one mask after the other."""
    config: Any = model.config
    batch = create_batch(config, torch.device("cpu"), num_images, num_sentences)
    side = config.vision_config.image_size
    processor = ReSTRProcessor(ReSTRImageProcessor(), build_tokenizer(vocabulary_from_expressions(["a"])))
    inputs = BatchFeature(
        {
            **batch,
            "attention_mask": torch.ones_like(batch["input_ids"]),
            "original_sizes": torch.tensor([[side, side]] * num_images),
        }
    )
    for _ in predict_batch(model, processor, inputs):
        pass
