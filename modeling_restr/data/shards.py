"""
Parquet shards of annotated images, written by one or several processes. A shard is written under a temporary name and
moved when it is complete. Finished shards are kept.
"""

import json
import multiprocessing
import os
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from ..files import replace_file
from .canonical import FEATURES, AnnotatedImage, BadImage, build_row_or_error
from .published_counts import Counts
from .records import Problems


ROWS_PER_GROUP = 100  # as `datasets` writes images: streaming reads a group at a time
LEFT_OUT_KEY = b"left_out"  # in a shard's metadata: the errors of the images that it lacks
PROBLEMS_KEY = b"problems"  # and everything that was dropped or is doubtful, by kind

_counter: Any = None  # in a worker: the number of images that all workers have processed


@dataclass(frozen=True)
class Shard:
    """One Parquet file and the images that belong in it."""

    path: Path
    images: Sequence[AnnotatedImage]


@dataclass(frozen=True)
class PreparedSplit:
    """
    The content of a split's shards.

    left_out: The error of each image that was left out.
    num_bytes: Size of the rows before compression.
    file_size: Size of the files.
    problems: Everything that was left out or should be checked, by kind.
    """

    counts: Counts
    left_out: tuple[str, ...] = ()
    num_bytes: int = 0
    file_size: int = 0
    problems: Problems = field(default_factory=Problems)


def shard_paths(folder: Path, split: str, num_images: int, images_per_shard: int) -> list[Path]:
    number = -(-num_images // images_per_shard)
    return [folder / f"{split}-{index:05d}-of-{number:05d}.parquet" for index in range(number)]


def plan_shards(folder: Path, split: str, images: Sequence[AnnotatedImage], images_per_shard: int) -> list[Shard]:
    paths = shard_paths(folder, split, len(images), images_per_shard)
    parts = (images[start : start + images_per_shard] for start in range(0, len(images), images_per_shard))
    return [Shard(path, part) for path, part in zip(paths, parts)]


def read_split(paths: Iterable[Path]) -> PreparedSplit:
    """Count the content of a split's shards in the files."""
    counts, left_out, problems, num_bytes, file_size = Counts(), [], Problems(), 0, 0
    for path in paths:
        with pq.ParquetFile(path) as file:
            column = file.read(columns=["references.list.element.expressions.list.element.sent_id"])["references"]
            metadata = file.metadata
        references = column.combine_chunks().flatten()
        expressions = references.field("expressions").flatten()
        counts = counts.plus(Counts(len(column), len(references), len(expressions)))
        left_out += _read_note(metadata, LEFT_OUT_KEY, b"[]")
        problems.extend(_read_note(metadata, PROBLEMS_KEY, b"{}"))
        num_bytes += sum(metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups))
        file_size += path.stat().st_size
    return PreparedSplit(counts, tuple(left_out), num_bytes, file_size, problems)


def _read_note(metadata: pq.FileMetaData, key: bytes, default: bytes) -> Any:
    return json.loads((metadata.metadata or {}).get(key, default))


def _is_finished(shard: Shard, skip_bad: bool) -> bool:
    try:
        metadata = pq.read_metadata(shard.path)
    except (OSError, pa.ArrowInvalid):  # missing, or damaged since
        return False
    left_out = _read_note(metadata, LEFT_OUT_KEY, b"[]")
    return metadata.num_rows + len(left_out) == len(shard.images) and (skip_bad or not left_out)


def make_shards(shards: Sequence[Shard], num_proc: int = 1, skip_bad: bool = False) -> list[str]:
    """
    Make the shards that are missing, and unless `skip_bad` those that lack images, with a progress bar.

    Returns:
        The errors of images in the shards that were made now. Without `skip_bad`, no shard is begun after the first
        bad image.

    Raises:
        ChildProcessError: A process ended early.
    """
    for leftover in {path for shard in shards for path in shard.path.parent.glob(".*.tmp")}:  # of a killed run
        leftover.unlink(missing_ok=True)
    to_make = [shard for shard in shards if not _is_finished(shard, skip_bad)]
    total = sum(len(shard.images) for shard in shards)
    done = total - sum(len(shard.images) for shard in to_make)
    with tqdm(total=total, initial=done, desc="Images", unit="image") as bar:
        if num_proc == 1 or len(to_make) < 2:
            return _make_in_this_process(to_make, skip_bad, bar)
        try:
            return _make_in_processes(to_make, skip_bad, bar, min(num_proc, len(to_make)))
        except BrokenProcessPool as error:
            raise ChildProcessError(
                "A process that writes shards ended early, maybe for lack of memory: run again with a smaller num_proc. "
                "Finished shards are kept."
            ) from error


def _make_in_this_process(shards: Sequence[Shard], skip_bad: bool, bar: tqdm) -> list[str]:
    bad = []
    for shard in shards:
        bad += write_shard(shard, skip_bad, bar.update)
        if bad and not skip_bad:
            break
    return bad


def _make_in_processes(shards: Sequence[Shard], skip_bad: bool, bar: tqdm, num_proc: int) -> list[str]:
    context = multiprocessing.get_context("spawn")  # forking is not safe with Arrow's threads
    counter = context.Value("q", 0)
    with ProcessPoolExecutor(num_proc, context, _start_worker, (counter,)) as pool:
        futures = [pool.submit(write_shard, shard, skip_bad, _count_in_worker) for shard in shards]
        pending: set[Future] = set(futures)
        while pending:
            done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            bar.update(counter.value + bar.initial - bar.n)
            if any(future.exception() or (future.result() and not skip_bad) for future in done):
                pending = {future for future in pending if not future.cancel()}  # running ones finish their shard
    bar.update(counter.value + bar.initial - bar.n)
    return [problem for future in futures if not future.cancelled() for problem in future.result()]


def _start_worker(counter: Any) -> None:
    global _counter
    _counter = counter
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End a worker when its parent is killed. Otherwise it would wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _count_in_worker(number: int) -> None:
    with _counter.get_lock():
        _counter.value += number


class _IncompleteShard(Exception):
    """Prevents a shard that lacks images from being moved to its place."""


def write_shard(shard: Shard, skip_bad: bool, advance: Callable[[int], Any]) -> list[str]:
    """
    Write a shard with its images embedded, and return the errors of bad images. Without `skip_bad`, a shard that would
    lack images is not written. `advance` is called with 1 after each image.
    """
    bad: list[str] = []
    problems = Problems()
    with suppress(_IncompleteShard), replace_file(shard.path) as temporary:
        with pq.ParquetWriter(temporary, FEATURES.arrow_schema) as writer:
            for start in range(0, len(shard.images), ROWS_PER_GROUP):
                rows = _build_good_rows(shard.images[start : start + ROWS_PER_GROUP], bad, problems, advance)
                if rows:
                    writer.write_table(pa.Table.from_pylist(rows, schema=FEATURES.arrow_schema))
            left_out = [_strip_folders(problem) for problem in bad]
            writer.add_key_value_metadata({LEFT_OUT_KEY: json.dumps(left_out), PROBLEMS_KEY: json.dumps(problems)})
        if bad and not skip_bad:
            raise _IncompleteShard
    return bad


def _build_good_rows(
    images: Sequence[AnnotatedImage], bad: list[str], problems: Problems, advance: Callable[[int], Any]
) -> list[dict[str, Any]]:
    rows = []
    for image in images:
        row = build_row_or_error(image, problems)
        if isinstance(row, BadImage):
            bad.append(str(row))
        else:
            rows.append(row)
        advance(1)
    return rows


def _strip_folders(text: str) -> str:
    """Remove the folders of paths: they are private, and the dataset may be shared."""
    return re.sub(r"(?<![\w.])(?:[A-Za-z]:)?[/\\](?:[^/\\:\n]*[/\\])*", "", text)
