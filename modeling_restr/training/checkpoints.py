"""
Atomic checkpoints, and runs that stop cleanly.

A checkpoint is written to `OUTPUT_DIR/.unfinished/checkpoint-STEP` and moved to its place when all of its files are on
the disk. A run that is killed at any moment therefore resumes from a complete checkpoint. Training steps never wait
for the device: losses and the stop signal are checked when the run logs and before every checkpoint.

examples/run_referring_segmentation_no_trainer.py shows how the parts work together.
With several processes (Accelerate's `PartialState`), all of them call these functions together.
"""

import json
import logging
import math
import os
import re
import shutil
import signal
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Self

import torch
from accelerate import PartialState
from accelerate.utils import gather, reduce
from torch import nn
from torch.utils.data import DataLoader


logger = logging.getLogger(__name__)

UNFINISHED = ".unfinished"
_NAME = re.compile(r"checkpoint-[0-9]{1,18}")
MARKER = "complete.json"  # the checkpoint's files and their sizes in bytes
# A shell reports SIGTERM like this (128 + 15): the run is saved but not finished, and can be resumed.
EXIT_CODE_TERMINATED = 143


class LossNotFiniteError(RuntimeError):
    """The loss or a weight became NaN or infinite. The last checkpoint was written before that."""


class ResumeError(ValueError):
    """A checkpoint is complete, but its files cannot be loaded."""

    def __init__(self, checkpoint: str | Path, error: Exception):
        super().__init__(
            f"Expected to resume from {checkpoint}, got {type(error).__name__}: {error}. If its files are damaged, remove"
            " the folder to resume from the checkpoint before it."
        )


@contextmanager
def write_checkpoint(output_dir: str | Path, step: int) -> Iterator[Path]:
    """
    Yield a folder to write to. Afterwards it becomes `OUTPUT_DIR/checkpoint-STEP` in one move. If the body raises or
    the process is killed, an earlier folder of that name stays as it was.

    Args:
        output_dir: Folder of the run, on a disk that all processes share. All of them may write files.
        step: Number of optimizer steps so far.
    """
    state = PartialState()
    final = Path(output_dir) / f"checkpoint-{step}"
    unfinished = final.parent / UNFINISHED / final.name
    if state.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    state.wait_for_everyone()
    yield unfinished
    state.wait_for_everyone()
    if state.is_main_process:
        _move_into_place(unfinished, final)
    state.wait_for_everyone()


def _move_into_place(unfinished: Path, final: Path) -> None:
    files = [path for path in unfinished.rglob("*") if path.is_file()]
    sizes = {path.relative_to(unfinished).as_posix(): path.stat().st_size for path in files}
    (unfinished / MARKER).write_text(json.dumps(sizes, indent=1))
    for path in (*unfinished.rglob("*"), unfinished):
        _flush(path)
    if final.exists():  # the run was resumed from an older checkpoint
        _remove(final)
    os.replace(unfinished, final)
    _flush(final.parent)
    _remove_if_empty(unfinished.parent)


def _flush(path: Path) -> None:
    """Make sure that a file, or a folder's list of files, survives a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint. It is renamed first, so that a half-removed one is never taken for a checkpoint."""
    to_delete = checkpoint.parent / UNFINISHED / f"removed-{checkpoint.name}"
    to_delete.parent.mkdir(exist_ok=True)
    shutil.rmtree(to_delete, ignore_errors=True)
    os.replace(checkpoint, to_delete)
    shutil.rmtree(to_delete, ignore_errors=True)
    _remove_if_empty(to_delete.parent)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first. A warning names those that are not complete."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    complete = [path for path in found if _is_complete(path)]
    for path in set(found) - set(complete):
        logger.warning(f"{path} is ignored: it is not a complete checkpoint of this package's training scripts.")
    return sorted(complete, key=get_step)


def get_step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _is_complete(checkpoint: Path) -> bool:
    try:
        sizes = json.loads((checkpoint / MARKER).read_text())
        if not isinstance(sizes, dict):
            return False
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, RecursionError):
        return False


def find_checkpoint(output_dir: str | Path, resume_from: str | Path | None = None) -> Path | None:
    """
    Find the checkpoint to resume from: `resume_from`, by default the complete one with the most steps; None if there is
    none. Unfinished checkpoints of a killed run are removed.

    Args:
        output_dir: Folder of the run. It may not exist yet.
        resume_from: Folder of a checkpoint, of this run or another.

    Raises:
        ValueError: `resume_from` is not a complete checkpoint named `checkpoint-STEP`.
    """
    if PartialState().is_main_process:
        shutil.rmtree(Path(output_dir) / UNFINISHED, ignore_errors=True)
    if resume_from is None:
        return next(reversed(list_checkpoints(output_dir)), None)
    path = Path(resume_from)
    if not _NAME.fullmatch(path.name) or not _is_complete(path):
        raise ValueError(
            "Expected a complete folder checkpoint-STEP that a training script of this package wrote, got"
            f" {resume_from}. Leave it out to resume from the last checkpoint in the output_dir."
        )
    return path


def keep_last_checkpoints(output_dir: str | Path, number: int | None, protected: Iterable[str | Path] = ()) -> None:
    """
    Remove the oldest checkpoints until `number` are left, but never the protected ones. As in transformers, `None` and
    numbers below 1 keep all.
    """
    if number is None or number < 1:
        return
    kept = {Path(path).name for path in protected}
    for checkpoint in list_checkpoints(output_dir)[:-number]:
        if checkpoint.name not in kept:
            _remove(checkpoint)


class StopSignal:
    """
    Context manager that records SIGTERM instead of ending the process. Schedulers send this signal some time before
    they kill a process.
    """

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> Self:
        self._previous = signal.signal(signal.SIGTERM, self._record)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGTERM, self._previous)

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.received = True

    def is_requested(self) -> bool:
        """Whether the signal has reached any process. It does not reach all of them during the same step."""
        received = torch.full((), int(self.received), device=PartialState().device)
        return bool(reduce(received, "sum"))


def ignore_sigterm_in_workers(loader: DataLoader) -> DataLoader:
    """
    Let the worker processes of a data loader ignore SIGTERM. It is often sent to a whole group of processes, and
    without its workers the run could not continue to its next checkpoint. Workers end with the run.
    """
    inner = getattr(loader, "base_dataloader", loader)  # Accelerate wraps loaders
    inner.worker_init_fn = partial(_start_worker, inner.worker_init_fn)
    return loader


def _start_worker(worker_init_fn: Any, worker: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if worker_init_fn is not None:
        worker_init_fn(worker)


class LossMonitor:
    """
    Finds losses that are NaN or infinite. Only `check` waits for the device.

    All processes add one batch each at a time, and check together.
    """

    def __init__(self) -> None:
        self._batches: list[tuple[int, Mapping[str, Any]]] = []  # since the last check
        self._first: torch.Tensor | None = None  # on the device: index of the first bad batch, or infinity

    def add(self, loss: torch.Tensor, step: int, batch: Mapping[str, Any]) -> None:
        """
        Args:
            loss: Loss (scalar) of one batch.
            step: Number of the optimizer step that the batch belongs to, counted from 1.
            batch: Its `image_ids` and `sent_ids`, for the error message.
        """
        index = torch.where(loss.detach().isfinite(), math.inf, float(len(self._batches)))
        self._first = index if self._first is None else torch.minimum(self._first, index)
        self._batches.append((step, {name: batch[name] for name in ("image_ids", "sent_ids")}))

    def check(self) -> None:
        """
        Check the losses that were added since the last check.

        Raises:
            LossNotFiniteError: Raised in every process, with the ids of the batches of that process.
        """
        batches, first = self._batches, self._first
        self._batches, self._first = [], None
        if first is None:
            return
        indices = gather(first[None]).tolist()  # (processes,)
        if min(indices) == math.inf:
            return
        process = indices.index(min(indices))
        step, batch = batches[int(min(indices))]
        where = f"step {step}" + (f" of process {process}" if len(indices) > 1 else "")
        raise LossNotFiniteError(
            f"Expected finite losses, got NaN or infinity in {where}. This process's batch in that step:"
            f" {_list_ids([batch])}. All of its batches since the last check, from step {batches[0][0]} to"
            f" {batches[-1][0]}: {_list_ids([batch for _, batch in batches])}. Look at these rows. If they are fine,"
            " lower the learning rate, clip gradients (max_grad_norm=1) or train in float32, starting from the last"
            " checkpoint."
        )


def _list_ids(batches: Iterable[Mapping[str, Any]]) -> str:
    ids: dict[str, list[int]] = {"image_ids": [], "sent_ids": []}
    for batch in batches:
        for name, values in ids.items():
            values.extend(int(value) for value in batch[name])
    return ", ".join(f"{name} {values}" for name, values in ids.items())


def check_weights(model: nn.Module, step: int, optimizer: Any = None) -> None:
    """
    Keep broken weights out of checkpoints: a finite loss can have gradients that are not finite.

    Args:
        model: Its parameters and buffers are checked. With FSDP each process checks its own shards.
        step: Number of optimizer steps so far.
        optimizer: Its states are also checked.

    Raises:
        LossNotFiniteError: Raised in every process, with the names of the parameters that are broken in that process.
    """
    device = next(model.parameters()).device
    tensors = {name: tensor for name, tensor in _name_tensors(model, optimizer) if tensor.is_floating_point()}
    is_finite = torch.stack([tensor.isfinite().all().to(device) for tensor in tensors.values()])
    if gather(is_finite.all()[None]).all():
        return
    broken = [name for name, finite in zip(tensors, is_finite.tolist()) if not finite]
    raise LossNotFiniteError(
        f"Expected finite weights after step {step}, got NaN or infinity in {broken or 'another process'}. No checkpoint"
        " was written. Start from the last one with a lower learning rate, clipped gradients (max_grad_norm=1) or in"
        " float32."
    )


def _name_tensors(model: nn.Module, optimizer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    named = [*model.named_parameters(), *model.named_buffers()]
    for parameter, states in getattr(optimizer, "state", {}).items():
        name = names.get(id(parameter), "a parameter")
        named += [(f"{key} of {name}", value) for key, value in states.items() if isinstance(value, torch.Tensor)]
    for name, tensor in named:
        yield name, getattr(tensor, "to_local", tensor.detach)()  # FSDP: this process's shard
