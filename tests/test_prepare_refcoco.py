"""The script as a user runs it, from every layout, on small files in that layout."""

import importlib.util
import json
import os
import pickle
import re
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from annotated_images import TWO_BOXES, coco_name, read_rows, write_photo
from scipy.io import savemat


SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "prepare_refcoco.py"
SPLITS = {"train": range(1, 8), "val": range(10, 13), "testA": range(20, 22), "testB": range(30, 31)}


@pytest.fixture
def script(monkeypatch, tmp_path):
    """Calls the script's `main` with arguments; everything that `datasets` caches goes to a temporary folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")
    spec = importlib.util.spec_from_file_location("prepare_refcoco", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "prepare_refcoco", module)
    spec.loader.exec_module(module)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        module.main()

    run.module = module
    return run


def write_refer(folder: Path, splits=SPLITS, first_ref_id: int = 0, dataset: str = "refcoco", split_by: str = "unc"):
    """REFER's layout: two expressions on one object of two parts in each image. Returns the script's arguments."""
    image_ids = [image_id for ids in splits.values() for image_id in ids]
    size = (40, 50)
    for image_id in image_ids:
        write_photo(folder / "images" / coco_name(image_id), image_id, size)
    refs = [
        {
            "ref_id": first_ref_id + image_id,
            "ann_id": 100 + image_id,
            "image_id": image_id,
            "category_id": 18,
            "split": split,
            "sentences": [
                {"sent_id": 1000 + 2 * image_id + i, "sent": text} for i, text in enumerate(("two", "boxes"))
            ],
        }
        for split, ids in splits.items()
        for image_id in ids
    ]
    instances = {
        "images": [
            {"id": image_id, "file_name": coco_name(image_id), "height": size[0], "width": size[1]}
            for image_id in image_ids
        ],
        "annotations": [
            {"id": 100 + image_id, "image_id": image_id, "category_id": 18, "segmentation": TWO_BOXES, "iscrowd": 0}
            for image_id in image_ids
        ],
        "categories": [{"id": 18, "name": "dog"}],
    }
    (folder / dataset).mkdir(parents=True, exist_ok=True)
    (folder / dataset / f"refs({split_by}).p").write_bytes(pickle.dumps(refs, protocol=2))
    (folder / dataset / "instances.json").write_text(json.dumps(instances))
    return ["refer", "--dataset", dataset, "--annotation_dir", folder, "--image_dir", folder / "images"]


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_refer_all_splits_beside_the_published_counts(script, tmp_path, capsys):
    output = tmp_path / "output"
    script(*write_refer(tmp_path / "refer"), "--output_dir", output, "--images_per_shard", 3)
    table = capsys.readouterr().out.partition("RefCOCO (unc) in ")[2]
    assert re.search(r"\nval +3 +3 +6  differs in 3\n", table)
    assert "val references: 3, published 3,811 (3,808 fewer)" in table
    assert "train expressions: 14, published 120,624 (120,610 fewer)" in table
    assert {path.name for path in (output / "data").iterdir()} == {
        *(f"train-0000{index}-of-00003.parquet" for index in range(3)),
        *(f"{split}-00000-of-00001.parquet" for split in ("val", "testA", "testB")),
    }
    for split, image_ids in SPLITS.items():
        rows = read_rows(output, split, tmp_path / "cache")
        assert [row["image_id"] for row in rows] == list(image_ids)
        assert all(row["references"][0]["category"] == "dog" for row in rows)
        assert all([e["text"] for e in row["references"][0]["expressions"]] == ["two", "boxes"] for row in rows)


def test_refer_chosen_splits(script, tmp_path, capsys):
    output = tmp_path / "output"
    arguments = write_refer(
        tmp_path / "refer", {"train": [1], "val": [2], "test": [3]}, dataset="refcocog", split_by="umd"
    )
    script(*arguments, "--output_dir", output, "--splits", "val", "test")
    assert {path.name.partition("-")[0] for path in (output / "data").iterdir()} == {"val", "test"}
    assert "RefCOCOg (umd)" in capsys.readouterr().out


def test_bad_images_stop_it_or_are_left_out_and_listed(script, tmp_path, capsys):
    output = tmp_path / "output"
    arguments = [*write_refer(tmp_path / "refer"), "--output_dir", output, "--images_per_shard", 4]
    images = tmp_path / "refer" / "images"
    (images / coco_name(2)).unlink()
    truncated = images / coco_name(3)
    truncated.write_bytes(truncated.read_bytes()[:500])
    write_photo(images / coco_name(11), 11, size=(41, 50))
    with pytest.raises(SystemExit) as stopped:
        script(*arguments)
    message = str(stopped.value)  # a text as code prints it and ends the process with 1
    assert re.search(r"skip_bad leaves them out\): 2\n", message)
    assert f"{coco_name(2)}: missing" in message and f"{coco_name(3)}: cannot be decoded" in message
    assert not list(output.rglob("*.parquet")) and not (output / "README.md").exists()
    capsys.readouterr()
    script(*arguments, "--skip-bad")
    out = capsys.readouterr().out
    assert re.search(r"\ntrain +5 +5 +10 ", out) and "Images left out, since they cannot be used: 3\n" in out
    assert f"val  {coco_name(11)}: decodes to (41, 50)" in out
    assert len(read_rows(output, "train", tmp_path / "cache")) == 5
    first = read_files(output)
    script(*arguments, "--skip_bad")  # the other spelling; nothing is made again, all is said again
    assert read_files(output) == first and coco_name(2) in capsys.readouterr().out


# One worker stops at an image and says so through a pipe; the process that waits for the workers, when this is the last
# one, listens to the pipe and is killed.
BLOCKING_SCRIPT = """
import os
import signal
import sys
import threading

from modeling_restr.data import canonical, shards

def read_image(source, image_dir=None, read=canonical.read_image):
    if source.name == {name!r}:
        open({pipe!r}, "w").close()
        threading.Event().wait()
    return read(source, image_dir)

def wait(futures, wait=shards.wait, **options):
    done, pending = wait(futures, **options)
    if len(pending) == 1:
        open({pipe!r}).close()
        os.kill(os.getpid(), signal.SIGKILL)
    return done, pending

canonical.read_image = read_image
shards.wait = wait
if __name__ == "__main__":
    sys.path.insert(0, {folder!r})
    import prepare_refcoco
    prepare_refcoco.main()
"""


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_killed_in_the_middle_of_a_shard_it_goes_on_to_the_same_end(script, tmp_path):
    arguments = [*write_refer(tmp_path / "refer"), "--splits", "train", "--images_per_shard", 2, "--num_proc", 2]
    script(*arguments[:-2], "--output_dir", tmp_path / "undisturbed")
    last_of_second_shard = coco_name(4)
    blocking = tmp_path / "blocking.py"  # which every worker imports
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    blocking.write_text(BLOCKING_SCRIPT.format(folder=str(SCRIPT.parent), name=last_of_second_shard, pipe=str(pipe)))
    output = tmp_path / "killed"
    command = [sys.executable, blocking, *arguments, "--output_dir", output]
    # Its workers end, too: they would hold what is captured.
    killed = subprocess.run([str(part) for part in command], check=False, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    others = [output / "data" / f"train-0000{index}-of-00004.parquet" for index in (0, 2, 3)]
    assert not (output / "data" / "train-00001-of-00004.parquet").exists()
    assert list(output.glob("data/.train-00001*.tmp")) and not (output / "README.md").exists()
    times = [path.stat().st_mtime_ns for path in others]
    script(*arguments[:-2], "--output_dir", output)
    assert read_files(output) == read_files(tmp_path / "undisturbed")
    assert [path.stat().st_mtime_ns for path in others] == times  # made once


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_hostile_annotations_are_left_out_or_named(script, tmp_path, capsys):
    """Each image of a split is bad in another way, but the last."""
    arguments = [*write_refer(tmp_path / "refer"), "--output_dir", tmp_path / "output", "--splits", "train"]
    path = tmp_path / "refer" / "refcoco" / "instances.json"
    instances = json.loads(path.read_text())
    images, annotations = instances["images"], instances["annotations"]
    annotations[0]["segmentation"] = [[1e9, 1, 12, 1, 12, 9, 2, 9]]
    images[1]["height"] = images[1]["width"] = 10**6
    images[2]["file_name"] = "../../up.jpg"
    write_photo(tmp_path / "up.jpg", 3)
    annotations[3]["segmentation"] = {"size": [40, 50], "counts": [100, -5, 1905]}
    annotations[4]["segmentation"] = [[-9, -9, -3, -9, -3, -1]]
    (tmp_path / "refer" / "images" / coco_name(6)).unlink()
    os.mkfifo(tmp_path / "refer" / "images" / coco_name(6))
    annotations[6]["segmentation"] = [*TWO_BOXES, [1, 2]]
    path.write_text(json.dumps(instances))
    with pytest.raises(SystemExit, match=r"Images that cannot be used \(skip_bad leaves them out\): 6\n"):
        script(*arguments)
    script(*arguments, "--skip_bad")
    out = capsys.readouterr().out
    assert [row["image_id"] for row in read_rows(tmp_path / "output", "train", tmp_path / "cache")] == [7]
    assert out.endswith(
        f"""
Dropped or doubtful, in all:
images with an object without a usable mask or box: 3 ({coco_name(1)}, {coco_name(4)}, {coco_name(5)})
images of another size than their annotations: 1 ({coco_name(2)})
missing images: 1 (../../up.jpg)
images that cannot be read: 1 ({coco_name(6)})
polygons of one or two points, dropped: 1 ({coco_name(7)}: ref_id 7)
"""
    )


def test_grefcoco(script, tmp_path, capsys):
    arguments = write_refer(tmp_path / "refer", dataset="grefcoco")
    folder = tmp_path / "refer" / "grefcoco"
    refs = pickle.loads((folder / "refs(unc).p").read_bytes())
    for ref in refs:
        ref.update(ann_id=[ref["ann_id"]], category_id=[18], no_target=False)
    refs.append({**refs[0], "ref_id": 900, "ann_id": [-1], "category_id": [-1], "no_target": True})
    (folder / "grefs(unc).json").write_text(json.dumps(refs))
    script("grefcoco", *arguments[3:], "--output_dir", tmp_path / "output")
    assert re.search(r"\ntrain +7 +8 +16  no published counts\n", capsys.readouterr().out)
    rows = read_rows(tmp_path / "output", "train", tmp_path / "cache")
    assert [reference["ann_id"] for reference in rows[0]["references"]] == [101, -1]


def test_referit(script, tmp_path, capsys):
    masks, images = tmp_path / "mask", tmp_path / "images"
    masks.mkdir()
    for split, image_id in (("train", 1), ("val", 2), ("test", 3)):
        (tmp_path / f"referit_query_{split}.json").write_text(json.dumps({f"{image_id}_1": ["sky", "the sky"]}))
        outside = np.ones((40, 50), dtype=np.uint8)
        outside[:7, :] = 0
        savemat(masks / f"{image_id}_1.mat", {"segimg_t": outside})
        write_photo(images / f"{image_id}.jpg", image_id)
    arguments = ["--annotation_dir", tmp_path, "--mask_dir", masks, "--image_dir", images]
    script("referit", *arguments, "--output_dir", tmp_path / "output")
    assert re.search(r"\ntest +1 +1 +2  no published counts\n?", capsys.readouterr().out)
    (row,) = read_rows(tmp_path / "output", "test", tmp_path / "cache")
    assert row["references"][0]["bbox"] == [0, 0, 50, 7]


def test_hub_copy_takes_the_usual_names_of_its_splits(script, tmp_path, capsys):
    copy = tmp_path / "refcocoplus"
    (copy / "data").mkdir(parents=True)
    for index, split in enumerate(("train", "validation", "test", "testB"), start=1):
        write_photo(tmp_path / "train2014" / coco_name(index), index)
        row = {
            "ref_id": index,
            "ann_id": index,
            "image_id": index,
            "sentences": [{"raw": "Dog", "sent": "dog", "sent_id": index, "tokens": ["dog"]}],
            "raw_anns": json.dumps({"segmentation": TWO_BOXES, "bbox": [2, 1, 28, 19], "category_id": 18}),
            "raw_image_info": json.dumps({"height": 40, "width": 50}),
            "image_path": f"coco/train2014/{coco_name(index)}",
        }
        datasets.Dataset.from_list([row]).to_parquet(copy / "data" / f"{split}-00000-of-00001.parquet")
    script("hub", copy, "--image_dir", tmp_path, "--output_dir", tmp_path / "output")
    out = capsys.readouterr().out
    assert "testA references: 1, published 1,975 (1,974 fewer)" in out  # RefCOCO+'s
    assert "testB references: 1, published 1,798 (1,797 fewer)" in out
    prepared = datasets.load_dataset(str(tmp_path / "output"))
    assert {split: rows["image_id"][0] for split, rows in prepared.items()} == {
        "train": 1,
        "val": 2,
        "testA": 3,
        "testB": 4,
    }
    card = (tmp_path / "output" / "README.md").read_text()
    assert "the copy refcocoplus" in card and str(tmp_path) not in card
    script("hub", copy, "--image_dir", tmp_path, "--output_dir", tmp_path / "one", "--splits", "validation")
    assert list(datasets.load_dataset(str(tmp_path / "one"))) == ["val"]


def test_coco_photos_of_ones_own(script, tmp_path, capsys):
    numbers = range(1, 13)
    for number in numbers:
        write_photo(tmp_path / "photos" / f"{number}.png", number)
    instances = {
        "images": [{"id": number, "file_name": f"{number}.png", "height": 40, "width": 50} for number in numbers],
        "annotations": [
            {"id": number, "image_id": number, "category_id": 1, "segmentation": TWO_BOXES[1:], "iscrowd": 0}
            for number in numbers
        ],
        "categories": [{"id": 1, "name": "dog"}],
    }
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    arguments = ["coco", "--instances_file", tmp_path / "instances.json", "--image_dir", tmp_path / "photos"]
    script(*arguments, "--output_dir", tmp_path / "output", "--val_share", 0.3, "--name", "dogs")
    assert "Expressions for dogs in" in capsys.readouterr().out
    rows = [read_rows(tmp_path / "output", split, tmp_path / "cache") for split in ("train", "val")]
    assert sorted(row["image_id"] for part in rows for row in part) == list(numbers) and all(rows)
    assert all("dog" in row["references"][0]["expressions"][0]["text"] for row in rows[0])
    script(*arguments, "--output_dir", tmp_path / "train_only", "--val_share", 0)
    assert list(datasets.load_dataset(str(tmp_path / "train_only"))) == ["train"]
    with pytest.raises(SystemExit, match="prepared with other settings"):
        script(*arguments, "--output_dir", tmp_path / "output", "--val_share", 0.3, "--name", "dogs", "--seed", 1)


def test_coco_with_captions_and_brush_masks(script, tmp_path, capsys):
    write_photo(tmp_path / "1.png", 1)
    annotation = {"image_id": 1, "category_id": 1, "segmentation": TWO_BOXES[1:], "iscrowd": 1}
    instances = {
        "images": [{"id": 1, "file_name": "1.png", "height": 40, "width": 50}],
        "annotations": [annotation | {"id": 1, "caption": "my old dog"}, annotation | {"id": 2}],
        "categories": [{"id": 1, "name": "dog"}],
    }
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    arguments = ["coco", "--instances_file", tmp_path / "instances.json", "--image_dir", tmp_path, "--val_share", 0]
    with pytest.raises(SystemExit, match=r"marked as crowds \(iscrowd 1\).*: 2 \(annotation 1, annotation 2\)"):
        script(*arguments, "--output_dir", tmp_path / "crowds")
    script(*arguments, "--output_dir", tmp_path / "captions", "--captions")
    assert "annotations without a caption: 1 (annotation 2)" in capsys.readouterr().out
    (row,) = read_rows(tmp_path / "captions", "train", tmp_path / "cache")
    assert [e["text"] for reference in row["references"] for e in reference["expressions"]] == ["my old dog"]
    instances["annotations"] = instances["annotations"][:1]
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    script(*arguments, "--output_dir", tmp_path / "brushed", "--crowds_as_instances")
    (row,) = read_rows(tmp_path / "brushed", "train", tmp_path / "cache")
    assert "dog" in row["references"][0]["expressions"][0]["text"]


def test_own_sentences(script, tmp_path, capsys):
    for number in range(1, 5):
        write_photo(tmp_path / "photos" / f"{number}.png", number)
    lines = [f'{number}.png;the box;"{json.dumps(TWO_BOXES[0])}";' for number in range(1, 4)]
    lines += ['4.png;the box;;"[2, 1, 10, 8]"', lines[0]]
    path = tmp_path / "own.csv"
    path.write_text("\n".join(["image;sentence;polygon;box", *lines]))
    arguments = ["sentences", "--sentences_file", path, "--image_dir", tmp_path / "photos", "--output_dir"]
    with pytest.raises(SystemExit, match=r"line 5: .* got a box: boxes_as_masks"):
        script(*arguments, tmp_path / "output")
    script(*arguments, tmp_path / "output", "--boxes_as_masks", "--val_share", 0.3)
    out = capsys.readouterr().out
    assert "Sentences of own in" in out and "lines of own.csv that repeat another, dropped: 1 (line 6)" in out
    rows = [row for split in ("train", "val") for row in read_rows(tmp_path / "output", split, tmp_path / "cache")]
    assert sorted(row["file_name"] for row in rows) == [f"{number}.png" for number in range(1, 5)]
    assert all(row["references"][0]["bbox"] == [2, 1, 10, 8] for row in rows)
    with pytest.raises(SystemExit, match="Expected --splits among train, val, got test"):
        script(*arguments, tmp_path / "other", "--boxes_as_masks", "--val_share", 0.3, "--splits", "test")


def test_combine_says_what_it_dropped(script, tmp_path, capsys):
    first = {"train": range(1, 5), "val": [10], "testA": [20], "testB": [30]}
    second = {"train": [4, 5, 10], "val": [1], "testA": [21], "testB": [31]}
    script(*write_refer(tmp_path / "first", first), "--output_dir", tmp_path / "a")
    arguments = write_refer(tmp_path / "second", second, first_ref_id=500, dataset="refcoco+")
    script(*arguments, "--output_dir", tmp_path / "b")
    capsys.readouterr()
    output = tmp_path / "both"
    script("combine", tmp_path / "a", tmp_path / "b", "--output_dir", output)
    out = capsys.readouterr().out
    assert (
        "refcoco (4 images, 4 references and 8 expressions), 1 image, 1 reference and 2 expressions were dropped"
        in out
    )
    assert "refcocoplus (3 images, 3 references and 6 expressions), 1 image, 1 reference and 2 expressions were" in out
    assert re.search(r"\ntrain +4 +5 +10  no published counts\n", out)
    assert "refcocoplus_testB references: 1, published 1,798 (1,797 fewer)" in out
    train = read_rows(output, "train", tmp_path / "cache")
    assert {row["image_id"]: [r["ref_id"] for r in row["references"]] for row in train} == {
        2: [2],
        3: [3],
        4: [4, 504],
        5: [505],
    }
    evaluation = ("refcoco_val", "refcoco_testA", "refcoco_testB", "refcocoplus_val")
    ids = [row["image_id"] for split in evaluation for row in read_rows(output, split, tmp_path / "cache")]
    assert ids == [10, 20, 30, 1]
    assert {path.name for path in output.iterdir()} - {".preparation.lock"} == {
        "README.md",
        "data",
        "preparation.json",
    }
    with pytest.raises(SystemExit, match="a different name for each of the folders, got refcoco refcoco"):
        script("combine", tmp_path / "a", tmp_path / "a", "--output_dir", tmp_path / "again")


def test_push_follows_the_preparation(script, tmp_path, capsys, monkeypatch):
    pushed = []
    monkeypatch.setattr(
        script.module, "push_to_hub", lambda *args, **kwargs: pushed.append((args, kwargs)) or "the URL"
    )
    output = tmp_path / "output"
    arguments = [*write_refer(tmp_path / "refer"), "--output_dir", output, "--splits", "val", "--push_to_hub", "me/it"]
    script(*arguments, "--private")
    assert pushed == [((output, "me/it"), {"private": True})]
    assert capsys.readouterr().out.endswith("Uploaded: the URL\n")
    (tmp_path / "refer" / "images" / coco_name(20)).unlink()
    with pytest.raises(SystemExit):
        script(*arguments[:-4], "--splits", "testA", *arguments[-2:])
    assert len(pushed) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--dataset", "refcocoo"], "one of refcoco, refcoco\\+, refcocog, refclef, got 'refcocoo'"),
        (["--split_by", "google"], r"Expected refs\(google\).p"),
        (["--splits", "testC"], "has no split 'testC'"),
        (["--image_dir", "absent"], "Expected a folder of images, got absent"),
    ],
)
def test_mistakes_are_explained_before_anything_is_written(script, tmp_path, changes, message):
    arguments = write_refer(tmp_path / "refer")
    with pytest.raises(SystemExit, match=message):
        script(*arguments, "--output_dir", tmp_path / "output", *changes)
    assert not (tmp_path / "output").exists()
