"""
Parquet shards of annotated images, several at a time. A shard is written under a temporary name and moved when it is
whole; those that are there already are kept.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.auto import tqdm

from .canonical import FEATURES, AnnotatedImage, BadImage, build_row_or_error
from .published_counts import Counts
from .records import Problems


ROWS_PER_GROUP = 100  # what `datasets` takes for images: streaming reads a group at a time
LEFT_OUT_KEY = b"left_out"  # in a shard's metadata: what is wrong with each image that it lacks
PROBLEMS_KEY = b"problems"  # and all that was dropped or is doubtful, by kind

_counter: Any = None  # in a worker: how many images all workers have seen


@dataclass(frozen=True)
class Shard:
    """One Parquet file and the images that belong in it."""

    path: Path
    images: Sequence[AnnotatedImage]


def shard_paths(folder: Path, split: str, num_images: int, images_per_shard: int) -> list[Path]:
    number = -(-num_images // images_per_shard)
    return [folder / f"{split}-{index:05d}-of-{number:05d}.parquet" for index in range(number)]


def plan_shards(folder: Path, split: str, images: Sequence[AnnotatedImage], images_per_shard: int) -> list[Shard]:
    paths = shard_paths(folder, split, len(images), images_per_shard)
    parts = (images[start : start + images_per_shard] for start in range(0, len(images), images_per_shard))
    return [Shard(path, part) for path, part in zip(paths, parts)]


def count_rows(path: Path) -> Counts:
    """What a shard holds, as its rows say."""
    leaf = "references.list.element.expressions.list.element.sent_id"
    column = pq.ParquetFile(path).read(columns=[leaf])["references"]
    references = column.combine_chunks().flatten()
    return Counts(len(column), len(references), len(references.field("expressions").flatten()))


def count_bytes(path: Path) -> int:
    """The size of a shard's rows before compression."""
    metadata = pq.read_metadata(path)
    return sum(metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups))


def read_left_out(path: Path) -> list[str]:
    """What is wrong with each image that a shard lacks."""
    return json.loads((pq.read_metadata(path).metadata or {}).get(LEFT_OUT_KEY, b"[]"))


def read_problems(path: Path) -> Problems:
    """What was dropped from a shard or is doubtful in it."""
    return Problems(json.loads((pq.read_metadata(path).metadata or {}).get(PROBLEMS_KEY, b"{}")))


def _is_finished(shard: Shard, skip_bad: bool) -> bool:
    try:
        num_rows, left_out = pq.read_metadata(shard.path).num_rows, read_left_out(shard.path)
    except (OSError, pa.ArrowInvalid):  # not there, or damaged since
        return False
    return num_rows + len(left_out) == len(shard.images) and (skip_bad or not left_out)


def make_shards(shards: Sequence[Shard], num_proc: int = 1, skip_bad: bool = False) -> list[str]:
    """
    Make those shards that are not there, and those that lack images unless `skip_bad` says so, with a progress bar.

    Returns:
        `list[str]`: What is wrong with images of the shards that were made now. Without `skip_bad` no shard is begun
        after the first bad image.
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
        bad += write_shard(shard.path, shard.images, skip_bad, bar.update)
        if bad and not skip_bad:
            break
    return bad


def _make_in_processes(shards: Sequence[Shard], skip_bad: bool, bar: tqdm, num_proc: int) -> list[str]:
    context = multiprocessing.get_context("spawn")  # forking is not safe beside the threads of Arrow
    counter = context.Value("q", 0)
    with ProcessPoolExecutor(num_proc, context, _start_worker, (counter,)) as pool:
        futures = [pool.submit(_write_shard_in_worker, shard.path, shard.images, skip_bad) for shard in shards]
        pending: set[Future] = set(futures)
        while pending:
            done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            bar.update(counter.value + bar.initial - bar.n)
            if any(future.exception() or (future.result() and not skip_bad) for future in done):
                pending = {future for future in pending if not future.cancel()}  # what runs goes on to its end
    bar.update(counter.value + bar.initial - bar.n)
    return [problem for future in futures if not future.cancelled() for problem in future.result()]


def _start_worker(counter: Any) -> None:
    global _counter
    _counter = counter
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _write_shard_in_worker(path: Path, images: Sequence[AnnotatedImage], skip_bad: bool) -> list[str]:
    return write_shard(path, images, skip_bad, _count_in_worker)


def _count_in_worker(number: int) -> None:
    with _counter.get_lock():
        _counter.value += number


def write_shard(
    path: Path, images: Sequence[AnnotatedImage], skip_bad: bool, advance: Callable[[int], Any]
) -> list[str]:
    """
    Write one Parquet file with the images embedded, and say what is wrong with those that are bad. Without `skip_bad`
    a file that would lack any is not written. `advance` is called with 1 after each image.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    bad: list[str] = []
    problems = Problems()
    try:
        with pq.ParquetWriter(temporary, FEATURES.arrow_schema) as writer:
            for start in range(0, len(images), ROWS_PER_GROUP):
                rows = _build_good_rows(images[start : start + ROWS_PER_GROUP], bad, problems, advance)
                if rows:
                    writer.write_table(pa.Table.from_pylist(rows, schema=FEATURES.arrow_schema))
            left_out = [_strip_folders(problem) for problem in bad]
            writer.add_key_value_metadata({LEFT_OUT_KEY: json.dumps(left_out), PROBLEMS_KEY: json.dumps(problems)})
        if skip_bad or not bad:
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return bad


def _build_good_rows(
    images: Sequence[AnnotatedImage], bad: list[str], problems: Problems, advance: Callable[[int], Any]
) -> list[dict[str, Any]]:
    rows = []
    for image in images:
        row, found = build_row_or_error(image)
        problems.extend(found)
        if isinstance(row, BadImage):
            bad.append(str(row))
        else:
            rows.append(row)
        advance(1)
    return rows


def _strip_folders(text: str) -> str:
    """Without the folders of paths: nobody else's business in a dataset that is shared."""
    return re.sub(r"(?<![\w.])(?:[A-Za-z]:)?[/\\](?:[^/\\:\n]*[/\\])*", "", text)


__all__ = ["Shard", "count_rows", "make_shards", "plan_shards", "read_left_out", "shard_paths", "write_shard"]
