"""Vision encoders of transformers in ReSTR, and models with pretrained ones."""

import copy
import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_close
from safetensors.torch import load_file, save_file
from tiny_models import FUSION_TYPES, SIZES, images, masks, tiny_config, tiny_model, words
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    CONFIG_MAPPING,
    MODEL_MAPPING,
    AutoModel,
    BeitConfig,
    BeitModel,
    BertConfig,
    BertModel,
    CLIPModel,
    CLIPVisionConfig,
    DeiTConfig,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
)

from modeling_restr import ReSTRConfig, ReSTRForImageSegmentation, ReSTRModel, ReSTRVisionModel


SIGLIP = SiglipVisionConfig(**SIZES, image_size=32, patch_size=16)
VISION_CONFIGS = {  # config and number of prefix tokens
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
    "siglip": (SIGLIP, 0),
    "dinov3": (DINOv3ViTConfig(**SIZES, image_size=32, patch_size=8, num_register_tokens=2), 3),
    "beit": (BeitConfig(**SIZES, image_size=32, patch_size=8, use_relative_position_bias=True), 1),
}
UNUSED = {  # parameters that no patch token depends on
    "vit": {"pooler.dense.weight", "pooler.dense.bias"},
    "deit": {"pooler.dense.weight", "pooler.dense.bias"},
    "dinov2": {"embeddings.mask_token"},
    "dinov2_with_registers": {"embeddings.mask_token"},
    "clip": {"post_layernorm.weight", "post_layernorm.bias"},
    "siglip": {name for name in SiglipVisionModel(SIGLIP).state_dict() if name.startswith("head.")},
    "dinov3": {"embeddings.mask_token"},
    "beit": {"pooler.layernorm.weight", "pooler.layernorm.bias"},
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
    encoder.load_state_dict(model.model.vision_model.state_dict())
    tokens = encoder(foreign_images(model)).last_hidden_state
    features = model.get_image_features(foreign_images(model))
    torch.testing.assert_close(
        features.pooler_output.flatten(1, 2), tokens[:, VISION_CONFIGS[name][1] :], rtol=0, atol=0
    )
    outputs = model(pixel_values=foreign_images(model), input_ids=words(2))
    size, patch_size = model.config.vision_config.image_size, model.config.vision_config.patch_size
    assert outputs.logits.shape == (2, size, size)
    assert outputs.patch_logits.shape == (2, size // patch_size, size // patch_size)


@pytest.mark.parametrize("name", VISION_CONFIGS)
@torch.no_grad()
def test_each_patch_token_is_that_of_its_patch(name):
    """A change of one patch of the image changes its token the most."""
    model = foreign_model(name)
    pixel_values, side = foreign_images(model, 2), model.config.vision_config.patch_size
    grid = pixel_values.shape[2] // side
    tokens = model.get_image_features(pixel_values).pooler_output.flatten(1, 2)
    for row, column in itertools.product(range(grid), repeat=2):
        changed = pixel_values.clone()
        changed[:, :, row * side : (row + 1) * side, column * side : (column + 1) * side] = 2.0
        difference = (model.get_image_features(changed).pooler_output.flatten(1, 2) - tokens).norm(dim=2)
        assert difference.argmax(dim=1).tolist() == [row * grid + column] * 2


# Unused parameters


def frozen(model: ReSTRForImageSegmentation) -> set[str]:
    return {name for name, weight in model.model.vision_model.named_parameters() if not weight.requires_grad}


@pytest.mark.parametrize("name", ["restr", *VISION_CONFIGS])
@pytest.mark.parametrize("fusion_type", FUSION_TYPES)
def test_every_parameter_gets_a_gradient_or_is_frozen(name, fusion_type):
    model = tiny_model(fusion_type=fusion_type) if name == "restr" else foreign_model(name, fusion_type=fusion_type)
    labels = masks(2, *[model.config.vision_config.image_size] * 2)
    model.train()(pixel_values=foreign_images(model, 2), input_ids=words(2), labels=labels).loss.backward()
    assert {name for name, weight in model.named_parameters() if weight.grad is None} == {
        f"model.vision_model.{name}" for name in UNUSED.get(name, ())
    }
    assert frozen(model) == UNUSED.get(name, set())


@pytest.mark.parametrize("name", ["vit", "siglip"])
def test_unused_parameters_stay_frozen(tmp_path, name):
    model = foreign_model(name)
    model.save_pretrained(tmp_path)
    loaded = ReSTRForImageSegmentation.from_pretrained(tmp_path)
    half = ReSTRForImageSegmentation.from_pretrained(tmp_path, dtype=torch.bfloat16)
    base = ReSTRForImageSegmentation(model.config)
    base.model = ReSTRModel.from_pretrained(tmp_path)
    thawed = copy.deepcopy(model).requires_grad_(True)
    for each in (loaded, half, base, thawed.train(), copy.deepcopy(model)):
        assert frozen(each) == UNUSED[name]
    with torch.device("meta"):
        assert frozen(foreign_model(name)) == UNUSED[name]
    with torch.inference_mode():
        assert frozen(foreign_model(name)) == UNUSED[name]
    encoder = AutoModel.from_config(copy.deepcopy(VISION_CONFIGS[name][0]))
    assert model.model.vision_model.state_dict().keys() == encoder.state_dict().keys()


@pytest.mark.parametrize("name", VISION_CONFIGS)
def test_checkpoints_without_unused_parameters_load_without_a_warning(tmp_path, caplog, name):
    """Earlier versions did not save them."""
    model = foreign_model(name)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    for unused in UNUSED[name]:
        del weights[f"model.vision_model.{unused}"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    caplog.clear()
    for model_class in (ReSTRForImageSegmentation, ReSTRModel):
        loaded, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"] and not info["mismatched_keys"]
        assert all(weight.isfinite().all() for weight in loaded.parameters())
    assert "MISSING" not in caplog.text


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("name", ["clip", "dinov3"])
def test_gradient_checkpointing_leaves_no_parameter_out(name):
    model = foreign_model(name).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    labels = masks(2, *[model.config.vision_config.image_size] * 2)
    model(pixel_values=foreign_images(model, 2), input_ids=words(2), labels=labels).loss.backward()
    assert [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None] == []


def train_distributed(rank: int, folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for name in names:
        model = DistributedDataParallel(ReSTRForImageSegmentation.from_pretrained(folder / name).train())
        size = model.module.config.vision_config.image_size
        for _ in range(3):  # a parameter without gradient stops the second
            inputs = {"pixel_values": images(1 + rank, size, size), "input_ids": words(1 + rank)}
            model(**inputs, labels=masks(1 + rank, size, size)).loss.backward()
            torch.optim.SGD(model.parameters(), lr=0.1).step()
            model.zero_grad()
        weights = [torch.zeros(1) for _ in range(2)]
        torch.distributed.all_gather(
            weights, sum(weight.detach().double().sum() for weight in model.parameters())[None].float()
        )
        assert weights[0] == weights[1], name
        del model, weights
    torch.distributed.barrier()  # else gloo may still hold tensors, which it cannot release while its group is destroyed
    torch.distributed.destroy_process_group()


def test_two_processes_train_without_looking_for_unused_parameters(tmp_path):
    names = ["clip", "siglip", "dinov2"]
    for name in names:
        foreign_model(name).save_pretrained(tmp_path / name)
    torch.multiprocessing.spawn(train_distributed, (tmp_path, names), nprocs=2)


@pytest.mark.parametrize("name", ["restr", *VISION_CONFIGS])
def test_layers_that_are_not_split_exist_and_contain_no_word_vectors(name):
    """FSDP wraps the modules of every named class, and the word vectors separately."""
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
def test_foreign_encoders_take_other_sizes_on_request(name):
    model = foreign_model(name)
    size = 2 * model.config.vision_config.image_size
    pixel_values = images(1, size, size // 2)
    outputs = model(pixel_values=pixel_values, input_ids=words(1), interpolate_pos_encoding=True)
    assert outputs.logits.shape == (1, size, size // 2)
    with pytest.raises(ValueError, match=f"have {size}x{size // 2} pixels.*interpolate_pos_encoding=True"):
        model(pixel_values=pixel_values, input_ids=words(1))


REFUSED = {
    "vitdet": {**SIZES, "image_size": 32, "patch_size": 8},
    "sam_vision_model": {**SIZES, "image_size": 64, "global_attn_indexes": []},
    "pixtral": {**SIZES, "head_dim": 8, "image_size": 32, "patch_size": 8},
    "videomae": {**SIZES, "image_size": 32, "patch_size": 8},
    "idefics3_vision": {**SIZES, "image_size": 32, "patch_size": 8},
    "owlvit_vision_model": {**SIZES, "image_size": 32, "patch_size": 8},
}


@pytest.mark.parametrize("name", REFUSED)
def test_encoders_without_one_token_per_patch_are_refused(name):
    with pytest.raises(
        ValueError, match=rf"must be a plain ViT, got a \w+ \('{name}'\): .*Take one that makes one token"
    ):
        tiny_model(CONFIG_MAPPING[name](**REFUSED[name]))


# Start from a pretrained vision encoder


def assert_same_weights(actual: torch.nn.Module, expected: torch.nn.Module) -> None:
    weights = expected.state_dict()
    assert actual.state_dict().keys() == weights.keys()
    assert all(weight.equal(weights[name]) for name, weight in actual.state_dict().items())


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


def test_dtype_and_attention_apply_to_the_whole_model(tmp_path):
    save_encoder(ViTModel, VISION_CONFIGS["vit"][0], tmp_path)
    options = {"dtype": torch.bfloat16, "attn_implementation": "eager"}
    model = ReSTRForImageSegmentation.from_vision_pretrained(tmp_path, **options)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16} == {model.dtype}
    configs = [model.config, model.config.vision_config, model.config.text_config, model.model.vision_model.config]
    assert {config._attn_implementation for config in configs} == {"eager"}


@pytest.mark.parametrize("name", ["deit", "dinov2", "clip", "siglip", "dinov3", "beit"])
@torch.no_grad()
def test_other_encoders_keep_their_class(tmp_path, name):
    config, _ = VISION_CONFIGS[name]
    encoder = save_encoder(MODEL_MAPPING[type(config)], config, tmp_path)
    model = ReSTRForImageSegmentation.from_vision_pretrained(tmp_path)
    assert type(model.model.vision_model) is type(encoder)
    assert frozen(model) == UNUSED[name]
    assert_same_weights(model.model.vision_model, encoder)
    assert model(pixel_values=foreign_images(model), input_ids=torch.ones(1, 20, dtype=torch.long)).logits.ndim == 3


@pytest.mark.numerics
@pytest.mark.parametrize("name", ["vit", "deit", "clip", "siglip"])
@torch.no_grad()
def test_pretrained_positions_are_resized_to_the_image_size(tmp_path, name):
    config, num_prefix_tokens = VISION_CONFIGS[name]
    encoder = save_encoder(MODEL_MAPPING[type(config)], config, tmp_path)
    model = ReSTRForImageSegmentation.from_vision_pretrained(tmp_path, image_size=48)
    assert model.config.vision_config.image_size == 48
    assert model(pixel_values=images(1, 48, 48), input_ids=torch.ones(1, 20, dtype=torch.long)).logits.shape[1] == 48
    (positions,), (resized,) = (
        [weight for name, weight in each.state_dict().items() if "position_embedding" in name]
        for each in (encoder, model.model.vision_model)
    )
    assert positions.ndim == resized.ndim
    positions, side = positions.view(-1, 32), 32 // config.patch_size
    grid = positions[num_prefix_tokens:].T.reshape(1, 32, side, side)
    grid = F.interpolate(grid, size=[48 // config.patch_size] * 2, mode="bilinear", align_corners=False)
    expected = torch.cat([positions[:num_prefix_tokens], grid[0].flatten(1).T])
    # Resizing runs in float32: sums of four products, with weights of 23 bits.
    assert_close(resized.view(-1, 32), expected, bound=1e-6)


@pytest.mark.numerics
@torch.no_grad()
def test_rotary_positions_need_no_resizing_and_relative_ones_allow_none(tmp_path):
    encoder = save_encoder(DINOv3ViTModel, VISION_CONFIGS["dinov3"][0], tmp_path / "dinov3")
    model = ReSTRForImageSegmentation.from_vision_pretrained(tmp_path / "dinov3", image_size=48)
    pixel_values = images(1, 48, 48).double()
    tokens = encoder.double()(pixel_values).last_hidden_state
    assert_close(model.double().get_image_features(pixel_values).pooler_output.flatten(1, 2), tokens[:, 3:])
    save_encoder(BeitModel, VISION_CONFIGS["beit"][0], tmp_path / "beit")
    with pytest.raises(ValueError, match=r"resize '.*relative_position_bias_table' from .* Leave `image_size`"):
        ReSTRForImageSegmentation.from_vision_pretrained(tmp_path / "beit", image_size=48)


@pytest.mark.parametrize(("model_class", "name"), [(CLIPModel, "clip"), (SiglipModel, "siglip")])
@torch.no_grad()
def test_a_model_with_two_encoders_gives_its_vision_encoder(tmp_path, model_class, name):
    """CLIP, SigLIP and SigLIP 2 of fixed size are published in this form."""
    text_config = {**SIZES, "vocab_size": 10, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    vision_config = VISION_CONFIGS[name][0].to_dict()
    whole = save_encoder(
        model_class, model_class.config_class(text_config=text_config, vision_config=vision_config), tmp_path
    )
    model = ReSTRForImageSegmentation.from_vision_pretrained(tmp_path)
    assert type(model.model.vision_model) is type(whole.vision_model)
    assert_same_weights(model.model.vision_model, whole.vision_model)


@torch.no_grad()
def test_another_restr_gives_its_vision_encoder(tmp_path):
    whole = tiny_model()
    whole.save_pretrained(tmp_path)
    model = ReSTRForImageSegmentation.from_vision_pretrained(tmp_path)
    assert_same_weights(model.model.vision_model, whole.model.vision_model)


@pytest.mark.numerics
@torch.no_grad()
def test_weights_of_masked_autoencoders_load_as_a_plain_vit(tmp_path):
    config = ViTMAEConfig(
        **SIZES,
        image_size=32,
        patch_size=8,
        decoder_hidden_size=32,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=4,
    )
    encoder = save_encoder(ViTMAEForPreTraining, config, tmp_path / "mae")
    with pytest.raises(
        ValueError, match=r"ViTMAEConfig.*shuffles its patches.*`ViTModel.from_pretrained\(...\)\.save"
    ):
        ReSTRForImageSegmentation.from_vision_pretrained(tmp_path / "mae")
    ViTModel.from_pretrained(tmp_path / "mae", add_pooling_layer=False).save_pretrained(tmp_path / "vit")
    model = ReSTRForImageSegmentation.from_vision_pretrained(tmp_path / "vit")
    encoder.config.mask_ratio = 0.0
    noise = torch.arange(16.0)[None]  # patches in order
    pixel_values = images(1).double()
    tokens = encoder.double().vit(pixel_values, noise=noise).last_hidden_state
    assert_close(model.double().get_image_features(pixel_values).pooler_output.flatten(1, 2), tokens[:, 1:])


@pytest.mark.parametrize("size", [{}, {"hidden_size": 24}])
def test_unset_widths_follow_the_loaded_encoder(tmp_path, size):
    save_encoder(ViTModel, ViTConfig(**{**SIZES, "hidden_size": 40}, image_size=32, patch_size=8), tmp_path)
    config = ReSTRConfig(fusion_type="vanilla", **size)
    model = ReSTRForImageSegmentation.from_vision_pretrained(tmp_path, config)
    width = size.get("hidden_size", 40)
    assert (model.config.hidden_size, model.config.intermediate_size) == (width, 4 * width)
    assert model.config.num_attention_heads == (12 if size else 4)
    assert model.model.fusion.visual_projection.weight.shape == (width, 40)
    assert model(pixel_values=images(1), input_ids=torch.ones(1, 20, dtype=torch.long)).logits.shape == (1, 32, 32)


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


def test_unusable_pretrained_encoders_are_refused(tmp_path):
    save_encoder(ViTModel, VISION_CONFIGS["vit"][0], tmp_path / "vit")
    with pytest.raises(ValueError, match=r"positive multiple of the patch size \(8, 8\), got 50"):
        ReSTRForImageSegmentation.from_vision_pretrained(tmp_path / "vit", image_size=50)
    save_encoder(SiglipVisionModel, SiglipVisionConfig(**SIZES, image_size=36, patch_size=8), tmp_path / "siglip")
    with pytest.raises(ValueError, match=r"`image_size`.*multiple of the patch size \(8, 8\), got 36"):
        ReSTRForImageSegmentation.from_vision_pretrained(tmp_path / "siglip")  # its own, as that of so400m-patch14-384
    ReSTRForImageSegmentation.from_vision_pretrained(tmp_path / "siglip", image_size=40)
    weights = load_file(tmp_path / "vit" / "model.safetensors")
    dropped = next(name for name in weights if "1" in name and name.endswith("layernorm_after.weight"))
    save_file(
        {k: v for k, v in weights.items() if k != dropped}, tmp_path / "vit" / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match=r"missing.*layernorm_after.weight"):
        ReSTRForImageSegmentation.from_vision_pretrained(tmp_path / "vit")
    bert_config = BertConfig(**SIZES, vocab_size=30)
    BertModel(bert_config).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"plain ViT, got a BertConfig.*it has no `image_size`"):
        ReSTRForImageSegmentation.from_vision_pretrained(tmp_path / "bert")
    with pytest.raises(OSError, match="no_such_folder"):
        ReSTRForImageSegmentation.from_vision_pretrained(tmp_path / "no_such_folder")


def test_the_first_blocks_of_an_encoder_make_a_model_that_loads_again(tmp_path):
    """A backbone's config names the stages of the remaining blocks."""
    save_encoder(Dinov2Model, Dinov2Config(**SIZES, image_size=32, patch_size=8), tmp_path / "encoder")
    fewer = SIZES["num_hidden_layers"] - 1
    model = ReSTRForImageSegmentation.from_vision_pretrained(tmp_path / "encoder", num_hidden_layers=fewer)
    model.save_pretrained(tmp_path / "model")
    reloaded = ReSTRForImageSegmentation.from_pretrained(tmp_path / "model")
    assert len(reloaded.model.vision_model.encoder.layer) == reloaded.config.vision_config.num_hidden_layers == fewer
