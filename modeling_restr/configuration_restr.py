"""ReSTR model configuration."""

from .requirements_restr import TRANSFORMERS  # noqa: F401  (first: checks the version of transformers)


# isort: split
import copy
import dataclasses
import difflib
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import torch
from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.utils import logging


if TYPE_CHECKING:  # `__post_init__` replaces None and dicts in these fields
    _Config: TypeAlias = Any
    _Int: TypeAlias = Any
    _Float: TypeAlias = Any
else:
    _Config, _Int, _Float = dict | PreTrainedConfig | None, int | None, float | int | None

logger = logging.get_logger(__name__)

# Where the classes are in a folder or Hub repository that contains the code.
_AUTO_MAP = {
    "AutoConfig": "configuration_restr.ReSTRConfig",
    "AutoModel": "modeling_restr.ReSTRModel",
    "AutoModelForImageSegmentation": "modeling_restr.ReSTRForImageSegmentation",
}
# Tags on the card of everything that is pushed.
MODEL_TAGS = ("referring-image-segmentation", "restr")
_PIPELINE = {"impl": "pipeline_restr.ReSTRPipeline", "pt": ["AutoModelForImageSegmentation"]}


def _count(maximum: int) -> tuple[str, Callable[[Any], bool]]:
    return f"from 1 to {maximum}", lambda value: 1 <= value <= maximum


def _one_of(values: Iterable[str]) -> tuple[str, Callable[[Any], bool]]:
    return f"one of {tuple(values)}", lambda value: value in values


# The values that each field may have. The upper bounds of counts are far above every known model: with them, an extra
# digit raises an error at once instead of filling the memory or building layers for hours.
_BOUNDS = {
    **dict.fromkeys(("hidden_size", "intermediate_size", "num_attention_heads", "projection_dim"), _count(2**16)),
    **dict.fromkeys(("num_hidden_layers", "num_fusion_layers"), _count(1000)),
    **dict.fromkeys(("image_size", "patch_size", "max_position_embeddings"), _count(2**14)),
    "num_channels": _count(2**10),
    "vocab_size": _count(2**24),
    "fusion_type": _one_of(("coupled", "independent", "vanilla")),
    "hidden_act": _one_of(ACT2FN),
    **dict.fromkeys(("attention_dropout", "drop_path_rate"), ("in [0, 1)", lambda value: 0 <= value < 1)),
    "layer_norm_eps": ("positive and at most 1", lambda value: 0 < value <= 1),
    **dict.fromkeys(
        ("initializer_range", "patch_loss_weight"), ("from 0 to 10**6", lambda value: 0 <= value <= 10**6)
    ),
    "pad_token_id": ("not negative", lambda value: value >= 0),
}


# Vision models that the checks of shapes would accept, or that need their own advice: the reason and the advice.
_REFUSED_VISION_MODELS = {
    "vit_mae": (
        "it shuffles its patches at every call",
        "Its weights load as a plain ViT: take what `ViTModel.from_pretrained(...).save_pretrained(...)` saves.",
    ),
    "siglip2_vision_model": (
        "it reads patches of images of any shape (NaFlex)",
        "Take a SigLIP 2 of fixed size, such as google/siglip2-base-patch16-224, whose model type is 'siglip'.",
    ),
}


def refuse_vision_config(
    config: PreTrainedConfig,
    reason: str,
    advice: str = "Take one that makes one token per patch, in rows: ViT, DeiT, DINOv2, DINOv3, CLIP or SigLIP.",
) -> NoReturn:
    """Raise a `ValueError` for a vision encoder that is not a plain ViT."""
    name = f"{type(config).__name__} ({config.model_type!r})"
    raise ValueError(f"The vision encoder must be a plain ViT, got a {name}: {reason}. {advice}")


def check_vision_config(config: PreTrainedConfig) -> None:
    """Refuse a config that cannot describe a plain ViT, and say what to use instead."""
    if not isinstance(config.model_type, str):
        refuse_vision_config(config, "its `model_type` is not text")
    if config.model_type in _REFUSED_VISION_MODELS:
        refuse_vision_config(config, *_REFUSED_VISION_MODELS[config.model_type])
    if isinstance(getattr(config, "vision_config", None), PreTrainedConfig):
        refuse_vision_config(config, "its vision encoder is one of several parts", "Pass its `vision_config`.")
    if getattr(config, "depths", None):
        refuse_vision_config(config, "it has several stages, each with fewer tokens")
    if getattr(config, "num_detection_tokens", 0):
        refuse_vision_config(config, "it has detection tokens after its patch tokens")
    for name in ("image_size", "patch_size", "hidden_size", "num_channels"):
        value = getattr(config, name, None)
        is_pair = name in ("image_size", "patch_size") and isinstance(value, list | tuple) and len(value) == 2
        if not isinstance(value, int) and not is_pair:
            refuse_vision_config(config, f"it has no `{name}`" if value is None else f"its `{name}` is {value}")


class ReSTRBaseConfig(PreTrainedConfig):
    """Base of ReSTR's configs. They check the values of their fields and keep unknown keys, as other configs do."""

    def __post_init__(self, **kwargs):
        self._refuse_names_of_methods(kwargs)
        self._check_dtypes(self.dtype, kwargs.get("torch_dtype"))
        self._check_id2label()
        self.resolve_defaults()
        self.validate_architecture()
        super().__post_init__(**kwargs)
        self._warn_of_misspelt_keys(kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Create a config as in transformers, and also check the values of `from_pretrained(..., key=value)`."""
        cls._refuse_names_of_methods(kwargs)
        config, unused_kwargs = super().from_dict(config_dict, return_unused_kwargs=True, **kwargs)
        config._check_id2label()  # the types were checked before; now `dtype` may also be "auto"
        config.resolve_defaults()
        config.validate_architecture()
        config._warn_of_misspelt_keys(unused_kwargs)
        return (config, unused_kwargs) if return_unused_kwargs else config

    @classmethod
    def _refuse_names_of_methods(cls, keys: Iterable[str]) -> None:
        names = [key for key in keys if callable(getattr(cls, key, None))]
        if names:
            raise ValueError(
                f"{cls.__name__}: expected keys that are not methods of a config, got {names}. Rename them."
            )

    def _check_dtypes(self, *values: Any) -> None:
        """Refuse types that transformers would fail on without naming them."""
        for value in values:
            dtype = getattr(torch, value, None) if isinstance(value, str) else value
            if value is not None and not isinstance(dtype, torch.dtype):
                raise ValueError(f"{type(self).__name__}: `dtype` must be a type of PyTorch, got {value!r}.")

    def _check_id2label(self) -> None:
        if not isinstance(self.id2label, dict | None):
            raise ValueError(f"{type(self).__name__}: `id2label` must be a dict, got {self.id2label!r}.")

    def resolve_defaults(self) -> None:
        """Derive the fields that were left open from other fields."""

    def validate_architecture(self) -> None:
        """Raise a `ValueError` for values that are out of bounds or inconsistent."""
        for name in (field.name for field in dataclasses.fields(self) if field.name in _BOUNDS):
            expected, is_valid = _BOUNDS[name]
            if not is_valid(getattr(self, name)):
                raise ValueError(f"{type(self).__name__}: `{name}` must be {expected}, got {getattr(self, name)!r}.")
        self._check_multiple("hidden_size", "num_attention_heads")

    def _check_multiple(self, name: str, divisor_name: str) -> None:
        value, divisor = getattr(self, name), getattr(self, divisor_name)
        if value % divisor != 0:
            raise ValueError(
                f"{type(self).__name__}: `{name}` must be a multiple of `{divisor_name}`, got {value} and {divisor}."
            )

    def _known_fields(self) -> dict[str, str]:
        """Map all field names, including those of the parts, to paths: `{"patch_size": "vision_config.patch_size"}`."""
        parts = {name: getattr(self, name) for name in self.sub_configs}
        fields = {f.name: f"{part}.{f.name}" for part, config in parts.items() for f in dataclasses.fields(config)}
        return {**fields, **{field.name: field.name for field in dataclasses.fields(self)}}

    def _warn_of_misspelt_keys(self, keys: Iterable[str]) -> None:
        """
        Log one warning that names the field that each key probably means. Keys that transformers' own tools add, such
        as the ids of special tokens, which resemble `pad_token_id`, cause no warning.
        """
        fields = self._known_fields()
        nearest = {key: difflib.get_close_matches(key, fields, n=1, cutoff=0.8) for key in keys}
        hints = [
            f"`{key}` (did you mean `{fields[matches[0]]}`?)"
            for key, matches in nearest.items()
            if matches and not key.startswith("_") and not key.endswith(("_token_id", "_encoder_decoder"))
        ]
        if hints:
            logger.warning(f"{type(self).__name__} has no field {', '.join(hints)}. Unknown keys have no effect.")


@strict
class ReSTRVisionConfig(ReSTRBaseConfig):
    r"""
    Configuration of [`ReSTRVisionModel`], a plain ViT. The defaults are ReSTR's: ViT-B/16 at 480x480.

    Args:
        hidden_size (`int`, defaults to 768): Width of a patch token.
        num_hidden_layers (`int`, defaults to 12): Number of pre-norm blocks.
        num_attention_heads (`int`, defaults to 12): Number of attention heads; divides `hidden_size`.
        intermediate_size (`int`, defaults to 3072): Width of the MLP's hidden layer.
        hidden_act (`str`, defaults to `"gelu"`): Activation of the MLP; the original uses the exact GELU.
        layer_norm_eps (`float`, defaults to 1e-5): Epsilon of every LayerNorm.
        attention_dropout (`float`, defaults to 0.0): Dropout on the attention weights.
        drop_path_rate (`float`, defaults to 0.1): Stochastic depth of the last block; it rises linearly from 0.
        image_size (`int`, defaults to 480): Side in pixels of the square images that the positions are learned for.
        patch_size (`int`, defaults to 16): Side of a square patch in pixels; divides `image_size`.
        num_channels (`int`, defaults to 3): Number of image channels.
        initializer_range (`float`, defaults to 0.02): Standard deviation of random weights.

    Example:

    ```python
    >>> from modeling_restr import ReSTRVisionConfig, ReSTRVisionModel

    >>> model = ReSTRVisionModel(ReSTRVisionConfig(hidden_size=192, num_attention_heads=3, intermediate_size=768))
    ```"""

    model_type = "restr_vision_model"
    base_config_key = "vision_config"

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    layer_norm_eps: float | int = 1e-5
    attention_dropout: float | int = 0.0
    drop_path_rate: float | int = 0.1
    image_size: int = 480
    patch_size: int = 16
    num_channels: int = 3
    initializer_range: float | int = 0.02

    def validate_architecture(self) -> None:
        super().validate_architecture()
        self._check_multiple("image_size", "patch_size")


@strict
class ReSTRTextConfig(ReSTRBaseConfig):
    r"""
    Configuration of [`ReSTRTextModel`]. The defaults are ReSTR's for the RefCOCO family.

    Args:
        vocab_size (`int`, defaults to 12112): Rows of the word embedding: the largest word id + 1.
        hidden_size (`int`, defaults to 300): Width of a word vector.
        num_hidden_layers (`int`, defaults to 6): Number of post-norm blocks.
        num_attention_heads (`int`, defaults to 12): Number of attention heads; divides `hidden_size`.
        intermediate_size (`int`, defaults to 1200): Width of the MLP's hidden layer.
        projection_dim (`int`, defaults to 768): Width of the word features after the final projection.
        hidden_act (`str`, defaults to `"gelu"`): Activation of the MLP.
        layer_norm_eps (`float`, defaults to 1e-5): Epsilon of every LayerNorm.
        attention_dropout (`float`, defaults to 0.0): Dropout on the attention weights.
        max_position_embeddings (`int`, defaults to 20): Number of word slots of an expression.
        pad_token_id (`int`, defaults to 0): Id of the padding word. Its vector is zero.
        initializer_range (`float`, defaults to 0.02): Standard deviation of random weights.

    Example:

    ```python
    >>> from modeling_restr import ReSTRTextConfig, ReSTRTextModel

    >>> model = ReSTRTextModel(ReSTRTextConfig(vocab_size=1000))
    ```"""

    model_type = "restr_text_model"
    base_config_key = "text_config"

    vocab_size: int = 12112
    hidden_size: int = 300
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    intermediate_size: int = 1200
    projection_dim: int = 768
    hidden_act: str = "gelu"
    layer_norm_eps: float | int = 1e-5
    attention_dropout: float | int = 0.0
    max_position_embeddings: int = 20
    pad_token_id: int = 0
    initializer_range: float | int = 0.02

    def validate_architecture(self) -> None:
        super().validate_architecture()
        if self.pad_token_id >= self.vocab_size:
            raise ValueError(
                f"{type(self).__name__}: `pad_token_id` must be below `vocab_size`, got {self.pad_token_id} and "
                f"{self.vocab_size}."
            )


@strict
class ReSTRConfig(ReSTRBaseConfig):
    r"""
    Configuration of [`ReSTRModel`] and [`ReSTRForImageSegmentation`]. The defaults give the published model (ReSTR,
    CVPR 2022, arXiv 2203.16768).

    Args:
        vision_config (`dict` or `PreTrainedConfig`, *optional*):
            The vision encoder: a [`ReSTRVisionConfig`] (the default, also for a `dict` without `model_type`) or the
            config of any plain ViT of transformers that returns patch tokens after its prefix tokens (ViT, DeiT,
            DINOv2, DINOv3, CLIP, SigLIP, ...).
        text_config (`dict` or [`ReSTRTextConfig`], *optional*): The language encoder.
        fusion_type (`str`, defaults to `"coupled"`):
            `"coupled"` (the published model), `"independent"` or `"vanilla"` (the paper's ablation).
        num_fusion_layers (`int`, defaults to 2): Number of blocks of each fusion encoder.
        share_fusion_layers (`bool`, defaults to `False`):
            Whether each fusion encoder has one block that is applied `num_fusion_layers` times.
        hidden_size (`int`, *optional*): Width of the fusion encoders; the vision encoder's by default.
        num_attention_heads (`int`, *optional*):
            Number of attention heads of the fusion encoders; divides `hidden_size`. By default 12, or the vision
            encoder's number if 12 does not divide `hidden_size`.
        intermediate_size (`int`, *optional*): Width of the fusion MLPs; four times `hidden_size` by default.
        hidden_act (`str`, defaults to `"gelu"`): Activation of the fusion MLPs.
        layer_norm_eps (`float`, defaults to 1e-5): Epsilon of the fusion LayerNorms.
        attention_dropout (`float`, defaults to 0.0): Dropout on the fusion attention weights.
        use_pixel_decoder (`bool`, defaults to `True`):
            Whether patches are decoded to one logit per pixel; otherwise the patch logits are the output.
        patch_loss_weight (`float`, *optional*):
            Weight of the patch loss, added to the pixel loss; 0.1 with the pixel decoder, 0 without it.
        attend_to_padding (`bool`, defaults to `True`):
            Whether attention includes padding slots, zeroed after their projection, as in the original. Every
            expression must then be padded to `max_position_embeddings`. `False` keeps padding out of every attention,
            so that the length of the padding does not change the answer.
        initializer_range (`float`, defaults to 0.02): Standard deviation of random weights.

    Example:

    ```python
    >>> from modeling_restr import ReSTRConfig, ReSTRForImageSegmentation

    >>> model = ReSTRForImageSegmentation(ReSTRConfig())  # random weights, the published architecture

    >>> from transformers import ViTConfig

    >>> config = ReSTRConfig(vision_config=ViTConfig(image_size=384), fusion_type="vanilla")
    ```"""

    model_type = "restr"
    # Outputs that Trainer's evaluation does not gather: all but the loss and the logits.
    keys_to_ignore_at_inference = [
        "loss_pixel",
        "loss_patch",
        "patch_logits",
        "vision_embeds",
        "text_embeds",
        "hidden_states",
        "attentions",
        "vision_model_output",
        "text_model_output",
    ]
    # transformers before 5.20 reads `sub_configs`.
    sub_configs = {"vision_config": ReSTRVisionConfig, "text_config": ReSTRTextConfig}
    sub_configs_defaults = {"vision_config": ReSTRVisionConfig, "text_config": ReSTRTextConfig}  # type: ignore[dict-item]

    vision_config: _Config = None
    text_config: _Config = None
    fusion_type: str = "coupled"
    num_fusion_layers: int = 2
    share_fusion_layers: bool = False
    hidden_size: _Int = None
    num_attention_heads: _Int = None
    intermediate_size: _Int = None
    hidden_act: str = "gelu"
    layer_norm_eps: float | int = 1e-5
    attention_dropout: float | int = 0.0
    use_pixel_decoder: bool = True
    patch_loss_weight: _Float = None
    attend_to_padding: bool = True
    initializer_range: float | int = 0.02

    def resolve_defaults(self) -> None:
        """Create the encoders' configs, and derive from them the values that were left open."""
        self.vision_config = self._resolve_vision_config(self.vision_config)
        check_vision_config(self.vision_config)
        self.text_config = self._resolve_text_config(self.text_config)
        self._resolve_widths()
        if self.patch_loss_weight is None:
            self.patch_loss_weight = 0.1 if self.use_pixel_decoder else 0.0

    def _resolve_widths(self) -> None:
        """Derive the widths that were left open, and remember which ones, for `with_vision_config`."""
        names = ("hidden_size", "num_attention_heads", "intermediate_size")
        left_open = [name for name in names if getattr(self, name) is None]
        if self.hidden_size is None:
            self.hidden_size = self.vision_config.hidden_size
        if self.num_attention_heads is None:
            vision_heads = getattr(self.vision_config, "num_attention_heads", 12)
            self.num_attention_heads = 12 if self.hidden_size % 12 == 0 else vision_heads
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        derived = {name: getattr(self, name) for name in left_open}
        self._derived_widths = {**self.__dict__.get("_derived_widths", {}), **derived}

    def with_vision_config(self, vision_config: PreTrainedConfig) -> "ReSTRConfig":
        """
        Copy this config with another vision encoder. `hidden_size`, `num_attention_heads` and `intermediate_size`
        follow it if they were left open in this config and not set since.
        """
        config = copy.deepcopy(self)
        config.vision_config = vision_config
        for name, width in self._derived_widths.items():
            if getattr(config, name) == width:
                setattr(config, name, None)
        config.resolve_defaults()
        config.validate_architecture()
        return config

    def to_dict(self) -> dict[str, Any]:
        """Convert to a dict as in transformers, with all values, including derived ones."""
        return {name: value for name, value in super().to_dict().items() if name != "_derived_widths"}

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save as in transformers, and name every class in the code, so that `AutoModel` and `pipeline` find theirs."""
        if self._auto_class is not None:
            self.auto_map = {**_AUTO_MAP, **(getattr(self, "auto_map", None) or {})}
            self.custom_pipelines = {"image-segmentation": dict(_PIPELINE)}
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @staticmethod
    def _resolve_vision_config(vision_config: dict | PreTrainedConfig | None) -> PreTrainedConfig:
        if isinstance(vision_config, PreTrainedConfig):
            return vision_config
        values = dict(vision_config or {})
        model_type = values.pop("model_type", ReSTRVisionConfig.model_type)
        if model_type == ReSTRVisionConfig.model_type:
            return ReSTRVisionConfig(**values)
        if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
            raise ValueError(
                f"Expected a `vision_config` of `model_type` {ReSTRVisionConfig.model_type!r} or of a plain ViT, such "
                f"as 'vit', 'deit' or 'dinov2', got {model_type!r}, which transformers does not know."
            )
        return CONFIG_MAPPING[model_type](**values)

    @staticmethod
    def _resolve_text_config(text_config: dict | PreTrainedConfig | None) -> PreTrainedConfig:
        values = text_config.to_dict() if isinstance(text_config, PreTrainedConfig) else dict(text_config or {})
        model_type = values.get("model_type", ReSTRTextConfig.model_type)
        if model_type != ReSTRTextConfig.model_type:
            raise ValueError(f"`text_config` must be a {ReSTRTextConfig.model_type!r}, got a {model_type!r}.")
        return text_config if isinstance(text_config, PreTrainedConfig) else ReSTRTextConfig(**values)

    def validate_architecture(self) -> None:
        for part in (self.vision_config, self.text_config):
            if part.model_type in (ReSTRVisionConfig.model_type, ReSTRTextConfig.model_type):
                part.validate_architecture()
        super().validate_architecture()
        check_vision_config(self.vision_config)


__all__ = ["ReSTRConfig", "ReSTRTextConfig", "ReSTRVisionConfig"]
