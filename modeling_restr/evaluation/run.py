"""
Evaluation of a model on a split of prepared data, on any number of processes. It resumes after an interruption.

Processes that `torchrun` or `accelerate launch` starts share the images. They count the same pixels as one process.
"""

import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import PartialState
from huggingface_hub import hf_hub_download
from tqdm import tqdm
from transformers import AutoModelForImageSegmentation, AutoProcessor

from .. import __version__
from ..data.loading import load_prepared, name_rows
from ..data.published_counts import Counts, compare_counts, published_counts
from ..files import hash_file, hold_folder, record_settings, write_json, write_text
from ..metrics import ReferringIoU
from ..options import start_processes
from ..visualization import save_image
from .benchmarks import BENCHMARKS
from .contact_sheet import draw_contact_sheet
from .counts import check_dataset, evaluate_dataset, fingerprint, fingerprint_rows
from .report import format_report


HASHED_FILES = ("*.safetensors", "*.bin", "config.json", "*processor_config.json", "tokenizer.json")
PACKAGES = ("torch", "transformers", "datasets", "evaluate", "pycocotools", "pillow", "numpy")
# How long processes wait for the main one, which prepares the data, and for the slowest one.
TIMEOUT = timedelta(hours=12)


def run_evaluation(
    model: str,
    data: str,
    split: str,
    output_dir: str | os.PathLike,
    *,
    revision: str | None = None,
    data_revision: str | None = None,
    benchmark: str | None = None,
    threshold: float = 0.5,
    dtype: str = "float32",
    max_images: int | None = None,
    by_length: bool = False,
    num_bootstrap: int | None = None,
    expressions_per_batch: int = 16,
    device: str | None = None,
    num_threads: int | None = None,
) -> dict[str, Any] | None:
    """
    Evaluate a model and write `results.json`, `results.md` and `contact_sheet.png`. An evaluation that was stopped
    resumes, with any number of processes.

    Args:
        model: Folder or Hub id of the model.
        data: Folder or Hub id of prepared data.
        split: Split of the data, such as val.
        output_dir: Folder to write to, on a disk that all processes share.
        revision: Branch, tag or commit of the model on the Hub.
        data_revision: Branch, tag or commit of the data on the Hub.
        benchmark: Name of the data in `BENCHMARKS`, to compare it with the published counts and the paper's results.
        threshold: Probability above which a pixel is in the mask.
        dtype: Floating-point type of the model.
        max_images: Number of images, counted from the first.
        by_length: Whether to group results by number of words as well.
        num_bootstrap: Number of resamples for 95 % intervals over images.
        expressions_per_batch: Number of expressions that the model decodes at a time.
        device: Device, by default an accelerator if there is one.
        num_threads: CPU threads of each process.

    Returns:
        The content of `results.json` in the main process, otherwise None.

    Raises:
        ValueError: The data cannot be evaluated, or the folder holds an evaluation with other settings or is in use.
        OSError: There is no such model or data.
    """
    state, own_device = start_processes(device, num_threads, TIMEOUT)
    with state.main_process_first():  # it fills the cache of `datasets`
        dataset = load_prepared(data, split, max_images=max_images, revision=data_revision)
    check_dataset(dataset)
    commit_or_files = find_revision(model, revision)
    loaded_model, processor = load_model(model, commit_or_files, dtype, own_device)
    digests, size = fingerprint_rows(dataset), processor.image_processor.size
    settings = {
        "model_revision": commit_or_files,
        "data_fingerprint": fingerprint(digests),
        "split": name_rows(split, max_images, len(dataset)),
        "threshold": threshold,
        "dtype": dtype,
        "image_size": [size["height"], size["width"]],
    }
    output_dir, results = Path(output_dir), None
    parts = Parts(output_dir, digests)
    with hold_folder(output_dir, "evaluation") if state.is_main_process else nullcontext():
        if state.is_main_process:
            parts.start_or_resume(settings)
        state.wait_for_everyone()
        evaluate = partial(
            evaluate_dataset,
            loaded_model,
            processor,
            expressions_per_batch=expressions_per_batch,
            threshold=threshold,
        )
        evaluate_share(evaluate, dataset, parts, state, description=f"{split}, {dtype}")
        state.wait_for_everyone()
        if state.is_main_process:
            records = parts.collect()
            sheet = draw_contact_sheet(loaded_model, processor, dataset, records, threshold)
            save_image(sheet, output_dir / "contact_sheet.png")
            results = {
                "model": {"name": model, "revision": commit_or_files},
                "data": {"name": data, "fingerprint": settings["data_fingerprint"]}
                | compare_with_benchmark(dataset, benchmark, split),
                **{name: settings[name] for name in ("split", "threshold", "dtype", "image_size")},
                "expressions_per_batch": expressions_per_batch,
                **summarize([record for _, record in records], by_length, num_bootstrap),
            }
            write_text(output_dir / "results.md", format_report(results))
            write_json(output_dir / "results.json", results, indent=1)
    state.destroy_process_group()
    return results


def find_revision(name: str, revision: str | None = None) -> str | dict[str, str]:
    """The commit of a model on the Hub, or the SHA-256 of each file in a folder that results depend on."""
    if not Path(name).is_dir():
        return Path(hf_hub_download(name, "config.json", revision=revision)).parent.name
    paths = sorted(path for pattern in HASHED_FILES for path in Path(name).glob(pattern))
    return {path.name: hash_file(path) for path in paths}


def load_model(name: str, revision: str | dict[str, str], dtype: str, device: torch.device) -> tuple[Any, Any]:
    """The model and its processor, at the commit `revision` when they are on the Hub."""
    commit = revision if isinstance(revision, str) else None
    model = AutoModelForImageSegmentation.from_pretrained(name, dtype=getattr(torch, dtype), revision=commit)
    return model.eval().to(device), AutoProcessor.from_pretrained(name, revision=commit)


class Parts:
    """The finished images of an evaluation: one file per process, with one line of JSON per image."""

    def __init__(self, output_dir: Path, digests: list[str]):
        self.output_dir = output_dir
        self.folder = output_dir / "parts"
        self.digests = digests  # of the rows, in their order

    def start_or_resume(self, settings: dict[str, Any]) -> None:
        """
        Prepare the folder. One process calls it before all others use the folder.

        Raises:
            ValueError: The folder has results of other settings.
        """
        path = self.output_dir / "settings.json"
        is_new = not path.exists() and not self.folder.exists()
        if is_new:
            self.folder.mkdir(parents=True)
        different = record_settings(path, settings, is_new)
        if different:
            listing = "\n".join(f"  {name}: {earlier} there, {now} now" for name, (earlier, now) in different.items())
            raise ValueError(
                f"{self.output_dir} holds an evaluation with other settings. Choose another --output-dir, or remove"
                f" this folder:\n{listing}"
            )
        for part in self.folder.glob("*.jsonl"):
            _drop_torn_line(part)

    def read(self) -> dict[str, list[dict[str, Any]]]:
        """The records of each finished image by the hash of its row."""
        finished = {}
        for part in sorted(self.folder.glob("*.jsonl")):
            for number, line in enumerate(part.read_bytes().splitlines(), start=1):
                try:
                    image = json.loads(line)
                    finished[image["row"]] = image["expressions"]
                except (ValueError, KeyError, TypeError):
                    raise ValueError(
                        f"{part}, line {number} is damaged. Remove the line: its image is evaluated again."
                    ) from None
        return finished

    def collect(self) -> list[tuple[int, dict[str, Any]]]:
        """The index of the row and the record of every expression, in the order of their ids."""
        finished = self.read()
        records = [(index, record) for index, digest in enumerate(self.digests) for record in finished[digest]]
        return sorted(records, key=lambda item: [item[1][name] for name in ("image_id", "ref_id", "sent_id")])

    def open(self, process_index: int) -> Any:
        return (self.folder / f"part-{process_index:05d}.jsonl").open("a", encoding="utf-8")


def _drop_torn_line(path: Path) -> None:
    """Cut off the line that a process was writing when it was stopped."""
    content = path.read_bytes()
    if not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)


def evaluate_share(
    evaluate: Callable[[datasets.Dataset], Iterable[list[dict[str, Any]]]],
    dataset: datasets.Dataset,
    parts: Parts,
    state: PartialState,
    description: str,
) -> None:
    """Evaluate this process's share of the unfinished images, and write each result at once."""
    finished = parts.read()
    state.wait_for_everyone()  # all processes have read the same before any of them writes
    remaining = [index for index, digest in enumerate(parts.digests) if digest not in finished]
    share = remaining[state.process_index :: state.num_processes]
    if state.num_processes > 1:
        description += f", process 0 of {state.num_processes}"
    progress = tqdm(
        total=len(dataset) - len(remaining) + len(share),
        initial=len(dataset) - len(remaining),
        desc=description,
        unit="image",
        disable=not state.is_main_process,
    )
    sums = _sum_counts(record for records in finished.values() for record in records)
    with parts.open(state.process_index) as file, progress:
        for index, records in zip(share, evaluate(dataset.select(share))):
            file.write(json.dumps({"row": parts.digests[index], "expressions": records}) + "\n")
            file.flush()
            sums += _sum_counts(records)
            progress.set_postfix(oIoU=f"{sums[0] / max(sums[1], 1):.2%}", refresh=False)
            progress.update()


def _sum_counts(records: Iterable[dict[str, Any]]) -> np.ndarray:
    """The sums of all intersections and unions."""
    pairs = [(record["intersection"], record["union"]) for record in records]
    return np.array(pairs, dtype=np.int64).reshape(-1, 2).sum(axis=0)


def compare_with_benchmark(dataset: datasets.Dataset, benchmark: str | None, split: str) -> dict[str, Any]:
    """Count images, references and expressions, and list differences from the benchmark's published counts."""
    references = list(dataset.select_columns("references")["references"])
    num_expressions = sum(len(reference["expressions"]) for row in references for reference in row)
    counts = Counts(len(references), sum(map(len, references)), num_expressions)
    published = published_counts(benchmark, BENCHMARKS[benchmark].split_by, split) if benchmark else {}
    return {**counts._asdict(), "benchmark": benchmark, "differences": compare_counts(counts, published)}


def summarize(records: list[dict[str, Any]], by_length: bool, num_bootstrap: int | None) -> dict[str, Any]:
    """All results of [`ReferringIoU`], with gRefCOCO's if an expression refers to nothing, and how they were obtained."""
    names = ["intersection", "union"]
    if any(record["target"] == 0 for record in records):
        names += ["predicted", "target"]
    options: dict[str, Any] = {}
    if by_length:
        options["num_words"] = [record["num_words"] for record in records]
    if num_bootstrap:
        options |= {"image_ids": [record["image_id"] for record in records], "num_bootstrap": num_bootstrap}
    predictions = [{name: record[name] for name in names} for record in records]
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "metrics": ReferringIoU(keep_in_memory=True).compute(predictions=predictions, **options),
        "command": shlex.join(sys.argv),
        "versions": {"python": platform.python_version(), "modeling-restr": __version__, **versions},
        "expressions": records,
    }


__all__ = ["find_revision", "load_model", "run_evaluation"]
