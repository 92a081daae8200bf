"""The bound that float32 is held to: its rounding keeps to it, anything coarser does not."""

import pytest
import torch
from numerics import assert_rounding_explains


def compute(model, values):
    return {"logits": model(values)}


@pytest.mark.numerics
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_of_one_layer_is_no_rounding_of_float32(dtype):
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(32, 32) for _ in range(4)))
    assert_rounding_explains(compute, model, torch.randn(8, 32))

    def round_float32(module, args, output):
        return output.to(dtype).float() if output.dtype == torch.float32 else output

    model[2].register_forward_hook(round_float32)
    with pytest.raises(AssertionError, match="difference"):
        assert_rounding_explains(compute, model, torch.randn(8, 32))
