"""Both training scripts on tiny data: nothing that happens during a run changes its result. And Trainer's own options."""

import json
import shutil
import signal
from functools import partial

import numpy as np
import pytest
import torch
from hub_server import TOKEN, USER, serve
from huggingface_hub import constants
from safetensors.torch import load_file
from tiny_training import IMAGE_SIZE, make_model, make_processor
from training_runs import (
    LOOP,
    MOMENTS,
    NUM_EXPRESSIONS,
    TRAINER,
    assert_close,
    assert_equal,
    kill_in_the_middle_of,
    make_inputs,
    make_validation_data,
    measure_overall_iou,
    on_process,
    read_log,
    read_vectors,
    read_weights,
    replace_file,
    signal_when,
    spoil_batch,
)

from modeling_restr import ReSTRForImageSegmentation, ReSTRProcessor, build_tokenizer
from modeling_restr.hub import save_bundle
from modeling_restr.tokenization_restr import SPECIAL_TOKENS
from modeling_restr.training.checkpoints import get_step, list_checkpoints
from modeling_restr.training.runs import evaluate_folder


@pytest.fixture(scope="module", params=[TRAINER, LOOP], ids=["trainer", "loop"])
def script(request):
    return request.param


@pytest.fixture(scope="module")
def uninterrupted(script, inputs, tmp_path_factory):
    output_dir = tmp_path_factory.mktemp("uninterrupted")
    assert script.run(output_dir, inputs) == 0, read_log(output_dir)
    return output_dir


@pytest.fixture(scope="module")
def large_batch(script, inputs, tmp_path_factory):
    """A run without drop path, which differs between batches and processes."""
    output_dir = tmp_path_factory.mktemp("large_batch")
    assert script.run(output_dir, inputs, sgd=True, model="plain", max_grad_norm=0.1) == 0, read_log(output_dir)
    return output_dir


@pytest.mark.parametrize(
    "moment", ["optimizer", *(pytest.param(moment, marks=pytest.mark.slow) for moment in (*MOMENTS, "random state"))]
)
def test_a_killed_run_ends_with_the_same_weights(script, inputs, uninterrupted, tmp_path, moment):
    files = {"optimizer": script.optimizer_file, "random state": script.random_file}
    if moment in MOMENTS:
        kill = partial(signal_when, moment, signal.SIGKILL)
    else:
        kill = partial(kill_in_the_middle_of, files[moment])
    assert script.run(tmp_path, inputs, kill) == -signal.SIGKILL
    assert not (tmp_path / "model").exists()
    left = [get_step(path) for path in list_checkpoints(tmp_path)]
    assert script.run(tmp_path, inputs) == 0, read_log(tmp_path)
    assert_equal(tmp_path, uninterrupted)
    if moment in files:
        assert left == [2] and (tmp_path / "checkpoint-6").exists()


def test_sigterm_saves_and_exits_with_143(script, inputs, uninterrupted, tmp_path):
    stop = partial(signal_when, "the first checkpoint is begun", signal.SIGTERM)
    assert script.run(tmp_path, inputs, stop, dataloader_num_workers=1) == 143
    left = [get_step(path) for path in list_checkpoints(tmp_path)]
    assert left == [2, 3] and not (tmp_path / "model").exists()  # it came while 2 was written
    assert script.run(tmp_path, inputs) == 0, read_log(tmp_path)
    assert_equal(tmp_path, uninterrupted)


@pytest.mark.parametrize(
    "options",
    [
        {"validation_split": "val", "eval_steps": 1, "save_steps": 5, "dataloader_num_workers": 1},
        {"gradient_checkpointing": True},
    ],
    ids=["evaluation", "recomputed activations"],
)
def test_evaluation_and_recomputed_activations_change_nothing(script, inputs, uninterrupted, tmp_path, options):
    assert script.run(tmp_path, inputs, **options) == 0, read_log(tmp_path)
    assert_equal(tmp_path, uninterrupted)


@pytest.mark.slow
def test_a_killed_stream_ends_with_the_same_weights(script, inputs, tmp_path):
    complete, killed = tmp_path / "complete", tmp_path / "killed"
    options = {"streaming": True, "dataloader_num_workers": 2, "shuffle_buffer_size": 4, "validation_split": "val"}
    kill = partial(kill_in_the_middle_of, script.optimizer_file)
    assert script.run(complete, inputs, **options) == 0, read_log(complete)
    assert script.run(killed, inputs, kill, **options) == -signal.SIGKILL
    (checkpoint,) = list_checkpoints(killed)
    assert get_step(checkpoint) == 2
    stream = json.loads((checkpoint / "recipe.json").read_text())["stream"]
    assert stream == "processes: 1, workers: 2, images per batch: 4, buffer: 4"
    assert script.run(killed, inputs, **options) == 0, read_log(killed)
    assert_equal(complete, killed)


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
def test_two_processes_resume_after_one_of_them_was_killed(script, inputs, tmp_path, streaming):
    complete, killed = tmp_path / "complete", tmp_path / "killed"
    options = {"num_processes": 2, "per_device_train_batch_size": 2, "streaming": streaming}
    options |= {"validation_split": "val", "eval_steps": 3}
    kill = on_process(0, signal_when, "the second checkpoint is moved", signal.SIGKILL)
    assert script.run(complete, inputs, **options) == [0, 0], read_log(complete)
    codes = script.run(killed, inputs, kill, **options)
    assert codes[0] == -signal.SIGKILL and codes[1] != 0
    assert script.run(killed, inputs, **options) == [0, 0], read_log(killed)
    assert_equal(complete, killed)


@pytest.mark.numerics
@pytest.mark.parametrize("num_processes", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_accumulated_batches_of_all_processes_equal_one_large_batch(
    script, inputs, large_batch, tmp_path, num_processes
):
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4 // num_processes}
    options |= {"model": "plain", "sgd": True, "max_grad_norm": 0.1, "validation_split": "val", "eval_steps": 6}
    codes = script.run(tmp_path, inputs, num_processes=num_processes, **options)
    assert codes in (0, [0, 0]), read_log(tmp_path)
    assert_close(tmp_path, large_batch, inputs / "plain")
    shared = json.loads((tmp_path / "evaluation.json").read_text())
    alone = evaluate_folder(tmp_path / "model", make_validation_data())
    assert [shared[key] == alone[key] for key in ("metrics", "expressions", "model")] == [True] * 3
    assert len(shared["expressions"]) == NUM_EXPRESSIONS


@pytest.mark.slow
@pytest.mark.numerics
def test_shards_on_two_processes_equal_one_large_batch(script, inputs, large_batch, tmp_path):
    options = {"num_processes": 2, "per_device_train_batch_size": 2, "sharded": True}
    options |= {"model": "plain", "sgd": True, "max_grad_norm": 0.1}
    if script.is_loop:  # for Trainer, PyTorch cannot load the empty state of SGD
        stop = on_process(0, signal_when, "the first checkpoint is begun", signal.SIGTERM)
        assert script.run(tmp_path, inputs, stop, **options) == [143, 143], read_log(tmp_path)
    assert script.run(tmp_path, inputs, **options) == [0, 0], read_log(tmp_path)
    checkpoint = tmp_path / "checkpoint-6"
    files = {path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*")}
    assert script.sharded_files <= files
    assert not [name for name in files if "_fsdp_" in name and name.endswith("py")]
    assert_close(tmp_path, large_batch, inputs / "plain")


def compile_eagerly():
    """Without a C++ compiler."""
    compile_module = torch.nn.Module.compile
    torch.nn.Module.compile = lambda module: compile_module(module, backend="eager")


@pytest.mark.slow
@pytest.mark.numerics
@pytest.mark.parametrize("kind", ["bfloat16", "compiled"])
def test_bfloat16_and_compilation_change_the_weights_little(script, inputs, tmp_path, kind):
    if kind == "bfloat16":
        options = {"mixed_precision": "bf16"} if script.is_loop else {"bf16": True}
    else:
        options = {"torch_compile": True} | ({} if script.is_loop else {"torch_compile_backend": "eager"})
    plain, changed = tmp_path / "plain", tmp_path / "changed"
    common = {"model": "plain", "sgd": True, "max_steps": 2}
    assert script.run(plain, inputs, **common) == 0, read_log(plain)
    assert script.run(changed, inputs, compile_eagerly, **common, **options) == 0, read_log(changed)
    assert_close(changed, plain, inputs / "plain", share=0.05 if kind == "bfloat16" else 1e-5)
    assert {tensor.dtype for tensor in read_weights(changed).values()} == {torch.float32}
    recipe = json.loads((changed / "checkpoint-2" / "recipe.json").read_text())
    assert recipe["precision"] == ("bfloat16" if kind == "bfloat16" else "float32")


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_batch(script, inputs, tmp_path):
    assert script.run(tmp_path, inputs, learning_rate=1e30, save_steps=1, warmup_steps=2) == 1
    assert "LossNotFiniteError" in read_log(tmp_path) and "image_ids [" in read_log(tmp_path)
    last = list_checkpoints(tmp_path)[-1]
    assert all(tensor.isfinite().all() for tensor in load_file(last / "model.safetensors").values())
    assert not (tmp_path / "model").exists()


def test_all_processes_stop_at_a_loss_of_one_that_is_not_finite(script, inputs, tmp_path):
    options = {"num_processes": 2, "per_device_train_batch_size": 2, "logging_steps": 3, "save_steps": 5}
    assert script.run(tmp_path, inputs, on_process(1, spoil_batch, 1), **options) == [1, 1], read_log(tmp_path)
    for rank in (0, 1):
        assert "in step 2 of process 1" in read_log(tmp_path, rank) and "from step 1 to 3" in read_log(tmp_path, rank)
    assert list_checkpoints(tmp_path) == []


def test_a_run_resumes_on_its_own_data_only(script, inputs, uninterrupted, tmp_path):
    moved, other = tmp_path / "moved", tmp_path / "other" / inputs.name
    shutil.copytree(inputs, moved)
    other.mkdir(parents=True)
    make_inputs(other, seed=1)
    shutil.copytree(uninterrupted / "checkpoint-4", tmp_path / "run" / "checkpoint-4")
    start = {"model_name_or_path": inputs / "drop_path"}
    assert script.run(tmp_path / "run", other, **start) == 1
    assert "data_fingerprint: " in read_log(tmp_path / "run") and "Traceback" not in read_log(tmp_path / "run")
    assert script.run(tmp_path / "run", moved, **start) == 0, read_log(tmp_path / "run")
    assert_equal(tmp_path / "run", uninterrupted)


def test_a_run_of_an_earlier_version_resumes(script, inputs, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted / "checkpoint-4", tmp_path / "checkpoint-4")
    path = tmp_path / "checkpoint-4" / "recipe.json"
    recipe = json.loads(path.read_text())
    assert recipe.pop("data_fingerprint")
    replace_file(path, json.dumps(recipe).encode())
    assert script.run(tmp_path, inputs) == 0, read_log(tmp_path)
    assert_equal(tmp_path, uninterrupted)
    assert "no fingerprint was taken" in read_log(tmp_path)


@pytest.mark.parametrize("kind", ["model", "optimizer", "random state", "other", "recipe"])
def test_damaged_files_of_a_checkpoint_are_reported(script, inputs, uninterrupted, tmp_path, kind):
    names = {"model": "model.safetensors", "optimizer": script.optimizer_file, "random state": script.random_file}
    names |= {"other": "custom_checkpoint_0.pkl" if script.is_loop else "trainer_state.json", "recipe": "recipe.json"}
    path = tmp_path / "checkpoint-4" / names[kind]
    shutil.copytree(uninterrupted / "checkpoint-4", path.parent)
    content = path.read_bytes()
    replace_file(path, b"null" if path.suffix == ".json" else content[: len(content) // 2])
    assert script.run(tmp_path, inputs) == 1
    assert "Error: Expected" in read_log(tmp_path) and str(path.parent) in read_log(tmp_path)
    assert "Traceback" not in read_log(tmp_path)


def test_a_run_does_not_resume_with_another_recipe_or_script(script, inputs, uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    assert script.run(tmp_path / "run", inputs, expressions_per_image=1) == 1
    assert "expressions_per_image: 3 there, 1 now" in read_log(tmp_path / "run")
    other = TRAINER if script.is_loop else LOOP
    assert other.run(tmp_path / "other", inputs, resume_from_checkpoint=tmp_path / "run" / "checkpoint-6") == 1
    assert f"was written by {script.name}.py" in read_log(tmp_path / "other")
    assert "Traceback" not in read_log(tmp_path / "run") + read_log(tmp_path / "other")


def test_half_precision_folders_train_in_float32_and_epochs_set_the_steps(script, inputs, tmp_path):
    model = ReSTRForImageSegmentation.from_pretrained(inputs / "plain")
    save_bundle(model, make_processor(), tmp_path / "half", dtype=torch.float16)
    options = {"num_train_epochs": 2, "max_train_samples": 4, "save_total_limit": 1}
    assert script.run(tmp_path / "run", inputs, model=tmp_path / "half", **options) == 0, read_log(tmp_path / "run")
    assert {tensor.dtype for tensor in read_weights(tmp_path / "run").values()} == {torch.float32}
    # 1, 2, 3 and 4 sentences in items of up to 3: 5 items per epoch, 4 per step
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-3"]


def test_words_that_a_trained_model_does_not_know_are_reported(inputs, tmp_path):
    tokenizer = build_tokenizer({**SPECIAL_TOKENS, "red": 4, "the": 5, "square": 6}, max_length=6)
    processor = make_processor()
    save_bundle(make_model(processor), ReSTRProcessor(processor.image_processor, tokenizer), tmp_path / "model")
    options = {"model": tmp_path / "model", "max_train_samples": 2, "max_steps": 2}
    assert LOOP.run(tmp_path / "run", inputs, **options) == 0, read_log(tmp_path / "run")
    # "the red square" of the first image, and this and "the green square" of the second
    assert "does not know 11.1% of the words, and reads all of them as <unk>: green," in read_log(tmp_path / "run")


def test_a_repository_that_cannot_be_created_stops_the_run_before_its_first_step(script, inputs, tmp_path):
    assert script.run(tmp_path, inputs, push_to_hub=True, hub_model_id="no name/of a repository") == 1
    assert "Cannot push to no name/of a repository at the end" in read_log(tmp_path)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_push_to_hub_uploads_the_model_with_its_card(script, inputs, tmp_path):
    with serve() as hub:

        def connect():
            constants.ENDPOINT = hub.url
            constants.HUGGINGFACE_CO_URL_TEMPLATE = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
            constants.HF_HUB_DISABLE_XET = True

        options = {"push_to_hub": True, "hub_model_id": f"{USER}/restr-tiny", "hub_token": TOKEN, "max_steps": 2}
        assert script.run(tmp_path, inputs, connect, hub_private_repo=True, **options) == 0, read_log(tmp_path)
        repository = hub.repositories["model", f"{USER}/restr-tiny"]
    files = repository.files("main")
    assert repository.private
    assert files["model.safetensors"] == (tmp_path / "model" / "model.safetensors").read_bytes()
    assert {"config.json", "processor_config.json", "pipeline_restr.py", "tokenizer.json"} <= files.keys()
    assert f"{USER}/restr-tiny" in files["README.md"].decode() and "400000" in files["README.md"].decode()
    assert not [name for name in files if "checkpoint" in name or name == "training_args.bin"]


def test_help_names_the_papers_choices(script, capsys):
    with pytest.raises(SystemExit):
        script.module.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    papers = {"max_steps": "400000", "learning_rate": "1e-05", "weight_decay": "0.0005", "warmup_steps": "0.1"}
    for option, value in {**papers, "image_size": "480", "max_grad_norm": "0.0", "fusion_type": "coupled"}.items():
        place = text.rindex(f"--{option}")
        assert f"The paper's: {value}." in text[place : place + 400], option


def test_from_a_vit_and_word_vectors_to_a_folder_that_pipeline_loads(inputs, tmp_path):
    options = {"model_name_or_path": None, "vision_model_name_or_path": inputs / "vit"}
    options |= {"word_vectors": inputs / "vectors.txt", "image_size": IMAGE_SIZE, "max_words": 5}
    options |= {"validation_split": "val", "eval_steps": 4, "learning_rate": 1e-5}
    assert TRAINER.run(tmp_path, inputs, **options) == 0, read_log(tmp_path)
    folder = tmp_path / "model"
    metrics = json.loads((tmp_path / "evaluation.json").read_text())["metrics"]
    assert metrics["overall_iou"] == pytest.approx(measure_overall_iou(folder), abs=1e-6)
    assert metrics["num_expressions"] == NUM_EXPRESSIONS
    model = ReSTRForImageSegmentation.from_pretrained(folder)
    config = model.config
    assert (config.vision_config.image_size, config.text_config.max_position_embeddings) == (IMAGE_SIZE, 5)
    assert (config.patch_loss_weight, config.vision_config.drop_path_rate) == (0.1, 0.1)
    words = ReSTRProcessor.from_pretrained(folder).tokenizer.get_vocab()
    for word in ("red", "green", "thing"):
        embedding = model.get_input_embeddings().weight[words[word]].detach().numpy()
        np.testing.assert_allclose(embedding, read_vectors(inputs)[word], atol=1e-3)  # they are trained, too
    card = (folder / "README.md").read_text()
    assert f"| {100 * metrics['overall_iou']:.2f} |" in card
    assert "| `max_steps` | 6 (the paper: 400000) |" in card and "| `learning_rate` | 1e-05 |" in card
    panels = sorted(path.name for path in (tmp_path / "overlays").iterdir())
    assert panels == ["step-0000004.png", "step-0000006.png"]
    assert "eval_overall_iou" in read_log(tmp_path)


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
