"""`restr evaluate`: whole evaluations with one and two processes, killed and resumed evaluations, and their files."""

import hashlib
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
from doc_pages import run_page
from PIL import Image
from test_evaluation import make_dataset, make_model_and_processor, make_rows
from tiny_training import write_prepared
from transformers import pipeline

from modeling_restr.data.canonical import decode_mask, encode_mask
from modeling_restr.evaluation import run
from modeling_restr.evaluation.contact_sheet import choose_examples
from modeling_restr.files import hold_folder
from modeling_restr.hub import save_bundle
from modeling_restr.metrics import ReferringIoU


REPOSITORY = Path(__file__).resolve().parents[1]


def write_data(folder: Path, rows: list[dict]) -> Path:
    return write_prepared(folder, {"val": make_dataset(rows)})


@pytest.fixture(scope="module", autouse=True)
def isolation(tmp_path_factory, one_thread):
    """No network, and a cache of `datasets` of its own, here and in the processes that are started."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", f"{REPOSITORY}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        yield


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_bundle(*make_model_and_processor(), tmp_path_factory.mktemp("model") / "restr", include_code=False)


@pytest.fixture(scope="module")
def rows():
    return make_rows(12)


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory, rows):
    return write_data(tmp_path_factory.mktemp("data") / "drawn", rows)


@pytest.fixture(scope="module")
def evaluate(model_folder, data_folder):
    """Evaluates the model and returns the content of results.json."""

    def call(output_dir: Path, data: Path = data_folder, **options) -> dict:
        run.run_evaluation(str(model_folder), str(data), "val", output_dir, **options)
        return json.loads((output_dir / "results.json").read_text())

    return call


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory, evaluate):
    """A finished evaluation."""
    folder = tmp_path_factory.mktemp("evaluation")
    evaluate(folder, by_length=True, num_bootstrap=50)
    return folder


@pytest.fixture(scope="module")
def results(output_dir):
    return json.loads((output_dir / "results.json").read_text())


@pytest.fixture
def evaluated(monkeypatch):
    """The image_ids that the model is asked about."""
    seen = []
    evaluate_dataset = run.evaluate_dataset

    def wrapper(model, processor, dataset, **options):
        for row, records in zip(dataset, evaluate_dataset(model, processor, dataset, **options)):
            seen.append(row["image_id"])
            yield records

    monkeypatch.setattr(run, "evaluate_dataset", wrapper)
    return seen


# Results


def test_overall_iou_is_that_of_the_pipelines_masks(model_folder, rows, results):
    pipe = pipeline("referring-image-segmentation", model=str(model_folder), device="cpu")
    counts = {}
    for row in rows:
        pairs = [(reference, one) for reference in row["references"] for one in reference["expressions"]]
        found = pipe(Image.open(io.BytesIO(row["image"]["bytes"])), text=[one["text"] for _, one in pairs])
        for (reference, one), result in zip(pairs, found):
            mask, target = np.asarray(result["mask"]) > 0, decode_mask(reference["mask"])
            counts[one["sent_id"]] = (int((mask & target).sum()), int((mask | target).sum()))
    listed = {record["sent_id"]: (record["intersection"], record["union"]) for record in results["expressions"]}
    assert listed == counts
    intersection, union = np.array(list(counts.values())).sum(axis=0)
    assert results["metrics"]["overall_iou"] == pytest.approx(intersection / union, rel=1e-12)


def test_conditions_are_recorded(model_folder, rows, results):
    assert results["model"]["name"] == str(model_folder)
    files = results["model"]["revision"]
    assert {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json"} <= {*files}
    for name, digest in files.items():
        assert digest == hashlib.sha256((model_folder / name).read_bytes()).hexdigest()
    references = [reference for row in rows for reference in row["references"]]
    assert results["data"]["images"] == len(rows) and results["data"]["references"] == len(references)
    assert results["data"]["expressions"] == len(results["expressions"]) == results["metrics"]["num_expressions"]
    assert (results["split"], results["threshold"], results["dtype"]) == ("val", 0.5, "float32")
    assert results["image_size"] == [64, 64] and results["expressions_per_batch"] == 16
    assert {"torch", "transformers", "datasets"} <= {*results["versions"]}
    assert results["command"] == shlex.join(sys.argv)


def test_groups_and_intervals_are_those_of_the_metric(results):
    records = results["expressions"]
    expected = ReferringIoU(keep_in_memory=True).compute(
        predictions=[{name: record[name] for name in ("intersection", "union")} for record in records],
        num_words=[record["num_words"] for record in records],
        image_ids=[record["image_id"] for record in records],
        num_bootstrap=50,
    )
    assert results["metrics"] == expected
    assert len(expected["by_num_words"]) == 4 and len(expected["confidence_intervals"]["overall_iou"]) == 2


def test_the_command_takes_options_and_prints_the_report(tmp_path, restr, model_folder, data_folder, results):
    options = ["--max-images", 3, "--dtype", "bfloat16", "--expressions_per_batch", 2, "--benchmark", "refcoco"]
    done = restr("evaluate", model_folder, data_folder, "--split", "val", *options, "--output_dir", tmp_path)
    assert done.code == 0, done.err
    report = (tmp_path / "results.md").read_text()
    assert report in done.out and "oIoU=" in done.err
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["data"]["images"] == 3 and found["dtype"] == "bfloat16" and found["split"] == "val[:3]"
    assert found["command"].startswith("restr evaluate ")
    exact = {record["sent_id"]: record["union"] for record in results["expressions"]}
    assert all(abs(one["union"] - exact[one["sent_id"]]) < 0.3 * exact[one["sent_id"]] for one in found["expressions"])
    # The data is not the benchmark's.
    assert [label for label in read_table(report) if "paper" in label] == ["*the paper's ReSTR on RefCOCO, val*"]
    assert "images: 3, published 1,500 (1,497 fewer)" in report and "Not comparable" in report
    assert found["data"]["differences"] and not results["data"]["differences"]


def test_expressions_without_a_target_give_the_results_of_grefcoco(tmp_path, evaluate):
    rows = make_rows(3, seed=2)
    for reference in rows[1]["references"]:
        reference["mask"] = encode_mask(np.zeros_like(decode_mask(reference["mask"])))
    found = evaluate(tmp_path / "out", data=write_data(tmp_path / "data", rows))
    without = [record for record in found["expressions"] if record["target"] == 0]
    assert without and {record["image_id"] for record in without} == {1}
    assert found["metrics"]["N-acc"] == np.mean([record["predicted"] == 0 for record in without])
    assert {"gIoU", "T-acc"} <= found["metrics"].keys()
    assert "N-acc" in (tmp_path / "out" / "results.md").read_text()


def read_table(report: str) -> dict[str, dict[str, str]]:
    """The cells of the tables by the label of the row and the title of the column."""
    lines = [line for line in report.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: dict(zip(rows[0], row)) for row in rows[2:]}


def test_report_shows_the_papers_numbers_as_the_papers(output_dir, results, model_folder, data_folder):
    report = (output_dir / "results.md").read_text()
    table = read_table(report)
    ours = table.pop(f"{model_folder} on {data_folder}, val")
    assert ours["overall IoU"].startswith(f"{100 * results['metrics']['overall_iou']:.2f} [")
    assert ours["expressions"] == str(len(results["expressions"]))
    paper = {label: row["overall IoU"] for label, row in table.items() if "paper" in label}
    assert len(paper) == 7 and paper["*the paper's ReSTR on RefCOCO+, testB*"] == "48.27"
    assert all(not row["mean IoU"] and not row["P@0.5"] for label, row in table.items() if "paper" in label)
    groups = results["metrics"]["by_num_words"]
    assert table["3"]["expressions"] == str(groups["3"]["num_expressions"])
    assert "--benchmark" in report


def test_contact_sheet_has_three_rows(output_dir, results):
    sheet = Image.open(output_dir / "contact_sheet.png")
    assert sheet.format == "PNG" and sheet.width >= 4 * 150
    assert len(results["expressions"]) >= 12  # four in each row


def test_examples_are_the_best_median_and_worst():
    records = [
        (number, {"image_id": number, "sent_id": number, "intersection": number, "union": 20}) for number in range(21)
    ]
    records[20][1].update(intersection=0, union=0)  # an empty mask is right: IoU 1
    chosen = choose_examples(records, number=3)
    numbers = {name: [index for index, _ in items] for name, items in chosen.items()}
    assert numbers == {"best": [20, 19, 18], "median": [10, 11, 9], "worst": [0, 1, 2]}
    one_image = choose_examples([(index // 18, record) for index, record in records], number=3)
    sent_ids = {name: [record["sent_id"] for _, record in items] for name, items in one_image.items()}
    assert sent_ids == {"best": [20, 17, 19], "median": [10, 18, 11], "worst": [0, 18, 1]}
    assert [len(items) for items in choose_examples(records[:2]).values()] == [1, 1, 1]


def test_a_model_on_the_hub_is_pinned_to_its_commit(tmp_path, model_folder, monkeypatch):
    commit = "0123456789" * 4
    repository = tmp_path / "models--me--restr"
    shutil.copytree(model_folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert run.find_revision("me/restr") == run.find_revision("me/restr", "main") == commit
    (repository / "refs" / "main").write_text("f" * 40)  # as if a push came in between
    model, processor = run.load_model("me/restr", commit, "float32", torch.device("cpu"))
    assert len(model(**processor(images=Image.new("RGB", (9, 9)), text="the dog", return_tensors="pt")).logits) == 1


# Processes and resuming


@pytest.mark.slow
def test_everything_on_the_page_runs(tmp_path, model_folder, data_folder):
    """With a small model instead of restr-mini. One process and two processes of either launcher count the same pixels."""
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "restr_mini").symlink_to(model_folder)
    for name in ("examples/photos", "examples/accelerate_configs", "modeling_restr"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "refcoco").symlink_to(data_folder)
    printed = run_page("evaluation.md", tmp_path).splitlines()
    one, *others = (
        json.loads((tmp_path / "runs" / name / "results.json").read_text())
        for name in ("held_out", "torchrun", "accelerate", "python")
    )
    for other in others:
        assert other["expressions"] == one["expressions"]
        assert other["metrics"] == {name: one["metrics"][name] for name in other["metrics"]}
    parts = sorted((tmp_path / "runs" / "torchrun" / "parts").iterdir())
    assert [len(path.read_text().splitlines()) for path in parts] == [6, 6]
    assert printed[-3:] == [str(3 / 21), *[str(one["metrics"]["overall_iou"])] * 2]


KILLED_AFTER_THREE_IMAGES = """
import os, signal, sys
from modeling_restr.evaluation import run

def evaluate_three_images(*args, evaluate=run.evaluate_dataset, **options):
    for number, records in enumerate(evaluate(*args, **options)):
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        yield records

run.evaluate_dataset = evaluate_three_images
run.run_evaluation(*sys.argv[1:3], "val", sys.argv[3])
"""


def test_a_killed_evaluation_resumes(tmp_path, model_folder, evaluate, evaluated):
    rows = make_rows(8, seed=1)
    data = write_data(tmp_path / "data", rows)
    command = [sys.executable, "-c", KILLED_AFTER_THREE_IMAGES, model_folder, data, tmp_path / "out"]
    assert subprocess.run([*map(str, command)], check=False).returncode == -signal.SIGKILL
    part = tmp_path / "out" / "parts" / "part-00000.jsonl"
    lines = part.read_bytes().splitlines(keepends=True)
    assert len(lines) == 3 and not (tmp_path / "out" / "results.json").exists()
    part.write_bytes(b"".join(lines) + lines[0][:40])  # torn, as in the middle of a write
    (part.parent / "part-00001.jsonl").write_bytes(lines[0][:40])  # that of another process
    resumed = evaluate(tmp_path / "out", data=data)
    assert evaluated == [row["image_id"] for row in rows[3:]]
    evaluated.clear()
    whole = evaluate(tmp_path / "whole", data=data)
    assert len(evaluated) == len(rows)
    assert resumed["metrics"] == whole["metrics"] and resumed["expressions"] == whole["expressions"]


def test_a_finished_evaluation_is_not_repeated(output_dir, results, evaluate, evaluated):
    assert evaluate(output_dir, by_length=True, num_bootstrap=50) == results
    assert not evaluated


def test_a_folder_in_use_is_refused(tmp_path, evaluate, evaluated):
    with hold_folder(tmp_path, "evaluation"), pytest.raises(ValueError, match="Another process is writing to"):
        evaluate(tmp_path)
    assert not evaluated and [path.name for path in tmp_path.iterdir()] == [".evaluation.lock"]


@pytest.mark.parametrize(
    ("options", "named", "number"),
    [
        ({"threshold": 0.4}, "threshold: 0.5 there, 0.4 now", 1),
        ({"dtype": "bfloat16"}, "dtype: float32 there, bfloat16 now", 1),
        ({"max_images": 3}, "split: val there, val[:3] now", 2),  # and other rows
    ],
)
def test_other_settings_are_refused(output_dir, results, evaluate, evaluated, options, named, number):
    with pytest.raises(ValueError, match="other settings") as error:
        evaluate(output_dir, **options)
    assert named in str(error.value) and str(error.value).count(" there, ") == number
    assert not evaluated
    assert json.loads((output_dir / "results.json").read_text()) == results


def test_another_model_is_refused(tmp_path, output_dir, data_folder):
    model, processor = make_model_and_processor()
    next(model.parameters()).data.add_(1)
    folder = save_bundle(model, processor, tmp_path / "other", include_code=False)
    with pytest.raises(ValueError, match="model_revision"):
        run.run_evaluation(str(folder), str(data_folder), "val", output_dir)


def test_damaged_lines_are_named(tmp_path, output_dir, evaluate):
    part = next((output_dir / "parts").iterdir())
    lines = part.read_bytes().splitlines(keepends=True)
    copy = tmp_path / "out" / "parts" / part.name
    copy.parent.mkdir(parents=True)
    shutil.copy(output_dir / "settings.json", tmp_path / "out" / "settings.json")
    copy.write_bytes(lines[0] + b'{"row": 3,\n' + lines[2])
    with pytest.raises(ValueError, match="line 2 is damaged"):
        evaluate(tmp_path / "out")


# Errors


def test_unusable_data_is_explained(tmp_path, restr, model_folder, data_folder):
    rows = make_rows(2)
    rows[0]["references"][0]["expressions"][0]["text"] = "  "
    wordless = write_data(tmp_path / "data", rows)
    for data, split, message in [
        (data_folder, "testC", f"among val in {data_folder}, got testC"),
        ("no/such_data", "val", "no/such_data"),
        (wordless, "val", "at least one word"),
    ]:
        done = restr("evaluate", model_folder, data, "--split", split, "--output-dir", tmp_path / "out")
        assert done.code == 1 and message in done.err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--bootstrap", "--expressions-per-batch", "--max-images"])
def test_counts_must_be_positive(tmp_path, restr, model_folder, data_folder, option):
    done = restr("evaluate", model_folder, data_folder, "--split", "val", "--output-dir", tmp_path, option, 0)
    assert done.code == 2 and option in done.err
