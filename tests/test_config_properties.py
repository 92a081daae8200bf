"""Configurations and weights that are damaged: they load, say what they lack, or are refused."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given, strategies as st
from properties import JSON_VALUES, PYTHON_VALUES, attempt, cases, damaged, damaged_bytes
from safetensors.torch import load_file, save_file
from test_convert_restr_original_to_hf import CASES, HEAD, options_of, read_case
from tiny_models import tiny_config, tiny_model
from transformers import DeiTConfig, Dinov2Config, ViTConfig

from modeling_restr import ReSTRConfig, ReSTRForImageSegmentation, ReSTRTextConfig, ReSTRVisionConfig
from modeling_restr.convert_restr_original_to_hf import load_original_checkpoint, model_from_original_state_dict


pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG_CLASSES = (ReSTRVisionConfig, ReSTRTextConfig, ReSTRConfig)


_VISION = st.one_of(
    st.fixed_dictionaries(
        {"num_attention_heads": st.sampled_from([1, 2, 3])},
        optional={
            "hidden_size": st.sampled_from([12, 24, 36]),
            "patch_size": st.sampled_from([4, 8]),
            "image_size": st.sampled_from([16, 32, 64]),
            "num_hidden_layers": st.integers(1, 3),
            "drop_path_rate": st.floats(0, 0.9),
            "hidden_act": st.sampled_from(["gelu", "relu", "silu"]),
        },
    ),
    st.sampled_from([ViTConfig, DeiTConfig, Dinov2Config]).map(
        lambda kind: kind(hidden_size=24, num_attention_heads=2)
    ),
    st.none(),
)
_TEXT = st.fixed_dictionaries(
    {"num_attention_heads": st.sampled_from([1, 2, 3])},
    optional={
        "vocab_size": st.integers(5, 2**24),
        "max_position_embeddings": st.integers(1, 50),
        "pad_token_id": st.integers(0, 4),
        "layer_norm_eps": st.floats(0, 1, exclude_min=True),
        "projection_dim": st.integers(1, 100),
    },
)
CONFIGS = st.fixed_dictionaries(
    {"vision_config": _VISION},
    optional={
        "text_config": _TEXT,
        "fusion_type": st.sampled_from(["coupled", "independent", "vanilla"]),
        "num_fusion_layers": st.integers(1, 1000),
        "share_fusion_layers": st.booleans(),
        "hidden_size": st.sampled_from([12, 24, 48]),
        "use_pixel_decoder": st.booleans(),
        "attend_to_padding": st.booleans(),
        "patch_loss_weight": st.floats(0, 10**6) | st.integers(0, 10**6),
        "key_of_another_tool": JSON_VALUES,
    },
)


@pytest.mark.slow
@cases(100)
@given(CONFIGS)
def test_configs_survive_dicts_and_files(tmp_path_factory, values):
    config = ReSTRConfig(**values)
    folder = tmp_path_factory.getbasetemp() / "config"
    config.save_pretrained(folder)
    expected = json.loads(config.to_json_string(use_diff=False))
    for again in (ReSTRConfig.from_dict(config.to_dict()), ReSTRConfig.from_pretrained(folder)):
        assert json.loads(again.to_json_string(use_diff=False)) == expected


@pytest.mark.parametrize("config_class", CONFIG_CLASSES)
@cases(200)
@given(st.data())
def test_fields_of_any_kind_are_within_bounds_or_refused(config_class, data):
    names = [field.name for field in dataclasses.fields(config_class)]
    values = data.draw(st.dictionaries(st.sampled_from(names), JSON_VALUES, max_size=3))
    config = attempt(config_class, **values)
    again = attempt(config_class.from_dict, values)
    assert isinstance(config, Exception) == isinstance(again, Exception)
    if not isinstance(config, Exception):
        config.validate_architecture()


@pytest.mark.slow
@cases(200)
@given(st.data())
def test_damaged_config_files_load_or_are_refused(tmp_path_factory, data):
    content = json.loads(tiny_config().to_json_string(use_diff=False))
    folder = tmp_path_factory.getbasetemp() / "damaged_config"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(data.draw(damaged(content))))
    config = attempt(ReSTRConfig.from_pretrained, folder)
    if not isinstance(config, Exception):
        config.validate_architecture()
        assert ReSTRConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


CHANGES = {
    "remove": None,
    "rename": None,
    "transpose": lambda tensor: tensor.T.contiguous() if tensor.ndim == 2 else tensor[None],
    "cut": lambda tensor: tensor[:-1] if tensor.ndim else tensor,
    "empty": lambda tensor: tensor[:0] if tensor.ndim else tensor[None],
    "flatten": torch.flatten,
    "scalar": lambda tensor: tensor.new_zeros(()),
    "repeat": lambda tensor: torch.cat([tensor, tensor]) if tensor.ndim else tensor[None],
}


def some_changes(names):
    """{name of a weight: what becomes of it}."""
    return st.dictionaries(st.sampled_from(sorted(names)), st.sampled_from(sorted(CHANGES)), max_size=3)


def change_weights(weights, changes):
    """A copy with some weights removed, renamed or of another shape."""
    changed = dict(weights)
    for name, change in changes.items():
        tensor = changed.pop(name)
        if change == "rename":
            changed[f"{name}.extra"] = tensor
        elif change != "remove":
            changed[name] = CHANGES[change](tensor)
    return changed


ORIGINALS = {name: read_case(name)[:2] for name in CASES}


@pytest.mark.slow
@cases(80)
@given(st.data())
def test_damaged_original_weights_are_refused_with_their_names(data):
    settings, weights = ORIGINALS[data.draw(st.sampled_from(CASES))]
    changes = data.draw(some_changes(weights))
    changed = change_weights(weights, changes)
    model = attempt(model_from_original_state_dict, changed, **options_of(settings))
    if isinstance(model, Exception):
        named = [*changes, "Config: `", "Shapes do not fit"]
        assert any(name in str(model) for name in named)
    else:  # nothing is lost
        num_unused = sum(changed[name].numel() for name in HEAD if name in changed)
        assert model.num_parameters() == sum(tensor.numel() for tensor in changed.values()) - num_unused


@cases(60)
@given(st.data())
def test_damaged_checkpoints_of_the_original_are_read_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "original.pth"
    weights = {"module.a": torch.ones(2), "b": torch.zeros(2, 2)}
    content = data.draw(
        damaged({"state_dict": weights, "epoch": 3}, PYTHON_VALUES.filter(lambda v: type(v) is not object))
    )
    torch.save(content, path)
    if data.draw(st.booleans()):
        path.write_bytes(data.draw(damaged_bytes(path.read_bytes())))
    state_dict = attempt(load_original_checkpoint, path)
    if isinstance(state_dict, Exception):
        assert str(path) in str(state_dict)
    else:
        assert all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state_dict.items())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tiny_model().save_pretrained(folder)
    return folder, load_file(folder / "model.safetensors")


@pytest.mark.slow
@cases(40)
@given(st.data())
def test_damaged_weights_load_with_a_report_or_are_refused(saved, data):
    folder, weights = saved
    changes = data.draw(some_changes(weights))
    changed = change_weights(weights, changes)
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    if any(changed[name].shape != weights[name].shape for name in changed.keys() & weights.keys()):
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            ReSTRForImageSegmentation.from_pretrained(folder)
        return
    model, info = ReSTRForImageSegmentation.from_pretrained(folder, output_loading_info=True)
    missing = weights.keys() - changed.keys()
    assert (set(info["missing_keys"]), set(info["unexpected_keys"])) == (missing, changed.keys() - weights.keys())
    for name, value in model.state_dict().items():
        assert name in missing or torch.equal(value, changed[name])
