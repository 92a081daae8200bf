"""What the benchmarks measure with, and the model at the paper's size that they measure."""

import contextlib
import platform
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from modeling_restr import ReSTRConfig, ReSTRForImageSegmentation, ReSTRTextConfig, ReSTRVisionConfig


VOCAB_SIZE = 12112


def create_model(image_size: int) -> ReSTRForImageSegmentation:
    config = ReSTRConfig(
        vision_config=ReSTRVisionConfig(image_size=image_size), text_config=ReSTRTextConfig(vocab_size=VOCAB_SIZE)
    )
    return ReSTRForImageSegmentation(config)


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def measure(variants: dict[str, Callable[[], object]], device: torch.device, runs: int) -> dict[str, float]:
    """Median seconds of each variant over `runs` alternated runs, after one run that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for run in range(runs + 1):
        for name, function in variants.items():
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            if run > 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_memory(function: Callable[[], object], device: torch.device) -> float:
    """
    Peak GiB of the device during one call; where it counts none, as on a CPU and MPS, that of the process, weights of
    all variants included.
    """
    backend = torch.get_device_module(device)
    if hasattr(backend, "reset_peak_memory_stats"):
        backend.reset_peak_memory_stats(device)
        function()
        return backend.max_memory_allocated(device) / 2**30
    with contextlib.suppress(OSError):  # on Linux the peak starts again, elsewhere it is the peak so far
        Path("/proc/self/clear_refs").write_text("5")
    function()
    try:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**20
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def describe_hardware(device: torch.device) -> str:
    backend = torch.get_device_module(device)
    if hasattr(backend, "get_device_name"):
        return backend.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            name = next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {torch.get_num_threads()} threads"
