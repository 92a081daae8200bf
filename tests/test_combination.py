"""Combined datasets: no evaluation image is in a training split, under any file name."""

import dataclasses
import shutil

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from annotated_images import coco_name, make_image, make_images, read_rows
from PIL import Image

from modeling_restr.data.canonical import BadImage
from modeling_restr.data.combination import coco_id_of, combine, read_prepared_images
from modeling_restr.data.dataset_card import Source
from modeling_restr.data.preparation import prepare
from modeling_restr.data.published_counts import Counts, count_images


def build_source(name: str) -> Source:
    published = {"val": ("refcoco", "unc", "val"), "train": ("refcoco", "unc", "train")}
    return Source(name, name.upper(), "Read so.", ("refcoco",), published=published)


def prepare_folder(folder, name="a", **splits):
    prepare(build_source(name), splits, folder)
    return folder


def ids_of(images) -> list[int]:
    return [image.image_id for image in images]


@pytest.mark.parametrize(
    ("name", "coco_id"),
    [
        ("COCO_train2014_000000581857.jpg", 581857),
        ("COCO_train2014_000000581857_16.jpg", 581857),
        ("train2014/COCO_val2014_000000581857.jpg", 581857),
        ("000000581857.jpg", 581857),
        ("581857.jpg", None),
        ("000000581857.png", None),
        ("photo_000000581857.jpg", None),
        ("0000005818570.jpg", None),
    ],
)
def test_ids_in_names(name, coco_id):
    assert coco_id_of(name) == coco_id


def test_prepared_images_are_read_back_as_they_were(tmp_path):
    images = make_images(tmp_path / "images", range(3))
    folder = prepare_folder(tmp_path / "a", val=images)
    again = read_prepared_images(folder, tmp_path / "cache")["val"]
    prepare_folder(tmp_path / "b", val=again)
    first, second = (read_rows(tmp_path / name, "val", tmp_path / "cache") for name in "ab")
    assert [{**row, "image": None} for row in first] == [{**row, "image": None} for row in second]
    shards = [path.read_bytes() for path in sorted(tmp_path.glob("[ab]/data/*.parquet"))]
    assert shards[0] == shards[1]


def test_training_images_that_any_set_evaluates_on_are_dropped(tmp_path):
    """In a set of COCO's names, of REFER's names of objects, of 2017's names, and of another name with equal bytes."""
    images = tmp_path / "images"
    first = prepare_folder(
        tmp_path / "a", "a", train=make_images(images, range(1, 7)), val=make_images(images, [20, 21])
    )
    renamed = tmp_path / "renamed"
    shutil.copytree(images, renamed)
    for image_id, name in ((1, "COCO_train2014_000000000001_7.jpg"), (2, "000000000002.jpg"), (3, "beach.jpg")):
        (renamed / coco_name(image_id)).rename(renamed / name)
    evaluated = [
        make_image(renamed, 1, "COCO_train2014_000000000001_7.jpg", first_id=100),
        make_image(renamed, 2, "000000000002.jpg", first_id=100),
        make_image(renamed, 3, "beach.jpg", first_id=100),
    ]
    second = prepare_folder(tmp_path / "b", "b", train=make_images(images, [6, 7, 20]), testA=evaluated)
    combination = combine({"a": first, "b": second}, tmp_path / "cache")
    assert list(combination.splits) == ["train", "a_val", "b_testA"]
    assert ids_of(combination.splits["train"]) == [4, 5, 6, 7]
    assert ids_of(combination.splits["a_val"]) == [20, 21] and ids_of(combination.splits["b_testA"]) == [1, 2, 3]
    assert combination.notes[0] == (
        "From the training split of a (6 images, 12 references and 18 expressions), 3 images, 6 references and 9 "
        "expressions were dropped, because the images are in an evaluation split."
    )
    assert "of b (3 images, 6 references and 9 expressions), 1 image, 2 references" in combination.notes[1]
    assert combination.source.published == {"a_val": ("refcoco", "unc", "val"), "b_val": ("refcoco", "unc", "val")}


def test_image_in_several_training_sets_becomes_one_row_with_all_references(tmp_path):
    images = tmp_path / "images"
    first = prepare_folder(tmp_path / "a", "a", train=make_images(images, [1, 2]))
    other = [make_image(images, image_id, first_id=1000) for image_id in (2, 3)]
    second = prepare_folder(tmp_path / "b", "b", train=other)
    third = prepare_folder(tmp_path / "c", "c", train=make_images(images, [2]))  # what `a` has, too
    combination = combine({"a": first, "b": second, "c": third}, tmp_path / "cache")
    train = combination.splits["train"]
    assert ids_of(train) == [1, 2, 3]
    assert [reference.ref_id for reference in train[1].references] == [4, 5, 1004, 1005]
    assert count_images(train) == Counts(3, 8, 12)
    assert "The other 5 training images became 3 rows" in combination.notes[-1]
    assert "2 references that several sets have were kept once" in combination.notes[-1]
    prepared = prepare(combination.source, combination.splits, tmp_path / "both", notes=combination.notes)
    assert prepared["train"].counts == Counts(3, 8, 12)
    rows = read_rows(tmp_path / "both", "train", tmp_path / "cache")
    assert [len(row["references"]) for row in rows] == [2, 4, 2]
    card = (tmp_path / "both" / "README.md").read_text()
    assert all(note in card for note in combination.notes)


def test_same_picture_compressed_again_is_one_row_but_others_with_its_id_are_not(tmp_path):
    name = "000000000005.jpg"
    photo = tmp_path / "a" / name
    photo.parent.mkdir()
    gradient = Image.linear_gradient("L").resize((50, 45)).convert("RGB")
    gradient.save(photo, quality=95)
    buffers = {
        "again": (gradient, 60),
        "resized": (gradient.resize((30, 27)), 95),
        "another": (gradient.rotate(180), 95),
    }
    folders = {"a": prepare_folder(tmp_path / "prepared_a", "a", train=[make_image(tmp_path / "a", 5, name)])}
    for set_name, (picture, quality) in buffers.items():
        (tmp_path / set_name).mkdir()
        picture.save(tmp_path / set_name / name, format="JPEG", quality=quality)
        image = make_image(tmp_path / set_name, 5, name, first_id=1000)
        image = dataclasses.replace(image, size=picture.size[::-1])
        folders[set_name] = prepare_folder(tmp_path / f"prepared_{set_name}", set_name, train=[image])
    train = combine(folders, tmp_path / "cache").splits["train"]
    assert [len(image.references) for image in train] == [4, 2, 2]
    assert [image.size for image in train] == [(45, 50), (27, 30), (45, 50)]


def test_sets_without_training_or_evaluation_combine(tmp_path):
    images = tmp_path / "images"
    first = prepare_folder(tmp_path / "a", "a", train=make_images(images, [1]))
    second = prepare_folder(tmp_path / "b", "b", val=make_images(images, [1]))
    combination = combine({"a": first, "b": second}, tmp_path / "cache")
    assert list(combination.splits) == ["b_val"]  # nothing is left to train on
    assert "1 image, 2 references and 3 expressions were dropped" in combination.notes[0]


def test_files_named_in_rows_lie_in_the_folder(tmp_path):
    folders = {name: prepare_folder(tmp_path / name, name, train=make_images(tmp_path, [1])) for name in "ab"}
    shard = next((folders["b"] / "data").iterdir())
    table = pq.read_table(shard)
    rows = table.to_pylist()
    rows[0]["image"] = {"bytes": None, "path": str(tmp_path / coco_name(1))}
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), shard)
    with pytest.raises(ValueError, match=r"it leads out of the folder of the images, .*/b, to "):
        combine(folders, tmp_path / "cache")


def test_bad_input_is_explained(tmp_path):
    images = make_images(tmp_path / "images", range(4))
    folder = prepare_folder(tmp_path / "a", "a", val=images[:1])
    with pytest.raises(ValueError, match="at least two"):
        combine({"a": folder})
    with pytest.raises(ValueError, match="is not a prepared dataset"):
        combine({"a": folder, "b": tmp_path / "images"}, tmp_path / "cache")
    images[3].image.unlink()
    with pytest.raises(BadImage):
        prepare(build_source("b"), {"val": images}, tmp_path / "b", images_per_shard=2)
    with pytest.raises(ValueError, match="b is not finished: val"):
        combine({"a": folder, "b": tmp_path / "b"}, tmp_path / "cache")
    clash = prepare_folder(tmp_path / "c", "c", a_val=images[:1])
    other = prepare_folder(tmp_path / "d", "d", val=images[:1])
    with pytest.raises(ValueError, match="Two evaluation splits would be called c_a_val"):
        combine({"c": clash, "c_a": other}, tmp_path / "cache")


def test_rows_without_references_combine(tmp_path):
    image = make_image(tmp_path / "images", 1)
    bare = dataclasses.replace(image, references=())
    first = prepare_folder(tmp_path / "a", "a", train=[bare])
    second = prepare_folder(tmp_path / "b", "b", train=[image])
    train = combine({"a": first, "b": second}, tmp_path / "cache").splits["train"]
    assert [(len(row.references), row.size) for row in train] == [(2, image.size)]


def test_nothing_goes_to_the_shared_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "shared")
    folders = {
        name: prepare_folder(tmp_path / name, name, train=[make_image(tmp_path / "images", index)])
        for index, name in enumerate("ab")
    }
    combine(folders, tmp_path / "cache")
    assert not (tmp_path / "shared").exists() and (tmp_path / "cache").exists()
