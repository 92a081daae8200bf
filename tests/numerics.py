"""
Comparison of numbers, on whatever processor the tests run.

Algebra, two ways to compute one thing, is compared in float64, in which rounding stays far below `EXACT`. Float32 is held
against a float64 run of the same model, within what its rounding can do to these very weights and inputs.
"""

import copy
import re
from collections.abc import Callable

import pytest
import torch


EXACT = 1e-10  # float64 has a precision of 1e-16; nothing here amplifies that by a million
# A rounding of float32 moves a number by up to 2**-24 of itself. There are some hundred on the way through a tiny model
# and back, and as many in a sum over the pixels of an image; they add up as a random walk does, to its square root. So
# the results are those of weights and inputs that are moved by a few roundings, of which this is ten times as many.
MOVE = 64 * 2**-24
Results = dict[str, torch.Tensor]


def algebra(test: Callable) -> Callable:
    """Decorator of a test of `numerics` that runs in float64."""
    return pytest.mark.numerics(pytest.mark.usefixtures("float64")(test))


def largest(tensor: torch.Tensor) -> float:
    return tensor.detach().abs().max().item()


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest one between elements."""
    assert actual.shape == expected.shape
    return largest(actual.detach().double() - expected.detach().double())


def assert_close(actual: torch.Tensor, expected: torch.Tensor, bound: float = EXACT) -> None:
    """The largest difference is at most `bound` times the largest magnitude."""
    assert bound > EXACT or actual.dtype == torch.float64
    assert difference(actual, expected) <= bound * largest(expected)


def assert_same_text(actual: str, expected: str) -> None:
    """Equal but for the last digit of decimals, which may be rounded otherwise where rounding noise is another."""
    decimals = r"\d+\.(\d+)"
    assert re.sub(decimals, "0.0", actual) == re.sub(decimals, "0.0", expected)
    for one, other in zip(re.finditer(decimals, actual), re.finditer(decimals, expected), strict=True):
        assert len(one[1]) == len(other[1]) and abs(float(one[0]) - float(other[0])) < 1.5 * 10 ** -len(one[1])


def gradients(model: torch.nn.Module) -> Results:
    """The gradients by name; they are taken off the model."""
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return found


def is_noise(name: str) -> bool:
    """A key's bias shifts all scores of a query alike: its gradient is 0 but for rounding."""
    return name.endswith("k_proj.bias")


def assert_same_gradients(actual: Results, expected: Results, bound: float = EXACT) -> None:
    """As `assert_close`, parameter by parameter."""
    assert actual.keys() == expected.keys()
    scale = max(map(largest, expected.values()))
    for name, gradient in expected.items():
        if is_noise(name):
            assert max(largest(gradient), largest(actual[name])) < bound * scale
        else:
            assert_close(actual[name], gradient, bound)


def assert_as_precise(actual: torch.Tensor, single: torch.Tensor, exact: torch.Tensor) -> None:
    """
    Another program for the same in float32 rounds elsewhere, but is not much further from float64 than PyTorch is.
    """
    assert exact.dtype == torch.float64 and single.dtype == torch.float32
    assert difference(actual, exact) <= 8 * difference(single, exact)


def assert_rounding_explains(
    compute: Callable[[torch.nn.Module, torch.Tensor], Results], model: torch.nn.Module, pixel_values: torch.Tensor
) -> None:
    """
    What a float32 model computes of float32 images differs from float64 by no more than float64 itself changes when
    all weights and pixels are moved by `MOVE` of their size, up or down at random. So the bound knows how sensitive
    each result is, the leap of a gradient where a LeakyReLU's input is next to 0 included.
    """
    single = compute(model, pixel_values)
    model, pixel_values = copy.deepcopy(model).double(), pixel_values.double()
    exact, moved = compute(model, pixel_values), []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        other = copy.deepcopy(model)
        with torch.no_grad():
            for weight in other.parameters():
                weight.copy_(_move(weight, generator))
        moved.append(compute(other, _move(pixel_values, generator)))
    reach = {name: max(difference(results[name], exact[name]) for results in moved) for name in exact}
    for name, expected in exact.items():
        assert expected.dtype == torch.float64 and single[name].dtype == torch.float32
        # A model a thousand times as sensitive as its inputs are precise would hide mistakes.
        assert reach[name] < 1000 * MOVE * largest(expected) or is_noise(name)
        assert difference(single[name], expected) <= (max(reach.values()) if is_noise(name) else reach[name])


def _move(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return values * (1 + MOVE * (2 * torch.randint(0, 2, values.shape, generator=generator) - 1))
