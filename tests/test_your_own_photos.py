"""All commands and snippets of docs/your_own_photos.md in their order, with few photos and steps."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from modeling_restr import ReSTRProcessor
from modeling_restr.data import decode_mask, load_prepared, read_sentences


pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = (REPOSITORY / "docs" / "your_own_photos.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, flags=re.DOTALL)
STEPS, FEWER_STEPS = "--max_steps 60", "--max_steps 2"
# Everything runs in one process, since importing torch takes longest.
RUN = """
import runpy, sys

def run(program, *words):
    sys.argv = [program, *words] if program == "restr" else list(words)
    try:
        if program == "restr":
            runpy.run_module("modeling_restr.cli", run_name="__main__")
        else:
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as stopped:
        assert not stopped.code, stopped.code

"""


def write_photos(folder: Path) -> None:
    """The lines of the page, and more with a word that no model knows. Each is about a different rectangle."""
    (example,) = (text for language, text in BLOCKS if language == "csv")
    more = [f"car_{n:02d}.jpg,the {word},masks/{n}.png,train" for n, word in enumerate(["zorblax", "wheel"] * 2, 3)]
    lines = [*example.strip().split("\n"), *more]
    (folder / "photos").mkdir(parents=True)
    (folder / "masks").mkdir()
    (folder / "sentences.csv").write_text("\n".join(lines), encoding="utf-8")
    rng = np.random.default_rng(0)
    for line in lines[1:]:
        photo, _, mask, _ = line.split(",")
        inside = np.zeros((60, 80), dtype=bool)
        top, left = rng.integers(0, 30, 2)
        inside[top : top + 25, left : left + 40] = True
        pixels = rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(np.where(inside[..., None], 200, pixels)).save(folder / "photos" / photo)
        Image.fromarray(inside).save(folder / mask)
    write_instances(folder / "instances.json", {1: "car_01.jpg", 9: "car_02.jpg"})  # 9 is in val
    (folder / "questions.csv").write_text("image,sentence\ncar_01.jpg,the zorblax\ncar_02.jpg,the hood\n")


def write_instances(path: Path, images: dict[int, str]) -> None:
    instance = {"category_id": 1, "bbox": [5, 5, 30, 20], "area": 600, "iscrowd": 0, "caption": "the left headlamp"}
    outline = [[5, 5, 35, 5, 35, 25, 5, 25]]
    content = {
        "images": [{"id": number, "file_name": name, "height": 60, "width": 80} for number, name in images.items()],
        "annotations": [{**instance, "id": n, "image_id": n, "segmentation": outline} for n in images],
        "categories": [{"id": 1, "name": "headlamp"}],
    }
    path.write_text(json.dumps(content))


def build_script() -> str:
    """The page as one Python script."""
    parts = [RUN]
    for language, text in BLOCKS:
        if language == "python":
            parts.append(text)
        elif language == "bash":
            for command in text.strip().split("\n"):
                parts.append(f"run(*{shlex.split(command)})\n")
    script = "".join(parts).replace(f"'{STEPS.split()[1]}'", f"'{FEWER_STEPS.split()[1]}'")
    return script.replace("'--captions', '--output-dir', 'data/mine'", "'--captions', '--output-dir', 'data/coco'")


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A folder in which the page's commands ran, and their output."""
    folder = tmp_path_factory.mktemp("page")
    write_photos(folder / "my")
    (folder / "examples").symlink_to(REPOSITORY / "examples")
    script = build_script()
    assert PAGE.count(STEPS) == 1 and FEWER_STEPS.split()[1] in script
    (folder / "page.py").write_text(script, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "page.py"]
    done = subprocess.run(
        command, check=False, cwd=folder, env=environment, capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder, done.stdout


def test_the_model_knows_the_new_words(ran):
    folder, printed = ran
    assert re.search(r"^new: \[.*'zorblax'\]$", printed, flags=re.MULTILINE)
    processor = ReSTRProcessor.from_pretrained(folder / "runs" / "mine" / "training" / "model")
    (lost,) = processor.find_lost_words(["the zorblax"])
    assert lost["unknown_words"] == []


def test_it_is_evaluated_before_and_after(ran):
    folder, _ = ran
    before, after = (
        json.loads((folder / "runs" / "mine" / when / "results.json").read_text()) for when in ("before", "after")
    )
    assert [len(results["expressions"]) for results in (before, after)] == [1, 1]
    assert before["metrics"] != after["metrics"]


def test_captions_of_an_annotation_tool_become_sentences(ran):
    folder, _ = ran
    (row,) = load_prepared(folder / "data" / "coco", "train")
    assert [expression["text"] for expression in row["references"][0]["expressions"]] == ["the left headlamp"]


def test_it_answers_questions(ran):
    folder, _ = ran
    for sentence in ("wheel on the right", "the windscreen"):
        assert Image.open(folder / f"{sentence}.png").size == (80, 60)
    masks = datasets.load_dataset(
        "parquet", data_dir=str(folder / "runs" / "mine" / "masks" / "data"), cache_dir=str(folder / "cache")
    )["train"]
    assert masks["text"][:] == ["the zorblax", "the hood"]
    assert decode_mask(masks[0]["mask"]).shape == (60, 80)


def test_the_page_names_every_column(ran):
    folder, _ = ran
    columns = re.findall(r"^\| `(\w+)` \|", PAGE, flags=re.MULTILINE)
    assert columns == ["image", "sentence", "mask", "polygon", "rle", "box", "split"]
    splits = read_sentences(folder / "my" / "sentences.csv", folder / "my" / "photos")
    assert {split: len(images) for split, images in splits.items()} == {"train": 5, "val": 1}
