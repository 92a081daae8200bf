import copy
import hashlib
import io

import datasets
import numpy as np
import pytest
import torch
from pictures import encode
from PIL import Image
from tiny_models import make_model, randomize

from modeling_restr import ReSTRForImageSegmentation, ReSTRImageProcessor, ReSTRProcessor, build_tokenizer
from modeling_restr.data.canonical import FEATURES, decode_mask, encode_mask
from modeling_restr.evaluation.counts import (
    check_dataset,
    evaluate_dataset,
    evaluate_image,
    fingerprint,
    fingerprint_rows,
    predict_masks,
)
from modeling_restr.tokenization_restr import vocabulary_from_expressions


pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = ["the dog", "left", "a red ball on the left", "man, right.", "the man behind the small red ball", "ball"]


def make_model_and_processor() -> tuple[ReSTRForImageSegmentation, ReSTRProcessor]:
    vocabulary = vocabulary_from_expressions(TEXTS)
    processor = ReSTRProcessor(ReSTRImageProcessor(size=64), build_tokenizer(vocabulary))
    return randomize(make_model(len(vocabulary)), seed=39, std=0.25), processor


def make_rows(num_images: int, seed: int = 0) -> list[dict]:
    """Rows in the canonical form: images of all sizes, each with one to three objects of one to three expressions."""
    generator = np.random.default_rng(seed)
    rows, sent_id = [], 0
    for image_id in range(num_images):
        width, height = generator.integers(30, 100, size=2).tolist()
        coarse = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        references = []
        for number in range(generator.integers(1, 4)):
            mask = np.zeros((height, width), dtype=bool)
            top, left = generator.integers(0, height // 2), generator.integers(0, width // 2)
            mask[top : top + height // 2, left : left + width // 2] = True
            expressions = []
            for text in generator.choice(TEXTS, size=generator.integers(1, 4), replace=False).tolist():
                expressions.append({"sent_id": sent_id, "text": text})
                sent_id += 1
            reference = {"ref_id": 10 * image_id + number, "ann_id": 7, "category": "thing", "bbox": [0, 0, 1, 1]}
            references.append({**reference, "mask": encode_mask(mask), "expressions": expressions})
        image = {"bytes": encode(coarse.resize((width, height))), "path": f"{image_id}.png"}
        rows.append({"image": image, "image_id": image_id, "file_name": f"{image_id}.png", "references": references})
    return rows


def make_dataset(rows: list[dict]) -> datasets.Dataset:
    return datasets.Dataset.from_list(rows, features=FEATURES)


@pytest.fixture(scope="module")
def model_and_processor():
    return make_model_and_processor()


@pytest.fixture(scope="module")
def exact_model_and_processor(model_and_processor):
    """In float64, where sums in another order cannot move a pixel over the threshold."""
    model, processor = model_and_processor
    return copy.deepcopy(model).double(), processor


@pytest.fixture(scope="module")
def rows():
    return make_rows(6)


@pytest.fixture(scope="module")
def dataset(rows):
    return make_dataset(rows)


def test_records_are_the_counts_of_masks_found_one_by_one(exact_model_and_processor, rows, dataset):
    model, processor = exact_model_and_processor
    found = [record for records in evaluate_dataset(model, processor, dataset) for record in records]
    expected = []
    for row in rows:
        image = Image.open(io.BytesIO(row["image"]["bytes"]))
        for reference in row["references"]:
            target = decode_mask(reference["mask"])
            for expression in reference["expressions"]:
                inputs = processor(images=image, text=expression["text"], return_tensors="pt")
                inputs["pixel_values"] = inputs["pixel_values"].double()
                with torch.no_grad():
                    outputs = model(**inputs)
                size = [(image.height, image.width)]
                (result,) = processor.post_process_referring_segmentation(outputs, size, threshold=0.5)
                mask = result["mask"].numpy()
                record = {"image_id": row["image_id"], "ref_id": reference["ref_id"], **expression}
                record["intersection"] = int((mask & target).sum())
                record["union"] = int((mask | target).sum())
                record |= {"predicted": int(mask.sum()), "target": int(target.sum())}
                expected.append((record, result["score"]))
    num_words = dict(zip(TEXTS, [2, 1, 6, 3, 7, 1]))  # ", " is a word of its own, a final "." is not
    assert len(found) == len(expected) > 20
    for record, (numbers, score) in zip(found, expected):
        assert record.pop("score") == pytest.approx(score, abs=1e-5)
        assert record.pop("num_words") == num_words[record["text"]]
        assert record == numbers
    ious = [record["intersection"] / record["union"] for record in found]
    assert max(ious) - min(ious) > 0.3  # the masks differ


def test_batches_do_not_change_the_numbers(exact_model_and_processor, dataset):
    results = [
        list(evaluate_dataset(*exact_model_and_processor, dataset, expressions_per_batch=size)) for size in (1, 2, 99)
    ]
    for record in (record for result in results for records in result for record in records):
        record["score"] = round(record["score"], 5)
    assert results[0] == results[1] == results[2]


def test_an_image_is_encoded_once_and_sentences_go_in_batches(model_and_processor, dataset):
    model, processor = model_and_processor
    images, sentences = [], []
    hooks = [
        model.model.vision_model.register_forward_hook(lambda *args: images.append(1)),
        model.model.text_model.register_forward_pre_hook(
            lambda module, args, kwargs: sentences.append(len(args[0])), with_kwargs=True
        ),
    ]
    row = next(row for row in dataset if len(row["references"]) == 3)
    num_expressions = len(evaluate_image(model, processor, row, expressions_per_batch=2))
    for hook in hooks:
        hook.remove()
    assert len(images) == 1
    assert max(sentences) == 2 and sum(sentences) == num_expressions > 3


def test_threshold_is_that_of_the_probability(model_and_processor, dataset):
    model, processor = model_and_processor
    row = dataset[0]
    inputs = processor(images=row["image"], text=TEXTS[:1], return_tensors="pt")
    sizes = inputs.pop("original_sizes")
    with torch.no_grad():
        (expected,) = processor.post_process_referring_segmentation(model(**inputs), sizes)
    areas = []
    for threshold in (0.1, 0.5, 0.9):
        (result,) = predict_masks(model, processor, row["image"], TEXTS[:1], threshold=threshold)
        assert result.keys() == {"mask", "score"}
        assert (result["mask"] == (expected["probabilities"] > threshold)).all()
        areas.append(next(evaluate_dataset(model, processor, [row], threshold=threshold))[0]["predicted"])
    assert areas[0] > areas[1] > areas[2]
    (result,) = predict_masks(model, processor, row["image"], TEXTS[:1])
    assert torch.equal(result["mask"], expected["mask"])  # both at 0.5


def test_an_image_without_expressions_has_no_records(model_and_processor, dataset):
    assert evaluate_image(*model_and_processor, {**dataset[0], "references": []}) == []


def test_bad_rows_and_options_are_refused(model_and_processor, dataset):
    row = dataset[0]
    with pytest.raises(ValueError, match="expressions_per_batch >= 1, got 0"):
        evaluate_image(*model_and_processor, row, expressions_per_batch=0)
    row["references"][0]["mask"] = encode_mask(np.ones((9, 8), dtype=bool))
    with pytest.raises(ValueError, match=r"0\.png: expected masks of the image.* got \[9, 8\] for ref_id 0"):
        evaluate_image(*model_and_processor, row)


def test_fingerprints_are_those_of_earlier_versions():
    """Evaluations that began before resume only if the hashes stay the same, whatever the order of a row's fields."""
    reference = {"ref_id": 1, "mask": {"size": [2, 3], "counts": "06"}, "expressions": [{"text": "dog", "sent_id": 5}]}
    row = '[7, [[1, [2, 3], "06", [{"sent_id": 5, "text": "dog"}]]]]'
    digests = fingerprint_rows(datasets.Dataset.from_list([{"image_id": 7, "references": [reference]}]))
    assert digests == [hashlib.sha256(row.encode()).hexdigest()]
    assert fingerprint(["b", "a"]) == hashlib.sha256(b"a\nb").hexdigest()


def test_fingerprint_does_not_depend_on_the_order_of_rows(rows, dataset):
    digests = fingerprint_rows(dataset)
    assert len(set(digests)) == len(rows)
    assert fingerprint_rows(make_dataset(rows[::-1])) == digests[::-1]
    assert fingerprint(digests[::-1]) == fingerprint(digests) != fingerprint(digests[:-1])


@pytest.mark.parametrize(
    "change",
    [
        lambda row: row.update(image_id=99),
        lambda row: row["references"][0].update(ref_id=99),
        lambda row: row["references"][0]["expressions"][0].update(sent_id=99),
        lambda row: row["references"][0]["expressions"][0].update(text="the cat"),
        lambda row: row["references"][0].update(mask=encode_mask(~decode_mask(row["references"][0]["mask"]))),
        lambda row: row["references"].pop(),
    ],
)
def test_fingerprint_changes_with_every_field(rows, dataset, change):
    changed = make_rows(6)
    assert changed == rows
    change(changed[3])
    assert fingerprint(fingerprint_rows(make_dataset(changed))) != fingerprint(fingerprint_rows(dataset))


def test_data_that_cannot_be_evaluated_is_refused(dataset):
    check_dataset(dataset)
    with pytest.raises(ValueError, match=r"lacks \['references'"):
        check_dataset(dataset.remove_columns("references"))
    other_references = dict.fromkeys(FEATURES) | {"references": [{"ref_id": 1}]}
    with pytest.raises(ValueError, match=r"references\.mask"):
        check_dataset(datasets.Dataset.from_list([other_references]))
    with pytest.raises(ValueError, match="got none in 0 images"):
        check_dataset(dataset.select([]))
    rows = make_rows(2)
    rows[1]["references"][0]["expressions"][0] = {"sent_id": 77, "text": " . "}
    with pytest.raises(ValueError, match=r"at least one word, got 1 of \d+ without any, with the sent_ids \[77\]"):
        check_dataset(make_dataset(rows))
