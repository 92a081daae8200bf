"""
Evaluate a model on a split of prepared data, one row an image, as `restr prepare` writes it:

    python examples/evaluate_refcoco.py path/or/id data/refcoco --split val --benchmark refcoco --output_dir runs/val

`accelerate launch examples/evaluate_refcoco.py ...` (without GPUs `torchrun --nproc_per_node CORES ...`) shares the
images among processes, with the same results to the last pixel. Masks are compared at the images' own size. The output
folder gets results.json (metrics, every expression's pixel counts, what exactly was evaluated), results.md (tables
beside the paper's numbers) and contact_sheet.png (best, median and worst masks). Stopped, the same command goes on
where it was, with any number of processes.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
from accelerate import PartialState
from huggingface_hub import hf_hub_download
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForImageSegmentation, AutoProcessor

import modeling_restr  # noqa: F401  (registers ReSTR with the Auto classes)
from modeling_restr.arguments import ArgumentParser, add_options, positive_int, start_processes
from modeling_restr.data.canonical import decode_mask
from modeling_restr.data.loading import load_prepared, name_rows
from modeling_restr.data.published_counts import Counts, compare_counts, published_counts
from modeling_restr.files import hold_folder, replace_file
from modeling_restr.hub.bundle import hash_file
from modeling_restr.hub.model_card import PAPER_OVERALL_IOU
from modeling_restr.metrics import ReferringIoU
from modeling_restr.metrics.evaluation import (
    check_dataset,
    evaluate_dataset,
    fingerprint,
    fingerprint_rows,
    predict_masks,
)
from modeling_restr.visualization import add_legend, arrange_in_grid, draw_masks, save_image


class Benchmark(NamedTuple):
    """One of the paper's data sets: its name there and in REFER, and the overall IoU of ReSTR by split, in percent."""

    title: str
    dataset: str
    split_by: str
    overall_iou: dict[str, float]


BENCHMARKS = {
    "refcoco": Benchmark("RefCOCO", "refcoco", "unc", PAPER_OVERALL_IOU["refcoco"]),
    "refcoco+": Benchmark("RefCOCO+", "refcoco+", "unc", PAPER_OVERALL_IOU["refcoco+"]),
    "refcocog": Benchmark("RefCOCOg (google)", "refcocog", "google", PAPER_OVERALL_IOU["refcocog"]),
}
PRECISIONS = [f"precision@0.{tenth}" for tenth in range(5, 10)]
HASHED_FILES = ("*.safetensors", "*.bin", "config.json", "*processor_config.json", "tokenizer.json")
PACKAGES = ("modeling-restr", "torch", "transformers", "datasets", "evaluate", "pycocotools", "pillow", "numpy")
TILE_SIZE = 320  # pixels, the longer side of an image on the contact sheet
TILES_PER_ROW = 4
PATIENCE = timedelta(hours=12)  # the others wait while the main process prepares the data, and for the last one


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description="Evaluate a model on a split of prepared data.")
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("data", help="folder or Hub id of prepared data, one row an image")
    parser.add_argument("--split", required=True, help="such as val, testA or testB")
    output_dir = {"required": True, "help": "where results go; on a disk that all processes share"}
    add_options(parser, "revision", "data_revision", "device", "num_threads", output_dir=output_dir)
    add_options(parser, "threshold", "dtype", "expressions_per_batch", "max_images")
    parser.add_argument("--benchmark", choices=BENCHMARKS, help="what DATA is, for the paper's numbers beside it")
    parser.add_argument("--bootstrap", type=positive_int, metavar="N", help="95 %% intervals over images, N resamples")
    parser.add_argument("--by_length", action="store_true", help="results by number of words, too")
    return parser.parse_args(arguments)


def find_revision(name: str, revision: str | None) -> str | dict[str, str]:
    """The commit of a model on the Hub; of a folder's files those that decide on the results, with their SHA-256."""
    if not Path(name).is_dir():
        return Path(hf_hub_download(name, "config.json", revision=revision)).parent.name
    paths = sorted(path for pattern in HASHED_FILES for path in Path(name).glob(pattern))
    return {path.name: hash_file(path) for path in paths}


def load_model(name: str, revision: str | dict[str, str], dtype: str, device: torch.device) -> tuple[Any, Any]:
    """The model and its processor, on the Hub those of the commit `revision`."""
    options = {"revision": revision} if isinstance(revision, str) else {}
    model = AutoModelForImageSegmentation.from_pretrained(name, dtype=getattr(torch, dtype), **options)
    return model.eval().to(device), AutoProcessor.from_pretrained(name, **options)


def find_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # the package itself, run from a clone
        return None


def write_text(path: Path, text: str) -> None:
    """Write a file as a whole or not at all."""
    with replace_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


class Parts:
    """The finished images in a folder: a file of each process, with a line of JSON an image."""

    def __init__(self, output_dir: Path):
        self.output_dir = output_dir
        self.folder = output_dir / "parts"

    def start_or_resume(self, settings: dict[str, Any]) -> None:
        """Make the folder ready, in one process before all others use it.

        Raises:
            ValueError: the folder has results of other settings.
        """
        path = self.output_dir / "settings.json"
        if not path.exists() and not self.folder.exists():
            self.folder.mkdir(parents=True)
            write_text(path, json.dumps(settings, indent=2) + "\n")
        earlier = json.loads(path.read_text()) if path.exists() else {}
        different = [name for name, value in settings.items() if earlier.get(name) != value]
        if different:
            listing = "\n".join(f"  {name}: {earlier.get(name)} there, {settings[name]} now" for name in different)
            raise ValueError(
                f"{self.output_dir} holds an evaluation with other settings. Choose another --output_dir, or remove"
                f" that one:\n{listing}"
            )
        for part in self.folder.glob("*.jsonl"):
            _drop_torn_line(part)

    def read(self) -> dict[str, list[dict[str, Any]]]:
        """The records of each finished image, by the hash of its row."""
        finished = {}
        for part in sorted(self.folder.glob("*.jsonl")):
            for number, line in enumerate(part.read_bytes().splitlines(), start=1):
                try:
                    image = json.loads(line)
                    finished[image["row"]] = image["expressions"]
                except (ValueError, KeyError, TypeError):
                    raise ValueError(f"{part}, line {number} is damaged. Remove the line: it is made again.") from None
        return finished

    def open(self, process_index: int) -> Any:
        return (self.folder / f"part-{process_index:05d}.jsonl").open("a", encoding="utf-8")


def _drop_torn_line(path: Path) -> None:
    """Cut off what a process was writing when it was stopped."""
    content = path.read_bytes()
    if not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)


def evaluate_share(
    args: argparse.Namespace,
    model: Any,
    processor: Any,
    dataset: datasets.Dataset,
    digests: list[str],
    parts: Parts,
    state: PartialState,
) -> None:
    """Evaluate this process's share of the images that are not finished, each written as soon as it is."""
    finished = parts.read()
    state.wait_for_everyone()  # all have read the same before anyone writes
    remaining = [index for index, digest in enumerate(digests) if digest not in finished]
    mine = remaining[state.process_index :: state.num_processes]
    share = f"share of process 0 of {state.num_processes}, " if state.num_processes > 1 else ""
    done = [record for records in finished.values() for record in records]
    intersection, union = (sum(record[name] for record in done) for name in ("intersection", "union"))
    results = evaluate_dataset(model, processor, dataset.select(mine), args.expressions_per_batch, args.threshold)
    progress = tqdm(
        total=len(digests) - len(remaining) + len(mine),
        initial=len(digests) - len(remaining),
        desc=f"{args.split} ({share}{args.dtype})",
        unit="image",
        disable=not state.is_main_process,
    )
    with parts.open(state.process_index) as file, progress:
        for index, records in zip(mine, results):
            file.write(json.dumps({"row": digests[index], "expressions": records}) + "\n")
            file.flush()
            intersection += sum(record["intersection"] for record in records)
            union += sum(record["union"] for record in records)
            progress.set_postfix(oIoU=f"{intersection / max(union, 1):.2%}", refresh=False)
            progress.update()


def compute_metrics(records: list[dict[str, Any]], by_length: bool, num_bootstrap: int | None) -> dict[str, Any]:
    """All results of [`ReferringIoU`]; those of gRefCOCO where an expression refers to nothing."""
    names = ["intersection", "union"]
    if any(record["target"] == 0 for record in records):
        names += ["predicted", "target"]
    options: dict[str, Any] = {}
    if by_length:
        options["num_words"] = [record["num_words"] for record in records]
    if num_bootstrap:
        options |= {"image_ids": [record["image_id"] for record in records], "num_bootstrap": num_bootstrap}
    predictions = [{name: record[name] for name in names} for record in records]
    return ReferringIoU(keep_in_memory=True).compute(predictions=predictions, **options)


def count_data(dataset: datasets.Dataset) -> Counts:
    rows = list(dataset.select_columns("references")["references"])
    num_expressions = sum(len(reference["expressions"]) for row in rows for reference in row)
    return Counts(len(rows), sum(len(row) for row in rows), num_expressions)


def find_differences(args: argparse.Namespace, counts: Counts) -> list[str]:
    """How DATA differs from what the benchmark's split is published to hold."""
    if args.benchmark is None:
        return []
    benchmark = BENCHMARKS[args.benchmark]
    return compare_counts(counts, published_counts(benchmark.dataset, benchmark.split_by, args.split))


def format_report(results: dict[str, Any]) -> str:
    """The results as Markdown: a table with the paper's numbers below ours, and one by number of words."""
    data, metrics = results["data"], results["metrics"]
    columns = [
        "overall_iou",
        "mean_iou",
        *PRECISIONS,
        *(name for name in ("gIoU", "N-acc", "T-acc") if name in metrics),
    ]
    titles = {"overall_iou": "overall IoU", "mean_iou": "mean IoU"}
    names = [titles.get(name, name.replace("precision@", "P@")) for name in columns]
    head = [f"| | {' | '.join(names)} | expressions |", "|---" + "|--:" * (len(columns) + 1) + "|"]
    intervals = metrics.get("confidence_intervals", {})
    ours = f"{results['model']['name']} on {data['name']}, {results['split']}"
    table = [*head, _format_row(ours, metrics, columns, intervals)]
    benchmarks = [BENCHMARKS[data["benchmark"]]] if data["benchmark"] else BENCHMARKS.values()
    for benchmark in benchmarks:
        for split, overall_iou in benchmark.overall_iou.items():
            if data["benchmark"] is None or split == results["split"].partition("[")[0]:
                label = f"*the paper's ReSTR on {benchmark.title}, {split}*"
                table.append(_format_row(label, {"overall_iou": overall_iou / 100}, columns, {}))
    lines = [
        _describe(results),
        "",
        *table,
        "",
        "The paper's numbers are as published (arXiv 2203.16768): overall IoU.",
    ]
    if data["differences"]:
        lines += ["", f"**Not to be compared with them**: the data differs: {'; '.join(data['differences'])}."]
    elif data["benchmark"] is None:
        lines += ["", "Which of them to compare with, `--benchmark` says; it also checks that the data is complete."]
    if "by_num_words" in metrics:
        groups = metrics["by_num_words"].items()
        lines += [
            "",
            "By number of words:",
            "",
            *head,
            *(_format_row(name, group, columns, {}) for name, group in groups),
        ]
    return "\n".join(lines) + "\n"


def _describe(results: dict[str, Any]) -> str:
    data, (height, width) = results["data"], results["image_size"]
    text = (
        f"{data['expressions']:,} expressions about {data['references']:,} references in {data['images']:,} images, in"
        f" percent. Masks at the images' own size, probability above {results['threshold']}; input {height}x{width},"
        f" {results['dtype']}."
    )
    if "confidence_intervals" in results["metrics"]:
        text += " In brackets 95 % intervals, by bootstrap over images."
    return text


def _format_row(label: str, metrics: dict[str, Any], columns: list[str], intervals: dict[str, Any]) -> str:
    cells = []
    for name in columns:
        cell = "" if metrics.get(name) is None else f"{100 * metrics[name]:.2f}"
        if intervals.get(name):
            low, high = intervals[name]
            cell += f" [{100 * low:.2f}, {100 * high:.2f}]"
        cells.append(cell)
    number = f"{metrics['num_expressions']:,}" if "num_expressions" in metrics else ""
    return f"| {' | '.join([label, *cells, number])} |"


def choose_examples(records: list[tuple[int, dict]], number: int = TILES_PER_ROW) -> dict[str, list[tuple[int, dict]]]:
    """The best, median and worst of (row, record), as many of each, from different images as far as there are."""
    ordered = sorted(records, key=lambda item: (-_iou(item[1]), item[1]["image_id"], item[1]["sent_id"]))
    from_the_middle = sorted(range(len(ordered)), key=lambda position: abs(2 * position - len(ordered) + 1))
    ranked = {"best": ordered, "median": [ordered[position] for position in from_the_middle], "worst": ordered[::-1]}
    number = min(number, -(-len(ordered) // 3))
    return {name: _spread_over_images(items)[:number] for name, items in ranked.items()}


def _spread_over_images(items: list[tuple[int, dict]]) -> list[tuple[int, dict]]:
    """The first of each image, then the second of each, and so on."""
    seen: Counter[int] = Counter()
    rounds = []
    for index, _ in items:
        rounds.append(seen[index])
        seen[index] += 1
    return [item for _, item in sorted(zip(rounds, items), key=lambda pair: pair[0])]


def _iou(record: dict[str, Any]) -> float:
    return record["intersection"] / record["union"] if record["union"] else 1.0


def draw_contact_sheet(
    model: Any, processor: Any, dataset: datasets.Dataset, records: list[tuple[int, dict]], threshold: float
) -> Image.Image:
    """Best, median and worst masks, a row each: the ground truth in one colour, the prediction in another."""
    examples = choose_examples(records)
    tiles = []
    for name, chosen in examples.items():
        for index, record in chosen:
            row = dataset[index]
            target = next(r["mask"] for r in row["references"] if r["ref_id"] == record["ref_id"])
            (result,) = predict_masks(model, processor, row["image"], [record["text"]], threshold=threshold)
            masks = [Image.fromarray(mask) for mask in (decode_mask(target), result["mask"].cpu().numpy())]
            tiles.append(draw_tile(row["image"], masks, record["text"], f"{name}: IoU {_iou(record):.2f}"))
    return arrange_in_grid(tiles, columns=len(examples["best"]))


def draw_tile(image: Image.Image, masks: list[Image.Image], text: str, title: str) -> Image.Image:
    scale = TILE_SIZE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    small = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    drawn = draw_masks(small, [mask.resize(size, Image.Resampling.NEAREST) for mask in masks])
    return add_legend(drawn, [f"{text} (ground truth)", f"prediction, {title}"])


def evaluate(args: argparse.Namespace, state: PartialState, device: torch.device) -> None:
    with state.main_process_first():  # the first one fills the cache of `datasets`
        dataset = load_prepared(args.data, args.split, max_images=args.max_images, revision=args.data_revision)
    check_dataset(dataset)
    digests = fingerprint_rows(dataset)
    revision = find_revision(args.model, args.revision)
    model, processor = load_model(args.model, revision, args.dtype, device)
    size = processor.image_processor.size
    settings = {
        "model_revision": revision,
        "data_fingerprint": fingerprint(digests),
        "split": name_rows(args.split, args.max_images, len(dataset)),
        "threshold": args.threshold,
        "dtype": args.dtype,
        "image_size": [size["height"], size["width"]],
    }
    parts = Parts(args.output_dir)
    with hold_folder(args.output_dir, "evaluation") if state.is_main_process else nullcontext():
        if state.is_main_process:
            parts.start_or_resume(settings)
        state.wait_for_everyone()
        evaluate_share(args, model, processor, dataset, digests, parts, state)
        state.wait_for_everyone()
        if state.is_main_process:
            finished = parts.read()
            records = [(index, record) for index, digest in enumerate(digests) for record in finished[digest]]
            sheet = draw_contact_sheet(model, processor, dataset, records, args.threshold)
            save_image(sheet, args.output_dir / "contact_sheet.png")
            write_results(args, settings, dataset, [record for _, record in records])


def write_results(
    args: argparse.Namespace, settings: dict[str, Any], dataset: datasets.Dataset, records: list[dict[str, Any]]
) -> None:
    """Write results.md and results.json, and print the first."""
    records.sort(key=lambda record: (record["image_id"], record["ref_id"], record["sent_id"]))
    counts = count_data(dataset)
    results = {
        "model": {"name": args.model, "revision": settings["model_revision"]},
        "data": {
            "name": args.data,
            "fingerprint": settings["data_fingerprint"],
            **counts._asdict(),
            "benchmark": args.benchmark,
            "differences": find_differences(args, counts),
        },
        **{name: settings[name] for name in ("split", "threshold", "dtype", "image_size")},
        "expressions_per_batch": args.expressions_per_batch,
        "metrics": compute_metrics(records, args.by_length, args.bootstrap),
        "command": shlex.join(sys.argv),
        "versions": {"python": platform.python_version()} | {name: find_version(name) for name in PACKAGES},
        "expressions": records,
    }
    report = format_report(results)
    write_text(args.output_dir / "results.md", report)
    write_text(args.output_dir / "results.json", json.dumps(results, indent=1) + "\n")
    print(f"\n{report}\nWritten: {args.output_dir / 'results.json'}, results.md, contact_sheet.png")


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_args(arguments)
    try:
        state, device = start_processes(args, timeout=PATIENCE)
        evaluate(args, state, device)
    except (ValueError, OSError) as error:  # unusable data, other settings, no such model, ...
        raise SystemExit(str(error)) from error
    state.destroy_process_group()


if __name__ == "__main__":
    main()
