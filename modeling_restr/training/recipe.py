"""
The paper's recipe (section 4.1 of arXiv 2203.16768, and where it is silent the authors' code) as data, optimizer and
schedule: 400,000 steps of 8 (image, expression) pairs, AdamW with two learning rates, warm-up and polynomial decay.
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


logger = logging.getLogger(__name__)

RECIPE_NAME = "recipe.json"
_NAMES_OF_DATA = ("dataset", "split")  # the same data may have others


@dataclass(frozen=True)
class Recipe:
    """
    All that decides on the weights a run ends in, for its model card and to resume it as it began. The defaults are
    the paper's.

    Raises:
        ValueError: the warm-up is as long as the run.
    """

    max_steps: int = 400_000
    images_per_step: int = 8  # over all processes and accumulated batches
    expressions_per_image: int = 1
    learning_rate: float = 1e-5  # of fusion, decoder and language encoder
    vision_learning_rate_ratio: float = 0.1
    weight_decay: float = 5e-4  # on every parameter, biases and normalisations included
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    schedule: str = "polynomial"  # to 0
    power: float = 0.9
    warmup_steps: float = 0.1  # below 1 a share of all steps; linear
    max_grad_norm: float = 0.0  # 0 clips nothing
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
    data_fingerprint: str | None = None  # of `fingerprints.py`; None where it was not taken
    seed: int = 42

    def __post_init__(self) -> None:
        if self.max_steps < 1 or not 0 <= self.num_warmup_steps < self.max_steps:
            raise ValueError(
                f"Expected max_steps >= 1 and fewer steps of warm-up, got max_steps={self.max_steps} and"
                f" warmup_steps={self.warmup_steps}, {self.num_warmup_steps} of them."
            )

    @property
    def num_warmup_steps(self) -> int:
        return math.ceil(self.warmup_steps * (self.max_steps if self.warmup_steps < 1 else 1))

    @property
    def base_model(self) -> str | None:
        """Id on the Hub of what the run started from; None where that was a folder."""
        is_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", self.start) and not Path(self.start).exists()
        return self.start if is_id else None

    def deviations(self) -> dict[str, tuple[Any, Any]]:
        """Field -> (the paper's, this run's) where they differ; what the paper does not fix is left out."""
        ours, papers = asdict(self), asdict(Recipe())
        unfixed = {*_NAMES_OF_DATA, "num_expressions", "data_fingerprint", "seed"}
        return {
            name: (papers[name], ours[name]) for name in papers if name not in unfixed and papers[name] != ours[name]
        }

    def describe(self) -> dict[str, Any]:
        """Settings and their values for a model card, next to the paper's where they differ."""
        deviations = self.deviations()
        return {
            name: f"{value} (the paper: {deviations[name][0]})" if name in deviations else value
            for name, value in asdict(self).items()
        }

    def save(self, folder: str | Path) -> None:
        """Write `recipe.json` into a folder."""
        Path(folder, RECIPE_NAME).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    def check_same(self, folder: str | Path) -> None:
        """
        Make sure that a run resumes as it began, on the same data. A field that the folder's recipe lacks, because an
        earlier version wrote it, has its default there.

        Raises:
            ValueError: the folder's `recipe.json` is missing, is none, or is of another recipe; the message names the
                differences.
        """
        earlier, now = _read_recipe(Path(folder, RECIPE_NAME)), asdict(self)
        names = {field.name: field.default for field in fields(self)}
        if unknown := sorted(earlier.keys() - names.keys()):
            logger.warning(
                f"{folder} was written by a later version of this package, with {unknown}, which this one ignores."
            )
        there = {name: earlier.get(name, default) for name, default in names.items()}
        if None in (there["data_fingerprint"], now["data_fingerprint"]):
            logger.warning(f"Whether {folder} is of a run on the same data is not known: no fingerprint was taken.")
            ignored = {"data_fingerprint"}
        else:
            ignored = {*_NAMES_OF_DATA}
        different = [name for name in names if there[name] != now[name] and name not in ignored]
        if different:
            listing = "\n".join(f"  {name}: {there[name]} there, {now[name]} now" for name in different)
            raise ValueError(
                f"Expected the recipe and data that of {folder}, got others. Resume with the same ones, or"
                f" choose another output_dir and start from its weights:\n{listing}"
            )


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
    The parameters that are trained, in two groups: "fusion and language" with `learning_rate`, "vision" with its share
    of it. Weight decay is on every parameter.

    Raises:
        ValueError: the model has no `vision_model`.
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
    return "vision_model" in name.split(".")  # DDP, FSDP and torch.compile put their own names in front


def create_optimizer(model: nn.Module, recipe: Recipe | None = None) -> torch.optim.AdamW:
    """AdamW over [`create_parameter_groups`]."""
    recipe = recipe or Recipe()
    groups = create_parameter_groups(
        model, recipe.learning_rate, recipe.vision_learning_rate_ratio, recipe.weight_decay
    )
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(recipe.adam_beta1, recipe.adam_beta2))


def create_scheduler(optimizer: torch.optim.Optimizer, recipe: Recipe | None = None) -> LambdaLR:
    """
    Linear warm-up from 0, then `learning_rate * (1 - (step - warmup_steps) / (max_steps - warmup_steps)) ** power`,
    alike in every group of the optimizer. It is stepped once per optimizer step, however many processes there are.
    """
    recipe = recipe or Recipe()
    return get_polynomial_decay_schedule_with_warmup(
        optimizer,
        num_warmup_steps=recipe.num_warmup_steps,
        num_training_steps=recipe.max_steps,
        lr_end=0.0,
        power=recipe.power,
    )


__all__ = ["RECIPE_NAME", "Recipe", "create_optimizer", "create_parameter_groups", "create_scheduler"]
