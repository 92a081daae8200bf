from collections.abc import Iterator

import pytest
import torch


pytest.register_assert_rewrite("numerics")


@pytest.fixture
def float64() -> Iterator[None]:
    """New tensors and models are of float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
