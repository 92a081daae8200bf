"""
Evaluate a model on the photographs that restr-mini's training held out, with generated sentences, at 352 pixels:

    python examples/restr_mini/evaluation.py examples/restr_mini --photos PHOTOS [MORE_PHOTOS ...] \\
        --output_dir runs/evaluation

PHOTOS are folders with `instances.json` (COCO's layout) and `images/`. What is reported, on the test's photographs:

- mean IoU, overall IoU and precision@0.5 for each kind of sentence, next to three controls: the sentence of another
  photograph, the bare category, and the best constant box for the words left, right, middle, top and bottom;
- where a photograph has several of a category, how often the mask lies on the right one, next to chance;
- how often a sentence about something absent gets a mask, and how well the score tells present from absent, with the
  threshold that separates them best on the validation's photographs;
- names that no sentence of the training had;
- `wordings.json`: eight ways to ask for each of twelve things, written by hand.
"""

import argparse
import json
import re
from collections.abc import Sequence
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from PIL import Image
from scenes import Photographs, PhotoScene, PhotoScenes
from sentences import KIND_WEIGHTS, Expression, express, say_absent
from tqdm import tqdm
from transformers import AutoModelForImageSegmentation, AutoProcessor

import modeling_restr  # noqa: F401  (registers ReSTR with the Auto classes)
from modeling_restr.arguments import ArgumentParser, add_options, choose_device, positive_int
from modeling_restr.data.records import read_json
from modeling_restr.evaluation.counts import predict_masks
from modeling_restr.metrics import ReferringIoU
from modeling_restr.visualization import add_legend, arrange_in_grid, draw_masks, save_image


THRESHOLD = 0.5
SEED = 1_000_003
SCENE_SIZE = 352  # pixels, the longer side
PLACE_WORDS = ("left", "right", "center", "top", "bottom")  # "middle" counts as "center"
AMONG_SEVERAL = "place or order, among several"
BOX_GRID = 16  # the corners of constant boxes lie on a grid of so many cells
FREE_LICENSES = ("Attribution License", "Attribution-ShareAlike License", "No known copyright restrictions")
WORDINGS = Path(__file__).with_name("wordings.json")
# Names that the generator never uses.
UNHEARD = {
    "person": ("fellow", "pedestrian", "bloke"),
    "dog": ("hound", "canine"),
    "cat": ("tabby", "pet"),
    "car": ("sedan", "taxi"),
    "bicycle": ("cycle",),
    "motorcycle": ("scooter", "moped"),
    "airplane": ("aircraft", "airliner"),
    "boat": ("vessel", "canoe"),
    "couch": ("settee", "loveseat"),
    "cup": ("teacup", "beaker"),
    "tv": ("telly", "flatscreen"),
    "horse": ("stallion", "mare"),
    "bed": ("cot",),
    "clock": ("timepiece",),
    "shoes": ("footwear", "slippers"),
    "pants": ("slacks",),
    "hat": ("beanie",),
    "coat": ("overcoat", "parka"),
}


class Described(NamedTuple):
    """A photograph as it is, with its sentences; and a sentence about what it lacks, where that is known."""

    scene: PhotoScene
    expressions: list[Expression]
    absent: str | None


class Answer(NamedTuple):
    """What a model answers to one sentence: a mask (height, width) bool and its score."""

    mask: np.ndarray
    score: float


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description="Evaluate a model on held-out photographs.")
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument(
        "--photos", type=Path, nargs="+", required=True, help="folders with instances.json and images/"
    )
    parser.add_argument(
        "--expressions_per_image",
        type=positive_int,
        default=8,
        metavar="N",
        help="at most N sentences per image (default: 8)",
    )
    parser.add_argument("--wordings", type=Path, default=WORDINGS, help="JSON file of wordings (default: ours)")
    output_dir = {"help": "folder for evaluation.json and sheet.png, the first photographs that may be shown"}
    add_options(parser, "revision", "device", "num_threads", output_dir=output_dir)
    return parser.parse_args(arguments)


# --- Sentences and the control of constant boxes ----------------------------------------------------------------------


def describe(photographs: Photographs, count: int) -> list[Described]:
    """Each photograph about which something can be said."""
    scenes = PhotoScenes(photographs, len(photographs), SCENE_SIZE, SEED, augment=False)
    names = sorted({name for photograph in photographs for name in photograph.categories})
    described = []
    for index, image_id in enumerate(photographs.image_ids):
        rng = np.random.default_rng((SEED, image_id))
        if expressions := express(scenes[index], rng, count):
            described.append(Described(scenes[index], expressions, say_absent(scenes[index], names, rng)))
    return described


def place_words(text: str) -> frozenset[str]:
    return frozenset(PLACE_WORDS) & set(re.findall(r"[a-z]+", text.replace("most", " ").replace("middle", "center")))


class ConstantBoxes:
    """The box that fits best, on average, what the training's sentences with the same place words refer to."""

    def __init__(self, described: list[Described]):
        edges = range(BOX_GRID + 1)
        sides = [(start, end) for start in edges for end in edges if start < end]
        self.boxes = np.array([(x0, y0, x1, y1) for x0, x1 in sides for y0, y1 in sides])
        totals: dict[frozenset[str], np.ndarray] = {}
        for scene, expressions, _ in described:
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


# --- Answers ----------------------------------------------------------------------------------------------------------


def ask(model: Any, processor: Any, image: np.ndarray, texts: list[str]) -> list[Answer]:
    """An answer per sentence, the mask of the image's own size; the image is encoded once."""
    results = predict_masks(model, processor, Image.fromarray(image), texts, threshold=THRESHOLD)
    return [Answer(result["mask"].cpu().numpy(), float(result["score"])) for result in results]


def count(scene: PhotoScene, expressions: list[Expression], masks: list[np.ndarray]) -> list[dict[str, int]]:
    targets = [scene.masks[expression.target] for expression in expressions]
    return [ReferringIoU.counts(mask, target) for mask, target in zip(masks, targets)]


def find_groups(scene: PhotoScene, expression: Expression) -> set[str]:
    """What the results of an expression count for."""
    is_one_of_several = scene.categories.count(scene.categories[expression.target]) > 1
    needs_place = is_one_of_several and expression.kind in ("place", "order")
    return {"all", expression.kind, *([AMONG_SEVERAL] if needs_place else [])}


def find_nearest(scene: PhotoScene, mask: np.ndarray, members: list[int]) -> int | None:
    """The one of `members` that a mask overlaps most, by IoU; None where it overlaps none."""
    ious = [(mask & scene.masks[i]).sum() / max((mask | scene.masks[i]).sum(), 1) for i in members]
    return members[int(np.argmax(ious))] if max(ious) > 0 else None


def say_unheard(scene: PhotoScene) -> list[Expression]:
    """Sentences of a single name that no training had, about what there is one of."""
    expressions = []
    for target, category in enumerate(scene.categories):
        if scene.categories.count(category) == 1 and category not in scene.unclear_categories:
            expressions += [Expression(name, "category", target) for name in UNHEARD.get(category, ())]
    return expressions


class Results:
    """Collects counts of sentences, for the model and the controls."""

    def __init__(self) -> None:
        self.groups_of: list[set[str]] = []
        self.counts: dict[str, list[dict[str, int]]] = {}
        self.is_right: list[tuple[bool, float]] = []  # among several: whether it is the right one, and by chance
        self.scores: dict[str, list[float]] = {"present": [], "absent": []}
        self.has_mask: list[bool] = []
        self.unheard: list[dict[str, int]] = []

    def add(self, name: str, counts: list[dict[str, int]]) -> None:
        self.counts.setdefault(name, []).extend(counts)

    def look_among_several(self, scene: PhotoScene, expression: Expression, mask: np.ndarray) -> None:
        category = scene.categories[expression.target]
        members = [index for index, name in enumerate(scene.categories) if name == category]
        if len(members) > 1 and expression.kind in ("place", "order"):
            self.is_right.append((find_nearest(scene, mask, members) == expression.target, 1 / len(members)))


def evaluate(model: Any, processor: Any, described: list[Described], boxes: ConstantBoxes | None) -> Results:
    """The model's answers; without `boxes` only what the score's threshold is chosen on."""
    results = Results()
    for index, (scene, expressions, absent) in enumerate(tqdm(described, unit="photo")):
        others = [expression.text for expression in described[(index + 1) % len(described)].expressions]
        texts = [expression.text for expression in expressions]
        questions = {
            "model": texts,
            "other sentence": [others[number % len(others)] for number in range(len(texts))],
            "bare category": [scene.categories[expression.target] for expression in expressions],
        }
        unheard = say_unheard(scene)
        rest = [*([absent] if absent else []), *(expression.text for expression in unheard)]
        asked = [text for part in questions.values() for text in part] if boxes else texts
        answers = ask(model, processor, scene.image, [*asked, *rest])
        own, more = answers[: len(texts)], answers[len(asked) :]
        if absent:
            results.scores["absent"].append(more[0].score)
            results.has_mask.append(bool(more[0].mask.any()))
            present = [answer.score for e, answer in zip(expressions, own) if e.kind == "category"]
            results.scores["present"] += present[:1]  # as many of each
        if boxes is None:
            continue
        results.groups_of += [find_groups(scene, expression) for expression in expressions]
        for number, name in enumerate(questions):
            part = answers[number * len(texts) : (number + 1) * len(texts)]
            results.add(name, count(scene, expressions, [answer.mask for answer in part]))
        results.add(
            "constant box", count(scene, expressions, [boxes.draw(text, scene.image.shape[:2]) for text in texts])
        )
        for expression, answer in zip(expressions, own):
            results.look_among_several(scene, expression, answer.mask)
        results.unheard += count(scene, unheard, [answer.mask for answer in more[bool(absent) :]])
    return results


# --- Summaries --------------------------------------------------------------------------------------------------------


def summarize_counts(counts: list[dict[str, int]]) -> dict[str, float]:
    """Number, mean IoU, overall IoU and precision@0.5, in percent."""
    results = ReferringIoU(keep_in_memory=True).compute(predictions=counts)
    names = ("mean_iou", "overall_iou", "precision@0.5")
    return {"sentences": results["num_expressions"]} | {name: round(100 * results[name], 1) for name in names}


def summarize_groups(results: Results) -> dict[str, dict[str, dict[str, float]]]:
    groups = {name: [name in found for found in results.groups_of] for name in ("all", *KIND_WEIGHTS, AMONG_SEVERAL)}
    return {
        source: {
            name: summarize_counts(list(compress(counts, selected)))
            for name, selected in groups.items()
            if any(selected)
        }
        for source, counts in results.counts.items()
    }


def area_under_curve(present: list[float], absent: list[float]) -> float:
    """The chance that something present has a higher score than something absent; ties count half."""
    gaps = np.subtract.outer(np.array(present), np.array(absent))
    return float((gaps > 0).mean() + 0.5 * (gaps == 0).mean())


def choose_score_threshold(scores: dict[str, list[float]]) -> float:
    """The score from which something counts as present: the one with the best balanced accuracy."""
    candidates = np.round(np.arange(0.5, 1.0, 0.01), 2)
    present, absent = np.array(scores["present"]), np.array(scores["absent"])
    accuracies = [(present >= c).mean() + (absent < c).mean() for c in candidates]
    return float(candidates[int(np.argmax(accuracies))])


def summarize_absent(results: Results, threshold: float) -> dict[str, float]:
    present, absent = results.scores["present"], results.scores["absent"]
    return {
        "sentences": len(absent),
        "with_a_mask": round(100 * float(np.mean(results.has_mask)), 1),
        "auroc_of_the_score": round(100 * area_under_curve(present, absent), 1),
        "score_threshold": threshold,
        "absent_below_it": round(100 * float(np.mean(np.array(absent) < threshold)), 1),
        "present_from_it": round(100 * float(np.mean(np.array(present) >= threshold)), 1),
    }


def evaluate_wordings(model: Any, processor: Any, photographs: Photographs, path: Path) -> dict[str, Any]:
    """The IoU of each wording with what it asks for, and the shares that find it."""
    by_id = {photograph.image_id: photograph for photograph in photographs}
    things, ious, is_nearest = [], [], []
    for entry in json.loads(path.read_text(encoding="utf-8")):
        photograph = by_id[entry["image_id"]]
        scene = PhotoScenes(Photographs([photograph]), 1, SCENE_SIZE, SEED, augment=False)[0]
        photograph_masks = photograph.masks
        answers = ask(model, processor, photograph.image, entry["wordings"])
        target = photograph_masks[entry["instance"]]
        found = [float((a.mask & target).sum() / (a.mask | target).sum()) for a in answers]
        everything = list(range(len(scene.categories)))
        scene_target = find_nearest(scene, _fit(target, scene.image.shape[:2]), everything)
        nearest = [find_nearest(scene, _fit(a.mask, scene.image.shape[:2]), everything) for a in answers]
        is_nearest += [index == scene_target for index in nearest]
        ious += found
        wordings = {text: round(iou, 2) for text, iou in zip(entry["wordings"], found)}
        things.append(
            {"image_id": entry["image_id"], "what": photograph.categories[entry["instance"]], "iou": wordings}
        )
    return {
        "wordings": len(ious),
        "on_the_right_one": round(100 * float(np.mean(is_nearest)), 1),
        "precision@0.5": round(100 * float(np.mean(np.array(ious) >= 0.5)), 1),
        "mean_iou": round(100 * float(np.mean(ious)), 1),
        "things": things,
    }


def _fit(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return np.asarray(Image.fromarray(mask).resize(size[::-1]))


def format_table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    controls = [name for name in results if name != "model"]
    lines = [
        f"| sentences | number | mean IoU | overall IoU | P@0.5 | {' | '.join(f'mean IoU, {c}' for c in controls)} |",
        "|---|---|---|---|---|" + "---|" * len(controls),
    ]
    for name, row in results["model"].items():
        cells = [f"{row['sentences']:,}", row["mean_iou"], row["overall_iou"], row["precision@0.5"]]
        cells += [results[control][name]["mean_iou"] for control in controls]
        lines.append(f"| {name} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


# --- The sheet --------------------------------------------------------------------------------------------------------


def draw_sheet(
    folders: list[Path],
    described: list[Described],
    photographs: Photographs,
    model: Any,
    processor: Any,
    columns: int = 4,
    rows: int = 3,
) -> tuple[Image.Image, list[str]]:
    """The first test photographs that may be shown, by their ids, with the first two sentences each; their credits."""
    free = {
        image["id"]: f"{image['flickr_url']} ({image['license']})"
        for folder in folders
        for image in read_json(folder / "instances.json")["images"]
        if image.get("license") in FREE_LICENSES and image.get("flickr_url")
    }
    scenes = PhotoScenes(photographs, len(photographs), SCENE_SIZE, SEED, augment=False)
    tiles, credits = [], []
    for index in np.argsort(photographs.image_ids):
        image_id = photographs.image_ids[index]
        expressions = express(scenes[index], np.random.default_rng((SEED, image_id)), 2) if image_id in free else []
        if not expressions:
            continue
        texts = [expression.text for expression in expressions]
        masks = [Image.fromarray(answer.mask) for answer in ask(model, processor, scenes[index].image, texts)]
        tiles.append(add_legend(draw_masks(Image.fromarray(scenes[index].image), masks), texts))
        credits.append(free[image_id])
        if len(tiles) == columns * rows:
            break
    return arrange_in_grid(tiles, columns), credits


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_args(arguments)
    options = {"revision": args.revision} if args.revision else {}
    model = AutoModelForImageSegmentation.from_pretrained(args.model, **options).eval().to(choose_device(args))
    processor = AutoProcessor.from_pretrained(args.model, **options)
    parts = {part: Photographs.load(args.photos, part) for part in ("test", "validation", "train")}
    described = {part: describe(photographs, args.expressions_per_image) for part, photographs in parts.items()}
    threshold = choose_score_threshold(evaluate(model, processor, described["validation"], None).scores)
    results = evaluate(model, processor, described["test"], ConstantBoxes(described["train"]))
    groups = summarize_groups(results)
    right, chance = np.array(results.is_right).mean(0)
    content = {
        "model": {"name": Path(args.model).name},
        "data": f"{len(described['test'])} test photographs, sentences generated with seed {SEED}, {SCENE_SIZE} pixels",
        "threshold": THRESHOLD,
        "results": groups,
        "among_several": {
            "sentences": len(results.is_right),
            "right": round(100 * right, 1),
            "chance": round(100 * chance, 1),
        },
        "absent": summarize_absent(results, threshold),
        "unheard_names": summarize_counts(results.unheard),
        "wordings": evaluate_wordings(model, processor, parts["test"], args.wordings),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    print(format_table(groups))
    print(json.dumps({name: value for name, value in content.items() if name != "results"}, indent=2))
    if args.output_dir:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        (args.output_dir / "evaluation.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        sheet, credits = draw_sheet(args.photos, described["test"], parts["test"], model, processor)
        save_image(sheet, args.output_dir / "sheet.png")
        print("The sheet's photographs, row by row:", *credits, sep="\n")


if __name__ == "__main__":
    main()
