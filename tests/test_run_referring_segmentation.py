"""The training script with Trainer: from a pretrained ViT to a model, and Trainer's own options."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_training import IMAGE_SIZE
from training_runs import (
    NUM_EXPRESSIONS,
    TRAINER,
    make_inputs,
    measure_overall_iou,
    read_log,
    read_weights,
)
from transformers import ViTConfig, ViTModel

from modeling_restr import ReSTRForImageSegmentation, ReSTRProcessor
from modeling_restr.training.checkpoints import list_checkpoints


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def test_from_a_vit_and_word_vectors_to_a_folder_that_pipeline_loads(inputs, tmp_path):
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=48, patch_size=8
    )
    ViTModel(config).save_pretrained(tmp_path / "vit")
    vectors = np.random.default_rng(0).normal(size=(3, 6))
    lines = [f"{word} {' '.join(f'{x:.4f}' for x in row)}" for word, row in zip(("red", "green", "thing"), vectors)]
    (tmp_path / "vectors.txt").write_text("\n".join(lines))
    options = {"model_name_or_path": None, "vision_model_name_or_path": tmp_path / "vit"}
    options |= {"word_vectors": tmp_path / "vectors.txt", "image_size": IMAGE_SIZE, "max_words": 5}
    options |= {"validation_split": "val", "eval_steps": 4, "learning_rate": 1e-5}
    assert TRAINER.run(tmp_path / "run", inputs, **options) == 0, read_log(tmp_path / "run")
    folder = tmp_path / "run" / "model"
    metrics = json.loads((tmp_path / "run" / "evaluation.json").read_text())["metrics"]
    assert metrics["overall_iou"] == pytest.approx(measure_overall_iou(folder), abs=1e-6)
    assert metrics["num_expressions"] == NUM_EXPRESSIONS
    model = ReSTRForImageSegmentation.from_pretrained(folder)
    config = model.config
    assert (config.vision_config.image_size, config.text_config.max_position_embeddings) == (IMAGE_SIZE, 5)
    assert (config.patch_loss_weight, config.vision_config.drop_path_rate) == (0.1, 0.1)
    words = ReSTRProcessor.from_pretrained(folder).tokenizer.get_vocab()
    embeddings = model.get_input_embeddings().weight[[words["red"], words["thing"]]].detach().numpy()
    np.testing.assert_allclose(embeddings, vectors[[0, 2]], atol=1e-3)  # they are trained, too
    card = (folder / "README.md").read_text()
    assert f"| {100 * metrics['overall_iou']:.2f} |" in card
    assert "| `max_steps` | 6 (the paper: 400000) |" in card and "| `learning_rate` | 1e-05 |" in card
    panels = sorted(path.name for path in (tmp_path / "run" / "overlays").iterdir())
    assert panels == ["step-0000004.png", "step-0000006.png"]
    assert "eval_overall_iou" in read_log(tmp_path / "run")


def test_the_best_checkpoint_is_kept_and_becomes_the_model(inputs, tmp_path):
    options = {"validation_split": "val", "eval_steps": 2, "save_total_limit": 1}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "overall_iou", "greater_is_better": True}
    assert TRAINER.run(tmp_path, inputs, **options) == 0, read_log(tmp_path)
    state = json.loads((list_checkpoints(tmp_path)[-1] / "trainer_state.json").read_text())
    scores = {entry["step"]: entry["eval_overall_iou"] for entry in state["log_history"] if "eval_loss" in entry}
    best = tmp_path / f"checkpoint-{max(scores, key=scores.get)}"
    assert state["best_model_checkpoint"] == str(best) and best in list_checkpoints(tmp_path)
    kept = load_file(best / "model.safetensors")
    assert all(torch.equal(tensor, kept[name]) for name, tensor in read_weights(tmp_path).items())
