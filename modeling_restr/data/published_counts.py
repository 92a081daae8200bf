"""How many images, references and expressions a split has, beside how many it is published to have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from .canonical import AnnotatedImage


class Counts(NamedTuple):
    """Of a split: its images, the references to objects in them, and the expressions of these references."""

    images: int = 0
    references: int = 0
    expressions: int = 0

    def plus(self, other: Counts) -> Counts:
        return Counts(*(mine + theirs for mine, theirs in zip(self, other)))


def _published(
    splits: str, images: tuple[int, ...], references: tuple[int, ...], expressions: tuple[int, ...] = ()
) -> dict[str, dict[str, int]]:
    """{split: {what is counted: number}}, without what nobody published."""
    columns = {"images": images, "references": references, "expressions": expressions}
    return {
        split: {what: numbers[index] for what, numbers in columns.items() if numbers}
        for index, split in enumerate(splits.split())
    }


# By (dataset, split_by), as REFER names them. Images and references: the table in TensorFlow Datasets' catalogue,
# https://www.tensorflow.org/datasets/catalog/ref_coco. Expressions: as papers on the task list them for each split;
# they add up to REFER's own totals of 142,210 (RefCOCO), 141,564 (RefCOCO+) and 95,010 (RefCOCOg).
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
    """{what is counted: number} of a split, empty where nothing is published that is known here."""
    return PUBLISHED_COUNTS.get((dataset or "", split_by or ""), {}).get(split, {})


def count_images(images: list[AnnotatedImage]) -> Counts:
    references = [reference for image in images for reference in image.references]
    return Counts(len(images), len(references), sum(len(reference.expressions) for reference in references))


def compare_counts(counts: Counts, published: Mapping[str, int]) -> list[str]:
    """Every difference in words, such as "references: 42,400, published 42,404 (4 fewer)"."""
    differences = []
    for what, number in published.items():
        difference = getattr(counts, what) - number
        if difference:
            direction = "more" if difference > 0 else "fewer"
            differences.append(
                f"{what}: {getattr(counts, what):,}, published {number:,} ({abs(difference):,} {direction})"
            )
    return differences


def _verdict(counts: Counts, published: Mapping[str, int]) -> str:
    """In a word or two, how the counts stand to the published ones."""
    if not published:
        return "no published counts"
    differences = compare_counts(counts, published)
    unknown = [what for what in Counts._fields if what not in published]
    verdict = f"differs in {len(differences)}" if differences else "as published"
    return f"{verdict}, no published number of {' and '.join(unknown)}" if unknown else verdict


def format_counts(counts: Mapping[str, Counts], published: Mapping[str, Mapping[str, int]]) -> str:
    """The table of all splits as plain text; below it, every difference from the published counts."""
    rows: list[tuple[str, ...]] = [("split", *Counts._fields, "published counts")]
    for split, numbers in counts.items():
        rows.append((split, *(f"{number:,}" for number in numbers), _verdict(numbers, published.get(split, {}))))
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
    lines = ["| split | images | references | expressions | beside the published counts |", "|---|--:|--:|--:|---|"]
    for split, numbers in counts.items():
        differences = compare_counts(numbers, published.get(split, {}))
        verdict = "; ".join(differences) or _verdict(numbers, published.get(split, {}))
        lines.append(f"| {split} | {' | '.join(f'{number:,}' for number in numbers)} | {verdict} |")
    return "\n".join(lines)


__all__ = [
    "PUBLISHED_COUNTS",
    "Counts",
    "compare_counts",
    "count_images",
    "format_counts",
    "format_counts_as_markdown",
    "published_counts",
]
