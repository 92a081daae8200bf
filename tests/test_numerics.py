"""The bound for float32 admits the rounding of float32, and no coarser rounding."""

import pytest
import torch
from numerics import assert_rounding_explains, assert_same_text


def compute(model, values):
    return {"logits": model(values)}


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_one_layer_exceeds_the_rounding_of_float32(dtype):
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(32, 32) for _ in range(4)))
    assert_rounding_explains(compute, model, torch.randn(8, 32))

    def round_float32(module, args, output):
        return output.to(dtype).float() if output.dtype == torch.float32 else output

    model[2].register_forward_hook(round_float32)
    with pytest.raises(AssertionError, match="difference"):
        assert_rounding_explains(compute, model, torch.randn(8, 32))


@pytest.mark.parametrize("other", ["score 0.82, 3 dogs", "score 0.80, 3 dogs"])
def test_texts_differ_by_the_last_digit_of_decimals_at_most(other):
    assert_same_text(other, "score 0.81, 3 dogs")
    for wrong in ("score 0.83, 3 dogs", "score 0.81, 4 dogs", "score 0.8, 3 dogs", "score 0.81, 3 dogs."):
        with pytest.raises(AssertionError):
            assert_same_text(wrong, "score 0.81, 3 dogs")
