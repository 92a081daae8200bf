"""
Training a small ReSTR from random weights: how they start, the optimizer, Trainer's arguments. None of this is the
paper's, which starts from a pretrained ViT; see `recipe.py` for that. Needs torch 2.9 or later, for its Muon.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from ..modeling_restr import ReSTRForImageSegmentation, ReSTRVisionModel
from .trainer import use_one_device


def initialize_weights(model: ReSTRForImageSegmentation) -> None:
    """
    Random weights to start from, without any pretraining. transformers' standard deviation of 0.02 suits widths near
    the paper's 768 that start from a pretrained encoder; at this width it starts too small, and learning stalls at
    masks that are empty everywhere.
    """
    fusion = model.model.fusion
    for module in model.model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    initialize_as_convolutions(model.model.vision_model)
    text_embeddings = model.model.text_model.embeddings.embed_tokens
    with torch.no_grad():
        text_embeddings.weight.normal_()[text_embeddings.padding_idx] = 0
    nn.init.normal_(fusion.seed_embedding, std=0.5)
    for projection in (fusion.visual_projection, fusion.text_projection):
        nn.init.normal_(projection.weight)  # of vectors whose length is 1: each channel gets the variance 1
    # A step of Adam moves the patch logits by about learning rate x width ** 2 x this weight: as in attention, the
    # scalar product is divided by the root of the width.
    nn.init.constant_(fusion.layer_norm.weight, model.config.hidden_size**-0.5)
    decoder: Any = model.pixel_decoder
    for layer in decoder.layers:
        nn.init.kaiming_normal_(layer.weight, a=0.01)
    nn.init.normal_(decoder.head.weight, std=decoder.head.in_features**-0.5)


@torch.no_grad()
def initialize_as_convolutions(vision_model: ReSTRVisionModel, sharpness: float = 4.0) -> None:
    """
    Start the vision encoder with heads that look at one neighbour each, as ConViT does (d'Ascoli et al., 2021), here
    through nothing but the values of its weights. Learning that patches have neighbours takes a transformer longer
    than all the rest; so it learns what the shapes are five times sooner.

    The last channels hold a patch's row and column as waves, and nothing else writes to them at first. A head's query
    turns the waves by its offset, so that it is most like the key of the patch that lies there.
    """
    embeddings, config = vision_model.embeddings, vision_model.config
    grid, head_dim = embeddings.grid_size, config.hidden_size // config.num_attention_heads
    frequencies = torch.pi / grid * torch.arange(1, head_dim // 4 + 1)
    angles = torch.arange(grid)[:, None] * frequencies
    waves = torch.cat([angles.cos(), angles.sin()], dim=1)  # (grid, head_dim / 2)
    positions = torch.cat([waves.repeat_interleave(grid, 0), waves.repeat(grid, 1)], dim=1)  # (grid ** 2, head_dim)
    nn.init.normal_(embeddings.patch_embedding.weight, std=embeddings.patch_embedding.weight[0].numel() ** -0.5)
    embeddings.patch_embedding.weight[-head_dim:] = 0
    embeddings.class_embedding.zero_()
    embeddings.position_embeddings.zero_()[0, 1:, -head_dim:] = positions

    reach = range(-2, 3)
    offsets = sorted([(y, x) for y in reach for x in reach if (y, x) != (0, 0)], key=lambda offset: np.hypot(*offset))
    layers: Any = vision_model.layers
    for index, layer in enumerate(layers):
        attention = layer.self_attn
        attention.out_proj.weight[-head_dim:] = 0
        layer.mlp.fc2.weight[-head_dim:] = 0
        attention.q_proj.weight *= 0.3
        attention.k_proj.weight *= 0.3
        # From the middle on, half of the heads start free to look anywhere.
        num_local_heads = config.num_attention_heads // (1 if 2 * index < len(layers) else 2)
        for head in range(num_local_heads):
            rows = slice(head * head_dim, (head + 1) * head_dim)
            offset = offsets[(index * config.num_attention_heads + head) % 12]  # the 12 nearest
            turns = torch.block_diag(*[turn_waves(frequencies * distance) for distance in offset])
            for projection, weight in ((attention.q_proj, turns), (attention.k_proj, torch.eye(head_dim))):
                projection.weight[rows] = 0
                projection.weight[rows, -head_dim:] = sharpness**0.5 * weight


@torch.no_grad()
def whiten_patches(vision_model: ReSTRVisionModel, pixel_values: torch.Tensor, softness: float = 0.03) -> None:
    """
    Start the patch embedding of a vision encoder that is initialised as convolutions with the principal components of
    the patches in `pixel_values` (images, channels, height, width), each at about the same variance. In photographs a
    patch's brightness varies 10,000 times as much as its texture, which a random embedding therefore hides for long.

    Args:
        softness: the variance below which a component counts as noise; pixels are from -1 to 1.
    """
    config, embedding = vision_model.config, vision_model.embeddings.patch_embedding
    patches = (
        F.unfold(pixel_values.float(), embedding.kernel_size, stride=embedding.stride).transpose(1, 2).flatten(0, 1)
    )
    count = min(config.hidden_size - config.hidden_size // config.num_attention_heads, patches.shape[1])
    variances, directions = torch.linalg.eigh(patches.T.cov())  # from the weakest component on
    weight = (directions[:, -count:] / (variances[-count:] + softness).sqrt()).T.flip(0)
    embedding.weight[:count] = weight.view(count, *embedding.weight.shape[1:])
    if embedding.bias is not None:
        embedding.bias.zero_()[:count] = -weight @ patches.mean(0)


def turn_waves(angles: torch.Tensor) -> torch.Tensor:
    """(2 n, 2 n) map of n cosines, then n sines, to those of angles that are larger by `angles` (n,)."""
    cosine, sine = torch.diag(angles.cos()), torch.diag(angles.sin())
    return torch.cat([torch.cat([cosine, -sine], dim=1), torch.cat([sine, cosine], dim=1)])


class MuonWithAdamW(torch.optim.Optimizer):
    """
    Muon (Jordan et al., 2024) for the matrices of the blocks, AdamW for everything else, as one optimizer. From
    scratch it needs a fraction of the scenes that AdamW alone does.
    """

    def __init__(self, model: nn.Module, lr: float, adamw_lr: float, weight_decay: float, betas: tuple[float, float]):
        parameters = list(model.named_parameters())
        matrices = [parameter for name, parameter in parameters if parameter.ndim == 2 and ".layers." in name]
        others = [parameter for name, parameter in parameters if not (parameter.ndim == 2 and ".layers." in name)]
        super().__init__([*matrices, *others], {})
        self.parts = [
            torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=adamw_lr, weight_decay=weight_decay, betas=betas),
        ]
        self._share_groups()

    def _share_groups(self) -> None:
        self.param_groups = [group for part in self.parts for group in part.param_groups]  # schedulers write to these

    def step(self, closure: Callable | None = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step(closure)

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"]):
            part.load_state_dict(state)
        self._share_groups()


@dataclass
class ScratchTrainingArguments(TrainingArguments):
    """transformers' TrainingArguments with defaults for a small model that starts from random weights."""

    output_dir: str = field(default="runs/drawn-scenes", metadata={"help": "Checkpoints, and the model at the end."})
    max_steps: int = field(default=4000, metadata={"help": "Steps in all; the last `decay_steps` cool down."})
    decay_steps: int = field(default=2250, metadata={"help": "Steps over which the learning rate falls to 0."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Scenes a step."})
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "Scenes a step of the evaluation."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Of the matrices of the blocks, which Muon moves."})
    adamw_learning_rate: float = field(default=5e-4, metadata={"help": "Of everything else."})
    warmup_steps: float = field(default=200)
    weight_decay: float = field(default=0.05)
    adam_beta2: float = field(default=0.98)
    max_grad_norm: float = field(default=1.0)
    bf16: bool = field(default=True)
    eval_strategy: str = field(default="steps")
    eval_steps: float = field(default=250)
    save_steps: float = field(default=250)
    save_total_limit: int | None = field(default=2)
    logging_steps: float = field(default=25)
    # Every scene is another one and is drawn once: their order is that of their numbers, so that a run that was
    # stopped, or goes on for longer, sees the scenes it would have seen.
    train_sampling_strategy: str = field(default="sequential")
    ddp_find_unused_parameters: bool | None = field(default=False)
    report_to: str | None = field(default="none")

    def __post_init__(self):
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()  # bf16 on a CPU has to be asked for
        self.remove_unused_columns = False  # the collator takes scenes
        self.lr_scheduler_type = "warmup_stable_decay"
        self.lr_scheduler_kwargs = {"num_decay_steps": self.decay_steps}
        super().__post_init__()
        use_one_device(self)

    @property
    def optimizer_and_options(self) -> Any:
        """As Trainer takes it: a function that returns the class, and what the class takes beside the model."""
        options = {"adamw_lr": self.adamw_learning_rate, "betas": (self.adam_beta1, self.adam_beta2)}
        return lambda: MuonWithAdamW, {"lr": self.learning_rate, "weight_decay": self.weight_decay, **options}


def find_checkpoint(training_args: TrainingArguments) -> str | None:
    folder = Path(training_args.output_dir or ".")
    return get_last_checkpoint(str(folder)) if folder.is_dir() else None
