"""What ReSTR asks of a vision encoder of transformers, and how a pretrained one becomes ReSTR's."""

from .requirements_restr import TRANSFORMERS  # noqa: F401  (first: says which version this file needs)


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


def patch_grid(config: Any) -> tuple[int, int]:
    """(h, w): the patches of an image of the config's own size."""
    image_size, patch_size = as_pair(config.image_size), as_pair(config.patch_size)
    return image_size[0] // patch_size[0], image_size[1] // patch_size[1]


def find_unused_parameters(config: Any) -> frozenset[str]:
    """
    Names of the parameters that no patch token depends on, such as those of a pooler or a mask token: those that get no
    gradient in a backward pass. A copy without weights (on the meta device) runs it: some 10 ms per layer, no memory.

    Raises:
        `ValueError`: The model does not make one token per patch of a batch of images, and nothing behind them.
    """
    if type(config) not in MODEL_MAPPING:
        refuse_vision_config(config, "`AutoModel` knows no model for it")
    with torch.inference_mode(False), torch.enable_grad():
        with torch.device("meta"):  # and the one attention that every device has
            model = AutoModel.from_config(copy.deepcopy(config), dtype=torch.float32, attn_implementation="eager")
        parameters = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        with torch.device("cpu"):  # for tables of positions that some encoders make in forward and keep for all models
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
        # Whatever it misses: other inputs, a time axis, values to read on the meta device.
        refuse_vision_config(config, f"it does not encode images alone ({type(error).__name__}: {error})")
    if tokens.ndim != 3 or tokens.shape[1] < num_patches or tokens.shape[::2] != (2, config.hidden_size):
        shapes = f"of shape {tuple(tokens.shape)} from two images of {num_patches} patches"
        refuse_vision_config(config, f"it makes tokens {shapes}, not (2, {num_patches} or more, {config.hidden_size})")
    return tokens[:, -num_patches:]  # prefix tokens come first


def load_vision_model(
    pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
) -> tuple[PreTrainedModel, frozenset[str]]:
    """
    A pretrained vision encoder in float32, also where it is one of the two of CLIP or SigLIP, and the names of the
    parameters that no patch token depends on.

    Raises:
        `ValueError`: It is not a plain ViT, or lacks weights that a patch token depends on.
    """
    config = load_vision_config(pretrained_model_name_or_path, **kwargs)
    if config.base_config_key:  # CLIP's, SigLIP's
        kwargs["config"] = config
    model, loading_info = AutoModel.from_pretrained(
        pretrained_model_name_or_path, output_loading_info=True, dtype=torch.float32, **kwargs
    )
    unused = find_unused_parameters(model.config)
    missing = sorted(set(loading_info["missing_keys"]) - unused)
    if missing:
        raise ValueError(
            f"The weights of {pretrained_model_name_or_path} do not fill a {config.model_type!r} encoder: missing "
            f"{missing}."
        )
    return model, unused


def load_vision_config(pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
    """The config of a pretrained vision encoder, also where it is one of the two of CLIP or SigLIP."""
    config = AutoConfig.from_pretrained(pretrained_model_name_or_path, **kwargs)
    config = getattr(config, "vision_config", config)
    check_vision_config(config)
    return config


def set_image_size(config: Any, image_size: int | None) -> None:
    """
    Set `config.image_size`, the side of a square in pixels, if it is to be another one.

    Raises:
        `ValueError`: Patches do not divide the size.
    """
    patch_size = as_pair(config.patch_size)
    if image_size is not None:
        config.image_size = image_size if isinstance(config.image_size, int) else (image_size, image_size)
    if any(side <= 0 or side % patch for side, patch in zip(as_pair(config.image_size), patch_size)):
        raise ValueError(
            f"`image_size` must be a positive multiple of the patch size {patch_size}, got {config.image_size}."
        )


def convert_vision_model(
    vision_model: PreTrainedModel, unused: Collection[str]
) -> tuple[Any, dict[str, torch.Tensor]]:
    """
    The config and weights under which a pretrained ViT becomes ReSTR's vision encoder, which has no place for `unused`
    parameters; others stay as they are.
    """
    config, state_dict = vision_model.config, vision_model.state_dict()
    if config.model_type != "vit" or len({*as_pair(config.image_size)}) > 1 or len({*as_pair(config.patch_size)}) > 1:
        return _without_stages(config), state_dict
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
    for name in state_dict.keys() - unused:
        tensor = state_dict[name]
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        converted[name] = tensor
    copied = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act")
    values = {name: getattr(config, name) for name in (*copied, "layer_norm_eps", "num_channels")}
    values.update(image_size=as_pair(config.image_size)[0], patch_size=as_pair(config.patch_size)[0])
    return ReSTRVisionConfig(**values), converted


def _without_stages(config: Any) -> Any:
    """
    A config that is also a backbone's names its blocks as stages. With another `num_hidden_layers` than it was saved
    with, these names are wrong and the config could be saved but not loaded: they are derived again.
    """
    values = config.to_dict()
    if "stage_names" not in values:
        return config
    return type(config).from_dict(
        {name: value for name, value in values.items() if name not in ("stage_names", "out_features", "out_indices")}
    )


def resize_state_dict_positions(
    state_dict: dict[str, torch.Tensor],
    expected: dict[str, torch.Tensor],
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
) -> dict[str, torch.Tensor]:
    """
    The same weights with each table of positions, `([1,] prefix + h * w, hidden_size)`, resized to the grid of the
    `expected` ones; it is known by having another shape than there.

    Raises:
        `ValueError`: A tensor of another shape is no such table, such as one of relative positions.
    """
    resized = {}
    for name, tensor in state_dict.items():
        new_shape = expected[name].shape
        if tensor.shape != new_shape:
            prefix = tensor.shape[-2] - math.prod(old_grid) if tensor.ndim in (2, 3) else -1
            if prefix < 0 or new_shape[-2:] != (prefix + math.prod(new_grid), tensor.shape[-1]):
                raise ValueError(
                    f"Cannot resize {name!r} from {tuple(tensor.shape)} to {tuple(new_shape)}: expected a table of "
                    f"positions, with one row per patch. Leave `image_size` at the checkpoint's."
                )
            table = tensor.view(1, *tensor.shape[-2:])
            tensor = resize_position_embeddings(table, old_grid, new_grid).view(new_shape)
        resized[name] = tensor
    return resized
