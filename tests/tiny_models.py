"""Tiny random models that say something."""

import torch

from modeling_restr import ReSTRConfig, ReSTRForImageSegmentation


def randomize(model: torch.nn.Module, seed: int, std: float = 0.3) -> torch.nn.Module:
    """Give a model weights that are large enough that its masks differ by image and by sentence."""
    torch.manual_seed(seed)
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=std)
    return model.eval()


def make_model(vocab_size: int) -> ReSTRForImageSegmentation:
    """Of 64x64 pixels."""
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
