"""
Convert a checkpoint of the original ReSTR implementation to a folder that `from_pretrained` loads:

    python -m modeling_restr.convert_restr_original_to_hf --checkpoint restr.pth --vocabulary vocabulary.txt \
        --image_size 480 --output_dir restr-refcoco
"""

import argparse
import re
from pathlib import Path
from typing import Any

import torch

from .configuration_restr import ReSTRConfig, ReSTRTextConfig, ReSTRVisionConfig
from .image_processing_restr import ReSTRImageProcessor
from .modeling_restr import ReSTRForImageSegmentation
from .processing_restr import ReSTRProcessor
from .tokenization_restr import build_tokenizer, read_vocabulary


# The original's names -> ours, applied in turn. A block is the same inside every encoder.
_RENAMINGS = (
    (r"^encoder_v\.cls_token$", "model.vision_model.embeddings.class_embedding"),
    (r"^encoder_v\.pos_embed$", "model.vision_model.embeddings.position_embeddings"),
    (r"^encoder_v\.patch_embed\.proj\.", "model.vision_model.embeddings.patch_embedding."),
    (r"^encoder_v\.norm\.", "model.vision_model.layer_norm."),
    (r"^encoder_v\.blocks\.", "model.vision_model.layers."),
    (r"^encoder_l\.embedding\.", "model.text_model.embeddings.embed_tokens."),
    (r"^encoder_l\.proj_lang\.", "model.text_model.projection."),
    (r"^encoder_l\.lang_norm\.", "model.text_model.layer_norm."),
    (r"^encoder_l\.blocks\.", "model.text_model.layers."),
    (r"^fusion_module\.(?:blocks_vl|blocksvl|blocks)\.", "model.fusion.layers."),
    (r"^fusion_module\.(?:blocks_ls|blockslm)\.", "model.fusion.seed_layers."),
    (r"^fusion_module\.proj_v\.", "model.fusion.visual_projection."),
    (r"^fusion_module\.proj_l\.", "model.fusion.text_projection."),
    (r"^fusion_module\.seed_emb$", "model.fusion.seed_embedding"),
    (r"^fusion_module\.(?:norm|decoder_norm)\.", "model.fusion.layer_norm."),
    (r"^fusion_module\.proj_patch$", "model.fusion.patch_projection.weight"),
    (r"^fusion_module\.proj_cls$", "model.fusion.classifier_projection.weight"),
    (r"^fusion_module\.(?:decoder|upconvs)\.(\d+)\.up\.1\.", r"pixel_decoder.layers.\1."),
    (r"^fusion_module\.(?:decoder\.\d+|last_convs)\.", "pixel_decoder.head."),
    (r"(\.\d+)\.norm([12])\.", r"\1.layer_norm\2."),
    (r"(\.\d+)\.attn\.proj\.", r"\1.self_attn.out_proj."),
    (r"(\.\d+)\.attn\.qkv\.", r"\1.self_attn.qkv."),
)
# The classification head of the ImageNet start, which ReSTR does not use.
_UNUSED = r"^encoder_v\.head\."


def convert_state_dict(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the original's weights: split `qkv`, transpose the matrices applied on the right, drop what is unused."""
    converted = {}
    for original_name, tensor in state_dict.items():
        if re.search(_UNUSED, original_name):
            continue
        name = original_name
        for pattern, replacement in _RENAMINGS:
            name = re.sub(pattern, replacement, name)
        if ".qkv." in name:
            for letter, part in zip("qkv", tensor.chunk(3)):
                converted[name.replace(".qkv.", f".{letter}_proj.")] = part.clone()
        elif original_name.endswith(("proj_patch", "proj_cls")):
            converted[name] = tensor.t().contiguous()
        elif name.startswith("pixel_decoder."):
            converted[name] = tensor.flatten(1)  # 1x1 convolution -> linear map
        else:
            converted[name] = tensor
    return converted


def _fusion_type(names: set[str]) -> str:
    """The variant, which the names of the fusion blocks tell."""
    markers = {
        "coupled": "fusion_module.blocks_vl.",
        "independent": "fusion_module.blocksvl.",
        "vanilla": "fusion_module.blocks.",
    }
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
    converted, expected = convert_state_dict(state_dict), model.state_dict()
    missing, unknown = sorted(set(expected) - set(converted)), sorted(set(converted) - set(expected))
    if missing or unknown:
        raise ValueError(
            f"The state dict does not fit a {config.fusion_type!r} ReSTR with num_fusion_layers={num_fusion_layers}, "
            f"share_fusion_layers={share_fusion_layers}, use_pixel_decoder={use_pixel_decoder}. Missing names: "
            f"{missing}. Unknown names: {unknown}."
        )
    wrong = [
        f"{name}: expected {tuple(expected[name].shape)}, got {tuple(tensor.shape)}"
        for name, tensor in converted.items()
        if tensor.shape != expected[name].shape
    ]
    if wrong:
        raise ValueError(f"Shapes do not fit `image_size={image_size}` and one another: {'; '.join(wrong)}.")
    model.load_state_dict(converted)
    return model.eval()


def load_original_checkpoint(path: str | Path) -> dict[str, torch.Tensor]:
    """The state dict in a `.pth`, read without running any code in it; wrappers of training scripts are taken off."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(checkpoint, dict) and isinstance(checkpoint.get(key), dict):
            checkpoint = checkpoint[key]
    if not isinstance(checkpoint, dict) or not all(isinstance(value, torch.Tensor) for value in checkpoint.values()):
        raise ValueError(f"{path} holds no state dict: expected names and tensors, or those under 'state_dict'.")
    return {name.removeprefix("module."): tensor for name, tensor in checkpoint.items()}


def convert_checkpoint(
    checkpoint: str | Path, vocabulary: str | Path, output_dir: str | Path, image_size: int, **model_options: Any
) -> None:
    """Convert a `.pth` and its vocabulary file (one word a line, its id the line's number) into `output_dir`."""
    model = model_from_original_state_dict(
        load_original_checkpoint(checkpoint), image_size=image_size, **model_options
    )
    words = read_vocabulary(vocabulary)
    rows = model.config.text_config.vocab_size
    if max(words.values()) >= rows:
        raise ValueError(
            f"{vocabulary} has ids up to {max(words.values())}, but the checkpoint's word embedding has {rows} rows: "
            f"they do not belong together."
        )
    processor = ReSTRProcessor(
        ReSTRImageProcessor(size={"height": image_size, "width": image_size}), build_tokenizer(words)
    )
    model.save_pretrained(output_dir)
    processor.save_pretrained(output_dir)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Convert an original ReSTR checkpoint to a folder for from_pretrained."
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="the original's .pth")
    parser.add_argument("--vocabulary", type=Path, required=True, help="its vocabulary file, one word a line")
    parser.add_argument("--output_dir", type=Path, required=True)
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
