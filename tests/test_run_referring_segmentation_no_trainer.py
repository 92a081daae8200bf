"""The training loop: equal to Trainer, free of waits for the device, evaluated, logged and launched by Accelerate."""

import importlib.util
import io
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from PIL import Image
from safetensors.torch import load_file
from tiny_training import make_dataset, make_model, make_processor
from training_runs import (
    EXAMPLES,
    LOOP,
    NUM_EXPRESSIONS,
    TRAINER,
    CountReads,
    LinearModel,
    assert_equal,
    measure_overall_iou,
    read_events,
    read_log,
    read_weights,
)

from modeling_restr.training.checkpoints import LossNotFiniteError, StopSignal, list_checkpoints
from modeling_restr.training.recipe import Recipe, create_parameter_groups


script = LOOP.module


def test_trainer_ends_with_the_same_weights(inputs, tmp_path):
    loop, trainer = tmp_path / "loop", tmp_path / "trainer"
    assert LOOP.run(loop, inputs, model="plain") == 0, read_log(loop)
    assert TRAINER.run(trainer, inputs, model="plain", optim="adamw_torch") == 0, read_log(trainer)
    assert_equal(loop, trainer)
    recipes = [(folder / "checkpoint-6" / "recipe.json").read_text() for folder in (loop, trainer)]
    assert recipes[0] == recipes[1]


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Trains a model in this process, with 8 steps of 2 batches. An optimizer that reads no value."""

    def train(model, **options):
        args = script.LoopArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            dataloader_num_workers=0,
            **options,
        )
        processor, recipe = make_processor(), Recipe(max_steps=8, images_per_step=4, max_grad_norm=1.0)
        model.config = make_model(processor).config
        data_args = script.DataArguments(dataset_name="squares")
        run = script.Run(args, data_args, recipe, model, processor, make_dataset(5), None, None, None)
        monkeypatch.setattr(script, "start_run", lambda *args, **fields: run)
        return script.train(script.ModelArguments(), data_args, args)

    monkeypatch.setattr(script, "create_optimizer", lambda model, _: torch.optim.SGD(create_parameter_groups(model)))
    monkeypatch.setattr(script, "finish_run", lambda *args: None)
    return train


def test_values_are_read_only_when_the_loop_logs_and_saves(train, monkeypatch):
    starts, ends, checks, saved = [], [], [], []
    compute_gradients, is_requested, islice = script.compute_gradients, StopSignal.is_requested, script.islice

    def note_start(*args):
        starts.append(count.number)
        return compute_gradients(*args)

    def note_end(*args):  # of the step before; the collator reads values, too, but no values on the device
        ends.append(count.number)
        return islice(*args)

    def note_check(signal):
        checks.append(len(starts))
        return is_requested(signal)

    monkeypatch.setattr(script, "compute_gradients", note_start)
    monkeypatch.setattr(script, "islice", note_end)
    monkeypatch.setattr(StopSignal, "is_requested", note_check)
    monkeypatch.setattr(script, "save_checkpoint", lambda *args: saved.append(args[-1]))
    with CountReads() as count:
        assert train(make_model(make_processor(), 0.5), logging_steps=3, save_steps=4)
    reads = np.subtract([*ends[1:], count.number], starts)
    assert (reads > 0).tolist() == [step in (3, 4, 6, 8) for step in range(1, 9)]
    assert (checks, saved) == ([3, 4, 6, 8], [4, 8])


def test_a_broken_loss_is_found_at_the_next_check_and_before_a_checkpoint(train, tmp_path):
    model = LinearModel()
    torch.nn.init.constant_(model.head.bias, float("inf"))
    with pytest.raises(LossNotFiniteError, match=r"in step 1\..*from step 1 to 4: image_ids \[(\d, ){15}\d\]"):
        train(model, logging_steps=100, save_steps=4)
    assert list_checkpoints(tmp_path) == []


def test_a_renamed_checkpoint_is_refused(inputs, tmp_path):
    assert LOOP.run(tmp_path / "run", inputs, max_steps=2) == 0, read_log(tmp_path / "run")
    renamed = (tmp_path / "run" / "checkpoint-2").rename(tmp_path / "run" / "checkpoint-1")
    assert LOOP.run(tmp_path / "other", inputs, max_steps=2, resume_from_checkpoint=renamed) == 1
    assert "Expected a checkpoint of step 1, as its name says" in read_log(tmp_path / "other")
    assert "Traceback" not in read_log(tmp_path / "other")


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_checkpoint_is_a_model(inputs, tmp_path, num_processes):
    options = {"model": "plain", "max_steps": 2, "per_device_train_batch_size": 4 // num_processes}
    codes = LOOP.run(tmp_path, inputs, num_processes=num_processes, **options)
    assert codes in (0, [0, 0]), read_log(tmp_path)
    saved, final = load_file(tmp_path / "checkpoint-2" / "model.safetensors"), read_weights(tmp_path)
    assert saved.keys() == final.keys() and all(torch.equal(saved[name], final[name]) for name in final)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_evaluation_is_logged_with_a_panel_and_ends_in_a_folder_with_a_card(inputs, tmp_path, num_processes):
    options = {"validation_split": "val", "eval_steps": 4, "num_overlays": 3, "num_processes": num_processes}
    if importlib.util.find_spec("tensorboard"):
        options["report_to"] = "tensorboard"
    assert LOOP.run(tmp_path, inputs, **options) in (0, [0, 0]), read_log(tmp_path)
    assert [path.name for path in (tmp_path / "overlays").iterdir()] == ["step-0000004.png"]
    metrics = json.loads((tmp_path / "evaluation.json").read_text())["metrics"]
    assert metrics["num_expressions"] == NUM_EXPRESSIONS
    assert metrics["overall_iou"] == pytest.approx(measure_overall_iou(tmp_path / "model"), abs=1e-6)
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"{100 * metrics['overall_iou']:.2f}" in card and "400000" in card

    pytest.importorskip("tensorboard", reason="needs `pip install tensorboard`")
    (recipe,) = (tmp_path / script.TRACKER_PROJECT).rglob("hparams.yml")
    assert yaml.safe_load(recipe.read_text())["max_steps"] == 6
    events = read_events(tmp_path / script.TRACKER_PROJECT)
    rates = [event.value for event in events.Scalars("train/learning_rate/vision")]
    assert len(events.Scalars("train/loss")) == len(rates) == 6 and rates[0] > 0 and rates[-1] == 0
    (evaluated,) = events.Scalars("eval/num_expressions")
    assert (evaluated.value, evaluated.step) == (NUM_EXPRESSIONS, 4)
    (panel,) = events.Images("eval/overlays")
    assert panel.step == 4
    with Image.open(tmp_path / "overlays" / "step-0000004.png") as image:
        np.testing.assert_array_equal(Image.open(io.BytesIO(panel.encoded_image_string)), image)


@pytest.mark.parametrize("path", sorted((EXAMPLES / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_launches_what_its_configurations_say(path, tmp_path):
    written = yaml.safe_load(path.read_text())
    read = load_config_from_file(str(path)).to_dict()
    assert {name: read[name] for name in written} == written
    (tmp_path / "script.py").write_text(
        "import json, os, sys\nopen(f'{sys.argv[1]}/{os.environ.get(\"RANK\", 0)}.json', 'w').write(json.dumps({**os.environ}))"
    )
    arguments = ["--config_file", str(path), "--main_process_port", "0", "--num_cpu_threads_per_process", "1"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *arguments, tmp_path / "script.py", tmp_path]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    environments = [json.loads(file.read_text()) for file in tmp_path.glob("*.json")]
    assert done.returncode == 0 and len(environments) == written["num_processes"]
    for environment in environments:
        assert environment["ACCELERATE_MIXED_PRECISION"] == written["mixed_precision"]
        for name, value in written.get("fsdp_config", {}).items():
            assert environment[name.upper()].lower() == str(value).lower()
