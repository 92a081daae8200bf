"""
`restr predict`: its masks against the pipeline's, bad rows, and runs that are killed.

Kills at random moments, RESTR_KILLS of them (2 by default), from the seed RESTR_KILL_SEED:

    RESTR_KILLS=50 RESTR_KILL_SEED=1 pytest -m slow tests/test_prediction.py -k random_moments

RESTR_CLUSTER_IMAGES=2000 (400 by default) has two nodes share 5,000 pairs.

On 2026-11-28 (Ray 2.60.0), 50 kills ended 32 drivers and 18 workers in 4 predictions of 1,000 images.
"""

import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from filelock import FileLock
from pictures import encode
from tiny_models import randomize
from tiny_training import make_model, make_processor, make_rows
from transformers import AutoModelForImageSegmentation, AutoProcessor

from modeling_restr.data import decode_mask
from modeling_restr.data.canonical import FEATURES
from modeling_restr.data.parquet_rows import find_columns, list_sentences, open_source
from modeling_restr.pipeline_restr import ReSTRPipeline
from modeling_restr.prediction import engine
from modeling_restr.prediction.stages import Predictor, RowGroupDatasource, decode


REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def local_ray():
    """Ray with two CPUs and one for what runs next to the actors, as on a machine of two."""
    ray.init("local", num_cpus=3, include_dashboard=False, object_store_memory=200e6, logging_level="error")
    yield
    ray.shutdown()


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
    """Images of several sizes, the fourth without sentences."""
    rows = [*make_rows(6), *make_rows(5, seed=1, size=(40, 31))]
    for index, row in enumerate(rows):
        row["image_id"] = 100 + index
    rows[3]["references"] = []
    return rows


def write_data(folder, rows, features=FEATURES, rows_per_group=3):
    (folder / "data").mkdir(parents=True)
    dataset = datasets.Dataset.from_list(rows, features=features)
    parts = [range(len(rows) // 2), range(len(rows) // 2, len(rows))]
    for number, part in enumerate(parts):
        path = folder / "data" / f"val-{number:05d}-of-00002.parquet"
        dataset.select(part).to_parquet(path, batch_size=rows_per_group)
    return folder


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory, rows):
    return write_data(tmp_path_factory.mktemp("canonical"), rows)


def texts_of(row):
    return [expression["text"] for reference in row["references"] for expression in reference["expressions"]]


@pytest.fixture(scope="module")
def expected(model_dir, rows):
    """What the pipeline finds, with the ids of the rows."""
    model = AutoModelForImageSegmentation.from_pretrained(model_dir).eval()
    pipe = ReSTRPipeline(model=model, processor=AutoProcessor.from_pretrained(model_dir), device="cpu")
    expected = []
    for number, row in enumerate(rows):
        results = iter(pipe(row["image"], text=texts_of(row)) if row["references"] else [])
        ids = {"row": number, "image_id": row["image_id"], "file_name": row["file_name"]}
        pairs = [(reference, text) for reference in row["references"] for text in reference["expressions"]]
        for index, (reference, expression) in enumerate(pairs):
            result = next(results)
            kept = {name: result[name] for name in ("score", "unknown_words", "truncated")}
            mask = np.asarray(result["mask"]) > 0
            numbers = {"ref_id": reference["ref_id"], "text_index": index, "error": None}
            expected.append({**ids, **numbers, **expression, **kept, "mask": mask})
    shares = [result["mask"].mean() for result in expected]
    assert len(expected) == 20 and 0.05 < np.mean(shares) < 0.95 and np.std(shares) > 0.05  # the masks say something
    return expected


def assert_same(found, expected, tolerance):
    """Equal columns, equal scores but for rounding, and masks that differ on a share of `tolerance` at most."""
    for result, wanted in zip(found, expected, strict=True):
        assert result["score"] == pytest.approx(wanted["score"], abs=1e-5)
        assert (decode_mask(result["mask"]) != wanted["mask"]).mean() <= tolerance
        names = [name for name in wanted if name not in ("score", "mask")]
        assert {name: result[name] for name in names} == {name: wanted[name] for name in names}


# Both stages, without Ray


def run_stages(model_dir, data, *, text_column=None, image_dir=None, raise_errors=False, encoded=None, **options):
    """The results of a prediction, all rows in one batch. The sizes of encoded batches are appended to `encoded`."""
    source = open_source(str(data), image_dir=image_dir, **options)
    columns = find_columns(source.schema, text_column=text_column)
    names = [columns.image, columns.text, *(name for name in columns.ids if name in source.schema.names)]
    blocks = [block for task in RowGroupDatasource(source.groups, names).get_read_tasks(1) for block in task()]
    processor = AutoProcessor.from_pretrained(model_dir)
    decoded = decode(pa.concat_tables(blocks), processor, columns, image_dir, raise_errors)
    predictor = Predictor(str(model_dir), None, columns)
    if encoded is not None:
        get_image_features = predictor.model.get_image_features
        predictor.model.get_image_features = lambda pixels: encoded.append(len(pixels)) or get_image_features(pixels)
    return predictor(decoded).to_pylist()


def test_masks_scores_and_ids_are_the_pipelines(model_dir, data_dir, expected):
    encoded = []
    found = run_stages(model_dir, data_dir, encoded=encoded)
    assert_same(found, expected, tolerance=0.005)  # batches of several images round differently
    assert encoded == [10]  # each image once, and not the one without sentences


@pytest.mark.parametrize("kind", ["binary", "string", "datasets.Image"])
def test_sentences_with_embedded_images_or_paths(model_dir, rows, tmp_path, expected, kind):
    plain = []
    for index, row in enumerate(rows):
        path = tmp_path / "photos" / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(row["image"]))
        images = {"binary": path.read_bytes(), "string": path.name, "datasets.Image": row["image"]}
        plain.append({"image": images[kind], "question": texts_of(row)[0] if row["references"] else None})
    feature = datasets.Image() if kind == "datasets.Image" else datasets.Value(kind)
    features = datasets.Features({"image": feature, "question": datasets.Value("string")})
    data = write_data(tmp_path / "plain", plain, features)
    found = run_stages(model_dir, f"file://{data}", text_column="question", image_dir=str(tmp_path / "photos"))
    first = {result["row"]: result for result in reversed(expected)}
    wanted = [{name: first[row][name] for name in ("row", "text", "score", "mask")} for row in sorted(first)]
    assert_same(found, wanted, tolerance=0.005)
    if kind == "string":
        assert [result["file_name"] for result in found] == [f"{row}.png" for row in sorted(first)]


@pytest.fixture(scope="module")
def bad_data_dir(tmp_path_factory, rows):
    features = datasets.Features({"image": datasets.Image(), "texts": datasets.List(datasets.Value("string"))})
    plain = [{"image": {"bytes": encode(row["image"]), "path": None}, "texts": texts_of(row)} for row in rows]
    plain[1]["image"]["bytes"] = plain[1]["image"]["bytes"][:-60]
    plain[4]["image"]["bytes"] = b"no image"
    plain[5]["image"] = None
    plain[6]["image"] = {"bytes": None, "path": "absent.png"}
    plain[8]["texts"] = ["red thing", " ", None]
    plain[9]["texts"] = ["the red xyzzy", "the red red red red red zzz"]
    return write_data(tmp_path_factory.mktemp("bad"), plain, features)


def test_bad_images_and_sentences_are_rows_with_an_error(model_dir, bad_data_dir, expected):
    found = run_stages(model_dir, bad_data_dir)
    errors = {(result["row"], result["text_index"]): result["error"] for result in found if result["error"]}
    reasons = {1: "truncated", 4: "not an image of a known format", 5: "has no image", 6: "absent.png is missing"}
    for row, reason in reasons.items():
        of_row = [result for result in found if result["row"] == row]
        assert of_row and all(reason in result["error"] for result in of_row)
        assert all(result["mask"] is None and result["score"] is None for result in of_row)
    assert "' '" in errors[8, 1] and "None" in errors[8, 2] and (8, 0) not in errors
    good = [result for result in found if result["row"] in (0, 2, 7)]
    wanted = [result for result in expected if result["row"] in (0, 2, 7)]
    names = ("row", "text_index", "text", "score", "mask", "error")
    assert_same(good, [{name: result[name] for name in names} for result in wanted], tolerance=0.005)
    lost = [(result["unknown_words"], result["truncated"]) for result in found if result["row"] == 9]
    assert lost == [(["xyzzy"], False), ([], True)]


def test_bad_rows_stop_a_run_that_raises_errors(model_dir, bad_data_dir):
    with pytest.raises(ValueError, match=r"--on-error row[^:]*:\n  row 1: .*truncated"):
        run_stages(model_dir, bad_data_dir, raise_errors=True)


def test_a_failing_disk_is_not_reported_as_a_bad_image(model_dir, data_dir, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(5, "Input/output error")

    source = open_source(str(data_dir))
    columns = find_columns(source.schema)
    row = {"row": 0, "image": {"bytes": None, "path": "a.png"}, "image_id": 1, "file_name": "a.png"}
    row["references"] = [{"ref_id": 1, "expressions": [{"sent_id": 1, "text": "red thing"}]}]
    monkeypatch.setattr("modeling_restr.prediction.stages.fsspec.open", fail)
    with pytest.raises(OSError, match="Input/output error"):
        decode(pa.Table.from_pylist([row]), AutoProcessor.from_pretrained(model_dir), columns)


def test_own_sentences_with_a_relative_folder_of_images(model_dir, rows, tmp_path, expected, monkeypatch):
    monkeypatch.chdir(tmp_path.parent)
    lines = ["image,sentence"]
    for index, row in enumerate(row for row in rows if row["references"]):
        row["image"].save(tmp_path / f"{index}.png")
        lines += [f"{index}.png,{text}" for text in texts_of(row)]
    (tmp_path / "own.csv").write_text("\n".join([*lines, "absent.png,red thing"]))
    options = {"image_dir": tmp_path.name, "sentences_path": tmp_path / "sentences.parquet"}
    found = run_stages(model_dir, tmp_path / "own.csv", **options)
    wanted = [{name: result[name] for name in ("text", "score", "mask")} for result in expected]
    assert_same(found[:-1], wanted, tolerance=0.005)
    assert found[-1]["file_name"] == "absent.png" and "missing" in found[-1]["error"]


def test_rows_are_numbered_over_all_files(data_dir):
    source = open_source(str(data_dir), max_images=7)
    assert [(group.number, group.first_row, group.num_rows) for group in source.groups] == [
        (0, 0, 3),
        (1, 3, 2),
        (0, 5, 2),
    ]
    tasks = RowGroupDatasource(source.groups, ["image_id"]).get_read_tasks(1)
    blocks = [block for task in tasks for block in task()]
    assert [len(block) for block in blocks] == [3, 2, 2]  # the blocks that a checkpoint knows are row groups
    table = pa.concat_tables(blocks)
    assert table["row"].to_pylist() == [*range(7)] and table["image_id"].to_pylist() == [*range(100, 107)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_column": "photo"}, "columns photo and references, got image, image_id"),
        ({"text_column": "image_id"}, "in image_id, got int64"),
        ({"split": "train"}, "--split to be one of val, got train"),
    ],
)
def test_data_that_cannot_be_used(model_dir, data_dir, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        engine.predict(str(model_dir), str(data_dir), tmp_path, **options)


def test_only_parquet_is_read(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"image": "a.png", "text": "red thing"}\n')
    with pytest.raises(ValueError, match="refs/convert/parquet"):
        open_source(str(tmp_path))


def test_sentences_of_every_layout():
    assert list_sentences(None) == list_sentences([]) == []
    assert list_sentences("a dog") == list_sentences(["a dog"]) == [{"text": "a dog", "text_index": 0}]


# The folder of results


def write_results(path, rows):
    pq.write_table(pa.table({"row": pa.array(rows, pa.int64()), "text": [str(row) for row in rows]}), path)


def test_finished_rows_are_read_from_the_results_and_repeated_ones_removed(tmp_path):
    write_results(tmp_path / "a.parquet", [0, 0, 2])
    write_results(tmp_path / "b.parquet", [2, 5, 5])
    write_results(tmp_path / "c.parquet", [0, 0])
    write_results(tmp_path / "d.parquet", [7])
    (tmp_path / "d.parquet").write_bytes((tmp_path / "d.parquet").read_bytes()[:-20])
    for _ in range(2):
        assert engine.find_finished(tmp_path, 9).tolist() == [0, 2, 5]
        rows = [pq.read_table(path)["row"].to_pylist() for path in sorted(tmp_path.glob("*"))]
        assert rows == [[0, 0, 2], [5, 5], []]


def test_other_settings_are_refused(model_dir, data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "run_pipeline", lambda *args, **options: None)
    engine.predict(str(model_dir), str(data_dir), tmp_path)
    with pytest.raises(ValueError, match=r"threshold: then 0\.5, now 0\.4"):
        engine.predict(str(model_dir), str(data_dir), tmp_path, threshold=0.4)
    with pytest.raises(ValueError, match="model_revision"):
        engine.predict(str(save_model(tmp_path / "other", seed=3)), str(data_dir), tmp_path)
    with pytest.raises(ValueError, match="num_images: then 11, now 5"):
        engine.predict(str(model_dir), str(data_dir), tmp_path, max_images=5)
    engine.predict(str(save_model(tmp_path / "moved", seed=1)), str(data_dir), tmp_path)


def test_folders_that_are_in_use_or_hold_other_files_are_refused(model_dir, data_dir, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "other.parquet").touch()
    with pytest.raises(ValueError, match="empty folder"):
        engine.predict(str(model_dir), str(data_dir), tmp_path)
    with FileLock(tmp_path / ".prediction.lock"), pytest.raises(ValueError, match="Another process"):
        engine.predict(str(model_dir), str(data_dir), tmp_path)


def test_a_summary_has_the_first_error(tmp_path):
    for name, errors in {"b": [None, "late"], "a": [None, "a.png is missing"], "c": ["later"]}.items():
        table = pa.table(
            {
                "row": range(len(errors)),
                "error": pa.array(errors, pa.string()),
                "truncated": [False] * len(errors),
                "unknown_words": pa.array([[]] * len(errors), pa.list_(pa.string())),
            }
        )
        pq.write_table(table, tmp_path / f"{name}.parquet")
    summary = engine.summarize(tmp_path)
    assert summary["num_errors"] == 3 and summary["first_error"] == "a.png is missing"


# On Ray


def read_results(output_dir):
    place = {"data_dir": str(output_dir / "data"), "cache_dir": str(output_dir / "cache")}
    results = datasets.load_dataset("parquet", **place, split="train")
    return sorted(results, key=lambda result: (result["row"], result["text_index"]))


def test_command(restr, local_ray, model_dir, data_dir, tmp_path, expected):
    words = ["predict", model_dir, data_dir, "--output-dir", tmp_path, "--format", "coco", "--num-actors", 1]
    done = restr(*words, "--batch-size", 2, "--pairs-per-file", 5)
    assert done.code == 0, done.err
    assert "20 pairs of 10 images in " in done.out and "0 rows with an error" in done.out
    assert_same(read_results(tmp_path), expected, tolerance=0.005)
    names = ["row", "file_name", "image_id", "ref_id", "sent_id", "text_index", "text", "unknown_words", "truncated"]
    files = sorted((tmp_path / "data").iterdir())
    assert len(files) > 1 and pq.read_schema(files[0]).names == [*names, "error", "score", "mask"]
    instances = json.loads((tmp_path / "instances.json").read_text())
    assert [annotation["caption"] for annotation in instances["annotations"]] == [
        result["text"] for result in expected if result["mask"].any()
    ]
    assert restr(*words).code == 0  # there is nothing left to do
    assert sorted((tmp_path / "data").iterdir()) == files


@pytest.mark.slow
def test_a_run_resumes_with_the_missing_images(local_ray, model_dir, data_dir, tmp_path, expected):
    run = {"batch_size": 2, "pairs_per_file": 5, "num_actors": 1}
    engine.predict(str(model_dir), str(data_dir), tmp_path, **run)
    first, second, *others = sorted((tmp_path / "data").iterdir())
    (tmp_path / "data" / "late.parquet").write_bytes(second.read_bytes())
    first.unlink()
    second.write_bytes(second.read_bytes()[:-5])
    (tmp_path / "summary.json").unlink()
    times = {path: path.stat().st_mtime_ns for path in others}
    summary = engine.predict(str(model_dir), str(data_dir), tmp_path, **run)
    assert summary["num_pairs"] == 20
    assert_same(read_results(tmp_path), expected, tolerance=0.005)
    assert times == {path: path.stat().st_mtime_ns for path in others}


@pytest.mark.slow
def test_errors_in_tasks_and_actors_are_raised_unchanged(local_ray, model_dir, bad_data_dir, tmp_path):
    with pytest.raises(ValueError, match=r"row 1: .*truncated"):
        engine.predict(str(model_dir), str(bad_data_dir), tmp_path, raise_errors=True, num_actors=1)
    summary = engine.predict(str(model_dir), str(bad_data_dir), tmp_path, num_actors=1)
    assert "truncated" in summary["first_error"]
    assert summary["num_errors"] == 8 and summary["unknown_words"] == {"xyzzy": 1} and summary["num_truncated"] == 1
    with pytest.raises(ValueError, match="8 rows"):
        engine.predict(str(model_dir), str(bad_data_dir), tmp_path, raise_errors=True)


def test_a_missing_extra_is_named(restr, model_dir, data_dir, tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "modeling_restr.prediction.engine")
    monkeypatch.setitem(sys.modules, "ray", None)
    done = restr("predict", model_dir, data_dir, "--output-dir", tmp_path)
    assert done.code == 1 and 'ray is missing: pip install "modeling-restr[train,scale]"' in done.err


@pytest.mark.slow
def test_the_commands_of_the_page_run(restr, local_ray, model_dir, data_dir, tmp_path, monkeypatch):
    """All but those that install the package and start Ray on other machines."""
    monkeypatch.chdir(tmp_path)
    page = (REPOSITORY / "docs" / "prediction_at_scale.md").read_text(encoding="utf-8")
    commands = re.findall(r"^restr predict (.*)$", page, flags=re.MULTILINE)
    assert len(commands) >= 4
    for command in commands:
        words = command.partition("#")[0].replace("/shared", str(tmp_path / "shared"))
        words = words.replace("MODEL", str(model_dir)).replace("DATA", str(data_dir))
        done = restr("predict", *words.split(), "--num-actors", 1)
        assert done.code == 0, done.err
    code = re.search(r"```python\n(.*?)```", page, flags=re.DOTALL)[1]
    variables = {}
    exec(code, variables)  # noqa: S102  (the page's own code)
    assert variables["mask"].dtype == bool and len(variables["masks"]) == 20
    assert (tmp_path / "runs" / "masks" / "instances.json").exists()


# Kills


def write_many(folder, num_images):
    """Small images with 1 to 4 sentences each, and {row: number of sentences}."""
    write_data(folder, make_rows(num_images), rows_per_group=20)
    return {row: 1 + row % 4 for row in range(num_images)}


def start_command(model_dir, data, output_dir, *options):
    words = ["predict", model_dir, data, "--output-dir", output_dir, "--pairs-per-file", 20, *options]
    command = [sys.executable, "-m", "modeling_restr.cli", *map(str, words)]
    log = (output_dir.parent / f"{output_dir.name}.log").open("a")
    return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})


def count_pairs(output_dir):
    """{row: number of results}"""
    tables = [pq.read_table(path, columns=["row", "text_index"]) for path in (output_dir / "data").glob("*.parquet")]
    pairs = Counter(zip(*(pa.concat_tables(tables)[name].to_pylist() for name in ("row", "text_index"))))
    assert set(pairs.values()) == {1}  # none is there twice
    return Counter(row for row, _ in pairs)


def kill_a_worker(driver, randomness):
    """Kill a process in which Ray runs a task or an actor of the pipeline, if there is one; return what it ran."""
    titles = {process: " ".join(process.cmdline()).strip() for process in driver.children(recursive=True)}
    stages = ("ReadRowGroup", "decode", "Predictor", "Write")
    workers = [process for process, title in titles.items() if any(stage in title for stage in stages)]
    if not workers:
        return []
    worker = randomness.choice(sorted(workers, key=lambda process: process.pid))
    worker.kill()
    return [titles[worker]]


def wait_for_a_file(run, output_dir):
    """Wait until a run has written a file more, or has ended: Ray's start takes longer than all that follows."""
    before = {*(output_dir / "data").glob("*.parquet")}
    while run.poll() is None and {*(output_dir / "data").glob("*.parquet")} <= before:
        time.sleep(0.05)


@pytest.mark.slow
def test_every_pair_is_written_once_after_kills_at_random_moments(model_dir, tmp_path):
    """Workers and drivers are killed. The next run starts at once, while processes of the old one may still end."""
    num_kills, seed = int(os.environ.get("RESTR_KILLS", "2")), int(os.environ.get("RESTR_KILL_SEED", "0"))
    randomness, kills, trial = random.Random(seed), [], 0
    expected = write_many(tmp_path / "many", 500)
    while len(kills) < num_kills:
        trial += 1
        start = partial(start_command, model_dir, tmp_path / "many", tmp_path / f"out{trial}", "--num-actors", 1)
        run = start()
        while run.poll() is None and len(kills) < num_kills:
            if randomness.random() < 0.7:
                wait_for_a_file(run, tmp_path / f"out{trial}")
            with suppress(subprocess.TimeoutExpired):
                run.wait(randomness.uniform(0, 4))
                break
            if randomness.random() < 0.5:
                kills += kill_a_worker(psutil.Process(run.pid), randomness)
            else:
                run.kill()
                run.wait()
                kills.append("driver")
                run = start()
        assert run.wait() == 0, (tmp_path / f"out{trial}.log").read_text()[-3000:]
        assert count_pairs(tmp_path / f"out{trial}") == expected
    print(f"seed {seed}, {trial} predictions, killed: {dict(Counter(kills))}")


@pytest.mark.long
def test_a_run_on_two_nodes_survives_the_loss_of_one(model_dir, tmp_path):
    from ray.cluster_utils import Cluster

    expected = write_many(tmp_path / "many", int(os.environ.get("RESTR_CLUSTER_IMAGES", "400")))
    half = sum(expected.values()) // 50  # files of at least 20 results
    options = {"num_cpus": 2, "object_store_memory": 200e6}
    cluster = Cluster(initialize_head=True, head_node_args=options)
    try:
        worker = cluster.add_node(**options)
        run = start_command(model_dir, tmp_path / "many", tmp_path / "out", "--address", cluster.address)
        deadline = time.monotonic() + 600
        while len([*(tmp_path / "out" / "data").glob("*.parquet")]) < half:
            assert run.poll() is None and time.monotonic() < deadline, (tmp_path / "out.log").read_text()[-3000:]
            time.sleep(0.2)
        cluster.remove_node(worker, allow_graceful=False)
        assert run.wait(900) == 0, (tmp_path / "out.log").read_text()[-3000:]
        assert count_pairs(tmp_path / "out") == expected
    finally:
        cluster.shutdown()
