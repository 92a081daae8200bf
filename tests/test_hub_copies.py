"""Copies of the RefCOCO family in each layout that is on the Hub, written to Parquet and JSON as they are there."""

import io
import json
from dataclasses import replace

import datasets
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from modeling_restr.data import hub_copies
from modeling_restr.data.canonical import BadImage, build_dataset, build_row
from modeling_restr.data.hub_copies import read_hub_copy
from modeling_restr.data.segmentation import decode_mask, encode_mask


SIZES = {581857: (40, 60), 131074: (50, 30)}  # image id -> (height, width)
NAMES = {image_id: f"COCO_train2014_{image_id:012d}.jpg" for image_id in SIZES}
# Boxes with whole numbers for corners, so that a mask is a slice: ref_id -> (image_id, ann_id, [x, y, w, h] of parts).
REFERENCES = {
    7: (581857, 1719310, [[5, 6, 20, 10]]),
    3: (131074, 502, [[1, 2, 10, 12], [15, 30, 9, 20]]),
    9: (581857, 44, [[30, 0, 30, 40]]),
}
CATEGORIES = {7: (1, "person"), 3: (44, "bottle"), 9: (90, "toothbrush")}
SENTENCES = {7: [(20, "man in Red.", "man in red"), (21, "LEFT", "left")], 3: [(5, "cup", "cup")], 9: [(1, "b", "b")]}

LIST, VALUE, IMAGE = datasets.List, datasets.Value, datasets.Image()
SENTENCE = {
    "raw": VALUE("string"),
    "sent": VALUE("string"),
    "sent_id": VALUE("int64"),
    "tokens": LIST(VALUE("string")),
}
REFERENCE_ROW = {
    "sent_ids": LIST(VALUE("int64")),
    "file_name": VALUE("string"),
    "ann_id": VALUE("int64"),
    "ref_id": VALUE("int64"),
    "image_id": VALUE("int64"),
    "split": VALUE("string"),
    "sentences": LIST(SENTENCE),
    "category_id": VALUE("int64"),
    "raw_anns": VALUE("string"),
    "raw_image_info": VALUE("string"),
    "raw_sentences": VALUE("string"),
    "image_path": VALUE("string"),
    "bbox": LIST(VALUE("float64")),
    "captions": LIST(VALUE("string")),
    "global_image_id": VALUE("string"),
    "anns_id": VALUE("string"),
}
BENCHMARK_ROW = {
    "ref_list": LIST(
        {
            "ann_info": {
                "area": VALUE("float64"),
                "bbox": LIST(VALUE("float64")),
                "category_id": VALUE("int64"),
                "id": VALUE("int64"),
                "image_id": VALUE("int64"),
                "iscrowd": VALUE("int64"),
                "segmentation": LIST(LIST(VALUE("float64"))),
            },
            "ref_info": {
                name: REFERENCE_ROW[name]
                for name in (
                    "ann_id",
                    "category_id",
                    "file_name",
                    "image_id",
                    "ref_id",
                    "sent_ids",
                    "sentences",
                    "split",
                )
            },
        }
    ),
    "image_info": {
        **{name: VALUE("string") for name in ("coco_url", "date_captured", "file_name", "flickr_url")},
        **{name: VALUE("int64") for name in ("height", "id", "license", "width")},
    },
    "image": IMAGE,
}
QUESTION_ROW = {
    "question_id": VALUE("string"),
    "image": IMAGE,
    "question": VALUE("string"),
    "answer": LIST(VALUE("string")),
    "segmentation": LIST(VALUE("float32")),
    "bbox": LIST(VALUE("float32")),
    "iscrowd": VALUE("int8"),
    "file_name": VALUE("string"),
}
MASK_ROW = {
    "image": IMAGE,
    "image_id": VALUE("int64"),
    "file_name": VALUE("string"),
    "samples": LIST(
        {
            "id": VALUE("int64"),
            "image_id": VALUE("int64"),
            "category": VALUE("string"),
            "supercategory": VALUE("string"),
            "label": VALUE("string"),
            "sentences": LIST(VALUE("string")),
            "bbox": LIST(VALUE("float32")),
            "mask": {"counts": VALUE("string"), "size": LIST(VALUE("int32"))},
        }
    ),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def copy(tmp_path):
    return tmp_path / "copy"


def write_split(copy, split, rows, features):
    (copy / "data").mkdir(parents=True, exist_ok=True)
    dataset = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    dataset.to_parquet(copy / "data" / f"{split}-00000-of-00001-0123456789abcdef.parquet")


def photo(image_id):
    height, width = SIZES[image_id]
    noise = np.random.default_rng(image_id).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG")
    return buffer.getvalue()


def pixels(image_id):
    return np.asarray(Image.open(io.BytesIO(photo(image_id))))


def corners(box):
    x, y, width, height = box
    return [x, y, x + width, y, x + width, y + height, x, y + height]


def true_box(ref_id):
    boxes = np.array(REFERENCES[ref_id][2])
    start, end = boxes[:, :2].min(axis=0), (boxes[:, :2] + boxes[:, 2:]).max(axis=0)
    return [*start.tolist(), *(end - start).tolist()]


def true_mask(ref_id):
    image_id, _, boxes = REFERENCES[ref_id]
    mask = np.zeros(SIZES[image_id], dtype=bool)
    for x, y, width, height in boxes:
        mask[y : y + height, x : x + width] = True
    return mask


def coco_annotation(ref_id, **changes):
    image_id, ann_id, boxes = REFERENCES[ref_id]
    return {
        "segmentation": [corners(box) for box in boxes],
        "area": float(true_mask(ref_id).sum()),
        "iscrowd": 0,
        "image_id": image_id,
        "bbox": true_box(ref_id),
        "category_id": CATEGORIES[ref_id][0],
        "id": ann_id,
    } | changes


def coco_image(image_id):
    height, width = SIZES[image_id]
    texts = dict.fromkeys(("coco_url", "date_captured", "flickr_url"), "")
    return {"license": 1, "file_name": NAMES[image_id], "height": height, "width": width, "id": image_id} | texts


def refer_ref(ref_id):
    image_id, ann_id, _ = REFERENCES[ref_id]
    return {
        "sent_ids": [sent_id for sent_id, _, _ in SENTENCES[ref_id]],
        "file_name": NAMES[image_id].replace(".jpg", f"_{ref_id}.jpg"),
        "ann_id": ann_id,
        "ref_id": ref_id,
        "image_id": image_id,
        "split": "val",
        "sentences": [
            {"raw": raw, "sent": sent, "sent_id": sent_id, "tokens": sent.split()}
            for sent_id, raw, sent in SENTENCES[ref_id]
        ],
        "category_id": CATEGORIES[ref_id][0],
    }


def reference_row(ref_id, **annotation_changes):
    x, y, width, height = true_box(ref_id)
    image_id, ann_id, _ = REFERENCES[ref_id]
    ref = refer_ref(ref_id)
    return ref | {
        "raw_anns": json.dumps(coco_annotation(ref_id, **annotation_changes)),
        "raw_image_info": json.dumps(coco_image(image_id)),
        "raw_sentences": json.dumps(ref["sentences"]),
        "image_path": f"coco/train2014/{NAMES[image_id]}",
        "bbox": [x, y, x + width, y + height],
        "captions": [sent for _, _, sent in SENTENCES[ref_id]],
        "global_image_id": f"coco.{image_id}",
        "anns_id": str(ann_id),
    }


def benchmark_row(image_id, **annotation_changes):
    ref_ids = [ref_id for ref_id in REFERENCES if REFERENCES[ref_id][0] == image_id]
    return {
        "ref_list": [
            {"ann_info": coco_annotation(ref_id, **annotation_changes), "ref_info": refer_ref(ref_id)}
            for ref_id in ref_ids
        ],
        "image_info": coco_image(image_id),
        "image": {"bytes": photo(image_id), "path": None},
    }


def question_row(ref_id, **changes):
    image_id, ann_id, boxes = REFERENCES[ref_id]
    return {
        "question_id": str(ann_id),
        "image": {"bytes": photo(image_id), "path": None},
        "question": "Describe the region.",
        "answer": [raw for _, raw, _ in SENTENCES[ref_id]],
        "segmentation": corners(boxes[0]),
        "bbox": true_box(ref_id),
        "iscrowd": 0,
        "file_name": NAMES[image_id].replace(".jpg", f"_{ref_id}.jpg"),
    } | changes


def mask_row(image_id):
    ref_ids = [ref_id for ref_id in REFERENCES if REFERENCES[ref_id][0] == image_id]
    samples = [
        {
            "id": ref_id,
            "image_id": image_id,
            "category": CATEGORIES[ref_id][1],
            "supercategory": "thing",
            "label": "",
            "sentences": [sent for _, _, sent in SENTENCES[ref_id]],
            "bbox": true_box(ref_id),
            "mask": encode_mask(true_mask(ref_id)),
        }
        for ref_id in ref_ids
    ]
    image = {"bytes": photo(image_id), "path": NAMES[image_id]}
    return {"image": image, "image_id": image_id, "file_name": NAMES[image_id], "samples": samples}


def write_photos(folder):
    folder.mkdir(parents=True)
    for image_id, name in NAMES.items():
        (folder / name).write_bytes(photo(image_id))


def check_images(images):
    """The two images in the order of `REFERENCES`, each with its references, against the boxes they were made of."""
    assert [(image.image_id, image.file_name) for image in images] == list(NAMES.items())
    rows = [build_row(image) for image in images]
    assert [[reference["ref_id"] for reference in row["references"]] for row in rows] == [[7, 9], [3]]
    for row in rows:
        with Image.open(io.BytesIO(row["image"]["bytes"])) as image:
            assert np.array_equal(np.asarray(image), pixels(row["image_id"]))
        for reference in row["references"]:
            assert np.array_equal(decode_mask(reference["mask"]), true_mask(reference["ref_id"]))
            assert reference["bbox"] == true_box(reference["ref_id"])
            assert reference["category"] == CATEGORIES[reference["ref_id"]][1]
    return rows


@pytest.mark.parametrize("folder", ["coco/train2014", "train2014", "."])
def test_one_reference_a_row(tmp_path, copy, folder):
    write_split(copy, "train", [reference_row(ref_id) for ref_id in REFERENCES], REFERENCE_ROW)
    write_photos(tmp_path / "photos" / folder)
    images = read_hub_copy(copy, "train", image_dir=tmp_path / "photos")
    for image in images:
        assert image.size == SIZES[image.image_id]
        assert image.image == tmp_path / "photos" / folder / NAMES[image.image_id]
    for row in check_images(images):
        for reference in row["references"]:
            assert reference["ann_id"] == REFERENCES[reference["ref_id"]][1]
            assert [(expression["sent_id"], expression["text"]) for expression in reference["expressions"]] == [
                (sent_id, sent) for sent_id, _, sent in SENTENCES[reference["ref_id"]]
            ]


def test_one_reference_a_row_in_json_files(tmp_path, copy):
    copy.mkdir()
    lines = [json.dumps(reference_row(ref_id)) for ref_id in REFERENCES]
    (copy / "validation.jsonl").write_text("\n".join(lines))
    write_photos(tmp_path / "photos")
    check_images(read_hub_copy(str(copy), "val", image_dir=str(tmp_path / "photos")))


def test_one_reference_a_row_with_the_image_in_it(copy):
    rows = [
        reference_row(ref_id) | {"image": {"bytes": photo(REFERENCES[ref_id][0]), "path": None}}
        for ref_id in REFERENCES
    ]
    write_split(copy, "train", rows, REFERENCE_ROW | {"image": IMAGE})
    check_images(read_hub_copy(copy, "train"))


def test_crowds_come_as_run_lengths(tmp_path, copy):
    mask = true_mask(9)
    flat = mask.flatten(order="F").astype(int)
    starts = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *starts, flat.size]).tolist()  # the first run is of zeros, as the first pixel is
    assert not flat[0]
    row = reference_row(9, segmentation={"size": list(mask.shape), "counts": runs}, iscrowd=1)
    write_split(copy, "train", [row], REFERENCE_ROW)
    write_photos(tmp_path / "photos")
    (image,) = read_hub_copy(copy, "train", image_dir=tmp_path / "photos")
    assert np.array_equal(decode_mask(build_row(image)["references"][0]["mask"]), mask)


def test_copies_without_images_want_a_folder(tmp_path, copy):
    write_split(copy, "train", [reference_row(7)], REFERENCE_ROW)
    with pytest.raises(ValueError, match=r"holds no images: expected an image_dir .* none was given"):
        read_hub_copy(copy, "train")
    with pytest.raises(ValueError, match="elsewhere is not a folder"):
        read_hub_copy(copy, "train", image_dir=tmp_path / "elsewhere")


def test_missing_images_are_named_when_the_dataset_is_built(tmp_path, copy, caplog):
    write_split(copy, "train", [reference_row(ref_id) for ref_id in REFERENCES], REFERENCE_ROW)
    write_photos(tmp_path / "photos")
    (tmp_path / "photos" / NAMES[581857]).unlink()
    images = read_hub_copy(copy, "train", image_dir=tmp_path / "photos")
    with pytest.raises(BadImage, match=f"{NAMES[581857]}: missing"):
        build_dataset(images, progress=False)
    assert build_dataset(images, skip_bad=True, progress=False)["image_id"][:] == [131074]
    assert NAMES[581857] in caplog.text


def test_image_paths_stay_in_the_folder(tmp_path, copy):
    write_photos(tmp_path / "outside")
    (tmp_path / "photos").mkdir()
    row = reference_row(7)
    rows = [row | {"image_path": f"../outside/{NAMES[581857]}"}, row | {"image_path": f"{tmp_path}/outside/x.jpg"}]
    write_split(copy, "train", rows, REFERENCE_ROW)
    for image in read_hub_copy(copy, "train", image_dir=tmp_path / "photos"):
        assert image.image.parent == tmp_path / "photos"


@pytest.mark.parametrize("broken", ["[]", "no json", "null", '{"bbox": [0, 0, 1, 1], "category_id": 1}'])
def test_malformed_annotations_are_errors(tmp_path, copy, broken):
    write_split(copy, "train", [reference_row(7), reference_row(9) | {"raw_anns": broken}], REFERENCE_ROW)
    write_photos(tmp_path / "photos")
    with pytest.raises(ValueError, match="Row 1: expected raw_anns to be a JSON object with segmentation"):
        read_hub_copy(copy, "train", image_dir=tmp_path / "photos")


def test_images_of_one_name_in_two_folders(tmp_path, copy):
    rows = [reference_row(7), reference_row(3) | {"image_path": f"other/{NAMES[581857]}"}]
    write_split(copy, "train", rows, REFERENCE_ROW)
    write_photos(tmp_path / "photos")
    with pytest.raises(ValueError, match=r"for image 581857 \(.*\) and for image 131074 \(.*\): give a folder"):
        read_hub_copy(copy, "train", image_dir=tmp_path / "photos")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_id": "a"}, "Row 0: expected image_id to be a whole number of 64 bits, got 'a'"),
        ({"image_path": None}, "Row 0: expected image_path to be text, got None"),
        ({"ref_id": None}, "Row 0: expected ref_id to be a whole number of 64 bits, got None"),
        ({"sentences": None}, "Row 0: expected sentences to be a list, got None"),
        (
            {"sentences": [{"sent_id": 1}]},
            r"Row 0, ref_id 7, sentences: expected the fields \['sent', 'sent_id'\], got",
        ),
        (
            {"sentences": [{"sent_id": 1, "sent": None}]},
            "Row 0, ref_id 7, sentences: expected sent to be text, got None",
        ),
        (
            {"raw_anns": '{"segmentation": 1, "bbox": 1, "category_id": [1]}'},
            "Row 0, annotation 1719310: expected categor",
        ),
        ({"raw_anns": 5000 * "["}, "Row 0: expected raw_anns to be a JSON object with segmentation"),
    ],
)
def test_values_of_another_kind_are_named_with_their_row(tmp_path, copy, changes, message):
    copy.mkdir()
    (copy / "train.jsonl").write_text(json.dumps(reference_row(7) | changes))
    write_photos(tmp_path / "photos")
    with pytest.raises(ValueError, match=f"{copy}: {message}"):
        read_hub_copy(copy, "train", image_dir=tmp_path / "photos")


@pytest.mark.parametrize(
    "segmentation", [None, 5, "x", {"size": [40], "counts": "a"}, [[1e9, 1, 12, 1, 12, 9]], [[1, 2]]]
)
def test_damaged_outlines_are_their_images_fault(tmp_path, copy, segmentation):
    copy.mkdir()
    (copy / "train.jsonl").write_text(json.dumps(reference_row(7, segmentation=segmentation)))
    write_photos(tmp_path / "photos")
    (image,) = read_hub_copy(copy, "train", image_dir=tmp_path / "photos")
    with pytest.raises(BadImage, match=rf"{NAMES[581857]}: ref_id 7: "):
        build_row(image)


@pytest.mark.parametrize("mask", [None, {"size": None, "counts": None}, {"size": [40], "counts": "a"}])
def test_damaged_masks_are_their_images_fault(copy, mask):
    row = mask_row(581857)
    row["samples"][0]["mask"] = mask
    write_split(copy, "validation", [row], MASK_ROW)
    (image,) = read_hub_copy(copy, "validation")
    with pytest.raises(BadImage, match=rf"{NAMES[581857]}: ref_id 7: "):
        build_row(image)


def test_flattened_polygons_that_are_none(copy):
    rows = [question_row(7, segmentation=None, bbox=None), question_row(9, segmentation=[1.0, 2.0, 3.0])]
    write_split(copy, "test", rows, QUESTION_ROW)
    (image,) = read_hub_copy(copy, "test")
    for reference in image.references:
        with pytest.raises(BadImage, match=r"ref_id \d: A polygon must be"):
            build_row(replace(image, references=(reference,)))


def test_rows_that_name_files_mean_those_of_the_copy(tmp_path, copy):
    write_photos(tmp_path / "secret")
    write_photos(copy / "photos")
    for folder, message in ((copy / "photos", None), (tmp_path / "secret", "leads out of the folder of the images")):
        row = mask_row(581857) | {"image": {"bytes": None, "path": str(folder / NAMES[581857])}}
        write_split(copy, "validation", [row], MASK_ROW)
        (image,) = read_hub_copy(copy, "validation")
        if message is None:
            assert build_row(image)["image"]["bytes"] == photo(581857)
        else:
            with pytest.raises(BadImage, match=f"{NAMES[581857]}: cannot be read .it {message}"):
                build_row(image)
            (image,) = read_hub_copy(copy, "validation", image_dir=folder)
            assert build_row(image)["image"]["bytes"] == photo(581857)


def test_rows_that_stand_twice_are_named(tmp_path, copy, caplog):
    write_split(copy, "train", [reference_row(ref_id) for ref_id in (7, 3, 9, 3)], REFERENCE_ROW)
    write_photos(tmp_path / "photos")
    images = read_hub_copy(copy, "train", image_dir=tmp_path / "photos")
    assert [len(image.references) for image in images] == [2, 2]
    assert "1 ids of references occur more than once and are counted as often (3)" in caplog.text


def test_benchmark(copy, caplog):
    write_split(copy, "refcoco_unc_val", [benchmark_row(image_id) for image_id in SIZES], BENCHMARK_ROW)
    (copy / "data" / "refcoco_google_val-00000-of-00001-0.parquet").write_bytes(b"never read")
    images = read_hub_copy(copy, "refcoco_unc_val")
    assert [image.size for image in images] == list(SIZES.values())
    for row in check_images(images):
        for reference in row["references"]:
            assert reference["ann_id"] == REFERENCES[reference["ref_id"]][1]
            assert [(expression["sent_id"], expression["text"]) for expression in reference["expressions"]] == [
                (sent_id, sent) for sent_id, _, sent in SENTENCES[reference["ref_id"]]
            ]
    assert caplog.text == ""
    with pytest.raises(ValueError, match="no split 'val', it has refcoco_google_val, refcoco_unc_val"):
        read_hub_copy(copy, "val")


def test_flattened_polygons(copy, caplog):
    write_split(copy, "testA", [question_row(ref_id) for ref_id in REFERENCES], QUESTION_ROW)
    images = read_hub_copy(copy, "testA")
    assert [(image.image_id, image.file_name, image.size) for image in images] == [
        (image_id, name, None) for image_id, name in NAMES.items()
    ]
    rows = [build_row(image) for image in images]
    references = {reference["ref_id"]: reference for row in rows for reference in row["references"]}
    assert list(references) == [0, 2, 1]  # by image; ref_id is the number of the row
    for number, ref_id in enumerate(REFERENCES):
        image_id, ann_id, boxes = REFERENCES[ref_id]
        x, y, width, height = boxes[0]
        mask = np.zeros(SIZES[image_id], dtype=bool)
        mask[y : y + height, x : x + width] = True
        assert np.array_equal(decode_mask(references[number]["mask"]), mask)
        assert references[number]["ann_id"] == ann_id
        assert references[number]["bbox"] == true_box(ref_id)
        assert references[number]["category"] == ""
    expressions = [references[number]["expressions"] for number in range(3)]
    assert [[(expression["sent_id"], expression["text"]) for expression in each] for each in expressions] == [
        [(0, "man in Red."), (1, "LEFT")],
        [(2, "cup")],
        [(3, "b")],
    ]
    assert "1 of 3 polygons do not reach the edges of their boxes" in caplog.text
    assert "5,000 Google" not in caplog.text


def test_mixed_val_splits_are_said(copy, caplog, monkeypatch):
    write_split(copy, "val", [question_row(ref_id) for ref_id in REFERENCES], QUESTION_ROW)
    read_hub_copy(copy, "validation")
    assert "the val split of this copy has 3 references. lmms-lab's val splits" in caplog.text
    caplog.clear()
    monkeypatch.setattr(hub_copies, "_NUM_VAL_REFERENCES", {3})  # as one split of RefCOCO has by itself
    read_hub_copy(copy, "val")
    assert "one polygon for each object" in caplog.text
    assert "5,000 Google" not in caplog.text


def test_flattened_polygons_are_filled_as_their_decimals(copy):
    """float32 moves points that lie between two of the fifths of a pixel that polygons are filled on."""
    rng = np.random.default_rng(0)
    size = SIZES[581857]
    polygons = [np.round(rng.integers(0, 30, 8) + rng.choice([0.1, 0.3, 0.7, 0.9], 8), 2).tolist() for _ in range(40)]

    def fill(polygon):
        return coco_mask.decode(coco_mask.frPyObjects([polygon], *size))[..., 0].astype(bool)

    as_stored = [np.float32(polygon).astype(np.float64).tolist() for polygon in polygons]
    assert any((fill(one) != fill(other)).any() for one, other in zip(polygons, as_stored))
    write_split(copy, "test", [question_row(7, segmentation=polygon) for polygon in polygons], QUESTION_ROW)
    (image,) = read_hub_copy(copy, "test")
    for reference, polygon in zip(build_row(image)["references"], polygons, strict=True):
        assert np.array_equal(decode_mask(reference["mask"]), fill(polygon))


@pytest.mark.parametrize(
    "changes", [{"file_name": "581857.jpg"}, {"file_name": "COCO_train2014_581857.jpg"}, {"question_id": "val_3"}]
)
def test_ids_that_cannot_be_read_are_errors(copy, changes):
    write_split(copy, "test", [question_row(7), question_row(9, **changes)], QUESTION_ROW)
    with pytest.raises(ValueError, match=f"Row 1: expected a file_name .* got .*{next(iter(changes.values()))}"):
        read_hub_copy(copy, "test")


def test_masks_drawn_anew(copy, caplog):
    write_split(copy, "validation", [mask_row(image_id) for image_id in SIZES], MASK_ROW)
    images = read_hub_copy(copy, "val")
    assert [image.size for image in images] == list(SIZES.values())
    rows = check_images(images)
    expressions = [
        expression for row in rows for reference in row["references"] for expression in reference["expressions"]
    ]
    assert [(expression["sent_id"], expression["text"]) for expression in expressions] == [
        (0, "man in red"),
        (1, "left"),
        (2, "b"),
        (3, "cup"),
    ]
    assert caplog.text == ""


def test_masks_of_another_size_than_the_image_are_bad(copy):
    row = mask_row(581857)
    row["samples"][1]["mask"] = encode_mask(np.ones((60, 40), dtype=bool))
    write_split(copy, "validation", [row], MASK_ROW)
    (image,) = read_hub_copy(copy, "validation")
    with pytest.raises(BadImage, match=r"ref_id 9: .*\(60, 40\)"):
        build_row(image)


@pytest.mark.parametrize("layout", ["reference", "benchmark", "question"])
def test_an_outline_that_was_lost_is_bad_and_not_an_empty_mask(tmp_path, copy, layout):
    row, features = {
        "reference": (reference_row(7, segmentation=[]), REFERENCE_ROW),
        "benchmark": (benchmark_row(581857, segmentation=[]), BENCHMARK_ROW),
        "question": (question_row(7, segmentation=[]), QUESTION_ROW),
    }[layout]
    write_split(copy, "test", [row], features)
    write_photos(tmp_path / "photos")
    (image,) = read_hub_copy(copy, "test", image_dir=tmp_path / "photos")
    with pytest.raises(BadImage, match=r"ref_id \d: A polygon must be"):
        build_row(image)


def test_embedded_images_survive_the_way_to_a_dataset(tmp_path, copy):
    write_split(copy, "refcoco_unc_val", [benchmark_row(image_id) for image_id in SIZES], BENCHMARK_ROW)
    dataset = build_dataset(read_hub_copy(copy, "refcoco_unc_val"), progress=False)
    assert dataset["file_name"][:] == list(NAMES.values())
    for row in dataset:
        assert np.array_equal(np.asarray(row["image"]), pixels(row["image_id"]))


@pytest.mark.parametrize(
    ("name", "content"), [("train.parquet", b"PAR1"), ("train.jsonl", b'{"a": 1}\n{"a": "x"}\n[')]
)
def test_damaged_files_are_said(copy, name, content):
    copy.mkdir()
    (copy / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"The files of {copy} cannot be read: "):
        read_hub_copy(copy, "train")


def test_images_that_are_none_are_said(copy):
    (copy / "data").mkdir(parents=True)
    row = mask_row(581857) | {"image": 5}
    (copy / "data" / "train.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=r"copy: expected images in the column image, got Value\('int64'\)"):
        read_hub_copy(copy, "train")


def test_other_columns_are_listed_with_those_expected(copy):
    features = {name: REFERENCE_ROW[name] for name in ("ref_id", "image_path")}
    write_split(copy, "train", [{"ref_id": 1, "image_path": "x.jpg"}], features)
    with pytest.raises(ValueError, match="has the columns ref_id, image_path") as error:
        read_hub_copy(copy, "train")
    for layout in (BENCHMARK_ROW, {"samples": None}, {"question_id": None}, {"raw_anns": None}):
        assert all(name in str(error.value) for name in layout)


@pytest.mark.parametrize(
    ("available", "wanted", "found"),
    [
        (["train", "validation", "test", "testB"], "val", "validation"),
        (["train", "validation", "test", "testB"], "testA", "test"),  # as jxu124/refcoco
        (["train", "validation", "test", "testB"], "test", "test"),
        (["train", "validation", "test"], "testA", None),  # as jxu124/refcocog: its test is no testA
        (["val", "test", "testA", "testB"], "validation", "val"),
        (["val", "test", "testA", "testB"], "testA", "testA"),  # as lmms-lab/RefCOCO: test is Google's
        (["val", "test", "testA", "testB"], "test", "test"),
        (["val", "testA", "testB"], "test", None),
        (["val", "testA", "testB"], "train", None),
    ],
)
def test_names_of_splits(copy, available, wanted, found):
    for number, name in enumerate(available):
        write_split(copy, name, [mask_row(581857) | {"image_id": number}], MASK_ROW)
    if found is None:
        with pytest.raises(ValueError, match=f"has no split '{wanted}', it has {', '.join(sorted(available))}"):
            read_hub_copy(copy, wanted)
    else:
        assert read_hub_copy(copy, wanted)[0].image_id == available.index(found)
