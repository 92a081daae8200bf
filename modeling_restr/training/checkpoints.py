"""
Checkpoints that are whole or not there, and runs that end cleanly.

A checkpoint is written to `OUTPUT_DIR/.unfinished/checkpoint-STEP` and moved when all of it is on the disk. A run that
is killed, whenever it is, finds the last whole one:

    checkpoint = find_last_checkpoint(output_dir)
    with StopSignal() as stop:
        for step in ...:
            check_loss(loss, step, batch)
            if stop.received or step % save_steps == 0:
                with write_checkpoint(output_dir, step) as folder:
                    ...  # write files to the folder
            if stop.received:
                sys.exit(EXIT_CODE_TERMINATED)
"""

import json
import logging
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
MARKER = "complete.json"  # the checkpoint's files and their sizes in bytes
# As a shell reports SIGTERM (128 + 15), so that nobody takes the run for finished: it saved, and is to be resumed.
EXIT_CODE_TERMINATED = 143


class LossNotFiniteError(RuntimeError):
    """The loss or the weights became NaN or infinite; the last checkpoint is from before."""


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
    condemned = checkpoint.parent / UNFINISHED / f"removed-{checkpoint.name}"
    condemned.parent.mkdir(exist_ok=True)
    shutil.rmtree(condemned, ignore_errors=True)
    os.replace(checkpoint, condemned)
    shutil.rmtree(condemned, ignore_errors=True)
    _remove_if_empty(condemned.parent)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first; of any others a warning names them."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    whole = [path for path in found if _is_whole(path)]
    for path in set(found) - set(whole):
        logger.warning(f"{path} is ignored: it is no whole checkpoint of a training script of this package.")
    return sorted(whole, key=get_step)


def get_step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _is_whole(checkpoint: Path) -> bool:
    try:
        sizes = json.loads((checkpoint / MARKER).read_text())
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def check_whole(checkpoint: str | Path) -> None:
    """
    Raises:
        ValueError: a folder is no checkpoint, or part of one.
    """
    if not _is_whole(Path(checkpoint)):
        raise ValueError(
            f"Expected the folder of a whole checkpoint of a training script of this package, got {checkpoint}. Leave it"
            " out to go on from the last one of the output_dir."
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


def check_loss(loss: torch.Tensor, step: int, batch: Mapping[str, Any]) -> None:
    """
    Stop at a loss that is NaN or infinite, before it reaches the weights.

    Args:
        loss: The loss (scalar) of one batch.
        step: Optimizer steps so far.
        batch: What the collator made, with `image_ids` (B,) and `sent_ids` (N,).

    Raises:
        LossNotFiniteError: with the ids of the batch.
    """
    if not torch.isfinite(loss):
        raise LossNotFiniteError(
            f"The loss of step {step + 1} is {loss.item()}. The batch: image_ids {batch['image_ids'].tolist()}, sent_ids"
            f" {batch['sent_ids'].tolist()}. Look at these rows; if they are fine, lower the learning rate, clip"
            " gradients (max_grad_norm=1) or train in float32. The last checkpoint is from before."
        )


def check_weights(model: nn.Module, step: int) -> None:
    """
    Keep a checkpoint of broken weights from being written: a finite loss can have gradients that are not.

    Raises:
        LossNotFiniteError: with the names of the parameters.
    """
    local = {name: getattr(parameter, "to_local", parameter.detach)() for name, parameter in model.named_parameters()}
    finite = {name: values.isfinite().all() for name, values in local.items()}  # FSDP: of this process's shards
    if not torch.stack(list(finite.values())).all():
        broken = [name for name, value in finite.items() if not value]
        raise LossNotFiniteError(
            f"After step {step} these weights are NaN or infinite: {broken}. Nothing was saved; the last checkpoint is"
            " from before. Lower the learning rate, clip gradients (max_grad_norm=1) or train in float32."
        )


__all__ = [
    "EXIT_CODE_TERMINATED",
    "LossNotFiniteError",
    "StopSignal",
    "check_loss",
    "check_weights",
    "check_whole",
    "find_last_checkpoint",
    "get_step",
    "keep_last_checkpoints",
    "list_checkpoints",
    "outlive_stop_signal",
    "write_checkpoint",
]
