"""
Conversion of a checkpoint of the original ReSTR implementation to a folder that `from_pretrained` loads:

    python -m modeling_restr.convert_restr_original_to_hf --checkpoint restr.pth --vocabulary vocabulary.txt \
        --image_size 480 --output_dir restr-refcoco
"""

import logging
import pickle
import re
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from .configuration_restr import ReSTRConfig, ReSTRTextConfig, ReSTRVisionConfig
from .image_processing_restr import ReSTRImageProcessor
from .modeling_restr import ReSTRForImageSegmentation
from .options import OutputDir, run
from .processing_restr import ReSTRProcessor
from .tokenization_restr import build_tokenizer, read_vocabulary


logger = logging.getLogger(__name__)

# Our names -> the original's. Each pattern is tried on every name: blocks have the same names in all encoders.
_RENAMINGS = (
    (r"^model\.vision_model\.embeddings\.class_embedding$", "encoder_v.cls_token"),
    (r"^model\.vision_model\.embeddings\.position_embeddings$", "encoder_v.pos_embed"),
    (r"^model\.vision_model\.embeddings\.patch_embedding\.", "encoder_v.patch_embed.proj."),
    (r"^model\.vision_model\.layers\.", "encoder_v.blocks."),
    (r"^model\.vision_model\.layer_norm\.", "encoder_v.norm."),
    (r"^model\.text_model\.embeddings\.embed_tokens\.", "encoder_l.embedding."),
    (r"^model\.text_model\.layers\.", "encoder_l.blocks."),
    (r"^model\.text_model\.projection\.", "encoder_l.proj_lang."),
    (r"^model\.text_model\.layer_norm\.", "encoder_l.lang_norm."),
    (r"^model\.fusion\.visual_projection\.", "fusion_module.proj_v."),
    (r"^model\.fusion\.text_projection\.", "fusion_module.proj_l."),
    (r"^model\.fusion\.seed_embedding$", "fusion_module.seed_emb"),
    (r"^model\.fusion\.patch_projection\.weight$", "fusion_module.proj_patch"),
    (r"^model\.fusion\.classifier_projection\.weight$", "fusion_module.proj_cls"),
    (r"(\.\d+)\.layer_norm([12])\.", r"\1.norm\2."),
    (r"(\.\d+)\.self_attn\.[qkv]_proj\.", r"\1.attn.qkv."),
    (r"(\.\d+)\.self_attn\.out_proj\.", r"\1.attn.proj."),
)
# Names that differ between the variants. The first one tells the variants apart.
_VARIANT_RENAMINGS = {
    "coupled": (
        (r"^model\.fusion\.layers\.", "fusion_module.blocks_vl."),
        (r"^model\.fusion\.seed_layers\.", "fusion_module.blocks_ls."),
        (r"^model\.fusion\.layer_norm\.", "fusion_module.norm."),
        (r"^pixel_decoder\.layers\.(\d+)\.", r"fusion_module.decoder.\1.up.1."),
        (r"^pixel_decoder\.head\.", "fusion_module.decoder.4."),
    ),
    "independent": (
        (r"^model\.fusion\.layers\.", "fusion_module.blocksvl."),
        (r"^model\.fusion\.seed_layers\.", "fusion_module.blockslm."),
        (r"^model\.fusion\.layer_norm\.", "fusion_module.decoder_norm."),
        (r"^pixel_decoder\.layers\.(\d+)\.", r"fusion_module.upconvs.\1.up.1."),
        (r"^pixel_decoder\.head\.", "fusion_module.last_convs."),
    ),
    "vanilla": (
        (r"^model\.fusion\.layers\.", "fusion_module.blocks."),
        (r"^model\.fusion\.layer_norm\.", "fusion_module.decoder_norm."),
        (r"^pixel_decoder\.layers\.(\d+)\.", r"fusion_module.upconvs.\1.up.1."),
        (r"^pixel_decoder\.head\.", "fusion_module.last_convs."),
    ),
}
# The classification head of the ImageNet checkpoint, which ReSTR does not use.
_UNUSED_NAMES = {"encoder_v.head.weight", "encoder_v.head.bias"}
# Keys under which training scripts save a state dict.
_WRAPPERS = ("state_dict", "model_state_dict", "model")


def _original_name(name: str, fusion_type: str) -> str:
    """Find the original's name of one of our weights."""
    for pattern, replacement in (*_RENAMINGS, *_VARIANT_RENAMINGS[fusion_type]):
        name = re.sub(pattern, replacement, name)
    return name


def _convert_tensor(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Convert a tensor of the original to the shape of our weight `name`. Other shapes than the original's stay."""
    match = re.search(r"\.([qkv])_proj\.", name)
    if match and tensor.ndim and len(tensor) % 3 == 0:
        return tensor.chunk(3)["qkv".index(match.group(1))].clone()
    if re.search(r"\.(patch|classifier)_projection\.", name) and tensor.ndim == 2:  # applied on the right
        return tensor.t().contiguous()
    if name.startswith("pixel_decoder.") and tensor.ndim == 4:  # 1x1 convolution -> linear map
        return tensor.flatten(1)
    return tensor


def _convert_state_dict(
    state_dict: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], config: Any
) -> dict[str, torch.Tensor]:
    """Convert a state dict to the names and shapes of `expected`. Every name of the original must be used."""
    original_names = {name: _original_name(name, config.fusion_type) for name in expected}
    missing = sorted(set(original_names.values()) - set(state_dict))
    unknown = sorted(set(state_dict) - set(original_names.values()) - _UNUSED_NAMES)
    if missing or unknown:
        raise ValueError(
            f"The state dict does not fit a {config.fusion_type!r} ReSTR with "
            f"num_fusion_layers={config.num_fusion_layers}, share_fusion_layers={config.share_fusion_layers}, "
            f"use_pixel_decoder={config.use_pixel_decoder}. Missing names: {missing}. Unknown names: {unknown}."
        )
    converted = {name: _convert_tensor(name, state_dict[original]) for name, original in original_names.items()}
    wrong = [
        f"{original_names[name]} gives {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}"
        for name, tensor in converted.items()
        if tensor.shape != expected[name].shape
    ]
    if wrong:
        raise ValueError(
            f"Shapes do not fit `image_size={config.vision_config.image_size}` and one another: {'; '.join(wrong)}."
        )
    return converted


def _fusion_type(names: set[str]) -> str:
    """Recognise the variant by the names of its fusion blocks."""
    markers = {kind: renamings[0][1] for kind, renamings in _VARIANT_RENAMINGS.items()}
    found = [kind for kind, marker in markers.items() if any(name.startswith(marker) for name in names)]
    if len(found) != 1:
        raise ValueError(
            f"Expected the fusion blocks of exactly one variant, with names that start with one of "
            f"{list(markers.values())}, got those of {found or 'none'} in {len(names)} names."
        )
    return found[0]


def _num_layers(names: set[str], prefix: str) -> int:
    return len({match.group(1) for name in names if (match := re.match(re.escape(prefix) + r"\.(\d+)\.", name))})


def _shape_of(state_dict: dict[str, torch.Tensor], name: str, num_dimensions: int) -> tuple[int, ...]:
    if name not in state_dict:
        raise ValueError(f"Expected a state dict of the original ReSTR, got one without {name!r}.")
    shape = tuple(state_dict[name].shape)
    if len(shape) != num_dimensions:
        raise ValueError(f"Expected {name!r} of {num_dimensions} dimensions, got the shape {shape}.")
    return shape


def _config_from_state_dict(
    state_dict: dict[str, torch.Tensor],
    image_size: int,
    num_attention_heads: int,
    text_num_attention_heads: int,
    **fusion_values: Any,
) -> ReSTRConfig:
    """Read every other size off the shapes."""
    names = set(state_dict)
    hidden_size, num_channels, patch_size, _ = _shape_of(state_dict, "encoder_v.patch_embed.proj.weight", 4)
    vocab_size, text_hidden_size = _shape_of(state_dict, "encoder_l.embedding.weight", 2)
    vision_config = ReSTRVisionConfig(
        hidden_size=hidden_size,
        num_hidden_layers=_num_layers(names, "encoder_v.blocks"),
        num_attention_heads=num_attention_heads,
        intermediate_size=_shape_of(state_dict, "encoder_v.blocks.0.mlp.fc1.weight", 2)[0],
        image_size=image_size,
        patch_size=patch_size,
        num_channels=num_channels,
    )
    text_config = ReSTRTextConfig(
        vocab_size=vocab_size,
        hidden_size=text_hidden_size,
        num_hidden_layers=_num_layers(names, "encoder_l.blocks"),
        num_attention_heads=text_num_attention_heads,
        intermediate_size=_shape_of(state_dict, "encoder_l.blocks.0.mlp.fc1.weight", 2)[0],
        projection_dim=_shape_of(state_dict, "encoder_l.proj_lang.weight", 2)[0],
    )
    fusion_values["hidden_size"] = _shape_of(state_dict, "fusion_module.proj_v.weight", 2)[0]
    return ReSTRConfig(
        vision_config=vision_config,
        text_config=text_config,
        fusion_type=_fusion_type(names),
        num_attention_heads=num_attention_heads,
        **fusion_values,
    )


def model_from_original_state_dict(
    state_dict: dict[str, torch.Tensor],
    *,
    image_size: int,
    num_attention_heads: int = 12,
    text_num_attention_heads: int = 12,
    num_fusion_layers: int = 2,
    share_fusion_layers: bool = False,
    use_pixel_decoder: bool = True,
) -> ReSTRForImageSegmentation:
    """
    Build a model from the original's state dict. The variant and all other sizes are read off names and shapes.

    Args:
        state_dict (`dict[str, torch.Tensor]`): The original's weights.
        image_size (`int`): Side in pixels of the square input that the position embeddings were learned for.
        num_attention_heads (`int`): Heads of the vision and fusion encoders.
        text_num_attention_heads (`int`): Heads of the language encoder.
        num_fusion_layers (`int`): Number of blocks, or of applications of a shared one, per fusion encoder.
        share_fusion_layers (`bool`): Whether each fusion encoder has a single block.
        use_pixel_decoder (`bool`): Whether the model has the pixel decoder.

    Returns:
        [`ReSTRForImageSegmentation`] in evaluation mode.

    Raises:
        `ValueError`: Names are missing or unknown (they are listed), or shapes do not fit.
    """
    fusion_values = {"num_fusion_layers": num_fusion_layers, "share_fusion_layers": share_fusion_layers}
    config = _config_from_state_dict(
        state_dict,
        image_size,
        num_attention_heads,
        text_num_attention_heads,
        use_pixel_decoder=use_pixel_decoder,
        **fusion_values,
    )
    model = ReSTRForImageSegmentation(config)
    model.load_state_dict(_convert_state_dict(state_dict, model.state_dict(), config))
    return model.eval()


def load_original_checkpoint(path: str | Path) -> dict[str, torch.Tensor]:
    """
    Load the state dict in a `.pth` without running any code in it, and without the wrappers of training scripts.

    Raises:
        `ValueError`: The file is damaged, contains anything but weights, or holds no state dict.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"Expected weights only in {path}, got other objects, which could run code. If you trust the file, save "
            f"its state dict alone to a new one and convert that. {error}"
        ) from error
    except OSError:
        raise
    except Exception as error:  # PyTorch raises nearly anything on a damaged file
        raise ValueError(
            f"Expected a checkpoint in {path}, got a damaged file ({error or type(error).__name__})."
        ) from error
    while wrappers := [
        key for key in _WRAPPERS if isinstance(checkpoint, dict) and isinstance(checkpoint.get(key), dict)
    ]:
        checkpoint = checkpoint[wrappers[0]]
    items: Any = checkpoint.items() if isinstance(checkpoint, dict) else [(None, checkpoint)]
    if not all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in items):
        raise ValueError(f"{path} holds no state dict: expected names and tensors, or those under 'state_dict'.")
    return {name.removeprefix("module."): tensor for name, tensor in items}


def convert_checkpoint(
    checkpoint: Annotated[Path, typer.Option(help="The original's .pth file.")],
    vocabulary: Annotated[Path, typer.Option(help="The original's vocabulary file, one word per line.")],
    output_dir: OutputDir,
    image_size: Annotated[int, typer.Option(help="Side in pixels of the square input of its training.")],
    num_attention_heads: Annotated[int, typer.Option(help="Heads of the vision and fusion encoders.")] = 12,
    text_num_attention_heads: Annotated[int, typer.Option(help="Heads of the language encoder.")] = 12,
    num_fusion_layers: Annotated[int, typer.Option(help="Blocks per fusion encoder.")] = 2,
    share_fusion_layers: Annotated[
        bool, typer.Option("--share-fusion-layers", help="Fusion encoders apply one block repeatedly.")
    ] = False,
    use_pixel_decoder: Annotated[
        bool, typer.Option(" /--coarse", help="The model has no pixel decoder.", show_default=False)
    ] = True,
) -> None:
    """
    Convert a checkpoint of the original ReSTR and its vocabulary to a folder that from_pretrained loads.

    Refuses files that are malformed or do not belong together.
    """
    from .hub import save_bundle  # only here: converting a state dict does not need it

    model = model_from_original_state_dict(
        load_original_checkpoint(checkpoint),
        image_size=image_size,
        num_attention_heads=num_attention_heads,
        text_num_attention_heads=text_num_attention_heads,
        num_fusion_layers=num_fusion_layers,
        share_fusion_layers=share_fusion_layers,
        use_pixel_decoder=use_pixel_decoder,
    )
    words = read_vocabulary(vocabulary)
    text_config: Any = model.config.text_config
    num_ids, num_rows = max(words.values()) + 1, text_config.vocab_size
    found = f"{vocabulary} has {num_ids} lines and the checkpoint's word embedding has {num_rows} rows"
    if num_ids > num_rows:
        raise ValueError(f"{found}: they do not belong together.")
    if num_ids < num_rows:
        logger.warning(f"{found}: make sure that they belong together.")
    tokenizer = build_tokenizer(words, max_length=text_config.max_position_embeddings)
    save_bundle(model, ReSTRProcessor(ReSTRImageProcessor(size=image_size), tokenizer), output_dir)
    print(f"Wrote {output_dir}: load it with ReSTRForImageSegmentation.from_pretrained.")


if __name__ == "__main__":
    run(convert_checkpoint)
