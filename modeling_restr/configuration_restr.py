"""ReSTR model configuration."""

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeAlias

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedConfig


if TYPE_CHECKING:  # `__post_init__` resolves these fields: a config never holds None or a dict
    _Config: TypeAlias = Any
    _Int: TypeAlias = Any
    _Float: TypeAlias = Any
else:
    _Config, _Int, _Float = dict | PreTrainedConfig | None, int | None, float | int | None

FUSION_TYPES = ("coupled", "independent", "vanilla")

# Where the classes are in a folder or Hub repository that carries the code.
_AUTO_MAP = {
    "AutoConfig": "configuration_restr.ReSTRConfig",
    "AutoModel": "modeling_restr.ReSTRModel",
    "AutoModelForImageSegmentation": "modeling_restr.ReSTRForImageSegmentation",
}
_PIPELINE = {"impl": "pipeline_restr.ReSTRPipeline", "pt": ["AutoModelForImageSegmentation"]}

# Keys that are no fields of a config and still come through `config.json` or `from_pretrained`; so do private ones.
_KEYS_HANDLED_BY_TRANSFORMERS = frozenset(
    {
        "attn_implementation",
        "auto_map",
        "base_model_tp_plan",
        "custom_pipelines",
        "experts_implementation",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "quantization_config",
        "tie_last_hidden_states",
        "tie_word_embeddings",
        "torch_dtype",
    }
)


def _reject_unknown_keys(config: PreTrainedConfig, kwargs: dict[str, Any]) -> None:
    """Raise a `ValueError` that names the keys which transformers would store without a word."""
    known = _KEYS_HANDLED_BY_TRANSFORMERS | GenerationConfig._get_default_generation_params().keys()
    unknown = sorted(key for key in kwargs if key not in known and not key.startswith("_"))
    if unknown:
        expected = list(type(config).__annotations__)
        raise ValueError(
            f"{type(config).__name__} got unknown keys {unknown}: check their spelling, expected any of {expected}."
        )


def _check_heads(name: str, hidden_size: int, num_attention_heads: int) -> None:
    if num_attention_heads <= 0 or hidden_size % num_attention_heads != 0:
        raise ValueError(
            f"{name}: `hidden_size` must be a multiple of `num_attention_heads`, got {hidden_size} and "
            f"{num_attention_heads}."
        )


@strict
class ReSTRVisionConfig(PreTrainedConfig):
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
        image_size (`int`, defaults to 480): Side of the square image in pixels that the positions are learned for.
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
    layer_norm_eps: float = 1e-5
    attention_dropout: float | int = 0.0
    drop_path_rate: float | int = 0.1
    image_size: int = 480
    patch_size: int = 16
    num_channels: int = 3
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        _reject_unknown_keys(self, kwargs)
        self.validate_architecture()
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Raise a `ValueError` when sizes do not fit one another."""
        _check_heads(type(self).__name__, self.hidden_size, self.num_attention_heads)
        if self.patch_size <= 0 or self.image_size <= 0 or self.image_size % self.patch_size != 0:
            raise ValueError(
                f"{type(self).__name__}: `image_size` must be a positive multiple of `patch_size`, got "
                f"{self.image_size} and {self.patch_size}."
            )
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"{type(self).__name__}: `drop_path_rate` must be in [0, 1), got {self.drop_path_rate}.")


@strict
class ReSTRTextConfig(PreTrainedConfig):
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
        pad_token_id (`int`, defaults to 0): Id of the padding word, whose vector is zero.
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
    layer_norm_eps: float = 1e-5
    attention_dropout: float | int = 0.0
    max_position_embeddings: int = 20
    pad_token_id: int = 0
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        _reject_unknown_keys(self, kwargs)
        self.validate_architecture()
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Raise a `ValueError` when sizes do not fit one another."""
        _check_heads(type(self).__name__, self.hidden_size, self.num_attention_heads)
        if self.max_position_embeddings < 1:
            raise ValueError(
                f"{type(self).__name__}: `max_position_embeddings` must be 1 or more, got "
                f"{self.max_position_embeddings}."
            )
        if not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"{type(self).__name__}: `pad_token_id` must be below `vocab_size`, got {self.pad_token_id} and "
                f"{self.vocab_size}."
            )


@strict
class ReSTRConfig(PreTrainedConfig):
    r"""
    Configuration of [`ReSTRModel`] and [`ReSTRForImageSegmentation`]. The defaults are those of the published model
    (ReSTR, CVPR 2022, arXiv 2203.16768).

    Args:
        vision_config (`dict` or `PreTrainedConfig`, *optional*):
            The vision encoder: a [`ReSTRVisionConfig`] (the default; also what a `dict` without `model_type` gives)
            or the config of any plain ViT of transformers whose model returns patch tokens behind its prefix tokens
            (ViT, DeiT, DINOv2, ...).
        text_config (`dict` or [`ReSTRTextConfig`], *optional*): The language encoder.
        fusion_type (`str`, defaults to `"coupled"`):
            `"coupled"` (the published model), `"independent"` or `"vanilla"` (the paper's ablation).
        num_fusion_layers (`int`, defaults to 2): Number of blocks of each fusion encoder.
        share_fusion_layers (`bool`, defaults to `False`):
            Whether each fusion encoder has one block that is applied `num_fusion_layers` times.
        hidden_size (`int`, *optional*): Width of the fusion encoders; that of the vision encoder by default.
        num_attention_heads (`int`, defaults to 12): Attention heads of the fusion encoders; divides `hidden_size`.
        intermediate_size (`int`, *optional*): Width of the fusion MLPs; four times `hidden_size` by default.
        hidden_act (`str`, defaults to `"gelu"`): Activation of the fusion MLPs.
        layer_norm_eps (`float`, defaults to 1e-5): Epsilon of the fusion LayerNorms.
        attention_dropout (`float`, defaults to 0.0): Dropout on the fusion attention weights.
        use_pixel_decoder (`bool`, defaults to `True`):
            Whether logits are decoded to pixels; otherwise the patch logits are the output.
        patch_loss_weight (`float`, *optional*):
            Weight of the patch loss beside the pixel loss; 0.1 with the pixel decoder, 0 without it.
        attend_to_padding (`bool`, defaults to `True`):
            The original's rule: padding slots are zeroed after their projection, and attended to, so that every
            expression has to be padded to `max_position_embeddings`. `False` keeps them out of every attention; then
            the length of the padding does not change the answer.
        initializer_range (`float`, defaults to 0.02): Standard deviation of random weights.

    Example:

    ```python
    >>> from modeling_restr import ReSTRConfig, ReSTRForImageSegmentation

    >>> model = ReSTRForImageSegmentation(ReSTRConfig())  # random weights, the published architecture

    >>> from transformers import ViTConfig

    >>> config = ReSTRConfig(vision_config=ViTConfig(image_size=384), fusion_type="vanilla")
    ```"""

    model_type = "restr"
    # Trainer's evaluation then gathers the logits alone.
    keys_to_ignore_at_inference = [
        "loss_pixel",
        "loss_patch",
        "patch_logits",
        "vision_embeds",
        "text_embeds",
        "hidden_states",
        "attentions",
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
    num_attention_heads: int = 12
    intermediate_size: _Int = None
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    attention_dropout: float | int = 0.0
    use_pixel_decoder: bool = True
    patch_loss_weight: _Float = None
    attend_to_padding: bool = True
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        _reject_unknown_keys(self, kwargs)
        self.vision_config = self._resolve_vision_config(self.vision_config)
        self.text_config = self._resolve_text_config(self.text_config)
        if self.hidden_size is None:
            self.hidden_size = self.vision_config.hidden_size
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.patch_loss_weight is None:
            self.patch_loss_weight = 0.1 if self.use_pixel_decoder else 0.0
        self.validate_architecture()
        super().__post_init__(**kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """
        As in transformers, which names the one class that is saved with its code: here every class that the code has
        is named, so that `AutoModel` and `pipeline` find theirs, too.
        """
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
        if model_type not in CONFIG_MAPPING:
            raise ValueError(
                f"`vision_config` has the `model_type` {model_type!r}, which transformers does not know: expected "
                f"{ReSTRVisionConfig.model_type!r} or that of a plain ViT, such as 'vit', 'deit' or 'dinov2'."
            )
        return CONFIG_MAPPING[model_type](**values)

    @staticmethod
    def _resolve_text_config(text_config: dict | PreTrainedConfig | None) -> PreTrainedConfig:
        values = text_config.to_dict() if isinstance(text_config, PreTrainedConfig) else dict(text_config or {})
        model_type = values.get("model_type", ReSTRTextConfig.model_type)
        if model_type != ReSTRTextConfig.model_type:
            raise ValueError(f"`text_config` must be a {ReSTRTextConfig.model_type!r}, got a {model_type!r}.")
        return text_config if isinstance(text_config, PreTrainedConfig) else ReSTRTextConfig(**values)

    def validate_architecture(self):
        """Raise a `ValueError` when values do not fit one another."""
        if self.fusion_type not in FUSION_TYPES:
            raise ValueError(f"`fusion_type` must be one of {FUSION_TYPES}, got {self.fusion_type!r}.")
        if self.patch_loss_weight < 0:
            raise ValueError(f"`patch_loss_weight` must not be negative, got {self.patch_loss_weight}.")
        if self.num_fusion_layers < 1:
            raise ValueError(f"`num_fusion_layers` must be 1 or more, got {self.num_fusion_layers}.")
        _check_heads(type(self).__name__, self.hidden_size, self.num_attention_heads)
        if getattr(self.vision_config, "num_detection_tokens", 0):
            raise ValueError(
                f"`vision_config` must be that of a plain ViT, whose patch tokens come last; a "
                f"{self.vision_config.model_type!r} encoder has detection tokens behind them."
            )
        for name in ("image_size", "patch_size"):
            if not isinstance(getattr(self.vision_config, name, None), int | Iterable):
                raise ValueError(
                    f"`vision_config` must be that of a plain ViT with `image_size` and `patch_size`; "
                    f"{type(self.vision_config).__name__} has no `{name}`."
                )


__all__ = ["ReSTRConfig", "ReSTRTextConfig", "ReSTRVisionConfig"]
