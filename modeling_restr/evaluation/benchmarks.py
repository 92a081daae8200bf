"""The data sets of the paper, and its results on them."""

from typing import NamedTuple


class Benchmark(NamedTuple):
    """
    A data set of the paper.

    Attributes:
        title: Its name in tables.
        split_by: Author of its splits, by REFER's name.
        overall_iou: Overall IoU of ReSTR in percent by split, as published (arXiv 2203.16768).
    """

    title: str
    split_by: str
    overall_iou: dict[str, float]


# By REFER's names of the data sets.
BENCHMARKS = {
    "refcoco": Benchmark("RefCOCO", "unc", {"val": 67.22, "testA": 69.30, "testB": 64.45}),
    "refcoco+": Benchmark("RefCOCO+", "unc", {"val": 55.78, "testA": 60.44, "testB": 48.27}),
    "refcocog": Benchmark("RefCOCOg (google)", "google", {"val": 54.48}),
}


__all__ = ["BENCHMARKS", "Benchmark"]
