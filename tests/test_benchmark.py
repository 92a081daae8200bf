"""The benchmark for a GPU, rehearsed on a CPU with a tiny model."""

import contextlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from modeling_restr import ReSTRConfig


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
# Runs the script argv[1] and says which of these it imported; a machine with a GPU need not have them.
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
def benchmark_gpu(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import benchmark_gpu

    return benchmark_gpu


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_every_section_of_the_gpu_benchmark_runs(tmp_path, benchmark_gpu):
    with torch.compiler.set_stance("force_eager"):  # compilation would take a minute
        failures = benchmark_gpu.benchmark_gpu(torch.device("cpu"), tmp_path, 600, True, "eager")
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
    whats = {row["what"] for rows in sections.values() for row in rows}
    for implementation in ("eager", "sdpa"):
        assert f"{implementation}, gradients, the worst parameter" in whats
    for kind in ("eager", "torch.compile"):
        assert f"images: 2, sentences per image: 4, {kind}" in whats
        assert [row["what"] for row in sections[f"answers, bfloat16, {kind}"]] == [
            f"images: {images}, sentences per image: {sentences}"
            for images, sentences in ((2, 1), (3, 1), (1, 1), (1, 2), (1, 3))
        ]


def test_gpu_benchmark_needs_no_data_or_metrics_and_keeps_its_time_limit(tmp_path):
    options = [
        "--what",
        "gpu",
        "--device",
        "cpu",
        "--tiny",
        "--time_limit",
        "0",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, EXAMPLES / "benchmark.py", *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "imported: []" in done.stdout
    rows = json.loads((tmp_path / "out" / "gpu.json").read_text())["sections"]["sections"]
    assert {row["outcome"] for row in rows} == {"stopped after 0 s"}


def test_a_section_that_fails_or_overruns_is_left_behind(tmp_path, benchmark_gpu, monkeypatch):
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
    monkeypatch.setattr(benchmark_gpu, "SECTIONS", sections)
    failures = benchmark_gpu.benchmark_gpu(torch.device("cpu"), tmp_path, 60, True, "eager")
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


@pytest.mark.parametrize("values", [{}, {"num_fusion_layers": 3, "hidden_size": 24}])
def test_the_formula_counts_what_forward_multiplies(benchmark_gpu, values):
    config = benchmark_gpu.tiny_config(**values)
    device = torch.device("cpu")
    model = benchmark_gpu.create_model(config, device)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**benchmark_gpu.create_batch(config, device, 2, 3))
    assert counter.get_total_flops() == 2 * sum(benchmark_gpu.count_macs(config, 2, 6).values())


def test_the_formula_gives_the_paper_s_numbers(benchmark_gpu):
    macs = {part: count / 1e9 for part, count in benchmark_gpu.count_macs(ReSTRConfig(), 1, 1).items()}
    assert macs == pytest.approx({"vision": 92, "language": 0.14, "fusion": 17, "decoder": 4.3}, rel=0.04)
