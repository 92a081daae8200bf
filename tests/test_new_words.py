"""The snippets of docs/new_words.md."""

import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_restr import ReSTRForImageSegmentation, ReSTRPipeline, ReSTRProcessor
from modeling_restr.hub import save_bundle


REPOSITORY = Path(__file__).resolve().parents[1]
MINI = REPOSITORY / "examples" / "restr_mini"
BLOCKS = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / "new_words.md").read_text(), flags=re.DOTALL)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Variables after the page's code has run."""
    path = tmp_path_factory.mktemp("page") / "new_words.py"
    path.write_text("\n".join(BLOCKS), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        return runpy.run_path(str(path))


def test_new_words_are_learned_in_a_few_steps(ran):
    assert np.isfinite(ran["losses"]).all() and ran["losses"][-1] < 0.99 * ran["losses"][0]
    assert not torch.equal(ran["vectors"][ran["new"]], ran["vectors"][ran["known"]])


def test_new_words_are_known_after_saving_and_old_ones_keep_their_masks(ran, tmp_path):
    folder = save_bundle(ran["model"].eval(), ran["processor"], tmp_path / "model")
    pipes = [
        ReSTRPipeline(
            model=ReSTRForImageSegmentation.from_pretrained(path).eval(),
            processor=ReSTRProcessor.from_pretrained(path),
            device="cpu",
        )
        for path in (MINI, folder)
    ]
    photo = Image.open(REPOSITORY / "examples" / "photos" / "held_out" / "000000173350.jpg")
    before, after = (pipe(photo, text=["the dog on top", "the doggo on top"]) for pipe in pipes)
    assert [result["unknown_words"] for result in before + after] == [[], ["doggo"], [], []]
    assert before[0]["mask"] == after[0]["mask"]
    masks = [np.asarray(result["mask"]) > 0 for result in (before[0], before[1], after[1])]
    known, unknown, learned = masks
    assert (learned & known).sum() / (learned | known).sum() > (unknown & known).sum() / (unknown | known).sum()


def test_the_shipped_tokenizer_drops_punctuation():
    processor = ReSTRProcessor.from_pretrained(MINI)
    sentences = ["the dog!", "guy's hat", "t-shirt", "the man, left", "\u201cblue\u201d car \u2013 left..."]
    assert processor.find_lost_words(sentences) == [{"unknown_words": [], "cut_words": []}] * len(sentences)
