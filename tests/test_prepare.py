"""`restr prepare` on small files in every layout."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import data_layouts
import datasets
import pytest
from annotated_images import TWO_BOXES, coco_name, read_rows, write_photo
from data_layouts import SPLITS
from folders import read_files

from modeling_restr.data import preparation


@pytest.fixture
def prepare(restr, monkeypatch, tmp_path):
    """Runs `restr prepare` with a temporary cache of `datasets`, and returns its output."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf_cache")

    def run(*words):
        done = restr("prepare", *words)
        assert done.code == 0, done.err
        return done.out

    return run


@pytest.fixture
def error_of(restr, prepare):
    """Runs `restr prepare`, which must fail, and returns its error message."""

    def run(*words):
        done = restr("prepare", *words)
        assert done.code in (1, 2)
        return done.err.rpartition("Error: ")[2]

    return run


def write_refer(folder: Path, *args, dataset: str = "refcoco", **options) -> list[str | Path]:
    """Writes files in REFER's layout, and returns the options that read them."""
    data_layouts.write_refer(folder / dataset, folder / "images", *args, **options)
    return ["refer", "--dataset", dataset, "--annotation-dir", folder, "--image-dir", folder / "images"]


def test_refer_is_compared_with_the_published_counts(prepare, tmp_path):
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


def test_bad_images_stop_the_preparation_or_are_left_out_and_listed(prepare, error_of, tmp_path):
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
    assert re.search(r"\ntrain +5 +5 +10 ", out) and "Images left out, because they cannot be used: 3\n" in out
    assert f"val  {coco_name(11)}: decodes to (41, 50)" in out
    assert len(read_rows(output, "train", tmp_path / "cache")) == 5
    first = read_files(output)
    assert coco_name(2) in prepare(*words, "--skip_bad")  # nothing is made again, all is reported again
    assert read_files(output) == first


# One worker stops at an image and opens a pipe. When only this worker is left, the main process waits for the pipe and
# kills itself.
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
def test_preparation_killed_within_a_shard_resumes_to_the_same_files(prepare, tmp_path):
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
    """Each image of a split except the last is bad in a different way."""
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


def test_hub_copy_takes_the_usual_names_of_its_splits(prepare, tmp_path):
    copy = tmp_path / "refcocoplus"
    data_layouts.write_hub_copy(copy, tmp_path / "train2014")
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
    data_layouts.write_coco(tmp_path / "instances.json", tmp_path / "photos")
    words = ["coco", "--instances-file", tmp_path / "instances.json", "--image-dir", tmp_path / "photos"]
    dogs = [*words, "--output-dir", tmp_path / "output", "--val-share", 0.3, "--name", "dogs"]
    assert "Expressions for dogs in" in prepare(*dogs)
    rows = [read_rows(tmp_path / "output", split, tmp_path / "cache") for split in ("train", "val")]
    assert sorted(row["image_id"] for part in rows for row in part) == list(range(1, 13)) and all(rows)
    assert all("dog" in row["references"][0]["expressions"][0]["text"] for row in rows[0])
    prepare(*words, "--output-dir", tmp_path / "train_only", "--val-share", 0)
    assert list(datasets.load_dataset(str(tmp_path / "train_only"))) == ["train"]
    assert "prepared with other settings" in error_of(*dogs, "--seed", 1)


def test_coco_with_captions_and_brush_masks(prepare, error_of, tmp_path):
    file = tmp_path / "instances.json"
    instances = data_layouts.write_coco(file, tmp_path, num_images=1)
    annotation = instances["annotations"][0] | {"iscrowd": 1}
    annotations = [annotation | {"caption": "my old dog"}, annotation | {"id": 2}]
    file.write_text(json.dumps({**instances, "annotations": annotations}))
    words = ["coco", "--instances-file", file, "--image-dir", tmp_path, "--val-share", 0, "--output-dir"]
    error = error_of(*words, tmp_path / "crowds")
    assert re.search(r"marked as crowds \(iscrowd 1\).*: 2 \(annotation 1, annotation 2\)", error)
    out = prepare(*words, tmp_path / "captions", "--captions")
    assert "annotations without a caption: 1 (annotation 2)" in out
    (row,) = read_rows(tmp_path / "captions", "train", tmp_path / "cache")
    assert [e["text"] for reference in row["references"] for e in reference["expressions"]] == ["my old dog"]
    file.write_text(json.dumps({**instances, "annotations": annotations[:1]}))
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
    assert "a different name for each folder, got refcoco refcoco" in error
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
