"""The example scripts as a user runs them: in processes of their own."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(script: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, EXAMPLES / script, *map(str, arguments)]
    return subprocess.run(command, check=False, cwd=cwd, capture_output=True, text=True, timeout=600)


def test_segment_writes_masks_and_an_overlay(tmp_path):
    photo = EXAMPLES / "photos" / "shapes.jpg"
    sentences = ["the biggest blue thing", "the star on the right"]
    done = run("segment.py", photo, *sentences, "--output_dir", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == [
        "shapes_mask1_the-biggest-blue-thing.png",
        "shapes_mask2_the-star-on-the-right.png",
        "shapes_overlay.png",
    ]
    size = Image.open(photo).size
    masks = [np.asarray(Image.open(tmp_path / "out" / name)) for name in files[:2]]
    for mask, sentence in zip(masks, sentences):
        assert mask.shape == size[::-1] and set(np.unique(mask)) <= {0, 255}
        line = next(line for line in done.stdout.splitlines() if sentence in line)
        assert f"{(mask > 0).mean():.1%}" in line  # the printed share
    overlay = np.asarray(Image.open(tmp_path / "out" / files[2]))
    assert overlay.shape[0] > size[1] and overlay.shape[1] == size[0]  # the legend is below
    changed = (overlay[: size[1]] != np.asarray(Image.open(photo).convert("RGB"))).any(axis=2)
    assert changed[(masks[0] > 0) | (masks[1] > 0)].all()


def test_segment_shows_the_photo_as_the_model_sees_it(tmp_path):
    """A 16-bit picture is scaled, not clipped, in the overlay, too."""
    ramp = np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    done = run("segment.py", "ramp.png", "the ring", "--threshold", 0.999999, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    overlay = np.asarray(Image.open(tmp_path / "ramp_overlay.png"))[:48].astype(int)
    untouched = np.asarray(Image.open(next(tmp_path.glob("*mask1*")))) == 0
    assert untouched.all()
    assert np.abs(overlay - ramp[..., None] / 257).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("absent.jpg", "the dog"), "absent.jpg"),
        ((__file__, "the dog"), "cannot identify image"),
        ((EXAMPLES / "photos" / "shapes.jpg", "  "), "sentence"),
    ],
)
def test_segment_explains_bad_input(tmp_path, arguments, message):
    done = run("segment.py", *arguments, cwd=tmp_path)
    assert done.returncode != 0
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_training_on_drawn_scenes_resumes_and_ends_in_a_folder_that_loads(tmp_path):
    options = ["--output_dir", "run", "--image_size", 64, "--hidden_size", 24, "--text_hidden_size", 16]
    options += ["--num_hidden_layers", 1, "--text_num_hidden_layers", 1, "--num_fusion_layers", 1]
    options += ["--per_device_train_batch_size", 2, "--num_evaluation_scenes", 3, "--eval_steps", 4]
    options += ["--save_steps", 2, "--logging_steps", 1, "--warmup_steps", 1, "--decay_steps", 2]
    options += ["--pretraining_steps", 2, "--pretraining_batch_size", 2]
    first = run("train_drawn_scenes.py", *options, "--max_steps", 2, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    second = run("train_drawn_scenes.py", *options, "--max_steps", 4, cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    steps = [entry["step"] for entry in json.loads((tmp_path / "run/trainer_state.json").read_text())["log_history"]]
    assert max(steps) == 4
    assert "'epoch': '0.25'" not in second.stdout  # it did not begin again
    evaluated = run(
        "evaluate_drawn_scenes.py", "run/model", "--num_scenes", 3, "--output", "results.json", cwd=tmp_path
    )
    assert evaluated.returncode == 0, evaluated.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["results"]["all"]["sentences"] == 24
