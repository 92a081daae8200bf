"""ReferIt's layout, with MATLAB masks that SciPy writes."""

import json
import pickle
import sys

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from modeling_restr.data import build_dataset, decode_mask, read_referit
from modeling_restr.data.canonical import FEATURES, BadImage
from modeling_restr.data.mat_files import MatReader


HEIGHT, WIDTH = 24, 32
QUERIES = {
    "8756_2": ["sunray at very top", "the café on the left"],
    "112_10": ["any of the people"],
    "8756_1": ["sky"],
}


def object_mask(name):
    return np.random.default_rng(sum(map(int, name.split("_")))).random((HEIGHT, WIDTH)) < 0.3


@pytest.fixture
def data(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    for name in QUERIES:
        # 0 inside the object; other values outside, not only 1
        outside = np.random.default_rng(0).integers(1, 255, (HEIGHT, WIDTH), dtype=np.uint8)
        content = {"segimg_t": np.where(object_mask(name), 0, outside), "other": np.zeros(3)}
        savemat(tmp_path / "masks" / f"{name}.mat", content, do_compression=True)
        Image.new("RGB", (WIDTH, HEIGHT), "gray").save(tmp_path / "images" / f"{name.split('_')[0]}.jpg")
    write_queries(tmp_path, QUERIES)
    return tmp_path


def write_queries(folder, queries, split="test"):
    (folder / f"referit_query_{split}.json").write_text(json.dumps(queries))


def read(folder, **kwargs):
    return read_referit(folder, folder / "masks", folder / "images", **kwargs)


def test_dataset_has_the_objects_of_the_mat_files(data):
    dataset = build_dataset(read(data), progress=False)
    assert dataset.features == FEATURES
    assert dataset["image_id"][:] == [8756, 112]  # in the file's order
    assert dataset["file_name"][:] == ["8756.jpg", "112.jpg"]
    assert dataset[0]["image"].size == (WIDTH, HEIGHT)
    names = [["8756_2", "8756_1"], ["112_10"]]
    for row, row_names in zip(dataset, names, strict=True):
        for reference, name in zip(row["references"], row_names, strict=True):
            mask = decode_mask(reference["mask"])
            assert np.array_equal(mask, object_mask(name))
            columns, rows = mask.any(axis=0).nonzero()[0], mask.any(axis=1).nonzero()[0]
            assert reference["bbox"] == [columns[0], rows[0], np.ptp(columns) + 1, np.ptp(rows) + 1]
            assert [expression["text"] for expression in reference["expressions"]] == QUERIES[name]
            assert reference["category"] == ""


def test_numbers_are_the_same_in_every_split_that_has_them(data):
    write_queries(data, {"8756_1": ["sky"], "112_10": ["any of the people"]}, "trainval")
    test, trainval = read(data), read(data, split="trainval")
    assert [reference.ref_id for image in test for reference in image.references] == [8756002, 8756001, 112010]
    assert test[0].references[0].expressions[1] == (8756002001, "the café on the left")
    assert trainval[0].references[0].expressions == test[0].references[1].expressions == ((8756001000, "sky"),)
    sent_ids = [sent_id for image in test for reference in image.references for sent_id, _ in reference.expressions]
    assert len(set(sent_ids)) == 4


def test_masks_are_read_in_the_process_that_builds_the_rows(data):
    images = read(data)
    for file in (data / "masks").iterdir():
        moved = file.with_suffix(".moved")
        file.rename(moved)
    images = pickle.loads(pickle.dumps(images))
    for file in (data / "masks").iterdir():
        file.rename(file.with_suffix(".mat"))
    masks = [decode_mask(row["references"][0]["mask"]) for row in build_dataset(images, progress=False)]
    assert np.array_equal(masks, [object_mask("8756_2"), object_mask("112_10")])


def test_bad_masks_are_bad_images(data):
    (data / "masks/8756_1.mat").unlink()
    with pytest.raises(BadImage, match=r"8756\.jpg: ref_id 8756001: The mask .*8756_1\.mat is missing"):
        build_dataset(read(data), progress=False)
    assert build_dataset(read(data), skip_bad=True, progress=False)["image_id"][:] == [112]
    whole = (data / "masks/112_10.mat").read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"<html>Not found</html>"):
        (data / "masks/112_10.mat").write_bytes(content)
        with pytest.raises(BadImage, match=r"112\.jpg: ref_id 112010: The mask .*112_10\.mat cannot be read"):
            build_dataset(read(data)[1:], progress=False)
    savemat(data / "masks/112_10.mat", {"mask": np.zeros((HEIGHT, WIDTH))})
    with pytest.raises(BadImage, match=r"112_10\.mat cannot be read \(KeyError: 'segimg_t'\)"):
        build_dataset(read(data)[1:], progress=False)
    savemat(data / "masks/112_10.mat", {"segimg_t": np.zeros((WIDTH, HEIGHT))})
    with pytest.raises(BadImage, match=r"112010: The mask is of size \(32, 24\) .* its image of \(24, 32\)"):
        build_dataset(read(data)[1:], progress=False)


def test_masks_that_crash_scipy_are_bad_images(data):
    savemat(data / "masks/112_10.mat", {"segimg_t": np.zeros((HEIGHT, WIDTH), np.uint8)})
    crash = bytearray((data / "masks/112_10.mat").read_bytes())
    crash[184] = 0  # a data type that SciPy follows without a look
    (data / "masks/112_10.mat").write_bytes(crash)
    with pytest.raises(BadImage, match=r"112\.jpg: ref_id 112010: The mask .*112_10\.mat cannot be read \("):
        build_dataset(read(data), progress=False)
    assert build_dataset(read(data), skip_bad=True, progress=False)["image_id"][:] == [8756]


def test_a_reader_process_that_died_is_restarted(data):
    reader = MatReader()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"KeyError: 'x'"):
            reader.read_zeros(data / "masks/8756_1.mat", "x")
        reader._process.kill()
        with pytest.raises(ValueError, match=r"the process that read it ended with code -?\d+"):
            reader.read_zeros(data / "masks/8756_1.mat", "segimg_t")
        assert np.array_equal(reader.read_zeros(data / "masks/8756_1.mat", "segimg_t"), object_mask("8756_1"))


@pytest.mark.parametrize("value", [1, np.nan])
def test_masks_without_the_object_are_bad_images(data, value):
    savemat(data / "masks/112_10.mat", {"segimg_t": np.full((HEIGHT, WIDTH), value)})
    with pytest.raises(BadImage, match=r"112\.jpg: ref_id 112010: The object covers no pixel of its image"):
        build_dataset(read(data), progress=False)


def test_images_outside_of_their_folder_are_bad(data):
    (data / "images/112.jpg").rename(data / "elsewhere.jpg")
    (data / "images/112.jpg").symlink_to(data / "elsewhere.jpg")
    with pytest.raises(BadImage, match=r"112\.jpg: cannot be read \(it leads out of the folder of the images"):
        build_dataset(read(data), progress=False)


def test_repeated_names_are_reported(data, caplog):
    (data / "referit_query_test.json").write_text('{"8756_1": ["sky"], "112_10": ["a"], "8756_1": ["sun"]}')
    with pytest.raises(ValueError, match=r"referit_query_test\.json .*: 8756_1 is there twice"):
        read(data)
    write_queries(data, {"8756_1": ["sky"], "08756_1": ["sun"]})
    read(data)
    assert (
        "referit_query_test.json: 1 ids of references occur more than once, and each occurrence is counted (8756001)"
        in caplog.text
    )


def test_splits_that_do_not_exist_are_explained(data):
    write_queries(data, QUERIES, "train")
    message = r"Expected referit_query_val\.json in .*, got referit_query_test\.json, referit_query_train\.json"
    with pytest.raises(ValueError, match=message):
        read(data, split="val")
    with pytest.raises(ValueError, match="got none"):
        read_referit(data / "nowhere", data, data)


@pytest.mark.parametrize(
    "queries",
    [
        ["sky"],
        {"8756": ["sky"]},
        {"a_1": ["sky"]},
        {"8756_1": "sky"},
        {"8756_1": [1]},
        {"8756_1": [None]},
        {"8756_1": {"sky": 1}},
        {"8756_1000": ["sky"]},
        {f"{10**12}_1": ["sky"]},  # its ids would not fit into 64 bits
    ],
)
def test_files_in_other_formats_are_explained(data, queries):
    write_queries(data, queries)
    with pytest.raises(
        ValueError, match=r"referit_query_test\.json to hold \{\"IMAGE_OBJECT\": \[text, \.\.\.\]\}, got"
    ):
        read(data)


def test_scipy_is_named_if_it_is_missing(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(ImportError, match=r'SciPy reads: `pip install "modeling-restr\[train\]"`'):
        read(data)
