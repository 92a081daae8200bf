"""The results of an evaluation as Markdown, next to the paper's."""

from typing import Any

from .benchmarks import BENCHMARKS


_TITLES = {
    "overall_iou": "overall IoU",
    "mean_iou": "mean IoU",
    **{f"precision@0.{tenth}": f"P@0.{tenth}" for tenth in range(5, 10)},
    **{name: name for name in ("gIoU", "N-acc", "T-acc")},
}


def format_report(results: dict[str, Any]) -> str:
    """
    Format a table of the results with the paper's numbers below them, and one by number of words if there are groups.

    Args:
        results: The result of `run_evaluation`, or the content of its `results.json`.
    """
    data, metrics = results["data"], results["metrics"]
    columns = [name for name in _TITLES if name in metrics]
    head = [
        f"| | {' | '.join(_TITLES[name] for name in columns)} | expressions |",
        "|---" + "|--:" * (len(columns) + 1) + "|",
    ]
    ours = f"{results['model']['name']} on {data['name']}, {results['split']}"
    lines = [_describe(results), "", *head, _format_row(ours, metrics, columns), *_format_paper_rows(results, columns)]
    lines += ["", "The paper's numbers are overall IoU as published (arXiv 2203.16768)."]
    if data["differences"]:
        differences = "; ".join(data["differences"])
        lines += ["", f"**Not comparable with these results**, because the data differs: {differences}."]
    elif data["benchmark"] is None:
        lines += ["", "`--benchmark` selects those to compare with, and checks that the data is complete."]
    if "by_num_words" in metrics:
        groups = metrics["by_num_words"].items()
        lines += ["", "By number of words:", "", *head, *(_format_row(name, group, columns) for name, group in groups)]
    return "\n".join(lines) + "\n"


def _describe(results: dict[str, Any]) -> str:
    data, (height, width) = results["data"], results["image_size"]
    text = (
        f"{data['expressions']:,} expressions about {data['references']:,} references in {data['images']:,} images, in"
        f" percent. Masks at the images' own size, probability above {results['threshold']}; input {height}x{width},"
        f" {results['dtype']}."
    )
    if "confidence_intervals" in results["metrics"]:
        text += " Brackets hold 95 % intervals by bootstrap over images."
    return text


def _format_paper_rows(results: dict[str, Any], columns: list[str]) -> list[str]:
    """The paper's result on the evaluated split, or all of its results if the benchmark is unknown."""
    name = results["data"]["benchmark"]
    evaluated_split = results["split"].partition("[")[0]
    return [
        _format_row(f"*the paper's ReSTR on {benchmark.title}, {split}*", {"overall_iou": overall_iou / 100}, columns)
        for benchmark in ([BENCHMARKS[name]] if name else BENCHMARKS.values())
        for split, overall_iou in benchmark.overall_iou.items()
        if name is None or split == evaluated_split
    ]


def _format_row(label: str, metrics: dict[str, Any], columns: list[str]) -> str:
    intervals = metrics.get("confidence_intervals", {})
    cells = []
    for name in columns:
        cell = "" if metrics.get(name) is None else f"{100 * metrics[name]:.2f}"
        if intervals.get(name):
            low, high = intervals[name]
            cell += f" [{100 * low:.2f}, {100 * high:.2f}]"
        cells.append(cell)
    number = f"{metrics['num_expressions']:,}" if "num_expressions" in metrics else ""
    return f"| {' | '.join([label, *cells, number])} |"


__all__ = ["format_report"]
