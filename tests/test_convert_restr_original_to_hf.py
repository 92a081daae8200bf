"""The conversion and the model, compared with outputs of the original implementation (random weights)."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from numerics import assert_close, assert_rounding_explains
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForImageSegmentation, AutoTokenizer

from modeling_restr import ReSTRForImageSegmentation
from modeling_restr.convert_restr_original_to_hf import (
    convert_checkpoint,
    load_original_checkpoint,
    model_from_original_state_dict,
)


ROOT = Path(__file__).parents[1]
FIXTURES = ROOT / "tests" / "fixtures"
PYTHONPATH = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
CASES = ("coupled", "coupled_coarse", "coupled_interpolated", "coupled_shared", "independent", "vanilla")
HEAD = ("encoder_v.head.weight", "encoder_v.head.bias")


def read_case(name: str) -> tuple[dict, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The original's settings and state dict, and its inputs, results and gradients."""
    with safe_open(FIXTURES / f"{name}.safetensors", "pt") as file:
        settings = json.loads(file.metadata()["config"])
    tensors = load_file(FIXTURES / f"{name}.safetensors")
    state_dict = {key.removeprefix("sd."): tensor for key, tensor in tensors.items() if key.startswith("sd.")}
    return settings, state_dict, tensors


def options_of(settings: dict) -> dict:
    return {
        "image_size": settings["image_size"],
        "num_attention_heads": settings["num_attention_heads"],
        "text_num_attention_heads": settings["text_heads"],
        "num_fusion_layers": settings["fusion_layers"],
        "share_fusion_layers": settings["kind"].endswith("shared"),
        "use_pixel_decoder": not settings["kind"].endswith("coarse"),
    }


def run_case(name: str, attn_implementation: str = "eager") -> tuple[ReSTRForImageSegmentation, dict, dict]:
    """Run in float64, so that all differences come from the original's rounding and are equal on every machine."""
    settings, state_dict, tensors = read_case(name)
    model = model_from_original_state_dict(state_dict, **options_of(settings)).double()
    model.set_attn_implementation(attn_implementation)
    return model, model(pixel_values=tensors["pixel_values"].double(), **inputs_of(settings, tensors)), tensors


def inputs_of(settings: dict, tensors: dict[str, torch.Tensor]) -> dict:
    return {
        "input_ids": tensors["input_ids"],
        "labels": tensors["labels"][:, 0],
        "interpolate_pos_encoding": settings["run_size"] != settings["image_size"],
    }


def assert_agrees(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.abs().max() > 0
    assert_close(actual, expected, 1e-5)


@pytest.mark.numerics
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", CASES)
def test_results_are_those_of_the_original(name, attn_implementation):
    model, outputs, golden = run_case(name, attn_implementation)

    assert_agrees(outputs.logits, golden["pixel_logits"][:, 0])
    assert_agrees(outputs.patch_logits, golden["patch_logits"][:, 0])
    assert_agrees(outputs.text_embeds, golden["text_features"])
    for part in ("loss", "loss_pixel", "loss_patch"):
        assert_agrees(outputs[part], golden[part][0])

    features = model.get_image_features(golden["pixel_values"].double(), interpolate_pos_encoding=True)
    assert_agrees(features.last_hidden_state, golden["vision_features"])
    assert_agrees(outputs.vision_embeds.flatten(1, 2), golden["vision_features"][:, 1:])


@pytest.mark.numerics
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_original(name, attn_implementation):
    model, outputs, golden = run_case(name, attn_implementation)
    outputs.loss.backward()

    restr = model.model
    attention = restr.text_model.layers[0].self_attn
    gradients = {
        "encoder_v.patch_embed.proj.weight": restr.vision_model.embeddings.patch_embedding.weight.grad,
        "encoder_l.embedding.weight": restr.text_model.embeddings.embed_tokens.weight.grad,
        "encoder_l.blocks.0.attn.qkv.weight": torch.cat(
            [attention.q_proj.weight.grad, attention.k_proj.weight.grad, attention.v_proj.weight.grad]
        ),
        "fusion_module.proj_v.weight": restr.fusion.visual_projection.weight.grad,
        "fusion_module.seed_emb": restr.fusion.seed_embedding.grad,
    }
    assert {f"grad.{original_name}" for original_name in gradients} == {key for key in golden if "grad." in key}
    for original_name, gradient in gradients.items():
        assert_agrees(gradient, golden[f"grad.{original_name}"])


@pytest.mark.numerics
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", CASES)
def test_float32_differs_by_rounding_alone(name, attn_implementation):
    settings, state_dict, tensors = read_case(name)
    model = model_from_original_state_dict(state_dict, **options_of(settings))
    model.set_attn_implementation(attn_implementation)

    def compute(model, pixel_values):
        outputs = model(pixel_values=pixel_values, **inputs_of(settings, tensors))
        return {name: outputs[name] for name in ("loss", "logits", "patch_logits", "text_embeds", "vision_embeds")}

    assert_rounding_explains(compute, model, tensors["pixel_values"])


@pytest.mark.parametrize("name", CASES)
def test_patch_labels_are_those_of_the_original(name):
    model, outputs, golden = run_case(name)
    # The gradient of the mean BCE of zeros is (0.5 - label) / number of patches.
    patch_logits = torch.zeros_like(outputs.patch_logits, requires_grad=True)
    _, _, loss_patch = model.compute_losses(outputs.logits.detach(), patch_logits, golden["labels"][:, 0])
    loss_patch.backward()
    patch_labels = 0.5 - patch_logits.grad * patch_logits.numel()
    torch.testing.assert_close(patch_labels.float(), golden["patch_labels"][:, 0])


@pytest.mark.parametrize("name", CASES)
def test_every_number_of_the_original_is_converted_with_or_without_its_head(name):
    settings, state_dict, _ = read_case(name)
    model = model_from_original_state_dict(state_dict, **options_of(settings))
    headless = {key: tensor for key, tensor in state_dict.items() if key not in HEAD}
    assert len(headless) < len(state_dict)
    same = model_from_original_state_dict(headless, **options_of(settings)).state_dict()
    assert all(torch.equal(same[key], tensor) for key, tensor in model.state_dict().items())
    numbers = torch.cat([tensor.flatten() for key, tensor in state_dict.items() if key not in HEAD])
    converted = torch.cat([tensor.flatten() for tensor in model.state_dict().values()])
    assert torch.equal(converted.sort().values, numbers.sort().values)


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("coupled", "encoder_v.cls_token"),
        ("coupled", "encoder_v.blocks.1.attn.qkv.bias"),
        ("coupled", "encoder_l.lang_norm.weight"),
        ("coupled", "fusion_module.proj_patch"),
        ("coupled", "fusion_module.blocks_ls.1.mlp.fc2.weight"),
        ("coupled", "fusion_module.decoder.2.up.1.weight"),
        ("independent", "fusion_module.decoder_norm.bias"),
        ("vanilla", "fusion_module.last_convs.weight"),
    ],
)
def test_missing_and_unknown_names_are_listed(case, name):
    settings, state_dict, _ = read_case(case)
    state_dict[f"{name}_renamed"] = state_dict.pop(name)
    with pytest.raises(ValueError, match="Missing names") as error:
        model_from_original_state_dict(state_dict, **options_of(settings))
    assert f"Missing names: ['{name}']. Unknown names: ['{name}_renamed']" in str(error.value)


def test_name_of_another_variant_is_unknown():
    settings, state_dict, _ = read_case("coupled")
    state_dict["fusion_module.decoder_norm.weight"] = state_dict["fusion_module.norm.weight"].clone()
    with pytest.raises(ValueError, match=r"Unknown names: \['fusion_module.decoder_norm.weight'\]"):
        model_from_original_state_dict(state_dict, **options_of(settings))


@pytest.mark.parametrize(
    ("case", "wrong_options", "message"),
    [
        ("coupled", {"num_fusion_layers": 3}, r"Missing names: \['fusion_module.blocks_ls.2.attn.proj.bias'"),
        ("coupled", {"num_fusion_layers": 1}, r"Unknown names: \['fusion_module.blocks_ls.1.attn.proj.bias'"),
        ("coupled", {"share_fusion_layers": True}, r"Unknown names: \['fusion_module.blocks_ls.1.attn.proj.bias'"),
        ("coupled_shared", {"share_fusion_layers": False}, r"Missing names: \['fusion_module.blocks_ls.1.attn"),
        ("coupled", {"use_pixel_decoder": False}, r"Unknown names: \['fusion_module.decoder.0.up.1.weight'"),
        ("coupled_coarse", {"use_pixel_decoder": True}, r"Missing names: \['fusion_module.decoder.0.up.1.weight'"),
        ("coupled", {"image_size": 96}, r"encoder_v.pos_embed gives \(1, 17, 32\), expected \(1, 37, 32\)"),
        ("coupled", {"num_attention_heads": 5}, "multiple of `num_attention_heads`"),
    ],
)
def test_options_that_do_not_fit_are_errors(case, wrong_options, message):
    settings, state_dict, _ = read_case(case)
    with pytest.raises(ValueError, match=message):
        model_from_original_state_dict(state_dict, **(options_of(settings) | wrong_options))


def test_other_state_dicts_are_refused():
    settings, state_dict, _ = read_case("coupled")
    with pytest.raises(ValueError, match="Expected a state dict of the original ReSTR"):
        model_from_original_state_dict({"weight": torch.zeros(1)}, **options_of(settings))
    encoders = {key: tensor for key, tensor in state_dict.items() if "fusion_module.blocks" not in key}
    with pytest.raises(ValueError, match="exactly one variant"):
        model_from_original_state_dict(encoders, **options_of(settings))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("encoder_l.embedding.weight", (), r"'encoder_l.embedding.weight' of 2 dimensions, got the shape \(\)"),
        ("encoder_v.patch_embed.proj.weight", (9,), r"proj.weight' of 4 dimensions, got the shape \(9,\)"),
        ("encoder_v.blocks.0.attn.qkv.bias", (), r"qkv.bias gives \(\)"),
        ("fusion_module.proj_patch", (2, 2, 2), r"fusion_module.proj_patch gives \(2, 2, 2\)"),
        ("fusion_module.decoder.0.up.1.weight", (9,), r"up.1.weight gives \(9,\)"),
    ],
)
def test_tensors_of_other_dimensions_are_named(name, shape, message):
    settings, state_dict, _ = read_case("coupled")
    with pytest.raises(ValueError, match=message):
        model_from_original_state_dict(state_dict | {name: torch.zeros(shape)}, **options_of(settings))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state_dict: state_dict,
        lambda state_dict: {"state_dict": state_dict, "iteration": 5},
        lambda state_dict: {"model": {"state_dict": state_dict}},
        lambda state_dict: {f"module.{key}": tensor for key, tensor in state_dict.items()},
    ],
    ids=["bare", "wrapped", "wrapped twice", "data parallel"],
)
def test_checkpoint_wrappers_are_taken_off(tmp_path, wrap):
    state_dict = {"encoder_v.cls_token": torch.ones(1, 1, 4), "fusion_module.seed_emb": torch.zeros(1)}
    torch.save(wrap(state_dict), tmp_path / "checkpoint.pth")
    loaded = load_original_checkpoint(tmp_path / "checkpoint.pth")
    assert loaded.keys() == state_dict.keys()
    assert all(torch.equal(loaded[key], state_dict[key]) for key in state_dict)


class Malicious:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    trace = tmp_path / "trace"
    torch.save({"state_dict": {"weight": torch.zeros(1)}, "extra": Malicious(trace)}, tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match="could run code"):
        load_original_checkpoint(tmp_path / "checkpoint.pth")
    assert not trace.exists()
    pickle.loads(pickle.dumps(Malicious(trace)))  # plain loading would have run it
    assert trace.exists()


@pytest.mark.parametrize("content", [b"", b"PK", b"x" * 100])
def test_damaged_checkpoint_is_refused(tmp_path, content):
    (tmp_path / "checkpoint.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoint\.pth"):
        load_original_checkpoint(tmp_path / "checkpoint.pth")


@pytest.mark.parametrize("content", [[torch.zeros(1)], {"epoch": 3}, {1: torch.zeros(1)}])
def test_checkpoint_without_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match="holds no state dict"):
        load_original_checkpoint(tmp_path / "checkpoint.pth")


def write_original_files(folder: Path, case: str, num_words: int) -> dict[str, Path]:
    _, state_dict, _ = read_case(case)
    torch.save({f"module.{key}": tensor for key, tensor in state_dict.items()}, folder / "original.pth")
    words = ["<pad>", "<go>", "<eos>", "<unk>", *(f"word{index}" for index in range(4, num_words))]
    (folder / "vocabulary.txt").write_text("".join(f"{word}\n" for word in words))
    return {"checkpoint": folder / "original.pth", "vocabulary": folder / "vocabulary.txt"}


def test_command_writes_a_folder_that_gives_the_same_logits(tmp_path):
    files = write_original_files(tmp_path, "coupled", num_words=50)
    settings, state_dict, golden = read_case("coupled")
    options = {**files, "output_dir": tmp_path / "converted", "image_size": 64, "num_attention_heads": 4}
    arguments = [f"--{key}={value}" for key, value in options.items()] + ["--text_num_attention_heads=4"]
    subprocess.run(
        [sys.executable, "-m", "modeling_restr.convert_restr_original_to_hf", *arguments],
        check=True,
        env=os.environ | {"PYTHONPATH": PYTHONPATH, "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
    )

    model = AutoModelForImageSegmentation.from_pretrained(tmp_path / "converted")
    expected = model_from_original_state_dict(state_dict, **options_of(settings))
    inputs = {"pixel_values": golden["pixel_values"], "input_ids": golden["input_ids"]}
    assert torch.equal(model(**inputs).logits, expected(**inputs).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "converted")
    assert tokenizer("word49 strange word4", padding="max_length").input_ids == [0] * 17 + [49, 3, 4]


def test_vocabulary_of_another_checkpoint_is_refused(tmp_path, caplog):
    options = {"output_dir": tmp_path / "converted", "image_size": 64}
    options |= {"num_attention_heads": 4, "text_num_attention_heads": 4}
    with pytest.raises(ValueError, match="51 lines and the checkpoint's word embedding has 50 rows"):
        convert_checkpoint(**write_original_files(tmp_path, "coupled", num_words=51), **options)
    assert not (tmp_path / "converted").exists()

    convert_checkpoint(**write_original_files(tmp_path, "coupled", num_words=49), **options)
    assert "49 lines and the checkpoint's word embedding has 50 rows" in caplog.text
