"""What ReSTR asks of a vision encoder of transformers, and how a pretrained one becomes ReSTR's."""

import re
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from transformers.modeling_utils import PreTrainedModel

from .configuration_restr import ReSTRVisionConfig


def as_pair(size: int | Iterable[int]) -> tuple[int, int]:
    """(height, width) of a config's `image_size` or `patch_size`."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def resize_position_embeddings(
    position_embeddings: torch.Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]
) -> torch.Tensor:
    """
    Resize the grid part of `(1, prefix + h * w, hidden_size)` position embeddings bilinearly (align_corners=False, as
    the original does); the rows of the prefix tokens, which come first, are kept.
    """
    # Where an export leaves the size free, to ask for one would bind the program to all others.
    if not isinstance(new_grid[0], torch.SymInt) and old_grid == new_grid:
        return position_embeddings
    num_prefix_tokens = position_embeddings.shape[1] - old_grid[0] * old_grid[1]
    prefix, grid = position_embeddings[:, :num_prefix_tokens], position_embeddings[:, num_prefix_tokens:]
    grid = grid.reshape(1, *old_grid, -1).permute(0, 3, 1, 2)  # (1, hidden, h, w)
    grid = F.interpolate(grid, size=new_grid, mode="bilinear", align_corners=False)
    return torch.cat([prefix, grid.flatten(2).transpose(1, 2)], dim=1)  # (1, prefix + new h * w, hidden)


def convert_vision_model(vision_model: PreTrainedModel) -> tuple[Any, dict[str, torch.Tensor]]:
    """The config and weights under which a pretrained ViT becomes ReSTR's vision encoder; others stay as they are."""
    config, state_dict = vision_model.config, vision_model.state_dict()
    if config.model_type != "vit" or len({*as_pair(config.image_size)}) > 1 or len({*as_pair(config.patch_size)}) > 1:
        return config, state_dict
    names = (  # the newer and the older names of transformers' ViT -> ours
        (r"^embeddings\.cls_token$", "embeddings.class_embedding"),
        (r"^embeddings\.patch_embeddings\.projection\.", "embeddings.patch_embedding."),
        (r"^(?:encoder\.)?layers?\.(\d+)\.", r"layers.\1."),
        (r"\.attention\.(?:attention\.)?([qkv])(?:_proj|uery|ey|alue)\.", r".self_attn.\1_proj."),
        (r"\.attention\.(?:o_proj|output\.dense)\.", ".self_attn.out_proj."),
        (r"\.layernorm_before\.", ".layer_norm1."),
        (r"\.layernorm_after\.", ".layer_norm2."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"(\d)\.output\.dense\.", r"\1.mlp.fc2."),
        (r"^layernorm\.", "layer_norm."),
    )
    converted = {}
    for name, tensor in state_dict.items():
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        converted[name] = tensor
    copied = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act")
    values = {name: getattr(config, name) for name in (*copied, "layer_norm_eps", "num_channels")}
    values.update(image_size=as_pair(config.image_size)[0], patch_size=as_pair(config.patch_size)[0])
    return ReSTRVisionConfig(**values), converted


def resize_state_dict_positions(
    state_dict: dict[str, torch.Tensor], config: Any, image_size: int | None
) -> dict[str, torch.Tensor]:
    """Set `config.image_size` and resize the position embeddings in `state_dict` to its grid."""
    old_size, patch_size = as_pair(config.image_size), as_pair(config.patch_size)
    if image_size is None or old_size == (image_size, image_size):
        return state_dict
    if image_size <= 0 or image_size % patch_size[0] or image_size % patch_size[1]:
        raise ValueError(f"`image_size` must be a positive multiple of the patch size {patch_size}, got {image_size}.")
    names = [name for name in state_dict if name.endswith("position_embeddings")]
    if len(names) != 1:
        raise ValueError(
            f"Cannot resize the positions of a {config.model_type!r} encoder to `image_size={image_size}`: expected "
            f"one tensor named 'position_embeddings', found {names}. Leave `image_size` at {old_size}."
        )
    old_grid = (old_size[0] // patch_size[0], old_size[1] // patch_size[1])
    new_grid = (image_size // patch_size[0], image_size // patch_size[1])
    config.image_size = image_size
    return {**state_dict, names[0]: resize_position_embeddings(state_dict[names[0]], old_grid, new_grid)}
