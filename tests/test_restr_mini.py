"""The checkpoint for photographs still does what its card says, on photographs that it has never seen."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import pipeline

import modeling_restr  # noqa: F401  (registers ReSTR with the Auto classes)
from modeling_restr.data.photo_expressions import express
from modeling_restr.data.photo_scenes import Photographs, PhotoScenes


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
CHECKPOINT, PHOTOS = EXAMPLES / "restr-mini", EXAMPLES / "photos" / "held_out"


@pytest.fixture(scope="module")
def ious() -> dict[str, np.ndarray]:
    """IoU of each sentence's mask, and with the sentences of the next photograph instead."""
    pipe = pipeline("referring-image-segmentation", model=str(CHECKPOINT))
    photographs = Photographs.load(PHOTOS / "instances.json", PHOTOS, held_out=True, progress=False)
    scenes = PhotoScenes(photographs, len(photographs), 352, augment=False)
    said = [express(scenes[index], np.random.default_rng(index), 10) for index in range(len(scenes))]
    found: dict[str, list] = {"own": [], "other": []}
    for index, expressions in enumerate(said):
        texts = [expression.text for expression in expressions]
        others = [expression.text for expression in said[(index + 1) % len(said)]]
        results = pipe(
            Image.fromarray(scenes[index].image), text=texts + [others[n % len(others)] for n in range(len(texts))]
        )
        masks = [np.asarray(result["mask"]) > 0 for result in results]
        targets = [scenes[index].masks[expression.target] for expression in expressions]
        overlaps = [(mask & target).sum() / (mask | target).sum() for mask, target in zip(masks, targets * 2)]
        found["own"] += overlaps[: len(texts)]
        found["other"] += overlaps[len(texts) :]
    return {name: np.array(values) for name, values in found.items()}


def test_it_finds_what_sentences_name_in_photographs(ious):
    assert len(ious["own"]) > 80
    assert ious["own"].mean() > 0.25


def test_the_words_matter(ious):
    assert ious["other"].mean() < 2 / 3 * ious["own"].mean()


def test_it_is_small_enough_to_ship():
    weights = CHECKPOINT / "model.safetensors"
    assert weights.stat().st_size < 40 * 10**6
    assert b'"F16"' in weights.read_bytes()[:400]
