"""`restr prepare` on small files in every layout."""

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

from modeling_restr.data import preparation


SPLITS = {"train": range(1, 8), "val": range(10, 13), "testA": range(20, 22), "testB": range(30, 31)}


@pytest.fixture
def prepare(restr, monkeypatch, tmp_path):
    """Runs `restr prepare` and returns what it printed. What `datasets` caches goes to a temporary folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")

    def run(*words):
        done = restr("prepare", *words)
        assert done.code == 0, done.err
        return done.out

    return run


@pytest.fixture
def error_of(restr, prepare):
    """Runs `restr prepare`, which has to fail, and returns its error message."""

    def run(*words):
        done = restr("prepare", *words)
        assert done.code in (1, 2)
        return done.err.rpartition("Error: ")[2]

    return run


def write_refer(folder: Path, splits=SPLITS, first_ref_id: int = 0, dataset: str = "refcoco", split_by: str = "unc"):
    """REFER's layout: two expressions on one object of two parts in each image. Returns the options."""
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
    return ["refer", "--dataset", dataset, "--annotation-dir", folder, "--image-dir", folder / "images"]


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_refer_next_to_the_published_counts(prepare, tmp_path):
    output = tmp_path / "output"
    out = prepare(*write_refer(tmp_path / "refer"), "--output-dir", output, "--images-per-shard", 3)
    table = out.partition("RefCOCO (unc) in ")[2]
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


@pytest.mark.parametrize("chosen", [["--splits", "val,test"], ["--splits", "val", "--splits", "test"]])
def test_refer_reads_chosen_splits(prepare, tmp_path, chosen):
    output = tmp_path / "output"
    splits = {"train": [1], "val": [2], "test": [3]}
    words = write_refer(tmp_path / "refer", splits, dataset="refcocog", split_by="umd")
    assert "RefCOCOg (umd)" in prepare(*words, "--output-dir", output, *chosen)
    assert {path.name.partition("-")[0] for path in (output / "data").iterdir()} == {"val", "test"}


def test_bad_images_stop_it_or_are_left_out_and_listed(prepare, error_of, tmp_path):
    output = tmp_path / "output"
    words = [*write_refer(tmp_path / "refer"), "--output-dir", output, "--images-per-shard", 4]
    images = tmp_path / "refer" / "images"
    (images / coco_name(2)).unlink()
    truncated = images / coco_name(3)
    truncated.write_bytes(truncated.read_bytes()[:500])
    write_photo(images / coco_name(11), 11, size=(41, 50))
    error = error_of(*words)
    assert "leaves them out): 2\n" in error
    assert f"{coco_name(2)}: missing" in error and f"{coco_name(3)}: cannot be decoded" in error
    assert not list(output.rglob("*.parquet")) and not (output / "README.md").exists()
    out = prepare(*words, "--skip-bad")
    assert re.search(r"\ntrain +5 +5 +10 ", out) and "Images left out, since they cannot be used: 3\n" in out
    assert f"val  {coco_name(11)}: decodes to (41, 50)" in out
    assert len(read_rows(output, "train", tmp_path / "cache")) == 5
    first = read_files(output)
    assert coco_name(2) in prepare(*words, "--skip_bad")  # nothing is made again, all is reported again
    assert read_files(output) == first


# One worker stops at an image and says so through a pipe. The process that waits for the workers listens to the pipe
# when this is the last one, and is killed.
BLOCKING_SCRIPT = """
import os
import signal
import threading

from modeling_restr.cli import main
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
    main()
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_killed_in_the_middle_of_a_shard_it_resumes_to_the_same_end(prepare, tmp_path):
    words = [*write_refer(tmp_path / "refer"), "--splits", "train", "--images-per-shard", 2, "--num-proc", 2]
    prepare(*words[:-2], "--output-dir", tmp_path / "undisturbed")
    blocking, pipe, output = tmp_path / "blocking.py", tmp_path / "pipe", tmp_path / "killed"
    os.mkfifo(pipe)
    last_of_second_shard = coco_name(4)
    blocking.write_text(BLOCKING_SCRIPT.format(name=last_of_second_shard, pipe=str(pipe)))  # every worker imports it
    command = [sys.executable, blocking, "prepare", *words, "--output-dir", output]
    # Its workers end, too: otherwise they would keep its output open.
    killed = subprocess.run([str(part) for part in command], check=False, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    others = [output / "data" / f"train-0000{index}-of-00004.parquet" for index in (0, 2, 3)]
    assert not (output / "data" / "train-00001-of-00004.parquet").exists()
    assert list(output.glob("data/.train-00001*.tmp")) and not (output / "README.md").exists()
    times = [path.stat().st_mtime_ns for path in others]
    prepare(*words[:-2], "--output-dir", output)
    assert read_files(output) == read_files(tmp_path / "undisturbed")
    assert [path.stat().st_mtime_ns for path in others] == times  # made once


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_hostile_annotations_are_left_out_or_named(prepare, error_of, tmp_path):
    """Each image of a split but the last is bad in another way."""
    words = [*write_refer(tmp_path / "refer"), "--output-dir", tmp_path / "output", "--splits", "train"]
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
    assert "leaves them out): 6\n" in error_of(*words)
    out = prepare(*words, "--skip-bad")
    assert [row["image_id"] for row in read_rows(tmp_path / "output", "train", tmp_path / "cache")] == [7]
    assert out.endswith(
        f"""
Dropped or doubtful in total:
images with an object without a usable mask or box: 3 ({coco_name(1)}, {coco_name(4)}, {coco_name(5)})
images of another size than their annotations: 1 ({coco_name(2)})
missing images: 1 (../../up.jpg)
images that cannot be read: 1 ({coco_name(6)})
polygons of one or two points, dropped: 1 ({coco_name(7)}: ref_id 7)
"""
    )


def test_grefcoco(prepare, tmp_path):
    words = write_refer(tmp_path / "refer", dataset="grefcoco")
    folder = tmp_path / "refer" / "grefcoco"
    refs = pickle.loads((folder / "refs(unc).p").read_bytes())
    for ref in refs:
        ref.update(ann_id=[ref["ann_id"]], category_id=[18], no_target=False)
    refs.append({**refs[0], "ref_id": 900, "ann_id": [-1], "category_id": [-1], "no_target": True})
    (folder / "grefs(unc).json").write_text(json.dumps(refs))
    out = prepare("grefcoco", *words[3:], "--output-dir", tmp_path / "output")
    assert re.search(r"\ntrain +7 +8 +16  no published counts\n", out)
    rows = read_rows(tmp_path / "output", "train", tmp_path / "cache")
    assert [reference["ann_id"] for reference in rows[0]["references"]] == [101, -1]


def test_referit(prepare, tmp_path):
    masks, images = tmp_path / "mask", tmp_path / "images"
    masks.mkdir()
    for split, image_id in (("train", 1), ("val", 2), ("test", 3)):
        (tmp_path / f"referit_query_{split}.json").write_text(json.dumps({f"{image_id}_1": ["sky", "the sky"]}))
        outside = np.ones((40, 50), dtype=np.uint8)
        outside[:7, :] = 0
        savemat(masks / f"{image_id}_1.mat", {"segimg_t": outside})
        write_photo(images / f"{image_id}.jpg", image_id)
    folders = ["--annotation-dir", tmp_path, "--mask-dir", masks, "--image-dir", images]
    out = prepare("referit", *folders, "--output-dir", tmp_path / "output")
    assert re.search(r"\ntest +1 +1 +2  no published counts\n?", out)
    (row,) = read_rows(tmp_path / "output", "test", tmp_path / "cache")
    assert row["references"][0]["bbox"] == [0, 0, 50, 7]


def test_hub_copy_takes_the_usual_names_of_its_splits(prepare, tmp_path):
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
    words = ["hub", copy, "--image-dir", tmp_path, "--output-dir"]
    out = prepare(*words, tmp_path / "output")
    assert "testA references: 1, published 1,975 (1,974 fewer)" in out  # RefCOCO+'s
    assert "testB references: 1, published 1,798 (1,797 fewer)" in out
    prepared = datasets.load_dataset(str(tmp_path / "output"))
    ids = {split: rows["image_id"][0] for split, rows in prepared.items()}
    assert ids == {"train": 1, "val": 2, "testA": 3, "testB": 4}
    card = (tmp_path / "output" / "README.md").read_text()
    assert "the copy refcocoplus" in card and str(tmp_path) not in card
    prepare(*words, tmp_path / "one", "--splits", "validation")
    assert list(datasets.load_dataset(str(tmp_path / "one"))) == ["val"]


def test_coco_with_generated_expressions(prepare, error_of, tmp_path):
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
    words = ["coco", "--instances-file", tmp_path / "instances.json", "--image-dir", tmp_path / "photos"]
    dogs = [*words, "--output-dir", tmp_path / "output", "--val-share", 0.3, "--name", "dogs"]
    assert "Expressions for dogs in" in prepare(*dogs)
    rows = [read_rows(tmp_path / "output", split, tmp_path / "cache") for split in ("train", "val")]
    assert sorted(row["image_id"] for part in rows for row in part) == list(numbers) and all(rows)
    assert all("dog" in row["references"][0]["expressions"][0]["text"] for row in rows[0])
    prepare(*words, "--output-dir", tmp_path / "train_only", "--val-share", 0)
    assert list(datasets.load_dataset(str(tmp_path / "train_only"))) == ["train"]
    assert "prepared with other settings" in error_of(*dogs, "--seed", 1)


def test_coco_with_captions_and_brush_masks(prepare, error_of, tmp_path):
    write_photo(tmp_path / "1.png", 1)
    annotation = {"image_id": 1, "category_id": 1, "segmentation": TWO_BOXES[1:], "iscrowd": 1}
    instances = {
        "images": [{"id": 1, "file_name": "1.png", "height": 40, "width": 50}],
        "annotations": [annotation | {"id": 1, "caption": "my old dog"}, annotation | {"id": 2}],
        "categories": [{"id": 1, "name": "dog"}],
    }
    file = tmp_path / "instances.json"
    file.write_text(json.dumps(instances))
    words = ["coco", "--instances-file", file, "--image-dir", tmp_path, "--val-share", 0, "--output-dir"]
    error = error_of(*words, tmp_path / "crowds")
    assert re.search(r"marked as crowds \(iscrowd 1\).*: 2 \(annotation 1, annotation 2\)", error)
    out = prepare(*words, tmp_path / "captions", "--captions")
    assert "annotations without a caption: 1 (annotation 2)" in out
    (row,) = read_rows(tmp_path / "captions", "train", tmp_path / "cache")
    assert [e["text"] for reference in row["references"] for e in reference["expressions"]] == ["my old dog"]
    file.write_text(json.dumps({**instances, "annotations": instances["annotations"][:1]}))
    prepare(*words, tmp_path / "brushed", "--crowds-as-instances")
    (row,) = read_rows(tmp_path / "brushed", "train", tmp_path / "cache")
    assert "dog" in row["references"][0]["expressions"][0]["text"]


def test_own_sentences(prepare, error_of, tmp_path):
    for number in range(1, 5):
        write_photo(tmp_path / "photos" / f"{number}.png", number)
    lines = [f'{number}.png;the box;"{json.dumps(TWO_BOXES[0])}";' for number in range(1, 4)]
    lines += ['4.png;the box;;"[2, 1, 10, 8]"', lines[0]]
    path = tmp_path / "own.csv"
    path.write_text("\n".join(["image;sentence;polygon;box", *lines]))
    words = ["sentences", "--sentences-file", path, "--image-dir", tmp_path / "photos", "--val-share", 0.3]
    assert re.search(r"line 5: .* got a box: boxes_as_masks", error_of(*words, "--output-dir", tmp_path / "output"))
    words.append("--boxes-as-masks")
    out = prepare(*words, "--output-dir", tmp_path / "output")
    assert "Sentences of own in" in out and "lines of own.csv that repeat another, dropped: 1 (line 6)" in out
    rows = [row for split in ("train", "val") for row in read_rows(tmp_path / "output", split, tmp_path / "cache")]
    assert sorted(row["file_name"] for row in rows) == [f"{number}.png" for number in range(1, 5)]
    assert all(row["references"][0]["bbox"] == [2, 1, 10, 8] for row in rows)
    error = error_of(*words, "--output-dir", tmp_path / "other", "--splits", "test")
    assert "Expected --splits among train, val, got test" in error


def test_combine_says_what_it_dropped(prepare, error_of, tmp_path):
    first = {"train": range(1, 5), "val": [10], "testA": [20], "testB": [30]}
    second = {"train": [4, 5, 10], "val": [1], "testA": [21], "testB": [31]}
    a, b, both = (tmp_path / name for name in ("a", "b", "both"))
    prepare(*write_refer(tmp_path / "first", first), "--output-dir", a)
    prepare(*write_refer(tmp_path / "second", second, 500, dataset="refcoco+"), "--output-dir", b)
    out = prepare("combine", a, b, "--output-dir", both)
    for name, images in (("refcoco", 4), ("refcocoplus", 3)):
        before = f"{name} ({images} images, {images} references and {2 * images} expressions)"
        assert f"{before}, 1 image, 1 reference and 2 expressions were dropped" in out
    assert re.search(r"\ntrain +4 +5 +10  no published counts\n", out)
    assert "refcocoplus_testB references: 1, published 1,798 (1,797 fewer)" in out
    train = read_rows(both, "train", tmp_path / "cache")
    ref_ids = {row["image_id"]: [reference["ref_id"] for reference in row["references"]] for row in train}
    assert ref_ids == {2: [2], 3: [3], 4: [4, 504], 5: [505]}
    evaluation = ("refcoco_val", "refcoco_testA", "refcoco_testB", "refcocoplus_val")
    ids = [row["image_id"] for split in evaluation for row in read_rows(both, split, tmp_path / "cache")]
    assert ids == [10, 20, 30, 1]
    written = {path.name for path in both.iterdir()} - {".preparation.lock"}
    assert written == {"README.md", "data", "preparation.json"}
    error = error_of("combine", a, a, "--output-dir", tmp_path / "again")
    assert "a different name for each of the folders, got refcoco refcoco" in error
    out = prepare("combine", a, a, "--names", "x,y", "--output-dir", tmp_path / "again")
    assert "\nx_val " in out and "\ny_val " in out


def test_push_follows_the_preparation(prepare, error_of, tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(preparation, "push_to_hub", lambda *args, **kwargs: pushed.append((args, kwargs)) or "the URL")
    output = tmp_path / "output"
    words = [*write_refer(tmp_path / "refer"), "--output-dir", output, "--push-to-hub", "me/it", "--splits"]
    assert prepare(*words, "val", "--private").endswith("Uploaded: the URL\n")
    assert pushed == [((output, "me/it"), {"private": True})]
    (tmp_path / "refer" / "images" / coco_name(20)).unlink()
    assert coco_name(20) in error_of(*words, "testA")
    assert len(pushed) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--dataset", "refcocoo"], "is not one of 'refcoco', 'refcoco+', 'refcocog', 'refclef'"),
        (["--split-by", "umd"], "refcoco was split by unc and google, got split_by='umd'"),
        (["--split-by", "google"], "Expected refs(google).p"),
        (["--splits", "testC"], "has no split 'testC'"),
        (["--image-dir", "absent"], "Expected a folder of images, got absent"),
    ],
)
def test_mistakes_are_explained_before_anything_is_written(error_of, tmp_path, changes, message):
    words = write_refer(tmp_path / "refer")
    assert message in error_of(*words, "--output-dir", tmp_path / "output", *changes)
    assert not (tmp_path / "output").exists()
