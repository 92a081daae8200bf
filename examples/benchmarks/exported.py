"""Quality, size and speed of an exported model compared with the original."""

import json
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from tqdm import tqdm
from transformers import pipeline

from modeling_restr.data.canonical import decode_mask
from modeling_restr.data.loading import load_prepared
from modeling_restr.evaluation.run import find_revision
from modeling_restr.export.restr_onnx import ReSTROnnxPipeline
from modeling_restr.files import write_json
from modeling_restr.metrics import ReferringIoU

from .measuring import describe_machine


Runner = Callable[..., list[dict[str, Any]]]


def benchmark_export(
    model: str,
    folder: Path,
    data: str,
    split: str = "val",
    *,
    revision: str | None = None,
    data_revision: str | None = None,
    max_images: int | None = None,
    output_dir: Path | None = None,
) -> None:
    """
    Print quality, size and CPU time of PyTorch, of ONNX Runtime in float32 and, if `folder` has it, in int8, and write
    them to `results.json` in `output_dir`. All of them answer about each image in turn, with one thread, so that a noisy
    machine slows all of them alike.
    """
    torch.set_num_threads(1)
    task: Any = "referring-image-segmentation"  # transformers types its own tasks only
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    runners: dict[str, Runner] = {
        "torch": pipeline(task, model=model, revision=revision, device="cpu"),
        "float32": ReSTROnnxPipeline(folder, session_options=options),
    }
    if (folder / "sentence_query_int8.onnx").is_file():
        runners["int8"] = ReSTROnnxPipeline(folder, "int8", session_options=options)
    dataset = load_prepared(data, split, max_images=max_images, revision=data_revision)
    results = measure(runners, tqdm(dataset, unit="image"))
    add_ratios(results, folder)
    print(json.dumps(results, indent=2))
    if output_dir is not None:
        output_dir.mkdir(parents=True, exist_ok=True)
        record = {
            "model": {"name": Path(model).name, "revision": find_revision(model, revision)},
            "data": f"{len(dataset)} images of {Path(data).name}, {split}",
            "results": results,
            "machine": describe_machine(torch.device("cpu")) | {"onnxruntime": onnxruntime.__version__},
        }
        write_json(output_dir / "results.json", record)


def measure(runners: dict[str, Runner], rows: Iterable[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Measure quality and pixels that differ from the first runner's, both in percent, and median CPU time per image."""
    counts: dict[str, list[dict[str, int]]] = {name: [] for name in runners}
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    num_differing, num_pixels = dict.fromkeys(runners, 0), 0
    for row in rows:
        references = [reference for reference in row["references"] for _ in reference["expressions"]]
        targets = [decode_mask(reference["mask"]) for reference in references]
        texts = [expression["text"] for reference in row["references"] for expression in reference["expressions"]]
        found: dict[str, list[np.ndarray]] = {}
        for name, runner in runners.items():
            start = time.process_time()
            results = runner(row["image"], text=texts)
            seconds[name].append(time.process_time() - start)
            found[name] = [np.asarray(result["mask"]) > 0 for result in results]
            counts[name] += [ReferringIoU.counts(mask, target) for mask, target in zip(found[name], targets)]
            first = next(iter(found.values()))
            num_differing[name] += sum(int((mask != other).sum()) for mask, other in zip(found[name], first))
        num_pixels += sum(target.size for target in targets)
    metrics = {name: ReferringIoU(keep_in_memory=True).compute(predictions=counts[name]) for name in runners}
    return {
        name: {
            "sentences": metrics[name]["num_expressions"],
            "overall_iou": round(100 * metrics[name]["overall_iou"], 2),
            "mean_iou": round(100 * metrics[name]["mean_iou"], 2),
            "differing_pixels": round(100 * num_differing[name] / num_pixels, 4),
            "cpu_ms_per_image": round(1000 * statistics.median(seconds[name]), 1),
        }
        for name in runners
    }


def add_ratios(results: dict[str, dict[str, Any]], folder: Path) -> None:
    """Add sizes, their ratio and the loss of overall IoU compared with float32, and the time compared with PyTorch."""
    for name, suffix in (("float32", ""), ("int8", "_int8")):
        if name not in results:
            continue
        graphs = [
            path for stem in ("image_encoder", "sentence_query") for path in folder.glob(f"{stem}{suffix}.onnx*")
        ]
        megabytes = round(sum(path.stat().st_size for path in graphs) / 1e6, 1)
        results[name]["megabytes"] = megabytes
        results[name]["size_ratio"] = round(megabytes / results["float32"]["megabytes"], 3)
        cost = results["float32"]["overall_iou"] - results[name]["overall_iou"]
        results[name]["overall_iou_cost"] = round(cost, 2)
        time_ratio = results[name]["cpu_ms_per_image"] / results["torch"]["cpu_ms_per_image"]
        results[name]["time_ratio_to_torch"] = round(time_ratio, 3)
