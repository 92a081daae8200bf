"""The benchmark for a GPU, run on a CPU with a tiny model."""

import contextlib
import json
import math
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from modeling_restr import ReSTRConfig


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
# Runs the script argv[1] and prints which of these it imported. A machine with a GPU may lack them.
FRESH_PROCESS = """
import os, runpy, sys
script = sys.argv.pop(1)
sys.path.insert(0, os.path.dirname(script))
try:
    runpy.run_path(script, run_name="__main__")
finally:
    names = ("datasets", "evaluate", "pycocotools", "modeling_restr.data", "modeling_restr.metrics")
    print("imported:", [name for name in names if name in sys.modules])
"""


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    from benchmarks import gpu

    return gpu


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_every_section_of_the_gpu_benchmark_runs(tmp_path, gpu):
    with torch.compiler.set_stance("force_eager"):  # compilation would take a minute
        failures = gpu.benchmark_gpu(torch.device("cpu"), tmp_path, 600, True, "eager")
    assert failures == []
    content = json.loads((tmp_path / "gpu.json").read_text())
    sections = content["sections"]
    assert {row["outcome"] for row in sections.pop("sections")} == {"done"}
    assert content["facts"]["torch"] == torch.__version__ and content["failures"] == []
    table = (tmp_path / "gpu.md").read_text()
    for section, rows in sections.items():
        assert f"### {section}\n" in table
        for row in rows:
            assert f"| {row['what']} |" in table
            numbers = [value for value in row.values() if isinstance(value, float)]
            assert all(map(math.isfinite, numbers))
    assert {path.name for path in tmp_path.glob("step_*")} == {
        "step_of_2x4.txt",
        "step_of_2x4_compiled.txt",
        "step_of_8x1.txt",
    }
    whats = {row["what"] for rows in sections.values() for row in rows}
    for implementation in ("eager", "sdpa"):
        assert f"{implementation}, gradients, the worst parameter" in whats
    for script in ("run_referring_segmentation.py", "run_referring_segmentation_no_trainer.py"):
        assert f"{script}, images: 2, sentences per image: 4" in whats
    for kind in ("eager", "torch.compile"):
        assert f"images: 2, sentences per image: 4, {kind}" in whats
        assert [row["what"] for row in sections[f"answers, bfloat16, {kind}"]] == [
            f"images: {images}, sentences per image: {sentences}"
            for images, sentences in ((2, 1), (3, 1), (1, 1), (1, 2), (1, 3))
        ]


def test_gpu_benchmark_needs_no_data_or_metrics_and_keeps_its_time_limit(tmp_path):
    options = ["--what", "gpu", "--device", "cpu", "--tiny", "--time_limit", "0", "--output_dir", tmp_path / "out"]
    command = [sys.executable, "-c", FRESH_PROCESS, EXAMPLES / "benchmark.py", *options]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "imported: []" in done.stdout
    rows = json.loads((tmp_path / "out" / "gpu.json").read_text())["sections"]["sections"]
    assert {row["outcome"] for row in rows} == {"stopped after 0 s"}


def test_a_section_that_fails_or_overruns_does_not_stop_the_others(tmp_path, gpu, monkeypatch):
    def overrun(setup):
        while True:
            with contextlib.suppress(Exception):  # as a library may
                while True:
                    pass

    def fail(setup):
        setup.report.add("half", "a row")
        raise RuntimeError("out of memory")

    sections = (
        ("one", overrun, 1.1),
        ("two", fail, 9),
        ("three", lambda setup: setup.report.check("b", "c", 2e-5, 1e-5), 9),
    )
    monkeypatch.setattr(gpu, "SECTIONS", sections)
    failures = gpu.benchmark_gpu(torch.device("cpu"), tmp_path, 60, True, "eager")
    assert failures == [
        "two: failed: RuntimeError: out of memory",
        "b: c: expected an error of 1e-05 at most, got 2e-05",
    ]
    sections = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert [row["outcome"] for row in sections["sections"]] == [
        "stopped after 1 s",
        "failed: RuntimeError: out of memory",
        "done",
    ]
    assert sections["half"] == [{"what": "a row"}]
    assert sections["b"] == [{"what": "c", "error": 2e-05, "bound": 1e-05, "ok": False}]


def test_parts_leave_the_attention_of_later_parts_alone(gpu):
    from benchmarks.stages import measure_stages

    config = gpu.tiny_config(attn_implementation="sdpa")
    measure_stages(config, torch.device("cpu"), torch.float32, 1)
    gpu.count_flops(config, 1, 1)
    assert config._attn_implementation == "sdpa"


def test_flops_at_the_papers_size(gpu):
    """An image, and what each sentence adds in fusion, decoder and language: billions of multiply-accumulates."""
    image, fusion, decoder, language = 92, 17, 4.3, 0.14
    flops = gpu.count_flops(ReSTRConfig(), 1, 1)
    assert flops / 2e9 == pytest.approx(image + fusion + decoder + language, rel=0.01)


@pytest.mark.long
def test_prediction_is_measured_next_to_loops(monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    from benchmarks.prediction import benchmark_throughput

    benchmark_throughput(image_size=32, runs=1, num_images=4, num_sentences=1)
    lines = capsys.readouterr().out.splitlines()
    measured = [line for line in lines if line.endswith("(medians)")]
    assert [line.partition(":")[0] for line in measured] == ["one loop", "one actor", "two loops", "two actors"]
    assert all(float(line.split()[2]) > 0 and float(line.split()[4]) > 0 for line in measured)
    assert [line.partition(":")[0] for line in lines[-2:]] == ["one actor / one loop", "two actors / two loops"]


def test_the_table_is_printed_and_written(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    options = ["--what", "answers", "--device", "cpu", "--tiny", "--runs", "1", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLES / "benchmark.py"), *options])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(sys.argv[0], run_name="__main__")
    assert not stopped.value.code
    table = (tmp_path / "performance.md").read_text()
    assert table in capsys.readouterr().out
    content = json.loads((tmp_path / "performance.json").read_text())
    rows = {row["name"]: row for row in content["rows"]}
    one, vit = rows["1 sentence"], rows["bare ViT"]
    assert one["ratio"] == pytest.approx(one["value"] / vit["value"]) and one["ratio_to"] == "bare ViT"
    assert rows["difference of the straightforward logits"]["value"] < 1e-4
    assert [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| 8")] == [
        f"| {name}" for name in rows if name.startswith("8")
    ]


@pytest.mark.long
def test_every_part_of_the_table_runs(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    options = ["--device", "cpu", "--tiny", "--runs", "1", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLES / "benchmark.py"), *options])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(sys.argv[0], run_name="__main__")
    assert not stopped.value.code
    rows = json.loads((tmp_path / "performance.json").read_text())["rows"]
    assert all(math.isfinite(row["value"]) and row["value"] > 0 for row in rows)
    floors = {row["name"].partition(":")[0]: row["floor"] for row in rows if row["section"].startswith("stages")}
    assert floors["pixel decoder, 8 sentences"] > floors["pixel decoder, 1 sentence"] > 0
    sections = {row["section"].partition(" ")[0].strip(",") for row in rows}
    assert sections >= {"answers", "stages", "CLIPSeg", "growth", "training"}


def test_a_row_shows_its_floor_and_the_chart_is_drawn(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    from benchmarks.measuring import Row
    from benchmarks.report import write_report

    rows = [
        Row("stages", "decoder", 0.2, floor=0.08),
        Row("stages", "encoder", 1234.5, "MiB", ratio=0.5, ratio_to="CLIPSeg"),
    ]
    write_report(rows, {"torch": "2.13"}, tmp_path)
    table = (tmp_path / "performance.md").read_text()
    assert "| decoder | 200 ms | 80 ms | 2.50 x the floor |" in table
    assert "| encoder | 1,234 MiB |  | 0.50 x CLIPSeg |" in table
    with Image.open(tmp_path / "performance.png") as chart:
        assert min(chart.size) > 100


def test_every_stage_from_file_to_mask_has_a_floor(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    from benchmarks import file_to_mask
    from benchmarks.measuring import tiny_config

    monkeypatch.setattr(file_to_mask, "PHOTO_SIZES", {"small": (48, 64), "large": (480, 640)})
    monkeypatch.setattr(file_to_mask, "NUMBERS_OF_SENTENCES", (1, 2))
    rows = file_to_mask.measure_file_to_mask(tiny_config(), torch.device("cpu"), torch.float32, 1)
    stages = {(row.section, row.name): row for row in rows[:-4]}
    assert len(stages) == 7 + 2 * (3 + 6) and all(row.floor > 0 for row in stages.values())
    model = sum(stages["model, float32", name].value for name in ("encode", "fuse 2", "decode 2"))
    others = sum(stages["photo of large", name].value for name in ("read and decode", "resize and normalize"))
    others += stages["model, float32", "tokenize 2"].value + stages["masks of large", "post-process 2"].value
    assert rows[-1].name == "large, sentences: 2"
    assert rows[-1].value == pytest.approx(100 * others / model)


def test_loader_and_evaluation_are_measured(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    from benchmarks import data_and_evaluation
    from benchmarks.measuring import tiny_config

    monkeypatch.setattr(data_and_evaluation, "LOADED_IMAGES", 4)
    arguments = (tiny_config(), torch.device("cpu"), torch.float32, 1)
    step, one, two = data_and_evaluation.measure_training_data(*arguments)
    assert {row.unit for row in (step, one, two)} == {"images/s"}
    assert one.ratio == pytest.approx(one.value / step.value) and two.ratio == pytest.approx(two.value / step.value)
    together, singly = data_and_evaluation.measure_evaluation(*arguments)
    assert together.floor > 0 and singly.ratio == pytest.approx(singly.value / together.value)
    row = data_and_evaluation.make_dataset(1)
    assert sum(len(reference["expressions"]) for reference in row[0]["references"]) == 7
    assert [len(row["references"][0]["expressions"]) for row in data_and_evaluation.split_rows(row)] == [1] * 7
