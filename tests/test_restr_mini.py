"""The shipped checkpoint on the shipped photographs: as its evaluation says, however one asks."""

import json
from pathlib import Path

import evaluation
import pytest
from scenes import Photographs
from transformers import AutoModelForImageSegmentation, AutoProcessor

import modeling_restr  # noqa: F401  (registers ReSTR with the Auto classes)


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
MODEL = EXAMPLES / "restr_mini"
FIRST_EXAMPLE = 1  # the number in wordings.json of what README's first sentence asks for


@pytest.fixture(scope="module")
def recorded() -> dict:
    return json.loads((MODEL / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def wordings() -> dict:
    model, processor = (
        AutoModelForImageSegmentation.from_pretrained(MODEL).eval(),
        AutoProcessor.from_pretrained(MODEL),
    )
    photographs = Photographs.load([EXAMPLES / "photos" / "held_out"], "test", progress=False)
    return evaluation.evaluate_wordings(model, processor, photographs, evaluation.WORDINGS)


def test_wordings_are_answered_as_recorded(wordings, recorded):
    for name in ("on_the_right_one", "precision@0.5", "mean_iou"):
        assert wordings[name] == pytest.approx(recorded["wordings"][name], abs=1.0)
    assert wordings["on_the_right_one"] >= 80


def test_the_first_example_survives_all_its_wordings(wordings):
    thing = wordings["things"][FIRST_EXAMPLE]
    assert len(thing["iou"]) == 8 and min(thing["iou"].values()) >= 0.5
    readme = (EXAMPLES.parent / "README.md").read_text()
    first = readme[readme.index('"the') + 1 :].split('"')[0]
    assert first.removeprefix("the ") in {wording.removeprefix("the ") for wording in thing["iou"]}


def test_the_card_shows_its_evaluation(recorded):
    card = (MODEL / "README.md").read_text()
    assert evaluation.format_table(recorded["results"]) in card
    for part, names in {
        "among_several": ["right", "chance"],
        "absent": ["with_a_mask", "auroc_of_the_score", "score_threshold", "absent_below_it", "present_from_it"],
        "unheard_names": ["mean_iou"],
        "wordings": ["on_the_right_one", "precision@0.5", "mean_iou"],
    }.items():
        assert all(str(recorded[part][name]) in card for name in names), part


def test_it_is_small_enough_to_ship():
    weights = MODEL / "model.safetensors"
    assert weights.stat().st_size < 60 * 10**6
    header = weights.read_bytes()[:100_000]
    assert b'"F16"' in header and b'"F32"' not in header.split(b"}}")[0]
