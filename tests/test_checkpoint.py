"""The checkpoint that ships with the examples still does what the README says of it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageSegmentation, AutoProcessor, pipeline

from modeling_restr.data.drawn_scenes import DrawnScenes, kind_needs_context


CHECKPOINT = Path(__file__).resolve().parents[1] / "examples" / "checkpoint"
# Scenes that neither the training nor its evaluation drew, on drawn backgrounds.
SCENES = DrawnScenes(num_scenes=60, seed=77, image_size=96)


@pytest.fixture(scope="module")
def ious() -> dict[str, np.ndarray]:
    """IoU of each sentence's mask at the scene's own size, and with the sentences of the next scene instead."""
    model = AutoModelForImageSegmentation.from_pretrained(CHECKPOINT).eval()
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    found: dict[str, list] = {"own": [], "other": [], "needs_context": []}
    for index in range(len(SCENES)):
        scene, other = SCENES[index], SCENES[(index + 1) % len(SCENES)]
        texts = [expression.text for expression in (*scene.expressions, *other.expressions)]
        inputs = processor(images=scene.image, text=texts, return_tensors="pt")
        sizes = inputs.pop("original_sizes")[inputs["image_indices"]]
        with torch.inference_mode():
            results = processor.post_process_referring_segmentation(model(**inputs), sizes)
        targets = [scene.masks[expression.target] for expression in scene.expressions]
        overlaps = [
            (result["mask"].numpy() & target).sum() / (result["mask"].numpy() | target).sum()
            for result, target in zip(results, targets * 2)
        ]
        found["own"] += overlaps[: len(targets)]
        found["other"] += overlaps[len(targets) :]
        found["needs_context"] += [kind_needs_context(expression.kind) for expression in scene.expressions]
    return {name: np.array(values) for name, values in found.items()}


def test_it_finds_what_sentences_name(ious):
    assert ious["own"].mean() > 0.75
    assert ious["own"][ious["needs_context"]].mean() > 0.60


def test_the_words_matter(ious):
    assert ious["other"].mean() < 0.20


def test_it_is_small_enough_to_ship_and_stored_in_half_precision():
    weights = CHECKPOINT / "model.safetensors"
    assert weights.stat().st_size < 30 * 2**20
    header = weights.read_bytes()[:200]
    assert b'"F16"' in header


def test_pipeline_on_a_photograph():
    pipe = pipeline("referring-image-segmentation", model=str(CHECKPOINT))
    photo = CHECKPOINT.parent / "photos" / "school_bus.jpg"
    results = pipe(str(photo), text=["the yellow thing", "the black circle"])
    assert [result["label"] for result in results] == ["the yellow thing", "the black circle"]
    assert all(result["mask"].size == (352, 235) for result in results)
