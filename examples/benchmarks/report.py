"""The rows of a benchmark as a table in Markdown, as JSON, and as a chart of the stages that have a floor."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from textwrap import fill

from modeling_restr.files import replace_file, write_json, write_text
from modeling_restr.options import needs_extra

from .measuring import Row


def write_report(rows: Sequence[Row], facts: Mapping[str, str], folder: Path) -> None:
    """Write `performance.md`, `performance.json` and, if a row has a floor, `performance.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "performance.md", format_table(rows, facts))
    write_json(folder / "performance.json", {"facts": dict(facts), "rows": [row._asdict() for row in rows]})
    if any(row.floor for row in rows):
        with needs_extra("tracking"):
            draw_chart(rows, folder / "performance.png")


def format_table(rows: Sequence[Row], facts: Mapping[str, str]) -> str:
    """One line of facts, then one table in Markdown, in which each section starts with its name."""
    lines = [", ".join(f"{name} {value}" for name, value in facts.items()), ""]
    lines += ["| what | measured | floor | ratio |", "|---|---|---|---|"]
    for section, members in groupby(rows, key=lambda row: row.section):
        lines.append(f"| **{section}** | | | |")
        for row in members:
            floor = "" if row.floor is None else format_value(row.floor, row.unit)
            lines.append(f"| {row.name} | {format_value(row.value, row.unit)} | {floor} | {format_ratio(row)} |")
    return "\n".join(lines) + "\n"


def format_value(value: float, unit: str) -> str:
    if unit == "s" and value < 1:
        value, unit = value * 1000, "ms"
    return f"{value:.3g} {unit}" if value < 1000 else f"{value:,.0f} {unit}"


def format_ratio(row: Row) -> str:
    ratio = row.value / row.floor if row.ratio is None and row.floor else row.ratio
    return "" if ratio is None else f"{ratio:.2f} x {row.ratio_to}"


def draw_chart(rows: Sequence[Row], path: Path) -> None:
    """Draw a bar per row with a floor. The dark part of a bar is the share of the floor in the measured value."""
    import matplotlib.pyplot as plt

    stages = [(row, min(1.0, row.floor / row.value)) for row in rows if row.floor]
    figure, axes = plt.subplots(figsize=(10, 1.5 + 0.42 * len(stages)), layout="constrained")
    places = range(len(stages))
    axes.barh(places, [1.0] * len(stages), color="#cfd8dc", label="measured")
    axes.barh(places, [share for _, share in stages], color="#0072b2", label="floor")
    axes.set_yticks(places, [fill(f"{row.section}: {row.name}", 50) for row, _ in stages], fontsize=9)
    for index, (row, _) in enumerate(stages):
        axes.text(1.01, index, format_value(row.value, row.unit), va="center", fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.25)
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper right", ncols=2, frameon=False)
    with replace_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)
