"""
The model card: README.md of a model's folder, filled from the template model_card.md. Its results come from evaluation
files of the very weights in the folder, and from nowhere else.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.hf_api import RepoFile
from PIL import Image, ImageOps

from ..modeling_restr import ReSTRForImageSegmentation
from ..pipeline_restr import ReSTRPipeline
from ..processing_restr import ReSTRProcessor
from ..visualization import add_legend, draw_masks, save_image
from .bundle import hash_file, hash_weights


MODEL_ID_PLACEHOLDER = "path/or/id"
# Overall IoU of ReSTR in percent, as published (arXiv 2203.16768), by benchmark and split.
PAPER_OVERALL_IOU = {
    "refcoco": {"val": 67.22, "testA": 69.30, "testB": 64.45},
    "refcoco+": {"val": 55.78, "testA": 60.44, "testB": 48.27},
    "refcocog": {"val": 54.48},
}
_BENCHMARK_TITLES = {"refcoco": "RefCOCO", "refcoco+": "RefCOCO+", "refcocog": "RefCOCOg (google)"}
_METRIC_TITLES = {
    "overall_iou": "overall IoU",
    "mean_iou": "mean IoU",
    **{f"precision@0.{tenth}": f"Precision@0.{tenth}" for tenth in range(5, 10)},
    "gIoU": "gIoU",
    "N-acc": "N-acc",
    "T-acc": "T-acc",
    "mean_iou_of_constant_box": "mean IoU, best constant box",
    "mean_iou_of_other_sentences": "mean IoU, sentence of another scene",
}
_CONTROLS = (
    "mean_iou_of_constant_box",
    "mean_iou_of_other_sentences",
)  # what to compare with; no results of the model
_METRIC = re.compile(
    r"(?<![a-z])[a-z]?iou(?![a-z])|intersection.over.union|precision ?@|(?<![a-z])pr?@|accuracy|(?<![a-z])dice(?![a-z])",
    re.IGNORECASE,
)
_SHARE = re.compile(r"\d\s*(%|per ?cent)", re.IGNORECASE)
_NAMES = ("dataset", "split", "start")  # of the recipe: what others have called their things
_WEIGHTS_LINE = re.compile(r"^- `([^`]+)`: SHA-256 `([0-9a-f]{64})`$", re.MULTILINE)


@dataclass(frozen=True)
class Example:
    """A photograph to show a model with. `credit` says whose it is and under which licence it may be shown."""

    photo: str | os.PathLike
    texts: Sequence[str]
    credit: str

    @property
    def file_name(self) -> str:
        return f"example{Path(self.photo).suffix.lower()}"


@dataclass(frozen=True)
class _Result:
    """What an evaluation found on one split, or for one kind of its sentences; metrics in percent."""

    data: str
    data_id: str
    split: str
    metrics: dict[str, float]
    num_expressions: int
    threshold: float
    conditions: str
    fingerprint: str | None = None
    paper: float | None = None
    in_index: bool = True


def write_model_card(
    folder: str | os.PathLike,
    *,
    model_id: str | None = None,
    training: Mapping[str, Any] | None = None,
    evaluations: Sequence[str | os.PathLike] = (),
    data: str | None = None,
    datasets: Sequence[str] = (),
    base_model: str | None = None,
    license: str | None = "apache-2.0",
    limits: str | None = None,
    example: Example | None = None,
    figures: Mapping[str | os.PathLike, str] | None = None,
    space: str | None = None,
) -> Path:
    """
    Write the card of a saved model, README.md, and with an `example` the pictures that it shows.

    Args:
        folder (`str` or `os.PathLike`): The model's folder, of [`save_bundle`] or `save_pretrained`.
        model_id (`str`, *optional*): Its id on the Hub; [`push_to_hub`] fills it in where it is left out.
        training (`Mapping[str, Any]`, *optional*): The recipe: settings and their values, as a table shows them.
        evaluations (`Sequence[str | os.PathLike]`):
            JSON files of examples/evaluate_refcoco.py, evaluate_drawn_scenes.py or evaluate_photographs.py. All results
            in the card and in its `model-index` are theirs.
        data (`str`, *optional*): Markdown on what the weights were trained on, and under which terms.
        datasets (`Sequence[str]`): Ids of these datasets on the Hub.
        base_model (`str`, *optional*): Id of the model on the Hub that the training started from.
        license (`str`, *optional*, defaults to `"apache-2.0"`): Of the weights, as the Hub names it.
        limits (`str`, *optional*): Markdown on limits beyond those of every ReSTR.
        example ([`Example`], *optional*): What to show the model with; the model is run on it.
        figures (`Mapping[str | os.PathLike, str]`, *optional*): Pictures of results and what to say of each (Markdown,
            with the credits of what they show).
        space (`str`, *optional*): Id of a Space that runs the model.

    Returns:
        `Path`: The card.

    Raises:
        `ValueError`: An evaluation is of other weights than the folder's, is of no known form, or there are two of one
            split; results stand among `training`, `data`, `limits` or what is said of `figures`; or the example cannot be shown.
    """
    folder = Path(folder)
    options = {"model_id": model_id, "data": data, "limits": limits, "space": space}
    card = build_model_card(
        folder,
        training=training,
        evaluations=evaluations,
        example=example,
        figures=figures,
        card_data={"license": license, "base_model": base_model, "datasets": list(datasets) or None},
        **options,
    )
    if example is not None:
        _draw_example(folder, example)
    for figure in figures or {}:
        _copy(Path(figure), folder / Path(figure).name)
    path = folder / "README.md"
    temporary = path.with_name(f".{path.name}.tmp")
    card.save(temporary)
    os.replace(temporary, path)
    return path


def build_model_card(
    folder: Path | None,
    *,
    training: Mapping[str, Any] | None = None,
    evaluations: Sequence[str | os.PathLike] = (),
    example: Example | None = None,
    figures: Mapping[str | os.PathLike, str] | None = None,
    card_data: Mapping[str, Any] | None = None,
    **options: Any,
) -> ModelCard:
    """The card of [`write_model_card`], in memory and without its pictures; without a folder that of any ReSTR."""
    captions = {Path(figure).name: caption for figure, caption in (figures or {}).items()}
    texts = {**captions, "data": options.get("data"), "limits": options.get("limits")}
    if example is not None:
        texts["credit"] = example.credit
    _check_no_results(training or {}, texts)
    results = [] if folder is None else _read_evaluations(folder, evaluations)
    model_id = options.get("model_id")
    values = dict(card_data or {})
    name = model_id.rpartition("/")[2] if model_id else "ReSTR"
    if results:
        values |= {"model_name": name, "eval_results": _to_eval_results(results)}
        values["metrics"] = list(dict.fromkeys(result.metric_type for result in values["eval_results"]))
    if example is not None:
        values["widget"] = _describe_widget(example)
        code = json.dumps(list(example.texts), ensure_ascii=False)
        options |= {"texts": example.texts, "code": code, "credit": example.credit, "photo": example.file_name}
    evaluation = _format_results(results)
    if folder is not None and (results or captions or example is not None):
        shown = [f"![{_to_alt_text(caption)}]({name})\n\n{caption}" for name, caption in captions.items()]
        evaluation = "\n\n".join([evaluation or "Not evaluated.", *shown, _format_weights(folder)])
    return ModelCard.from_template(
        ModelCardData(**values),
        template_path=str(find_template()),
        model_name=name,
        training_data=_format_training(training),
        evaluation=evaluation,
        **({} if folder is None else _describe_inputs(folder)),
        **options,
    )


def find_template() -> Path:
    """The template: beside this file where the package is built (`setup.py`), at the root of a clone."""
    built = Path(__file__).with_name("model_card.md")
    return built if built.exists() else Path(__file__).parents[2] / "model_card.md"


def check_card(text: str, folder: Path) -> None:
    """
    Make sure that a card with results or pictures is of the weights in a folder.

    Raises:
        `ValueError`: It is of others.
    """
    told = dict(_WEIGHTS_LINE.findall(text))
    if told and told != hash_weights(folder):
        raise ValueError(
            "The model card tells of other weights than those that go with it. Evaluate these, and write their card "
            "with write_model_card."
        )


def _format_weights(folder: Path) -> str:
    lines = [f"- `{name}`: SHA-256 `{digest}`" for name, digest in hash_weights(folder).items()]
    return "\n".join(["The results and pictures of this card are those of these weights:", "", *lines])


def _check_no_results(training: Mapping[str, Any], texts: Mapping[str, str | None]) -> None:
    """Results come from evaluation files alone: no numbers beside a metric's name, and in what is said no shares."""
    settings = {name: f"{name} {value}" for name, value in training.items() if name not in _NAMES}
    found = [name for name, text in settings.items() if _METRIC.search(text) and re.search(r"\d", text)]
    found += [
        name
        for name, text in texts.items()
        if text and ((_METRIC.search(text) and re.search(r"\d", text)) or _SHARE.search(text))
    ]
    if found:
        text = {**settings, **texts}[found[0]]
        raise ValueError(
            f"{found[0]!r} has a result: {text!s:.200}. Results get into the card through the JSON files of an "
            f"evaluation (`evaluations`) alone."
        )


def _read_evaluations(folder: Path, paths: Iterable[str | os.PathLike]) -> list[_Result]:
    results: list[_Result] = []
    for path in map(Path, paths):
        evaluation = json.loads(path.read_text(encoding="utf-8"))
        reader = next((reader for key, reader in _READERS.items() if key in evaluation), None)
        if reader is None:
            raise ValueError(
                f"{path} is no evaluation: expected a JSON file of examples/evaluate_refcoco.py (results.json) or "
                f"examples/evaluate_drawn_scenes.py or evaluate_photographs.py, got the keys {sorted(evaluation)}."
            )
        _check_same_weights(folder, path, evaluation.get("model", {}))
        found = reader(evaluation)
        known = {(result.data, result.split) for result in results}
        if any((result.data, result.split) in known for result in found):
            raise ValueError(f"{path}: there is another evaluation on {found[0].data}, {found[0].split}. Pass one.")
        results += found
    return results


def _check_same_weights(folder: Path, path: Path, model: Mapping[str, Any]) -> None:
    """Compare the files that an evaluation recorded, by hash or by commit, with those in the folder."""
    revision = model.get("revision")
    ours = hash_weights(folder)
    if isinstance(revision, str):  # a commit on the Hub
        infos = HfApi().get_paths_info(model["name"], [*ours], revision=revision)
        recorded = {info.path: info.lfs.sha256 for info in infos if isinstance(info, RepoFile) and info.lfs}
    elif isinstance(revision, dict):
        recorded = revision
        ours |= {name: hash_file(folder / name) for name in recorded if (folder / name).is_file()}
    else:
        raise ValueError(f"{path} does not say which weights were evaluated: evaluate the model once more.")
    different = sorted(name for name in {*ours, *recorded} if ours.get(name) != recorded.get(name))
    if different:
        raise ValueError(
            f"{path} is of another model than {folder}: {', '.join(different)} differ. Evaluate this one, after the "
            f"last change to its files."
        )


def _read_split(evaluation: Mapping[str, Any]) -> list[_Result]:
    """An evaluation of examples/evaluate_refcoco.py, whose metrics are fractions."""
    data, metrics = evaluation["data"], evaluation["metrics"]
    height, width = evaluation["image_size"]
    benchmark, split = data.get("benchmark"), evaluation["split"]
    name = _without_folders(data["name"])
    is_benchmark = benchmark is not None and not data["differences"]
    return [
        _Result(
            data=_BENCHMARK_TITLES[benchmark] if is_benchmark else name,
            data_id=benchmark if is_benchmark else name,
            split=split,
            metrics={key: 100 * metrics[key] for key in _METRIC_TITLES if metrics.get(key) is not None},
            num_expressions=metrics["num_expressions"],
            threshold=evaluation["threshold"],
            conditions=f"images' own size, input {height}x{width}, {evaluation['dtype']}",
            fingerprint=data["fingerprint"],
            paper=PAPER_OVERALL_IOU[benchmark].get(split) if is_benchmark else None,
        )
    ]


def _read_kinds(evaluation: Mapping[str, Any]) -> list[_Result]:
    """An evaluation of examples/evaluate_drawn_scenes.py or evaluate_photographs.py: all, then each kind of sentence."""
    controls = {"mean_iou_of_other_sentences": evaluation["results_with_sentences_of_another_scene"]}
    if "results_of_the_best_constant_box" in evaluation:
        controls["mean_iou_of_constant_box"] = evaluation["results_of_the_best_constant_box"]
        data, data_id, conditions = evaluation["data"], "held-out-photographs", "that size"
    else:
        background = "photographs and drawn backgrounds" if evaluation["photographs"] else "drawn backgrounds"
        data, data_id, conditions = f"{evaluation['data']}, {background}", "drawn-scenes", "scenes' own size"
    return [
        _Result(
            data=data,
            data_id=data_id,
            split=kind,
            metrics={name: value for name, value in values.items() if name in _METRIC_TITLES}
            | {name: control[kind]["mean_iou"] for name, control in controls.items()},
            num_expressions=values["sentences"],
            threshold=evaluation["threshold"],
            conditions=conditions,
            in_index=kind == "all",
        )
        for kind, values in evaluation["results"].items()
    ]


_READERS = {"metrics": _read_split, "results": _read_kinds}


def _to_eval_results(results: Iterable[_Result]) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="image-segmentation",
            task_name="Referring image segmentation",
            dataset_type=result.data_id,
            dataset_name=result.data,
            dataset_split=result.split,
            dataset_args={"fingerprint": result.fingerprint} if result.fingerprint else None,
            metric_type=metric.lower(),
            metric_name=f"{_METRIC_TITLES[metric]} (percent, {result.conditions}, threshold {result.threshold})",
            metric_value=round(value, 2),
        )
        for result in results
        if result.in_index
        for metric, value in result.metrics.items()
        if metric not in _CONTROLS
    ]


def _format_results(results: Sequence[_Result]) -> str:
    if not results:
        return ""
    metrics = [metric for metric in _METRIC_TITLES if any(metric in result.metrics for result in results)]
    with_paper = any(result.paper is not None for result in results)
    head = [
        "data",
        "split or kind",
        *(_METRIC_TITLES[metric] for metric in metrics),
        "expressions",
        "threshold",
        "measured at",
    ]
    if with_paper:
        head.append("*overall IoU of the paper's own model*")
    rows = []
    for result in results:
        numbers = [f"{result.metrics[metric]:.2f}" if metric in result.metrics else "" for metric in metrics]
        row = [result.data, result.split, *numbers, f"{result.num_expressions:,}", str(result.threshold)]
        row.append(result.conditions)
        if with_paper:
            row.append("" if result.paper is None else f"*{result.paper:.2f}*")
        rows.append(row)
    text = _METRICS + (_PAPER if with_paper else "")
    return f"{text}\n\n{_format_table(head, rows)}"


_METRICS = (
    "Percent. Overall IoU is the sum of all intersections over the sum of all unions; mean IoU is the mean of the "
    "expressions' own; Precision@X is the share of expressions whose IoU is X or more."
)
_PAPER = (
    " The last column is no result of these weights: it is what the paper reports of its own, which were never "
    "published (arXiv 2203.16768)."
)


def _format_training(training: Mapping[str, Any] | None) -> str:
    if not training:
        return ""
    rows = [[f"`{name}`", _without_folders(str(value))] for name, value in training.items()]
    return _format_table(["setting", "value"], rows)


def _without_folders(text: str) -> str:
    """The folders of somebody's machine are nobody's business."""
    return Path(text).name if Path(text).is_absolute() else text


def _format_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _describe_inputs(folder: Path) -> dict[str, Any]:
    """What the card says of the words and images that the model takes."""
    processor: Any = ReSTRProcessor.from_pretrained(folder)
    size = processor.image_processor.size
    return {
        "vocabulary_size": len(processor.tokenizer),
        "num_words": processor.tokenizer.model_max_length,
        "image_size": f"{size['height']}x{size['width']}",
    }


def _describe_widget(example: Example) -> list[dict[str, Any]]:
    """An example for each sentence, with the picture of its answer."""
    if Path(example.photo).suffix.lower() not in (".jpg", ".jpeg", ".png"):
        raise ValueError(f"Expected a photograph as .jpg, .jpeg or .png, got {example.photo}.")
    if not example.texts or not example.credit.strip():
        raise ValueError("Expected an example with at least one sentence, and with the photograph's credit.")
    return [
        {"src": example.file_name, "text": text, "example_title": text, "output": {"url": f"example_{number}.png"}}
        for number, text in enumerate(example.texts, start=1)
    ]


def _to_alt_text(caption: str) -> str:
    """The first sentence of a caption, without Markdown's brackets."""
    return re.sub(r"[\[\]\n]", " ", caption.split(". ")[0]).strip()


def _copy(path: Path, target: Path) -> None:
    if not (target.exists() and target.samefile(path)):
        shutil.copyfile(path, target)


def _draw_example(folder: Path, example: Example) -> None:
    """Copy the photograph, and draw what the model finds in it: all sentences in one picture, and each in its own."""
    photo = folder / example.file_name
    _copy(Path(example.photo), photo)
    model = ReSTRForImageSegmentation.from_pretrained(folder).eval()
    pipe = ReSTRPipeline(model=model, processor=ReSTRProcessor.from_pretrained(folder))
    masks = [result["mask"] for result in pipe(str(photo), text=list(example.texts))]
    with Image.open(photo) as opened:
        image = ImageOps.exif_transpose(opened).convert("RGB")
    save_image(add_legend(draw_masks(image, masks), example.texts), folder / "example_overlay.png")
    for number, (text, mask) in enumerate(zip(example.texts, masks), start=1):
        save_image(add_legend(draw_masks(image, [mask]), [text]), folder / f"example_{number}.png")


__all__ = ["PAPER_OVERALL_IOU", "Example", "check_card", "write_model_card"]
