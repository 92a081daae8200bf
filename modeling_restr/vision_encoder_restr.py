"""Checks of transformers' vision encoders, and the conversion of pretrained ones to ReSTR's."""

from .requirements_restr import TRANSFORMERS  # noqa: F401  (first: checks the version of transformers)


# isort: split
import copy
import math
import os
import re
from collections.abc import Collection, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from transformers import MODEL_MAPPING, AutoConfig, AutoModel
from transformers.modeling_utils import PreTrainedModel

from .configuration_restr import ReSTRVisionConfig, check_vision_config, refuse_vision_config


# Names of a plain ViT's weights in transformers (newer and older) -> names in ReSTR's own vision encoder.
_RENAMINGS = (
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


def as_pair(size: int | Iterable[int]) -> tuple[int, int]:
    """(height, width) of a config's `image_size` or `patch_size`."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def patch_grid(config: Any) -> tuple[int, int]:
    """(h, w): the number of patches along each side of an image of the config's own size."""
    image_size, patch_size = as_pair(config.image_size), as_pair(config.patch_size)
    return image_size[0] // patch_size[0], image_size[1] // patch_size[1]


def resize_positions(
    position_embeddings: torch.Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]
) -> torch.Tensor:
    """
    Resize the grid part of `(1, prefix + h * w, hidden_size)` position embeddings bilinearly (align_corners=False, as
    the original does). The rows of the prefix tokens, which come first, stay.
    """
    # An export with a dynamic size has symbols here: comparing them would fix the size.
    if not isinstance(new_grid[0], torch.SymInt) and old_grid == new_grid:
        return position_embeddings
    num_prefix_tokens = position_embeddings.shape[1] - old_grid[0] * old_grid[1]
    prefix, grid = position_embeddings[:, :num_prefix_tokens], position_embeddings[:, num_prefix_tokens:]
    grid = grid.reshape(1, *old_grid, -1).permute(0, 3, 1, 2)  # (1, hidden, h, w)
    grid = F.interpolate(grid, size=new_grid, mode="bilinear", align_corners=False)
    return torch.cat([prefix, grid.flatten(2).transpose(1, 2)], dim=1)  # (1, prefix + new h * w, hidden)


def unused_parameters(config: Any) -> frozenset[str]:
    """
    Find the parameters that no patch token depends on, such as a pooler's or a mask token. They get no gradient. A copy
    of the model without weights runs on the meta device to find them: about 10 ms per layer, no memory.

    Raises:
        `ValueError`: The model does not make one token per patch, in the last places, from a batch of images.
    """
    if type(config) not in MODEL_MAPPING:
        refuse_vision_config(config, "`AutoModel` has no model for it")
    with torch.inference_mode(False), torch.enable_grad():
        with torch.device("meta"):  # with eager attention, which every device has
            model = AutoModel.from_config(copy.deepcopy(config), dtype=torch.float32, attn_implementation="eager")
        parameters = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        with torch.device("cpu"):  # for position tables that some encoders create in forward and share with all models
            patches = _encode_patches(model.eval(), config)
        gradients = torch.autograd.grad(patches.sum(), [*parameters.values()], allow_unused=True)
    return frozenset(name for name, gradient in zip(parameters, gradients) if gradient is None)


def _encode_patches(model: PreTrainedModel, config: Any) -> torch.Tensor:
    """Patch tokens of shape (2, P, hidden_size) of two images."""
    size = as_pair(config.image_size)
    images = torch.empty(2, config.num_channels, *size, dtype=model.dtype, device=model.device)
    num_patches = math.prod(patch_grid(config))
    try:
        tokens = model(images, return_dict=True).last_hidden_state
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        # It may need other inputs, a time axis, or values that the meta device does not have.
        refuse_vision_config(config, f"it does not encode images alone ({type(error).__name__}: {error})")
    if tokens.ndim != 3 or tokens.shape[1] < num_patches or tokens.shape[::2] != (2, config.hidden_size):
        shapes = f"of shape {tuple(tokens.shape)} from two images of {num_patches} patches"
        refuse_vision_config(config, f"it makes tokens {shapes}, not (2, {num_patches} or more, {config.hidden_size})")
    return tokens[:, -num_patches:]  # prefix tokens come first


def load_vision_config(pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
    """Load the config of a pretrained vision encoder, also from a model with two encoders (CLIP, SigLIP)."""
    config = AutoConfig.from_pretrained(pretrained_model_name_or_path, **kwargs)
    config = getattr(config, "vision_config", config)
    check_vision_config(config)
    return config


def load_vision_model(
    pretrained_model_name_or_path: str | os.PathLike, image_size: int | None = None, **kwargs: Any
) -> tuple[Any, dict[str, torch.Tensor], tuple[int, int]]:
    """
    Load a pretrained vision encoder in float32, also from a model with two encoders (CLIP, SigLIP).

    Returns:
        Its config for images of `image_size` (by default its own), its weights, and the patch grid (h, w) of their
        position embeddings. A plain ViT is converted to ReSTR's own encoder; others stay as they are.

    Raises:
        `ValueError`: It is not a plain ViT, lacks weights that a patch token depends on, or its patches do not divide
            the image size.
    """
    config = load_vision_config(pretrained_model_name_or_path, **kwargs)
    if config.base_config_key:  # a part of CLIP or SigLIP
        kwargs["config"] = config
    model, loading_info = AutoModel.from_pretrained(
        pretrained_model_name_or_path, output_loading_info=True, dtype=torch.float32, **kwargs
    )
    unused = unused_parameters(model.config)
    missing = sorted(set(loading_info["missing_keys"]) - unused)
    if missing:
        raise ValueError(
            f"The weights of {pretrained_model_name_or_path} do not fill a {config.model_type!r} encoder: missing "
            f"{missing}."
        )
    old_grid = patch_grid(model.config)
    _set_image_size(model.config, image_size)
    return *_convert_vision_model(model, unused), old_grid


def fill_vision_model(
    vision_model: PreTrainedModel, state_dict: dict[str, torch.Tensor], old_grid: tuple[int, int]
) -> None:
    """
    Load weights of [`load_vision_model`], with position embeddings resized to the model's patch grid.

    Raises:
        `ValueError`: Positions cannot be resized, such as relative ones.
    """
    new_grid, resized = patch_grid(vision_model.config), {}
    for name, expected in vision_model.state_dict().items():
        tensor = state_dict[name]
        if tensor.shape != expected.shape:  # only position tables depend on the image size
            tensor = _resize_position_table(name, tensor, expected.shape, old_grid, new_grid)
        resized[name] = tensor
    vision_model.load_state_dict(resized)


def _set_image_size(config: Any, image_size: int | None) -> None:
    patch_size = as_pair(config.patch_size)
    if image_size is not None:
        config.image_size = image_size if isinstance(config.image_size, int) else (image_size, image_size)
    if any(side <= 0 or side % patch for side, patch in zip(as_pair(config.image_size), patch_size)):
        raise ValueError(
            f"`image_size` must be a positive multiple of the patch size {patch_size}, got {config.image_size}."
        )


def _convert_vision_model(
    vision_model: PreTrainedModel, unused: Collection[str]
) -> tuple[Any, dict[str, torch.Tensor]]:
    """
    Convert a plain ViT for square images and patches to the config and weights of ReSTR's own encoder, without `unused`
    ones. Others keep theirs.
    """
    config, state_dict = vision_model.config, vision_model.state_dict()
    image_size, patch_size = as_pair(config.image_size), as_pair(config.patch_size)
    if config.model_type != "vit" or image_size[0] != image_size[1] or patch_size[0] != patch_size[1]:
        return _without_stages(config), state_dict
    converted = {}
    for name in state_dict.keys() - unused:
        tensor = state_dict[name]
        for pattern, replacement in _RENAMINGS:
            name = re.sub(pattern, replacement, name)
        converted[name] = tensor
    copied = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act")
    values = {name: getattr(config, name) for name in (*copied, "layer_norm_eps", "num_channels")}
    return ReSTRVisionConfig(**values, image_size=image_size[0], patch_size=patch_size[0]), converted


def _without_stages(config: Any) -> Any:
    """
    Derive the stage names of a backbone's config again. After a change of `num_hidden_layers` they are wrong: such a
    config can be saved but not loaded.
    """
    values = config.to_dict()
    if "stage_names" not in values:
        return config
    return type(config).from_dict(
        {name: value for name, value in values.items() if name not in ("stage_names", "out_features", "out_indices")}
    )


def _resize_position_table(
    name: str, tensor: torch.Tensor, new_shape: torch.Size, old_grid: tuple[int, int], new_grid: tuple[int, int]
) -> torch.Tensor:
    """Resize a table of shape ([1,] prefix + h * w, hidden_size)."""
    num_prefix_tokens = tensor.shape[-2] - math.prod(old_grid) if tensor.ndim in (2, 3) else -1
    if num_prefix_tokens < 0 or new_shape[-2:] != (num_prefix_tokens + math.prod(new_grid), tensor.shape[-1]):
        raise ValueError(
            f"Cannot resize {name!r} from {tuple(tensor.shape)} to {tuple(new_shape)}: expected a table of "
            f"positions, with one row per patch. Leave `image_size` at the checkpoint's."
        )
    table = tensor.view(1, *tensor.shape[-2:])
    return resize_positions(table, old_grid, new_grid).view(new_shape)
