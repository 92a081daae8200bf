"""
Atomic checkpoints, and runs that end cleanly.

A checkpoint is written to `OUTPUT_DIR/.unfinished/checkpoint-STEP` and moved when all of it is on the disk. A run that
is killed, whenever it is, finds the last whole one. Steps never wait for the device: losses and the stop signal are
looked at now and then, and before every checkpoint.

    checkpoint = find_last_checkpoint(output_dir)
    losses = LossMonitor()
    with StopSignal() as stop:
        for step in ...:
            losses.add(loss, step, batch)
            if step % logging_steps == 0 or step % save_steps == 0:
                losses.check()
                if stop.received or step % save_steps == 0:
                    check_weights(model, step, optimizer)
                    with write_checkpoint(output_dir, step) as folder:
                        ...  # write files to the folder
                if stop.received:
                    sys.exit(EXIT_CODE_TERMINATED)
"""

import json
import logging
import math
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from torch import nn


logger = logging.getLogger(__name__)

UNFINISHED = ".unfinished"
_NAME = re.compile(r"checkpoint-[0-9]{1,18}")
MARKER = "complete.json"  # the checkpoint's files and their sizes in bytes
# As a shell reports SIGTERM (128 + 15): the run is not finished, but saved and to be resumed.
EXIT_CODE_TERMINATED = 143


class LossNotFiniteError(RuntimeError):
    """The loss or the weights became NaN or infinite; the last checkpoint is from before."""


class ResumeError(ValueError):
    """A checkpoint is whole, but its files cannot be loaded."""

    def __init__(self, checkpoint: str | Path, error: Exception):
        super().__init__(
            f"Expected to resume from {checkpoint}, got {type(error).__name__}: {error}. If its files are damaged, remove"
            " the folder to resume from the checkpoint before."
        )


@contextmanager
def write_checkpoint(
    output_dir: str | Path,
    step: int,
    *,
    is_main_process: bool = True,
    wait_for_everyone: Callable[[], None] = lambda: None,
) -> Iterator[Path]:
    """
    Yield a folder to write to; afterwards it is `OUTPUT_DIR/checkpoint-STEP`, in one move. When the body raises, or the
    process is killed, that folder is as it was before.

    Args:
        output_dir: The run's folder, on a disk that all processes share.
        step: Optimizer steps so far.
        is_main_process: Whether this is the process that makes and moves folders; all processes may write files.
        wait_for_everyone: A barrier, where there are several processes.
    """
    final = Path(output_dir) / f"checkpoint-{step}"
    staging = final.parent / UNFINISHED / final.name
    if is_main_process:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    wait_for_everyone()
    yield staging
    wait_for_everyone()
    if is_main_process:
        _finish(staging, final)
    wait_for_everyone()


def _finish(staging: Path, final: Path) -> None:
    files = [path for path in staging.rglob("*") if path.is_file()]
    sizes = {path.relative_to(staging).as_posix(): path.stat().st_size for path in files}
    (staging / MARKER).write_text(json.dumps(sizes, indent=1))
    for path in (*staging.rglob("*"), staging):
        _flush(path)
    if final.exists():  # a run that went back to an older checkpoint
        _remove(final)
    os.replace(staging, final)
    _flush(final.parent)
    _remove_if_empty(staging.parent)


def _flush(path: Path) -> None:
    """Make sure that a file, or a folder's list of files, is on the disk, should the machine fail."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(checkpoint: Path) -> None:
    """Remove a checkpoint so that a half removed one never has its name."""
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
    """The whole checkpoints of a run, oldest first; of any others a warning names them."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    whole = [path for path in found if _is_whole(path)]
    for path in set(found) - set(whole):
        logger.warning(f"{path} is ignored: it is no whole checkpoint of a training script of this package.")
    return sorted(whole, key=get_step)


def get_step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _is_whole(checkpoint: Path) -> bool:
    try:
        sizes = json.loads((checkpoint / MARKER).read_text())
        if not isinstance(sizes, dict):
            return False
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, RecursionError):
        return False


def check_whole(checkpoint: str | Path) -> None:
    """
    Raises:
        ValueError: a folder is no checkpoint, or part of one, or has another name than `checkpoint-STEP`.
    """
    path = Path(checkpoint)
    if not _NAME.fullmatch(path.name) or not _is_whole(path):
        raise ValueError(
            f"Expected a whole folder checkpoint-STEP that a training script of this package wrote, got {checkpoint}."
            " Leave it out to resume from the last one of the output_dir."
        )


def find_last_checkpoint(output_dir: str | Path, remove_leftovers: bool = True) -> Path | None:
    """
    The whole checkpoint of the most steps, None if there is none.

    Args:
        output_dir: The run's folder; it need not exist.
        remove_leftovers: Whether to remove what a killed run left unfinished. One process alone does it, before
            anything is written.
    """
    if remove_leftovers:
        shutil.rmtree(Path(output_dir) / UNFINISHED, ignore_errors=True)
    checkpoints = list_checkpoints(output_dir)
    return checkpoints[-1] if checkpoints else None


def keep_last_checkpoints(output_dir: str | Path, number: int | None, protected: Iterable[str | Path] = ()) -> None:
    """
    Remove the oldest checkpoints until `number` are left, never the protected ones. `None` and numbers below 1 keep
    all, as in transformers.
    """
    if number is None or number < 1:
        return
    kept = {Path(path).name for path in protected}
    for checkpoint in list_checkpoints(output_dir)[:-number]:
        if checkpoint.name not in kept:
            _remove(checkpoint)


class StopSignal:
    """
    Notices SIGTERM, with which schedulers announce that a process is about to be killed, instead of dying of it.

    A context manager; `received` says whether the signal has come. With several processes ask all of them before each
    decision: the signal does not reach them in the same step.
    """

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> Self:
        self._previous = signal.signal(signal.SIGTERM, self._notice)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGTERM, self._previous)

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self.received = True


def outlive_stop_signal(worker_init_fn: Callable[[int], None] | None = None) -> Callable[[int], None]:
    """
    The `worker_init_fn` for a `DataLoader` of a run: SIGTERM often goes to a whole group of processes, and workers that
    died of it would take the run with them before it has saved. They end with the run.
    """
    return partial(_start_worker, worker_init_fn)


def _start_worker(worker_init_fn: Callable[[int], None] | None, worker: int) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if worker_init_fn is not None:
        worker_init_fn(worker)


def _keep(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


class LossMonitor:
    """
    Finds losses that are NaN or infinite. Adding one takes no value off the device; only `check` waits for it.

    With several processes all of them add one batch each at a time, and check together.
    """

    def __init__(self) -> None:
        self._batches: list[tuple[int, Mapping[str, Any]]] = []  # since the last check
        self._first: torch.Tensor | None = None  # on the device: place in _batches of the first bad one, else inf

    def add(self, loss: torch.Tensor, step: int, batch: Mapping[str, Any]) -> None:
        """
        Args:
            loss: The loss (scalar) of one batch.
            step: The optimizer step that the batch is part of, counted from 1.
            batch: Its `image_ids` and `sent_ids`, for the error message.
        """
        place = torch.where(loss.detach().isfinite(), math.inf, float(len(self._batches)))
        self._first = place if self._first is None else torch.minimum(self._first, place)
        self._batches.append((step, {name: batch[name] for name in ("image_ids", "sent_ids")}))

    def check(self, gather: Callable[[torch.Tensor], torch.Tensor] = _keep) -> None:
        """
        Look at the losses added since the last check.

        Args:
            gather: (1,) of each process -> (processes,) of all, such as `Accelerator.gather`.

        Raises:
            LossNotFiniteError: in every process, with the ids of its batches since the last check.
        """
        batches, first = self._batches, self._first
        self._batches, self._first = [], None
        if first is None:
            return
        places = gather(first[None]).tolist()
        if min(places) == math.inf:
            return
        process = places.index(min(places))
        step, batch = batches[int(min(places))]
        whose = f" of process {process}" if len(places) > 1 else ""
        raise LossNotFiniteError(
            f"Expected finite losses, got one that is NaN or infinite in step {step}{whose}. The batch of this process in"
            f" that step: {_list_ids([batch])}. All since the last look, from step {batches[0][0]} to {batches[-1][0]}:"
            f" {_list_ids([batch for _, batch in batches])}. Look at these rows; if they are fine, lower the learning"
            " rate, clip gradients (max_grad_norm=1) or train in float32. The last checkpoint is from before."
        )


def _list_ids(batches: Iterable[Mapping[str, Any]]) -> str:
    ids: dict[str, list[int]] = {"image_ids": [], "sent_ids": []}
    for batch in batches:
        for name, values in ids.items():
            values.extend(int(value) for value in batch[name])
    return ", ".join(f"{name} {values}" for name, values in ids.items())


def check_weights(
    model: nn.Module,
    step: int,
    optimizer: Any = None,
    gather: Callable[[torch.Tensor], torch.Tensor] = _keep,
) -> None:
    """
    Keep a checkpoint of broken weights from being written: a finite loss can have gradients that are not.

    Args:
        model: Its parameters and buffers are looked at, under FSDP this process's shards of them.
        step: Optimizer steps so far.
        optimizer: Its states are looked at, too, if it is given.
        gather: See [`LossMonitor.check`].

    Raises:
        LossNotFiniteError: in every process, with the names of those parameters that are broken in this one.
    """
    device = next(model.parameters()).device
    tensors = {name: tensor for name, tensor in _name_tensors(model, optimizer) if tensor.is_floating_point()}
    flags = torch.stack([tensor.isfinite().all().to(device) for tensor in tensors.values()])
    if gather(flags.all()[None]).all():
        return
    broken = [name for name, is_finite in zip(tensors, flags.tolist()) if not is_finite]
    raise LossNotFiniteError(
        f"Expected finite weights after step {step}, got NaN or infinity in {broken or 'another process'}. Nothing was"
        " saved; the last checkpoint is from before. Lower the learning rate, clip gradients (max_grad_norm=1) or train"
        " in float32."
    )


def _name_tensors(model: nn.Module, optimizer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    named = [*model.named_parameters(), *model.named_buffers()]
    for parameter, states in getattr(optimizer, "state", {}).items():
        name = names.get(id(parameter), "a parameter")
        named += [(f"{key} of {name}", value) for key, value in states.items() if isinstance(value, torch.Tensor)]
    for name, tensor in named:
        yield name, getattr(tensor, "to_local", tensor.detach)()  # FSDP: this process's shard


__all__ = [
    "EXIT_CODE_TERMINATED",
    "LossMonitor",
    "LossNotFiniteError",
    "ResumeError",
    "StopSignal",
    "check_weights",
    "check_whole",
    "find_last_checkpoint",
    "get_step",
    "keep_last_checkpoints",
    "list_checkpoints",
    "outlive_stop_signal",
    "write_checkpoint",
]
