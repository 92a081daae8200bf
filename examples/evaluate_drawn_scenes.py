"""
Evaluate a model on drawn scenes that its training did not see, at the scenes' own size:

    python examples/evaluate_drawn_scenes.py examples/checkpoint --output results.json --sheet sheet.png

Prints mean IoU and overall IoU for each kind of sentence, beside the same with every sentence taken from another
scene: the difference is what the words are worth.
"""

import argparse
import json
from itertools import compress
from pathlib import Path

import numpy as np
import torch
import transformers
from evaluate_refcoco import find_revision, write_text
from PIL import Image
from tqdm import tqdm
from train_drawn_scenes import EVALUATION_SEED, SceneArguments, split_backgrounds
from transformers import AutoModelForImageSegmentation, AutoProcessor

import modeling_restr  # noqa: F401  (registers ReSTR with the Auto classes)
from modeling_restr.data.drawn_scenes import DrawnScenes, Scene, kind_needs_context
from modeling_restr.metrics import ReferringIoU
from modeling_restr.metrics.evaluation import predict_masks
from modeling_restr.visualization import add_legend, arrange_in_grid, draw_masks, save_image


THRESHOLD = 0.5
NEEDS_CONTEXT = "place, order, relation"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Evaluate a model on unseen drawn scenes.")
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("--num_scenes", type=int, default=500, help="scenes of 8 sentences each (default: 500)")
    parser.add_argument("--backgrounds", help="folder of photographs; every tenth, unseen in training, is used")
    parser.add_argument("--output", type=Path, help="JSON file for the numbers")
    parser.add_argument("--sheet", type=Path, help="PNG file for a picture of the first scenes")
    return parser.parse_args()


def predict(model, processor, image: np.ndarray, texts: list[str]) -> list[np.ndarray]:
    """A mask of the image's own size for each sentence."""
    results = predict_masks(model, processor, Image.fromarray(image), texts, threshold=THRESHOLD)
    return [result["mask"].cpu().numpy() for result in results]


def count(scene: Scene, masks: list[np.ndarray]) -> list[dict[str, int]]:
    """Intersection and union in pixels of each sentence's mask with what it refers to."""
    targets = [scene.masks[expression.target] for expression in scene.expressions]
    return [ReferringIoU.counts(mask, target) for mask, target in zip(masks, targets)]


def summarize(kinds: list[str], counts: list[dict[str, int]]) -> dict[str, dict[str, float]]:
    """Mean IoU and overall IoU (sum of intersections over sum of unions), in percent, by kind of sentence."""
    metric = ReferringIoU(keep_in_memory=True)
    groups = {"all": np.ones(len(kinds), dtype=bool), NEEDS_CONTEXT: np.array([*map(kind_needs_context, kinds)])}
    groups |= {kind: np.array(kinds) == kind for kind in sorted(set(kinds))}
    summary = {}
    for name, selected in groups.items():
        results = metric.compute(predictions=list(compress(counts, selected)))
        summary[name] = {
            "sentences": results["num_expressions"],
            "mean_iou": round(100 * results["mean_iou"], 1),
            "overall_iou": round(100 * results["overall_iou"], 1),
        }
    return summary


def draw_sheet(
    scenes: DrawnScenes, model, processor, columns: int = 4, rows: int = 2, sentences: int = 3
) -> Image.Image:
    """The first scenes, unselected, with the masks of their first sentences."""
    tiles = []
    for index in range(columns * rows):
        scene = scenes[index]
        texts = [expression.text for expression in scene.expressions[:sentences]]
        image = Image.fromarray(scene.image)
        size = (round(image.width * 320 / image.height), 320)
        masks = [Image.fromarray(mask).resize(size) for mask in predict(model, processor, scene.image, texts)]
        tiles.append(add_legend(draw_masks(image.resize(size, Image.Resampling.BICUBIC), masks), texts))
    return arrange_in_grid(tiles, columns)


def main() -> None:
    args = parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForImageSegmentation.from_pretrained(args.model).eval().to(device)
    processor = AutoProcessor.from_pretrained(args.model)
    image_size = model.config.vision_config.image_size
    _, photographs = split_backgrounds(SceneArguments(backgrounds=args.backgrounds, image_size=image_size))
    scenes = DrawnScenes(args.num_scenes, EVALUATION_SEED, image_size=image_size, backgrounds=photographs)

    kinds, counts, shuffled_counts = [], [], []
    for index in tqdm(range(len(scenes)), unit="scene"):
        scene, other = scenes[index], scenes[(index + 1) % len(scenes)]
        kinds += [expression.kind for expression in scene.expressions]
        texts = [expression.text for expression in (*scene.expressions, *other.expressions)]
        masks = predict(model, processor, scene.image, texts)  # the scene is encoded once for both
        counts += count(scene, masks[: len(scene.expressions)])
        shuffled_counts += count(scene, masks[len(scene.expressions) :])
    summary, shuffled = summarize(kinds, counts), summarize(kinds, shuffled_counts)

    print(
        "| sentences | number | mean IoU | overall IoU | mean IoU, sentence of another scene |\n|---|---|---|---|---|"
    )
    for name, row in summary.items():
        print(
            f"| {name} | {row['sentences']:,} | {row['mean_iou']} | {row['overall_iou']} | {shuffled[name]['mean_iou']} |"
        )
    if args.output:
        results = {
            "model": {"name": Path(args.model).name, "revision": find_revision(args.model, None)},
            "data": f"{args.num_scenes} drawn scenes, seed {EVALUATION_SEED}, {image_size} pixels",
            "photographs": bool(photographs),
            "threshold": THRESHOLD,
            "results": summary,
            "results_with_sentences_of_another_scene": shuffled,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
        write_text(args.output, json.dumps(results, indent=2) + "\n")
    if args.sheet:
        save_image(draw_sheet(scenes, model, processor), args.sheet)


if __name__ == "__main__":
    main()
