import dataclasses
import json
import math
from pathlib import Path

import pytest
from transformers import AutoConfig, BertConfig, DeiTConfig, Dinov2Config, PreTrainedConfig, ViTConfig, YolosConfig

from modeling_restr import ReSTRConfig, ReSTRTextConfig, ReSTRVisionConfig


CONFIG_CLASSES = [ReSTRConfig, ReSTRTextConfig, ReSTRVisionConfig]


def test_defaults_are_the_published_architecture():
    config = ReSTRConfig()
    vision, text = config.vision_config, config.text_config
    assert (config.fusion_type, config.num_fusion_layers, config.hidden_size) == ("coupled", 2, 768)
    assert (config.intermediate_size, config.patch_loss_weight, config.attend_to_padding) == (3072, 0.1, True)
    assert (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads) == (768, 12, 12)
    assert (vision.image_size, vision.patch_size, vision.drop_path_rate) == (480, 16, 0.1)
    assert (text.vocab_size, text.hidden_size, text.num_hidden_layers) == (12112, 300, 6)
    assert (text.max_position_embeddings, text.num_attention_heads, text.projection_dim) == (20, 12, 768)
    assert config.layer_norm_eps == vision.layer_norm_eps == text.layer_norm_eps == 1e-5


def test_fusion_follows_the_vision_encoder_by_default():
    vision_config = {"hidden_size": 96, "num_attention_heads": 12}
    assert ReSTRConfig(vision_config=vision_config).hidden_size == 96
    assert ReSTRConfig(vision_config=vision_config).intermediate_size == 384
    assert ReSTRConfig(vision_config=vision_config, hidden_size=48, intermediate_size=50).intermediate_size == 50
    assert ReSTRConfig(vision_config=vision_config, hidden_size=48).vision_config.hidden_size == 96


def test_heads_are_twelve_or_those_of_the_vision_encoder():
    for hidden_size, vision_heads, expected in ((768, 8, 12), (1024, 16, 16), (384, 6, 12), (32, 4, 4)):
        vision_config = {"hidden_size": hidden_size, "num_attention_heads": vision_heads}
        assert ReSTRConfig(vision_config=vision_config).num_attention_heads == expected
    assert ReSTRConfig(vision_config=vision_config, num_attention_heads=2).num_attention_heads == 2


LARGE = ViTConfig(hidden_size=1024, num_attention_heads=16)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, (1024, 16, 4096)),
        ({"hidden_size": 768}, (768, 12, 3072)),
        ({"num_attention_heads": 8}, (1024, 8, 4096)),
        ({"intermediate_size": 3072}, (1024, 16, 3072)),
        ({"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}, (768, 12, 3072)),
    ],
)
def test_unset_widths_follow_another_vision_encoder(tmp_path, values, expected):
    config = ReSTRConfig(fusion_type="vanilla", **values)
    saved = config.to_dict()
    other = config.with_vision_config(LARGE)
    assert (other.hidden_size, other.num_attention_heads, other.intermediate_size) == expected
    assert (other.fusion_type, other.vision_config) == ("vanilla", LARGE)
    assert config.to_dict() == saved
    assert other.with_vision_config(config.vision_config).to_dict() == saved
    config.save_pretrained(tmp_path)  # writes every width, so that none is open
    assert ReSTRConfig.from_pretrained(tmp_path, num_attention_heads=8).with_vision_config(LARGE).hidden_size == 768
    assert not [name for name in json.loads((tmp_path / "config.json").read_text()) if name.startswith("_")]


def test_widths_that_were_set_later_do_not_follow():
    config = ReSTRConfig()
    config.hidden_size, config.num_attention_heads = 512, 8
    other = config.with_vision_config(LARGE)
    assert (other.hidden_size, other.num_attention_heads, other.intermediate_size) == (512, 8, 2048)


def test_coarse_models_have_no_patch_loss_by_default():
    assert ReSTRConfig(use_pixel_decoder=False).patch_loss_weight == 0
    assert ReSTRConfig(use_pixel_decoder=False, patch_loss_weight=0.5).patch_loss_weight == 0.5


@pytest.mark.parametrize(
    "vision_config",
    [
        None,
        {"patch_size": 8, "image_size": 96},
        ReSTRVisionConfig(drop_path_rate=0.3),
        {"model_type": "deit", "hidden_size": 48, "num_attention_heads": 12},
        ViTConfig(image_size=64),
        Dinov2Config(hidden_size=48, num_attention_heads=4),
    ],
)
def test_round_trip_through_files(tmp_path, vision_config):
    config = ReSTRConfig(
        vision_config=vision_config,
        text_config={"vocab_size": 77},
        fusion_type="vanilla",
        share_fusion_layers=True,
        attend_to_padding=False,
    )
    config.save_pretrained(tmp_path)
    for reloaded in (ReSTRConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(reloaded) is ReSTRConfig
        assert type(reloaded.vision_config) is type(config.vision_config)
        assert {**reloaded.to_dict(), "_name_or_path": ""} == config.to_dict()
    assert json.loads((tmp_path / "config.json").read_text())["text_config"]["vocab_size"] == 77


def test_parts_load_from_the_whole(tmp_path):
    ReSTRConfig(vision_config={"patch_size": 8}, text_config={"vocab_size": 77}).save_pretrained(tmp_path)
    assert ReSTRVisionConfig.from_pretrained(tmp_path).patch_size == 8
    assert ReSTRTextConfig.from_pretrained(tmp_path).vocab_size == 77


# Keys that Trainer, transformers, its exporters and quantizers, unsloth and users write into configs.
KEYS_OF_TOOLS = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sep_token_id": 3,
    "decoder_start_token_id": 1,
    "tie_encoder_decoder": False,
    "tokenizer_class": "PreTrainedTokenizerFast",
    "task_specific_params": {},
    "loss_type": "ForMaskedLM",
    "gradient_checkpointing": True,
    "torchscript": True,
    "use_bfloat16": False,
    "tie_word_embeddings": False,
    "quantization_config": {"quant_method": "torchao"},
    "export_model_type": "transformer",
    "unsloth_version": "2025.1",
    "transformers.js_config": {"dtype": "q8"},
    "license": "mit",
    "note": "mine",
}


@pytest.mark.parametrize("config_class", CONFIG_CLASSES)
def test_unknown_keys_are_kept_without_a_warning(tmp_path, caplog, config_class):
    config = config_class(**KEYS_OF_TOOLS)
    config.note = "changed"
    config.save_pretrained(tmp_path)
    reloaded = config_class.from_pretrained(tmp_path)
    assert {key: getattr(reloaded, key) for key in KEYS_OF_TOOLS} == {**KEYS_OF_TOOLS, "note": "changed"}
    assert [record for record in caplog.records if "did you mean" in record.message] == []


def test_folders_of_earlier_versions_load_without_a_warning(caplog):
    folder = Path(__file__).parents[1] / "examples" / "restr_mini"
    saved = json.loads((folder / "config.json").read_text())
    loaded = json.loads(ReSTRConfig.from_pretrained(folder).to_json_string())
    assert {**loaded, "transformers_version": ""} == {**saved, "transformers_version": ""}
    assert caplog.records == []


@pytest.mark.parametrize("config_class", CONFIG_CLASSES)
@pytest.mark.parametrize("key", ["validate", "to_dict", "validate_architecture"])
def test_keys_that_are_methods_are_refused(tmp_path, config_class, key):
    message = (
        rf"{config_class.__name__}: expected keys that are not methods of a config, got \['{key}'\]. Rename them."
    )
    with pytest.raises(ValueError, match=message):
        config_class(**{key: 1})
    config_class().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        config_class.from_pretrained(tmp_path, **{key: 1})
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(saved | {key: 1}))
    with pytest.raises(ValueError, match=message):
        config_class.from_pretrained(tmp_path)


def hints(caplog):
    """The single warning that was logged."""
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    return record.message


@pytest.mark.parametrize("config_class", CONFIG_CLASSES)
def test_likely_misspellings_are_named(tmp_path, caplog, config_class):
    config = config_class(num_atention_heads=4, intermediatesize=8)
    assert config.num_atention_heads == 4
    message = hints(caplog)
    assert "`num_atention_heads` (did you mean `num_attention_heads`?)" in message
    assert "`intermediatesize` (did you mean `intermediate_size`?)" in message
    caplog.clear()
    config_class().save_pretrained(tmp_path)
    config_class.from_pretrained(tmp_path, initialiser_range=0.1)
    assert "initializer_range" in hints(caplog)


@pytest.mark.parametrize(
    ("values", "field"),
    [
        (
            {"vision_config": {"patchsize": 8}},
            "ReSTRVisionConfig has no field `patchsize` (did you mean `patch_size`?)",
        ),
        ({"text_config": {"vocabulary_size": 8}}, "`vocab_size`"),
        ({"image_size": 384}, "`image_size` (did you mean `vision_config.image_size`?)"),
        ({"vocab_sizes": 384}, "`text_config.vocab_size`"),
        ({"vision_config": ViTConfig(), "encoder_strid": 8}, "`vision_config.encoder_stride`"),
    ],
)
def test_fields_of_the_parts_are_named(caplog, values, field):
    ReSTRConfig(**values)
    assert field in hints(caplog)


def test_vision_configs_of_transformers_keep_their_own_rules(caplog):
    config = ReSTRConfig(vision_config={"model_type": "vit", "num_hidden_layer": 3, "hidden_dropout_prob": 1.0})
    assert config.vision_config.num_hidden_layer == 3
    assert caplog.records == []


@pytest.mark.parametrize("config_class", CONFIG_CLASSES)
def test_keys_of_transformers_are_accepted(config_class):
    config = config_class(
        attn_implementation="eager", dtype="float16", id2label={0: "referred"}, output_hidden_states=True
    )
    assert (config._attn_implementation, config.num_labels) == ("eager", 1)
    assert config.to_dict()["dtype"] == "float16"


COUNTS = [
    (ReSTRVisionConfig, "num_channels"),
    (ReSTRVisionConfig, "image_size"),
    (ReSTRVisionConfig, "patch_size"),
    (ReSTRTextConfig, "vocab_size"),
    (ReSTRTextConfig, "projection_dim"),
    (ReSTRTextConfig, "max_position_embeddings"),
    (ReSTRConfig, "num_fusion_layers"),
    *((part, "num_hidden_layers") for part in (ReSTRVisionConfig, ReSTRTextConfig)),
    *((each, name) for each in CONFIG_CLASSES for name in ("hidden_size", "num_attention_heads", "intermediate_size")),
]
NUMBERS = {
    "attention_dropout": [-0.1, 1, 2, math.nan, math.inf],
    "layer_norm_eps": [-1e-5, 0, math.nan, math.inf, 10**400],
    "initializer_range": [-0.5, math.nan, math.inf, 10**400],
    "hidden_act": ["x", ""],
}
OUT_OF_BOUNDS = [
    *((each, name, value) for each, name in COUNTS for value in (-1, 0, 10**9)),
    *((each, name, value) for each in CONFIG_CLASSES for name, values in NUMBERS.items() for value in values),
    *((ReSTRVisionConfig, "drop_path_rate", value) for value in (-0.1, 1.0, math.nan)),
    (ReSTRTextConfig, "pad_token_id", -1),
    *((ReSTRConfig, "patch_loss_weight", value) for value in (-1, math.nan, math.inf, 10**400)),
    (ReSTRConfig, "fusion_type", "couple"),
]


@pytest.mark.parametrize(("config_class", "field", "value"), OUT_OF_BOUNDS)
def test_fields_have_bounds(config_class, field, value):
    expected = rf"{config_class.__name__}: `{field}` must be .*, got {value!r}"
    with pytest.raises(ValueError, match=expected):
        config_class(**{field: value})
    with pytest.raises(ValueError, match=expected):  # how `from_pretrained` makes it
        config_class.from_dict({}, **{field: value})


@pytest.mark.parametrize("part", [ReSTRVisionConfig(), ReSTRTextConfig()])
def test_parts_that_were_changed_are_checked_again(part):
    part.num_hidden_layers = 10**9
    with pytest.raises(ValueError, match=rf"{type(part).__name__}: `num_hidden_layers` must be"):
        ReSTRConfig(**{part.base_config_key: part})
    with pytest.raises(ValueError, match=rf"{type(part).__name__}: `num_hidden_layers` must be"):
        ReSTRConfig.from_dict({}, **{part.base_config_key: part})


def test_values_in_use_are_within_bounds():
    ReSTRTextConfig(attention_dropout=0, layer_norm_eps=1, initializer_range=0, num_hidden_layers=1, vocab_size=1)
    ReSTRVisionConfig(hidden_size=6144, num_attention_heads=48, intermediate_size=24576, num_hidden_layers=48)
    ReSTRConfig(num_fusion_layers=100, share_fusion_layers=True, patch_loss_weight=0, hidden_act="silu")


def test_every_field_but_flags_and_parts_has_bounds():
    for config_class in CONFIG_CLASSES:
        tested = {name for each, name, _ in OUT_OF_BOUNDS if each is config_class}
        fields = {field.name for field in dataclasses.fields(config_class)}
        inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
        rest = {"vision_config", "text_config", "share_fusion_layers", "use_pixel_decoder", "attend_to_padding"}
        assert fields - inherited - tested <= rest


REFUSED = [
    ({"hidden_size": 50}, "multiple of `num_attention_heads`, got 50 and 12"),
    ({"vision_config": {"hidden_size": 50}}, "ReSTRVisionConfig.*got 50 and 12"),
    ({"dtype": "float99"}, "`dtype` must be a type of PyTorch, got 'float99'"),
    ({"dtype": 5}, "`dtype` must be a type of PyTorch, got 5"),
    ({"text_config": {"torch_dtype": [1]}}, r"ReSTRTextConfig: `dtype` must be a type of PyTorch, got \[1\]"),
    ({"id2label": 3}, "`id2label` must be a dict, got 3"),
    ({"vision_config": {"model_type": ["vit"]}}, r"plain ViT.*\['vit'\]"),
    ({"vision_config": {"image_size": 50}}, "multiple of `patch_size`, got 50 and 16"),
    ({"vision_config": BertConfig()}, "plain ViT.*BertConfig.*it has no `image_size`"),
    ({"text_config": {"num_attention_heads": 7}}, "got 300 and 7"),
    ({"text_config": {"pad_token_id": 12112}}, "below `vocab_size`, got 12112 and 12112"),
    ({"text_config": ReSTRVisionConfig()}, "restr_text_model"),
    ({"text_config": BertConfig()}, "restr_text_model"),
    ({"vision_config": YolosConfig()}, "detection tokens"),
]


@pytest.mark.parametrize(("values", "message"), REFUSED)
def test_values_and_parts_that_do_not_fit_are_refused(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        ReSTRConfig(**values)
    ReSTRConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        ReSTRConfig.from_pretrained(tmp_path, **values)


def test_values_given_to_from_pretrained_are_checked_together(tmp_path):
    ReSTRVisionConfig().save_pretrained(tmp_path)
    config = ReSTRVisionConfig.from_pretrained(tmp_path, image_size=210, patch_size=14, num_attention_heads=8)
    assert (config.image_size, config.patch_size, config.num_attention_heads) == (210, 14, 8)
    with pytest.raises(ValueError, match="multiple of `patch_size`, got 480 and 14"):
        ReSTRVisionConfig.from_pretrained(tmp_path, patch_size=14)


def test_unset_values_given_to_from_pretrained_follow_the_encoders(tmp_path):
    ReSTRConfig(vision_config={"hidden_size": 96}, hidden_size=48, patch_loss_weight=0.5).save_pretrained(tmp_path)
    config, unused = ReSTRConfig.from_pretrained(
        tmp_path, hidden_size=None, patch_loss_weight=None, token_type=3, return_unused_kwargs=True
    )
    assert (config.hidden_size, config.intermediate_size, config.patch_loss_weight) == (96, 192, 0.1)
    assert unused == {"token_type": 3}


def test_vision_config_of_transformers_is_kept_as_it_is():
    vision_config = DeiTConfig(image_size=64, patch_size=8)
    assert ReSTRConfig(vision_config=vision_config).vision_config is vision_config


@pytest.mark.parametrize(
    ("vision_config", "message"),
    [
        (
            {"model_type": "vit_mae", "mask_ratio": 0.0},
            "ViTMAEConfig.*shuffles its patches.*`ViTModel.from_pretrained",
        ),
        ({"model_type": "siglip2_vision_model"}, "Siglip2VisionConfig.*NaFlex.*google/siglip2-base-patch16-224"),
        (
            {"model_type": "swin"},
            r"SwinConfig \('swin'\): it has several stages.* Take one that makes one token per patch",
        ),
        *(({"model_type": name}, "several stages") for name in ("swinv2", "hiera", "convnextv2", "resnet", "levit")),
        ({"model_type": "mobilevit"}, "MobileViTConfig.*no `hidden_size`"),
        ({"model_type": "vit", "image_size": [8, 32, 32]}, r"ViTConfig.*its `image_size` is \[8, 32, 32\]. Take"),
        ({"model_type": "yolos"}, "YolosConfig.*detection tokens.*Take one that"),
        ({"model_type": "vvit"}, "'restr_vision_model' or of a plain ViT.*got 'vvit'"),
        ({"model_type": "clip"}, "CLIPConfig.*Pass its `vision_config`"),
    ],
)
def test_vision_encoders_of_another_kind_are_refused_with_advice(vision_config, message):
    with pytest.raises(ValueError, match=message):
        ReSTRConfig(vision_config=vision_config)
