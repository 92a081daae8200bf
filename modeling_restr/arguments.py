"""Options that mean the same in every command of this project."""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch


class ArgumentParser(argparse.ArgumentParser):
    """Takes `--output-dir` for `--output_dir`, too, as transformers' HfArgumentParser does."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        words = sys.argv[1:] if args is None else [*args]
        end = words.index("--") if "--" in words else len(words)
        return super().parse_known_args([*map(_with_underscores, words[:end]), *words[end:]], namespace)


def _with_underscores(word: str) -> str:
    return re.sub("^--[^=]+", lambda name: "--" + name[0][2:].replace("-", "_"), word)


def positive_int(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {number}")
    return number


def any_device(text: str) -> torch.device:
    try:
        return torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"expected a device such as cpu, cuda:0, mps or xpu, got {text!r}") from None


_OPTIONS: dict[str, dict[str, Any]] = {
    "output_dir": {"type": Path, "help": "folder to write to"},
    "revision": {"help": "branch, tag or commit of the model on the Hub (default: main)"},
    "data_revision": {"help": "branch, tag or commit of the data on the Hub (default: main)"},
    "device": {
        "type": any_device,
        "help": "such as cpu, cuda:0, mps or xpu (default: an accelerator if there is one)",
    },
    "num_threads": {
        "type": positive_int,
        "metavar": "N",
        "help": "CPU threads of a process that PyTorch computes with (default: its own choice)",
    },
    "dtype": {"choices": ["float32", "bfloat16", "float16"], "default": "float32", "help": "(default: float32)"},
    "threshold": {"type": float, "default": 0.5, "help": "probability above which a pixel is inside (default: 0.5)"},
    "expressions_per_batch": {
        "type": positive_int,
        "default": 16,
        "metavar": "N",
        "help": "expressions that the model decodes at a time (default: 16)",
    },
    "max_images": {"type": positive_int, "metavar": "N", "help": "the first N images only (default: all)"},
}


def add_options(parser: Any, *names: str, **changes: dict[str, Any]) -> None:
    """Add options by their names; `changes` are what differs in this command, such as `output_dir={"required": True}`."""
    for name in (*names, *changes):
        parser.add_argument(f"--{name}", **_OPTIONS[name] | changes.get(name, {}))


def choose_device(args: argparse.Namespace) -> torch.device:
    """
    The device of `--device`, or else an accelerator, or else the CPU; `--num_threads` takes effect with it.

    Raises:
        ValueError: This machine has no such device.
    """
    if args.num_threads is not None:
        torch.set_num_threads(args.num_threads)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = args.device or accelerator or torch.device("cpu")
    there = [] if accelerator is None else [f"{accelerator.type}:{n}" for n in range(torch.accelerator.device_count())]
    if device.type != "cpu" and f"{device.type}:{device.index or 0}" not in there:
        raise ValueError(f"Expected --device to be one of {', '.join(['cpu', *there])}, got {device}.")
    return device


def start_processes(args: argparse.Namespace, timeout: timedelta) -> tuple[Any, torch.device]:
    """
    This process among those that `torchrun` or `accelerate launch` started with it (accelerate's `PartialState`), and
    its device: an accelerator for each of them, or CPUs where there is none or `--device cpu` says so.

    Args:
        timeout: How long processes wait for one another.

    Raises:
        ValueError: This machine has no such device, it has a number where several processes share the work, or not all
            processes found one another.
    """
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    device, num_started = choose_device(args), int(os.environ.get("WORLD_SIZE", "1"))
    if args.device is not None and device.index is not None and num_started > 1:
        raise ValueError(f"Expected --device without a number with {num_started} processes, got {device}.")
    on_cpu = device.type == "cpu" or (args.device is None and parse_flag_from_env("ACCELERATE_USE_CPU"))
    state = PartialState(cpu=on_cpu, timeout=timeout)
    if state.num_processes != num_started:
        raise ValueError(f"{num_started} processes were started, {state.num_processes} can work together here.")
    return state, state.device if args.device is None or num_started > 1 else device
