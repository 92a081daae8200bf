import contextlib
import inspect
import itertools
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numerics import algebra, assert_close, assert_rounding_explains, assert_same_gradients, gradients
from safetensors.torch import load_file, save_file
from tiny_models import (
    FUSION_TYPES,
    NUM_WORDS,
    TINY_VISION,
    images,
    masks,
    tiny_config,
    tiny_model,
    words,
)
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, AttentionMaskInterface, Dinov2Config, Trainer, TrainingArguments
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel

from modeling_restr import (
    ReSTRConfig,
    ReSTRForImageSegmentation,
    ReSTRModel,
    ReSTRTextModel,
    ReSTRVisionConfig,
    ReSTRVisionModel,
    build_tokenizer,
)
from modeling_restr.modeling_restr import (
    ReSTRAttention,
    ReSTRDropPath,
    ReSTREncoderLayer,
    ReSTRMLP,
    ReSTRPixelDecoder,
)


@contextlib.contextmanager
def counted_calls(module: torch.nn.Module):
    """Record the batch size of every call of `module`."""
    batch_sizes = []
    handle = module.register_forward_hook(lambda module, args, output: batch_sizes.append(args[0].shape[0]))
    yield batch_sizes
    handle.remove()


# One image, many sentences


IMAGE_INDICES = {
    "one image": (1, 4, None),
    "an image each": (3, 3, None),
    "one image given": (1, 3, [0, 0, 0]),
    "permuted": (3, 3, [2, 0, 1]),
    "repeated": (2, 5, [1, 0, 0, 1, 1]),
    "an image without expression": (3, 2, [2, 0]),
}


@algebra
@pytest.mark.parametrize("source", ["pixel_values", "vision_embeds", "get_image_features"])
@pytest.mark.parametrize("case", IMAGE_INDICES)
def test_many_expressions_equal_single_calls(case, source):
    num_images, num_expressions, image_indices = IMAGE_INDICES[case]
    model = tiny_model()
    pixel_values, input_ids, labels = images(num_images), words(num_expressions), masks(num_expressions)
    about = image_indices or (list(range(num_images)) if num_images > 1 else [0] * num_expressions)

    singles = [
        model(pixel_values=pixel_values[[image]], input_ids=input_ids[[row]], labels=labels[[row]])
        for row, image in enumerate(about)
    ]
    torch.stack([single.loss for single in singles]).mean().backward()
    expected_gradients = gradients(model)

    inputs = {"pixel_values": pixel_values}
    if source != "pixel_values":
        features = model.get_image_features(pixel_values)
        inputs = {"vision_embeds": features if source == "get_image_features" else features.pooler_output}
    if image_indices is not None:
        inputs["image_indices"] = image_indices
    outputs = model(**inputs, input_ids=input_ids, labels=labels)
    outputs.loss.backward()

    assert_close(outputs.logits, torch.cat([single.logits for single in singles]))
    assert_close(outputs.patch_logits, torch.cat([single.patch_logits for single in singles]))
    assert_close(outputs.text_embeds, torch.cat([single.text_embeds for single in singles]))
    assert_close(outputs.vision_embeds[about], torch.cat([single.vision_embeds for single in singles]))
    assert_same_gradients(gradients(model), expected_gradients)


def test_the_image_is_encoded_once():
    model = tiny_model()
    inputs = {"input_ids": words(5), "image_indices": torch.tensor([0, 1, 1, 1, 0])}
    with counted_calls(model.model.vision_model) as calls:
        model(pixel_values=images(2), **inputs)
        assert calls == [2]
        features = model.get_image_features(images(2))
        assert calls == [2, 2]
        model(vision_embeds=features, **inputs)
        model(vision_embeds=features.pooler_output, **inputs)
        assert calls == [2, 2]
    with counted_calls(model.model.fusion.visual_projection) as calls:
        model(pixel_values=images(2), **inputs)
    assert calls == [2]


def test_base_model_is_the_model_without_pixel_decoder():
    model = tiny_model()
    inputs = {"pixel_values": images(2), "input_ids": words(3), "image_indices": torch.tensor([1, 0, 1])}
    outputs, base_outputs = model(**inputs), model.model(**inputs)
    torch.testing.assert_close(base_outputs.patch_logits, outputs.patch_logits, rtol=0, atol=0)
    assert base_outputs.image_indices.tolist() == [1, 0, 1]
    assert base_outputs.patch_embeds.shape == (3, 16, 36)
    assert base_outputs.projected_vision_embeds.shape == (2, 16, 36)


# Pixel decoder


def straightforward_decoder(decoder, projected_vision_embeds, patch_embeds, patch_logits, image_indices, patch_size):
    """Concatenate, then upsample before each channel map, as in the paper."""
    masked = patch_logits.flatten(1)[..., None] * patch_embeds
    hidden_states = torch.cat([projected_vision_embeds[image_indices], masked], dim=2).transpose(1, 2)
    hidden_states = hidden_states.reshape(len(patch_logits), -1, *patch_logits.shape[1:])
    target = [side * patch_size for side in patch_logits.shape[1:]]
    for block, layer in enumerate(decoder.layers):
        size = target if block == len(decoder.layers) - 1 else [2 * side for side in hidden_states.shape[2:]]
        hidden_states = F.interpolate(hidden_states, size=size, mode="bilinear", align_corners=True)
        hidden_states = F.leaky_relu(F.conv2d(hidden_states, layer.weight[..., None, None]), 0.01)
    return F.conv2d(hidden_states, decoder.head.weight[..., None, None])[:, 0]


@algebra
@pytest.mark.parametrize(("patch_size", "num_blocks"), [(16, 4), (8, 3), (14, 4), (4, 2)])
def test_decoder_maps_then_upsamples_with_the_same_numbers(patch_size, num_blocks):
    torch.manual_seed(0)
    config = tiny_config({"patch_size": patch_size, "image_size": 4 * patch_size})
    decoder = ReSTRPixelDecoder(config).double()
    assert len(decoder.layers) == num_blocks
    arguments = [torch.randn(shape, dtype=torch.float64) for shape in [(2, 12, 36), (3, 12, 36), (3, 3, 4)]]
    arguments = [argument.requires_grad_() for argument in arguments]
    image_indices = torch.tensor([1, 0, 1])
    results = []
    for decode in (decoder, lambda *args: straightforward_decoder(decoder, *args, patch_size)):
        logits = decode(*arguments, image_indices)
        weights = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view_as(logits)
        results.append([logits, *torch.autograd.grad((weights * logits).sum(), [*arguments, *decoder.parameters()])])
    assert results[0][0].shape == (3, 3 * patch_size, 4 * patch_size)
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, bound=1e-12)


@algebra
@pytest.mark.parametrize("num_samples_at_a_time", [0, 2, 5, 9])
@torch.no_grad()
def test_mlp_in_parts_gives_the_same_numbers(num_samples_at_a_time):
    config = tiny_config()
    mlp = ReSTRMLP(config).double()
    mlp.intermediate_values = num_samples_at_a_time * 12 * config.intermediate_size
    hidden_states = torch.randn(5, 12, config.hidden_size, dtype=torch.float64)
    with torch.enable_grad():
        whole = mlp(hidden_states).detach()
    assert_close(mlp(hidden_states), whole, bound=1e-12)


@algebra
@pytest.mark.parametrize("patch_size", [(16, 16), (14, 14), (16, 4), (1, 1)])
@pytest.mark.parametrize("strip_values", [1, 2**10, 2**20])
@torch.no_grad()
def test_decoder_in_strips_gives_the_same_numbers(patch_size, strip_values):
    config = tiny_config({"patch_size": max(patch_size), "image_size": 4 * max(patch_size)})
    decoder = ReSTRPixelDecoder(config).double()
    decoder.patch_size, decoder.strip_values = patch_size, strip_values
    arguments = [torch.randn(shape, dtype=torch.float64) for shape in [(2, 12, 36), (3, 12, 36), (3, 3, 4)]]
    image_indices = torch.tensor([1, 0, 1])
    with torch.enable_grad():
        whole = decoder(*(argument.requires_grad_() for argument in arguments), image_indices).detach()
    logits = decoder(*arguments, image_indices)
    assert logits.shape == (3, 3 * patch_size[0], 4 * patch_size[1])
    assert_close(logits, whole, bound=1e-12)


@algebra
@torch.no_grad()
def test_decoder_in_strips_takes_what_hooks_return():
    decoder = ReSTRPixelDecoder(tiny_config({"patch_size": 16, "image_size": 64})).double()
    for module in [*decoder.layers, decoder.head]:
        module.register_forward_hook(lambda module, args, output: output + 1)
    arguments = [torch.randn(shape, dtype=torch.float64) for shape in [(1, 16, 36), (2, 16, 36), (2, 4, 4)]]
    image_indices = torch.tensor([0, 0])
    with torch.enable_grad():
        whole = decoder(*arguments, image_indices).detach()
    assert_close(decoder(*arguments, image_indices), whole, bound=1e-12)


def test_decoder_does_the_work_of_the_coarse_grid_and_the_image_part_once():
    config = tiny_config({"patch_size": 16, "image_size": 64})
    decoder, dim, num_patches, num_expressions = ReSTRPixelDecoder(config), 36, 16, 5
    arguments = [torch.randn(1, num_patches, dim), torch.randn(num_expressions, num_patches, dim)]
    with FlopCounterMode(display=False) as counter:
        decoder(*arguments, torch.randn(num_expressions, 4, 4), torch.zeros(num_expressions, dtype=torch.long))
    # Each map runs on the grid before its upsampling: 4, 8, 16, 32 wide; the head on the pixels.
    per_sentence = dim * dim * 4**2 + dim * (dim // 2) * 8**2 + (dim // 2) * (dim // 4) * 16**2
    per_sentence += (dim // 4) * (dim // 8) * 32**2 + (dim // 8) * 64**2
    assert counter.get_total_flops() == 2 * (dim * dim * num_patches + num_expressions * per_sentence)


# Padding


def fuse(model, text_embeds, attention_mask):
    features = model.get_image_features(images(1)).pooler_output.flatten(1, 2)
    indices = torch.zeros(len(text_embeds), dtype=torch.long)
    return model.model.fusion(features, text_embeds, attention_mask, indices).patch_logits


@pytest.mark.parametrize("fusion_type", FUSION_TYPES)
@torch.no_grad()
def test_padding_is_zeroed_after_its_projection_and_attended_to(fusion_type):
    model = tiny_model(fusion_type=fusion_type)
    model.model.fusion.text_projection.bias.fill_(1.0)
    text_embeds, attention_mask = torch.randn(1, NUM_WORDS, 40), torch.tensor([[0, 0, 1, 1, 1, 1]])
    _, projected = model.model.fusion.project(torch.randn(1, 16, 32), text_embeds, attention_mask)
    assert (projected[:, :2] == 0).all() and (projected[:, 2:] != 0).all()

    patch_logits = fuse(model, text_embeds, attention_mask)
    other_padding = torch.cat([torch.randn(1, 2, 40), text_embeds[:, 2:]], dim=1)
    torch.testing.assert_close(fuse(model, other_padding, attention_mask), patch_logits, rtol=0, atol=0)
    without_padding = fuse(model, text_embeds[:, 2:], attention_mask[:, 2:])
    assert (without_padding - patch_logits).abs().max() > 1e-2


@pytest.mark.parametrize("fusion_type", FUSION_TYPES)
@torch.no_grad()
def test_attended_padding_changes_the_answer(fusion_type):
    model = tiny_model(fusion_type=fusion_type)
    inputs = {"pixel_values": images(1), "input_ids": torch.tensor([[0, 0, 7, 8, 9, 10]])}
    outputs = model(**inputs)
    given = model(**inputs, attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1]]))
    torch.testing.assert_close(given.logits, outputs.logits, rtol=0, atol=0)
    one_word_less = model(**inputs, attention_mask=torch.tensor([[0, 0, 0, 1, 1, 1]]))
    assert (one_word_less.logits - outputs.logits).abs().max() > 1e-2
    # The language encoder attends to every slot, regardless of the mask.
    torch.testing.assert_close(one_word_less.text_embeds, outputs.text_embeds, rtol=0, atol=0)
    model.get_input_embeddings().weight[0] += 1.0
    assert (model(**inputs).text_embeds[:, 2:] - outputs.text_embeds[:, 2:]).abs().max() > 1e-2


@pytest.mark.parametrize("num_words", [1, NUM_WORDS - 1])
def test_another_padding_length_is_refused_where_padding_counts(num_words):
    with pytest.raises(ValueError, match=f"have {num_words} word slots.*must be padded to {NUM_WORDS} slots"):
        tiny_model()(pixel_values=images(1), input_ids=torch.full((1, num_words), 5))


@algebra
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("fusion_type", FUSION_TYPES)
@torch.no_grad()
def test_unattended_padding_does_not_change_the_answer(fusion_type, attn_implementation):
    model = tiny_model(fusion_type=fusion_type, attend_to_padding=False)
    model.set_attn_implementation(attn_implementation)
    input_ids = torch.tensor([[0, 0, 0, 7, 8, 9], [0, 0, 0, 0, 0, 11], [0, 0, 0, 0, 12, 13]])
    expected = model(pixel_values=images(1), input_ids=input_ids)
    for num_words in (3, 4, 5):
        outputs = model(pixel_values=images(1), input_ids=input_ids[:, -num_words:])
        assert_close(outputs.logits, expected.logits)
        assert_close(outputs.text_embeds[:, -1], expected.text_embeds[:, -1])
    model.get_input_embeddings().weight[0] += 1.0
    assert_close(model(pixel_values=images(1), input_ids=input_ids).logits, expected.logits)
    # The words themselves still count.
    model.get_input_embeddings().weight[12] += 1.0
    changed = model(pixel_values=images(1), input_ids=input_ids).logits
    assert_close(changed[:2], expected.logits[:2])
    assert (changed[2] - expected.logits[2]).abs().max() > 1e-2


# Attention implementations


@algebra
@pytest.mark.parametrize("attend_to_padding", [True, False])
@pytest.mark.parametrize("fusion_type", FUSION_TYPES)
def test_eager_and_sdpa_agree(fusion_type, attend_to_padding):
    model = tiny_model(fusion_type=fusion_type, attend_to_padding=attend_to_padding)
    results = []
    for attn_implementation in ("eager", "sdpa"):
        model.set_attn_implementation(attn_implementation)
        outputs = model(pixel_values=images(1), input_ids=words(3), labels=masks(3))
        outputs.loss.backward()
        results.append((outputs.logits, gradients(model)))
    assert_close(results[1][0], results[0][0])
    assert_same_gradients(results[1][1], results[0][1])


@pytest.mark.numerics
@pytest.mark.parametrize(
    ("fusion_type", "attend_to_padding", "attn_implementation"),
    [*((kind, True, "sdpa") for kind in FUSION_TYPES), ("coupled", False, "sdpa"), ("coupled", True, "eager")],
)
def test_float32_differs_by_rounding_alone(fusion_type, attend_to_padding, attn_implementation):
    model = tiny_model(fusion_type=fusion_type, attend_to_padding=attend_to_padding)
    model.set_attn_implementation(attn_implementation)

    def compute(model, pixel_values):
        outputs = model(pixel_values=pixel_values, input_ids=words(3), labels=masks(3))
        outputs.loss.backward()
        return {"logits": outputs.logits, "loss": outputs.loss, **gradients(model)}

    assert_rounding_explains(compute, model, images(5)[:1])  # no input of a LeakyReLU is within reach of 0


@algebra
@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("attend_to_padding", [True, False])
@torch.no_grad()
def test_flex_attention_agrees(attend_to_padding):
    model = tiny_model(attend_to_padding=attend_to_padding)
    inputs = {"pixel_values": images(1), "input_ids": words(3)}
    expected = model(**inputs).logits
    model.set_attn_implementation("flex_attention")
    # Without compilation, which takes half a minute; there is no backward pass on a CPU.
    with torch.compiler.set_stance("force_eager"):
        assert_close(model(**inputs).logits, expected)


@pytest.fixture
def recording_attention():
    """A registered attention function that records the module and the keyword arguments of every call."""
    calls = []

    def attention(module, *args, **kwargs):
        calls.append((module, kwargs))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, *args, **kwargs)

    AttentionInterface.register("recording", attention)
    AttentionMaskInterface.register("recording", sdpa_mask)
    yield calls
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop("recording")


@pytest.mark.parametrize("values", [{}, {"fusion_type": "vanilla"}, {"share_fusion_layers": True}])
@torch.no_grad()
def test_every_attention_goes_through_the_registry_with_all_arguments(recording_attention, values):
    model = tiny_model(**values)
    inputs = {"pixel_values": images(1), "input_ids": words(2)}
    expected = model(**inputs).logits
    model.set_attn_implementation("recording")
    torch.testing.assert_close(model(**inputs, an_argument="given").logits, expected, rtol=0, atol=0)
    attentions = [module for module in model.modules() if isinstance(module, ReSTRAttention)]
    assert {id(module) for module, _ in recording_attention} == {id(module) for module in attentions}
    num_encoders = 1 if values.get("fusion_type") == "vanilla" else 2
    assert len(recording_attention) == 2 + 2 + 2 * num_encoders
    assert all(kwargs["an_argument"] == "given" for _, kwargs in recording_attention)
    assert not any(module.is_causal for module in attentions)


@torch.no_grad()
def test_hidden_states_and_attentions_of_the_fusion():
    model = tiny_model()
    model.set_attn_implementation("eager")
    inputs = {"pixel_values": images(1), "input_ids": words(2)}
    outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
    num_tokens = 16 + NUM_WORDS
    lengths = [num_tokens] * 2 + [NUM_WORDS + 1] * 2
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(2, 4, n, n) for n in lengths]
    for weights in outputs.attentions:
        torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:3]))
    assert [state.shape[1] for state in outputs.hidden_states] == [num_tokens, *lengths]
    projected = model.model(**inputs).projected_vision_embeds
    torch.testing.assert_close(outputs.hidden_states[0][:, :16], projected.expand(2, -1, -1), rtol=0, atol=0)
    # The coupled patches get no LayerNorm: they are the second block's output.
    patches = model.model.fusion.patch_projection(outputs.hidden_states[2][:, :16])
    torch.testing.assert_close(patches, model.model(**inputs).patch_embeds, rtol=0, atol=0)


# Training


# The oldest supported transformers does not know the method's new name.
@algebra
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant):
    results = []
    for checkpointing in (False, True):
        model = tiny_model({"drop_path_rate": 0.3}).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        runs: list[int] = []
        for layer in (module for module in model.modules() if hasattr(module, "self_attn")):
            layer.self_attn.register_forward_pre_hook(lambda *args, runs=runs: runs.append(1))
        torch.manual_seed(1)
        # Reentrant checkpoints need an input with a gradient, which Trainer provides.
        model.enable_input_require_grads()
        loss = model(pixel_values=images(3), input_ids=words(3), labels=masks(3)).loss
        loss.backward()
        results.append((loss, gradients(model), len(runs)))
    (loss, expected, num_runs), (checkpointed_loss, actual, num_checkpointed_runs) = results
    assert (num_runs, num_checkpointed_runs) == (8, 16)
    torch.testing.assert_close(checkpointed_loss, loss, rtol=0, atol=0)
    assert_same_gradients(actual, expected)


def test_drop_path_rates_rise_linearly():
    config = ReSTRVisionConfig(**{**TINY_VISION, "num_hidden_layers": 5, "drop_path_rate": 0.2})
    rates = [layer.drop_path.rate for layer in ReSTRVisionModel(config).layers]
    np.testing.assert_allclose(rates, [0.0, 0.05, 0.1, 0.15, 0.2], atol=1e-7)


def test_drop_path_keeps_the_expectation():
    torch.manual_seed(0)
    drop_path = ReSTRDropPath(0.3).train()
    branch = torch.ones(20000, 2, 3)
    dropped = drop_path(branch)
    assert (dropped == dropped[:, :1, :1]).all()  # whole samples
    kept = dropped[dropped != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / 0.7))
    assert abs((dropped[:, 0, 0] == 0).float().mean().item() - 0.3) < 0.015  # over four standard deviations
    assert drop_path.eval()(branch) is branch


@torch.no_grad()
def test_drop_path_is_on_both_branches_and_in_training_only():
    model = tiny_model({"drop_path_rate": 0.5, "num_hidden_layers": 2})
    layer, hidden_states = model.model.vision_model.layers[1], torch.randn(400, 3, 32)
    attended, _ = layer.self_attn(layer.layer_norm1(hidden_states))
    evaluated = layer(hidden_states)
    torch.manual_seed(0)
    trained = layer.train()(hidden_states)
    # A sample has lost both branches, one of them or none; those that stay are twice as large.
    outcomes = {
        (attention, mlp): hidden_states + attention * attended for attention, mlp in itertools.product((0, 2), (0, 2))
    }
    outcomes = {key: after + key[1] * layer.mlp(layer.layer_norm2(after)) for key, after in outcomes.items()}
    matches = {
        key: torch.isclose(trained, outcome, rtol=1e-4, atol=1e-4).all(dim=2).all(dim=1)
        for key, outcome in outcomes.items()
    }
    assert (sum(match.int() for match in matches.values()) == 1).all()
    assert all(60 < match.sum() < 140 for match in matches.values())
    torch.testing.assert_close(layer.eval()(hidden_states), evaluated, rtol=0, atol=0)
    assert all(
        layer.drop_path.rate == 0 for layer in model.model.fusion.modules() if isinstance(layer, ReSTREncoderLayer)
    )


@pytest.mark.numerics
@pytest.mark.parametrize("mode", ["weights", "autocast"])
def test_bfloat16_is_finite_and_near_float32(mode):
    model = tiny_model()
    inputs = {"pixel_values": images(2), "input_ids": words(2), "labels": masks(2)}
    expected = model(**inputs)
    expected.loss.backward()
    expected_gradients = gradients(model)
    if mode == "weights":
        model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        outputs = model(**inputs)
    outputs.loss.backward()
    assert outputs.logits.dtype == torch.bfloat16 and outputs.loss.dtype == torch.float32
    # bfloat16 has eight bits: 0.4 % per rounding.
    assert_close(outputs.patch_logits, expected.patch_logits, bound=0.1)
    assert_close(outputs.logits, expected.logits, bound=0.1)
    assert abs(outputs.loss.item() / expected.loss.item() - 1) < 0.05
    for name, gradient in gradients(model).items():
        assert gradient.isfinite().all()
        if name.endswith("seed_embedding"):
            assert F.cosine_similarity(gradient.flatten().float(), expected_gradients[name].flatten(), dim=0) > 0.97


def one_step(folder, **options) -> TrainingArguments:
    return TrainingArguments(folder, max_steps=1, report_to="none", disable_tqdm=True, use_cpu=True, **options)


@algebra
def test_trainer_averages_over_accumulation_steps(tmp_path):
    dataset = [{"pixel_values": images(2)[i], "input_ids": words(2)[i], "labels": masks(2)[i]} for i in range(2)]
    weights = []
    for batch_size, accumulation_steps in ((2, 1), (1, 2)):
        model = tiny_model({"drop_path_rate": 0.0})
        options = {"learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0.0, "save_strategy": "no"}
        arguments = one_step(
            tmp_path,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation_steps,
            **options,
        )
        Trainer(model, arguments, train_dataset=dataset).train()
        weights.append({name: weight.detach() for name, weight in model.named_parameters()})
    start = dict(tiny_model({"drop_path_rate": 0.0}).named_parameters())
    assert_same_gradients(
        {name: weight - start[name] for name, weight in weights[1].items()},
        {name: weight - start[name] for name, weight in weights[0].items()},
    )


def test_models_of_the_stock_trainer_load_again(tmp_path):
    """Trainer writes the ids of the tokenizer's special tokens into the configs."""
    tokenizer = build_tokenizer({word: index for index, word in enumerate(("<pad>", "<go>", "<eos>", "<unk>", "dog"))})
    tokenizer.eos_token = "<eos>"
    item = {"pixel_values": images(1)[0], "input_ids": words(1)[0], "labels": masks(1)[0]}
    model = tiny_model()
    trainer = Trainer(model, one_step(tmp_path), train_dataset=[item] * 8, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-1"):
        reloaded = ReSTRForImageSegmentation.from_pretrained(folder)
        configs = (reloaded.config.text_config, reloaded.config)  # transformers before 5.20 takes the latter
        assert any(getattr(config, "eos_token_id", None) == 2 for config in configs)
        assert all(weight.equal(model.state_dict()[name]) for name, weight in reloaded.state_dict().items())


# Compilation and export


@algebra
@pytest.mark.parametrize(
    ("values", "case"),
    [
        ({}, "pixel_values"),
        ({"fusion_type": "vanilla"}, "labels"),
        ({"attend_to_padding": False}, "image_indices"),
        ({"fusion_type": "independent"}, "vision_embeds"),
        (
            {"vision_config": Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=56)},
            "labels",
        ),
    ],
)
def test_compiles_without_a_graph_break(values, case):
    model = tiny_model(**values)
    inputs = {"pixel_values": images(1, *[model.config.vision_config.image_size] * 2), "input_ids": words(3)}
    if case == "labels":
        inputs["labels"] = masks(3)
    if case == "image_indices":
        inputs.update(pixel_values=images(2), image_indices=torch.tensor([1, 0, 1]))
    if case == "vision_embeds":
        inputs["vision_embeds"] = model.get_image_features(inputs.pop("pixel_values")).pooler_output.detach()
    expected = model(**inputs)
    torch.compiler.reset()
    outputs = torch.compile(model, fullgraph=True, backend="eager")(**inputs)
    assert_close(outputs.logits, expected.logits)
    if case == "labels":
        expected.loss.backward()
        expected_gradients = gradients(model)
        outputs.loss.backward()
        assert_same_gradients(gradients(model), expected_gradients)


@algebra
@torch.no_grad()
def test_exports_with_any_number_of_images_and_expressions():
    model = tiny_model()
    inputs = {"pixel_values": images(2), "input_ids": words(3), "image_indices": torch.tensor([1, 0, 1])}
    num_images, num_expressions = torch.export.Dim("num_images", max=64), torch.export.Dim("num_expressions", max=64)
    program = torch.export.export(
        model,
        args=(),
        kwargs=inputs,
        dynamic_shapes={
            "pixel_values": {0: num_images},
            "input_ids": {0: num_expressions},
            "image_indices": {0: num_expressions},
        },
        strict=False,
    )
    more = {"pixel_values": images(3), "input_ids": words(5), "image_indices": torch.tensor([2, 0, 1, 1, 0])}
    for batch in (inputs, more):
        assert_close(program.module()(**batch).logits, model(**batch).logits)


# Sizes


@algebra
@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 24), (16, 32)])
@torch.no_grad()
def test_positions_are_interpolated_to_any_grid(height, width):
    model = tiny_model()
    embeddings = model.model.vision_model.embeddings
    outputs = model(pixel_values=images(1, height, width), input_ids=words(2), interpolate_pos_encoding=True)
    assert outputs.logits.shape == (2, height, width)
    assert outputs.patch_logits.shape == (2, height // 8, width // 8)

    grid = embeddings.position_embeddings[0, 1:].T.reshape(1, 32, 4, 4)
    grid = F.interpolate(grid, size=(height // 8, width // 8), mode="bilinear", align_corners=False)
    patches = embeddings.patch_embedding(images(1, height, width))
    expected = (patches + grid).flatten(2).transpose(1, 2)
    assert_close(embeddings(images(1, height, width))[:, 1:], expected)
    class_token = embeddings.class_embedding + embeddings.position_embeddings[:, :1]
    assert_close(embeddings(images(1, height, width))[:, :1], class_token)


@pytest.mark.parametrize("size", [(48, 24), (16, 64), (48, 48)])  # 16 x 64 has as many patches as the config's square
@torch.no_grad()
def test_features_know_their_grid(size):
    model = tiny_model()
    inputs = {"input_ids": words(2)}
    expected = model(pixel_values=images(1, *size), interpolate_pos_encoding=True, **inputs)
    features = model.get_image_features(images(1, *size), interpolate_pos_encoding=True)
    assert features.pooler_output.shape == (1, size[0] // 8, size[1] // 8, 32)
    of_the_pass = (expected.vision_embeds, expected.vision_model_output)
    for vision_embeds in (features, features.to_tuple(), features.pooler_output, *of_the_pass):
        outputs = model(vision_embeds=vision_embeds, **inputs)
        torch.testing.assert_close(outputs.logits, expected.logits, rtol=0, atol=0)
    assert expected.logits.shape == (2, *size)


def test_flat_features_are_refused():
    model = tiny_model()
    features = model.get_image_features(images(1))
    flat = r"tensor of shape \(images, rows.*32\), got \(1, 16, 32\).*does not tell its grid.*unflatten"
    for wrong, message in (
        (features.pooler_output.flatten(1, 2), flat),
        (features.last_hidden_state[:, 1:], flat),
        (features.pooler_output[0], r"got \(4, 4, 32\)"),
        (features.pooler_output[..., :5], r"got \(1, 4, 4, 5\)"),
        (features.pooler_output[:, :0], r"got \(1, 0, 4, 32\)"),
        (model.model.vision_model(images(1)), r"got \(1, 32\)"),  # the encoder's own, with its class token
        (BaseModelOutput(last_hidden_state=features.last_hidden_state), "got NoneType"),
        ((features.pooler_output,), "got tuple"),
        (features.pooler_output.long(), "floating-point numbers, got torch.int64"),
    ):
        for each in (model, model.model):
            with pytest.raises(ValueError, match=message):
                each(vision_embeds=wrong, input_ids=words(2))


# Losses


def binary_cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    probabilities = 1 / (1 + np.exp(-logits))
    return float(-np.mean(labels * np.log(probabilities) + (1 - labels) * np.log(1 - probabilities)))


def resize_align_corners(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear interpolation that maps corner pixels to corner pixels."""
    rows, columns = np.linspace(0, image.shape[0] - 1, height), np.linspace(0, image.shape[1] - 1, width)
    along_columns = np.stack([np.interp(columns, np.arange(image.shape[1]), row) for row in image])
    return np.stack([np.interp(rows, np.arange(image.shape[0]), column) for column in along_columns.T], axis=1)


def patch_labels(labels: np.ndarray, grid_height: int, grid_width: int) -> np.ndarray:
    """1 where any pixel whose area meets the patch is 1."""
    height, width = labels.shape
    result = np.zeros((grid_height, grid_width))
    for row, column in itertools.product(range(grid_height), range(grid_width)):
        top, left = row * height // grid_height, column * width // grid_width
        bottom, right = -(-(row + 1) * height // grid_height), -(-(column + 1) * width // grid_width)
        result[row, column] = labels[top:bottom, left:right].any()
    return result


@algebra
@pytest.mark.parametrize(("height", "width"), [(32, 32), (50, 45), (20, 64)])
@pytest.mark.parametrize("values", [{}, {"patch_loss_weight": 0.7}, {"use_pixel_decoder": False}])
@torch.no_grad()
def test_losses_agree_with_numpy(values, height, width):
    model = tiny_model(**values)
    noise = torch.rand(3, height, width, generator=torch.Generator().manual_seed(0))
    labels = (noise < 8 / (height * width)).long()  # half a positive pixel per patch
    outputs = model(pixel_values=images(1), input_ids=words(3), labels=labels)
    logits, patch_logits, targets = (x.double().numpy() for x in (outputs.logits, outputs.patch_logits, labels))
    resized = np.stack([resize_align_corners(image, height, width) for image in logits])
    loss_pixel = binary_cross_entropy(resized, targets)
    positive = np.stack([patch_labels(label, 4, 4) for label in targets])
    assert 0.1 < positive.mean() < 0.9
    loss_patch = binary_cross_entropy(patch_logits, positive)
    weight = values.get("patch_loss_weight", 0.0 if "use_pixel_decoder" in values else 0.1)
    np.testing.assert_allclose(outputs.loss_pixel, loss_pixel, rtol=1e-10)
    np.testing.assert_allclose(outputs.loss_patch, loss_patch, rtol=1e-10)
    np.testing.assert_allclose(outputs.loss, loss_pixel + weight * loss_patch, rtol=1e-10)


def test_coarse_models_return_their_patch_logits():
    model = tiny_model(use_pixel_decoder=False)
    outputs = model(pixel_values=images(1), input_ids=words(2))
    assert outputs.logits is outputs.patch_logits
    assert not any(name.startswith("pixel_decoder") for name in model.state_dict())


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32])
def test_labels_of_any_dtype(dtype):
    model, inputs = tiny_model(), {"pixel_values": images(1), "input_ids": words(2)}
    expected = model(**inputs, labels=masks(2)).loss
    torch.testing.assert_close(model(**inputs, labels=masks(2).to(dtype)).loss, expected, rtol=0, atol=0)


# Weights


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"share_fusion_layers": True, "num_fusion_layers": 3},
        {"fusion_type": "vanilla", "use_pixel_decoder": False},
        {"fusion_type": "independent", "attend_to_padding": False},
    ],
)
@torch.no_grad()
def test_save_and_load(tmp_path, values):
    model = tiny_model(**values)
    model.save_pretrained(tmp_path)
    parts = ("configuration", "image_reading", "modeling", "pipeline", "requirements", "vision_encoder")
    code = {f"{name}_restr.py" for name in parts}
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"} | code
    reloaded = ReSTRForImageSegmentation.from_pretrained(tmp_path)
    inputs = {"pixel_values": images(1), "input_ids": words(2)}
    torch.testing.assert_close(reloaded(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)
    assert reloaded.state_dict().keys() == model.state_dict().keys()
    base = ReSTRModel.from_pretrained(tmp_path)
    torch.testing.assert_close(base(**inputs).patch_logits, model(**inputs).patch_logits, rtol=0, atol=0)


def test_a_shared_layer_is_applied_repeatedly():
    shared, single = (
        tiny_model(share_fusion_layers=share, num_fusion_layers=1 + 2 * share) for share in (True, False)
    )
    assert shared.num_parameters() == single.num_parameters()
    with counted_calls(shared.model.fusion.layers[0]) as calls, torch.no_grad():
        shared(pixel_values=images(1), input_ids=words(2))
    assert calls == [2, 2, 2]


@pytest.mark.numerics
@torch.no_grad()
def test_half_precision_round_trip(tmp_path):
    model = tiny_model().half()
    model.save_pretrained(tmp_path)
    reloaded, state_dict = ReSTRForImageSegmentation.from_pretrained(tmp_path), model.state_dict()
    for name, tensor in reloaded.state_dict().items():
        assert tensor.dtype == torch.float16
        assert tensor.equal(state_dict[name])
    single = ReSTRForImageSegmentation.from_pretrained(tmp_path, dtype=torch.float32)
    inputs = {"pixel_values": images(1), "input_ids": words(2)}
    assert single.dtype == torch.float32
    assert_close(reloaded(**inputs).logits, single(**inputs).logits, bound=0.02)


@pytest.mark.parametrize(("encoder", "name"), [(ReSTRVisionModel, "vision_model"), (ReSTRTextModel, "text_model")])
def test_an_encoder_loads_its_part_of_a_whole_model(tmp_path, encoder, name):
    model = tiny_model()
    model.save_pretrained(tmp_path / "whole")
    expected = getattr(model.model, name).state_dict()
    for folder in ("whole", "part"):
        part, info = encoder.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(info.values())
        assert part.state_dict().keys() == expected.keys()
        assert all(weight.equal(expected[key]) for key, weight in part.state_dict().items())
        part.save_pretrained(tmp_path / "part")
        assert load_file(tmp_path / "part" / "model.safetensors").keys() == expected.keys()


def change_weights(folder, change) -> None:
    """Rewrite the weights of a saved model with `change`, which edits the dict of them."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


UNEXPECTED = [
    "model.extra",
    "model.text_model.layers.2.mlp.fc1.weight",
    "model.vision_model.layer_norm.wieght",
    "pixel_decoder.layers.9.weight",
    "head.weight",
]


@pytest.mark.parametrize("values", [{}, {"use_pixel_decoder": False}])
def test_unexpected_weights_are_reported(tmp_path, values):
    tiny_model(**values).save_pretrained(tmp_path)
    change_weights(tmp_path, lambda weights: weights.update({name: torch.ones(2) for name in UNEXPECTED}))
    _, info = ReSTRForImageSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["unexpected_keys"]) == set(UNEXPECTED)
    # The base model leaves the decoder aside, and nothing else.
    _, info = ReSTRModel.from_pretrained(tmp_path, output_loading_info=True)
    assert {name.removeprefix("model.") for name in info["unexpected_keys"]} == {
        name.removeprefix("model.") for name in UNEXPECTED if not name.startswith("pixel_decoder.")
    }


def test_layers_and_decoders_that_the_config_does_not_ask_for_are_reported(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    config = tiny_config(text_config={"num_hidden_layers": 1}, use_pixel_decoder=False)
    _, info = ReSTRForImageSegmentation.from_pretrained(tmp_path, config=config, output_loading_info=True)
    beyond = ("model.text_model.layers.1.", "pixel_decoder.")
    assert set(info["unexpected_keys"]) == {name for name in model.state_dict() if name.startswith(beyond)}
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        ReSTRForImageSegmentation.from_pretrained(tmp_path, config=tiny_config(text_config={"vocab_size": 60}))


@pytest.mark.parametrize(("encoder", "name"), [(ReSTRVisionModel, "vision_model"), (ReSTRTextModel, "text_model")])
def test_an_encoder_reports_missing_and_unexpected_names_of_its_part(tmp_path, encoder, name):
    tiny_model().save_pretrained(tmp_path)

    def rename(weights):
        weights[f"model.{name}.layer_norm.wieght"] = weights.pop(f"model.{name}.layer_norm.weight")

    change_weights(tmp_path, rename)
    _, info = encoder.from_pretrained(tmp_path, output_loading_info=True)
    assert (info["unexpected_keys"], info["missing_keys"]) == ({"layer_norm.wieght"}, {"layer_norm.weight"})


@pytest.mark.parametrize("width", [48, 192])
@torch.no_grad()
def test_new_pixel_decoders_keep_the_scale_of_their_input(width):
    torch.manual_seed(0)
    decoder = tiny_model(hidden_size=width, initializer_range=0.02).pixel_decoder
    inputs = (torch.randn(4, 16, width), torch.randn(4, 16, width), torch.randn(4, 4, 4), torch.arange(4))
    assert 0.002 < decoder(*inputs).std() < 1


@algebra
@torch.no_grad()
def test_linear_layers_can_be_replaced():
    """Adapters and quantisers replace them, and rely on the model to call each `nn.Linear` as a module."""

    class Replaced(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.weight, self.bias = linear.weight, linear.bias

        def forward(self, values):
            return F.linear(values, self.weight, self.bias)

    model = tiny_model()
    inputs = {"pixel_values": images(1), "input_ids": words(2)}
    expected = model(**inputs).logits
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            model.set_submodule(name, Replaced(module))
    assert_close(model(**inputs).logits, expected)


def test_meta_tensors_go_through_and_labels_follow_the_logits():
    with torch.device("meta"):
        model = tiny_model()
        inputs = {"pixel_values": torch.empty(2, 3, 32, 32), "input_ids": torch.empty(3, NUM_WORDS, dtype=torch.long)}
        inputs["image_indices"] = torch.empty(3, dtype=torch.long)
    outputs = model(**inputs, labels=masks(3))  # labels on the CPU, as with a model on several devices
    assert outputs.logits.shape == (3, 32, 32) and outputs.loss.is_meta


# Parameters of one module are in different sets, so that each is missing once and loaded once.
@pytest.mark.parametrize(
    "missing",
    [
        {
            "model.vision_model.embeddings.class_embedding": 0.2,
            "model.vision_model.layers.0.self_attn.q_proj.weight": 0.2,
            "model.fusion.seed_embedding": 0.2,
            "model.fusion.patch_projection.weight": 96**-0.5,
        },
        {
            "model.vision_model.embeddings.position_embeddings": 0.2,
            "model.text_model.embeddings.embed_tokens.weight": 0.2,
            "model.fusion.classifier_projection.weight": 96**-0.5,
            "pixel_decoder.layers.0.weight": (3 * 192) ** -0.5,
        },
    ],
)
@torch.no_grad()
def test_missing_weights_are_initialised_and_the_others_left_alone(tmp_path, missing):
    vision = {"hidden_size": 96, "num_attention_heads": 4, "image_size": 64}
    model = tiny_model(vision, hidden_size=96)
    for weight in model.parameters():
        weight.fill_(7.0)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if name not in missing}
    assert len(kept) == len(weights) - len(missing)
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    state_dict = ReSTRForImageSegmentation.from_pretrained(tmp_path).state_dict()
    for name, std in missing.items():
        values = state_dict[name]
        if name.endswith("embed_tokens.weight"):
            assert (values[0] == 0).all()  # padding
            values = values[1:]
        # Bounds at four standard deviations of the estimate; truncation at two takes 12 %.
        assert 0.8 - 3 * values.numel() ** -0.5 < values.std() / std < 1.1 + 3 * values.numel() ** -0.5, name
        assert abs(values.mean()) < 4 * std * values.numel() ** -0.5, name
    for name in kept:
        assert (state_dict[name] == 7.0).all(), name


@torch.no_grad()
def test_text_positions_are_sinusoids_of_the_last_slots():
    model = tiny_model()
    table = model.model.text_model.embeddings.position_embeddings
    for position, channel in itertools.product(range(NUM_WORDS), range(24)):
        angle = position / 10000 ** (2 * (channel // 2) / 24)
        expected = np.cos(angle) if channel % 2 else np.sin(angle)
        assert abs(table[position, channel].item() - expected) < 1e-6
    assert not any("position_embeddings" in name for name in model.model.text_model.state_dict())
    short = model.model.text_model.embeddings(words(1)[:, -2:])
    torch.testing.assert_close(short, model.model.text_model.embeddings(words(1))[:, -2:], rtol=0, atol=0)


# Interface


@torch.no_grad()
def test_tuples_are_returned_on_request():
    model, inputs = tiny_model(), {"pixel_values": images(1), "input_ids": words(2), "labels": masks(2)}
    expected = model(**inputs).to_tuple()
    as_argument = model(**inputs, return_dict=False)
    for config in (model.config, model.config.vision_config, model.config.text_config):
        config.return_dict = False
    for outputs in (as_argument, model(**inputs)):
        assert isinstance(outputs, tuple)
        torch.testing.assert_close(outputs, expected, rtol=0, atol=0)
    assert isinstance(outputs[-2], tuple) and isinstance(outputs[-1], tuple)  # the encoders'
    assert isinstance(model.get_image_features(images(1)), tuple)


def test_the_loss_function_is_left_to_transformers():
    assert ReSTRForImageSegmentation.loss_function is PreTrainedModel.loss_function


@pytest.mark.parametrize("base", [True, False])
@torch.no_grad()
def test_outputs_contain_those_of_the_encoders(base):
    model = tiny_model()
    model.set_attn_implementation("eager")
    model = model.model if base else model
    inputs = {"input_ids": words(2), "output_hidden_states": True, "output_attentions": True}
    outputs = model(pixel_values=images(1), **inputs)
    vision, text = outputs.vision_model_output, outputs.text_model_output
    assert [states.shape for states in vision.hidden_states] == [(1, 17, 32)] * 3
    assert [weights.shape for weights in vision.attentions] == [(1, 4, 17, 17)] * 2
    assert [states.shape for states in text.hidden_states] == [(2, NUM_WORDS, 24)] * 3
    assert [weights.shape for weights in text.attentions] == [(2, 4, NUM_WORDS, NUM_WORDS)] * 2
    assert vision.pooler_output.equal(outputs.vision_embeds) and text.pooler_output.equal(outputs.text_embeds)
    assert model.get_image_features(images(1)).pooler_output.equal(outputs.vision_embeds)
    assert model.get_text_features(words(2)).pooler_output.equal(outputs.text_embeds)
    assert model(vision_embeds=vision, **inputs).vision_model_output is vision
    assert model(vision_embeds=vision.pooler_output, **inputs).vision_model_output is None


def test_evaluation_gathers_the_logits_alone():
    outputs = tiny_model()(pixel_values=images(1), input_ids=words(2), labels=masks(2), output_hidden_states=True)
    assert outputs.keys() - {"loss", "logits"} <= set(ReSTRConfig.keys_to_ignore_at_inference)


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("attend_to_padding", [True, False])
def test_forward_and_backward_never_read_a_value(attend_to_padding, attn_implementation):
    """Reading a value makes the program wait for the device."""
    model = tiny_model({"drop_path_rate": 0.2}, attend_to_padding=attend_to_padding).train()
    model.set_attn_implementation(attn_implementation)
    inputs = {"input_ids": words(3), "image_indices": torch.tensor([1, 0, 1]), "labels": masks(3)}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        features = model.get_image_features(images(2))
        model(vision_embeds=features, attention_mask=(words(3) != 0).long(), **inputs).loss.backward()
        model(pixel_values=images(2), **inputs).loss.backward()
    counts = {event.key: event.count for event in profiler.key_averages()}
    assert counts["aten::linear"] > 50
    assert not counts.keys() & {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal"}


def test_bad_inputs_are_refused():
    model = tiny_model()
    embeds = torch.randn(2, 4, 4, 32)
    cases = [
        ({"input_ids": words(1)}, "exactly one of `pixel_values` and `vision_embeds`, got neither"),
        ({"pixel_values": images(1), "vision_embeds": embeds, "input_ids": words(1)}, "got both"),
        ({"pixel_values": images(1)}, "Expected `input_ids`"),
        ({"pixel_values": images(1)[0], "input_ids": words(1)}, r"\(batch, 3, height, width\), got \(3, 32, 32\)"),
        ({"pixel_values": images(1)[:, :1], "input_ids": words(1)}, r"got \(1, 1, 32, 32\)"),
        ({"pixel_values": images(1, 40, 32), "input_ids": words(1)}, "40x32 pixels, but the model expects 32x32"),
        (
            {"pixel_values": images(1, 36, 32), "input_ids": words(1), "interpolate_pos_encoding": True},
            "36x32 pixels, which patches of 8x8 do not divide",
        ),
        ({"pixel_values": images(1), "input_ids": words(1)[0]}, r"\(expressions, words\).*got \(6,\)"),
        ({"pixel_values": images(1), "input_ids": words(1)[:0]}, r"at least one expression.*got \(0, 6\)"),
        ({"pixel_values": images(1), "input_ids": torch.ones(1, 7).long()}, r"one to 6 words, got \(1, 7\)"),
        (
            {"pixel_values": images(1), "input_ids": words(2), "attention_mask": torch.ones(1, 6)},
            r"shape of `input_ids`, \(2, 6\), got \(1, 6\)",
        ),
        ({"pixel_values": images(2), "input_ids": words(3)}, "2 images and 3 expressions: pass `image_indices`"),
        (
            {"pixel_values": images(2), "input_ids": words(3), "image_indices": torch.tensor([0, 1])},
            r"shape \(3,\) with one entry per expression, got \(2,\)",
        ),
        (
            {"pixel_values": images(2), "input_ids": words(2), "image_indices": torch.tensor([0.0, 1.0])},
            "integers, got torch.float32",
        ),
        (
            {"pixel_values": images(1), "input_ids": words(2), "labels": masks(1)},
            r"with 2 expressions, got \(1, 32, 32\)",
        ),
        ({"pixel_values": images(1), "input_ids": words(2), "labels": masks(2)[:, None]}, r"got \(2, 1, 32, 32\)"),
    ]
    for inputs, message in cases:
        with pytest.raises(ValueError, match=message):
            model(**inputs)


@pytest.mark.parametrize("model_class", [ReSTRForImageSegmentation, ReSTRModel, ReSTRVisionModel, ReSTRTextModel])
def test_docstrings_describe_every_argument_with_an_example(model_class):
    documentation = inspect.getdoc(model_class.forward)
    for name in inspect.signature(model_class.forward).parameters:
        assert name in ("self", "kwargs") or f"{name} (`" in documentation
    assert "Returns:" in documentation and ">>> from modeling_restr import" in documentation
    assert inspect.getdoc(model_class).startswith(("ReSTR", "The "))
    for method in ("forward", "get_image_features", "get_text_features"):
        # What transformers fills in for names that a model does not explain.
        assert not re.search("_class`|glossary", inspect.getdoc(getattr(model_class, method, model_class)))


@algebra
def test_any_part_may_be_offloaded_to_disk(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(pixel_values=images(2), input_ids=words(2)).logits
        for part in ("model", "pixel_decoder"):
            device_map = {"model": "cpu", "pixel_decoder": "cpu", part: "disk"}
            offloaded = ReSTRForImageSegmentation.from_pretrained(
                tmp_path, device_map=device_map, offload_folder=tmp_path / part
            )
            assert_close(offloaded(pixel_values=images(2), input_ids=words(2)).logits, expected)


@pytest.mark.numerics
def test_sinusoidal_table_is_computed_in_float32_whatever_the_dtype():
    expected = tiny_model().model.text_model.embeddings.position_embeddings
    model = ReSTRForImageSegmentation._from_config(tiny_config(), dtype=torch.bfloat16)
    assert_close(model.model.text_model.embeddings.position_embeddings.float(), expected, 2**-8)
