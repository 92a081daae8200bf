"""Vision encoders of transformers in ReSTR, and models that start from pretrained ones."""

import copy

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_close
from safetensors.torch import load_file, save_file
from tiny_models import FUSION_TYPES, SIZES, images, masks, tiny_config, tiny_model, words
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    CLIPVisionConfig,
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    SiglipVisionConfig,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from modeling_restr import ReSTRForImageSegmentation, ReSTRVisionModel


VISION_CONFIGS = {  # and the number of prefix tokens
    "vit": (ViTConfig(**SIZES, image_size=32, patch_size=8), 1),
    "deit": (DeiTConfig(**SIZES, image_size=32, patch_size=8), 2),
    "dinov2": (Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=56), 1),
    "dinov2_with_registers": (
        Dinov2WithRegistersConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
            num_register_tokens=3,
        ),
        4,
    ),
    "clip": (CLIPVisionConfig(**SIZES, image_size=32, patch_size=16), 1),
    "siglip": (SiglipVisionConfig(**SIZES, image_size=32, patch_size=16), 0),
}


def foreign_model(name: str, **values) -> ReSTRForImageSegmentation:
    return tiny_model(copy.deepcopy(VISION_CONFIGS[name][0]), **values)


def foreign_images(model: ReSTRForImageSegmentation, count: int = 1) -> torch.Tensor:
    return images(count, *[model.config.vision_config.image_size] * 2)


@pytest.mark.parametrize("name", VISION_CONFIGS)
@torch.no_grad()
def test_patch_tokens_are_those_of_the_encoder_without_its_prefix(name):
    model = foreign_model(name)
    encoder = AutoModel.from_config(copy.deepcopy(VISION_CONFIGS[name][0])).eval()
    encoder.load_state_dict(model.model.vision_model.state_dict(), strict=False)
    tokens = encoder(foreign_images(model)).last_hidden_state
    features = model.get_image_features(foreign_images(model))
    torch.testing.assert_close(
        features.pooler_output.flatten(1, 2), tokens[:, VISION_CONFIGS[name][1] :], rtol=0, atol=0
    )
    outputs = model(pixel_values=foreign_images(model), input_ids=words(2))
    size, patch_size = model.config.vision_config.image_size, model.config.vision_config.patch_size
    assert outputs.logits.shape == (2, size, size)
    assert outputs.patch_logits.shape == (2, size // patch_size, size // patch_size)


@pytest.mark.parametrize("name", ["restr", "vit", "deit", "dinov2", "dinov2_with_registers"])
@pytest.mark.parametrize("fusion_type", FUSION_TYPES)
def test_every_parameter_gets_a_gradient(name, fusion_type):
    model = tiny_model(fusion_type=fusion_type) if name == "restr" else foreign_model(name, fusion_type=fusion_type)
    labels = masks(2, *[model.config.vision_config.image_size] * 2)
    model.train()(pixel_values=foreign_images(model, 2), input_ids=words(2), labels=labels).loss.backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []


@pytest.mark.parametrize("name", ["restr", *VISION_CONFIGS])
def test_layers_that_are_not_split_are_there_and_leave_the_word_vectors_to_themselves(name):
    """FSDP looks for every class that is named and wraps its modules, and then the word vectors by themselves."""
    model = tiny_model() if name == "restr" else foreign_model(name)
    parts = [model.model.text_model, model.model.fusion, model.model, model]
    for part in [model.model.vision_model, *parts] if name == "restr" else parts:
        whole = [module for module in part.modules() if type(module).__name__ in part._no_split_modules]
        assert {type(module).__name__ for module in whole} == part._no_split_modules
        assert not any(module is model.get_input_embeddings() for layer in whole for module in layer.modules())
    assert {*model.model.vision_model.modules()} & {*whole} and {*model.model.text_model.modules()} & {*whole}


@pytest.mark.parametrize("name", VISION_CONFIGS)
@torch.no_grad()
def test_foreign_encoders_reload_bit_equal(tmp_path, name):
    model = foreign_model(name)
    model.save_pretrained(tmp_path)
    reloaded = ReSTRForImageSegmentation.from_pretrained(tmp_path)
    inputs = {"pixel_values": foreign_images(model), "input_ids": words(2)}
    torch.testing.assert_close(reloaded(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)
    half = ReSTRForImageSegmentation.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    assert half(**inputs).logits.isfinite().all()


@pytest.mark.parametrize("name", ["vit", "deit", "dinov2", "dinov2_with_registers"])
@torch.no_grad()
def test_foreign_encoders_take_other_sizes_when_told(name):
    model = foreign_model(name)
    size = 2 * model.config.vision_config.image_size
    pixel_values = images(1, size, size // 2)
    outputs = model(pixel_values=pixel_values, input_ids=words(1), interpolate_pos_encoding=True)
    assert outputs.logits.shape == (1, size, size // 2)
    with pytest.raises(ValueError, match=f"have {size}x{size // 2} pixels.*interpolate_pos_encoding=True"):
        model(pixel_values=pixel_values, input_ids=words(1))


@torch.no_grad()
def test_encoders_without_patch_tokens_are_refused():
    from transformers import SwinConfig

    config = SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=2)
    with pytest.raises(ValueError, match=r"'swin'.*returned 16 tokens for 64 patches: only plain ViTs"):
        tiny_model(config)(pixel_values=images(1), input_ids=words(1))


# Start from a pretrained vision encoder


def save_encoder(model_class, config, folder, **kwargs) -> torch.nn.Module:
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    config.initializer_range = 0.2
    model = model_class(config, **kwargs).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.numerics
@pytest.mark.parametrize("model_class", [ViTModel, ViTForImageClassification])
@torch.no_grad()
def test_vit_weights_become_restr_s_own_encoder(tmp_path, model_class):
    encoder = save_encoder(model_class, VISION_CONFIGS["vit"][0], tmp_path).double()
    model = ReSTRForImageSegmentation.from_vision_pretrained(tmp_path).double()
    assert type(model.model.vision_model) is ReSTRVisionModel
    assert model.config.vision_config.drop_path_rate == 0.1
    assert (model.config.hidden_size, model.config.num_attention_heads, model.training) == (32, 4, False)
    encoder.base_model.config._attn_implementation = model.config._attn_implementation
    tokens = encoder.base_model(images(2).double()).last_hidden_state
    assert_close(model.get_image_features(images(2).double()).pooler_output.flatten(1, 2), tokens[:, 1:])
    assert model.config.vision_config.layer_norm_eps == VISION_CONFIGS["vit"][0].layer_norm_eps


def test_dtype_of_a_model_with_a_pretrained_encoder(tmp_path):
    ViTModel(ViTConfig(**SIZES, image_size=32, patch_size=8)).save_pretrained(tmp_path)
    model = ReSTRForImageSegmentation.from_vision_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16} == {model.dtype}


@pytest.mark.numerics
@pytest.mark.parametrize("name", ["deit", "dinov2"])
@torch.no_grad()
def test_other_encoders_keep_their_class(tmp_path, name):
    config, num_prefix_tokens = VISION_CONFIGS[name]
    encoder = save_encoder(DeiTModel if name == "deit" else Dinov2Model, config, tmp_path).double()
    model = ReSTRForImageSegmentation.from_vision_pretrained(tmp_path).double()
    assert type(model.model.vision_model) is type(encoder)
    pixel_values = foreign_images(model).double()
    tokens = encoder(pixel_values).last_hidden_state[:, num_prefix_tokens:]
    assert_close(model.get_image_features(pixel_values).pooler_output.flatten(1, 2), tokens)


@pytest.mark.numerics
@pytest.mark.parametrize("name", ["vit", "deit"])
@torch.no_grad()
def test_pretrained_positions_are_resized_to_the_image_size(tmp_path, name):
    config, num_prefix_tokens = VISION_CONFIGS[name]
    encoder = save_encoder(ViTModel if name == "vit" else DeiTModel, config, tmp_path)
    model = ReSTRForImageSegmentation.from_vision_pretrained(tmp_path, image_size=48)
    assert model.config.vision_config.image_size == 48
    assert model(pixel_values=images(1, 48, 48), input_ids=torch.ones(1, 20, dtype=torch.long)).logits.shape[1] == 48
    positions = encoder.embeddings.position_embeddings
    grid = positions[0, num_prefix_tokens:].T.reshape(1, 32, 4, 4)
    grid = F.interpolate(grid, size=(6, 6), mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
    resized = model.model.vision_model.embeddings.position_embeddings
    # They are resized in float32: sums of four products, with weights of 23 bits.
    assert_close(resized, torch.cat([positions[:, :num_prefix_tokens], grid], dim=1), bound=1e-6)


@torch.no_grad()
def test_pretrained_weights_go_into_the_given_config(tmp_path):
    save_encoder(ViTModel, VISION_CONFIGS["vit"][0], tmp_path, add_pooling_layer=False)
    config = tiny_config(fusion_type="vanilla", use_pixel_decoder=False)
    model = ReSTRForImageSegmentation.from_vision_pretrained(tmp_path, config)
    assert (model.config.fusion_type, model.config.text_config.vocab_size) == ("vanilla", 50)
    assert model(pixel_values=images(1), input_ids=words(2)).logits.shape == (2, 4, 4)
    assert config.vision_config.initializer_range == 0.2  # the caller's config is left as it was


@torch.no_grad()
def test_half_precision_checkpoints_start_in_the_default_dtype(tmp_path):
    for name, model_class in (("vit", ViTModel), ("dinov2", Dinov2Model)):
        save_encoder(model_class, VISION_CONFIGS[name][0], tmp_path / "full")
        model_class.from_pretrained(tmp_path / "full", dtype=torch.float16).save_pretrained(tmp_path / name)
        model = ReSTRForImageSegmentation.from_vision_pretrained(tmp_path / name, tiny_config())
        assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_bad_starts_are_refused(tmp_path):
    save_encoder(ViTModel, VISION_CONFIGS["vit"][0], tmp_path / "vit")
    with pytest.raises(ValueError, match=r"positive multiple of the patch size \(8, 8\), got 50"):
        ReSTRForImageSegmentation.from_vision_pretrained(tmp_path / "vit", image_size=50)
    weights = load_file(tmp_path / "vit" / "model.safetensors")
    dropped = next(name for name in weights if "1" in name and name.endswith("layernorm_after.weight"))
    save_file(
        {k: v for k, v in weights.items() if k != dropped}, tmp_path / "vit" / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match=r"missing.*layernorm_after.weight"):
        ReSTRForImageSegmentation.from_vision_pretrained(tmp_path / "vit")
    bert_config = BertConfig(**SIZES, vocab_size=30)
    BertModel(bert_config).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"plain ViT.*BertConfig has no `image_size`"):
        ReSTRForImageSegmentation.from_vision_pretrained(tmp_path / "bert")
    with pytest.raises(OSError, match="no_such_folder"):
        ReSTRForImageSegmentation.from_vision_pretrained(tmp_path / "no_such_folder")


def test_attention_of_the_whole_model_is_set_when_starting_from_a_vit(tmp_path):
    save_encoder(ViTModel, ViTConfig(**SIZES, image_size=32, patch_size=8), tmp_path)
    model = ReSTRForImageSegmentation.from_vision_pretrained(tmp_path, attn_implementation="eager")
    configs = [model.config, model.config.vision_config, model.config.text_config, model.model.vision_model.config]
    assert {config._attn_implementation for config in configs} == {"eager"}
