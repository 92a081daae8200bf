"""Counts of a split's images, references and expressions, compared with the published ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .canonical import AnnotatedImage


class Counts(NamedTuple):
    """The numbers of images, of references to objects in them, and of expressions of these references."""

    images: int = 0
    references: int = 0
    expressions: int = 0

    def plus(self, other: Counts) -> Counts:
        return Counts(*(mine + theirs for mine, theirs in zip(self, other)))


def _published(
    splits: str, images: tuple[int, ...], references: tuple[int, ...], expressions: tuple[int, ...] = ()
) -> dict[str, dict[str, int]]:
    """{split: {name: number}}, without numbers that were not published."""
    columns = {"images": images, "references": references, "expressions": expressions}
    return {
        split: {name: numbers[index] for name, numbers in columns.items() if numbers}
        for index, split in enumerate(splits.split())
    }


# {(dataset, split_by) as in REFER: counts}. Images and references: the table in TensorFlow Datasets' catalogue,
# https://www.tensorflow.org/datasets/catalog/ref_coco. Expressions: the numbers per split in papers on the task; they
# add up to REFER's own totals of 142,210 (RefCOCO), 141,564 (RefCOCO+) and 95,010 (RefCOCOg).
PUBLISHED_COUNTS = {
    ("refcoco", "unc"): _published(
        "train val testA testB", (16994, 1500, 750, 750), (42404, 3811, 1975, 1810), (120624, 10834, 5657, 5095)
    ),
    ("refcoco", "google"): _published("train val test", (19213, 4559, 4527), (40000, 5000, 5000)),
    ("refcoco+", "unc"): _published(
        "train val testA testB", (16992, 1500, 750, 750), (42278, 3805, 1975, 1798), (120191, 10758, 5726, 4889)
    ),
    ("refcocog", "umd"): _published("train val test", (21899, 1300, 2600), (42226, 2573, 5023), (80512, 4896, 9602)),
    ("refcocog", "google"): _published("train val", (24698, 4650), (44822, 5000)),
}


def published_counts(dataset: str | None, split_by: str | None, split: str) -> dict[str, int]:
    """{name: number} of a split, empty if no published counts are known here."""
    return PUBLISHED_COUNTS.get((dataset or "", split_by or ""), {}).get(split, {})


def count_images(images: Sequence[AnnotatedImage]) -> Counts:
    references = [reference for image in images for reference in image.references]
    return Counts(len(images), len(references), sum(len(reference.expressions) for reference in references))


def compare_counts(counts: Counts, published: Mapping[str, int]) -> list[str]:
    """Every difference in words, such as "references: 42,400, published 42,404 (4 fewer)"."""
    return [
        f"{name}: {counted:,}, published {number:,} ({abs(counted - number):,} "
        f"{'more' if counted > number else 'fewer'})"
        for name, number in published.items()
        if (counted := getattr(counts, name)) != number
    ]


def _summarize(counts: Counts, published: Mapping[str, int]) -> str:
    """How the counts compare with the published ones, in a few words."""
    if not published:
        return "no published counts"
    differences = compare_counts(counts, published)
    unknown = [name for name in Counts._fields if name not in published]
    summary = f"differs in {len(differences)}" if differences else "as published"
    return f"{summary}, no published number of {' and '.join(unknown)}" if unknown else summary


def format_counts(counts: Mapping[str, Counts], published: Mapping[str, Mapping[str, int]]) -> str:
    """The table of all splits as plain text, followed by every difference from the published counts."""
    rows: list[tuple[str, ...]] = [("split", *Counts._fields, "published counts")]
    for split, numbers in counts.items():
        rows.append((split, *(f"{number:,}" for number in numbers), _summarize(numbers, published.get(split, {}))))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(row[column].rjust(widths[column]) for column in (1, 2, 3)), row[4]])
        for row in rows
    ]
    for split, numbers in counts.items():
        lines += [f"{split} {difference}" for difference in compare_counts(numbers, published.get(split, {}))]
    return "\n".join(lines)


def format_counts_as_markdown(counts: Mapping[str, Counts], published: Mapping[str, Mapping[str, int]]) -> str:
    """The same as a Markdown table, for a card."""
    lines = ["| split | images | references | expressions | published counts |", "|---|--:|--:|--:|---|"]
    for split, numbers in counts.items():
        differences = compare_counts(numbers, published.get(split, {}))
        summary = "; ".join(differences) or _summarize(numbers, published.get(split, {}))
        lines.append(f"| {split} | {' | '.join(f'{number:,}' for number in numbers)} | {summary} |")
    return "\n".join(lines)
