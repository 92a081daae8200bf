"""Copies of the RefCOCO family in each layout on the Hub, written to Parquet and JSON as on the Hub."""

import io
import json
from dataclasses import replace

import datasets
import numpy as np
import pytest
from coco_annotations import run_lengths
from pictures import encode
from PIL import Image
from pycocotools import mask as coco_mask

from modeling_restr.data import hub_copies
from modeling_restr.data.canonical import BadImage, build_dataset, build_row
from modeling_restr.data.hub_copies import read_hub_copy
from modeling_restr.data.segmentation import decode_mask, encode_mask


SIZES = {581857: (40, 60), 131074: (50, 30)}  # image id -> (height, width)
NAMES = {image_id: f"COCO_train2014_{image_id:012d}.jpg" for image_id in SIZES}
# ref_id -> (image_id, ann_id, [x, y, width, height] of parts), with whole numbers, so that a mask is a slice.
REFERENCES = {
    7: (581857, 1719310, [[5, 6, 20, 10]]),
    3: (131074, 502, [[1, 2, 10, 12], [15, 30, 9, 20]]),
    9: (581857, 44, [[30, 0, 30, 40]]),
}
CATEGORIES = {7: (1, "person"), 3: (44, "bottle"), 9: (90, "toothbrush")}
SENTENCES = {7: [(20, "man in Red.", "man in red"), (21, "LEFT", "left")], 3: [(5, "cup", "cup")], 9: [(1, "b", "b")]}


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def copy(tmp_path):
    return tmp_path / "copy"


@pytest.fixture
def photos(tmp_path):
    write_photos(tmp_path / "photos")
    return tmp_path / "photos"


def write_split(copy, split, rows):
    """A Parquet file with the column types of the copies on the Hub."""
    (copy / "data").mkdir(parents=True, exist_ok=True)
    dataset = datasets.Dataset.from_list(rows)
    if "image" in rows[0]:
        dataset = dataset.cast_column("image", datasets.Image())
    if "question" in rows[0]:
        for name in ("segmentation", "bbox"):
            dataset = dataset.cast_column(name, datasets.List(datasets.Value("float32")))
    dataset.to_parquet(copy / "data" / f"{split}-00000-of-00001-0123456789abcdef.parquet")


def write_lines(copy, *rows, split="train"):
    copy.mkdir(exist_ok=True)
    (copy / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def photo(image_id):
    height, width = SIZES[image_id]
    noise = np.random.default_rng(image_id).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return encode(Image.fromarray(noise), "JPEG")


def pixels(image_id):
    return np.asarray(Image.open(io.BytesIO(photo(image_id))))


def write_photos(folder):
    folder.mkdir(parents=True)
    for image_id, name in NAMES.items():
        (folder / name).write_bytes(photo(image_id))


def corners(box):
    x, y, width, height = box
    return [x, y, x + width, y, x + width, y + height, x, y + height]


def true_box(ref_id):
    boxes = np.array(REFERENCES[ref_id][2])
    start, end = boxes[:, :2].min(axis=0), (boxes[:, :2] + boxes[:, 2:]).max(axis=0)
    return [*start.tolist(), *(end - start).tolist()]


def true_mask(ref_id, num_parts=None):
    image_id, _, boxes = REFERENCES[ref_id]
    mask = np.zeros(SIZES[image_id], dtype=bool)
    for x, y, width, height in boxes[:num_parts]:
        mask[y : y + height, x : x + width] = True
    return mask


def references_of(image_id):
    return [ref_id for ref_id, (own_image, *_) in REFERENCES.items() if own_image == image_id]


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
    return {"file_name": NAMES[image_id], "height": height, "width": width, "id": image_id, "license": 1}


def refer_ref(ref_id):
    image_id, ann_id, _ = REFERENCES[ref_id]
    return {
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
    image_id = REFERENCES[ref_id][0]
    return refer_ref(ref_id) | {
        "raw_anns": json.dumps(coco_annotation(ref_id, **annotation_changes)),
        "raw_image_info": json.dumps(coco_image(image_id)),
        "image_path": f"coco/train2014/{NAMES[image_id]}",
        "bbox": [x, y, x + width, y + height],
    }


def benchmark_row(image_id, **annotation_changes):
    return {
        "ref_list": [
            {"ann_info": coco_annotation(ref_id, **annotation_changes), "ref_info": refer_ref(ref_id)}
            for ref_id in references_of(image_id)
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
        "file_name": NAMES[image_id].replace(".jpg", f"_{ref_id}.jpg"),
    } | changes


def mask_row(image_id):
    samples = [
        {
            "id": ref_id,
            "category": CATEGORIES[ref_id][1],
            "sentences": [sent for _, _, sent in SENTENCES[ref_id]],
            "bbox": true_box(ref_id),
            "mask": encode_mask(true_mask(ref_id)),
        }
        for ref_id in references_of(image_id)
    ]
    image = {"bytes": photo(image_id), "path": NAMES[image_id]}
    return {"image": image, "image_id": image_id, "file_name": NAMES[image_id], "samples": samples}


def check_images(images, with_refer=True):
    """Compare the two images and their references, in the order of `REFERENCES`, with their sources."""
    assert [(image.image_id, image.file_name) for image in images] == list(NAMES.items())
    rows = [build_row(image) for image in images]
    assert [[reference["ref_id"] for reference in row["references"]] for row in rows] == [[7, 9], [3]]
    for row in rows:
        with Image.open(io.BytesIO(row["image"]["bytes"])) as image:
            assert np.array_equal(np.asarray(image), pixels(row["image_id"]))
        for reference in row["references"]:
            ref_id = reference["ref_id"]
            assert np.array_equal(decode_mask(reference["mask"]), true_mask(ref_id))
            assert (reference["bbox"], reference["category"]) == (true_box(ref_id), CATEGORIES[ref_id][1])
            if with_refer:
                sentences = [{"sent_id": sent_id, "text": sent} for sent_id, _, sent in SENTENCES[ref_id]]
                assert (reference["ann_id"], reference["expressions"]) == (REFERENCES[ref_id][1], sentences)
    return rows


@pytest.mark.parametrize("folder", ["coco/train2014", "train2014", "."])
def test_one_reference_per_row(tmp_path, copy, folder):
    write_split(copy, "train", [reference_row(ref_id) for ref_id in REFERENCES])
    write_photos(tmp_path / "photos" / folder)
    images = read_hub_copy(copy, "train", image_dir=tmp_path / "photos")
    for image in images:
        assert image.size == SIZES[image.image_id]
        assert image.image == tmp_path / "photos" / folder / NAMES[image.image_id]
    check_images(images)


def test_one_reference_per_row_in_json_files(copy, photos):
    write_lines(copy, *map(reference_row, REFERENCES), split="validation")
    check_images(read_hub_copy(str(copy), "val", image_dir=str(photos)))


def test_one_reference_per_row_with_the_image(copy):
    images = {ref_id: {"bytes": photo(image_id), "path": None} for ref_id, (image_id, *_) in REFERENCES.items()}
    write_split(copy, "train", [reference_row(ref_id) | {"image": images[ref_id]} for ref_id in REFERENCES])
    check_images(read_hub_copy(copy, "train"))


def test_crowds_come_as_run_lengths(copy, photos):
    mask = true_mask(9)
    write_lines(copy, reference_row(9, segmentation=run_lengths(mask), iscrowd=1))
    (image,) = read_hub_copy(copy, "train", image_dir=photos)
    assert np.array_equal(decode_mask(build_row(image)["references"][0]["mask"]), mask)


def test_benchmark(copy, caplog):
    write_split(copy, "refcoco_unc_val", [benchmark_row(image_id) for image_id in SIZES])
    (copy / "data" / "refcoco_google_val-00000-of-00001-0.parquet").write_bytes(b"never read")
    images = read_hub_copy(copy, "refcoco_unc_val")
    assert [image.size for image in images] == list(SIZES.values())
    check_images(images)
    assert caplog.text == ""
    dataset = build_dataset(images, progress=False)  # keeps the embedded images
    assert dataset["file_name"][:] == list(NAMES.values())
    assert all(np.array_equal(np.asarray(row["image"]), pixels(row["image_id"])) for row in dataset)
    with pytest.raises(ValueError, match="no split 'val', it has refcoco_google_val, refcoco_unc_val"):
        read_hub_copy(copy, "val")


def test_flattened_polygons(copy, caplog):
    write_split(copy, "testA", [question_row(ref_id) for ref_id in REFERENCES])
    images = read_hub_copy(copy, "testA")
    assert [(image.image_id, image.file_name, image.size) for image in images] == [
        (image_id, name, None) for image_id, name in NAMES.items()
    ]
    references = {reference["ref_id"]: reference for image in images for reference in build_row(image)["references"]}
    assert list(references) == [0, 2, 1]  # by image; ref_id is the number of the row
    for number, ref_id in enumerate(REFERENCES):
        reference = references[number]
        assert np.array_equal(decode_mask(reference["mask"]), true_mask(ref_id, num_parts=1))
        assert (reference["ann_id"], reference["bbox"]) == (REFERENCES[ref_id][1], true_box(ref_id))
        assert reference["category"] == ""
    expressions = [(e["sent_id"], e["text"]) for number in range(3) for e in references[number]["expressions"]]
    assert expressions == [(0, "man in Red."), (1, "LEFT"), (2, "cup"), (3, "b")]
    assert "1 of 3 polygons do not reach the edges of their boxes" in caplog.text
    assert "5,000 Google" not in caplog.text


def test_mixed_val_splits_cause_a_warning(copy, caplog, monkeypatch):
    write_split(copy, "val", [question_row(ref_id) for ref_id in REFERENCES])
    read_hub_copy(copy, "validation")
    assert "the val split of this copy has 3 references. lmms-lab's val splits" in caplog.text
    caplog.clear()
    monkeypatch.setattr(hub_copies, "_NUM_VAL_REFERENCES", {3})  # as if one split of RefCOCO alone had as many
    read_hub_copy(copy, "val")
    assert "one polygon for each object" in caplog.text and "5,000 Google" not in caplog.text


def test_flattened_polygons_are_filled_as_their_decimals(copy):
    """Polygons are filled on a grid of fifths of a pixel, and float32 moves points across its lines."""
    rng = np.random.default_rng(0)
    polygons = [np.round(rng.integers(0, 30, 8) + rng.choice([0.1, 0.3, 0.7, 0.9], 8), 2).tolist() for _ in range(40)]

    def fill(polygon):
        return coco_mask.decode(coco_mask.frPyObjects([polygon], *SIZES[581857]))[..., 0].astype(bool)

    as_stored = [np.float32(polygon).astype(np.float64).tolist() for polygon in polygons]
    assert any((fill(one) != fill(other)).any() for one, other in zip(polygons, as_stored))
    write_split(copy, "test", [question_row(7, segmentation=polygon) for polygon in polygons])
    (image,) = read_hub_copy(copy, "test")
    for reference, polygon in zip(build_row(image)["references"], polygons, strict=True):
        assert np.array_equal(decode_mask(reference["mask"]), fill(polygon))


def test_new_masks(copy, caplog):
    write_split(copy, "validation", [mask_row(image_id) for image_id in SIZES])
    images = read_hub_copy(copy, "val")
    assert [image.size for image in images] == list(SIZES.values())
    rows = check_images(images, with_refer=False)
    expressions = [e for row in rows for reference in row["references"] for e in reference["expressions"]]
    texts = ["man in red", "left", "b", "cup"]
    assert [(e["sent_id"], e["text"]) for e in expressions] == list(enumerate(texts))
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("available", "wanted", "found"),
    [
        (["train", "validation", "test", "testB"], "val", "validation"),
        (["train", "validation", "test", "testB"], "testA", "test"),  # as jxu124/refcoco
        (["train", "validation", "test", "testB"], "test", "test"),
        (["train", "validation", "test"], "testA", None),  # as jxu124/refcocog, whose test is no testA
        (["val", "test", "testA", "testB"], "validation", "val"),
        (["val", "test", "testA", "testB"], "testA", "testA"),  # as lmms-lab/RefCOCO, whose test is Google's
        (["val", "test", "testA", "testB"], "test", "test"),
        (["val", "testA", "testB"], "test", None),
        (["val", "testA", "testB"], "train", None),
    ],
)
def test_names_of_splits(copy, available, wanted, found):
    for number, name in enumerate(available):
        write_split(copy, name, [mask_row(581857) | {"image_id": number}])
    if found is None:
        with pytest.raises(ValueError, match=f"has no split '{wanted}', it has {', '.join(sorted(available))}"):
            read_hub_copy(copy, wanted)
    else:
        assert read_hub_copy(copy, wanted)[0].image_id == available.index(found)


def test_copies_without_images_need_a_folder(tmp_path, copy):
    write_split(copy, "train", [reference_row(7)])
    with pytest.raises(ValueError, match=r"holds no images: expected an image_dir .* none was given"):
        read_hub_copy(copy, "train")
    with pytest.raises(ValueError, match="elsewhere is not a folder"):
        read_hub_copy(copy, "train", image_dir=tmp_path / "elsewhere")


def test_missing_images_are_named_when_the_dataset_is_built(copy, photos, caplog):
    write_split(copy, "train", [reference_row(ref_id) for ref_id in REFERENCES])
    (photos / NAMES[581857]).unlink()
    images = read_hub_copy(copy, "train", image_dir=photos)
    with pytest.raises(BadImage, match=f"{NAMES[581857]}: missing"):
        build_dataset(images, progress=False)
    assert build_dataset(images, skip_bad=True, progress=False)["image_id"][:] == [131074]
    assert NAMES[581857] in caplog.text


def test_image_paths_stay_in_the_folder(tmp_path, copy):
    write_photos(tmp_path / "outside")
    (tmp_path / "photos").mkdir()
    paths = [f"../outside/{NAMES[581857]}", f"{tmp_path}/outside/x.jpg"]
    write_split(copy, "train", [reference_row(7) | {"image_path": path} for path in paths])
    for image in read_hub_copy(copy, "train", image_dir=tmp_path / "photos"):
        assert image.image.parent == tmp_path / "photos"


def test_images_of_one_name_in_two_folders(copy, photos):
    write_split(copy, "train", [reference_row(7), reference_row(3) | {"image_path": f"other/{NAMES[581857]}"}])
    with pytest.raises(ValueError, match=r"for image 581857 \(.*\) and for image 131074 \(.*\): give a folder"):
        read_hub_copy(copy, "train", image_dir=photos)


def test_rows_that_name_files_mean_those_of_the_copy(tmp_path, copy):
    write_photos(tmp_path / "secret")
    write_photos(copy / "photos")
    for folder in (copy / "photos", tmp_path / "secret"):
        row = mask_row(581857) | {"image": {"bytes": None, "path": str(folder / NAMES[581857])}}
        write_split(copy, "validation", [row])
        (image,) = read_hub_copy(copy, "validation")
        if folder.is_relative_to(copy):
            assert build_row(image)["image"]["bytes"] == photo(581857)
    with pytest.raises(BadImage, match=f"{NAMES[581857]}: cannot be read .it leads out of the folder of the images"):
        build_row(image)
    (image,) = read_hub_copy(copy, "validation", image_dir=tmp_path / "secret")
    assert build_row(image)["image"]["bytes"] == photo(581857)


def test_repeated_rows_are_named(copy, photos, caplog):
    write_split(copy, "train", [reference_row(ref_id) for ref_id in (7, 3, 9, 3)])
    images = read_hub_copy(copy, "train", image_dir=photos)
    assert [len(image.references) for image in images] == [2, 2]
    assert "1 ids of references occur more than once, and each occurrence is counted (3)" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_id": "a"}, "Row 0: expected image_id to be a whole number of 64 bits, got 'a'"),
        ({"image_path": None}, "Row 0: expected image_path to be text, got None"),
        ({"ref_id": None}, "Row 0: expected ref_id to be a whole number of 64 bits, got None"),
        ({"sentences": None}, "Row 0: expected sentences to be a list, got None"),
        ({"sentences": [{"sent_id": 1}]}, r"Row 0, ref_id 7, sentences: expected the fields \['sent', 'sent_id'\]"),
        ({"sentences": [{"sent_id": 1, "sent": None}]}, "sentences: expected sent to be text, got None"),
        (
            {"raw_anns": '{"segmentation": 1, "bbox": 1, "category_id": [1]}'},
            "Row 0, annotation 1719310: expected categor",
        ),
        *(
            ({"raw_anns": broken}, "Row 0: expected raw_anns to be a JSON object with segmentation")
            for broken in ("[]", "no json", "null", '{"bbox": [0, 0, 1, 1], "category_id": 1}', 5000 * "[")
        ),
    ],
)
def test_values_of_wrong_types_are_named_with_their_row(copy, photos, changes, message):
    write_lines(copy, reference_row(7) | changes)
    with pytest.raises(ValueError, match=f"{copy}: .*{message}"):
        read_hub_copy(copy, "train", image_dir=photos)


@pytest.mark.parametrize(
    "changes", [{"file_name": "581857.jpg"}, {"file_name": "COCO_train2014_581857.jpg"}, {"question_id": "val_3"}]
)
def test_ids_that_cannot_be_read_are_errors(copy, changes):
    write_split(copy, "test", [question_row(7), question_row(9, **changes)])
    with pytest.raises(ValueError, match=f"Row 1: expected a file_name .* got .*{next(iter(changes.values()))}"):
        read_hub_copy(copy, "test")


SAMPLES = mask_row(581857)["samples"]


@pytest.mark.parametrize(
    "row",
    [
        *(
            reference_row(7, segmentation=segmentation)
            for segmentation in (None, 5, "x", {"size": [40], "counts": "a"}, [[1e9, 1, 12, 1, 12, 9]], [[1, 2]], [])
        ),
        *(
            mask_row(581857) | {"samples": [SAMPLES[0] | {"mask": mask}]}
            for mask in (
                *(None, {"size": None, "counts": None}, {"size": [40], "counts": "a"}),
                encode_mask(np.ones((60, 40), dtype=bool)),  # of another size than the image
            )
        ),
        question_row(7, segmentation=None, bbox=None),
        question_row(9, segmentation=[1.0, 2.0, 3.0]),
        question_row(7, segmentation=[]),
        benchmark_row(581857, segmentation=[]),
    ],
)
def test_damaged_or_lost_masks_make_bad_images(copy, photos, row):
    if "raw_anns" in row:
        write_lines(copy, row)
    else:
        write_split(copy, "train", [row])
    (image,) = read_hub_copy(copy, "train", image_dir=photos)
    for reference in image.references:
        with pytest.raises(BadImage, match=rf"{NAMES[581857]}: (ref_id \d: |decodes to)"):
            build_row(replace(image, references=(reference,)))


@pytest.mark.parametrize(
    ("name", "content"), [("train.parquet", b"PAR1"), ("train.jsonl", b'{"a": 1}\n{"a": "x"}\n[')]
)
def test_damaged_files_are_errors(copy, name, content):
    copy.mkdir()
    (copy / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"The files of {copy} cannot be read: "):
        read_hub_copy(copy, "train")


def test_image_paths_that_are_not_text_are_errors(copy, monkeypatch):
    rows = datasets.Dataset.from_list([mask_row(581857) | {"image": {"bytes": photo(581857), "path": b"\xff"}}])
    monkeypatch.setattr(hub_copies, "_load_split", lambda *arguments: ("train", rows))
    with pytest.raises(ValueError, match="copy: expected images in the column image"):
        read_hub_copy(copy, "train")


def test_other_columns_are_errors(copy):
    write_lines(copy, mask_row(581857) | {"image": 5})
    with pytest.raises(ValueError, match=r"copy: expected images in the column image, got Value\('int64'\)"):
        read_hub_copy(copy, "train")
    write_lines(copy, {"ref_id": 1, "image_path": "x.jpg"})
    with pytest.raises(ValueError, match="has the columns ref_id, image_path") as error:
        read_hub_copy(copy, "train")
    for expected in ("ref_list", "image_info", "samples", "question_id", "raw_anns"):
        assert expected in str(error.value)
