"""The training script on tiny data: what it ends in, and that nothing that happens on the way changes it."""

import json
import os
import shutil
import signal
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import CommitInfo
from safetensors.torch import load_file
from tiny_training import IMAGE_SIZE, make_dataset, make_model, make_processor
from training_runs import (
    MOMENTS,
    assert_close,
    assert_equal,
    kill_in_the_middle_of,
    load_script,
    make_inputs,
    read_log as log,
    read_weights as weights,
    replace_file,
    run as run_script,
    shard_on_cpus,
    signal_when,
    spoil_a_batch,
)
from transformers import ViTConfig, ViTModel, pipeline

from modeling_restr import ReSTRForImageSegmentation, ReSTRProcessor, build_tokenizer
from modeling_restr.data.canonical import decode_mask
from modeling_restr.hub import save_bundle
from modeling_restr.tokenization_restr import SPECIAL_TOKENS
from modeling_restr.training import runs
from modeling_restr.training.checkpoints import get_step, list_checkpoints


script = load_script("run_referring_segmentation")
OPTIONS = {
    "max_steps": 6,
    "save_steps": 2,
    "logging_steps": 1,
    "eval_strategy": "no",
    "validation_split": "",
    "per_device_train_batch_size": 4,
    "expressions_per_image": 3,
    "learning_rate": 1e-2,
    "dataloader_num_workers": 0,
    "disable_tqdm": True,
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
    assert run(output_dir, inputs) == 0, log(output_dir)
    return output_dir


def test_from_a_vit_and_word_vectors_to_a_folder_that_pipeline_loads(inputs, tmp_path):
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=48, patch_size=8
    )
    ViTModel(config).save_pretrained(tmp_path / "vit")
    vectors = np.random.default_rng(0).normal(size=(3, 6))
    lines = [f"{word} {' '.join(f'{x:.4f}' for x in row)}" for word, row in zip(("red", "green", "thing"), vectors)]
    (tmp_path / "vectors.txt").write_text("\n".join(lines))
    code = run(
        tmp_path / "run",
        inputs,
        model_name_or_path=None,
        vision_model_name_or_path=tmp_path / "vit",
        word_vectors=tmp_path / "vectors.txt",
        image_size=IMAGE_SIZE,
        max_words=5,
        validation_split="val",
        eval_strategy="steps",
        eval_steps=4,
        learning_rate=1e-5,
    )
    assert code == 0, log(tmp_path / "run")
    folder = tmp_path / "run" / "model"
    pipe = pipeline("referring-image-segmentation", model=str(folder))
    intersection = union = 0
    rows = make_dataset(5, seed=3)
    for row in rows:
        for reference in row["references"]:
            target = decode_mask(reference["mask"])
            texts = [expression["text"] for expression in reference["expressions"]]
            for result in pipe(row["image"], text=texts):
                predicted = np.asarray(result["mask"]) > 0
                intersection += (predicted & target).sum()
                union += (predicted | target).sum()
    metrics = json.loads((tmp_path / "run" / "evaluation.json").read_text())["metrics"]
    assert metrics["overall_iou"] == pytest.approx(intersection / union, abs=1e-6)
    assert metrics["num_expressions"] == 11
    model = ReSTRForImageSegmentation.from_pretrained(folder)
    config = model.config
    assert (config.vision_config.image_size, config.text_config.max_position_embeddings) == (IMAGE_SIZE, 5)
    assert (config.patch_loss_weight, config.vision_config.drop_path_rate) == (0.1, 0.1)
    words = pipe.processor.tokenizer.get_vocab()
    embeddings = model.get_input_embeddings().weight[[words["red"], words["thing"]]].detach().numpy()
    np.testing.assert_allclose(embeddings, vectors[[0, 2]], atol=1e-3)  # they are trained, too
    card = (folder / "README.md").read_text()
    assert f"| {100 * metrics['overall_iou']:.2f} |" in card
    assert "| `max_steps` | 6 (the paper: 400000) |" in card and "| `learning_rate` | 1e-05 |" in card
    panels = sorted(path.name for path in (tmp_path / "run" / "overlays").iterdir())
    assert panels == ["step-0000004.png", "step-0000006.png"]
    assert "eval_overall_iou" in log(tmp_path / "run")


@pytest.mark.parametrize("moment", [*MOMENTS, "optimizer.pt", "rng_state.pth"])
def test_a_run_that_was_killed_ends_in_the_same_weights(inputs, undisturbed, tmp_path, moment):
    def before():
        if moment in MOMENTS:
            signal_when(moment, signal.SIGKILL)
        else:
            kill_in_the_middle_of(moment)

    assert run(tmp_path, inputs, before) == -signal.SIGKILL
    assert not (tmp_path / "model").exists()
    left = [get_step(path) for path in list_checkpoints(tmp_path)]
    assert run(tmp_path, inputs) == 0, log(tmp_path)
    assert_equal(tmp_path, undisturbed)
    if moment not in MOMENTS:
        assert left == [2] and (tmp_path / "checkpoint-6").exists()


def test_sigterm_saves_and_exits_with_143(inputs, undisturbed, tmp_path):
    stop = partial(signal_when, "the first checkpoint is begun", signal.SIGTERM)
    assert run(tmp_path, inputs, stop, dataloader_num_workers=1) == 143
    left = [get_step(path) for path in list_checkpoints(tmp_path)]
    assert left == [2, 3] and not (tmp_path / "model").exists()  # it came while 2 was written
    assert run(tmp_path, inputs) == 0, log(tmp_path)
    assert_equal(tmp_path, undisturbed)


def test_evaluation_and_checkpoints_do_not_change_the_course(inputs, undisturbed, tmp_path):
    options = {"validation_split": "val", "eval_strategy": "steps", "eval_steps": 1, "save_steps": 5}
    assert run(tmp_path, inputs, **options) == 0, log(tmp_path)
    assert_equal(tmp_path, undisturbed)


def test_recomputed_activations_give_the_same_weights(inputs, undisturbed, tmp_path):
    assert run(tmp_path, inputs, gradient_checkpointing=True) == 0, log(tmp_path)
    assert_equal(tmp_path, undisturbed)


@pytest.fixture(scope="module")
def large_batch(inputs, tmp_path_factory):
    """Without drop path, and with SGD: Adam would blow up the noise of gradients that are zero."""
    output_dir = tmp_path_factory.mktemp("large_batch")
    assert run(output_dir, inputs, model="plain", optim="sgd") == 0, log(output_dir)
    return output_dir


@pytest.mark.numerics
def test_accumulated_batches_are_one_large_batch(inputs, large_batch, tmp_path):
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "model": "plain", "optim": "sgd"}
    assert run(tmp_path, inputs, **options) == 0, log(tmp_path)
    assert_close(tmp_path, large_batch, inputs / "plain")


@pytest.mark.numerics
def test_two_processes_are_one_with_a_large_batch(inputs, large_batch, tmp_path):
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "model": "plain", "optim": "sgd"}
    options |= {"validation_split": "val", "eval_strategy": "steps", "eval_steps": 6}
    assert run(tmp_path, inputs, num_processes=2, **options) == [0, 0], log(tmp_path)
    assert_close(tmp_path, large_batch, inputs / "plain")
    shared = json.loads((tmp_path / "evaluation.json").read_text())
    alone = runs.evaluate_folder(tmp_path / "model", make_dataset(5, seed=3))
    assert [shared[key] == alone[key] for key in ("metrics", "expressions", "model")] == [True] * 3
    assert len(shared["expressions"]) == 11


def test_two_processes_go_on_where_one_of_them_was_killed(inputs, tmp_path):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    options = {"num_processes": 2, "per_device_train_batch_size": 2}
    assert run(whole, inputs, **options) == [0, 0], log(whole)

    def before():
        if os.environ["RANK"] == "0":
            signal_when("the second checkpoint is moved", signal.SIGKILL)

    codes = run(torn, inputs, before, **options)
    assert codes[0] == -signal.SIGKILL and codes[1] != 0
    assert run(torn, inputs, **options) == [0, 0], log(torn)
    assert_equal(whole, torn)


def test_a_stream_that_was_killed_ends_in_the_same_weights(inputs, tmp_path):
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    options = {"streaming": True, "dataloader_num_workers": 2, "shuffle_buffer_size": 4, "validation_split": "val"}
    assert run(whole, inputs, **options) == 0, log(whole)
    assert run(torn, inputs, lambda: kill_in_the_middle_of("optimizer.pt"), **options) == -signal.SIGKILL
    assert [path.name for path in list_checkpoints(torn)] == ["checkpoint-2"]
    assert run(torn, inputs, **options) == 0, log(torn)
    assert_equal(whole, torn)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_batch(inputs, tmp_path):
    assert run(tmp_path, inputs, learning_rate=1e30, save_steps=1, warmup_steps=2) == 1
    assert "LossNotFiniteError" in log(tmp_path) and "image_ids [" in log(tmp_path)
    last = list_checkpoints(tmp_path)[-1]
    assert all(tensor.isfinite().all() for tensor in load_file(last / "model.safetensors").values())
    assert not (tmp_path / "model").exists()


def test_all_processes_stop_at_a_loss_of_one_that_is_not_finite(inputs, tmp_path):
    options = {"num_processes": 2, "per_device_train_batch_size": 2, "logging_steps": 3, "save_steps": 5}
    assert run(tmp_path, inputs, lambda: spoil_a_batch(1, 1), **options) == [1, 1], log(tmp_path)
    for rank in (0, 1):
        assert "in step 2 of process 1" in log(tmp_path, rank) and "from step 1 to 3" in log(tmp_path, rank)
    assert list_checkpoints(tmp_path) == []


def test_a_run_is_resumed_on_its_own_data_only(inputs, undisturbed, tmp_path):
    moved, other = tmp_path / "moved", tmp_path / "other" / inputs.name
    shutil.copytree(inputs, moved)
    other.mkdir(parents=True)
    make_inputs(other, seed=1)
    shutil.copytree(undisturbed / "checkpoint-4", tmp_path / "run" / "checkpoint-4")
    start = {"model_name_or_path": inputs / "drop_path"}
    assert run(tmp_path / "run", other, **start) == 1
    assert "data_fingerprint: " in log(tmp_path / "run") and "Traceback" not in log(tmp_path / "run")
    assert run(tmp_path / "run", moved, **start) == 0, log(tmp_path / "run")
    assert_equal(tmp_path / "run", undisturbed)


def test_a_run_of_an_earlier_version_is_resumed(inputs, undisturbed, tmp_path):
    shutil.copytree(undisturbed / "checkpoint-4", tmp_path / "checkpoint-4")
    path = tmp_path / "checkpoint-4" / "recipe.json"
    recipe = json.loads(path.read_text())
    assert recipe.pop("data_fingerprint")
    replace_file(path, json.dumps(recipe).encode())
    assert run(tmp_path, inputs) == 0, log(tmp_path)
    assert_equal(tmp_path, undisturbed)
    assert "no fingerprint was taken" in log(tmp_path)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json", "recipe.json"]
)
def test_damaged_files_of_a_checkpoint_are_said(inputs, undisturbed, tmp_path, name):
    checkpoint = tmp_path / "checkpoint-4"
    shutil.copytree(undisturbed / "checkpoint-4", checkpoint)
    content = (checkpoint / name).read_bytes()
    replace_file(checkpoint / name, b"null" if name.endswith(".json") else content[: len(content) // 2])
    assert run(tmp_path, inputs) == 1
    assert "Error: Expected" in log(tmp_path) and str(checkpoint) in log(tmp_path)
    assert "Traceback" not in log(tmp_path)


def test_a_run_is_not_resumed_with_another_recipe_or_by_another_script(inputs, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    assert run(tmp_path / "run", inputs, expressions_per_image=1) == 1
    assert "expressions_per_image: 3 there, 1 now" in log(tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint-6"
    state = json.loads((checkpoint / "complete.json").read_text())
    state.pop("trainer_state.json")
    (checkpoint / "complete.json").write_text(json.dumps(state))
    (checkpoint / "trainer_state.json").unlink()
    assert run(tmp_path / "other", inputs, resume_from_checkpoint=checkpoint) == 1
    assert "was written by run_referring_segmentation_no_trainer.py" in log(tmp_path / "other")
    assert "Traceback" not in log(tmp_path / "run") + log(tmp_path / "other")


@pytest.mark.numerics
def test_sharded_over_two_processes_it_is_one_with_a_large_batch(inputs, large_batch, tmp_path):
    options = {"num_processes": 2, "per_device_train_batch_size": 2, "model": "plain", "optim": "sgd"}
    assert run(tmp_path, inputs, shard_on_cpus, flags=["--fsdp"], **options) == [0, 0], log(tmp_path)
    files = {path.name for path in (tmp_path / "checkpoint-6").iterdir()}
    assert "pytorch_model_fsdp.bin" in files and not [
        name for name in files if "_fsdp_" in name and name.endswith("py")
    ]
    assert_close(tmp_path, large_batch, inputs / "plain")


@pytest.mark.numerics
@pytest.mark.parametrize("options", [{"bf16": True}, {"torch_compile": True, "torch_compile_backend": "eager"}])
def test_other_ways_to_compute_stay_near(inputs, large_batch, tmp_path, options):
    assert run(tmp_path, inputs, model="plain", max_steps=1, warmup_steps=0, **options) == 0, log(tmp_path)
    files = (tmp_path / "checkpoint-1" / "trainer_state.json", large_batch / "checkpoint-6" / "trainer_state.json")
    losses = [json.loads(file.read_text())["log_history"][0]["loss"] for file in files]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


def test_half_precision_folders_train_in_float32_and_epochs_set_the_steps(inputs, tmp_path):
    model = ReSTRForImageSegmentation.from_pretrained(inputs / "plain")
    save_bundle(model, make_processor(), tmp_path / "half", dtype=torch.float16)
    options = {"model": tmp_path / "half", "num_train_epochs": 2, "max_train_samples": 4, "save_total_limit": 1}
    assert run(tmp_path / "run", inputs, **options) == 0, log(tmp_path / "run")
    assert {tensor.dtype for tensor in weights(tmp_path / "run").values()} == {torch.float32}
    # 1, 2, 3 and 4 sentences in items of up to 3: 5 items an epoch, 4 a step
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-3"]


def test_words_that_a_trained_model_does_not_know_are_reported(inputs, tmp_path):
    tokenizer = build_tokenizer({**SPECIAL_TOKENS, "red": 4, "the": 5, "square": 6}, max_length=6)
    processor = make_processor()
    save_bundle(make_model(processor), ReSTRProcessor(processor.image_processor, tokenizer), tmp_path / "model")
    options = {"model": tmp_path / "model", "max_train_samples": 2, "max_steps": 2}
    assert run(tmp_path / "run", inputs, **options) == 0, log(tmp_path / "run")
    # "the red square" of the first image, of the second this and "the green square"
    assert "11.1% of the words are none of the model's" in log(tmp_path / "run") and ": green," in log(
        tmp_path / "run"
    )


def test_a_repository_that_cannot_be_made_stops_the_run_before_it_starts(inputs, tmp_path):
    assert run(tmp_path, inputs, push_to_hub=True, hub_model_id="no name/of a repository") == 1
    assert "Cannot push to no name/of a repository at the end" in log(tmp_path)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_the_models_folder_is_pushed_not_the_runs(inputs, tmp_path):
    made = []

    def before():
        def note(folder, repo_id, **options):
            files = sorted(path.name for path in folder.iterdir())
            (tmp_path / "pushed.json").write_text(json.dumps([str(folder), repo_id, options, files, made]))
            return CommitInfo("https://huggingface.co/tester/squares/commit/0", "", "", "")

        runs.push_to_hub = note
        runs.HfApi = lambda token: SimpleNamespace(create_repo=lambda repo_id, private, exist_ok: made.append(repo_id))

    options = {"push_to_hub": True, "hub_model_id": "tester/squares", "hub_private_repo": True, "max_steps": 2}
    assert run(tmp_path / "run", inputs, before, **options) == 0, log(tmp_path / "run")
    folder, repo_id, push_options, files, made = json.loads((tmp_path / "pushed.json").read_text())
    assert (folder, repo_id, made) == (str(tmp_path / "run" / "model"), "tester/squares", ["tester/squares"])
    assert push_options == {"private": True, "token": None}
    assert {"README.md", "config.json", "model.safetensors", "pipeline_restr.py", "tokenizer.json"} <= {*files}


def test_the_best_checkpoint_is_kept_and_becomes_the_model(inputs, tmp_path):
    options = {"validation_split": "val", "eval_strategy": "steps", "eval_steps": 2, "save_total_limit": 1}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "overall_iou", "greater_is_better": True}
    assert run(tmp_path, inputs, **options) == 0, log(tmp_path)
    state = json.loads((list_checkpoints(tmp_path)[-1] / "trainer_state.json").read_text())
    scores = {entry["step"]: entry["eval_overall_iou"] for entry in state["log_history"] if "eval_loss" in entry}
    best = tmp_path / f"checkpoint-{max(scores, key=scores.get)}"
    assert state["best_model_checkpoint"] == str(best) and best in list_checkpoints(tmp_path)
    kept = load_file(best / "model.safetensors")
    assert all(torch.equal(tensor, kept[name]) for name, tensor in weights(tmp_path).items())


def test_help_names_the_papers_choices(capsys):
    with pytest.raises(SystemExit):
        script.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for option in ("max_steps", "learning_rate", "weight_decay", "warmup_steps", "image_size", "max_grad_norm"):
        place = text.rindex(f"--{option}")
        assert "The paper's" in text[place : place + 400], option
