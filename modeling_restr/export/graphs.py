"""
ReSTR as two `torch.export` programs for other runtimes. The image is encoded once for many sentences.

    image_encoder   pixel_values (B, 3, H, W) -> vision_embeds (B, h, w, vision_hidden_size)
    sentence_query  vision_embeds, input_ids (N, T), image_indices (N,) -> logits (N, H, W), patch_logits (N, h, w)

B and N are free. With ReSTR's own vision encoder, so are H and W, in multiples of the patch size.
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from ..configuration_restr import ReSTRVisionConfig
from ..modeling_restr import ReSTRForImageSegmentation
from ..vision_encoder_restr import as_pair, patch_grid


class ReSTRImageEncoder(nn.Module):
    """Returns the image features of `get_image_features`."""

    def __init__(self, model: ReSTRForImageSegmentation):
        super().__init__()
        self.model = model.model
        self.interpolate_pos_encoding = has_free_image_size(model)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model.get_image_features(pixel_values, self.interpolate_pos_encoding).pooler_output


class ReSTRSentenceQuery(nn.Module):
    """Everything after the image encoder. Returns `(logits, patch_logits)` of sentences about encoded images."""

    def __init__(self, model: ReSTRForImageSegmentation):
        super().__init__()
        self.model = model

    def forward(
        self, vision_embeds: torch.Tensor, input_ids: torch.Tensor, image_indices: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = self.model(vision_embeds=vision_embeds, input_ids=input_ids, image_indices=image_indices)
        return outputs.logits, outputs.patch_logits


@torch.no_grad()
def export_image_encoder(model: ReSTRForImageSegmentation) -> ExportedProgram:
    """
    Export the image encoder in float32, on the CPU and in evaluation mode. The model itself is not changed.

    The number of images is free. With ReSTR's own vision encoder, so are their height and width.
    """
    model = _prepare(model)
    model.model.text_model = model.model.fusion = nn.Identity()  # otherwise the program keeps their weights
    config: Any = model.config.vision_config
    grid, patch_size = _sample_grid(model), as_pair(config.patch_size)
    shape: dict[int, Any] = {0: Dim("num_images")}
    if has_free_image_size(model):
        shape |= {2: patch_size[0] * Dim("patch_rows"), 3: patch_size[1] * Dim("patch_columns")}
    pixel_values = torch.zeros(2, config.num_channels, grid[0] * patch_size[0], grid[1] * patch_size[1])
    return torch.export.export(ReSTRImageEncoder(model), (pixel_values,), dynamic_shapes=(shape,), strict=False)


@torch.no_grad()
def export_sentence_query(model: ReSTRForImageSegmentation) -> ExportedProgram:
    """
    Export everything after the image encoder, as [`export_image_encoder`] exports the encoder.

    The numbers of images and sentences are free. With ReSTR's own vision encoder, so is the grid of patches. The words
    fill all slots of the model, padded on the left.
    """
    model = _prepare(model)
    model.model.vision_model = nn.Identity()
    config: Any = model.config
    vision_embeds = torch.zeros(2, *_sample_grid(model), config.vision_config.hidden_size)
    input_ids = torch.ones(3, config.text_config.max_position_embeddings, dtype=torch.long)
    image_indices = torch.tensor([1, 0, 1])
    num_sentences = Dim("num_sentences")
    shape: dict[int, Any] = {0: Dim("num_images")}
    if has_free_image_size(model):
        shape |= {1: Dim("patch_rows"), 2: Dim("patch_columns")}
    return torch.export.export(
        ReSTRSentenceQuery(model),
        (vision_embeds, input_ids, image_indices),
        dynamic_shapes=(shape, {0: num_sentences}, {0: num_sentences}),
        strict=False,
    )


def has_free_image_size(model: ReSTRForImageSegmentation) -> bool:
    """Whether the graphs take images of any size. Other encoders interpolate positions in ways that cannot be traced."""
    config: Any = model.config
    return config.vision_config.model_type == ReSTRVisionConfig.model_type


def _prepare(model: ReSTRForImageSegmentation) -> Any:
    model = copy.deepcopy(model).float().cpu().eval()
    model.set_attn_implementation("sdpa")
    return model


def _sample_grid(model: ReSTRForImageSegmentation) -> tuple[int, int]:
    """(h, w) of the patches to trace with. If it is free, it differs from the model's, so that resizing is traced."""
    config: Any = model.config
    height, width = patch_grid(config.vision_config)
    return (height + 1, width + 2) if has_free_image_size(model) else (height, width)


class Graph(NamedTuple):
    """The function that exports a graph, and the names of the graph's inputs and outputs."""

    export: Callable[[ReSTRForImageSegmentation], ExportedProgram]
    input_names: list[str]
    output_names: list[str]


GRAPHS = {
    "image_encoder": Graph(export_image_encoder, ["pixel_values"], ["vision_embeds"]),
    "sentence_query": Graph(
        export_sentence_query, ["vision_embeds", "input_ids", "image_indices"], ["logits", "patch_logits"]
    ),
}
