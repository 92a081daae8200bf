"""The page on checkpoints: all of its commands and code in their order, with a tiny model and a local Hub."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from fresh_process import run_python, run_without_package
from hub_server import serve
from PIL import Image
from safetensors.torch import load_file
from test_convert_restr_original_to_hf import write_original_files


ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, flags=re.DOTALL)
# The page converts a model of full size, the test one of the fixtures.
SIZES = "--image-size 480", "--image-size 64 --num-attention-heads 4 --text-num-attention-heads 4"
RUN = """
from modeling_restr.cli import app
from modeling_restr.convert_restr_original_to_hf import convert_checkpoint
import typer

def run(program, *arguments):
    command = typer.Typer()
    command.command()(convert_checkpoint)
    (app if program == "restr" else command)(arguments, standalone_mode=False)
"""


def build_script() -> str:
    """
    All blocks as one script, except that for machines without the package and that for a page (`sh`), which needs files
    from npm and is tested in test_web_page.py.
    """
    parts = [RUN]
    for language, text in BLOCKS:
        if language == "bash":
            program, *arguments = shlex.split(text.replace(*SIZES))
            if program == "python":
                assert arguments[:2] == ["-m", "modeling_restr.convert_restr_original_to_hf"]
                del arguments[:2]
            parts.append(f"run({program!r}, *{arguments})\n")
        elif language == "python" and "trust_remote_code" not in text:
            parts.append(text)
    return "".join(parts)


@pytest.mark.slow
def test_the_page_works_from_conversion_to_loading(tmp_path):
    write_original_files(tmp_path, "coupled", num_words=50)["checkpoint"].rename(tmp_path / "restr.pth")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(
        tmp_path / "photo.jpg"
    )
    (without_package,) = (text for language, text in BLOCKS if language == "python" and "trust_remote_code" in text)
    with serve() as hub:
        run_python(build_script(), cwd=tmp_path, **hub.environment(tmp_path / "home", PYTHONPATH=str(ROOT)))
        mask = (tmp_path / "mask.png").read_bytes()
        (tmp_path / "mask.png").unlink()
        run_without_package(without_package, cwd=tmp_path, **hub.environment(tmp_path / "other"))
    assert (tmp_path / "mask.png").read_bytes() == mask
    assert (tmp_path / "photo_overlay.png").exists()
    half = load_file(tmp_path / "runs" / "half" / "model.safetensors")
    assert {tensor.dtype for tensor in half.values()} == {torch.float16}
    first, second = (hub.repositories["model", f"you/{name}"] for name in ("restr", "restr-half"))
    assert list(first.tags) == ["v1"] and second.private and len(first.titles) == len(second.titles) == 1
    assert "by me, CC BY 4.0" in first.files()["README.md"].decode()
    patterns = re.findall(r"`([\w*.]+)`", "".join(re.findall(r"^\| (`.*?) \|", PAGE, flags=re.MULTILINE)))
    assert all(any(Path(name).match(pattern) for pattern in patterns) for name in first.files())


def test_its_numbers_are_those_of_the_card():
    card = (ROOT / "examples" / "restr_mini" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?:all|place or order, among several)[^|]*\|(.*)\|$", PAGE, flags=re.MULTILINE)
    assert len(rows) == 2
    for row in rows:
        assert row.strip() in card
