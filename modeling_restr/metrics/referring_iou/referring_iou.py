"""
Overall IoU, mean IoU and precision of referring image segmentation, as a metric of `evaluate`.

This file stands alone: `evaluate.load("path/to/referring_iou")` needs nothing else from the package.
"""

import operator
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import datasets
import evaluate
import numpy as np


_DESCRIPTION = """
Overall IoU (the sum of all intersections divided by the sum of all unions, also called oIoU or cIoU), mean IoU and
Precision@X (the share of expressions with IoU >= X), with one mask per referring expression. An empty mask for an
expression that refers to nothing has IoU 1.
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of dict): For each expression {"intersection": int, "union": int} in pixels, as
        `ReferringIoU.counts(predicted_mask, true_mask)` returns them. With the areas of both masks as well
        (`areas=True` adds "predicted" and "target"), the results of gRefCOCO are added. Either all expressions have
        areas or none.
    num_words (sequence of int, *optional*): Number of words of each expression, in the order of `predictions`. Adds
        results for 1-2, 3, 4-5 and 6-20 words. Longer expressions, which the tokenizer cuts, count with 6-20.
    image_ids (sequence, *optional*): Image of each expression. Adds 95 % intervals by bootstrap over the images.
    num_bootstrap (int, *optional*): Number of resamples, 1000 by default when there are `image_ids`.
    seed (int, defaults to 0): Seed of the resamples.

Returns:
    overall_iou, mean_iou, precision@0.5 ... precision@0.9 (float, 0 to 1);
    num_expressions (int); num_empty (int): expressions whose two masks are both empty;
    with areas also gIoU: mean IoU, where expressions without a target have IoU 1 for an empty mask and otherwise 0;
        N-acc: share of the expressions without a target that get an empty mask; T-acc: share of the expressions with
        a target that get a mask (None if there are no such expressions);
    with num_words by_num_words: {"1-2": {...}, ...}, each with all of the above (None if there are no expressions);
    with image_ids confidence_intervals: {"overall_iou": [low, high], ...}.

Raises:
    ValueError: There are no predictions, numbers that no two masks can have, or sequences of different lengths.

Example:
    >>> metric = evaluate.load("modeling_restr/metrics/referring_iou")
    >>> results = metric.compute(predictions=[{"intersection": 30, "union": 40}, {"intersection": 0, "union": 20}])
    >>> results["overall_iou"], results["mean_iou"], results["precision@0.5"]
    (0.5, 0.375, 0.5)
"""

_CITATION = """
@inproceedings{yu2016modeling,
    title = {Modeling Context in Referring Expressions},
    author = {Yu, Licheng and Poirson, Patrick and Yang, Shan and Berg, Alexander C. and Berg, Tamara L.},
    booktitle = {ECCV},
    year = {2016}
}
@inproceedings{liu2023gres,
    title = {{GRES}: Generalized Referring Expression Segmentation},
    author = {Liu, Chang and Ding, Henghui and Jiang, Xudong},
    booktitle = {CVPR},
    year = {2023}
}
"""

_THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
# Papers on RefCOCO report these groups.
_WORD_RANGES = {"1-2": (1, 2), "3": (3, 3), "4-5": (4, 5), "6-20": (6, np.inf)}
_MAX_PIXELS = 2**63 - 1  # Arrow keeps them as int64
_COUNTS = ("intersection", "union")
_AREAS = ("predicted", "target")


class _Ratio(NamedTuple):
    """A result that is the quotient of two sums over the expressions. Both arrays have shape (N,)."""

    numerators: np.ndarray
    denominators: np.ndarray
    otherwise: float | None = None  # the result if all denominators are 0

    def compute(self, selected: np.ndarray) -> float | None:
        denominator = self.denominators[selected].sum()
        return float(self.numerators[selected].sum() / denominator) if denominator else self.otherwise


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class ReferringIoU(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": {name: datasets.Value("int64") for name in (*_COUNTS, *_AREAS)}}
            ),
            reference_urls=["https://arxiv.org/abs/2203.16768", "https://arxiv.org/abs/2306.00968"],
        )

    @staticmethod
    def counts(pred_mask: Any, true_mask: Any, areas: bool = False) -> dict[str, int]:
        """
        Count the pixels that the metric needs.

        Args:
            pred_mask: Predicted mask, a NumPy array or tensor (height, width): 0 outside, one other value inside.
            true_mask: True mask, with the same shape.
            areas: Whether to add "predicted" and "target", the pixels of each mask.

        Returns:
            {"intersection": int, "union": int}, and the areas if `areas` is set.

        Raises:
            ValueError: The masks have different shapes, or more than two values, as probabilities do.
        """
        predicted, target = _to_bool(pred_mask, "pred_mask"), _to_bool(true_mask, "true_mask")
        if predicted.shape != target.shape:
            raise ValueError(f"Expected masks of the same shape, got {predicted.shape} and {target.shape}.")
        counts = {"intersection": int((predicted & target).sum()), "union": int((predicted | target).sum())}
        return counts | {"predicted": int(predicted.sum()), "target": int(target.sum())} if areas else counts

    def add_batch(self, *, predictions: Sequence[Mapping[str, int]], **kwargs: Any) -> None:
        """Add the counts of several expressions. Numbers that no two masks can have raise a ValueError."""
        super().add_batch(predictions=[_check_counts(counts) for counts in predictions], **kwargs)

    def add(self, *, prediction: Mapping[str, int], **kwargs: Any) -> None:
        """Add the counts of one expression, as `add_batch` does."""
        self.add_batch(predictions=[prediction], **kwargs)

    def _finalize(self) -> None:
        if self.writer is None and self.num_process == 1:  # the base class fails on its own None
            raise ValueError("Expected the counts of at least one expression, got none.")
        super()._finalize()

    def _compute(
        self,
        predictions: list[dict[str, int]],
        num_words: Sequence[int] | None = None,
        image_ids: Sequence[Any] | None = None,
        num_bootstrap: int | None = None,
        seed: int = 0,
    ) -> dict[str, Any]:
        counts = _to_arrays(predictions)
        everything = np.ones(len(predictions), dtype=bool)
        ratios = _get_ratios(counts)
        results: dict[str, Any] = _summarize(ratios, counts, everything)
        if num_words is not None:
            words = _check_length("num_words", num_words, len(predictions))
            results["by_num_words"] = {
                name: _summarize(ratios, counts, selected) for name, selected in _group_by_words(words).items()
            }
        if image_ids is not None and num_bootstrap != 0:
            images = _check_length("image_ids", image_ids, len(predictions))
            results["confidence_intervals"] = _bootstrap(ratios, images, num_bootstrap or 1000, seed)
        elif num_bootstrap:
            raise ValueError("Expected image_ids, the image of each expression, with num_bootstrap, got none.")
        return results


def _to_bool(mask: Any, name: str) -> np.ndarray:
    if hasattr(mask, "detach"):  # a tensor; NumPy has no bfloat16
        mask = mask.detach().cpu()
        mask = mask.float() if mask.is_floating_point() else mask
    array = np.asarray(mask)
    if array.ndim != 2:
        raise ValueError(f"Expected {name} of shape (height, width), got {array.shape}.")
    inside = array != 0
    values = array[inside]
    if values.size and (values != values[0]).any():
        raise ValueError(
            f"Expected {name} to be 0 outside and one other value inside, got values from {array.min()} to"
            f" {array.max()}. Pass `probabilities > threshold` for probabilities."
        )
    return inside


def _check_counts(counts: Mapping[str, int]) -> dict[str, int | None]:
    if not isinstance(counts, Mapping) or set(counts) not in ({*_COUNTS}, {*_COUNTS, *_AREAS}):
        raise ValueError(
            f"Expected the counts of an expression as a dict of {_COUNTS} or these and {_AREAS}, got "
            f"{reprlib.repr(counts)}. Pass `ReferringIoU.counts(predicted_mask, true_mask)` for masks."
        )
    try:
        numbers = {name: operator.index(number) for name, number in counts.items()}
    except TypeError:
        raise ValueError(f"Expected whole numbers of pixels, got {counts}.") from None
    intersection, union = numbers["intersection"], numbers["union"]
    predicted, target = numbers.get("predicted"), numbers.get("target")
    possible = 0 <= intersection <= union
    if predicted is not None and target is not None:
        possible &= intersection <= min(predicted, target) and union == predicted + target - intersection
    if not possible:
        raise ValueError(
            "Expected 0 <= intersection <= union, and with areas intersection <= predicted, intersection <= target and"
            f" union == predicted + target - intersection, got {counts}."
        )
    if union > _MAX_PIXELS:
        raise ValueError(f"Expected at most {_MAX_PIXELS} pixels, got {counts}.")
    return {"intersection": intersection, "union": union, "predicted": predicted, "target": target}


def _check_length(name: str, values: Sequence[Any], num_expressions: int) -> np.ndarray:
    if len(values) != num_expressions:
        raise ValueError(f"Expected {num_expressions} {name}, one per expression, got {len(values)}.")
    return np.asarray(values)


def _to_arrays(predictions: list[dict[str, int]]) -> dict[str, np.ndarray]:
    """Arrays (N,) of the counts by name. They hold Python integers, so that sums do not overflow."""
    if not predictions:
        raise ValueError("Expected the counts of at least one expression, got none.")
    num_with_areas = sum(counts["target"] is not None for counts in predictions)
    if num_with_areas not in (0, len(predictions)):
        raise ValueError(f"Expected areas for all expressions or none, got {num_with_areas} of {len(predictions)}.")
    names = (*_COUNTS, *_AREAS) if num_with_areas else _COUNTS
    return {name: np.array([counts[name] for counts in predictions], dtype=object) for name in names}


def _get_ratios(counts: dict[str, np.ndarray]) -> dict[str, _Ratio]:
    intersection, union = counts["intersection"], counts["union"]
    one = np.ones(len(union))
    iou = np.array([pair[0] / pair[1] if pair[1] else 1.0 for pair in zip(intersection, union)])
    ratios = {"overall_iou": _Ratio(intersection, union, otherwise=1.0), "mean_iou": _Ratio(iou, one)}
    # Both sides are correctly rounded quotients of small integers: IoU >= X is exact.
    ratios |= {f"precision@{threshold}": _Ratio(iou >= threshold, one) for threshold in _THRESHOLDS}
    if "target" in counts:
        no_target, no_answer = counts["target"] == 0, counts["predicted"] == 0
        ratios["gIoU"] = _Ratio(np.where(no_target, no_answer, iou), one)
        ratios["N-acc"] = _Ratio(no_target & no_answer, no_target)
        ratios["T-acc"] = _Ratio(~no_target & ~no_answer, ~no_target)
    return ratios


def _summarize(
    ratios: dict[str, _Ratio], counts: dict[str, np.ndarray], selected: np.ndarray
) -> dict[str, float | int | None]:
    """All results of the selected expressions, None where the denominator is 0."""
    num_expressions = int(selected.sum())
    results = {name: ratio.compute(selected) if num_expressions else None for name, ratio in ratios.items()}
    num_empty = int((counts["union"][selected] == 0).sum())
    return {**results, "num_expressions": num_expressions, "num_empty": num_empty}


def _group_by_words(num_words: np.ndarray) -> dict[str, np.ndarray]:
    if num_words.dtype.kind not in "iu" or num_words.min() < 1:
        raise ValueError(f"Expected num_words as whole numbers of 1 or more, got {num_words}.")
    return {name: (num_words >= low) & (num_words <= high) for name, (low, high) in _WORD_RANGES.items()}


def _bootstrap(
    ratios: dict[str, _Ratio], image_ids: np.ndarray, num_bootstrap: int, seed: int
) -> dict[str, list[float] | None]:
    """95 % intervals (percentiles) of each result over samples of the images with replacement."""
    if num_bootstrap < 0:
        raise ValueError(f"Expected num_bootstrap >= 0, got {num_bootstrap}.")
    ids, images = np.unique(image_ids, return_inverse=True)
    parts = [part for ratio in ratios.values() for part in (ratio.numerators, ratio.denominators)]
    sums = np.stack(
        [np.bincount(images, weights=part.astype(np.float64)) for part in parts], axis=1
    )  # (images, parts)
    generator = np.random.default_rng(seed)
    totals = np.empty((num_bootstrap, len(parts)))
    for total in totals:
        drawn = np.bincount(generator.integers(len(ids), size=len(ids)), minlength=len(ids))
        total[:] = drawn @ sums
    intervals = {}
    for (name, ratio), numerators, denominators in zip(ratios.items(), totals[:, ::2].T, totals[:, 1::2].T):
        otherwise = np.nan if ratio.otherwise is None else ratio.otherwise
        values = np.divide(numerators, denominators, out=np.full(num_bootstrap, otherwise), where=denominators > 0)
        known = values[~np.isnan(values)]
        intervals[name] = np.percentile(known, [2.5, 97.5]).tolist() if len(known) else None
    return intervals
