"""
Convert a checkpoint of the original ReSTR implementation to a folder that `from_pretrained` loads:

    python -m modeling_restr.convert_restr_original_to_hf --checkpoint restr.pth --vocabulary vocabulary.txt \
        --image_size 480 --output_dir restr-refcoco
"""

import logging
import pickle
import re
from pathlib import Path
from typing import Any

import torch

from .arguments import ArgumentParser, add_options
from .configuration_restr import ReSTRConfig, ReSTRTextConfig, ReSTRVisionConfig
from .image_processing_restr import ReSTRImageProcessor
from .modeling_restr import ReSTRForImageSegmentation
from .processing_restr import ReSTRProcessor
from .tokenization_restr import build_tokenizer, read_vocabulary


logger = logging.getLogger(__name__)

# Our names -> the original's. A pattern applies to every name, the blocks' own names are the same in all encoders.
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
# What is called differently in each variant. The first name tells the variants apart.
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
# The classification head of the ImageNet start, which ReSTR does not use.
_UNUSED_NAMES = {"encoder_v.head.weight", "encoder_v.head.bias"}
# Where training scripts put a state dict among other things.
_WRAPPERS = ("state_dict", "model_state_dict", "model")


def _original_name(name: str, fusion_type: str) -> str:
    """The name that one of our weights has in the original."""
    for pattern, replacement in (*_RENAMINGS, *_VARIANT_RENAMINGS[fusion_type]):
        name = re.sub(pattern, replacement, name)
    return name


def _convert_tensor(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The original's tensor in the form that `name`, one of our names, has it in."""
    if match := re.search(r"\.([qkv])_proj\.", name):
        return tensor.chunk(3)["qkv".index(match.group(1))].clone()
    if re.search(r"\.(patch|classifier)_projection\.", name):  # the original applies it on the right
        return tensor.t().contiguous()
    if name.startswith("pixel_decoder."):  # 1x1 convolution -> linear map
        return tensor.flatten(1)
    return tensor


def _convert_state_dict(
    state_dict: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], config: Any
) -> dict[str, torch.Tensor]:
    """Our state dict, with the names and shapes of `expected`; every name of the original's is accounted for."""
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
    """The variant, which the names of the fusion blocks tell."""
    markers = {kind: renamings[0][1] for kind, renamings in _VARIANT_RENAMINGS.items()}
    found = [kind for kind, marker in markers.items() if any(name.startswith(marker) for name in names)]
    if len(found) != 1:
        raise ValueError(
            f"Expected the fusion blocks of exactly one variant, names that begin with one of {list(markers.values())}; "
            f"found those of {found or 'none'} among {len(names)} names."
        )
    return found[0]


def _num_layers(names: set[str], prefix: str) -> int:
    return len({match.group(1) for name in names if (match := re.match(re.escape(prefix) + r"\.(\d+)\.", name))})


def _config_from_state_dict(
    state_dict: dict[str, torch.Tensor],
    image_size: int,
    num_attention_heads: int,
    text_num_attention_heads: int,
    **fusion_values: Any,
) -> ReSTRConfig:
    """Read every size off the shapes."""
    try:
        patch_weight = state_dict["encoder_v.patch_embed.proj.weight"]
        vision_fc1 = state_dict["encoder_v.blocks.0.mlp.fc1.weight"]
        word_vectors = state_dict["encoder_l.embedding.weight"]
        text_fc1 = state_dict["encoder_l.blocks.0.mlp.fc1.weight"]
        text_projection = state_dict["encoder_l.proj_lang.weight"]
        visual_projection = state_dict["fusion_module.proj_v.weight"]
    except KeyError as error:
        raise ValueError(f"This is no state dict of the original ReSTR: it lacks {error}.") from error
    names = set(state_dict)
    return ReSTRConfig(
        vision_config=ReSTRVisionConfig(
            hidden_size=patch_weight.shape[0],
            num_hidden_layers=_num_layers(names, "encoder_v.blocks"),
            num_attention_heads=num_attention_heads,
            intermediate_size=vision_fc1.shape[0],
            image_size=image_size,
            patch_size=patch_weight.shape[2],
            num_channels=patch_weight.shape[1],
        ),
        text_config=ReSTRTextConfig(
            vocab_size=word_vectors.shape[0],
            hidden_size=word_vectors.shape[1],
            num_hidden_layers=_num_layers(names, "encoder_l.blocks"),
            num_attention_heads=text_num_attention_heads,
            intermediate_size=text_fc1.shape[0],
            projection_dim=text_projection.shape[0],
        ),
        fusion_type=_fusion_type(names),
        hidden_size=visual_projection.shape[0],
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
        num_fusion_layers (`int`): How many blocks (or, shared, applications of one) each fusion encoder has.
        share_fusion_layers (`bool`): Whether each fusion encoder has one block.
        use_pixel_decoder (`bool`): Whether the model has the pixel decoder.

    Returns:
        [`ReSTRForImageSegmentation`] in evaluation mode.

    Raises:
        `ValueError`: Names are missing or unknown (they are listed), or shapes do not fit.
    """
    config = _config_from_state_dict(
        state_dict,
        image_size,
        num_attention_heads,
        text_num_attention_heads,
        num_fusion_layers=num_fusion_layers,
        share_fusion_layers=share_fusion_layers,
        use_pixel_decoder=use_pixel_decoder,
    )
    model = ReSTRForImageSegmentation(config)
    model.load_state_dict(_convert_state_dict(state_dict, model.state_dict(), config))
    return model.eval()


def load_original_checkpoint(path: str | Path) -> dict[str, torch.Tensor]:
    """
    The state dict in a `.pth`, read without running any code in it; wrappers of training scripts are taken off.

    Raises:
        `ValueError`: The file holds other things than weights, or no state dict.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds other things than weights, which are not loaded because they could run code. If you trust "
            f"the file, save its state dict alone to a new one and convert that. {error}"
        ) from error
    while isinstance(checkpoint, dict) and (
        keys := [key for key in _WRAPPERS if isinstance(checkpoint.get(key), dict)]
    ):
        checkpoint = checkpoint[keys[0]]
    if not isinstance(checkpoint, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in checkpoint.items()
    ):
        raise ValueError(f"{path} holds no state dict: expected names and tensors, or those under 'state_dict'.")
    return {name.removeprefix("module."): tensor for name, tensor in checkpoint.items()}


def convert_checkpoint(
    checkpoint: str | Path, vocabulary: str | Path, output_dir: str | Path, image_size: int, **model_options: Any
) -> None:
    """
    Convert a `.pth` and its vocabulary file to a folder for `from_pretrained`.

    Args:
        checkpoint (`str` or `Path`): The original's weights.
        vocabulary (`str` or `Path`): Its vocabulary, one word a line; a word's id is the number of its line.
        output_dir (`str` or `Path`): The folder, with everything that [`~hub.save_bundle`] writes.
        image_size (`int`): Side in pixels of the square input that the checkpoint was trained for.
        model_options: The other arguments of [`model_from_original_state_dict`].

    Raises:
        `ValueError`: The files are malformed or do not belong together.
    """
    from .hub import save_bundle  # here: the conversion of a state dict needs none of what a bundle holds

    model = model_from_original_state_dict(
        load_original_checkpoint(checkpoint), image_size=image_size, **model_options
    )
    words = read_vocabulary(vocabulary)
    text_config: Any = model.config.text_config
    num_ids, num_rows = max(words.values()) + 1, text_config.vocab_size
    if num_ids > num_rows:
        raise ValueError(
            f"{vocabulary} has {num_ids} lines, but the checkpoint's word embedding has {num_rows} rows: they do not "
            f"belong together."
        )
    if num_ids < num_rows:
        logger.warning(
            f"{vocabulary} has {num_ids} lines and the checkpoint's word embedding has {num_rows} rows: make sure that "
            f"they belong together."
        )
    processor = ReSTRProcessor(
        ReSTRImageProcessor(size={"height": image_size, "width": image_size}),
        build_tokenizer(words, max_length=text_config.max_position_embeddings),
    )
    save_bundle(model, processor, output_dir)


def main() -> None:
    parser = ArgumentParser(description="Convert an original ReSTR checkpoint to a folder for from_pretrained.")
    parser.add_argument("--checkpoint", type=Path, required=True, help="the original's .pth")
    parser.add_argument("--vocabulary", type=Path, required=True, help="its vocabulary file, one word a line")
    add_options(parser, output_dir={"required": True})
    parser.add_argument("--image_size", type=int, required=True, help="side of the input it was trained for")
    parser.add_argument("--num_attention_heads", type=int, default=12, help="of the vision and fusion encoders")
    parser.add_argument("--text_num_attention_heads", type=int, default=12)
    parser.add_argument("--num_fusion_layers", type=int, default=2)
    parser.add_argument("--share_fusion_layers", action="store_true", help="one block, applied several times")
    parser.add_argument("--coarse", action="store_true", help="the checkpoint has no pixel decoder")
    options = vars(parser.parse_args())
    options["use_pixel_decoder"] = not options.pop("coarse")
    convert_checkpoint(**options)
    print(f"Wrote {options['output_dir']}: load it with ReSTRForImageSegmentation.from_pretrained.")


if __name__ == "__main__":
    main()
