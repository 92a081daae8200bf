"""The options that both training scripts share. The defaults are the paper's, and the help texts say so."""

from dataclasses import dataclass, field, fields
from typing import Any

from .recipe import PAPER, Recipe


def option(default: Any, text: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": text, **metadata})


def paper_option(name: str, text: str) -> Any:
    """Create an option for a field of the recipe. Its default is the paper's value, and its help says so."""
    value = getattr(PAPER, name)
    return option(value, f"{text} The paper's: {value}.")


@dataclass
class ModelArguments:
    """The model to start from: a trained ReSTR, or a new one."""

    model_name_or_path: str | None = option(
        None, "Folder or Hub id of a trained ReSTR to start from, instead of a new model."
    )
    revision: str = option("main", "Branch, tag or commit of the model on the Hub.", aliases=["--model_revision"])
    vision_model_name_or_path: str = paper_option(
        "start", "Folder or Hub id of the pretrained ViT that becomes a new model's vision encoder."
    )
    word_vectors: str | None = option(
        None,
        "Text file with pretrained word vectors for a new model, in GloVe's format; without it, they are random. The"
        " paper's: GloVe with 300 numbers per word.",
    )
    vocabulary_file: str | None = option(
        None, "Text file with the words of a new model, one per line; without it, all words of the training data."
    )
    image_size: int = paper_option("image_size", "Side of a new model's square input in pixels.")
    max_words: int = paper_option("max_words", "Maximum number of words per sentence in a new model.")
    fusion_type: str = paper_option("fusion_type", "Fusion of a new model: coupled, independent or vanilla.")
    patch_loss_weight: float = paper_option(
        "patch_loss_weight", "Weight of the patch loss, next to 1 for the pixel loss."
    )


@dataclass
class DataArguments:
    """Data and augmentation."""

    dataset_name: str = field(
        metadata={"help": "Folder or Hub id of prepared data with one row per image (required)."}
    )
    data_revision: str | None = option(
        None, "Branch, tag or commit of the data on the Hub; without it, main.", aliases=["--dataset_revision"]
    )
    train_split: str = option("train", "Split to train on.")
    validation_split: str = option("val", "Split to evaluate on during and after training; '' for none.")
    expressions_per_image: int = paper_option(
        "expressions_per_image",
        "Maximum number of sentences per image in a batch. They share the image's encoding, which saves time.",
    )
    streaming: bool = option(False, "Read the training data as a stream, without downloading or caching all of it.")
    shuffle_buffer_size: int = option(1000, "Number of items of a stream to hold in memory for shuffling.")
    max_train_samples: int | None = option(None, "Number of training images to use; without it, all.")
    max_eval_samples: int | None = option(None, "Number of validation images to use; without it, all.")
    augment_scale: float = option(0.0, "Probability of showing an image smaller. The paper's: no augmentation.")
    augment_crop: float = option(0.0, "Probability of a crop that keeps everything that the sentences refer to.")
    augment_color: float = option(0.0, "Probability of changed colours. Hues stay where a sentence names a colour.")
    augment_mirror: float = option(0.0, "Probability of a mirrored image, with left and right swapped in sentences.")
    num_overlays: int = option(8, "Number of validation images to draw with their masks after each evaluation.")


@dataclass
class RecipeArguments:
    """Settings of the training. Options that transformers' TrainingArguments also has mean the same there."""

    output_dir: str = option("runs/restr", "Folder for checkpoints, pictures and, at the end, the model.")
    max_steps: int = paper_option("max_steps", "Number of optimizer steps.")
    num_train_epochs: float = option(0.0, "Length of the run in epochs; if above 0, it replaces max_steps.")
    per_device_train_batch_size: int = option(
        PAPER.images_per_step, "Number of images per batch and device. The paper's: 8 per step, over all devices."
    )
    gradient_accumulation_steps: int = option(1, "Number of batches per device in each step.")
    per_device_eval_batch_size: int = option(4, "Number of images per batch and device in evaluation.")
    learning_rate: float = paper_option("learning_rate", "Learning rate of fusion, decoder and language encoder.")
    vision_learning_rate_ratio: float = paper_option(
        "vision_learning_rate_ratio", "Learning rate of the vision encoder as a fraction of the learning rate."
    )
    weight_decay: float = paper_option("weight_decay", "Weight decay of AdamW, for every parameter.")
    adam_beta1: float = paper_option("adam_beta1", "First beta of AdamW.")
    adam_beta2: float = paper_option("adam_beta2", "Second beta of AdamW.")
    warmup_steps: float = paper_option(
        "warmup_steps", "Number of steps of linear warm-up, or if below 1 a fraction of all steps."
    )
    power: float = paper_option("power", "Power of the polynomial by which the learning rate falls to 0.")
    max_grad_norm: float = paper_option("max_grad_norm", "Norm to clip gradients to; 0 does not clip.")
    eval_steps: int = option(10_000, "Number of steps between evaluations.")
    save_steps: int = option(2_000, "Number of steps between checkpoints.")
    save_total_limit: int | None = option(2, "Number of checkpoints to keep.")
    resume_from_checkpoint: str | None = option(
        None, "Checkpoint to resume from; without it, the last one in output_dir if there is one."
    )
    logging_steps: int = option(50, "Number of steps between log entries.")
    dataloader_num_workers: int = option(4, "Number of processes per device that decode images.")
    seed: int = option(PAPER.seed, "Seed of new weights, the order of the data, augmentation and drop path.")
    push_to_hub: bool = option(False, "Upload the final model with its card to the Hub.")
    hub_model_id: str | None = option(None, "Hub repository to upload to; without it, the name of output_dir.")
    hub_private_repo: bool | None = option(None, "Whether to create the repository as a private one.")
    hub_token: str | None = option(None, "Token for the Hub; without it, the one of `hf auth login`.")

    def make_recipe(self, **others: Any) -> Recipe:
        """The recipe of these options. `others` are the fields of [`Recipe`] that the options do not set."""
        names = {argument.name for argument in fields(RecipeArguments)} & {field.name for field in fields(Recipe)}
        return Recipe(**{name: getattr(self, name) for name in names}, **others)
