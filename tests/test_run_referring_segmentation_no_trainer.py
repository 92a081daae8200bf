"""The training loop on tiny data: the same weights as with Trainer, however it is spread and wherever it is stopped."""

import importlib.util
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from hub_server import TOKEN, USER, serve
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file
from tiny_training import make_dataset, make_model, make_processor
from training_runs import (
    EXAMPLES,
    MOMENTS,
    CountReads,
    LinearModel,
    assert_close,
    assert_equal,
    kill_in_the_middle_of,
    load_script,
    make_inputs,
    read_events,
    read_log,
    read_weights,
    replace_file,
    run as run_script,
    shard_on_cpus,
    signal_when,
    spoil_a_batch,
)
from transformers import pipeline

from modeling_restr.data.canonical import decode_mask
from modeling_restr.training.checkpoints import LossNotFiniteError, get_step, list_checkpoints
from modeling_restr.training.recipe import Recipe, create_parameter_groups


script = load_script("run_referring_segmentation_no_trainer")
OPTIONS = {
    "max_steps": 6,
    "save_steps": 2,
    "logging_steps": 1,
    "validation_split": "",
    "per_device_train_batch_size": 4,
    "expressions_per_image": 3,
    "learning_rate": 1e-2,
    "dataloader_num_workers": 0,
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def run(output_dir, inputs, before=None, num_processes=1, model="drop_path", **options):
    options = {"dataset_name": inputs, "model_name_or_path": inputs / model, **OPTIONS, **options}
    return run_script(script, output_dir, before, num_processes, **options)


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("undisturbed")
    assert run(output_dir, inputs) == 0, read_log(output_dir)
    return output_dir


def test_trainer_ends_in_the_same_weights(inputs, tmp_path):
    loop, trainer = tmp_path / "loop", tmp_path / "trainer"
    assert run(loop, inputs, model="plain") == 0, read_log(loop)
    options = {"eval_strategy": "no", "optim": "adamw_torch", "disable_tqdm": True}
    options |= {"dataset_name": inputs, "model_name_or_path": inputs / "plain", **OPTIONS}
    assert run_script(load_script("run_referring_segmentation"), trainer, **options) == 0, read_log(trainer)
    assert_equal(loop, trainer)
    recipes = [(folder / "checkpoint-6" / "recipe.json").read_text() for folder in (loop, trainer)]
    assert recipes[0] == recipes[1]


@pytest.mark.parametrize("moment", [*MOMENTS, "optimizer.bin", "random_states_0.pkl"])
def test_a_run_that_was_killed_ends_in_the_same_weights(inputs, undisturbed, tmp_path, moment):
    def before():
        if moment in MOMENTS:
            signal_when(moment, signal.SIGKILL)
        else:
            kill_in_the_middle_of(moment)

    assert run(tmp_path, inputs, before) == -signal.SIGKILL
    assert not (tmp_path / "model").exists()
    left = [get_step(path) for path in list_checkpoints(tmp_path)]
    assert run(tmp_path, inputs) == 0, read_log(tmp_path)
    assert_equal(tmp_path, undisturbed)
    if moment not in MOMENTS:
        assert left == [2] and (tmp_path / "checkpoint-6").exists()


def test_sigterm_saves_and_exits_with_143(inputs, undisturbed, tmp_path):
    stop = partial(signal_when, "the first checkpoint is begun", signal.SIGTERM)
    assert run(tmp_path, inputs, stop, dataloader_num_workers=1) == 143
    left = [get_step(path) for path in list_checkpoints(tmp_path)]
    assert left == [2, 3] and not (tmp_path / "model").exists()  # it came while 2 was written
    assert run(tmp_path, inputs) == 0, read_log(tmp_path)
    assert_equal(tmp_path, undisturbed)


def test_a_stream_that_was_killed_ends_in_the_same_weights(inputs, tmp_path):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    options = {"streaming": True, "dataloader_num_workers": 1, "shuffle_buffer_size": 4}
    assert run(whole, inputs, **options) == 0, read_log(whole)
    assert run(torn, inputs, lambda: kill_in_the_middle_of("optimizer.bin"), **options) == -signal.SIGKILL
    assert [get_step(path) for path in list_checkpoints(torn)] == [2]
    assert run(torn, inputs, **options) == 0, read_log(torn)
    assert_equal(whole, torn)


def test_evaluation_and_checkpoints_do_not_change_the_course(inputs, undisturbed, tmp_path):
    options = {"validation_split": "val", "eval_steps": 1, "save_steps": 5, "dataloader_num_workers": 1}
    assert run(tmp_path, inputs, **options) == 0, read_log(tmp_path)
    assert_equal(tmp_path, undisturbed)


def test_recomputed_activations_give_the_same_weights(inputs, undisturbed, tmp_path):
    assert run(tmp_path, inputs, gradient_checkpointing=True) == 0, read_log(tmp_path)
    assert_equal(tmp_path, undisturbed)


def use_sgd():
    """Adam would blow up the noise of gradients that are zero."""

    def create_optimizer(model, recipe):
        return torch.optim.SGD(create_parameter_groups(model, recipe.learning_rate), lr=recipe.learning_rate)

    script.create_optimizer = create_optimizer


@pytest.fixture(scope="module")
def large_batch(inputs, tmp_path_factory):
    """Without drop path, which differs between batches and processes."""
    output_dir = tmp_path_factory.mktemp("large_batch")
    assert run(output_dir, inputs, use_sgd, model="plain", max_grad_norm=0.1) == 0, read_log(output_dir)
    return output_dir


@pytest.mark.numerics
@pytest.mark.parametrize("num_processes", [1, 2])
def test_accumulated_batches_of_all_processes_are_one_large_batch(inputs, large_batch, tmp_path, num_processes):
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4 // num_processes}
    options |= {"model": "plain", "max_grad_norm": 0.1, "num_processes": num_processes}
    codes = run(tmp_path, inputs, use_sgd, **options)
    assert codes in (0, [0, 0]), read_log(tmp_path)
    assert_close(tmp_path, large_batch, inputs / "plain")


@pytest.mark.parametrize("streaming", [False, True])
def test_two_processes_go_on_where_one_of_them_was_killed(inputs, tmp_path, streaming):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    options = {"num_processes": 2, "per_device_train_batch_size": 2, "validation_split": "val", "eval_steps": 3}
    options |= {"streaming": streaming}
    assert run(whole, inputs, **options) == [0, 0], read_log(whole)

    def before():
        if os.environ["RANK"] == "0":
            signal_when("the second checkpoint is moved", signal.SIGKILL)

    codes = run(torn, inputs, before, **options)
    assert codes[0] == -signal.SIGKILL and codes[1] != 0
    assert run(torn, inputs, **options) == [0, 0], read_log(torn)
    assert_equal(whole, torn)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_batch(inputs, tmp_path):
    assert run(tmp_path, inputs, learning_rate=1e30, save_steps=1, warmup_steps=2) == 1
    assert "LossNotFiniteError" in read_log(tmp_path) and "image_ids [" in read_log(tmp_path)
    last = list_checkpoints(tmp_path)[-1]
    assert all(tensor.isfinite().all() for tensor in load_file(last / "model.safetensors").values())
    assert not (tmp_path / "model").exists()


@pytest.fixture
def make_run(tmp_path, monkeypatch):
    """A run of a model that reads no value, of 8 steps of 2 batches."""

    def make(model, **options):
        args = script.LoopArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            dataloader_num_workers=0,
            **options,
        )
        model.config = make_model(make_processor()).config
        recipe = Recipe(max_steps=8, images_per_step=4, max_grad_norm=1.0)
        data_args = script.DataArguments(dataset_name="squares")
        return script.prepare_run(args, data_args, recipe, script.create_accelerator(args), model, make_processor())

    monkeypatch.setattr(script, "create_optimizer", lambda model, _: torch.optim.SGD(create_parameter_groups(model)))
    return make


def test_values_are_read_when_the_loop_logs_and_saves_only(make_run, monkeypatch):
    steps, looks, saved = [], [], []
    take_step, is_stop_requested = script.take_step, script.is_stop_requested

    def take_counted_step(run, batches, step):
        with CountReads() as count:
            loss = take_step(run, batches, step)
        steps.append(count.number)
        return loss

    def look(run, stop):
        looks.append(len(steps))
        return is_stop_requested(run, stop)

    monkeypatch.setattr(script, "take_step", take_counted_step)
    monkeypatch.setattr(script, "is_stop_requested", look)
    monkeypatch.setattr(script, "save_checkpoint", lambda run, step: saved.append(step))
    assert script.run_steps(
        make_run(make_model(make_processor(), 0.5), logging_steps=3, save_steps=4), make_dataset(5), None, 0
    )
    assert (steps, looks, saved) == ([0] * 8, [3, 4, 6, 8], [4, 8])


def test_a_broken_loss_is_found_at_the_next_look_and_before_a_checkpoint(make_run, tmp_path):
    model = LinearModel()
    torch.nn.init.constant_(model.head.bias, float("inf"))
    with pytest.raises(LossNotFiniteError, match=r"in step 1\..*from step 1 to 4: image_ids \[(\d, ){15}\d\]"):
        script.run_steps(make_run(model, logging_steps=100, save_steps=4), make_dataset(5), None, 0)
    assert list_checkpoints(tmp_path) == []


def test_all_processes_stop_at_a_loss_of_one_that_is_not_finite(inputs, tmp_path):
    options = {"num_processes": 2, "per_device_train_batch_size": 2, "logging_steps": 3, "save_steps": 5}
    assert run(tmp_path, inputs, lambda: spoil_a_batch(1, 1), **options) == [1, 1], read_log(tmp_path)
    for rank in (0, 1):
        assert "in step 2 of process 1" in read_log(tmp_path, rank) and "from step 1 to 3" in read_log(tmp_path, rank)
    assert list_checkpoints(tmp_path) == []


def test_a_run_is_resumed_on_its_own_data_only(inputs, undisturbed, tmp_path):
    moved, other = tmp_path / "moved", tmp_path / "other" / inputs.name
    shutil.copytree(inputs, moved)
    other.mkdir(parents=True)
    make_inputs(other, seed=1)
    shutil.copytree(undisturbed / "checkpoint-4", tmp_path / "run" / "checkpoint-4")
    start = {"model_name_or_path": inputs / "drop_path"}
    assert run(tmp_path / "run", other, **start) == 1
    assert "data_fingerprint: " in read_log(tmp_path / "run") and "Traceback" not in read_log(tmp_path / "run")
    assert run(tmp_path / "run", moved, **start) == 0, read_log(tmp_path / "run")
    assert_equal(tmp_path / "run", undisturbed)


def test_a_run_of_an_earlier_version_is_resumed(inputs, undisturbed, tmp_path):
    shutil.copytree(undisturbed / "checkpoint-4", tmp_path / "checkpoint-4")
    path = tmp_path / "checkpoint-4" / "recipe.json"
    recipe = json.loads(path.read_text())
    assert recipe.pop("data_fingerprint")
    replace_file(path, json.dumps(recipe).encode())
    assert run(tmp_path, inputs) == 0, read_log(tmp_path)
    assert_equal(tmp_path, undisturbed)
    assert "no fingerprint was taken" in read_log(tmp_path)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl", "recipe.json"]
)
def test_damaged_files_of_a_checkpoint_are_said(inputs, undisturbed, tmp_path, name):
    checkpoint = tmp_path / "checkpoint-4"
    shutil.copytree(undisturbed / "checkpoint-4", checkpoint)
    content = (checkpoint / name).read_bytes()
    replace_file(checkpoint / name, b"null" if name.endswith(".json") else content[: len(content) // 2])
    assert run(tmp_path, inputs) == 1
    assert "Error: Expected" in read_log(tmp_path) and str(checkpoint) in read_log(tmp_path)
    assert "Traceback" not in read_log(tmp_path)


def test_a_run_is_not_resumed_with_another_recipe_or_by_another_script(inputs, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    assert run(tmp_path / "run", inputs, expressions_per_image=1) == 1
    assert "expressions_per_image: 3 there, 1 now" in read_log(tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint-6"
    (checkpoint / "trainer_state.json").touch()
    assert run(tmp_path / "other", inputs, resume_from_checkpoint=checkpoint) == 1
    assert "was written by run_referring_segmentation.py" in read_log(tmp_path / "other")
    (checkpoint / "trainer_state.json").unlink()
    checkpoint = checkpoint.rename(tmp_path / "run" / "checkpoint-5")
    assert run(tmp_path / "other", inputs, resume_from_checkpoint=checkpoint) == 1
    assert "Expected a checkpoint of step 5, as its name says" in read_log(tmp_path / "other")
    assert "Traceback" not in read_log(tmp_path / "run") + read_log(tmp_path / "other")


def test_a_checkpoint_is_a_model_whether_of_one_process_or_of_two(inputs, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    options = {"model": "plain", "max_steps": 2}
    assert run(one, inputs, **options) == 0, read_log(one)
    assert run(two, inputs, num_processes=2, per_device_train_batch_size=2, **options) == [0, 0], read_log(two)
    for folder in (one, two):
        saved = load_file(folder / "checkpoint-2" / "model.safetensors")
        final = read_weights(folder)
        assert saved.keys() == final.keys() and all(torch.equal(saved[name], final[name]) for name in final)


def test_evaluation_is_logged_with_a_panel_and_ends_in_a_folder_with_a_card(inputs, tmp_path):
    options = {"validation_split": "val", "eval_steps": 4, "num_overlays": 3}
    if importlib.util.find_spec("tensorboard"):
        options["report_to"] = "tensorboard"
    assert run(tmp_path, inputs, **options) == 0, read_log(tmp_path)
    assert [path.name for path in (tmp_path / "overlays").iterdir()] == ["step-0000004.png"]
    metrics = json.loads((tmp_path / "evaluation.json").read_text())["metrics"]
    assert metrics["num_expressions"] == 11
    assert metrics["overall_iou"] == pytest.approx(measure_overall_iou(tmp_path / "model"), abs=1e-6)
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"{100 * metrics['overall_iou']:.2f}" in card and "400000" in card

    pytest.importorskip("tensorboard", reason="what is logged is read with `pip install tensorboard`")
    (recipe,) = (tmp_path / script.TRACKER_PROJECT).rglob("hparams.yml")
    assert yaml.safe_load(recipe.read_text())["max_steps"] == 6
    events = read_events(tmp_path / script.TRACKER_PROJECT)
    rates = [event.value for event in events.Scalars("train/learning_rate/vision")]
    assert len(events.Scalars("train/loss")) == len(rates) == 6 and rates[0] > 0 and rates[-1] == 0
    (evaluated,) = events.Scalars("eval/num_expressions")
    assert (evaluated.value, evaluated.step) == (11, 4)
    (panel,) = events.Images("eval/overlays")
    assert panel.step == 4
    with Image.open(tmp_path / "overlays" / "step-0000004.png") as image:
        np.testing.assert_array_equal(Image.open(io.BytesIO(panel.encoded_image_string)), image)


def measure_overall_iou(model):
    """With the pipeline, as anybody would."""
    pipe = pipeline("referring-image-segmentation", model=str(model))
    intersection = union = 0
    for row in make_dataset(5, seed=3):
        for reference in row["references"]:
            target = decode_mask(reference["mask"])
            texts = [expression["text"] for expression in reference["expressions"]]
            for result in pipe(row["image"], text=texts):
                predicted = np.asarray(result["mask"]) > 0
                intersection += (predicted & target).sum()
                union += (predicted | target).sum()
    return intersection / union


@pytest.mark.parametrize("path", sorted((EXAMPLES / "accelerate_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_launches_what_its_configurations_say(path, tmp_path):
    written = yaml.safe_load(path.read_text())
    read = load_config_from_file(str(path)).to_dict()
    assert {name: read[name] for name in written} == written
    (tmp_path / "script.py").write_text(
        "import json, os, sys\nopen(f'{sys.argv[1]}/{os.environ.get(\"RANK\", 0)}.json', 'w').write(json.dumps({**os.environ}))"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["--config_file", str(path), "--main_process_port", str(port), "--num_cpu_threads_per_process", "1"]

    command = [sys.executable, "-m", "accelerate.commands.launch", *arguments, tmp_path / "script.py", tmp_path]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    environments = [json.loads(file.read_text()) for file in tmp_path.glob("*.json")]
    assert done.returncode == 0 and len(environments) == written["num_processes"]
    for environment in environments:
        assert environment["ACCELERATE_MIXED_PRECISION"] == written["mixed_precision"]
        for name, value in written.get("fsdp_config", {}).items():
            assert environment[name.upper()].lower() == str(value).lower()


@pytest.mark.numerics
def test_sharded_over_two_processes_and_resumed_it_is_one_large_batch(inputs, large_batch, tmp_path):
    config = yaml.safe_load((EXAMPLES / "accelerate_configs" / "fsdp.yaml").read_text())["fsdp_config"]

    def before():
        use_sgd()
        shard_on_cpus()
        os.environ["ACCELERATE_USE_FSDP"] = "true"
        os.environ.update({name.upper(): str(value) for name, value in config.items()})

    def before_it_is_stopped():
        before()
        if os.environ["RANK"] == "0":
            signal_when("the first checkpoint is begun", signal.SIGTERM)

    options = {"model": "plain", "max_grad_norm": 0.1, "num_processes": 2, "per_device_train_batch_size": 2}
    assert run(tmp_path, inputs, before_it_is_stopped, **options) == [143, 143], read_log(tmp_path)
    assert run(tmp_path, inputs, before, **options) == [0, 0], read_log(tmp_path)
    assert len([*(tmp_path / "checkpoint-6" / "pytorch_model_fsdp_0").glob("*.distcp")]) == 2  # a part of each process
    assert_close(tmp_path, large_batch, inputs / "plain")


@pytest.mark.numerics
@pytest.mark.parametrize(("share", "options"), [(0.05, {"mixed_precision": "bf16"}), (1e-5, {"torch_compile": True})])
def test_other_ways_to_compute_stay_near(inputs, tmp_path, share, options):
    def before():
        use_sgd()
        compile_module = torch.nn.Module.compile
        torch.nn.Module.compile = lambda module: compile_module(module, backend="eager")  # no compiler in tests

    one, other = tmp_path / "one", tmp_path / "other"
    assert run(one, inputs, use_sgd, model="plain", max_steps=2) == 0, read_log(one)
    assert run(other, inputs, before, model="plain", max_steps=2, **options) == 0, read_log(other)
    assert_close(other, one, inputs / "plain", share)
    assert {tensor.dtype for tensor in read_weights(other).values()} == {torch.float32}
    recipe = json.loads((other / "checkpoint-2" / "recipe.json").read_text())
    assert recipe["precision"] == ("bfloat16" if "mixed_precision" in options else "float32")


def test_push_to_hub_uploads_the_model_with_its_card(inputs, tmp_path):
    with serve() as hub:

        def before():
            constants.ENDPOINT = hub.url
            constants.HUGGINGFACE_CO_URL_TEMPLATE = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
            constants.HF_HUB_DISABLE_XET = True

        options = {"push_to_hub": True, "hub_model_id": f"{USER}/restr-tiny", "hub_token": TOKEN, "max_steps": 2}
        assert run(tmp_path, inputs, before, **options) == 0, read_log(tmp_path)
        files = hub.repositories["model", f"{USER}/restr-tiny"].files("main")
    assert files["model.safetensors"] == (tmp_path / "model" / "model.safetensors").read_bytes()
    assert {"config.json", "processor_config.json", "pipeline_restr.py", "tokenizer.json"} <= files.keys()
    assert f"{USER}/restr-tiny" in files["README.md"].decode() and "400000" in files["README.md"].decode()


def test_help_names_the_papers_choices(capsys):
    with pytest.raises(SystemExit):
        script.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for option in ("max_steps", "learning_rate", "weight_decay", "warmup_steps", "image_size", "max_grad_norm"):
        place = text.rindex(f"--{option}")
        assert "The paper's" in text[place : place + 400], option
