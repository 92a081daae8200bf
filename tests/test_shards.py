"""Shards: their rows, the images they lack, and which shards are made again."""

import dataclasses
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from annotated_images import make_image, make_images, write_photo
from folders import read_files

from modeling_restr.data.canonical import FEATURES
from modeling_restr.data.published_counts import Counts
from modeling_restr.data.segmentation import decode_mask
from modeling_restr.data.shards import Shard, make_shards, plan_shards, read_split, write_shard


def test_rows_are_what_the_annotations_say(tmp_path):
    images = make_images(tmp_path / "images", range(3))
    advanced = []
    assert write_shard(Shard(tmp_path / "a.parquet", images), False, advanced.append) == []
    assert advanced == [1, 1, 1]
    table = pq.read_table(tmp_path / "a.parquet")
    assert json.loads(table.schema.metadata[b"huggingface"]) == json.loads(
        FEATURES.arrow_schema.metadata[b"huggingface"]
    )
    for row, image in zip(table.to_pylist(), images, strict=True):
        assert row["image"]["bytes"] == image.image.read_bytes()
        assert (row["image_id"], row["file_name"]) == (image.image_id, image.file_name)
        assert [
            (r["ref_id"], r["ann_id"], r["category"], [(e["sent_id"], e["text"]) for e in r["expressions"]])
            for r in row["references"]
        ] == [(r.ref_id, r.ann_id, r.category, list(r.expressions)) for r in image.references]
        boxes, nothing = (decode_mask(reference["mask"]) for reference in row["references"])
        expected = np.zeros(image.size, dtype=bool)
        expected[1:9, 2:12] = expected[10:20, 20:30] = True
        assert np.array_equal(boxes, expected) and not nothing.any() and nothing.shape == image.size


def test_rows_are_counted_in_the_file(tmp_path):
    images = make_images(tmp_path / "images", range(5))
    images[2] = dataclasses.replace(images[2], references=())
    write_shard(Shard(tmp_path / "a.parquet", images), False, lambda number: None)
    assert read_split([tmp_path / "a.parquet"]).counts == Counts(5, 8, 12)
    for image in images[:2]:
        image.image.unlink()
    write_shard(Shard(tmp_path / "b.parquet", images[:2]), True, lambda number: None)  # bad images only
    both = read_split([tmp_path / "a.parquet", tmp_path / "b.parquet"])
    assert both.counts == Counts(5, 8, 12) and len(both.left_out) == 2
    assert both.file_size == sum(path.stat().st_size for path in tmp_path.glob("*.parquet"))


def test_bad_images_are_named_and_left_out_on_request(tmp_path):
    images = make_images(tmp_path / "images", range(5))
    images[0].image.unlink()
    images[2].image.write_bytes(images[2].image.read_bytes()[:500])
    write_photo(images[3].image, 3, size=(10, 10))
    path = tmp_path / "data" / "a.parquet"
    path.parent.mkdir()
    bad = write_shard(Shard(path, images), False, lambda number: None)
    assert [problem.partition(":")[0] for problem in bad] == [images[index].file_name for index in (0, 2, 3)]
    assert list(path.parent.iterdir()) == []
    assert write_shard(Shard(path, images), True, lambda number: None) == bad
    assert list(path.parent.iterdir()) == [path]
    assert [row["image_id"] for row in pq.read_table(path).to_pylist()] == [1, 4]
    left_out = read_split([path]).left_out
    assert [problem.partition(":")[0] for problem in left_out] == [images[index].file_name for index in (0, 2, 3)]
    assert "missing" in left_out[0] and "decoded" in left_out[1] and "(10, 10)" in left_out[2]
    assert str(tmp_path) in bad[0] and tmp_path.name not in "".join(left_out)  # folders are private


def test_finished_shards_are_kept_and_the_others_made(tmp_path):
    images = make_images(tmp_path / "images", range(7))
    plan = plan_shards(tmp_path, "val", images, 3)
    assert [shard.path.name for shard in plan] == [f"val-0000{index}-of-00003.parquet" for index in range(3)]
    assert [len(shard.images) for shard in plan] == [3, 3, 1]
    make_shards(plan)
    times = [shard.path.stat().st_mtime_ns for shard in plan]
    whole = plan[1].path.read_bytes()
    plan[1].path.write_bytes(whole[: len(whole) // 2])  # as after a crash of the machine
    leftover = tmp_path / ".val-00002-of-00003.parquet.123.tmp"
    leftover.touch()
    make_shards(plan)
    assert plan[1].path.read_bytes() == whole and not leftover.exists()
    assert [plan[index].path.stat().st_mtime_ns for index in (0, 2)] == [times[0], times[2]]


def test_shards_that_skipped_images_are_made_again_when_none_may_be_skipped(tmp_path):
    images = make_images(tmp_path / "images", range(4))
    images[3].image.unlink()
    plan = plan_shards(tmp_path, "val", images, 2)
    assert len(make_shards(plan, skip_bad=True)) == 1
    times = [shard.path.stat().st_mtime_ns for shard in plan]
    assert make_shards(plan, skip_bad=True) == []  # nothing was made now
    assert len(make_shards(plan)) == 1
    assert [shard.path.stat().st_mtime_ns for shard in plan] == times
    make_image(tmp_path / "images", 3)
    assert make_shards(plan) == []
    assert plan[0].path.stat().st_mtime_ns == times[0] and read_split([plan[1].path]).counts.images == 2


def test_no_shard_is_started_after_a_bad_image(tmp_path):
    images = make_images(tmp_path / "images", range(6))
    for index in (2, 3, 5):
        images[index].image.unlink()
    plan = plan_shards(tmp_path, "val", images, 2)
    bad = make_shards(plan)
    assert len(bad) == 2  # all of the shard, none of the next
    assert [shard.path.exists() for shard in plan] == [True, False, False]


@pytest.mark.slow
@pytest.mark.parametrize("skip_bad", [True, False])
def test_two_processes_do_the_same_as_one(tmp_path, skip_bad):
    images = make_images(tmp_path / "images", range(8))
    images[7].image.unlink()
    problems, contents = [], []
    for num_proc in (1, 2):
        folder = tmp_path / str(num_proc)
        folder.mkdir()
        problems.append(make_shards(plan_shards(folder, "val", images, 3), num_proc, skip_bad))
        contents.append(read_files(folder))
    assert problems[0] == problems[1] and len(problems[0]) == 1
    assert contents[0] == contents[1] and len(contents[0]) == (3 if skip_bad else 2)
