"""gRefCOCO's layout: several targets are one mask, no target is an empty mask."""

import dataclasses
import json

import numpy as np
import pytest
from coco_annotations import compress, run_lengths
from PIL import Image

from modeling_restr.data import build_dataset, decode_mask, read_grefcoco
from modeling_restr.data.canonical import FEATURES, BadImage
from modeling_restr.data.preparation import fingerprint


HEIGHT, WIDTH = 24, 32
IMAGE_ID = 581857
FILE_NAME = "COCO_train2014_000000581857.jpg"
# Rectangles that polygons, compressed and uncompressed RLEs are made of: top, left, bottom, right
RECTANGLES = {10: (5, 3, 17, 13), 20: (2, 8, 10, 30), 30: (20, 0, 24, 5), 40: (0, 28, 6, 32)}


def rectangle_mask(*ann_ids):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    for ann_id in ann_ids:
        top, left, bottom, right = RECTANGLES[ann_id]
        mask[top:bottom, left:right] = True
    return mask


def polygon(ann_id):
    top, left, bottom, right = RECTANGLES[ann_id]
    return [left, top, right, top, right, bottom, left, bottom]


def make_ref(ref_id, ann_id, category_id, split="val", **changes):
    sentences = [
        {"tokens": ["two", "dogs"], "raw": "Two dogs!", "sent": "two dogs", "sent_id": 10 * ref_id},
        {"tokens": ["dogs"], "raw": "Dogs", "sent": "dogs", "sent_id": 10 * ref_id + 1},
    ]
    return {
        "image_id": IMAGE_ID,
        "split": split,
        "sentences": sentences,
        "file_name": FILE_NAME.replace(".jpg", f"_{ref_id}.jpg"),
        "category_id": category_id,
        "ann_id": ann_id,
        "sent_ids": [10 * ref_id, 10 * ref_id + 1],
        "ref_id": ref_id,
        "no_target": ann_id in (-1, [-1], []),
    } | changes


def write_grefcoco(folder, refs):
    folder.mkdir(parents=True, exist_ok=True)
    segmentations = {
        10: [polygon(10)],
        20: compress(rectangle_mask(20)),
        30: run_lengths(rectangle_mask(30)),
        40: [polygon(40)],
    }
    annotations = [
        {
            "id": ann_id,
            "image_id": IMAGE_ID,
            "category_id": 18 if ann_id == 40 else 1,
            "bbox": [ann_id + 0.5, 1.0, 2.0, 3.0],
            "iscrowd": int(ann_id == 30),
            "segmentation": segmentation,
        }
        for ann_id, segmentation in segmentations.items()
    ]
    images = [{"id": IMAGE_ID, "file_name": FILE_NAME, "height": HEIGHT, "width": WIDTH}]
    categories = [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}]
    instances = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "grefs(unc).json").write_text(json.dumps(refs))
    (folder / "instances.json").write_text(json.dumps(instances))
    (folder / "images").mkdir(exist_ok=True)
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "images" / FILE_NAME)
    return folder


def read_references(folder, refs, **kwargs):
    write_grefcoco(folder, refs)
    dataset = build_dataset(read_grefcoco(folder, folder / "images", **kwargs), progress=False)
    assert dataset.features == FEATURES
    return [reference for row in dataset for reference in row["references"]]


@pytest.mark.parametrize(
    ("ann_ids", "category_ids", "category"),
    [
        ([10, 20], [1, 1], "person"),
        ([20, 30], [1, 1], "person"),
        ([40, 10], [18, 1], "dog, person"),
        ([10, 20, 30, 40], [1, 1, 1, 18], "person, dog"),
    ],
)
def test_several_targets_are_one_mask(tmp_path, ann_ids, category_ids, category):
    (reference,) = read_references(tmp_path, [make_ref(5, ann_ids, category_ids)])
    mask = rectangle_mask(*ann_ids)
    assert np.array_equal(decode_mask(reference["mask"]), mask)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    size = [np.ptp(columns) + 1, np.ptp(rows) + 1]
    assert reference["bbox"] == [columns[0], rows[0], *size]
    assert (reference["ref_id"], reference["ann_id"], reference["category"]) == (5, ann_ids[0], category)
    assert reference["expressions"] == [{"sent_id": 50, "text": "two dogs"}, {"sent_id": 51, "text": "dogs"}]


@pytest.mark.parametrize(("ann_id", "category_id"), [([40], [18]), (40, 18)])
def test_one_target_has_its_own_box(tmp_path, ann_id, category_id):
    (reference,) = read_references(tmp_path, [make_ref(5, ann_id, category_id)])
    assert np.array_equal(decode_mask(reference["mask"]), rectangle_mask(40))
    assert reference["bbox"] == [40.5, 1.0, 2.0, 3.0]
    assert (reference["ann_id"], reference["category"]) == (40, "dog")


@pytest.mark.parametrize(("ann_id", "category_id"), [([-1], [-1]), (-1, -1), ([], [])])
def test_no_target_is_an_empty_mask(tmp_path, ann_id, category_id):
    (reference,) = read_references(tmp_path, [make_ref(5, ann_id, category_id)])
    mask = decode_mask(reference["mask"])
    assert mask.shape == (HEIGHT, WIDTH)
    assert not mask.any()
    assert (reference["ann_id"], reference["category"], reference["bbox"]) == (-1, "", [0, 0, 0, 0])
    assert len(reference["expressions"]) == 2


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ([], r"at least 3 points, got \[\]"),
        (None, r"at least 3 points, got \[\]"),
        ([[-9, -9, -3, -9, -3, -1]], "covers no pixel"),
        ([[1e9, 1, 12, 1, 12, 9]], "got 1000000000.0"),
    ],
)
@pytest.mark.parametrize("ann_ids", [[10], [10, 20], [20, 10]], ids=str)
def test_each_of_several_targets_has_a_mask(tmp_path, segmentation, message, ann_ids):
    write_grefcoco(tmp_path, [make_ref(5, ann_ids, [1] * len(ann_ids)), make_ref(6, [-1], [-1])])
    instances = json.loads((tmp_path / "instances.json").read_text())
    instances["annotations"][0]["segmentation"] = segmentation
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    with pytest.raises(BadImage, match=rf"{FILE_NAME}: ref_id 5: .*{message}"):
        build_dataset(read_grefcoco(tmp_path, tmp_path / "images"), progress=False)


def test_fingerprint_of_several_targets_is_that_of_their_parts(tmp_path):
    write_grefcoco(tmp_path, [make_ref(5, [10, 20], [1, 1])])
    (image,) = read_grefcoco(tmp_path, tmp_path / "images")
    flat = [polygon(10), compress(rectangle_mask(20))]
    united = dataclasses.replace(image.references[0], segmentation=flat)
    assert fingerprint([image]) == fingerprint([dataclasses.replace(image, references=(united,))])


def test_flag_may_be_missing_but_not_wrong(tmp_path):
    refs = [make_ref(5, [10, 20], [1, 1]), make_ref(6, [-1], [-1])]
    expected = read_references(tmp_path, refs)
    for ref in refs:
        del ref["no_target"]
    assert read_references(tmp_path, refs) == expected
    for ref, flag in ((make_ref(5, [10], [1]), True), (make_ref(5, [-1], [-1]), False)):
        with pytest.raises(ValueError, match=rf"ref_id 5: no_target is {flag}, but ann_id \[(10|-1)\]"):
            read_references(tmp_path, [{**ref, "no_target": flag}])


def test_splits_and_order(tmp_path):
    refs = [make_ref(9, [10], [1]), make_ref(3, [20], [1], "train"), make_ref(4, [-1], [-1]), make_ref(1, [30], [1])]
    refs.append(make_ref(2, [40], [18], "testA"))
    assert [reference["ref_id"] for reference in read_references(tmp_path, refs)] == [9, 4, 1]
    assert [reference["ref_id"] for reference in read_references(tmp_path, refs, split="testA")] == [2]
    with pytest.raises(ValueError, match=r"no split 'testB'; it has: testA, train, val\."):
        read_references(tmp_path, refs, split="testB")
    with pytest.raises(ValueError, match=r"Expected grefs\(umd\)\.json in .*, got grefs\(unc\)\.json"):
        read_references(tmp_path, refs, split_by="umd")


@pytest.mark.parametrize("name", ["grefcoco", "gRefCOCO"])
def test_folder_or_the_one_above(tmp_path, name):
    folder = write_grefcoco(tmp_path / name, [make_ref(5, [10], [1])])
    (image,) = read_grefcoco(tmp_path, folder / "images")
    assert (image,) == tuple(read_grefcoco(folder, folder / "images"))
    assert (image.image_id, image.file_name, image.size) == (IMAGE_ID, FILE_NAME, (HEIGHT, WIDTH))
    assert image.image == folder / "images" / FILE_NAME


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        (make_ref(5, [10, 99], [1, 1]), "ref_id 5: 99 is not among the annotations"),
        (make_ref(5, [10], [99]), "ref_id 5: 99 is not among the categories"),
        (make_ref(5, [10], [1], image_id=7), "ref_id 5: 7 is not among the images"),
        (make_ref(5, [10, -1], [1, -1]), r"ref_id 5: ann_id has both objects and no target: \[10, -1\]"),
        ({"ref_id": 5}, "reference 0: expected the fields"),
        (make_ref(5, [10, "20"], [1, 1]), "expected ann_id to be a whole number of 64 bits or a list of them"),
        (make_ref(5, [10], None), "expected category_id to be a whole number of 64 bits or a list of them"),
    ],
)
def test_invalid_references_are_named(tmp_path, ref, message):
    with pytest.raises(ValueError, match=message):
        read_references(tmp_path, [ref])
