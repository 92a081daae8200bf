"""
Comparison of numbers on any processor.

Two ways to compute the same are compared in float64, in which rounding stays far below `EXACT`. Float32 is compared with
a float64 run of the same model, within what rounding can change for these weights and inputs.
"""

import copy
import re
from collections.abc import Callable

import pytest
import torch


EXACT = 1e-10  # float64 has a precision of 1e-16; nothing here amplifies that by a million
# A rounding of float32 moves a number by up to 2**-24 of itself. A tiny model's forward and backward pass has a few
# hundred, and so does a sum over the pixels of an image. They add up like a random walk, to their square root. Moving
# weights and inputs by a few roundings has the same effect. This is ten times as many.
MOVE = 64 * 2**-24
Results = dict[str, torch.Tensor]


def algebra(test: Callable) -> Callable:
    """Mark a test of numbers that runs in float64."""
    return pytest.mark.numerics(pytest.mark.usefixtures("float64")(test))


def largest(tensor: torch.Tensor) -> float:
    return tensor.detach().abs().max().item()


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference between elements."""
    assert actual.shape == expected.shape
    return largest(actual.detach().double() - expected.detach().double())


def assert_close(actual: torch.Tensor, expected: torch.Tensor, bound: float = EXACT) -> None:
    """Check that the largest difference is at most `bound` times the largest magnitude."""
    assert bound > EXACT or actual.dtype == torch.float64
    assert difference(actual, expected) <= bound * largest(expected)


def assert_same_text(actual: str, expected: str) -> None:
    """Check that texts are equal except for the last digit of decimals, which may differ with rounding noise."""
    decimals = r"\d+\.(\d+)"
    assert re.sub(decimals, "0.0", actual) == re.sub(decimals, "0.0", expected)
    for one, other in zip(re.finditer(decimals, actual), re.finditer(decimals, expected), strict=True):
        assert len(one[1]) == len(other[1]) and abs(float(one[0]) - float(other[0])) < 1.5 * 10 ** -len(one[1])


def gradients(model: torch.nn.Module) -> Results:
    """Return the gradients by name and clear them."""
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return found


def is_noise(name: str) -> bool:
    """A key's bias shifts all scores of a query alike, so its gradient is 0 except for rounding."""
    return name.endswith("k_proj.bias")


def assert_same_gradients(actual: Results, expected: Results, bound: float = EXACT) -> None:
    """Check gradients as `assert_close` does, parameter by parameter."""
    assert actual.keys() == expected.keys()
    scale = max(map(largest, expected.values()))
    for name, gradient in expected.items():
        if is_noise(name):
            assert max(largest(gradient), largest(actual[name])) < bound * scale
        else:
            assert_close(actual[name], gradient, bound)


def assert_as_precise(actual: torch.Tensor, single: torch.Tensor, exact: torch.Tensor) -> None:
    """Check that another program in float32 is not much further from float64 than PyTorch is."""
    assert exact.dtype == torch.float64 and single.dtype == torch.float32
    assert difference(actual, exact) <= 8 * difference(single, exact)


def assert_rounding_explains(
    compute: Callable[[torch.nn.Module, torch.Tensor], Results], model: torch.nn.Module, pixel_values: torch.Tensor
) -> None:
    """
    Check that the results of a float32 model differ from float64 by no more than float64 results change when all
    weights and pixels are moved by `MOVE` of their size, up or down at random. The bound thus reflects how sensitive
    each result is, including the jump of a gradient where a LeakyReLU's input is close to 0.
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
        # A model that amplifies rounding a thousand times would hide mistakes.
        assert reach[name] < 1000 * MOVE * largest(expected) or is_noise(name)
        assert difference(single[name], expected) <= (max(reach.values()) if is_noise(name) else reach[name])


def _move(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return values * (1 + MOVE * (2 * torch.randint(0, 2, values.shape, generator=generator) - 1))
