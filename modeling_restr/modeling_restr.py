"""
PyTorch ReSTR model: convolution-free referring image segmentation with transformers (arXiv 2203.16768).

From pixels and words to logits and loss, for B images of P = h * w patches and N expressions of T words:

    pixel_values (B, 3, H, W)                           input_ids (N, T)
        | ReSTRVisionModel                                  | ReSTRTextModel
    vision_embeds (B, h, w, vision_hidden_size)         text_embeds (N, T, projection_dim)
        | ReSTRFusionEncoder normalises both and projects them to hidden_size
    projected_vision_embeds (B, P, hidden_size)         words (N, T, hidden_size), 0 for padding
        | image_indices (N,) give each expression the patches of its image
    patches (N, P, hidden_size)
        | visual-linguistic encoder over [patches ; words]
    patches (N, P, hidden_size)                         words (N, T, hidden_size)
        |                                                   | seed encoder over [words ; class seed]
    patch_embeds (N, P, hidden_size)                    classifier (N, 1, hidden_size)
        | scalar product of each patch and the classifier
    patch_logits (N, h, w)
        | ReSTRPixelDecoder of [projected_vision_embeds ; patch_embeds * patch_logits]
    logits (N, H, W)
        | labels (N, H, W)
    loss = BCE(logits) + patch_loss_weight * BCE(patch_logits), with BCE the mean binary cross entropy

An image is encoded once, however many expressions are about it. A plain ViT of transformers can replace
ReSTRVisionModel. The checks of all inputs are at the end of the file: they look at shapes, never at values.
"""

if not __package__:  # where a saved model is the working directory, `import modeling_restr` finds its file
    raise ImportError(
        f"Expected the package modeling_restr, but {__file__} is the code of a saved model, which hides it. Run "
        "Python in another folder, or as `python -P`. transformers loads this file with `trust_remote_code=True`."
    )

from .requirements_restr import TRANSFORMERS  # noqa: F401  (first: checks the version of transformers)


# isort: split
import inspect
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, auto_docstring, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_restr import MODEL_TAGS, ReSTRConfig, ReSTRTextConfig, ReSTRVisionConfig
from .vision_encoder_restr import as_pair, fill_vision_model, load_vision_model, resize_positions, unused_parameters


if TYPE_CHECKING:  # transformers saves a model's code with all that it imports: this brings the pipeline along
    from .pipeline_restr import ReSTRPipeline  # noqa: F401


# Descriptions of output fields. `auto_docstring` picks the fields that a class has.
_OUTPUT_FIELDS = r"""
loss (`torch.Tensor` of shape `()`, *optional*, returned when `labels` is provided):
    `loss_pixel + config.patch_loss_weight * loss_patch`.
loss_pixel (`torch.Tensor` of shape `()`, *optional*, returned when `labels` is provided):
    Mean binary cross entropy of `logits`.
loss_patch (`torch.Tensor` of shape `()`, *optional*, returned when `labels` is provided):
    Mean binary cross entropy of `patch_logits`; a patch is positive when any of its pixels is.
logits (`torch.Tensor` of shape `(N, H, W)`):
    One logit per pixel of the model's input. Without the pixel decoder these are the patch logits.
patch_logits (`torch.Tensor` of shape `(N, h, w)`):
    One logit per patch: does it belong to what the expression refers to?
patch_embeds (`torch.Tensor` of shape `(N, h * w, hidden_size)`):
    The patches after the fusion, as the adaptive classifier sees them.
projected_vision_embeds (`torch.Tensor` of shape `(B, h * w, hidden_size)`):
    The projected patch tokens that enter the fusion, once per image.
vision_embeds (`torch.Tensor` of shape `(B, h, w, vision_hidden_size)`):
    The image features. Pass them as `vision_embeds` to ask again without encoding the image.
text_embeds (`torch.Tensor` of shape `(N, T, projection_dim)`):
    The word features.
image_indices (`torch.Tensor` of shape `(N,)`):
    Index of the image that each expression is about.
hidden_states (`tuple[torch.Tensor]`, *optional*, returned when `output_hidden_states=True` is passed):
    Input of the first block of the fusion encoders, then the output of every block.
attentions (`tuple[torch.Tensor]`, *optional*, returned when `output_attentions=True` is passed):
    Attention weights of every block of the fusion encoders. In the seed encoder their shape is
    `(N, num_heads, T + 1, T + 1)`, and the last row has the class seed's attention.
vision_model_output (`BaseModelOutputWithPooling`, *optional*):
    Output of [`~ReSTRForImageSegmentation.get_image_features`]; None if `vision_embeds` was a tensor.
text_model_output (`BaseModelOutputWithPooling`):
    Output of [`~ReSTRForImageSegmentation.get_text_features`].
"""


@dataclass
@auto_docstring(custom_intro="Output of [`ReSTRFusionEncoder`], in which patches have no grid: h * w is P.")
class ReSTRFusionOutput(ModelOutput):
    __doc__ = _OUTPUT_FIELDS

    patch_logits: torch.Tensor | None = None
    patch_embeds: torch.Tensor | None = None
    projected_vision_embeds: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class _CompositeOutput(ModelOutput):
    """An output that contains the encoders' outputs. `to_tuple` converts them as well."""

    def to_tuple(self) -> tuple:
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values())


@dataclass
@auto_docstring(custom_intro="Output of [`ReSTRModel`] for N expressions about B images of h x w patches.")
class ReSTRModelOutput(_CompositeOutput):
    __doc__ = _OUTPUT_FIELDS

    patch_logits: torch.Tensor | None = None
    patch_embeds: torch.Tensor | None = None
    projected_vision_embeds: torch.Tensor | None = None
    vision_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    image_indices: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None
    text_model_output: BaseModelOutputWithPooling | None = None


@dataclass
@auto_docstring(custom_intro="Output of [`ReSTRForImageSegmentation`] for N expressions about B images.")
class ReSTRImageSegmentationOutput(_CompositeOutput):
    __doc__ = _OUTPUT_FIELDS

    loss: torch.Tensor | None = None
    loss_pixel: torch.Tensor | None = None
    loss_patch: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    patch_logits: torch.Tensor | None = None
    vision_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None
    text_model_output: BaseModelOutputWithPooling | None = None


# Descriptions of arguments. `auto_docstring` picks the arguments that a method has.
_INPUTS = r"""
pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`):
    Images, as the processor prepares them. Each is encoded once, however many expressions are about it.
input_ids (`torch.Tensor` of shape `(N, T)`):
    Word ids, padded on the left to `config.text_config.max_position_embeddings`.
attention_mask (`torch.Tensor` of shape `(N, T)`, *optional*):
    0 for padding slots; by default for slots with the id `config.text_config.pad_token_id`.
image_indices (`torch.Tensor` of shape `(N,)`, *optional*):
    Index of the image that each expression is about. By default 0 for a single image, or 0 to N - 1 for N images.
vision_embeds (`BaseModelOutputWithPooling` or `torch.Tensor`, *optional*):
    Image features instead of `pixel_values`: the output of [`~ReSTRForImageSegmentation.get_image_features`], or a
    tensor of shape `(B, h, w, vision_hidden_size)`.
labels (`torch.Tensor` of shape `(N, height, width)`, *optional*):
    Masks of 0 and 1, as the processor and the collator check. Logits of another size are resized to the labels'.
interpolate_pos_encoding (`bool`, *optional*, defaults to `False`):
    Whether images may differ in size from the config's `image_size`; the position embeddings are then resized.
"""


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    attn_weights = torch.matmul(query, key.transpose(2, 3)) * scaling  # (batch, heads, queries, keys)
    if attention_mask is not None:
        attn_weights = attn_weights + attention_mask
    softmax_dtype = torch.promote_types(query.dtype, torch.float32)
    attn_weights = F.softmax(attn_weights, dim=-1, dtype=softmax_dtype).to(query.dtype)
    attn_weights = F.dropout(attn_weights, p=dropout, training=module.training)
    attn_output = torch.matmul(attn_weights, value).transpose(1, 2).contiguous()  # (batch, queries, heads, head_dim)
    return attn_output, attn_weights


def _expand_mask(config: Any, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> Any:
    """Convert a `(batch, length)` mask, 0 for keys to leave out, to the form that the attention of `config` takes."""
    if attention_mask is None:
        return None
    # To skip a mask of ones, transformers would read its values and wait until the device has computed them.
    return create_bidirectional_mask(config, hidden_states, attention_mask, allow_is_bidirectional_skip=False)


class ReSTRAttention(nn.Module):
    def __init__(self, config: ReSTRVisionConfig | ReSTRTextConfig | ReSTRConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        hidden_shape = (*input_shape, -1, self.head_dim)
        query = self.q_proj(hidden_states).view(hidden_shape).transpose(1, 2)  # (batch, heads, length, head_dim)
        key = self.k_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(hidden_shape).transpose(1, 2)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        attn_output, attn_weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        attn_output = attn_output.reshape(*input_shape, -1).contiguous()  # (batch, length, hidden)
        return self.out_proj(attn_output), attn_weights


def is_answer_on_cpu(hidden_states: torch.Tensor) -> bool:
    """Whether an answer is computed on a CPU, where memory is slow: no gradients, no compiled or exported program."""
    return hidden_states.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


class ReSTRMLP(nn.Module):
    """
    MLP of an encoder block. Its hidden layer is much larger than its input. For answers on a CPU, a part of the batch is
    mapped at a time, since new memory from the operating system is slow.
    """

    intermediate_values = 2**22  # of the hidden layer at a time

    def __init__(self, config: ReSTRVisionConfig | ReSTRTextConfig | ReSTRConfig):
        super().__init__()
        self.activation_fn = ACT2FN[config.hidden_act]
        self.intermediate_size = config.intermediate_size
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map (batch, length, hidden)."""
        if is_answer_on_cpu(hidden_states):
            num_samples = max(1, self.intermediate_values // (hidden_states.shape[1] * self.intermediate_size))
            if len(hidden_states) > num_samples:  # otherwise, `cat` would only copy
                return torch.cat([self._map(part) for part in hidden_states.split(num_samples)])
        return self._map(hidden_states)

    def _map(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation_fn(self.fc1(hidden_states)))


class ReSTRDropPath(nn.Module):
    """Stochastic depth: training drops a sample's residual branch with probability `rate` and rescales the others."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.rate == 0.0 or not self.training:
            return hidden_states
        keep = 1.0 - self.rate
        shape = (hidden_states.shape[0],) + (1,) * (hidden_states.ndim - 1)
        return hidden_states * hidden_states.new_empty(shape).bernoulli_(keep).div_(keep)


class ReSTREncoderLayer(GradientCheckpointingLayer):
    """Pre-norm block of the vision and fusion encoders."""

    def __init__(self, config: ReSTRVisionConfig | ReSTRConfig, drop_path_rate: float = 0.0):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = ReSTRAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = ReSTRMLP(config)
        self.drop_path = ReSTRDropPath(drop_path_rate)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        attn_output, _ = self.self_attn(self.layer_norm1(hidden_states), attention_mask, **kwargs)
        hidden_states = hidden_states + self.drop_path(attn_output)
        return hidden_states + self.drop_path(self.mlp(self.layer_norm2(hidden_states)))


class ReSTRTextLayer(GradientCheckpointingLayer):
    """Post-norm block of the language encoder."""

    def __init__(self, config: ReSTRTextConfig):
        super().__init__()
        self.self_attn = ReSTRAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = ReSTRMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        attn_output, _ = self.self_attn(hidden_states, attention_mask, **kwargs)
        hidden_states = self.layer_norm1(hidden_states + attn_output)
        return self.layer_norm2(hidden_states + self.mlp(hidden_states))


class ReSTRVisionEmbeddings(nn.Module):
    """One class token and the patch embeddings, plus learned positions."""

    def __init__(self, config: ReSTRVisionConfig):
        super().__init__()
        self.grid_size = config.image_size // config.patch_size
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.position_embeddings = nn.Parameter(torch.zeros(1, 1 + self.grid_size**2, config.hidden_size))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embedding(pixel_values)  # (B, hidden, h, w)
        new_grid = (patches.shape[2], patches.shape[3])
        positions = resize_positions(self.position_embeddings, (self.grid_size, self.grid_size), new_grid)
        class_token = self.class_embedding.expand(patches.shape[0], -1, -1)
        return torch.cat([class_token, patches.flatten(2).transpose(1, 2)], dim=1) + positions  # (B, 1 + P, hidden)


class ReSTRTextEmbeddings(nn.Module):
    """Word vectors plus fixed sinusoidal positions, which end with the last word: padding is on the left."""

    position_embeddings: torch.Tensor

    def __init__(self, config: ReSTRTextConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.register_buffer("position_embeddings", self.create_position_embeddings(), persistent=False)

    def create_position_embeddings(self) -> torch.Tensor:
        """`(positions, hidden)`: sine on even, cosine on odd channels, base 10000 (Vaswani et al., 2017)."""
        num_positions, dim = self.config.max_position_embeddings, self.config.hidden_size
        frequencies = torch.exp(torch.arange(0, dim, 2, dtype=torch.float32) * (-math.log(10000.0) / dim))
        angles = torch.arange(num_positions, dtype=torch.float32)[:, None] * frequencies  # (positions, ceil(dim / 2))
        return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :dim]

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        word_embeds = self.embed_tokens(input_ids)  # (N, T, hidden)
        return word_embeds + self.position_embeddings[-input_ids.shape[1] :].to(word_embeds)


@auto_docstring
class ReSTRPreTrainedModel(PreTrainedModel):
    config: ReSTRConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ["image", "text"]
    model_tags = list(MODEL_TAGS)
    # Trainer passes the number of label values of a step, so that the loss is the mean over all of its batches.
    accepts_loss_kwargs = True
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": ReSTREncoderLayer, "attentions": ReSTRAttention}

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        config.validate_architecture()  # values may have changed since the config's own checks
        self.model_tags = list(MODEL_TAGS)  # a copy per model: transformers adds the tags of `push_to_hub(tags=...)`

    def post_init(self) -> None:
        super().post_init()
        # transformers also adds the parts' patterns. The whole model would then ignore names that it has to report.
        self._keys_to_ignore_on_load_unexpected = set(type(self)._keys_to_ignore_on_load_unexpected or ())

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, ReSTRVisionEmbeddings):
            init.trunc_normal_(module.class_embedding, std=std)
            init.trunc_normal_(module.position_embeddings, std=std)
        elif isinstance(module, ReSTRTextEmbeddings):
            init.copy_(module.position_embeddings, module.create_position_embeddings())
        elif isinstance(module, ReSTRFusionEncoder):
            init.trunc_normal_(module.seed_embedding, std=std)
        elif isinstance(module, ReSTRScoreProjection):
            # The scalar product is not scaled. With this standard deviation it has the variance of its inputs.
            init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, ReSTRChannelMap):
            # With a fixed standard deviation, several narrow maps in a row would shrink their input to nothing.
            init.normal_(module.weight, std=module.initial_std)


class ReSTREncoderModel(ReSTRPreTrainedModel):
    """Base of the two encoders. They also load from the checkpoint of a whole ReSTR."""

    _keys_to_ignore_on_load_unexpected = [r"^model\.", r"^pixel_decoder\."]  # the other parts of a whole model

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as every model does. From the checkpoint of a whole ReSTR, load this encoder's part."""
        key_mapping = {rf"^model\.{cls.base_model_prefix}\.": ""}
        loaded = super().from_pretrained(*args, **{"key_mapping": key_mapping, **kwargs})
        model: Any = loaded[0] if isinstance(loaded, tuple) else loaded
        model.__dict__.pop("_weight_conversions", None)  # otherwise it is saved under its names in the whole model
        return loaded


@auto_docstring(custom_intro="The vision encoder of ReSTR: a plain pre-norm ViT with one class token.")
class ReSTRVisionModel(ReSTREncoderModel):
    config: ReSTRVisionConfig  # type: ignore[assignment]
    base_model_prefix = "vision_model"
    input_modalities = ["image"]
    _input_embed_layer = "patch_embedding"
    _no_split_modules = ["ReSTRVisionEmbeddings", "ReSTREncoderLayer"]

    def __init__(self, config: ReSTRVisionConfig):
        super().__init__(config)
        rates = torch.linspace(0, config.drop_path_rate, config.num_hidden_layers, device="cpu").tolist()
        self.embeddings = ReSTRVisionEmbeddings(config)
        self.layers = nn.ModuleList([ReSTREncoderLayer(config, rate) for rate in rates])
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    @auto_docstring(custom_args=_INPUTS)
    def forward(
        self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        r"""
        Returns:
            `last_hidden_state` of shape `(B, 1 + P, hidden_size)` with the class token first, and the class token
            as `pooler_output`.

        Example:

        ```python
        >>> import torch
        >>> from modeling_restr import ReSTRVisionConfig, ReSTRVisionModel

        >>> model = ReSTRVisionModel(ReSTRVisionConfig(num_hidden_layers=2, image_size=64))
        >>> model(torch.zeros(1, 3, 64, 64)).last_hidden_state.shape
        torch.Size([1, 17, 768])
        ```"""
        _check_pixel_values(pixel_values, self.config, interpolate_pos_encoding)
        hidden_states = self.embeddings(pixel_values.to(self.embeddings.patch_embedding.weight.dtype))
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        hidden_states = self.layer_norm(hidden_states)
        return BaseModelOutputWithPooling(last_hidden_state=hidden_states, pooler_output=hidden_states[:, 0])


@auto_docstring(custom_intro="The language encoder of ReSTR: word vectors, post-norm blocks, a projection.")
class ReSTRTextModel(ReSTREncoderModel):
    config: ReSTRTextConfig  # type: ignore[assignment]
    base_model_prefix = "text_model"
    main_input_name = "input_ids"
    input_modalities = ["text"]
    # Without the embeddings: FSDP wraps these classes, and the word vectors separately.
    _no_split_modules = ["ReSTRTextLayer"]
    _can_record_outputs = {"hidden_states": ReSTRTextLayer, "attentions": ReSTRAttention}

    def __init__(self, config: ReSTRTextConfig):
        super().__init__(config)
        self.embeddings = ReSTRTextEmbeddings(config)
        self.layers = nn.ModuleList([ReSTRTextLayer(config) for _ in range(config.num_hidden_layers)])
        self.projection = nn.Linear(config.hidden_size, config.projection_dim)
        self.layer_norm = nn.LayerNorm(config.projection_dim, eps=config.layer_norm_eps)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    @auto_docstring
    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutput:
        r"""
        input_ids (`torch.Tensor` of shape `(N, T)`):
            Word ids, padded on the left; T is at most `config.max_position_embeddings`.
        attention_mask (`torch.Tensor` of shape `(N, T)`, *optional*):
            0 for slots to keep out of the attention. The original attends to every slot, which is the default.

        Returns:
            `last_hidden_state` of shape `(N, T, projection_dim)`.

        Example:

        ```python
        >>> import torch
        >>> from modeling_restr import ReSTRTextConfig, ReSTRTextModel

        >>> model = ReSTRTextModel(ReSTRTextConfig(vocab_size=100))
        >>> model(torch.ones(1, 20, dtype=torch.long)).last_hidden_state.shape
        torch.Size([1, 20, 768])
        ```"""
        _check_input_ids(input_ids, self.config)
        hidden_states = self.embeddings(input_ids)
        mask = _expand_mask(self.config, hidden_states, attention_mask)
        for layer in self.layers:
            hidden_states = layer(hidden_states, mask, **kwargs)
        return BaseModelOutput(last_hidden_state=self.layer_norm(self.projection(hidden_states)))


class ReSTRScoreProjection(nn.Linear):
    """One side of the scalar product <patch, classifier>, with its own initialisation."""


class ReSTRFusionEncoder(ReSTRPreTrainedModel):
    """
    Fuse P patch tokens with T word features and a learned class seed into patches and an adaptive classifier
    (section 3.2 of the paper). The variants are from the paper's ablation:

    - `"coupled"`: a visual-linguistic encoder over [patches ; words], then a seed encoder over [its words ; seed].
    - `"independent"`: the same two encoders, but the seed encoder gets the words as they entered the first one.
    - `"vanilla"`: one encoder over [patches ; words ; seed].
    """

    _no_split_modules = ["ReSTREncoderLayer"]

    def __init__(self, config: ReSTRConfig):
        super().__init__(config)
        dim = config.hidden_size
        self.visual_projection = nn.Linear(config.vision_config.hidden_size, dim)
        self.text_projection = nn.Linear(config.text_config.projection_dim, dim)
        self.seed_embedding = nn.Parameter(torch.zeros(1, 1, dim))
        self.layers = self._create_layers(config)
        self.seed_layers = nn.ModuleList() if config.fusion_type == "vanilla" else self._create_layers(config)
        self.layer_norm = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.patch_projection = ReSTRScoreProjection(dim, dim, bias=False)
        self.classifier_projection = ReSTRScoreProjection(dim, dim, bias=False)
        self.post_init()

    @staticmethod
    def _create_layers(config: ReSTRConfig) -> nn.ModuleList:
        num_layers = 1 if config.share_fusion_layers else config.num_fusion_layers
        return nn.ModuleList([ReSTREncoderLayer(config) for _ in range(num_layers)])

    def _encode(
        self, layers: nn.ModuleList, tokens: torch.Tensor, word_mask: torch.Tensor | None, first_word: int, **kwargs
    ) -> torch.Tensor:
        """Encode tokens (N, length, hidden). `word_mask` (N, T) is 0 for words to leave out, from `first_word` on."""
        if word_mask is not None:
            num_after = tokens.shape[1] - first_word - word_mask.shape[1]
            word_mask = F.pad(word_mask, (first_word, num_after), value=True)  # (N, length)
        mask = _expand_mask(self.config, tokens, word_mask)
        for layer in list(layers) * (self.config.num_fusion_layers // len(layers)):
            tokens = layer(tokens, mask, **kwargs)
        return tokens

    def project(
        self, vision_embeds: torch.Tensor, text_embeds: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalise and project patches to (B, P, hidden) and words to (N, T, hidden), with 0 for padding."""
        projected_vision_embeds = self.visual_projection(F.normalize(vision_embeds, dim=-1))
        word_embeds = self.text_projection(F.normalize(text_embeds, dim=-1))
        return projected_vision_embeds, word_embeds * attention_mask[..., None].to(word_embeds.dtype)

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        vision_embeds: torch.Tensor,
        text_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        image_indices: torch.Tensor,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ReSTRFusionOutput:
        """Fuse image features (B, P, vision_hidden), word features (N, T, projection_dim) and their mask (N, T)."""
        num_patches = vision_embeds.shape[1]
        projected_vision_embeds, words = self.project(vision_embeds, text_embeds, attention_mask)
        patches = projected_vision_embeds.index_select(0, image_indices)  # (N, P, hidden)
        seed = self.seed_embedding.expand(words.shape[0], -1, -1)  # (N, 1, hidden)
        word_mask = None if self.config.attend_to_padding else attention_mask.to(torch.bool)

        if self.config.fusion_type == "vanilla":
            tokens = torch.cat([patches, words, seed], dim=1)  # (N, P + T + 1, hidden)
            tokens = self.layer_norm(self._encode(self.layers, tokens, word_mask, num_patches, **kwargs))
            patches, seed = tokens[:, :num_patches], tokens[:, -1:]
        else:
            tokens = torch.cat([patches, words], dim=1)  # (N, P + T, hidden)
            tokens = self._encode(self.layers, tokens, word_mask, num_patches, **kwargs)
            patches = tokens[:, :num_patches]
            if self.config.fusion_type == "independent":
                patches = self.layer_norm(patches)
            else:
                words = tokens[:, num_patches:]
            tokens = torch.cat([words, seed], dim=1)  # (N, T + 1, hidden)
            tokens = self._encode(self.seed_layers, tokens, word_mask, first_word=0, **kwargs)
            seed = self.layer_norm(tokens[:, -1:])

        patches = self.patch_projection(patches)  # (N, P, hidden)
        classifier = self.classifier_projection(seed)  # (N, 1, hidden)
        patch_logits = (patches @ classifier.transpose(1, 2)).squeeze(2)  # (N, P)
        return ReSTRFusionOutput(
            patch_logits=patch_logits, patch_embeds=patches, projected_vision_embeds=projected_vision_embeds
        )


class ReSTRChannelMap(nn.Module):
    """
    Linear map of the channels of `(N, channels, height, width)` without bias. With `out`, it maps `(N, channels)` without
    gradients and writes the result to `out`. It is not an `nn.Linear`, because adapters and quantisers replace those by
    modules that take channels last only. Initial weights have the standard deviation of PyTorch's linear layers.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.initial_std = (3 * in_features) ** -0.5
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.normal_(self.weight, std=self.initial_std)

    def forward(self, hidden_states: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        if out is not None:
            return torch.mm(hidden_states, self.weight.T.to(hidden_states.dtype), out=out)
        return F.conv2d(hidden_states, self.weight[..., None, None])


class ReSTRDecoderInputMap(ReSTRChannelMap):
    """
    First map of the decoder, over [projected patch tokens ; fused patches weighted with their logits]. It adds a part
    that depends on the image alone, computed once per image, and a part that depends on the expression.
    """

    def forward(  # type: ignore[override]
        self,
        projected_vision_embeds: torch.Tensor,
        patch_embeds: torch.Tensor,
        patch_logits: torch.Tensor,
        image_indices: torch.Tensor,
    ) -> torch.Tensor:
        visual_weight, masked_weight = self.weight.chunk(2, dim=1)  # (hidden, hidden) each
        visual_part = F.linear(projected_vision_embeds, visual_weight).index_select(0, image_indices)  # (N, P, hidden)
        # There is one logit per patch, so it can scale the patch after the linear map. `visual_part` is a copy already.
        return visual_part.addcmul_(F.linear(patch_embeds, masked_weight), patch_logits.flatten(1)[..., None])


def compute_interpolation_weights(num_sources: int, num_targets: int, dtype: torch.dtype) -> torch.Tensor:
    """Compute the weights (targets, sources) of linear interpolation with align_corners=True."""
    step = (num_sources - 1) / max(1, num_targets - 1)
    positions = torch.arange(num_targets, dtype=torch.float64) * step
    sources = torch.arange(num_sources, dtype=torch.float64)
    return (1 - (positions[:, None] - sources).abs()).clamp(min=0).to(dtype)


class ReSTRPixelDecoder(nn.Module):
    """
    Upsample [projected patch tokens ; fused patches weighted with their logits] to pixels. Each block is a bilinear x2
    upsampling, a linear map of the channels without bias and a LeakyReLU. A last map reduces them to one channel. Maps
    run before the upsampling, which gives the same numbers with a quarter of the work.

    There are `ceil(log2(patch_size))` blocks. The last one upsamples to exactly the input's size, so that any patch
    size works (DINOv2's is 14).

    The upsampled features are much larger than all others. For answers on a CPU, each expression's are computed in
    strips of rows that stay in the cache until the next map has reduced them. Gradients, other devices and compiled
    programs take them as a whole.
    """

    strip_values = 2**19  # upsampled values per thread

    def __init__(self, config: ReSTRConfig):
        super().__init__()
        dim = config.hidden_size
        self.patch_size = as_pair(config.vision_config.patch_size)
        num_blocks = max(1, math.ceil(math.log2(max(self.patch_size))))
        widths = [max(1, dim // 2**index) for index in range(num_blocks)]
        self.layers = nn.ModuleList([ReSTRDecoderInputMap(2 * dim, dim)])
        self.layers.extend(ReSTRChannelMap(*sizes) for sizes in pairwise(widths))
        self.head = ReSTRChannelMap(widths[-1], 1)
        self.activation_fn = nn.LeakyReLU(0.01, inplace=True)  # a copy would take 88 MB per expression at 480x480

    def forward(
        self,
        projected_vision_embeds: torch.Tensor,
        patch_embeds: torch.Tensor,
        patch_logits: torch.Tensor,
        image_indices: torch.Tensor,
    ) -> torch.Tensor:
        """Decode patch tokens (B, P, hidden), fused patches (N, P, hidden) and their logits (N, h, w) to (N, H, W)."""
        grid = (patch_logits.shape[1], patch_logits.shape[2])
        # (N, P, hidden) -> (N, hidden, h, w)
        hidden_states = self.layers[0](projected_vision_embeds, patch_embeds, patch_logits, image_indices)
        hidden_states = hidden_states.transpose(1, 2).unflatten(2, grid)
        if not is_answer_on_cpu(hidden_states):
            return self._decode(hidden_states)
        return self._decode_in_strips(hidden_states.permute(0, 2, 3, 1))

    def _decode(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Decode the output of the first map (N, hidden, h, w) to (N, H, W)."""
        for layer, size in self._list_blocks(hidden_states.shape[2:]):
            hidden_states = F.interpolate(hidden_states, size=size, mode="bilinear", align_corners=True)
            hidden_states = layer(self.activation_fn(hidden_states))
        return hidden_states.squeeze(1)

    def _decode_in_strips(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Decode the output of the first map (N, h, w, hidden) to (N, H, W)."""
        blocks = self._list_blocks(hidden_states.shape[1:3])
        sizes = [size for _, size in blocks]
        heights = [hidden_states.shape[1], *(height for height, _ in sizes)]
        weights = [compute_interpolation_weights(*pair, hidden_states.dtype) for pair in pairwise(heights)]
        logits = hidden_states.new_empty(len(hidden_states), math.prod(sizes[-1]), 1)
        # All expressions use the same memory, since new memory from the operating system is slow.
        buffers = [hidden_states.new_empty(math.prod(size), layer.out_features) for layer, size in blocks[:-1]]
        for features, expression_logits in zip(hidden_states, logits):
            for (layer, size), block_weights, mapped in zip(blocks, weights, [*buffers, expression_logits]):
                self._map_strips(features, layer, block_weights, mapped)
                features = mapped.unflatten(0, size)
        return logits.view(-1, *sizes[-1])

    def _map_strips(
        self, features: torch.Tensor, layer: ReSTRChannelMap, weights: torch.Tensor, mapped: torch.Tensor
    ) -> None:
        """
        Upsample features (h, w, C) with the weights (H, h) of their rows, and write what a map makes of them to `mapped`
        (H * W, channels).
        """
        height, num_sources = weights.shape
        width = len(mapped) // height
        num_rows = max(1, self.strip_values * torch.get_num_threads() // (width * features.shape[-1]))
        for start in range(0, height, num_rows):
            stop = min(start + num_rows, height)
            # The rows before the strip's first row and after its last one.
            first, last = (row * (num_sources - 1) // max(1, height - 1) for row in (start, stop - 1))
            rows = weights[start:stop, first : last + 2] @ features[first : last + 2].flatten(1)  # (rows, w * C)
            rows = rows.unflatten(1, features.shape[1:]).transpose(1, 2).unsqueeze(2)  # (rows, C, 1, w)
            # Rows are a batch here, since PyTorch divides nothing else among its threads.
            strip = F.interpolate(rows, size=(1, width), mode="bilinear", align_corners=True)
            strip = self.activation_fn(strip).squeeze(2).transpose(1, 2).flatten(0, 1)  # (rows * W, C)
            out = mapped[start * width : stop * width]
            out.copy_(layer(strip, out=out))  # copies nothing, unless a hook has replaced the result

    def _list_blocks(self, grid: Sequence[int]) -> list[tuple[ReSTRChannelMap, list[int]]]:
        """List the map of each block, and the size to which the features are upsampled before it."""
        maps = [*self.layers[1:], self.head]
        sizes = [[side * 2**index for side in grid] for index in range(1, len(maps))]
        return list(zip(maps, [*sizes, [side * patch for side, patch in zip(grid, self.patch_size)]]))


@auto_docstring(custom_intro="ReSTR up to its patch logits: two encoders and their fusion, without a pixel decoder.")
class ReSTRModel(ReSTRPreTrainedModel):
    _keys_to_ignore_on_load_unexpected = [r"^pixel_decoder\."]
    _unused_vision_parameters: frozenset[str] = frozenset()  # ReSTR's own encoder has none

    def __init__(self, config: ReSTRConfig):
        super().__init__(config)
        if config.vision_config.model_type == ReSTRVisionConfig.model_type:
            self.vision_model = ReSTRVisionModel(config.vision_config)
        else:
            self._unused_vision_parameters = unused_parameters(config.vision_config)
            self.vision_model = AutoModel.from_config(config.vision_config, dtype=torch.get_default_dtype())
            # Checkpoints of earlier versions may lack them.
            self._keys_to_ignore_on_load_missing = [
                rf"^(model\.)?vision_model\.{re.escape(name)}$" for name in self._unused_vision_parameters
            ]
        # Some encoders (DINOv2) always interpolate their positions and do not take the argument.
        vision_arguments = inspect.signature(self.vision_model.forward).parameters
        self._can_interpolate_positions_on_request = "interpolate_pos_encoding" in vision_arguments
        self.text_model = ReSTRTextModel(config.text_config)
        self.fusion = ReSTRFusionEncoder(config)
        self.post_init()
        # CLIP's vision encoder also names layers that only its language encoder has, but FSDP must find every name.
        self._no_split_modules = set(self._no_split_modules or ()) & {type(m).__name__ for m in self.modules()}
        self._freeze_unused_parameters()

    def _freeze_unused_parameters(self) -> None:
        """Exclude them from training: distributed training would wait for their gradients."""
        for name, weight in self.vision_model.named_parameters():
            if name in self._unused_vision_parameters:
                weight.requires_grad_(False)

    def train(self, mode: bool = True) -> "ReSTRModel":
        """
        Set the mode as in every module, and freeze unused parameters again: loading replaces them by trainable ones
        and ends in `eval()`.
        """
        self._freeze_unused_parameters()
        return super().train(mode)

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.set_input_embeddings(value)

    @can_return_tuple
    @auto_docstring(custom_args=_INPUTS)
    def get_image_features(
        self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        r"""
        Returns:
            The vision encoder's output. Its `pooler_output` of shape `(B, h, w, vision_hidden_size)` has the patch
            tokens on their grid, without prefix tokens. `vision_embeds` takes the whole output.
        """
        _check_pixel_values(pixel_values, self.config.vision_config, interpolate_pos_encoding)
        if self._can_interpolate_positions_on_request:
            kwargs["interpolate_pos_encoding"] = interpolate_pos_encoding  # type: ignore[typeddict-unknown-key]
        outputs = self.vision_model(pixel_values.to(self.dtype), return_dict=True, **kwargs)
        patch_size = as_pair(self.config.vision_config.patch_size)
        grid = (pixel_values.shape[2] // patch_size[0], pixel_values.shape[3] // patch_size[1])
        patches = outputs.last_hidden_state[:, -grid[0] * grid[1] :]  # prefix tokens come first
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=patches.unflatten(1, grid),  # (B, h, w, hidden)
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @can_return_tuple
    @auto_docstring(custom_args=_INPUTS)
    def get_text_features(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        r"""
        Returns:
            The language encoder's output. Its `pooler_output` of shape `(N, T, projection_dim)` has the word features.
        """
        attention_mask = self._prepare_attention_mask(input_ids, attention_mask)
        if self.config.attend_to_padding:
            attention_mask = None
        outputs = self.text_model(input_ids, attention_mask=attention_mask, return_dict=True, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _prepare_attention_mask(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Check the words; return their mask of shape (N, T), 0 for padding slots."""
        _check_input_ids(input_ids, self.config.text_config, all_slots=self.config.attend_to_padding)
        if attention_mask is None:
            return (input_ids != self.config.text_config.pad_token_id).long()
        if attention_mask.shape != input_ids.shape:
            raise _shape_error("attention_mask", attention_mask, f"of `input_ids`, {tuple(input_ids.shape)}")
        return attention_mask

    def _prepare_vision_embeds(
        self,
        pixel_values: torch.Tensor | None,
        vision_embeds: torch.Tensor | BaseModelOutputWithPooling | None,
        interpolate_pos_encoding: bool,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, BaseModelOutputWithPooling | None]:
        """Compute or check image features (B, h, w, vision_hidden_size); return them and the output they come from."""
        if (pixel_values is None) == (vision_embeds is None):
            got = "neither" if pixel_values is None else "both"
            raise ValueError(f"Expected exactly one of `pixel_values` and `vision_embeds`, got {got}.")
        features: Any = vision_embeds
        if pixel_values is not None:
            features = self.get_image_features(pixel_values, interpolate_pos_encoding, return_dict=True, **kwargs)
        if isinstance(features, tuple) and len(features) > 1:  # with `return_dict=False`
            features = BaseModelOutputWithPooling(last_hidden_state=features[0], pooler_output=features[1])
        output: Any = features if isinstance(features, ModelOutput) else None
        embeds = features if output is None else output.get("pooler_output")
        _check_vision_embeds(embeds, self.config.vision_config.hidden_size)
        return embeds.to(self.dtype), output

    def _prepare_image_indices(
        self, image_indices: torch.Tensor | None, num_images: int, input_ids: torch.Tensor
    ) -> torch.Tensor:
        num_expressions = input_ids.shape[0]
        if image_indices is not None:
            image_indices = torch.as_tensor(image_indices)
            _check_image_indices(image_indices, num_expressions)
            return image_indices.to(input_ids.device, torch.long)
        if num_images == 1:
            return torch.zeros(num_expressions, dtype=torch.long, device=input_ids.device)
        if num_images == num_expressions:
            return torch.arange(num_images, device=input_ids.device)
        raise ValueError(
            f"Got {num_images} images and {num_expressions} expressions: pass `image_indices`, the index of the image "
            f"that each expression is about (the processor returns them)."
        )

    @can_return_tuple
    @auto_docstring(custom_args=_INPUTS)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_indices: torch.Tensor | None = None,
        vision_embeds: torch.Tensor | BaseModelOutputWithPooling | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ReSTRModelOutput:
        r"""
        Example:

        ```python
        >>> import torch
        >>> from modeling_restr import ReSTRConfig, ReSTRModel

        >>> model = ReSTRModel(ReSTRConfig()).eval()
        >>> outputs = model(pixel_values=torch.zeros(1, 3, 480, 480), input_ids=torch.ones(2, 20, dtype=torch.long))
        >>> outputs.patch_logits.shape  # two expressions about one image
        torch.Size([2, 30, 30])
        ```"""
        if input_ids is None:
            raise ValueError(
                "Expected `input_ids`, the words of at least one expression, got none. In a pipeline, import "
                '`modeling_restr` and use its task: pipeline("referring-image-segmentation", model=...).'
            )
        attention_mask = self._prepare_attention_mask(input_ids, attention_mask)
        vision_embeds, vision_model_output = self._prepare_vision_embeds(
            pixel_values, vision_embeds, interpolate_pos_encoding, **kwargs
        )
        image_indices = self._prepare_image_indices(image_indices, vision_embeds.shape[0], input_ids)
        text_model_output = self.get_text_features(input_ids, attention_mask, return_dict=True, **kwargs)
        text_embeds = text_model_output.pooler_output
        outputs = self.fusion(
            vision_embeds.flatten(1, 2), text_embeds, attention_mask, image_indices, return_dict=True, **kwargs
        )
        return ReSTRModelOutput(
            patch_logits=outputs.patch_logits.unflatten(1, vision_embeds.shape[1:3]),
            patch_embeds=outputs.patch_embeds,
            projected_vision_embeds=outputs.projected_vision_embeds,
            vision_embeds=vision_embeds,
            text_embeds=text_embeds,
            image_indices=image_indices,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            vision_model_output=vision_model_output,
            text_model_output=text_model_output,
        )


@auto_docstring(custom_intro="ReSTR for referring image segmentation: one mask per expression about an image.")
class ReSTRForImageSegmentation(ReSTRPreTrainedModel):
    def __init__(self, config: ReSTRConfig):
        super().__init__(config)
        self.model = ReSTRModel(config)
        self.pixel_decoder = ReSTRPixelDecoder(config) if config.use_pixel_decoder else None
        self.post_init()

    @classmethod
    def from_vision_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        config: ReSTRConfig | None = None,
        image_size: int | None = None,
        **kwargs: Any,
    ) -> "ReSTRForImageSegmentation":
        r"""
        Create a model with the weights of a pretrained ViT and random ones for the rest, in evaluation mode.

        The paper starts from `google/vit-base-patch16-384`. A plain ViT (`model_type` `"vit"`) becomes ReSTR's own
        vision encoder, which computes the same and has drop path. Other encoders (DeiT, DINOv2, DINOv3, ...) keep
        their class. From a model with two encoders (CLIP, SigLIP, SigLIP 2 of fixed size), the vision encoder is used.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): Folder or Hub id of the vision model.
            config (`ReSTRConfig`, *optional*):
                The rest of the model. Its `vision_config` is replaced, and widths that were left open follow it.
            image_size (`int`, *optional*):
                Side of the square input in pixels, by default the checkpoint's. Positions are resized bilinearly.
            kwargs:
                `attn_implementation` and `dtype` (float32 by default) apply to the whole model. The others go to
                `from_pretrained` of the vision model (`revision`, `token`, `cache_dir`, ...).

        Raises:
            `ValueError`: The checkpoint is not of a plain ViT, lacks weights, or does not fit `image_size`.
        """
        attn_implementation, dtype = kwargs.pop("attn_implementation", None), kwargs.pop("dtype", torch.float32)
        vision_config, state_dict, old_grid = load_vision_model(pretrained_model_name_or_path, image_size, **kwargs)
        if config is not None:
            model = cls(config.with_vision_config(vision_config))
        else:
            num_heads = getattr(vision_config, "num_attention_heads", None)
            model = cls(ReSTRConfig(vision_config=vision_config, num_attention_heads=num_heads))
        fill_vision_model(model.model.vision_model, state_dict, old_grid)
        if attn_implementation is not None:
            model.set_attn_implementation(attn_implementation)
        return model.to(dtype).eval()

    @auto_docstring(custom_args=_INPUTS)
    def get_image_features(
        self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        r"""
        Returns:
            The output of [`ReSTRModel.get_image_features`], to pass as `vision_embeds`.

        Example:

        ```python
        >>> import torch
        >>> from modeling_restr import ReSTRConfig, ReSTRForImageSegmentation

        >>> model = ReSTRForImageSegmentation(ReSTRConfig()).eval()
        >>> features = model.get_image_features(torch.zeros(1, 3, 480, 480))
        >>> model(vision_embeds=features, input_ids=torch.ones(1, 20, dtype=torch.long)).logits.shape
        torch.Size([1, 480, 480])
        ```"""
        return self.model.get_image_features(pixel_values, interpolate_pos_encoding, **kwargs)

    @auto_docstring(custom_args=_INPUTS)
    def get_text_features(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        r"""
        Returns:
            The output of [`ReSTRModel.get_text_features`].
        """
        return self.model.get_text_features(input_ids, attention_mask, **kwargs)

    def compute_losses(
        self, logits: torch.Tensor, patch_logits: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Total, pixel and patch loss (scalars) of logits (N, H, W) and (N, h, w), for labels (N, any, any)."""
        dtype = torch.promote_types(logits.dtype, torch.float32)
        labels = labels.to(logits.device, dtype)[:, None]  # (N, 1, height, width)
        logits, patch_logits = logits[:, None].to(dtype), patch_logits[:, None].to(dtype)
        if logits.shape != labels.shape:
            logits = F.interpolate(logits, size=labels.shape[2:], mode="bilinear", align_corners=True)
        loss_pixel = F.binary_cross_entropy_with_logits(logits, labels)
        patch_labels = F.adaptive_max_pool2d(labels, patch_logits.shape[2:])
        loss_patch = F.binary_cross_entropy_with_logits(patch_logits, patch_labels)
        return loss_pixel + self.config.patch_loss_weight * loss_patch, loss_pixel, loss_patch

    @can_return_tuple
    @auto_docstring(custom_args=_INPUTS)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_indices: torch.Tensor | None = None,
        vision_embeds: torch.Tensor | BaseModelOutputWithPooling | None = None,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ReSTRImageSegmentationOutput:
        r"""
        Example:

        ```python
        >>> import torch
        >>> from modeling_restr import ReSTRConfig, ReSTRForImageSegmentation

        >>> model = ReSTRForImageSegmentation(ReSTRConfig()).eval()
        >>> outputs = model(pixel_values=torch.zeros(1, 3, 480, 480), input_ids=torch.ones(2, 20, dtype=torch.long))
        >>> outputs.logits.shape  # two expressions about one image
        torch.Size([2, 480, 480])
        ```"""
        if labels is not None and input_ids is not None:
            _check_labels(labels, input_ids.shape[0])
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        if num_items_in_batch is not None:
            _check_trainer_batch(pixel_values, input_ids, image_indices, num_items_in_batch, self.training)
        inputs = (pixel_values, input_ids, attention_mask, image_indices, vision_embeds, interpolate_pos_encoding)
        outputs = self.model(*inputs, return_dict=True, **kwargs)
        logits = outputs.patch_logits
        if self.pixel_decoder is not None:
            logits = self.pixel_decoder(
                outputs.projected_vision_embeds, outputs.patch_embeds, outputs.patch_logits, outputs.image_indices
            )
        loss = loss_pixel = loss_patch = None
        if labels is not None:
            loss, loss_pixel, loss_patch = self.compute_losses(logits, outputs.patch_logits, labels)
            if num_items_in_batch is not None:
                loss = loss * labels.numel() / num_items_in_batch
        return ReSTRImageSegmentationOutput(
            loss=loss,
            loss_pixel=loss_pixel,
            loss_patch=loss_patch,
            logits=logits,
            patch_logits=outputs.patch_logits,
            vision_embeds=outputs.vision_embeds,
            text_embeds=outputs.text_embeds,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            vision_model_output=outputs.vision_model_output,
            text_model_output=outputs.text_model_output,
        )


def _shape_error(name: str, tensor: torch.Tensor, expected: str) -> ValueError:
    return ValueError(f"`{name}` must have the shape {expected}, got {tuple(tensor.shape)}.")


def _check_pixel_values(pixel_values: torch.Tensor, config: Any, interpolate_pos_encoding: bool) -> None:
    if pixel_values.ndim != 4 or pixel_values.shape[1] != config.num_channels:
        raise _shape_error("pixel_values", pixel_values, f"(batch, {config.num_channels}, height, width)")
    (height, width), expected, patch = pixel_values.shape[2:], as_pair(config.image_size), as_pair(config.patch_size)
    if not interpolate_pos_encoding and (height, width) != expected:
        raise ValueError(
            f"`pixel_values` have {height}x{width} pixels, but the model expects {expected[0]}x{expected[1]}. "
            f"Resize them with the processor, or pass `interpolate_pos_encoding=True`."
        )
    if height % patch[0] or width % patch[1]:
        raise ValueError(
            f"`pixel_values` have {height}x{width} pixels, which patches of {patch[0]}x{patch[1]} do not divide: use "
            f"multiples of the patch size."
        )


def _check_input_ids(input_ids: torch.Tensor, config: ReSTRTextConfig, all_slots: bool = False) -> None:
    num_slots = config.max_position_embeddings
    if input_ids.ndim != 2 or 0 in input_ids.shape or input_ids.shape[1] > num_slots:
        expected = f"(expressions, words) with at least one expression and one to {num_slots} words"
        raise _shape_error("input_ids", input_ids, expected)
    if all_slots and input_ids.shape[1] != num_slots:
        raise ValueError(
            f"`input_ids` have {input_ids.shape[1]} word slots. With `config.attend_to_padding=True` padding is part "
            f"of the computation, so every expression must be padded to {num_slots} slots, as the processor does."
        )


def _check_vision_embeds(vision_embeds: Any, hidden_size: int) -> None:
    shape = tuple(vision_embeds.shape) if isinstance(vision_embeds, torch.Tensor) else ()
    if len(shape) != 4 or shape[3] != hidden_size or 0 in shape:
        raise ValueError(
            f"`vision_embeds` must be what `get_image_features` returned, or a tensor of shape (images, rows of "
            f"patches, columns of patches, {hidden_size}), got {shape or type(vision_embeds).__name__}. A flat tensor "
            f"of patches does not tell its grid: pass `vision_embeds.unflatten(1, (rows, columns))`."
        )
    if not vision_embeds.is_floating_point():
        raise ValueError(f"`vision_embeds` must be floating-point numbers, got {vision_embeds.dtype}.")


def _check_image_indices(image_indices: torch.Tensor, num_expressions: int) -> None:
    if image_indices.shape != (num_expressions,):
        raise _shape_error("image_indices", image_indices, f"({num_expressions},) with one entry per expression")
    if image_indices.is_floating_point() or image_indices.dtype == torch.bool:
        raise ValueError(f"`image_indices` must be integers, got {image_indices.dtype}.")


def _check_labels(labels: torch.Tensor, num_expressions: int) -> None:
    if labels.ndim != 3 or labels.shape[0] != num_expressions:
        raise _shape_error("labels", labels, f"(expressions, height, width) with {num_expressions} expressions")


def _check_trainer_batch(
    pixel_values: torch.Tensor | None,
    input_ids: torch.Tensor | None,
    image_indices: torch.Tensor | None,
    num_items_in_batch: torch.Tensor | int,
    is_training: bool,
) -> None:
    """Refuse batches that Trainer would get wrong because they have different numbers of images and expressions."""
    remedy = "modeling_restr.training.trainer.ReferringTrainer"
    if image_indices is not None and torch.is_tensor(num_items_in_batch) and num_items_in_batch.ndim > 0:
        raise ValueError(
            "Expected whole batches, got a share from DataParallel, which splits images, sentences and their indices "
            f"alike. Start one process per device with torchrun, and see {remedy}."
        )
    if is_training or pixel_values is None or input_ids is None or len(pixel_values) == len(input_ids):
        return
    raise ValueError(
        f"Expected one sentence per image in Trainer's evaluation, got {len(input_ids)} sentences about "
        f"{len(pixel_values)} images: Trainer would drop some. Evaluate with {remedy}, or repeat images."
    )


__all__ = [
    "ReSTRForImageSegmentation",
    "ReSTRFusionEncoder",
    "ReSTRImageSegmentationOutput",
    "ReSTRModel",
    "ReSTRModelOutput",
    "ReSTRPixelDecoder",
    "ReSTRPreTrainedModel",
    "ReSTRTextModel",
    "ReSTRVisionModel",
]
