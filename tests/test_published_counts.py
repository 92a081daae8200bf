"""Counts compared with the published ones, with a description of every difference."""

import re

import pytest
from annotated_images import make_images

from modeling_restr.data.published_counts import (
    PUBLISHED_COUNTS,
    Counts,
    compare_counts,
    count_images,
    format_counts,
    format_counts_as_markdown,
    published_counts,
)


VAL = published_counts("refcoco", "unc", "val")


@pytest.mark.parametrize(
    ("dataset", "images", "references", "expressions"),
    [
        (("refcoco", "unc"), 19994, 50000, 142210),
        (("refcoco+", "unc"), 19992, 49856, 141564),
        (("refcocog", "umd"), 25799, 49822, 95010),
    ],
)
def test_splits_add_up_to_the_published_totals(dataset, images, references, expressions):
    splits = PUBLISHED_COUNTS[dataset].values()
    assert sum(split["images"] for split in splits) == images  # these splits share no images
    assert sum(split["references"] for split in splits) == references
    assert sum(split["expressions"] for split in splits) == expressions


def test_both_splits_of_refcocog_have_the_same_references():
    totals = {
        sum(split["references"] for split in PUBLISHED_COUNTS["refcocog", by].values()) for by in ("umd", "google")
    }
    assert totals == {49822}


def test_every_difference_is_named_with_its_direction():
    assert compare_counts(Counts(1500, 3811, 10834), VAL) == []
    assert compare_counts(Counts(1501, 3807, 10834), VAL) == [
        "images: 1,501, published 1,500 (1 more)",
        "references: 3,807, published 3,811 (4 fewer)",
    ]


def test_unknown_splits_have_no_published_counts():
    assert published_counts("refcoco", "unc", "test") == {}
    assert published_counts(None, None, "val") == {}
    assert "expressions" not in published_counts("refcocog", "google", "val")


def test_counting(tmp_path):
    assert count_images(make_images(tmp_path, range(3))) == Counts(3, 6, 9)


def test_table_in_the_terminal():
    counts = {"val": Counts(1500, 3811, 10834), "testA": Counts(750, 1970, 5640), "own": Counts(1, 2, 3)}
    counts["google"] = Counts(4650, 5000, 7)
    published = {split: published_counts("refcoco", "unc", split) for split in counts}
    published["google"] = published_counts("refcocog", "google", "val")
    lines = format_counts(counts, published).splitlines()
    assert [re.split(r"  +", line.strip()) for line in lines[:5]] == [
        ["split", "images", "references", "expressions", "published counts"],
        ["val", "1,500", "3,811", "10,834", "as published"],
        ["testA", "750", "1,970", "5,640", "differs in 2"],
        ["own", "1", "2", "3", "no published counts"],
        ["google", "4,650", "5,000", "7", "as published, no published number of expressions"],
    ]
    assert lines[5:] == [
        "testA references: 1,970, published 1,975 (5 fewer)",
        "testA expressions: 5,640, published 5,657 (17 fewer)",
    ]
    ends = {line.index(word) + len(word) for line, word in zip(lines[:3], ("images", "1,500", "750"))}
    assert len(ends) == 1  # numbers are aligned


def test_table_in_markdown_names_differences_in_the_row():
    table = format_counts_as_markdown(
        {"testA": Counts(750, 1970, 5657)}, {"testA": published_counts("refcoco", "unc", "testA")}
    )
    assert table.splitlines()[2] == "| testA | 750 | 1,970 | 5,657 | references: 1,970, published 1,975 (5 fewer) |"
