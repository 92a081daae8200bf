"""
Measure what an exported model costs and gains beside the model that it was made of: overall IoU, mean IoU, size and
CPU time of PyTorch, of ONNX Runtime in float32 and, where the folder has it, in int8:

    python examples/evaluate_onnx.py examples/restr_mini restr-onnx --data data/photos --split val --output_dir runs/onnx

All run in turn on each image, with one thread, so that a noisy machine slows all of them alike; times are CPU time,
medians over the images.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import torch
import transformers
from PIL import Image
from tqdm import tqdm
from transformers import pipeline

import modeling_restr  # noqa: F401  (makes `pipeline` know ReSTR)
from modeling_restr.arguments import ArgumentParser, add_options
from modeling_restr.data.canonical import decode_mask
from modeling_restr.data.loading import load_prepared
from modeling_restr.evaluation.run import find_revision
from modeling_restr.export.restr_onnx import ReSTROnnxPipeline
from modeling_restr.files import write_text
from modeling_restr.metrics import ReferringIoU


class Annotated(NamedTuple):
    """An image, its sentences and, for each, the mask of what it refers to."""

    image: Image.Image
    texts: list[str]
    masks: list[np.ndarray]


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description="Compare an exported model with the model that it was made of.")
    parser.add_argument("model", help="folder or Hub id of the model")
    parser.add_argument("folder", type=Path, help="what restr export wrote")
    parser.add_argument("--data", required=True, help="folder or Hub id of prepared data")
    parser.add_argument("--split", default="val", help="of the prepared data (default: val)")
    max_images = {"default": 200, "help": "the first N images only (default: 200)"}
    output_dir = {"help": "folder for results.json"}
    add_options(parser, "revision", "data_revision", max_images=max_images, output_dir=output_dir)
    return parser.parse_args()


def read_rows(dataset: Any) -> Iterator[Annotated]:
    for row in dataset:
        pairs = [
            (expression["text"], decode_mask(reference["mask"]))
            for reference in row["references"]
            for expression in reference["expressions"]
        ]
        if pairs:
            yield Annotated(row["image"], [text for text, _ in pairs], [mask for _, mask in pairs])


def load_runners(args: argparse.Namespace, pipe: Any) -> dict[str, Callable[..., list[dict[str, Any]]]]:
    """What answers, by name; all with the same arguments and results."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    runners = {"torch": pipe, "float32": ReSTROnnxPipeline(args.folder, session_options=options)}
    if (args.folder / "sentence_query_int8.onnx").is_file():
        runners["int8"] = ReSTROnnxPipeline(args.folder, "int8", session_options=options)
    return runners


def measure(runners: dict[str, Callable], images: Iterator[Annotated], total: int) -> dict[str, dict[str, Any]]:
    """Quality (percent), pixels that differ from PyTorch's (percent) and CPU time (ms an image) of each runner."""
    counts: dict[str, list[dict[str, int]]] = {name: [] for name in runners}
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    differing, pixels = dict.fromkeys(runners, 0), 0
    for annotated in tqdm(images, total=total, unit="image"):
        expected: list[np.ndarray] = []
        for name, runner in runners.items():
            start = time.process_time()
            results = runner(annotated.image, text=annotated.texts)
            seconds[name].append(time.process_time() - start)
            masks = [np.asarray(result["mask"]) > 0 for result in results]
            expected = expected or masks  # the first runner's
            differing[name] += sum(int((mask != other).sum()) for mask, other in zip(masks, expected))
            counts[name] += [ReferringIoU.counts(mask, target) for mask, target in zip(masks, annotated.masks)]
        pixels += sum(mask.size for mask in expected)
    metric = ReferringIoU(keep_in_memory=True)
    results = {name: metric.compute(predictions=counts[name]) for name in runners}
    return {
        name: {
            "sentences": results[name]["num_expressions"],
            "overall_iou": round(100 * results[name]["overall_iou"], 2),
            "mean_iou": round(100 * results[name]["mean_iou"], 2),
            "differing_pixels": round(100 * differing[name] / pixels, 4),
            "cpu_ms_an_image": round(1000 * statistics.median(seconds[name]), 1),
        }
        for name in runners
    }


def add_ratios(results: dict[str, dict[str, Any]], folder: Path) -> None:
    """Add sizes, and what each costs and gains beside PyTorch (time) and ONNX in float32 (size, overall IoU)."""
    for name, suffix in (("float32", ""), ("int8", "_int8")):
        if name in results:
            graphs = [
                path for stem in ("image_encoder", "sentence_query") for path in folder.glob(f"{stem}{suffix}.onnx*")
            ]
            results[name]["megabytes"] = round(sum(path.stat().st_size for path in graphs) / 1e6, 1)
            results[name]["size_ratio"] = round(results[name]["megabytes"] / results["float32"]["megabytes"], 3)
            cost = results["float32"]["overall_iou"] - results[name]["overall_iou"]
            results[name]["overall_iou_cost"] = round(cost, 2)
        if name in results:
            time_ratio = results[name]["cpu_ms_an_image"] / results["torch"]["cpu_ms_an_image"]
            results[name]["time_ratio_to_torch"] = round(time_ratio, 3)


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    task: Any = "referring-image-segmentation"  # transformers types its own tasks only
    pipe: Any = pipeline(task, model=args.model, revision=args.revision, device="cpu")
    dataset = load_prepared(args.data, args.split, max_images=args.max_images, revision=args.data_revision)
    results = measure(load_runners(args, pipe), read_rows(dataset), len(dataset))
    add_ratios(results, args.folder)
    print(json.dumps(results, indent=2))
    if args.output_dir:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        record = {
            "model": {"name": Path(args.model).name, "revision": find_revision(args.model, args.revision)},
            "data": f"{len(dataset)} images of {Path(args.data).name}, {args.split}",
            "results": results,
            "versions": {
                "onnxruntime": onnxruntime.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }
        write_text(args.output_dir / "results.json", json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
