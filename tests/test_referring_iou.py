import multiprocessing
import shutil
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch

import modeling_restr.metrics
from modeling_restr.metrics import ReferringIoU


METRIC = Path(modeling_restr.metrics.__file__).parent / "referring_iou"
NAMES = ["overall_iou", "mean_iou", *(f"precision@0.{tenth}" for tenth in range(5, 10))]


def make_masks(num_expressions: int, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pairs of predicted and true masks of all degrees of overlap; some of them are empty."""
    generator = np.random.default_rng(seed)
    pairs = []
    for _ in range(num_expressions):
        height, width = generator.integers(5, 40, size=2)
        true = generator.random((height, width)) < generator.choice([0, 0.3, 0.9], p=[0.2, 0.4, 0.4])
        flipped = generator.random((height, width)) < generator.choice([0, 0.05, 0.3])
        pairs.append(((true ^ flipped) & bool(generator.random() < 0.9), true))
    return pairs


def reference_results(pairs: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """The definitions, mask by mask."""
    intersections, unions, ious, rejected, accepted = 0, 0, [], [], []
    for predicted, true in pairs:
        intersections += np.logical_and(predicted, true).sum()
        unions += np.logical_or(predicted, true).sum()
        both_empty = not predicted.any() and not true.any()
        ious.append(
            1.0 if both_empty else np.logical_and(predicted, true).sum() / np.logical_or(predicted, true).sum()
        )
        (accepted if true.any() else rejected).append(predicted.any() == true.any())
    results = {"overall_iou": intersections / unions, "mean_iou": np.mean(ious), "gIoU": np.mean(ious)}
    results |= {f"precision@0.{tenth}": np.mean([iou >= tenth / 10 for iou in ious]) for tenth in range(5, 10)}
    empty = sum(not predicted.any() and not true.any() for predicted, true in pairs)
    results |= {"N-acc": np.mean(rejected), "T-acc": np.mean(accepted)}
    return results | {"num_expressions": len(pairs), "num_empty": empty}


def count(pairs, areas=False):
    return [ReferringIoU.counts(predicted, true, areas=areas) for predicted, true in pairs]


@pytest.fixture
def metric():
    return ReferringIoU(keep_in_memory=True)


@pytest.mark.parametrize("areas", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_definitions_on_random_masks(metric, areas, seed):
    pairs = make_masks(200, seed)
    expected = reference_results(pairs)
    if not areas:
        expected = {name: expected[name] for name in [*NAMES, "num_expressions", "num_empty"]}
    results = metric.compute(predictions=count(pairs, areas))
    assert results.keys() == expected.keys()
    assert results == pytest.approx(expected, rel=1e-12)
    assert 0.1 < results["overall_iou"] < 0.99 and results["num_empty"] > 5


@pytest.mark.parametrize("keep_in_memory", [False, True])
def test_batches_and_single_expressions_add_up(tmp_path, keep_in_memory):
    metric = ReferringIoU(cache_dir=str(tmp_path), keep_in_memory=keep_in_memory)
    pairs = make_masks(50)
    counts = count(pairs)
    metric.add_batch(predictions=counts[:20])
    metric.add_batch(predictions=[])
    for single in counts[20:30]:
        metric.add(prediction=single)
    metric.add_batch(predictions=counts[30:])
    assert metric.compute() == ReferringIoU(keep_in_memory=True).compute(predictions=counts)


def add_share(cache_dir: str, process_id: int, shares: list, results) -> None:
    metric = ReferringIoU(
        cache_dir=cache_dir, num_process=len(shares), process_id=process_id, experiment_id="test", timeout=600
    )
    metric.add_batch(predictions=shares[process_id])
    results.put((process_id, metric.compute()))


def test_processes_are_joined(tmp_path, metric):
    counts = count(make_masks(60), areas=True)
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    queue = context.Queue()
    workers = [
        context.Process(target=add_share, args=(str(tmp_path), rank, [counts[:15], counts[15:]], queue))
        for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    results = dict(queue.get(timeout=600) for _ in workers)
    for worker in workers:
        worker.join()
    assert results == {0: metric.compute(predictions=counts), 1: None}


def test_loads_offline_as_a_file_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = shutil.copytree(METRIC, tmp_path / "referring_iou", ignore=shutil.ignore_patterns("__*"))
    loaded = evaluate.load(str(folder), cache_dir=str(tmp_path))
    assert type(loaded).__module__ != ReferringIoU.__module__
    pairs = make_masks(20)
    predictions = [loaded.counts(predicted, true) for predicted, true in pairs]
    assert loaded.compute(predictions=predictions) == ReferringIoU().compute(predictions=count(pairs))
    assert "overall_iou" in loaded.inputs_description


def test_the_metric_describes_itself_and_names_its_papers(metric):
    assert "Overall IoU" in metric.description and "num_words" in metric.inputs_description
    assert metric.citation.count("@inproceedings") == len(metric.reference_urls) == 2
    assert all(url.startswith("https://arxiv.org/abs/") for url in metric.reference_urls)


@pytest.mark.parametrize("tenths", range(5, 10))
def test_precision_counts_an_iou_that_is_just_enough(metric, tenths):
    for scale in (1, 3, 7, 10_007):
        enough, below = (
            {"intersection": tenths * scale, "union": 10 * scale},
            {"intersection": tenths * scale * 9 - 1, "union": 90 * scale},
        )
        assert metric.compute(predictions=[enough, below])[f"precision@0.{tenths}"] == 0.5


def test_large_counts_stay_exact(metric):
    # float32 has no 2 ** 24 + 1, int32 no 3 * 2 ** 30
    counts = [{"intersection": 2**24 + 1, "union": 2**24 + 2}, {"intersection": 3 * 2**30, "union": 3 * 2**30 + 1}]
    expected = (2**24 + 1 + 3 * 2**30) / (2**24 + 2 + 3 * 2**30 + 1)
    assert metric.compute(predictions=counts)["overall_iou"] == expected


def test_sums_do_not_overflow(metric):
    half = {"intersection": 5 * 10**15, "union": 10**16}
    results = metric.compute(predictions=[half] * 1000, image_ids=range(1000), num_words=[1] * 1000, num_bootstrap=9)
    assert results["overall_iou"] == results["by_num_words"]["1-2"]["overall_iou"] == 0.5
    assert results["confidence_intervals"]["overall_iou"] == pytest.approx([0.5, 0.5])
    largest = {"intersection": 0, "union": 2**63 - 1}
    assert metric.compute(predictions=[largest, half])["overall_iou"] == 5 * 10**15 / (2**63 - 1 + 10**16)
    with pytest.raises(ValueError, match=f"at most {2**63 - 1} pixels"):
        metric.add(prediction={"intersection": 0, "union": 2**63})


def test_empty_answers(metric):
    no_target = {"intersection": 0, "union": 0, "predicted": 0, "target": 0}
    results = metric.compute(predictions=[no_target, no_target])
    assert results["overall_iou"] == results["mean_iou"] == results["gIoU"] == results["N-acc"] == 1
    assert results["num_empty"] == 2 and results["T-acc"] is None
    wrong = {"intersection": 0, "union": 9, "predicted": 9, "target": 0}
    missed = {"intersection": 0, "union": 4, "predicted": 0, "target": 4}
    results = metric.compute(predictions=[no_target, wrong, missed])
    assert results["gIoU"] == pytest.approx(1 / 3) and results["overall_iou"] == 0
    assert results["N-acc"] == 0.5 and results["T-acc"] == 0 and results["num_empty"] == 1


def test_results_by_number_of_words(metric):
    pairs = make_masks(120)
    num_words = np.random.default_rng(1).integers(1, 25, size=len(pairs))
    groups = metric.compute(predictions=count(pairs), num_words=num_words.tolist())["by_num_words"]
    expected = {"1-2": (1, 2), "3": (3, 3), "4-5": (4, 5), "6-20": (6, 24)}
    assert list(groups) == list(expected)
    for name, (low, high) in expected.items():
        chosen = [pair for pair, words in zip(pairs, num_words) if low <= words <= high]
        assert groups[name] == metric.compute(predictions=count(chosen))
    assert sum(group["num_expressions"] for group in groups.values()) == len(pairs)
    alone = metric.compute(predictions=count(pairs[:1]), num_words=[3])["by_num_words"]["4-5"]
    assert alone == dict.fromkeys(NAMES) | {"num_expressions": 0, "num_empty": 0}


def test_intervals_equal_a_plain_bootstrap_over_images(metric):
    pairs = make_masks(40)
    images = [f"image {number // 3 if number < 30 else 99}" for number in range(40)]  # one image has many expressions
    results = metric.compute(predictions=count(pairs, areas=True), image_ids=images, num_bootstrap=60, seed=3)
    generator, names = np.random.default_rng(3), sorted(set(images))
    drawn = []
    for _ in range(60):
        chosen = [names[index] for index in generator.integers(len(names), size=len(names))]
        drawn.append(
            reference_results([pair for name in chosen for pair, image in zip(pairs, images) if image == name])
        )
    for name, interval in results["confidence_intervals"].items():
        assert interval == pytest.approx(np.percentile([draw[name] for draw in drawn], [2.5, 97.5]), rel=1e-9)
        assert interval[0] <= results[name] <= interval[1]
    assert results["confidence_intervals"].keys() == {*NAMES, "gIoU", "N-acc", "T-acc"}
    again = metric.compute(predictions=count(pairs), image_ids=images, num_bootstrap=60, seed=4)
    assert again["confidence_intervals"]["mean_iou"] != results["confidence_intervals"]["mean_iou"]


def test_intervals_of_no_and_of_one_pixel(metric):
    no_pixel, one_pixel = {"intersection": 0, "union": 0}, {"intersection": 0, "union": 1}
    for counts, overall_iou in ((no_pixel, 1), (one_pixel, 0)):
        results = metric.compute(predictions=[counts], image_ids=[5], num_bootstrap=2)
        assert results["confidence_intervals"]["overall_iou"] == [overall_iou] * 2


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    """100 data sets of 40 images: the truth is the mean IoU that they are drawn from."""
    generator = np.random.default_rng(0)
    metric, hits = ReferringIoU(keep_in_memory=True), 0
    for _ in range(100):
        intersections = np.repeat(generator.integers(0, 101, size=40), 2)  # both expressions of an image alike
        counts = [{"intersection": int(number), "union": 100} for number in intersections]
        results = metric.compute(predictions=counts, image_ids=np.arange(80) // 2, num_bootstrap=100)
        low, high = results["confidence_intervals"]["mean_iou"]
        hits += low <= 0.5 <= high
    assert 0.88 <= hits / 100 <= 0.99  # over the expressions, it would be 0.83


@pytest.mark.parametrize("kind", [np.uint8, np.int64, np.float32, torch.bool, torch.uint8, torch.bfloat16])
def test_counts_of_arrays_and_tensors_of_any_type(kind):
    predicted, true = np.zeros((2, 4, 6), dtype=bool)
    predicted[:, :3], true[1:, 2:] = True, True  # 12 and 12 pixels, 3 in common
    convert = (lambda mask: mask.astype(kind)) if isinstance(kind, type) else lambda mask: torch.tensor(mask).to(kind)
    expected = {"intersection": 3, "union": 21}
    assert ReferringIoU.counts(convert(predicted), convert(true)) == expected
    assert ReferringIoU.counts(convert(predicted), true) == expected
    counts = ReferringIoU.counts(predicted * 255, convert(true), areas=True)
    assert counts == {"intersection": 3, "union": 21, "predicted": 12, "target": 12}
    assert all(type(number) is int for number in counts.values())


@pytest.mark.parametrize(
    ("predicted", "true", "message"),
    [
        (np.ones((4, 6)), np.ones((6, 4)), r"same shape, got \(4, 6\) and \(6, 4\)"),
        (np.ones((1, 4)), np.ones((3, 4)), "same shape"),  # these would broadcast
        (np.ones((2, 4, 6)), np.ones((2, 4, 6)), r"pred_mask of shape \(height, width\), got \(2, 4, 6\)"),
        (np.linspace(0, 1, 6).reshape(2, 3), np.ones((2, 3)), "probabilities > threshold"),
        (np.ones((2, 3)), np.arange(6).reshape(2, 3), "true_mask to be 0 outside and one other value"),
        (torch.full((2, 3), torch.nan), np.ones((2, 3)), "one other value"),
    ],
)
def test_masks_that_cannot_be_compared_are_refused(predicted, true, message):
    with pytest.raises(ValueError, match=message):
        ReferringIoU.counts(predicted, true)


@pytest.mark.parametrize(
    "counts",
    [
        {"intersection": 5, "union": 4},
        {"intersection": -1, "union": 4},
        {"intersection": 3, "union": 8, "predicted": 2, "target": 9},
        {"intersection": 3, "union": 9, "predicted": 5, "target": 5},
        {"intersection": 3, "union": 7, "predicted": 5},
        {"intersection": 3},
        {"intersection": 3, "union": 7, "area": 5},
        {"intersection": 3.5, "union": 7},
        {"intersection": "3", "union": 7},
        {"intersection": 3, "union": None},
        (3, 7),
    ],
)
def test_impossible_counts_are_refused(metric, counts):
    good = {"intersection": 3, "union": 4}
    with pytest.raises(ValueError, match="got"):
        metric.compute(predictions=[good, counts])
    with pytest.raises(ValueError, match="got"):
        metric.add(prediction=counts)
    assert metric.compute(predictions=[good])["num_expressions"] == 1  # nothing of the refused batch is left


def test_masks_instead_of_counts_are_pointed_to_their_counts(metric):
    mask = np.ones((480, 640), dtype=int).tolist()
    with pytest.raises(ValueError, match=r"Pass `ReferringIoU.counts\(predicted_mask, true_mask\)`") as caught:
        metric.compute(predictions=[mask], references=[mask])
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("keep_in_memory", [False, True])
def test_no_predictions_are_an_error(tmp_path, keep_in_memory):
    metric = ReferringIoU(cache_dir=str(tmp_path), keep_in_memory=keep_in_memory)
    with pytest.raises(ValueError, match="at least one"):
        metric.compute()
    with pytest.raises(ValueError, match="at least one"):
        metric.compute(predictions=[])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_words": [1, 2]}, "Expected 3 num_words, one per expression, got 2"),
        ({"num_words": [1, 2, 0]}, "num_words as whole numbers of 1 or more"),
        ({"num_words": [1, 2, 2.5]}, "num_words as whole numbers"),
        ({"image_ids": [1, 2]}, "Expected 3 image_ids, one per expression, got 2"),
        ({"num_bootstrap": 10}, "Expected image_ids"),
        ({"image_ids": [1, 2, 3], "num_bootstrap": -1}, "num_bootstrap >= 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(metric, options, message):
    predictions = [{"intersection": 3, "union": 4}] * 3
    with pytest.raises(ValueError, match=message):
        metric.compute(predictions=predictions, **options)
    assert metric.compute(predictions=predictions)["mean_iou"] == 0.75


def test_areas_are_given_for_all_or_none(metric):
    metric.add(prediction={"intersection": 3, "union": 4})
    metric.add(prediction={"intersection": 3, "union": 4, "predicted": 4, "target": 3})
    with pytest.raises(ValueError, match="areas for all expressions or none, got 1 of 2"):
        metric.compute()
