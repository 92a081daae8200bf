"""
Evaluate a model on the photographs that its training held out, with generated sentences, at 352 pixels:

    python examples/evaluate_photographs.py examples/restr-mini --instances_file instances.json --image_dir images \\
        --output results.json --sheet sheet.png --training_log trainer_state.json --curve curve.png

Prints mean IoU, overall IoU and precision@0.5 for each kind of sentence, and for those that need their words of place
or order since there are several of the category, beside two baselines: the model with every sentence taken from another
photograph, and the best constant box by the words left, right, middle, top and bottom.
"""

import argparse
import json
import os
import re
from collections.abc import Sequence
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from evaluate_drawn_scenes import predict
from evaluate_refcoco import find_revision, write_text
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForImageSegmentation, AutoProcessor

import modeling_restr  # noqa: F401  (registers ReSTR with the Auto classes)
from modeling_restr.data.photo_expressions import KIND_WEIGHTS, Expression, express
from modeling_restr.data.photo_scenes import Photographs, PhotoScene, PhotoScenes
from modeling_restr.data.refer import read_json
from modeling_restr.metrics import ReferringIoU
from modeling_restr.visualization import add_legend, arrange_in_grid, draw_masks, save_image


THRESHOLD = 0.5
SEED = 1_000_003
SCENE_SIZE = 352  # pixels, the longer side
PLACE_WORDS = ("left", "right", "center", "top", "bottom")  # "middle" counts as "center"
AMONG_SEVERAL = "place or order, among several"
BOX_GRID = 16  # the corners of constant boxes lie on a grid of so many cells
FREE_LICENSES = ("Attribution License", "Attribution-ShareAlike License", "No known copyright restrictions")


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Evaluate a model on held-out photographs.")
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("--instances_file", type=Path, required=True, help="in COCO's format")
    parser.add_argument("--image_dir", type=Path, required=True, help="folder of its images")
    parser.add_argument(
        "--expressions_per_image", type=int, default=8, metavar="N", help="at most so many (default: 8)"
    )
    parser.add_argument("--output", type=Path, help="JSON file for the numbers")
    parser.add_argument("--sheet", type=Path, help="PNG file for a picture of the first photographs that may be shown")
    parser.add_argument("--training_log", type=Path, help="trainer_state.json of the training")
    parser.add_argument("--curve", type=Path, help="PNG file for the curve of the training log; needs matplotlib")
    args = parser.parse_args(arguments)
    if args.curve and not args.training_log:
        parser.error("--curve draws a --training_log: give that, too")
    return args


# --- Sentences and the baseline of constant boxes ---------------------------------------------------------------------


def describe(photographs: Photographs, count: int) -> list[tuple[PhotoScene, list[Expression]]]:
    """Each photograph about which something can be said, as it is, with its sentences."""
    scenes = PhotoScenes(photographs, len(photographs), SCENE_SIZE, SEED, augment=False)
    described = []
    for index, image_id in enumerate(photographs.image_ids):
        expressions = express(scenes[index], np.random.default_rng((SEED, image_id)), count)
        if expressions:
            described.append((scenes[index], expressions))
    return described


def place_words(text: str) -> frozenset[str]:
    return frozenset(PLACE_WORDS) & set(re.findall(r"[a-z]+", text.replace("most", " ").replace("middle", "center")))


class ConstantBoxes:
    """The box that fits best, on average, what the training's sentences with the same place words refer to."""

    def __init__(self, described: list[tuple[PhotoScene, list[Expression]]]):
        edges = range(BOX_GRID + 1)
        sides = [(start, end) for start in edges for end in edges if start < end]
        self.boxes = np.array([(x0, y0, x1, y1) for x0, x1 in sides for y0, y1 in sides])
        totals: dict[frozenset[str], np.ndarray] = {}
        for scene, expressions in described:
            iou_of = {target: self._iou(scene.masks[target]) for target in {e.target for e in expressions}}
            for expression in expressions:
                words = place_words(expression.text)
                totals[words] = totals.get(words, 0) + iou_of[expression.target]
        self.best = {words: self.boxes[total.argmax()] / BOX_GRID for words, total in totals.items()}

    def _iou(self, mask: np.ndarray) -> np.ndarray:
        """The IoU of every box with a mask, on the grid."""
        cells = Image.fromarray(mask.astype(np.float32)).resize((BOX_GRID, BOX_GRID), Image.Resampling.BOX)
        table = np.pad(np.asarray(cells).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
        x0, y0, x1, y1 = self.boxes.T
        inside = table[y1, x1] - table[y0, x1] - table[y1, x0] + table[y0, x0]
        return inside / ((x1 - x0) * (y1 - y0) + table[-1, -1] - inside)

    def draw(self, text: str, size: tuple[int, int]) -> np.ndarray:
        """The box for a sentence, as a mask of `size` (height, width)."""
        x0, y0, x1, y1 = self.best.get(place_words(text), self.best[frozenset()])
        height, width = size
        mask = np.zeros(size, bool)
        mask[round(y0 * height) : round(y1 * height), round(x0 * width) : round(x1 * width)] = True
        return mask


# --- Results ----------------------------------------------------------------------------------------------------------


def find_groups(scene: PhotoScene, expression: Expression) -> set[str]:
    """What the results of an expression count for."""
    is_one_of_several = scene.categories.count(scene.categories[expression.target]) > 1
    needs_place = is_one_of_several and expression.kind in ("place", "order")
    return {"all", expression.kind, *([AMONG_SEVERAL] if needs_place else [])}


def summarize(groups_of: list[set[str]], counts: list[dict[str, int]]) -> dict[str, dict[str, float]]:
    """Mean IoU, overall IoU and precision@0.5, in percent, of each group of sentences."""
    metric = ReferringIoU(keep_in_memory=True)
    groups = {name: [name in found for found in groups_of] for name in ("all", *KIND_WEIGHTS, AMONG_SEVERAL)}
    summary = {}
    for name, selected in groups.items():
        if any(selected):
            results = metric.compute(predictions=list(compress(counts, selected)))
            names = ("mean_iou", "overall_iou", "precision@0.5")
            summary[name] = {"sentences": results["num_expressions"]}
            summary[name] |= {metric_name: round(100 * results[metric_name], 1) for metric_name in names}
    return summary


def count(scene: PhotoScene, expressions: list[Expression], masks: list[np.ndarray]) -> list[dict[str, int]]:
    targets = [scene.masks[expression.target] for expression in expressions]
    return [ReferringIoU.counts(mask, target) for mask, target in zip(masks, targets)]


def evaluate(
    model: Any, processor: Any, described: list[tuple[PhotoScene, list[Expression]]], boxes: ConstantBoxes
) -> dict[str, dict[str, dict[str, float]]]:
    groups_of: list[set[str]] = []
    counts: dict[str, list[dict[str, int]]] = {"model": [], "shuffled": [], "box": []}
    for index, (scene, expressions) in enumerate(tqdm(described, unit="photo")):
        others = [expression.text for expression in described[(index + 1) % len(described)][1]]
        texts = [expression.text for expression in expressions]
        shuffled = [others[number % len(others)] for number in range(len(texts))]
        masks = predict(model, processor, scene.image, texts + shuffled)  # the photograph is encoded once for both
        groups_of += [find_groups(scene, expression) for expression in expressions]
        counts["model"] += count(scene, expressions, masks[: len(texts)])
        counts["shuffled"] += count(scene, expressions, masks[len(texts) :])
        counts["box"] += count(scene, expressions, [boxes.draw(text, scene.image.shape[:2]) for text in texts])
    return {name: summarize(groups_of, part) for name, part in counts.items()}


def format_table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    lines = [
        "| sentences | number | mean IoU | overall IoU | P@0.5 | mean IoU, constant box | mean IoU, other sentence |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in results["model"].items():
        cells = [f"{row['sentences']:,}", row["mean_iou"], row["overall_iou"], row["precision@0.5"]]
        cells += [results["box"][name]["mean_iou"], results["shuffled"][name]["mean_iou"]]
        lines.append(f"| {name} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def write_results(args: argparse.Namespace, results: dict[str, dict[str, dict[str, float]]], number: int) -> None:
    content = {
        "model": {"name": Path(args.model).name, "revision": find_revision(args.model, None)},
        "data": f"{number} held-out photographs, sentences generated with seed {SEED}, {SCENE_SIZE} pixels",
        "photographs": True,
        "threshold": THRESHOLD,
        "results": results["model"],
        "results_with_sentences_of_another_scene": results["shuffled"],
        "results_of_the_best_constant_box": results["box"],
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    write_text(args.output, json.dumps(content, indent=2) + "\n")


# --- Pictures ---------------------------------------------------------------------------------------------------------


def draw_sheet(
    instances_file: Path,
    photographs: Photographs,
    model: Any,
    processor: Any,
    columns: int = 4,
    rows: int = 3,
    sentences: int = 2,
) -> tuple[Image.Image, list[str]]:
    """The first held-out photographs that may be shown, by their ids, unselected; and their credits."""
    free = {
        image["id"]: f"{image['flickr_url']} ({image['license']})"
        for image in read_json(instances_file)["images"]
        if image.get("license") in FREE_LICENSES and image.get("flickr_url")
    }
    scenes = PhotoScenes(photographs, len(photographs), SCENE_SIZE, SEED, augment=False)
    tiles, credits = [], []
    for index, image_id in enumerate(photographs.image_ids):
        if image_id not in free:
            continue
        scene = scenes[index]
        texts = [e.text for e in express(scene, np.random.default_rng((SEED, image_id)), sentences)]
        if not texts:
            continue
        masks = [Image.fromarray(mask) for mask in predict(model, processor, scene.image, texts)]
        tiles.append(add_legend(draw_masks(Image.fromarray(scene.image), masks), texts))
        credits.append(free[image_id])
        if len(tiles) == columns * rows:
            break
    if not tiles:
        raise ValueError(f"No held-out photograph of {instances_file} has a `license` under which it may be shown.")
    return arrange_in_grid(tiles, columns), credits


def draw_curve(training_log: Path, path: Path) -> None:
    """Mean IoU on held-out photographs over the steps of a training, and the same with other sentences."""
    from matplotlib.figure import Figure

    history = json.loads(training_log.read_text())["log_history"]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, label in (("unseen", "held-out photographs"), ("shuffled", "with another photograph's sentences")):
        points = [(row["step"], 100 * row[key]) for row in history if (key := f"eval_{name}_mean_iou") in row]
        axes.plot(*zip(*points), marker="o", markersize=3, label=label)
    axes.set(xlabel="step", ylabel="mean IoU (%)", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    temporary = path.with_name(f".{path.name}.tmp.png")
    figure.savefig(temporary, dpi=120)
    os.replace(temporary, path)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_args(arguments)
    if args.curve:
        draw_curve(args.training_log, args.curve)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForImageSegmentation.from_pretrained(args.model).eval().to(device)
    processor = AutoProcessor.from_pretrained(args.model)
    held_out, train = (Photographs.load(args.instances_file, args.image_dir, held_out=held) for held in (True, False))
    described = describe(held_out, args.expressions_per_image)
    results = evaluate(model, processor, described, ConstantBoxes(describe(train, args.expressions_per_image)))
    print(format_table(results))
    if args.output:
        write_results(args, results, len(described))
    if args.sheet:
        sheet, credits = draw_sheet(args.instances_file, held_out, model, processor)
        save_image(sheet, args.sheet)
        print("The sheet's photographs, row by row:", *credits, sep="\n")


if __name__ == "__main__":
    main()
