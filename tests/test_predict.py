"""examples/predict.py: its masks against the pipeline's, and its files against those of runs that were not disturbed."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from filelock import FileLock
from tiny_models import randomize
from tiny_training import make_model, make_processor, make_rows

from modeling_restr.data.canonical import FEATURES, decode_mask
from modeling_restr.pipeline_restr import ReSTRPipeline


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
import predict


NUM_IMAGES = 11
OPTIONS = ("--images_per_shard", 2, "--batch_size", 2, "--expressions_per_batch", 3)
# In the third shard, when all masks are written and the file is about to be closed: the worst moment.
KILLED_IN_THE_THIRD_SHARD = """
import os, signal, sys
import pyarrow.parquet as pq
sys.path.insert(0, sys.argv[1])
import predict

class Writer(pq.ParquetWriter):
    number = 0

    def add_key_value_metadata(self, metadata):
        Writer.number += 1
        if Writer.number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        super().add_key_value_metadata(metadata)

predict.pq.ParquetWriter = Writer
predict.main(sys.argv[2:])
"""


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), seed=1)


def save_model(folder, seed):
    processor = make_processor()
    randomize(make_model(processor), seed).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows():
    """Images of several sizes, the fourth without expressions."""
    rows = [*make_rows(6), *make_rows(5, seed=1, size=(40, 31))]
    for index, row in enumerate(rows):
        row["image_id"] = 100 + index
    rows[3]["references"] = []
    assert len(rows) == NUM_IMAGES
    return rows


def write_data(folder, rows, features=FEATURES, split="val"):
    """Two files, in row groups of 3: none of their ends is the end of a shard of 2 but the last."""
    (folder / "data").mkdir(parents=True)
    dataset = datasets.Dataset.from_list(rows, features=features)
    parts = [range(5), range(5, len(rows))]
    for number, part in enumerate(parts):
        path = folder / "data" / f"{split}-{number:05d}-of-00002.parquet"
        dataset.select(part).to_parquet(path, batch_size=3)
    return folder


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory, rows):
    return write_data(tmp_path_factory.mktemp("canonical"), rows)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, model_dir, data_dir):
    output_dir = tmp_path_factory.mktemp("undisturbed")
    run(model_dir, data_dir, output_dir)
    return output_dir


def run(model_dir, data_dir, output_dir, *options):
    predict.main([str(word) for word in (model_dir, data_dir, "--output_dir", output_dir, *OPTIONS, *options)])


def read_masks(output_dir):
    (dataset,) = datasets.load_dataset("parquet", data_dir=str(output_dir)).values()
    return dataset


def read_summary(output_dir):
    return json.loads((output_dir / "summary.json").read_text())


def shards(output_dir):
    return sorted((output_dir / "data").glob("*.parquet"))


def contents(output_dir):
    """{name: bytes} of all that is in the folder of shards, leftovers too."""
    return {path.name: path.read_bytes() for path in (output_dir / "data").iterdir()}


def to_bytes(image):
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def texts_of(row):
    return [expression["text"] for reference in row["references"] for expression in reference["expressions"]]


@pytest.fixture(scope="module")
def expected(model_dir, rows):
    """What the pipeline says, with the ids."""
    model = predict.AutoModelForImageSegmentation.from_pretrained(model_dir).eval()
    pipe = ReSTRPipeline(model=model, processor=predict.AutoProcessor.from_pretrained(model_dir), device="cpu")
    expected = []
    for number, row in enumerate(rows):
        results = iter(pipe(row["image"], text=texts_of(row)) if row["references"] else [])
        ids = {"row": number, "image_id": row["image_id"], "file_name": row["file_name"]}
        for reference in row["references"]:
            for expression in reference["expressions"]:
                result = next(results)
                mask = np.asarray(result["mask"]) > 0
                ref_id = {"ref_id": reference["ref_id"]}
                lost = {name: result[name] for name in ("unknown_words", "truncated")}
                expected.append(ids | ref_id | expression | lost | {"score": result["score"], "mask": mask})
    shares = [result["mask"].mean() for result in expected]
    assert len(expected) == 20 and 0.05 < np.mean(shares) < 0.95 and np.std(shares) > 0.05  # they say something
    return expected


def largest_difference(masks, expected):
    """The largest share of an image on which two masks differ, where all else agrees."""
    differences = []
    for found, wanted in zip(masks, expected, strict=True):
        assert found["score"] == pytest.approx(wanted["score"], abs=1e-5)
        ids = [name for name in wanted if name not in ("score", "mask")]
        assert {name: found[name] for name in ids} == {name: wanted[name] for name in ids}
        differences.append((decode_mask(found["mask"]) != wanted["mask"]).mean())
    return max(differences)


def test_masks_scores_and_ids_are_the_pipelines(model_dir, data_dir, tmp_path, undisturbed, expected):
    run(model_dir, data_dir, tmp_path, "--batch_size", 1, "--expressions_per_batch", 32)
    assert largest_difference(read_masks(tmp_path), expected) == 0
    assert largest_difference(read_masks(undisturbed), expected) <= 0.005  # batches of several images round otherwise


def test_summary_counts_what_is_there(undisturbed, rows):
    summary = read_summary(undisturbed)
    assert (summary["images"], summary["pairs"]) == (NUM_IMAGES, sum(len(texts_of(row)) for row in rows))
    assert summary["shards"] == len(shards(undisturbed)) == 6
    assert summary["bytes"] == sum(path.stat().st_size for path in shards(undisturbed))
    assert summary["num_bad_images"] == summary["num_bad_texts"] == 0
    assert summary["last_run"]["images"] == NUM_IMAGES and summary["last_run"]["images_per_second"] > 0


def test_lost_words_are_in_the_rows_the_summary_and_one_warning(model_dir, rows, tmp_path, caplog):
    texts = [["the red xyzzy", "blue thing"], ["xyzzy xyzzy qwrty"], ["the red red red red red zzz"], ["blue thing"]]
    columns = {"image": [{"bytes": to_bytes(row["image"]), "path": None} for row in rows[:4]], "text": texts}
    columns["image"][3]["bytes"] = columns["image"][3]["bytes"][:-100]  # is left out, and its words with it
    features = {"image": datasets.Image(), "text": datasets.List(datasets.Value("string"))}
    dataset = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    (tmp_path / "data").mkdir()
    dataset.to_parquet(tmp_path / "data" / "val-00000-of-00001.parquet")
    run(model_dir, tmp_path, tmp_path / "masks", "--skip_bad")
    masks = read_masks(tmp_path / "masks")
    assert masks["unknown_words"][:] == [["xyzzy"], [], ["xyzzy", "qwrty"], []]
    assert masks["truncated"][:] == [False, False, False, True]
    summary = read_summary(tmp_path / "masks")
    assert summary["unknown_words"] == {"xyzzy": 2, "qwrty": 1} and list(summary["unknown_words"]) == [
        "xyzzy",
        "qwrty",
    ]
    assert summary["cut_words"] == {"zzz": 1}
    (warning,) = (record.getMessage() for record in caplog.records if record.name == "predict")
    assert all(f"'{word}'" in warning for word in ("xyzzy", "qwrty", "zzz"))


def test_each_image_is_encoded_once(model_dir, data_dir, tmp_path, monkeypatch):
    encoded = []
    load_model = predict.load_model

    def load_and_count(*args):
        model, processor = load_model(*args)
        model.model.vision_model.register_forward_pre_hook(
            lambda module, args, kwargs: encoded.append(len(args[0] if args else kwargs["pixel_values"])),
            with_kwargs=True,
        )
        return model, processor

    monkeypatch.setattr(predict, "load_model", load_and_count)
    run(model_dir, data_dir, tmp_path)
    assert encoded == [2, 1, 2, 2, 2, 1]  # shards of 2, of which one image has nothing to ask


def test_streaming_gives_the_same_files(model_dir, data_dir, tmp_path, undisturbed):
    run(model_dir, data_dir, tmp_path, "--streaming")
    assert contents(tmp_path) == contents(undisturbed)


def test_streaming_reads_only_the_row_groups_that_it_needs(data_dir, monkeypatch):
    files = sorted(map(str, (data_dir / "data").iterdir()))
    group_sizes, features = predict.read_footers(files, None)
    assert group_sizes == [[3, 2], [3, 3]]
    rows = predict.ParquetRows(files, group_sizes, features)
    read = []
    iter_batches = predict.pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        predict.pq.ParquetFile, "iter_batches", lambda *args: read.append(args[2]) or iter_batches(*args)
    )
    for start, stop, groups in [
        (0, 3, [[0]]),
        (3, 8, [[1], [0]]),
        (4, 6, [[1], [0]]),
        (8, 11, [[1]]),
        (0, 11, [[0, 1]] * 2),
    ]:
        ids = [row["image_id"] for row in rows.read(start, stop, ["image_id"])]
        assert ids == list(range(100 + start, 100 + stop)) and read == groups
        read.clear()


def test_killed_and_resumed_by_two_processes_it_ends_in_the_same_files(model_dir, data_dir, tmp_path, undisturbed):
    arguments = [str(word) for word in (model_dir, data_dir, "--output_dir", tmp_path, *OPTIONS, "--streaming")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    options = {"env": environment, "capture_output": True, "text": True, "timeout": 1800}
    command = [sys.executable, "-c", KILLED_IN_THE_THIRD_SHARD, EXAMPLES, *arguments]
    killed = subprocess.run(command, check=False, **options)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    names = sorted(contents(undisturbed))
    assert [path.name for path in shards(tmp_path)] == names[:2]
    assert len(contents(tmp_path)) == 3 and not (tmp_path / "summary.json").exists()  # with what was begun
    finished = {path: path.stat().st_mtime_ns for path in shards(tmp_path)}

    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    resumed = subprocess.run([*launch, EXAMPLES / "predict.py", *arguments], check=False, **options)
    assert resumed.returncode == 0, resumed.stderr
    assert contents(tmp_path) == contents(undisturbed)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    summary, expected = read_summary(tmp_path), read_summary(undisturbed)
    assert summary["last_run"]["num_processes"] == 2 and summary["last_run"]["images"] == NUM_IMAGES - 4
    kept = [key for key in expected if key != "last_run"]
    assert {key: summary[key] for key in kept} == {key: expected[key] for key in kept}


def test_missing_and_damaged_shards_are_made_again(model_dir, data_dir, tmp_path, undisturbed):
    run(model_dir, data_dir, tmp_path)
    first, second, *others = shards(tmp_path)
    first.unlink()
    second.write_bytes(second.read_bytes()[:-5])
    times = [path.stat().st_mtime_ns for path in others]
    run(model_dir, data_dir, tmp_path)
    assert contents(tmp_path) == contents(undisturbed)
    assert [path.stat().st_mtime_ns for path in others] == times
    assert read_summary(tmp_path)["last_run"]["images"] == 4


def test_parts_make_the_whole(model_dir, data_dir, tmp_path, undisturbed):
    run(model_dir, data_dir, tmp_path, "--part", "2/2")
    assert sorted(contents(tmp_path)) == sorted(contents(undisturbed))[1::2]
    assert not (tmp_path / "summary.json").exists()
    run(model_dir, data_dir, tmp_path, "--part", "1/2")
    assert contents(tmp_path) == contents(undisturbed)
    assert read_summary(tmp_path)["pairs"] == read_summary(undisturbed)["pairs"]


def write_leftover(output_dir, part):
    """What a run of a part has written of its shard."""
    (output_dir / "data").mkdir(parents=True, exist_ok=True)
    (output_dir / f".prediction-{part}.lock").touch()
    path = output_dir / "data" / f".val-00000-of-00006.parquet.{part}.0123456789abcdef.tmp"
    path.write_bytes(b"half a shard")
    return path


def test_a_run_removes_what_killed_runs_left_and_nothing_that_another_is_writing(model_dir, data_dir, tmp_path):
    ours, killed, written = (write_leftover(tmp_path, part) for part in ("1-of-1", "2-of-3", "1-of-2"))
    with FileLock(tmp_path / ".prediction-1-of-2.lock"):
        run(model_dir, data_dir, tmp_path)
        assert written.exists() and not ours.exists() and not killed.exists()
    assert read_summary(tmp_path)["shards"] == 6
    run(model_dir, data_dir, tmp_path)
    assert not written.exists()


def test_the_temporary_file_of_a_shard_names_the_part(model_dir, data_dir, tmp_path, monkeypatch):
    written, writer = [], predict.pq.ParquetWriter
    monkeypatch.setattr(
        predict.pq,
        "ParquetWriter",
        lambda path, *args, **kwargs: written.append(path) or writer(path, *args, **kwargs),
    )
    run(model_dir, data_dir, tmp_path, "--part", "2/6")
    (path,) = written
    assert path.match(".val-00001-of-00006.parquet.2-of-6.*.tmp") and not path.exists()


def test_rows_with_lists_of_sentences(model_dir, rows, tmp_path, expected):
    features = {"photo": datasets.Image(), "texts": datasets.List(datasets.Value("string"))}
    plain = [{"photo": row["image"], "texts": texts_of(row)} for row in rows]
    data_dir = write_data(tmp_path / "plain", plain, datasets.Features(features))
    run(model_dir, data_dir, tmp_path / "out", "--image_column", "photo")
    masks = read_masks(tmp_path / "out")
    names = ["row", "text_index", "text", "score", "mask", "unknown_words", "truncated"]
    assert masks.column_names == names
    wanted = [{name: mask[name] for name in ("row", "text", "score", "mask")} for mask in expected]
    assert largest_difference(masks, wanted) <= 0.005


@pytest.mark.parametrize(("kind", "streaming"), [("binary", []), ("string", ["--streaming"])])
def test_rows_with_one_sentence_and_bytes_or_a_path(model_dir, rows, tmp_path, expected, kind, streaming):
    plain = []
    for index, row in enumerate(rows):
        path = tmp_path / f"{index}.png"
        path.write_bytes(to_bytes(row["image"]))
        image = path.read_bytes() if kind == "binary" else str(path)
        plain.append({"image": image, "question": texts_of(row)[0] if row["references"] else None})
    features = datasets.Features({"image": datasets.Value(kind), "question": datasets.Value("string")})
    data_dir = write_data(tmp_path / "plain", plain, features)
    run(model_dir, data_dir, tmp_path / "out", "--text_column", "question", *streaming)
    first = {mask["row"]: mask for mask in reversed(expected)}
    wanted = [{name: first[row][name] for name in ("row", "text", "score", "mask")} for row in sorted(first)]
    assert largest_difference(read_masks(tmp_path / "out"), wanted) <= 0.005


@pytest.fixture(scope="module")
def bad_data_dir(tmp_path_factory, rows):
    features = datasets.Features({"image": datasets.Image(), "texts": datasets.List(datasets.Value("string"))})
    plain = [{"image": {"bytes": to_bytes(row["image"]), "path": None}, "texts": texts_of(row)} for row in rows]
    plain[1]["image"]["bytes"] = plain[1]["image"]["bytes"][:-60]
    plain[4]["image"]["bytes"] = b"no image"
    plain[5]["image"] = None
    plain[6]["image"] = {"bytes": None, "path": "absent.png"}
    plain[8]["texts"] = ["red thing", " ", None]
    return write_data(tmp_path_factory.mktemp("bad"), plain, features)


def test_bad_rows_are_left_out_and_listed(model_dir, bad_data_dir, tmp_path, undisturbed):
    run(model_dir, bad_data_dir, tmp_path, "--skip_bad")
    summary = read_summary(tmp_path)
    assert (summary["images"], summary["num_bad_images"], summary["num_bad_texts"]) == (NUM_IMAGES - 4, 4, 2)
    problems = zip((1, 4, 5, 6), ("truncated", "not an image", "missing", "absent.png"), summary["bad_images"])
    assert all(problem.startswith(f"row {row}:") and word in problem for row, word, problem in problems)
    assert [problem.split(":")[:2] for problem in summary["bad_texts"]] == [
        ["row 8", " text 1 has no words"],
        ["row 8", " text 2 has no words"],
    ]
    masks, expected = read_masks(tmp_path), read_masks(undisturbed)
    kept = [row for row in expected["row"] if row not in (1, 4, 5, 6, 8)]
    assert [row for row in masks["row"] if row != 8] == kept
    assert [mask["text_index"] for mask in masks if mask["row"] == 8] == [0]


def test_bad_rows_stop_a_run_that_does_not_skip_them(model_dir, bad_data_dir, tmp_path):
    with pytest.raises(SystemExit, match=r"--skip_bad[^:]*:\n  row 1: .*truncated"):
        run(model_dir, bad_data_dir, tmp_path)
    assert not shards(tmp_path)
    run(model_dir, bad_data_dir, tmp_path, "--skip_bad")
    with pytest.raises(SystemExit, match="row 1: "):  # what was left out is wanted now
        run(model_dir, bad_data_dir, tmp_path)


def test_a_disk_that_fails_is_no_bad_image(monkeypatch):
    def fail(self, value):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(datasets.Image, "decode_example", fail)
    with pytest.raises(OSError, match="Input/output error"):
        predict.decode_image({"bytes": b"...", "path": None})


def test_folders_of_one_name_are_never_mistaken(model_dir, rows, tmp_path):
    """`datasets` caches folders with a card by their names and cards."""
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: val, path: data/val-*}\n---\n"
    for number in (0, 5):
        data_dir = write_data(tmp_path / str(number) / "photos", rows[number : number + 6])
        (data_dir / "README.md").write_text(card)
        output_dir = tmp_path / f"out{number}"
        run(model_dir, data_dir, output_dir)
        wanted = [row["image_id"] for row in rows[number : number + 6] for _ in texts_of(row)]
        assert read_masks(output_dir)["image_id"][:] == wanted


def test_other_settings_never_mix(model_dir, data_dir, rows, tmp_path, undisturbed):
    before = contents(undisturbed)
    with pytest.raises(SystemExit, match=r"threshold: then 0\.5, now 0\.4"):
        run(model_dir, data_dir, undisturbed, "--threshold", 0.4)
    with pytest.raises(SystemExit, match="model_fingerprint"):
        run(save_model(tmp_path / "other", seed=3), data_dir, undisturbed)
    other_rows = [row | {"file_name": "renamed.png"} for row in rows]
    with pytest.raises(SystemExit, match="files_fingerprint"):
        run(model_dir, write_data(tmp_path / "data", other_rows), undisturbed)
    run(save_model(tmp_path / "moved", seed=1), data_dir, undisturbed, "--batch_size", 3)  # neither decides
    assert contents(undisturbed) == before


def test_folders_in_use_and_of_others_are_left_alone(model_dir, data_dir, tmp_path):
    (tmp_path / "data").mkdir()
    other = tmp_path / "data" / "other.parquet"
    other.write_bytes(b"")
    with pytest.raises(SystemExit, match="another origin"):
        run(model_dir, data_dir, tmp_path)
    other.unlink()
    with FileLock(tmp_path / ".prediction-1-of-1.lock"), pytest.raises(SystemExit, match="Another run"):
        run(model_dir, data_dir, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image_column", "photo"], "no column photo, but image, image_id"),
        (["--text_column", "image_id"], "'image_id'"),
        (["--split", "train"], "--split to be one of val"),
        (["--images_per_shard", 1, "--max_images", 3, "--part", "1/1"], None),
        (["--part", "3/2"], "I/N"),
        (["--batch_size", 0], "1 or more"),
        (["--threshold", 1.5], "from 0 to 1"),
    ],
)
def test_options(model_dir, data_dir, tmp_path, options, message, capsys):
    if message is None:
        run(model_dir, data_dir, tmp_path, *options)
        assert len(shards(tmp_path)) == 3
        return
    with pytest.raises(SystemExit) as caught:
        run(model_dir, data_dir, tmp_path, *options)
    assert message in str(caught.value) + capsys.readouterr().err


def test_streaming_needs_parquet(tmp_path, model_dir):
    (tmp_path / "data.jsonl").write_text('{"image": "a.png", "text": "red thing"}\n')
    with pytest.raises(SystemExit, match="refs/convert/parquet"):
        run(model_dir, tmp_path, tmp_path / "out", "--streaming")


def test_too_many_shards_for_their_names(tmp_path):
    with pytest.raises(ValueError, match="--images_per_shard"):
        predict.plan_shards(tmp_path, "val", 100_000, 1)


# --- Own sentences ----------------------------------------------------------------------------------------------------


def write_sentences(folder, rows, name="own.csv"):
    """The first sentences of these rows, and their photos as files."""
    lines = ["image,sentence"]
    for index, row in enumerate(rows):
        row["image"].save(folder / f"{index}.png")
        texts = [e["text"] for reference in row["references"] for e in reference["expressions"]]
        lines += [f'{index}.png,"{text}"' for text in texts]
    path = folder / name
    path.write_text("\n".join(lines))
    return path


def test_own_sentences_get_the_masks_of_the_same_rows_in_parquet(tmp_path, model_dir, rows, undisturbed):
    rows = [row for row in rows if row["references"]]
    path = write_sentences(tmp_path, rows)
    run(model_dir, path, tmp_path / "out")
    expected, found = read_masks(undisturbed), read_masks(tmp_path / "out")
    assert found["text"][:] == expected["text"][:] and found["mask"][:] == expected["mask"][:]
    assert list(dict.fromkeys(found["file_name"])) == [f"{index}.png" for index in range(len(rows))]
    (tmp_path / "photos").mkdir()
    for photo in tmp_path.glob("*.png"):
        photo.rename(tmp_path / "photos" / photo.name)
    run(model_dir, path, tmp_path / "elsewhere", "--image_dir", tmp_path / "photos")
    assert read_masks(tmp_path / "elsewhere")["mask"][:] == expected["mask"][:]


def test_own_sentences_that_changed_are_other_data(tmp_path, model_dir, rows):
    path = write_sentences(tmp_path, rows[:1])
    run(model_dir, path, tmp_path / "out")
    path.write_text(path.read_text() + "\n0.png,one more")
    with pytest.raises(SystemExit, match="other settings"):
        run(model_dir, path, tmp_path / "out")
    path.write_text("image,sentence\n0.png,?!\nabsent.png,the dog\n")
    with pytest.raises(SystemExit, match="line 2: expected a sentence with words"):
        run(model_dir, path, tmp_path / "bad")
    path.write_text("image,sentence\nabsent.png,the dog\n")
    with pytest.raises(SystemExit, match=r"file_name absent\.png: missing"):
        run(model_dir, path, tmp_path / "bad")
