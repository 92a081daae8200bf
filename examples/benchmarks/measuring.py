"""Shared parts of the benchmarks: models and inputs, times, memory, and the machine."""

import contextlib
import copy
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from modeling_restr import ReSTRConfig, ReSTRForImageSegmentation, ReSTRTextConfig, ReSTRVisionConfig


class Row(NamedTuple):
    """A measured value."""

    section: str
    name: str
    value: float
    unit: str = "s"
    floor: float | None = None  # the least that the value can be, in the same unit
    ratio: float | None = None  # to what `ratio_to` names; to the floor, if there is one
    ratio_to: str = "the floor"


def tiny_config(image_size: int = 64, **values: Any) -> ReSTRConfig:
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    return ReSTRConfig(
        vision_config=ReSTRVisionConfig(**sizes, image_size=image_size),
        text_config=ReSTRTextConfig(**sizes, vocab_size=50, projection_dim=32),
        num_attention_heads=2,
        **values,
    )


def list_sizes(vision_config: Any) -> dict[str, Any]:
    """The sizes of a vision encoder, by the names that configs of every ViT share."""
    names = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "image_size",
        "patch_size",
    )
    return {name: getattr(vision_config, name) for name in names}


def create_model(config: Any, device: torch.device, dtype: torch.dtype = torch.float32) -> ReSTRForImageSegmentation:
    """Create a model in evaluation mode with random weights, the same in every call, and with a config of its own."""
    torch.manual_seed(0)
    with device:  # setting a model's attention implementation changes its config
        model: Any = ReSTRForImageSegmentation(copy.deepcopy(config))
    return model.to(dtype).eval()


def create_batch(
    config: Any,
    device: torch.device,
    num_images: int,
    sentences_per_image: int,
    dtype: torch.dtype = torch.float32,
    labels: bool = False,
) -> dict[str, torch.Tensor]:
    """Create random inputs of a model, with masks as labels for training."""
    size, num_words = config.vision_config.image_size, config.text_config.max_position_embeddings
    count = num_images * sentences_per_image
    with device:
        batch = {
            "pixel_values": torch.randn(num_images, 3, size, size, dtype=dtype),
            "input_ids": torch.randint(4, config.text_config.vocab_size, (count, num_words)),
            "image_indices": torch.arange(num_images).repeat_interleave(sentences_per_image),
        }
        if labels:
            batch["labels"] = torch.randint(0, 2, (count, size, size), dtype=torch.uint8)
    return batch


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def time_calls(function: Callable[[], object], device: torch.device, num_calls: int = 1) -> float:
    """Measure seconds per call over `num_calls` calls, with one wait for the device at the end."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(num_calls):
        function()
    synchronize(device)
    return (time.perf_counter() - start) / num_calls


def time_alternately(
    variants: Mapping[str, Callable[[], object]], device: torch.device, runs: int
) -> dict[str, float]:
    """Measure median seconds of each variant over `runs` alternated runs, after one run to warm up."""
    seconds = [{name: time_calls(function, device) for name, function in variants.items()} for _ in range(runs + 1)]
    return {name: statistics.median(times[name] for times in seconds[1:]) for name in variants}


def peak_memory(function: Callable[[], object], device: torch.device) -> float:
    """
    Measure the peak GiB of the device during one call. CPUs and MPS do not report it: there it is the peak of the
    process, with the weights of all variants.
    """
    backend = torch.get_device_module(device)
    if hasattr(backend, "reset_peak_memory_stats"):
        backend.reset_peak_memory_stats(device)
        function()
        return backend.max_memory_allocated(device) / 2**30
    with contextlib.suppress(OSError):  # Linux forgets the earlier peak; elsewhere it is the peak so far
        Path("/proc/self/clear_refs").write_text("5")
    function()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def describe_machine(device: torch.device) -> dict[str, str]:
    """Hardware, versions and date, which belong to every measurement."""
    backend = torch.get_device_module(device)
    return {
        "device": backend.get_device_name(device) if hasattr(backend, "get_device_name") else _describe_cpu(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
    }


def describe_dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _describe_cpu() -> str:
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):  # Linux names the model
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return f"{name} with {torch.get_num_threads()} threads"
