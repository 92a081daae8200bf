"""
The paper's recipe as data, optimizer and schedule: 400,000 steps of 8 (image, expression) pairs, AdamW with two learning
rates, warm-up and polynomial decay. Its source is section 4.1 of arXiv 2203.16768, and the authors' code where the paper
is silent.
"""

import json
import logging
import math
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_polynomial_decay_schedule_with_warmup

from ..files import write_json


logger = logging.getLogger(__name__)

RECIPE_NAME = "recipe.json"
_NAMES_OF_DATA = {"dataset", "split"}  # the same data may have other names


@dataclass(frozen=True)
class Recipe:
    """
    All settings that determine the final weights of a run. They are saved with each checkpoint and shown in the model
    card. The defaults are the paper's.

    Raises:
        ValueError: The warm-up is as long as the run.
    """

    max_steps: int = 400_000
    images_per_step: int = 8  # over all processes and accumulated batches
    expressions_per_image: int = 1
    learning_rate: float = 1e-5  # of fusion, decoder and language encoder
    vision_learning_rate_ratio: float = 0.1
    weight_decay: float = 5e-4  # on every parameter, including biases and layer norms
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    schedule: str = "polynomial"  # to 0
    power: float = 0.9
    warmup_steps: float = 0.1  # linear; below 1: share of all steps
    max_grad_norm: float = 0.0  # 0: no clipping
    image_size: int = 480
    max_words: int = 20
    patch_loss_weight: float = 0.1
    drop_path_rate: float = 0.1
    fusion_type: str = "coupled"
    word_vectors: str = "GloVe 300-d"
    augmentation: str = "none"
    precision: str = "float32"
    start: str = "google/vit-base-patch16-384"
    dataset: str = ""
    split: str = "train"
    num_expressions: int | None = None  # in the split; None for a stream
    data_fingerprint: str | None = None  # see fingerprints.py
    stream: str | None = None  # how its batches are read; None without a stream
    seed: int = 42

    def __post_init__(self) -> None:
        if self.max_steps < 1 or not 0 <= self.num_warmup_steps < self.max_steps:
            raise ValueError(
                f"Expected max_steps >= 1 and fewer steps of warm-up, got max_steps={self.max_steps} and"
                f" {self.num_warmup_steps} steps of warm-up (warmup_steps={self.warmup_steps}). Choose more steps, or"
                " warmup_steps=0."
            )

    @property
    def num_warmup_steps(self) -> int:
        return math.ceil(self.warmup_steps * (self.max_steps if self.warmup_steps < 1 else 1))

    @property
    def base_model(self) -> str | None:
        """Hub id of the model that the run started from; None if it was a folder."""
        is_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", self.start) and not Path(self.start).exists()
        return self.start if is_id else None

    def deviations(self) -> dict[str, tuple[Any, Any]]:
        """Field -> (the paper's value, this run's value) where they differ. Fields that the paper leaves open are left out."""
        ours, papers = asdict(self), asdict(PAPER)
        names = papers.keys() - _NAMES_OF_DATA - {"num_expressions", "data_fingerprint", "stream", "seed"}
        return {name: (papers[name], ours[name]) for name in papers if name in names and papers[name] != ours[name]}

    def describe(self) -> dict[str, Any]:
        """Fields and values for a model card, with the paper's value if it differs."""
        deviations = self.deviations()
        return {
            name: f"{value} (the paper: {deviations[name][0]})" if name in deviations else value
            for name, value in asdict(self).items()
        }

    def save(self, folder: str | Path) -> None:
        """Write `recipe.json` to a folder."""
        write_json(Path(folder, RECIPE_NAME), asdict(self))

    def check_same(self, folder: str | Path) -> None:
        """
        Make sure that a run resumes with the recipe and data that it started with. Fields that an earlier version of
        the package did not write have their defaults.

        Raises:
            ValueError: The folder's `recipe.json` is missing, cannot be read, or differs. The message lists the
                differences.
        """
        earlier, now = _read_recipe(Path(folder, RECIPE_NAME)), asdict(self)
        defaults = {field.name: field.default for field in fields(self)}
        if unknown := sorted(earlier.keys() - defaults.keys()):
            logger.warning(
                f"{folder} was written by a later version of this package; its fields {unknown} are ignored."
            )
        saved = {name: earlier.get(name, default) for name, default in defaults.items()}
        if None in (saved["data_fingerprint"], now["data_fingerprint"]):
            logger.warning(f"{folder} may be of a run on other data: no fingerprint was taken.")
            ignored = {"data_fingerprint"}
        else:
            ignored = _NAMES_OF_DATA
        if saved["stream"] is None:  # earlier versions did not write it
            ignored = ignored | {"stream"}
        different = [name for name in defaults if saved[name] != now[name] and name not in ignored]
        if different:
            listing = "\n".join(f"  {name}: {saved[name]} there, {now[name]} now" for name in different)
            raise ValueError(
                f"Expected the recipe and data of {folder}, got others. Resume with the same ones, or choose another"
                f" output_dir and start from its weights:\n{listing}"
            )


PAPER = Recipe()


def _read_recipe(path: Path) -> dict[str, Any]:
    try:
        recipe = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        recipe = error
    if not isinstance(recipe, dict):
        raise ValueError(
            f"Expected a training script's recipe in {path}, got {str(recipe)[:80]!r}. Choose another output_dir, or"
            " another checkpoint to resume from."
        )
    return recipe


def create_parameter_groups(
    model: nn.Module,
    learning_rate: float = 1e-5,
    vision_learning_rate_ratio: float = 0.1,
    weight_decay: float = 5e-4,
) -> list[dict[str, Any]]:
    """
    Split the trainable parameters into two groups: "fusion and language" with `learning_rate`, and "vision" with
    `vision_learning_rate_ratio` times that. Weight decay applies to every parameter.

    Raises:
        ValueError: The model has no `vision_model`.
    """
    names = [name for name, _ in model.named_parameters()]
    if not any(_is_vision(name) for name in names):
        raise ValueError(f"Expected a model with a `vision_model`, got a {type(model).__name__} with {names[:3]}, ...")
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    rates = {False: learning_rate, True: learning_rate * vision_learning_rate_ratio}
    return [
        {
            "name": "vision" if is_vision else "fusion and language",
            "params": [parameter for name, parameter in trained if _is_vision(name) == is_vision],
            "lr": rate,
            "weight_decay": weight_decay,
        }
        for is_vision, rate in rates.items()
    ]


def _is_vision(name: str) -> bool:
    return "vision_model" in name.split(".")  # DDP, FSDP and torch.compile add prefixes


def create_optimizer(model: nn.Module, recipe: Recipe = PAPER) -> torch.optim.AdamW:
    """AdamW over [`create_parameter_groups`]."""
    groups = create_parameter_groups(
        model, recipe.learning_rate, recipe.vision_learning_rate_ratio, recipe.weight_decay
    )
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(recipe.adam_beta1, recipe.adam_beta2))


def create_scheduler(optimizer: torch.optim.Optimizer, recipe: Recipe = PAPER) -> LambdaLR:
    """
    Linear warm-up from 0, then `learning_rate * (1 - (step - warmup_steps) / (max_steps - warmup_steps)) ** power`, for
    every parameter group. Step it once per optimizer step, whatever the number of processes.
    """
    return get_polynomial_decay_schedule_with_warmup(
        optimizer,
        num_warmup_steps=recipe.num_warmup_steps,
        num_training_steps=recipe.max_steps,
        lr_end=0.0,
        power=recipe.power,
    )
