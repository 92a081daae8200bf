"""The recipe follows the paper's formulas, and identifies a run."""

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from tiny_training import make_model, make_processor

from modeling_restr.training.recipe import Recipe, create_optimizer, create_parameter_groups, create_scheduler


@pytest.fixture(scope="module")
def model():
    return make_model(make_processor())


def learning_rate(step, peak, max_steps):
    """The paper's: linear over the first 10 %, then polynomial with power 0.9, to 0."""
    warmup = max_steps // 10
    return peak * step / warmup if step < warmup else peak * ((max_steps - step) / (max_steps - warmup)) ** 0.9


def test_the_schedule_of_both_groups_is_the_formula(model):
    optimizer = create_optimizer(model, Recipe(max_steps=200))
    scheduler = create_scheduler(optimizer, Recipe(max_steps=200))
    rates = []
    for _ in range(201):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    expected = [[learning_rate(step, peak, 200) for peak in (1e-5, 1e-6)] for step in range(201)]
    np.testing.assert_allclose(rates, expected, rtol=1e-12, atol=0)
    assert rates[0] == rates[200] == [0, 0]
    np.testing.assert_allclose(rates[20], [1e-5, 1e-6])


def test_400000_steps_of_8_pairs_by_default():
    recipe = Recipe()
    assert (recipe.max_steps, recipe.images_per_step * recipe.expressions_per_image) == (400_000, 8)
    assert (recipe.image_size, recipe.max_words, recipe.patch_loss_weight, recipe.max_grad_norm) == (480, 20, 0.1, 0)


def test_every_parameter_is_in_one_group_with_weight_decay(model):
    groups = {group["name"]: group for group in create_parameter_groups(model)}
    vision = {id(parameter) for parameter in model.model.vision_model.parameters()}
    assert {id(parameter) for parameter in groups["vision"]["params"]} == vision
    others = {id(parameter) for parameter in model.parameters()} - vision
    assert {id(parameter) for parameter in groups["fusion and language"]["params"]} == others
    assert sum(len(group["params"]) for group in groups.values()) == len(list(model.parameters()))
    assert all(group["weight_decay"] == 5e-4 for group in groups.values())
    assert {name: group["lr"] for name, group in groups.items()} == {
        "fusion and language": 1e-5,
        "vision": pytest.approx(1e-6),
    }


def test_parameter_groups_of_wrapped_and_frozen_models(model):
    wrapped = torch.nn.ModuleDict({"_orig_mod": model})
    count = [len(group["params"]) for group in create_parameter_groups(model)]
    assert [len(group["params"]) for group in create_parameter_groups(wrapped)] == count
    model.model.vision_model.requires_grad_(False)
    try:
        assert [len(group["params"]) for group in create_parameter_groups(model)] == [count[0], 0]
        create_scheduler(create_optimizer(model))
    finally:
        model.model.vision_model.requires_grad_(True)
    with pytest.raises(ValueError, match="vision_model"):
        create_parameter_groups(torch.nn.Linear(2, 2))


@pytest.mark.numerics
def test_one_step_is_adamw_by_its_definition(model):
    """As Kingma and Ba, and Loshchilov and Hutter define it. After one step both moments are those of the gradient."""
    recipe, model = Recipe(), copy.deepcopy(model).double()
    optimizer = create_optimizer(model, recipe)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    optimizer.step()
    for name, parameter in model.named_parameters():
        rate = 1e-6 if "vision_model" in name else 1e-5
        expected = before[name] * (1 - rate * 5e-4) - rate * gradients[name] / (gradients[name].abs() + 1e-8)
        torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=1e-12)


def test_a_run_resumes_with_its_own_recipe_only(tmp_path):
    recipe = Recipe(max_steps=10, dataset="squares", expressions_per_image=4)
    recipe.save(tmp_path)
    Recipe(max_steps=10, dataset="squares", expressions_per_image=4).check_same(tmp_path)
    with pytest.raises(ValueError, match=r"expressions_per_image: 4 there, 1 now\n  seed: 42 there, 7 now"):
        Recipe(max_steps=10, dataset="squares", seed=7).check_same(tmp_path)


def test_a_run_resumes_with_its_own_data_only(tmp_path, caplog):
    Recipe(dataset="squares", data_fingerprint="abc").save(tmp_path)
    Recipe(dataset="copy", split="all", data_fingerprint="abc").check_same(tmp_path)
    assert not caplog.records
    with pytest.raises(ValueError, match="data_fingerprint: abc there, def now"):
        Recipe(dataset="squares", data_fingerprint="def").check_same(tmp_path)
    Recipe(dataset="squares").check_same(tmp_path)
    assert "no fingerprint was taken" in caplog.text
    with pytest.raises(ValueError, match="dataset: squares there, copy now"):
        Recipe(dataset="copy").check_same(tmp_path)


def test_a_stream_resumes_with_the_same_processes_and_workers_only(tmp_path):
    Recipe(stream="workers: 2").save(tmp_path)
    Recipe(stream="workers: 2").check_same(tmp_path)
    with pytest.raises(ValueError, match="stream: workers: 2 there, workers: 3 now"):
        Recipe(stream="workers: 3").check_same(tmp_path)
    Recipe().save(tmp_path)  # as earlier versions did for a stream
    Recipe(stream="workers: 3").check_same(tmp_path)


def test_a_recipe_of_another_version_is_read(tmp_path, caplog):
    @dataclass(frozen=True)
    class LaterRecipe(Recipe):
        label_smoothing: float = 0.0

    Recipe(seed=7).save(tmp_path)
    LaterRecipe(seed=7).check_same(tmp_path)
    with pytest.raises(ValueError, match=r"label_smoothing: 0.0 there, 0.1 now"):
        LaterRecipe(seed=7, label_smoothing=0.1).check_same(tmp_path)
    LaterRecipe(seed=7, label_smoothing=0.1).save(tmp_path)
    caplog.clear()
    Recipe(seed=7).check_same(tmp_path)
    assert "['label_smoothing']" in caplog.text


@pytest.mark.parametrize("content", ["null", "[]", "1", '"x"', "", "{", "[" * 10**5, "\xff", None])
def test_a_damaged_recipe_is_reported(tmp_path, content):
    if content is not None:
        (tmp_path / "recipe.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"Expected a training script's recipe in .*recipe.json, got .*Choose"):
        Recipe().check_same(tmp_path)


def test_deviations_from_the_paper():
    assert Recipe(dataset="squares", split="small", seed=3, stream="workers: 2").deviations() == {}
    assert Recipe(learning_rate=3e-5, precision="bfloat16").deviations() == {
        "learning_rate": (1e-5, 3e-5),
        "precision": ("float32", "bfloat16"),
    }


def test_a_warm_up_is_shorter_than_the_run():
    assert [Recipe(max_steps=25, warmup_steps=steps).num_warmup_steps for steps in (0, 0.1, 7)] == [0, 3, 7]
    for options in ({"max_steps": 1}, {"max_steps": 10, "warmup_steps": 10}, {"max_steps": 0, "warmup_steps": 0}):
        with pytest.raises(ValueError, match=r"fewer steps of warm-up.* Choose more steps, or warmup_steps=0\.$"):
            Recipe(**options)
