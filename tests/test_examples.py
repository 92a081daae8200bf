"""The example scripts as a user runs them: in processes of their own."""

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
    photo = EXAMPLES / "photos" / "held_out" / "000000173350.jpg"
    sentences = ["the upper dog", "the lower dog"]
    done = run("segment.py", photo, *sentences, "--output_dir", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == [
        "000000173350_mask1_the-upper-dog.png",
        "000000173350_mask2_the-lower-dog.png",
        "000000173350_overlay.png",
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


def test_segment_names_the_words_that_are_lost(tmp_path):
    photo, long = EXAMPLES / "photos" / "clock.jpg", "the " * 19 + "clock quux"
    done = run("segment.py", photo, "the xyzzy clock", long, "the clock", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (warning,) = (line for line in done.stderr.splitlines() if "xyzzy" in line)
    assert "'xyzzy'" in warning and "'quux'" in warning and "'clock'" not in warning


def test_segment_shows_the_photo_as_the_model_sees_it(tmp_path):
    """A 16-bit picture is scaled, not clipped, in the overlay, too."""
    ramp = np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    done = run("segment.py", "ramp.png", "the dog", "--threshold", 0.999999, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    overlay = np.asarray(Image.open(tmp_path / "ramp_overlay.png"))[:48].astype(int)
    untouched = np.asarray(Image.open(next(tmp_path.glob("*mask1*")))) == 0
    assert untouched.all()
    assert np.abs(overlay - ramp[..., None] / 257).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("absent.jpg", "the dog"), "absent.jpg"),
        ((__file__, "the dog"), "test_examples.py' cannot be read: "),
        ((EXAMPLES / "photos" / "held_out" / "000000173350.jpg", "  "), "sentence"),
    ],
)
def test_segment_explains_bad_input(tmp_path, arguments, message):
    done = run("segment.py", *arguments, cwd=tmp_path)
    assert done.returncode != 0
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
