"""Tiny random models whose masks are not trivial."""

import torch

from modeling_restr import ReSTRConfig, ReSTRForImageSegmentation


def randomize(model: torch.nn.Module, seed: int, std: float = 0.3) -> torch.nn.Module:
    """Give a model weights so large that its masks differ between images and sentences."""
    torch.manual_seed(seed)
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=std)
    return model.eval()


def make_model(vocab_size: int) -> ReSTRForImageSegmentation:
    """A model for 64x64 pixels."""
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2}
    config = ReSTRConfig(
        vision_config={**sizes, "hidden_size": 32, "intermediate_size": 64, "image_size": 64},
        text_config={
            **sizes,
            "vocab_size": vocab_size,
            "hidden_size": 24,
            "intermediate_size": 48,
            "projection_dim": 32,
        },
        hidden_size=32,
        num_attention_heads=2,
    )
    return ReSTRForImageSegmentation(config)


# Models for 32x32 pixels and exact comparisons


FUSION_TYPES = ["coupled", "independent", "vanilla"]
NUM_WORDS = 6
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
# Large random weights, so that every part of the model influences the logits.
TINY_VISION = {**SIZES, "image_size": 32, "patch_size": 8, "initializer_range": 0.2}
TINY_TEXT = {
    **SIZES,
    "hidden_size": 24,
    "vocab_size": 50,
    "projection_dim": 40,
    "max_position_embeddings": NUM_WORDS,
    "initializer_range": 0.2,
}


def tiny_config(vision_config=None, text_config=None, **values) -> ReSTRConfig:
    if vision_config is None or isinstance(vision_config, dict):
        vision_config = {**TINY_VISION, **(vision_config or {})}
    values = {"hidden_size": 36, "num_attention_heads": 4, "initializer_range": 0.2, **values}
    return ReSTRConfig(vision_config=vision_config, text_config={**TINY_TEXT, **(text_config or {})}, **values)


def tiny_model(*args, **values) -> ReSTRForImageSegmentation:
    torch.manual_seed(0)
    return ReSTRForImageSegmentation(tiny_config(*args, **values)).eval()


def images(count: int, height: int = 32, width: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(count))


def words(count: int, num_words: int = NUM_WORDS) -> torch.Tensor:
    """Ids of expressions of various lengths, padded on the left."""
    input_ids = torch.randint(4, 50, (count, num_words), generator=torch.Generator().manual_seed(count))
    for row in range(count):
        input_ids[row, : row % num_words] = 0
    return input_ids


def masks(count: int, height: int = 32, width: int = 32) -> torch.Tensor:
    return torch.randint(0, 2, (count, height, width), generator=torch.Generator().manual_seed(count))
