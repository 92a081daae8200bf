"""
Evaluate a model on photographs held out from restr-mini's training, with generated sentences, at 352 pixels:

    python examples/restr_mini/evaluation.py examples/restr_mini --photos PHOTOS --photos MORE_PHOTOS \\
        --output_dir runs/evaluation

PHOTOS are folders with `instances.json` (COCO's layout) and `images/`. The report on the test's photographs has:

- mean IoU, overall IoU and precision@0.5 for each kind of sentence, next to three controls: the sentence of another
  photograph, the bare category, and the best constant box for the words left, right, middle, top and bottom;
- how often the mask is on the right one of several instances of a category, compared with chance;
- how often a sentence about something absent gets a mask, and how well the score tells present from absent, with the
  threshold that separates them best on the validation's photographs;
- names that no sentence of the training has;
- `wordings.json`: eight hand-written ways to ask for each of twelve things.
"""

import re
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import transformers
import typer
from PIL import Image
from scenes import Photographs, PhotoScene, PhotoScenes
from sentences import KIND_WEIGHTS, Expression, express, say_absent
from tqdm import tqdm
from transformers import AutoModelForImageSegmentation, AutoProcessor

import modeling_restr  # noqa: F401  (registers ReSTR with the Auto classes)
from modeling_restr.data.records import read_json
from modeling_restr.evaluation.counts import predict_masks
from modeling_restr.files import write_json
from modeling_restr.metrics import ReferringIoU
from modeling_restr.options import Device, Model, NumThreads, Revision, choose_device, run
from modeling_restr.visualization import arrange_in_grid, draw_tile, save_image


THRESHOLD = 0.5
SEED = 1_000_003
SCENE_SIZE = 352  # longer side in pixels
PLACE_WORDS = ("left", "right", "center", "top", "bottom")  # "middle" counts as "center"
AMONG_SEVERAL = "place or order, among several"
BOX_GRID = 16  # cells per side; the corners of constant boxes lie on this grid
FREE_LICENSES = ("Attribution License", "Attribution-ShareAlike License", "No known copyright restrictions")
WORDINGS = Path(__file__).with_name("wordings.json")
UNHEARD: dict[str, list[str]] = read_json(Path(__file__).with_name("unheard_names.json"))

Counts = dict[str, int]  # pixels: "intersection" and "union"


class Described(NamedTuple):
    """A photograph with its sentences, and a sentence about something that it is known to lack, if any."""

    scene: PhotoScene
    expressions: list[Expression]
    absent: str | None


class Answer(NamedTuple):
    """A model's answer to one sentence: a mask (height, width) bool and its score."""

    mask: np.ndarray
    score: float


def describe(photographs: Photographs, count: int) -> list[Described]:
    """The photographs about which something can be said, with up to `count` sentences each."""
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
    """For each set of place words, the box with the highest mean IoU with the targets of training sentences."""

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
        """Draw the box for a sentence as a mask of `size` (height, width)."""
        x0, y0, x1, y1 = self.best.get(place_words(text), self.best[frozenset()])
        height, width = size
        mask = np.zeros(size, bool)
        mask[round(y0 * height) : round(y1 * height), round(x0 * width) : round(x1 * width)] = True
        return mask


def ask(model: Any, processor: Any, image: np.ndarray, texts: list[str]) -> list[Answer]:
    """One answer per sentence, with masks of the image's own size. The image is encoded once."""
    results = predict_masks(model, processor, Image.fromarray(image), texts, threshold=THRESHOLD)
    return [Answer(result["mask"].cpu().numpy(), float(result["score"])) for result in results]


def count_pixels(scene: PhotoScene, expressions: list[Expression], masks: list[np.ndarray]) -> list[Counts]:
    return [ReferringIoU.counts(mask, scene.masks[e.target]) for e, mask in zip(expressions, masks)]


def find_nearest(scene: PhotoScene, mask: np.ndarray, members: list[int]) -> int | None:
    """The instance among `members` with the highest IoU with a mask, or None if the mask overlaps none of them."""
    ious = [(mask & scene.masks[i]).sum() / max((mask | scene.masks[i]).sum(), 1) for i in members]
    return members[int(np.argmax(ious))] if max(ious) > 0 else None


def find_siblings(scene: PhotoScene, expression: Expression) -> list[int]:
    """All instances of the target's category, for a sentence that must tell them apart by place or order."""
    category = scene.categories[expression.target]
    members = [index for index, name in enumerate(scene.categories) if name == category]
    return members if len(members) > 1 and expression.kind in ("place", "order") else []


def say_unheard(scene: PhotoScene) -> list[Expression]:
    """Sentences that are a single name unknown to the training, for each category with one instance."""
    return [
        Expression(name, "category", target)
        for target, category in enumerate(scene.categories)
        if scene.categories.count(category) == 1 and category not in scene.unclear_categories
        for name in UNHEARD.get(category, ())
    ]


@dataclass
class Results:
    """The results of `evaluate`, one entry per sentence unless stated otherwise."""

    groups: list[set[str]] = field(default_factory=list)  # the rows of the table that a sentence counts for
    counts: dict[str, list[Counts]] = field(default_factory=dict)  # for the model and each control
    is_right: list[bool] = field(default_factory=list)  # for the sentences among several
    chance: list[float] = field(default_factory=list)  # likewise
    unheard: list[Counts] = field(default_factory=list)  # for the sentences of unheard names


def evaluate(model: Any, processor: Any, described: list[Described], boxes: ConstantBoxes) -> Results:
    results = Results()
    following = described[1:] + described[:1]
    for (scene, expressions, _), (_, others, _) in zip(tqdm(described, unit="photo"), following):
        unheard = say_unheard(scene)
        questions = {
            "model": [expression.text for expression in expressions],
            "other sentence": [others[number % len(others)].text for number in range(len(expressions))],
            "bare category": [scene.categories[expression.target] for expression in expressions],
            "unheard": [expression.text for expression in unheard],
        }
        answers = iter(ask(model, processor, scene.image, [text for texts in questions.values() for text in texts]))
        masks = {name: [next(answers).mask for _ in texts] for name, texts in questions.items()}
        results.unheard += count_pixels(scene, unheard, masks.pop("unheard"))
        masks["constant box"] = [boxes.draw(text, scene.image.shape[:2]) for text in questions["model"]]
        for name, found in masks.items():
            results.counts.setdefault(name, []).extend(count_pixels(scene, expressions, found))
        for expression, mask in zip(expressions, masks["model"]):
            siblings = find_siblings(scene, expression)
            results.groups.append({"all", expression.kind, *([AMONG_SEVERAL] if siblings else [])})
            if siblings:
                results.is_right.append(find_nearest(scene, mask, siblings) == expression.target)
                results.chance.append(1 / len(siblings))
    return results


@dataclass
class Scores:
    """Scores of sentences about something absent, and of sentences about something present in the same photographs."""

    absent: list[float] = field(default_factory=list)
    present: list[float] = field(default_factory=list)
    has_mask: list[bool] = field(default_factory=list)  # for the absent ones


def score_absent(model: Any, processor: Any, described: list[Described]) -> Scores:
    scores = Scores()
    for scene, expressions, absent in described:
        if absent is None:
            continue
        present = [expression.text for expression in expressions if expression.kind == "category"][:1]
        answer, *others = ask(model, processor, scene.image, [absent, *present])
        scores.absent.append(answer.score)
        scores.has_mask.append(bool(answer.mask.any()))
        scores.present += [other.score for other in others]
    return scores


def percent(values: Any) -> float:
    """The mean of shares or booleans, in percent."""
    return round(100 * float(np.mean(values)), 1)


def summarize_counts(counts: list[Counts]) -> dict[str, float]:
    """Number of sentences; mean IoU, overall IoU and precision@0.5 in percent."""
    results = ReferringIoU(keep_in_memory=True).compute(predictions=counts)
    names = ("mean_iou", "overall_iou", "precision@0.5")
    return {"sentences": results["num_expressions"]} | {name: percent(results[name]) for name in names}


def summarize_groups(results: Results) -> dict[str, dict[str, dict[str, float]]]:
    groups = {name: [name in found for found in results.groups] for name in ("all", *KIND_WEIGHTS, AMONG_SEVERAL)}
    return {
        source: {
            name: summarize_counts(list(compress(counts, selected)))
            for name, selected in groups.items()
            if any(selected)
        }
        for source, counts in results.counts.items()
    }


def area_under_curve(present: list[float], absent: list[float]) -> float:
    """The chance that something present has a higher score than something absent. Ties count half."""
    gaps = np.subtract.outer(np.array(present), np.array(absent))
    return float((gaps > 0).mean() + 0.5 * (gaps == 0).mean())


def choose_score_threshold(scores: Scores) -> float:
    """The score with the best balanced accuracy, if sentences with at least this score count as present."""
    candidates = np.round(np.arange(0.5, 1.0, 0.01), 2)
    present, absent = np.array(scores.present), np.array(scores.absent)
    accuracies = [(present >= c).mean() + (absent < c).mean() for c in candidates]
    return float(candidates[int(np.argmax(accuracies))])


def summarize_absent(scores: Scores, threshold: float) -> dict[str, float]:
    return {
        "sentences": len(scores.absent),
        "with_a_mask": percent(scores.has_mask),
        "auroc_of_the_score": percent(area_under_curve(scores.present, scores.absent)),
        "score_threshold": threshold,
        "absent_below_it": percent(np.array(scores.absent) < threshold),
        "present_from_it": percent(np.array(scores.present) >= threshold),
    }


def evaluate_wordings(model: Any, processor: Any, photographs: Photographs, path: Path) -> dict[str, Any]:
    """Measure the IoU of each wording's mask with its target, and the share of masks on the target."""
    by_id = {photograph.image_id: photograph for photograph in photographs}
    things, ious, is_nearest = [], [], []
    for entry in read_json(path):
        photograph = by_id[entry["image_id"]]
        scene = PhotoScenes(Photographs([photograph]), 1, SCENE_SIZE, SEED, augment=False)[0]
        size, everything = scene.image.shape[1::-1], list(range(len(scene.masks)))

        def find_instance(mask: np.ndarray, scene=scene, size=size, everything=everything) -> int | None:
            return find_nearest(scene, np.asarray(Image.fromarray(mask).resize(size)), everything)

        target = photograph.masks[entry["instance"]]
        masks = [answer.mask for answer in ask(model, processor, photograph.image, entry["wordings"])]
        found = [float((mask & target).sum() / (mask | target).sum()) for mask in masks]
        ious += found
        is_nearest += [find_instance(mask) == find_instance(target) for mask in masks]
        what = photograph.categories[entry["instance"]]
        iou_of = {text: round(iou, 2) for text, iou in zip(entry["wordings"], found)}
        things.append({"image_id": entry["image_id"], "what": what, "iou": iou_of})
    return {
        "wordings": len(ious),
        "on_the_right_one": percent(is_nearest),
        "precision@0.5": percent(np.array(ious) >= 0.5),
        "mean_iou": percent(ious),
        "things": things,
    }


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


def draw_sheet(
    folders: list[Path], photographs: Photographs, model: Any, processor: Any, num_photos: int = 12
) -> tuple[Image.Image, list[str]]:
    """Draw the first photographs with a free licence and their first two sentences. Returns the sheet and credits."""
    credit_of = {
        image["id"]: f"{image['flickr_url']} ({image['license']})"
        for folder in folders
        for image in read_json(folder / "instances.json")["images"]
        if image.get("license") in FREE_LICENSES and image.get("flickr_url")
    }
    tiles: list[Image.Image] = []
    credits: list[str] = []
    for photograph in sorted(photographs, key=lambda photograph: photograph.image_id):
        if photograph.image_id not in credit_of or len(tiles) == num_photos:
            continue
        for scene, expressions, _ in describe(Photographs([photograph]), 2):
            texts = [expression.text for expression in expressions]
            masks = [answer.mask for answer in ask(model, processor, scene.image, texts)]
            tiles.append(draw_tile(Image.fromarray(scene.image), masks, texts, SCENE_SIZE))
            credits.append(credit_of[photograph.image_id])
    return arrange_in_grid(tiles, columns=4), credits


def main(
    model: Model,
    photos: Annotated[list[Path], typer.Option(help="Folder with instances.json and images/. Repeatable.")],
    expressions_per_image: Annotated[int, typer.Option(min=1, help="Maximum sentences per image.")] = 8,
    wordings: Annotated[Path, typer.Option(help="JSON file of wordings.")] = WORDINGS,
    output_dir: Annotated[
        Path | None,
        typer.Option(help="Folder for evaluation.json and sheet.png.", show_default="none", rich_help_panel="Output"),
    ] = None,
    revision: Revision = None,
    device: Device = None,
    num_threads: NumThreads = None,
) -> None:
    """Evaluate a model on held-out photographs."""
    options = {"revision": revision} if revision else {}
    network = AutoModelForImageSegmentation.from_pretrained(model, **options).eval()
    network = network.to(choose_device(device, num_threads))
    processor = AutoProcessor.from_pretrained(model, **options)
    parts = {part: Photographs.load(photos, part) for part in ("test", "validation", "train")}
    test, validation, train = (describe(part, expressions_per_image) for part in parts.values())
    threshold = choose_score_threshold(score_absent(network, processor, validation))
    results = evaluate(network, processor, test, ConstantBoxes(train))
    groups, count = summarize_groups(results), len(results.is_right)
    content = {
        "model": {"name": Path(model).name},
        "data": f"{len(test)} test photographs, sentences generated with seed {SEED}, {SCENE_SIZE} pixels",
        "threshold": THRESHOLD,
        "results": groups,
        "among_several": {"sentences": count, "right": percent(results.is_right), "chance": percent(results.chance)},
        "absent": summarize_absent(score_absent(network, processor, test), threshold),
        "unheard_names": summarize_counts(results.unheard),
        "wordings": evaluate_wordings(network, processor, parts["test"], wordings),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    print(format_table(groups))
    if output_dir is not None:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_json(output_dir / "evaluation.json", content)
        sheet, credits = draw_sheet(photos, parts["test"], network, processor)
        save_image(sheet, output_dir / "sheet.png")
        print("The sheet's photographs, row by row:", *credits, sep="\n")


if __name__ == "__main__":
    run(main)
