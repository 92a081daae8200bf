"""The commands and code of docs/data.md, run in their order on small data in the folders that the page names."""

import contextlib
import io
import json
import re
import runpy
import shlex
from pathlib import Path

import pytest
from annotated_images import TWO_BOXES, read_rows, write_photo
from data_layouts import SIZE, SPLITS, write_coco, write_grefcoco, write_hub_copy, write_refer, write_referit
from hub_server import serve

from modeling_restr.data.canonical import FEATURES


PAGE = (Path(__file__).resolve().parents[1] / "docs" / "data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, flags=re.DOTALL)


def write_inputs(folder: Path) -> None:
    images = folder / "coco" / "train2014"
    write_refer(folder / "refer" / "data" / "refcoco", images)
    write_refer(folder / "refer" / "data" / "refcocog", images, {"val": [40], "test": [41]}, split_by="umd")
    write_grefcoco(folder / "grefcoco", images)
    write_referit(folder / "referit")
    write_hub_copy(folder / "jxu124" / "refcocoplus", images)
    write_coco(folder / "instances.json", folder / "photos")
    for name in ("a.jpg", "b.jpg"):
        write_photo(folder / "my" / "photos" / name, 1, SIZE)
    lines = [f'{name},the box,"{json.dumps(TWO_BOXES[0])}"' for name in ("a.jpg", "b.jpg")]
    (folder / "my" / "sentences.csv").write_text("\n".join(["image,sentence,polygon", *lines]))
    (folder / "glove.840B.300d.txt").write_text("two 0.5 1\nthe 2 3\n")


@pytest.fixture
def followed(restr, tmp_path, monkeypatch, own_cache):
    """The folder, the Hub and the output after all commands and code of the page have run."""
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path)
    printed, names = [], {}
    with serve() as hub:
        hub.connect(tmp_path / "home", monkeypatch)
        for language, text in BLOCKS:
            if language == "bash":
                for command in text.strip().split("\n"):
                    program, *words = shlex.split(command)
                    assert program == "restr"
                    done = restr(*words)
                    assert done.code == 0, done.err
                    printed.append(done.out)
            else:
                assert language == "python"
                (tmp_path / "snippet.py").write_text(text)
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    names = runpy.run_path("snippet.py", init_globals=names)
                printed.append(out.getvalue())
    return tmp_path, hub, "\n".join(printed)


def test_the_page_prepares_loads_and_shares_data(followed):
    folder, hub, printed = followed
    splits = {
        "refcoco": set(SPLITS),
        "refcocog": {"val", "test"},
        "grefcoco": set(SPLITS),
        "referit": {"train", "val", "test"},
        "refcocoplus": set(SPLITS),
        "both": {"train"} | {f"{name}_{split}" for name in ("refcoco", "refcocoplus") for split in SPLITS} - {
            "refcoco_train", "refcocoplus_train"
        },
        "generated": {"train", "val"},
        "mine": {"train", "val"},
    }  # fmt: skip
    for name, expected in splits.items():
        files = (folder / "data" / name / "data").iterdir()
        assert {path.name.rpartition("-00000-of-")[0] for path in files} == expected
        assert read_rows(folder / "data" / name, min(expected), folder / "cache")
    assert "(50, 40) 180 ['two', 'boxes']" in printed  # what loading shows
    assert "the cup" in printed and "1 of 2 words have a vector (50.0%)" in printed
    repository = hub.repositories["dataset", "you/refcoco"]
    assert repository.private and {"README.md", "preparation.json"} < repository.files().keys()


def test_the_page_names_every_source_and_field(restr):
    sources = re.findall(r"^\| `(\w+)` \| ", PAGE.partition("### ")[0], flags=re.MULTILINE)
    listed = re.findall(r"^│ (\w+) ", restr("prepare", "--help").out.partition("Commands")[2], flags=re.MULTILINE)
    assert sources == listed
    rows = PAGE.partition("\n## Rows\n")[2].partition("\n## ")[0]
    fields = {name for line in rows.split("\n") for name in re.findall(r"`(\w+)`", line.partition(" | ")[0])}
    assert fields == {*FEATURES, *FEATURES["references"].feature}
