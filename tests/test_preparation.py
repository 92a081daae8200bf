"""Prepared folders: their content, adding splits, refusing other data, and pushing."""

import dataclasses
import json
import re
import runpy

import datasets
import numpy as np
import pytest
from annotated_images import TWO_BOXES, make_images, read_rows
from filelock import FileLock
from folders import read_files
from hub_server import USER, serve

from modeling_restr.data.canonical import FEATURES, AnnotatedReference, BadImage
from modeling_restr.data.dataset_card import Source
from modeling_restr.data.preparation import (
    fingerprint,
    list_shards,
    prepare,
    push_to_hub,
    read_prepared_splits,
    read_settings,
    read_source,
)
from modeling_restr.data.published_counts import Counts


SOURCE = Source(
    name="refcoco",
    title="RefCOCO (unc)",
    description="Read so.",
    origins=("refcoco",),
    options={"seed": 0},
    published={"val": ("refcoco", "unc", "val")},
)


@pytest.fixture
def images(tmp_path):
    return make_images(tmp_path / "images", range(1, 8))


def test_folder_loads_with_all_splits_also_as_a_stream(tmp_path, images):
    output = tmp_path / "output"
    prepared = prepare(SOURCE, {"val": images[:5], "testA": images[5:]}, output, images_per_shard=2)
    assert {name: split.counts for name, split in prepared.items()} == {
        "val": Counts(5, 10, 15),
        "testA": Counts(2, 4, 6),
    }
    loaded = datasets.load_dataset(str(output), cache_dir=str(tmp_path / "cache"))
    assert {name: len(split) for name, split in loaded.items()} == {"val": 5, "testA": 2}
    assert loaded["val"].features == FEATURES
    rows = read_rows(output, "val", tmp_path / "cache")
    assert [row["image_id"] for row in rows] == [1, 2, 3, 4, 5]
    stream = datasets.load_dataset(str(output), split="testA", streaming=True)
    assert stream.features == FEATURES
    for row, image in zip(stream, images[5:], strict=True):
        assert row["file_name"] == image.file_name
        assert np.asarray(row["image"]).shape == (*image.size, 3)
    assert loaded["val"].filter(lambda row: row["image_id"] > 3).num_rows == 2


def test_folder_of_the_same_name_does_not_come_from_the_cache(tmp_path, images):
    for number, part in enumerate((images[:3], images[3:6])):  # as many rows in both
        output = tmp_path / str(number) / "output"
        prepare(SOURCE, {"val": part}, output)
        rows = read_rows(output, "val", tmp_path / "cache")
        assert [row["image_id"] for row in rows] == [image.image_id for image in part]


def test_second_run_changes_nothing(tmp_path, images):
    output = tmp_path / "output"
    first = prepare(SOURCE, {"val": images}, output, images_per_shard=3)
    files, times = read_files(output), {path: path.stat().st_mtime_ns for path in output.rglob("*.parquet")}
    assert len(times) == 3
    assert prepare(SOURCE, {"val": images}, output, images_per_shard=3) == first
    assert read_files(output) == files
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.parquet")} == times


def test_splits_can_be_added_later(tmp_path, images):
    output = tmp_path / "output"
    prepare(dataclasses.replace(SOURCE, description="In other words."), {"val": images[:2]}, output)
    val = next(output.rglob("val-*.parquet")).read_bytes()
    prepared = prepare(SOURCE, {"testA": images[2:]}, output)
    assert list(prepared) == ["val", "testA"] and prepared == read_prepared_splits(output)
    assert next(output.rglob("val-*.parquet")).read_bytes() == val
    assert len(datasets.load_dataset(str(output), cache_dir=str(tmp_path / "cache"))) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": dataclasses.replace(SOURCE, options={"seed": 1})}, r"settings: seed was 0, and is now 1\. Choose"),
        ({"source": dataclasses.replace(SOURCE, title="RefCOCO+ (unc)")}, r"now 'RefCOCO\+ \(unc\)'"),
        ({"images_per_shard": 4}, "images_per_shard was 3, and is now 4"),
    ],
)
def test_other_settings_in_the_same_folder_are_an_error(tmp_path, images, changes, message):
    output = tmp_path / "output"
    prepare(SOURCE, {"val": images}, output, images_per_shard=3)
    files = read_files(output)
    arguments = {"source": SOURCE, "splits": {"val": images}, "images_per_shard": 3, **changes}
    with pytest.raises(ValueError, match=message):
        prepare(output_dir=output, **arguments)
    assert read_files(output) == files


def test_other_annotations_in_the_same_folder_are_an_error(tmp_path, images):
    output = tmp_path / "output"
    prepare(SOURCE, {"val": images}, output)
    first = images[0].references[0]
    changed = dataclasses.replace(first, expressions=((0, "another"), *first.expressions[1:]))
    others = [dataclasses.replace(images[0], references=(changed,)), *images[1:]]
    with pytest.raises(ValueError, match=r"'val' in .* was prepared from other annotations"):
        prepare(SOURCE, {"val": others}, output)


def test_parquet_files_of_another_origin_are_left_alone(tmp_path, images):
    (tmp_path / "output" / "data").mkdir(parents=True)
    (tmp_path / "output" / "data" / "val.parquet").write_bytes(b"mine")
    with pytest.raises(ValueError, match="of another origin"):
        prepare(SOURCE, {"val": images}, tmp_path / "output")
    assert read_files(tmp_path / "output").keys() - {".preparation.lock"} == {"data/val.parquet"}


def test_two_preparations_in_one_folder_are_an_error(tmp_path, images):
    (tmp_path / "output").mkdir()
    with FileLock(tmp_path / "output" / ".preparation.lock"), pytest.raises(ValueError, match="Another process"):
        prepare(SOURCE, {"val": images}, tmp_path / "output")


def test_bad_images_stop_the_preparation_without_a_card_or_incomplete_files(tmp_path, images):
    output = tmp_path / "output"
    images[4].image.unlink()
    with pytest.raises(BadImage, match=f": 1\n  {images[4].file_name}: missing"):
        prepare(SOURCE, {"val": images}, output, images_per_shard=2)
    files = {name for name in read_files(output) if name != ".preparation.lock"}
    assert files == {"preparation.json", *(f"data/val-0000{index}-of-00004.parquet" for index in (0, 1))}
    assert list_shards(output) == {}
    prepared = prepare(SOURCE, {"val": images}, output, images_per_shard=2, skip_bad=True)
    assert prepared["val"].counts == Counts(6, 12, 18)
    assert len(prepared["val"].left_out) == 1 and prepared["val"].left_out[0].startswith(images[4].file_name)
    assert images[4].file_name in (output / "README.md").read_text()
    assert str(tmp_path) not in (output / "README.md").read_text()
    assert len(read_rows(output, "val", tmp_path / "cache")) == 6


@pytest.mark.parametrize("num_proc", [1, 2])
def test_dropped_objects_and_images_are_counted_by_kind(tmp_path, images, num_proc):
    images[4].image.unlink()
    stray = dataclasses.replace(images[5].references[0], segmentation=[[1, 2], *TWO_BOXES, [1, 2, 3, 4]])
    empty = dataclasses.replace(images[6].references[0], segmentation=[[3, 3, 9, 3, 9, 3]])
    images[5] = dataclasses.replace(images[5], references=(stray,))
    images[6] = dataclasses.replace(images[6], references=(empty,))
    for _ in range(2):  # the second time, nothing is made
        prepared = prepare(
            SOURCE, {"val": images}, tmp_path / "output", images_per_shard=3, skip_bad=True, num_proc=num_proc
        )
        assert prepared["val"].problems == {
            "missing images": [images[4].file_name],
            "polygons of one or two points, dropped": [f"{images[5].file_name}: ref_id {stray.ref_id}"] * 2,
            "images with an object without a usable mask or box": [images[6].file_name],
        }
    card = (tmp_path / "output" / "README.md").read_text()
    assert f"- missing images: 1 ({images[4].file_name})\n- polygons of one or two points, dropped: 2 (" in card


def test_two_images_of_one_file_in_two_splits_are_refused(tmp_path, images):
    other = dataclasses.replace(images[1], image=images[0].image)
    with pytest.raises(ValueError, match=r"000001\.jpg for image 1 \(.*\) and for image 2 \(.*000002\.jpg\): give"):
        prepare(SOURCE, {"train": images[:1], "val": [other]}, tmp_path / "output")
    same = dataclasses.replace(images[0], references=images[0].references[:1])  # an image may be in two splits
    prepare(SOURCE, {"train": images[:1], "val": [same]}, tmp_path / "output")


def test_a_split_of_bad_images_only_is_an_error(tmp_path, images):
    for image in images:
        image.image.unlink()
    with pytest.raises(BadImage, match=r"None of the 7 images of the split 'val'.*folder of the images"):
        prepare(SOURCE, {"val": images}, tmp_path / "output", skip_bad=True)
    assert not (tmp_path / "output" / "README.md").exists()


@pytest.mark.parametrize(
    ("splits", "arguments", "message"),
    [
        ({"val-1": [None]}, {}, "got 'val-1'"),
        ({"val": []}, {}, "'val' has no images"),
        ({}, {}, "at least one split"),
        ({"val": [None]}, {"images_per_shard": 0}, "images_per_shard=0"),
        ({"val": [None]}, {"num_proc": 0}, "num_proc=0"),
    ],
)
def test_arguments_out_of_range_are_errors(tmp_path, splits, arguments, message):
    with pytest.raises(ValueError, match=message):
        prepare(SOURCE, splits, tmp_path / "output", **arguments)
    assert not (tmp_path / "output").exists()


def test_source_is_read_back_as_it_was(tmp_path, images):
    prepare(SOURCE, {"val": images}, tmp_path / "output")
    assert read_source(tmp_path / "output") == SOURCE
    assert str(tmp_path) not in json.dumps(read_settings(tmp_path / "output"))
    with pytest.raises(ValueError, match="is not a prepared dataset"):
        read_settings(tmp_path)
    truncated = (tmp_path / "output" / "preparation.json").read_text()[:-9]
    for text in ("null", "[]", "1", "{}", truncated):
        (tmp_path / "preparation.json").write_text(text)
        with pytest.raises(ValueError, match=r"preparation\.json(: expected the fields| cannot be read as JSON)"):
            read_settings(tmp_path)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["images_per_shard"], 0),
        (["splits", "val"], 5),
        (["splits", "val", "num_images"], "4"),
        (["source", "origins"], 7),
        (["source", "origins"], ["a"]),
        (["source", "author"], "someone"),
        (["source", "published"], {"val": [1, 2, 3]}),
    ],
)
def test_damaged_settings_are_refused(tmp_path, images, path, value):
    prepare(SOURCE, {"val": images}, tmp_path)
    settings = record = json.loads((tmp_path / "preparation.json").read_text())
    for name in path[:-1]:
        record = record[name]
    record[path[-1]] = value
    (tmp_path / "preparation.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"preparation\.json.*: (.*[Ee]xpected|.*unexpected)"):
        read_source(tmp_path)


def test_fingerprint_depends_on_the_annotations_only(tmp_path, images):
    elsewhere = [dataclasses.replace(image, image=tmp_path / "elsewhere.jpg") for image in images]
    assert fingerprint(images) == fingerprint(elsewhere)
    prints = {fingerprint(images), fingerprint(images[:-1]), fingerprint(images[::-1])}
    mask = np.zeros((3, 4), dtype=bool)
    segmentations = [[], [[1.0, 2, 3, 4, 5, 6]], mask, ~mask, mask.T, {"size": [3, 4], "counts": b"<"}]
    for segmentation in segmentations:
        reference = AnnotatedReference(1, 1, "dog", segmentation, ((1, "a"),))
        prints.add(fingerprint([dataclasses.replace(images[0], references=(reference,))]))
    for changes in ({"ref_id": 2}, {"ann_id": 2}, {"category": "cat"}, {"bbox": [0.0, 0, 1, 1]}, {"expressions": ()}):
        reference = dataclasses.replace(AnnotatedReference(1, 1, "dog", [], ((1, "a"),)), **changes)
        prints.add(fingerprint([dataclasses.replace(images[0], references=(reference,))]))
    assert len(prints) == 3 + len(segmentations) + 5
    deep: list = []
    for _ in range(100_000):  # Python 3.13 follows 5,000
        deep = [deep]
    with pytest.raises(ValueError, match=rf"{images[0].file_name}: its annotations are nested too deeply"):
        fingerprint([dataclasses.replace(images[0], references=(dataclasses.replace(reference, bbox=deep),))])
    with pytest.raises(TypeError, match="cannot hold a set"):
        fingerprint([dataclasses.replace(images[0], references=(dataclasses.replace(reference, bbox={1}),))])


def test_push_is_one_commit_that_leaves_no_older_shards(tmp_path, images, monkeypatch):
    for images_per_shard, name in ((1, "many"), (4, "few")):
        prepare(SOURCE, {"val": images}, tmp_path / name, images_per_shard=images_per_shard)
    prepare(SOURCE, {"testA": images[:2]}, tmp_path / "other")
    with serve() as hub:
        hub.connect(tmp_path / "home", monkeypatch)
        for name in ("many", "other", "few", "few"):
            url = push_to_hub(tmp_path / name, "refcoco")  # in the namespace of the one who is logged in
        repository = hub.repositories["dataset", f"{USER}/refcoco"]
    assert repository.titles == ["Upload the prepared dataset"] * 3 and f"{USER}/refcoco" in url
    shards = {f"data/{path.name}" for name in ("few", "other") for path in (tmp_path / name / "data").iterdir()}
    assert set(repository.files()) - {".gitattributes"} == shards | {"README.md", "preparation.json"}


@pytest.mark.parametrize("missing", ["README.md", "preparation.json", "data/*.parquet"])
def test_an_unprepared_folder_creates_no_repository(tmp_path, images, monkeypatch, missing):
    prepare(SOURCE, {"val": images}, tmp_path / "prepared")
    for path in (tmp_path / "prepared").glob(missing):
        path.unlink()
    with serve() as hub:
        hub.connect(tmp_path / "home", monkeypatch)
        with pytest.raises(ValueError, match=re.escape(missing)):
            push_to_hub(tmp_path / "prepared", "refcoco")
        assert not hub.repositories


def test_the_card_s_snippet_runs(tmp_path, images, own_cache):
    output = tmp_path / "output"
    prepare(SOURCE, {"val": images}, output)
    code = re.search(r"```python\n(.*?)```", (output / "README.md").read_text(), flags=re.DOTALL)[1]
    (tmp_path / "snippet.py").write_text(code.replace("path/or/id", str(output)))
    names = runpy.run_path(str(tmp_path / "snippet.py"))
    assert names["mask"].shape == images[0].size and names["texts"] == ["nothing"]
