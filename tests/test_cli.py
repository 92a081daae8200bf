"""The console command `restr`: its help, its errors, and `restr segment` on the shipped checkpoint."""

import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fresh_process import run_python
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers.utils import logging

from modeling_restr import ReSTRForImageSegmentation, ReSTRProcessor
from modeling_restr.cli import app


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
MODEL = EXAMPLES / "restr_mini"
PHOTO = EXAMPLES / "photos" / "held_out" / "000000173350.jpg"
COMMANDS = {command.callback.__name__: command.callback for command in app.registered_commands}
for group in app.registered_groups:
    commands = group.typer_instance.registered_commands
    COMMANDS |= {f"{group.name} {command.callback.__name__}": command.callback for command in commands}


def test_segment_writes_masks_and_an_overlay(tmp_path):
    sentences = ["the upper dog", "the lower dog"]
    words = ["segment", MODEL, PHOTO, *sentences, "--output_dir", "out"]
    command = [sys.executable, "-m", "modeling_restr.cli", *map(str, words)]
    done = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == [
        "000000173350_mask1_the-upper-dog.png",
        "000000173350_mask2_the-lower-dog.png",
        "000000173350_overlay.png",
    ]
    size = Image.open(PHOTO).size
    masks = [np.asarray(Image.open(tmp_path / "out" / name)) for name in files[:2]]
    for mask, sentence in zip(masks, sentences):
        assert mask.shape == size[::-1] and set(np.unique(mask)) <= {0, 255}
        line = next(line for line in done.stdout.splitlines() if sentence in line)
        assert f"{(mask > 0).mean():.1%}" in line  # the printed share
    overlay = np.asarray(Image.open(tmp_path / "out" / files[2]))
    assert overlay.shape[0] > size[1] and overlay.shape[1] == size[0]  # the legend is below
    changed = (overlay[: size[1]] != np.asarray(Image.open(PHOTO).convert("RGB"))).any(axis=2)
    assert changed[(masks[0] > 0) | (masks[1] > 0)].all()


# Runs the command, and prints which of the packages in argv[1] it imported that transformers alone had not imported.
IMPORTS = """
import sys
import torch, transformers.modeling_utils, transformers.pipelines

packages = sys.argv.pop(1).split()
before = set(sys.modules)
from modeling_restr.cli import main

try:
    main()
finally:
    print("imported:", [name for name in packages if name in set(sys.modules) - before])
"""
PACKAGES = (
    "datasets evaluate pandas pyarrow pycocotools scipy sklearn torchvision matplotlib ray gradio onnx onnxruntime "
    "transformers.generation.utils modeling_restr.data modeling_restr.metrics modeling_restr.training "
    "modeling_restr.evaluation modeling_restr.hub modeling_restr.export"
)


def test_segment_imports_only_what_it_uses(tmp_path):
    words = ["segment", MODEL, PHOTO, "the upper dog", "--output-dir", tmp_path]
    assert run_python(IMPORTS, PACKAGES, *words, cwd=tmp_path).splitlines()[-1] == "imported: []"


def test_segment_names_the_words_that_are_lost(restr, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    logging.enable_propagation()  # transformers' logger has its own handler, on the first stderr
    long = "the " * 19 + "clock quux"
    done = restr("segment", MODEL, EXAMPLES / "photos" / "clock.jpg", "the xyzzy clock", long, "the clock")
    assert done.code == 0, done.err
    (warning,) = (message for message in caplog.messages if "xyzzy" in message)
    assert "'xyzzy'" in warning and "'quux'" in warning and "'clock'" not in warning


def test_segment_takes_adapters(restr, tmp_path):
    model = ReSTRForImageSegmentation.from_pretrained(MODEL)
    get_peft_model(model, LoraConfig(r=1, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapters")
    ReSTRProcessor.from_pretrained(MODEL).save_pretrained(tmp_path / "adapters")
    done = restr("segment", tmp_path / "adapters", PHOTO, "the upper dog", "--output-dir", tmp_path)
    assert done.code == 0 and len(list(tmp_path.glob("*mask1*"))) == 1


def test_segment_shows_the_photo_as_the_model_sees_it(restr, tmp_path):
    """The overlay scales a 16-bit picture instead of clipping it."""
    ramp = np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    options = ["--threshold", 0.999999, "--output-dir", tmp_path]
    done = restr("segment", MODEL, tmp_path / "ramp.png", "the dog", *options)
    assert done.code == 0, done.err
    overlay = np.asarray(Image.open(tmp_path / "ramp_overlay.png"))[:48].astype(int)
    untouched = np.asarray(Image.open(next(tmp_path.glob("*mask1*")))) == 0
    assert untouched.all()
    assert np.abs(overlay - ramp[..., None] / 257).max() <= 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["segment", MODEL, "absent.jpg", "the dog"], "PHOTO': file 'absent.jpg' does not exist"),
        (["segment", MODEL, EXAMPLES, "the dog"], "examples' is a directory"),
        (["segment", EXAMPLES, PHOTO, "the dog"], "Expected a folder with a model's config.json, got "),
        (["segment", MODEL, PHOTO, "the dog", "--output-dir", PHOTO], ".jpg' is a file"),
        (["push", "absent", "you/restr", "--recipe", __file__], "test_cli.py cannot be read as JSON"),
        (["push", "absent", "you/restr", "--evaluation", __file__], "test_cli.py cannot be read as JSON"),
        (["push", "absent", "you/restr", "--evaluation", MODEL / "wordings.json"], "Expected a JSON object in "),
        (["export", MODEL, "--web", "page", "--examples", __file__], "test_cli.py cannot be read as JSON"),
        (["segment", MODEL, __file__, "the dog"], "test_cli.py' cannot be read: "),
        (["segment", MODEL, PHOTO, "  "], "sentence"),
        (["segment", MODEL, PHOTO], "Missing argument"),
        (
            ["segment"],
            "examples/restr_mini; models that people share are at https://huggingface.co/models?other=restr",
        ),
        (["segment", PHOTO, "the dog", "the cat"], "Expected a folder or a Hub id such as you/restr, got "),
        (["segment", "./absent", PHOTO, "the dog"], "such as you/restr, got ./absent"),
        (["segment", MODEL, PHOTO, "the dog", "--threshold", "2"], "--threshold"),
        (["segment", MODEL, PHOTO, "the dog", "--device", "gpu"], "Expected --device to be one of cpu"),
        (["segment", MODEL, PHOTO, "the dog", "--num_threads", "0"], "--num-threads"),
        (["segment", MODEL, PHOTO, "the dog", "--output", "here"], "--output-dir"),
        (["segmnt"], "segmnt"),
    ],
)
def test_errors_are_one_line(restr, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    done = restr(*words)
    assert done.code == (2 if "Missing" in done.err or "Invalid" in done.err or "o such" in done.err else 1)
    line = done.err.splitlines()[-1]  # after the progress of loading weights
    assert line.startswith("Error: ") and message in line
    assert not list(tmp_path.iterdir())


def test_damaged_weights_are_one_line(restr, tmp_path):
    for path in MODEL.glob("*.json"):
        shutil.copy(path, tmp_path)
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")  # not downloaded
    done = restr("segment", tmp_path, PHOTO, "the dog")
    assert done.code == 1 and done.err.splitlines()[-1].startswith("Error: Expected whole weights, got ")


def test_an_address_in_use_is_named(restr):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = restr("serve", MODEL, "--port", port)
    assert done.code == 1 and f"Expected a free address, got 127.0.0.1:{port} (" in done.err.splitlines()[-1]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(restr, command):
    done = restr(*command.split(), "--help")
    assert done.code == 0
    assert "Example" in done.out and "│ *" in done.out


def test_every_option_is_explained_and_means_the_same_everywhere(restr):
    assert restr("--help").code == 0
    meanings: dict[str, set] = {}
    for callback in COMMANDS.values():
        for name, hint in callback.__annotations__.items():
            if name != "return":
                (option,) = hint.__metadata__
                assert option.help and option.help[0].isupper() and option.help.endswith(".")
                meanings.setdefault(name, set()).add(option.help)
    shared = {"revision", "data_revision", "device", "num_threads", "threshold", "dtype", "expressions_per_batch"}
    assert not {name: helps for name, helps in meanings.items() if name in shared and len(helps) > 1}


def test_dashes_and_underscores_are_the_same(restr, tmp_path):
    for option in ("--output_dir", "--output-dir"):
        folder = tmp_path / option[-5:]
        assert (
            restr("segment", MODEL, PHOTO, "the dog", option, folder, "--num-threads", torch.get_num_threads()).code
            == 0
        )
        assert len(list(folder.iterdir())) == 2
