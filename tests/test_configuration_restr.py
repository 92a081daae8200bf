import json

import pytest
from transformers import AutoConfig, BertConfig, DeiTConfig, Dinov2Config, ViTConfig, YolosConfig

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


def test_fusion_follows_the_vision_encoder_unless_told():
    vision_config = {"hidden_size": 96, "num_attention_heads": 12}
    assert ReSTRConfig(vision_config=vision_config).hidden_size == 96
    assert ReSTRConfig(vision_config=vision_config).intermediate_size == 384
    assert ReSTRConfig(vision_config=vision_config, hidden_size=48, intermediate_size=50).intermediate_size == 50
    assert ReSTRConfig(vision_config=vision_config, hidden_size=48).vision_config.hidden_size == 96


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


@pytest.mark.parametrize("config_class", CONFIG_CLASSES)
def test_unknown_keys_are_refused(config_class):
    with pytest.raises(ValueError, match=r"num_atention_heads.*check their spelling.*num_attention_heads"):
        config_class(num_atention_heads=4)


def test_unknown_keys_of_the_parts_are_refused():
    with pytest.raises(ValueError, match="patchsize"):
        ReSTRConfig(vision_config={"patchsize": 8})
    with pytest.raises(ValueError, match="vocabulary_size"):
        ReSTRConfig(text_config={"vocabulary_size": 8})


@pytest.mark.parametrize("config_class", CONFIG_CLASSES)
def test_keys_of_transformers_are_accepted(config_class):
    config = config_class(
        attn_implementation="eager", dtype="float16", id2label={0: "referred"}, output_hidden_states=True
    )
    assert (config._attn_implementation, config.num_labels) == ("eager", 1)
    assert config.to_dict()["dtype"] == "float16"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fusion_type": "couple"}, r"'coupled', 'independent', 'vanilla'.*got 'couple'"),
        ({"num_fusion_layers": 0}, "1 or more, got 0"),
        ({"hidden_size": 50}, "multiple of `num_attention_heads`, got 50 and 12"),
        ({"vision_config": {"hidden_size": 50}}, "ReSTRVisionConfig.*got 50 and 12"),
        ({"vision_config": {"image_size": 50}}, "multiple of `patch_size`, got 50 and 16"),
        ({"vision_config": {"drop_path_rate": 1.0}}, r"in \[0, 1\), got 1.0"),
        ({"vision_config": {"model_type": "vvit"}}, "'vvit'.*expected 'restr_vision_model'"),
        ({"vision_config": BertConfig()}, "plain ViT.*BertConfig has no `image_size`"),
        ({"text_config": {"num_attention_heads": 7}}, "got 300 and 7"),
        ({"text_config": {"pad_token_id": 12112}}, "below `vocab_size`, got 12112 and 12112"),
    ],
)
def test_values_that_do_not_fit_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        ReSTRConfig(**values)


def test_vision_config_of_transformers_is_kept_as_it_is():
    vision_config = DeiTConfig(image_size=64, patch_size=8)
    assert ReSTRConfig(vision_config=vision_config).vision_config is vision_config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text_config": {"model_type": "bert"}}, "restr_text_model"),
        ({"text_config": ReSTRVisionConfig()}, "restr_text_model"),
        ({"text_config": {"max_position_embeddings": 0}}, "max_position_embeddings"),
        ({"patch_loss_weight": -1}, "patch_loss_weight"),
        ({"vision_config": YolosConfig()}, "detection tokens"),
    ],
)
def test_parts_of_another_kind_and_values_out_of_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        ReSTRConfig(**values)
