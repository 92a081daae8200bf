"""Prediction as a Ray Data pipeline: read rows, decode images in CPU tasks, predict in actors, write Parquet."""

import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_worker_niceness", "0")  # by default Ray's workers yield to every other program

# isort: split
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
from ray.data import ActorPoolStrategy, DataContext, ExecutionResources
from ray.data.checkpoint import CheckpointConfig
from transformers import AutoProcessor

from ..data.coco_export import build_instances
from ..data.parquet_rows import find_columns, open_source
from ..evaluation.run import find_revision
from ..files import hold_folder, record_settings, replace_file, write_json
from .stages import Predictor, RowGroupDatasource, decode


VERSION = 3  # of the results; different versions are never mixed
SETTINGS_NAME, SUMMARY_NAME, COCO_NAME = "prediction.json", "summary.json", "instances.json"
MAX_UNKNOWN_WORDS = 1000  # in the summary
# About a minute's work at the paper's size, which a killed run repeats.
PAIRS_PER_CPU_FILE, PAIRS_PER_GPU_FILE = 60, 10_000
IMAGES_PER_CPU_BATCH, IMAGES_PER_GPU_BATCH = 8, 64
BATCHES_AHEAD = 16  # decoded in advance per actor, in addition to four row groups: this bounds the memory
# Share of a CPU that Ray reserves for a thread of a model on the CPU. It leaves CPUs for reading and decoding, which take
# far less time, and for the actors of a machine that is lost.
CPU_PER_MODEL_THREAD = 0.2


def predict(
    model: str,
    data: str,
    output_dir: str | Path,
    *,
    revision: str | None = None,
    split: str | None = None,
    config_name: str | None = None,
    data_revision: str | None = None,
    image_dir: str | None = None,
    image_column: str = "image",
    text_column: str | None = None,
    max_images: int | None = None,
    dtype: str = "float32",
    threshold: float = 0.5,
    raise_errors: bool = False,
    coco: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """
    Predict the masks of all images and sentences. A run with the same settings resumes one that was stopped. Returns
    the content of `summary.json`.

    Args:
        model: Folder or Hub id, which all machines of a cluster can read.
        data: Folder, Hub id or URL of Parquet files, or a .csv or .jsonl file of sentences.
        output_dir: Folder on a disk that all machines share.
        raise_errors: Whether a bad image or sentence stops the run instead of becoming a row with its error.
        coco: Whether to write `instances.json` as well.
        (all others): See `restr predict --help`; `options` go to [`run_pipeline`].

    Raises:
        ValueError: The data cannot be used, the folder was begun with other settings or is in use, or a row has an
            error and `raise_errors` is set.
    """
    output_dir = Path(output_dir).absolute()
    data_dir, summary_path = output_dir / "data", output_dir / SUMMARY_NAME
    with hold_folder(output_dir, "prediction"):
        where = {"config_name": config_name, "revision": data_revision, "image_dir": image_dir}
        sentences_path = output_dir / ".sentences.parquet"
        source = open_source(data, split, **where, max_images=max_images, sentences_path=sentences_path)
        columns = find_columns(source.schema, image_column, text_column)
        num_rows = sum(group.num_rows for group in source.groups)
        commit_or_files = find_revision(model, revision)
        settings = {"version": VERSION, "model_revision": commit_or_files, "dtype": dtype, "threshold": threshold}
        settings |= {"data_fingerprint": source.fingerprint, "split": source.split, "num_images": num_rows}
        check_settings(output_dir, {**settings, "columns": [columns.image, columns.text]})
        if not summary_path.exists():
            finished = find_finished(data_dir, num_rows)
            commit = commit_or_files if isinstance(commit_or_files, str) else None
            processor = AutoProcessor.from_pretrained(model, revision=commit)
            decoding = {"processor": processor, "columns": columns, "image_dir": image_dir}
            decoding["raise_errors"] = raise_errors
            predicting: dict[str, Any] = {"model": model, "revision": commit, "columns": columns}
            predicting |= {"dtype": dtype, "threshold": threshold}
            names = list(dict.fromkeys([columns.image, columns.text, *(set(columns.ids) & set(source.schema.names))]))
            rows = RowGroupDatasource(source.groups, names)
            run_pipeline(rows, finished, decoding, predicting, output_dir, **options)
            find_finished(data_dir, num_rows)
            write_json(summary_path, {**summarize(data_dir), "model": model, "data": data, "settings": settings})
        if coco:
            write_json(output_dir / COCO_NAME, build_instances(read_results(output_dir)), indent=None)
    summary = json.loads(summary_path.read_text(encoding="utf-8"))
    if raise_errors and summary["num_errors"]:
        raise ValueError(f"{summary['num_errors']} rows in {output_dir} have an error: see their column error.")
    return summary


@contextmanager
def connect(address: str | None) -> Iterator[None]:
    """Connect to Ray on this machine, or to the cluster at an address. An existing connection is used."""
    if ray.is_initialized():
        yield
        return
    # One CPU more than there are, for tasks that run next to the actors and mostly wait.
    local: dict[str, Any] = {} if address else {"include_dashboard": False, "num_cpus": (os.cpu_count() or 1) + 1}
    ray.init(address or "local", logging_level=logging.WARNING, log_to_driver=False, **local)
    try:
        yield
    finally:
        ray.shutdown()


def run_pipeline(
    rows: RowGroupDatasource,
    finished: np.ndarray,
    decoding: dict[str, Any],
    predicting: dict[str, Any],
    output_dir: Path,
    *,
    address: str | None = None,
    device: str | None = None,
    num_threads: int = 1,
    num_actors: int | None = None,
    batch_size: int | None = None,
    pairs_per_file: int | None = None,
    expressions_per_batch: int = 16,
) -> None:
    """
    Write the results of all unfinished rows.

    A row is an image with all its sentences until an actor has predicted their masks. Blocks are never divided after
    that, so that a file has all sentences of an image, and Ray's checkpoint knows images by their `row`.

    Args:
        decoding, predicting: Arguments of [`decode`] and of [`Predictor`].
        (all others): See `restr predict --help`.
    """
    actor: dict[str, Any]
    with connect(address):
        available = ray.cluster_resources()
        num_gpus = int(available.get("GPU", 0))
        device = device or ("cuda" if num_gpus else "cpu")
        if device.startswith("cuda"):  # Ray shows each actor one GPU
            device = "cuda"
            num_actors, actor = num_actors or num_gpus, {"num_gpus": 1, "num_cpus": 1}
            batch_size = batch_size or IMAGES_PER_GPU_BATCH
            pairs_per_file = pairs_per_file or PAIRS_PER_GPU_FILE * num_actors
        else:
            num_actors = num_actors or max(1, (int(available["CPU"]) - 1) // num_threads)
            actor = {"num_cpus": CPU_PER_MODEL_THREAD * num_threads}
            batch_size = batch_size or IMAGES_PER_CPU_BATCH
            pairs_per_file = pairs_per_file or PAIRS_PER_CPU_FILE * num_actors
        predicting = {**predicting, "device": device, "num_threads": num_threads}
        predicting["expressions_per_batch"] = expressions_per_batch
        shape = decoding["processor"].image_processor.size
        batch_bytes = batch_size * 3 * shape["height"] * shape["width"] * np.dtype(np.float32).itemsize
        largest = max((group.num_bytes for group in rows.groups), default=0)
        _set_context(output_dir / ".checkpoint", finished, num_actors * BATCHES_AHEAD * batch_bytes + 4 * largest)
        batches: dict[str, Any] = {"batch_format": "pyarrow", "batch_size": batch_size}
        pool = ActorPoolStrategy(min_size=1, max_size=num_actors, initial_size=num_actors)
        dataset: Any = ray.data.read_datasource(rows, override_num_blocks=len(rows.groups))
        dataset = dataset.map_batches(decode, fn_kwargs=decoding, **batches)
        dataset = dataset.repartition(target_num_rows_per_block=batch_size)
        dataset = dataset.map_batches(Predictor, fn_constructor_kwargs=predicting, compute=pool, **batches, **actor)
        try:
            dataset.write_parquet(str(output_dir / "data"), min_rows_per_file=pairs_per_file, compression="zstd")
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, (ValueError, OSError)) else error) from None


def _set_context(checkpoint_dir: Path, finished: np.ndarray, bytes_ahead: int) -> None:
    context = DataContext.get_current()
    context.execution_options.resource_limits = ExecutionResources(object_store_memory=bytes_ahead)
    context.target_max_block_size = None  # the numbers of rows alone divide blocks
    context.print_on_execution_start = False
    context.raise_original_map_exception = True
    shutil.rmtree(checkpoint_dir, ignore_errors=True)
    checkpoint_dir.mkdir()
    if len(finished):
        pq.write_table(pa.table({"row": finished}), checkpoint_dir / "finished.parquet")
    context.checkpoint_config = CheckpointConfig(id_column="row", checkpoint_path=str(checkpoint_dir))


def find_finished(folder: Path, num_rows: int) -> np.ndarray:
    """
    Find the numbers of the rows with results in the folder, and remove partial files and repeated results.

    Ray's own checkpoint files are not used: a worker may outlive its run and write a file that the next run repeats,
    and a kill may leave part of a file.
    """
    finished = np.zeros(num_rows, dtype=bool)
    for path in sorted(folder.glob("*.parquet")):
        try:
            rows = pq.read_table(path, columns=["row"])["row"].to_numpy()
        except pa.ArrowInvalid:  # a part of a file
            path.unlink()
            continue
        is_repeated = finished[rows]
        if is_repeated.any():
            with replace_file(path) as temporary:
                pq.write_table(pq.read_table(path).filter(pa.array(~is_repeated)), temporary, compression="zstd")
        finished[rows] = True
    return np.flatnonzero(finished)


def check_settings(output_dir: Path, settings: dict[str, Any]) -> None:
    """Record the settings of the folder, or check that they are the same as before."""
    path, data_dir = output_dir / SETTINGS_NAME, output_dir / "data"
    data_dir.mkdir(exist_ok=True)
    changed = record_settings(path, settings, is_new=not path.exists() and not any(data_dir.glob("*.parquet")))
    if changed:
        listing = "".join(f"\n  {name}: then {earlier}, now {now}" for name, (earlier, now) in changed.items())
        raise ValueError(f"Expected the settings that {output_dir} was begun with, or an empty folder, got:{listing}")


def summarize(folder: Path) -> dict[str, Any]:
    """Count the results in the folder and the sentences with each unknown word, and find the first error."""
    names = ("num_images", "num_pairs", "num_errors", "num_truncated", "num_files", "num_bytes")
    counts, words = dict.fromkeys(names, 0), Counter[str]()
    first_error = None
    for path in sorted(folder.glob("*.parquet")):
        table = pq.read_table(path, columns=["row", "error", "truncated", "unknown_words"])
        counts["num_images"] += pc.count_distinct(table["row"]).as_py()
        counts["num_pairs"] += len(table)
        errors = table["error"].drop_null()
        counts["num_errors"] += len(errors)
        first_error = first_error or (errors[0].as_py() if len(errors) else None)
        counts["num_truncated"] += pc.sum(table["truncated"]).as_py() or 0
        counts["num_files"] += 1
        counts["num_bytes"] += path.stat().st_size
        words.update(pc.list_flatten(table["unknown_words"]).to_pylist())
    return {**counts, "first_error": first_error, "unknown_words": dict(words.most_common(MAX_UNKNOWN_WORDS))}


def read_results(output_dir: Path) -> list[dict[str, Any]]:
    """All results in the order of the input."""
    table = pa.concat_tables([pq.read_table(path) for path in (output_dir / "data").glob("*.parquet")])
    return table.sort_by([("row", "ascending"), ("text_index", "ascending")]).to_pylist()
