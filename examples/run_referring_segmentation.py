"""
Train ReSTR on prepared data, one row an image, as examples/prepare_refcoco.py writes it. The defaults are the paper's
recipe; `--help` says which choice is the paper's.

    python examples/run_referring_segmentation.py --dataset_name data/refcoco --word_vectors glove.840B.300d.txt \\
        --output_dir runs/refcoco

starts from a pretrained ViT and GloVe, as the paper does; `--model_name_or_path` goes on from a trained model. With
`torchrun` or `accelerate launch` it runs on many devices and machines; divide `--per_device_train_batch_size` by their
number to keep the paper's step of 8 pairs.

Whenever it is stopped, the same command goes on from the last whole checkpoint. On SIGTERM it saves one and exits with
code 143 (`torchrun`, when it is sent the signal itself, then exits with 1). A run ends in OUTPUT_DIR/model, a folder
that `pipeline` loads, with a card; `--push_to_hub` uploads it. Every other option of transformers' TrainingArguments
works, too: `--bf16`, `--gradient_accumulation_steps`, `--gradient_checkpointing`, `--torch_compile`, `--report_to
tensorboard`, ...
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from transformers import HfArgumentParser, SchedulerType, TrainingArguments, set_seed

from modeling_restr import ReSTRForImageSegmentation, ReSTRProcessor
from modeling_restr.training.batches import ReferringCollator, ReferringDataset, ReferringStream
from modeling_restr.training.checkpoints import EXIT_CODE_TERMINATED, LossNotFiniteError, get_step
from modeling_restr.training.recipe import Recipe
from modeling_restr.training.runs import (
    PAPER,
    DataArguments,
    ModelArguments,
    count_steps,
    create_eval_dataset,
    create_train_dataset,
    describe_start,
    find_checkpoint,
    finish_run,
    load_data,
    load_model,
    option,
)
from modeling_restr.training.trainer import ReferringTrainer


@dataclass
class ReferringTrainingArguments(TrainingArguments):
    """transformers' TrainingArguments with the paper's recipe as defaults."""

    output_dir: str = option("runs/restr", "Checkpoints, overlays, and the model at the end.")
    max_steps: int = option(PAPER.max_steps, "Steps in all. The paper's.")
    num_train_epochs: float = option(0.0, "If above 0, the length of the run instead of `max_steps`.")
    per_device_train_batch_size: int = option(
        PAPER.images_per_step, "Images a step on each device; the paper's is 8 in all, with one sentence each."
    )
    per_device_eval_batch_size: int = option(4, "Images a step of the evaluation, with up to 8 sentences each.")
    learning_rate: float = option(PAPER.learning_rate, "Of fusion, decoder and language encoder. The paper's.")
    vision_learning_rate_ratio: float = option(
        PAPER.vision_learning_rate_ratio, "The vision encoder's learning rate, as a share of it. The paper's."
    )
    weight_decay: float = option(PAPER.weight_decay, "Of AdamW, on every parameter. The paper's.")
    adam_beta1: float = option(PAPER.adam_beta1, "Of AdamW. The paper's.")
    adam_beta2: float = option(PAPER.adam_beta2, "Of AdamW. The paper's.")
    warmup_steps: float = option(
        PAPER.warmup_steps, "Steps of linear warm-up, below 1 as a share of all steps. The paper's."
    )
    lr_scheduler_type: str = option(PAPER.schedule, "How the learning rate falls afterwards. The paper's, to 0.")
    lr_scheduler_power: float = option(PAPER.power, "Power of the polynomial. The paper's.")
    max_grad_norm: float = option(PAPER.max_grad_norm, "Largest norm of the gradient, 0 for any. The paper's.")
    eval_strategy: str = option("steps", "When to evaluate: steps or no.")
    eval_steps: float | None = option(10_000, "Steps between evaluations.")
    save_steps: float = option(2_000, "Steps between checkpoints: what a kill can cost.")
    save_total_limit: int | None = option(2, "Checkpoints to keep.")
    logging_steps: float = option(50, "Steps between two lines of the log.")
    dataloader_num_workers: int = option(4, "Processes that decode images, for each device.")
    push_to_hub: bool = option(False, "Upload the model's folder at the end, with its card.")

    def __post_init__(self) -> None:
        if "epoch" in (str(self.eval_strategy), str(self.save_strategy)):
            raise ValueError(
                "Expected eval_strategy and save_strategy in steps: the data is one stream, epoch by epoch."
            )
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()  # bf16 on a CPU has to be asked for
        self.remove_unused_columns = False  # the collator takes images and sentences
        self.train_sampling_strategy = "sequential"  # the order is the dataset's own
        self.logging_nan_inf_filter = False  # it would hide them
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # all are used
        if self.lr_scheduler_type == "polynomial" and self.lr_scheduler_kwargs is None:
            self.lr_scheduler_kwargs = {"power": self.lr_scheduler_power, "lr_end": 0.0}
        super().__post_init__()
        # Trainer's own push would upload half a folder.
        self.push_folder_to_hub, self.push_to_hub = self.push_to_hub, False

    @property
    def images_per_step(self) -> int:
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size


def make_recipe(args: ReferringTrainingArguments, **start: Any) -> Recipe:
    """This run's recipe: of the arguments, and of what model and data decide on."""
    return Recipe(
        max_steps=args.max_steps,
        images_per_step=args.images_per_step,
        learning_rate=args.learning_rate,
        vision_learning_rate_ratio=args.vision_learning_rate_ratio,
        weight_decay=args.weight_decay,
        adam_beta1=args.adam_beta1,
        adam_beta2=args.adam_beta2,
        schedule=SchedulerType(args.lr_scheduler_type).value,
        power=args.lr_scheduler_power,
        warmup_steps=args.warmup_steps,
        max_grad_norm=args.max_grad_norm,
        precision="bfloat16" if args.bf16 else "float16" if args.fp16 else "float32",
        seed=args.seed,
        **start,
    )


def create_trainer(
    model: ReSTRForImageSegmentation,
    processor: ReSTRProcessor,
    recipe: Recipe,
    train_dataset: ReferringDataset | ReferringStream,
    validation_data: datasets.Dataset | None,
    num_overlays: int,
    args: ReferringTrainingArguments,
) -> ReferringTrainer:
    eval_dataset, overlay_rows = None, []
    if validation_data is None:
        args.eval_strategy = "no"
    else:
        eval_dataset = create_eval_dataset(validation_data)
        overlay_rows = list(validation_data.take(min(num_overlays, len(validation_data))))
    args.ignore_data_skip = isinstance(train_dataset, ReferringStream)  # it begins where it has to
    return ReferringTrainer(
        model=model,
        args=args,
        data_collator=ReferringCollator(processor),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processor=processor,
        recipe=recipe,
        overlay_rows=overlay_rows,
    )


def train(model_args: ModelArguments, data_args: DataArguments, args: ReferringTrainingArguments) -> None:
    set_seed(args.seed)
    train_data, validation_data = load_data(data_args, args.main_process_first(desc="loading the data"))
    model, processor = load_model(model_args, train_data)
    if args.num_train_epochs > 0:
        args.max_steps = count_steps(train_data, data_args, args.num_train_epochs, args.images_per_step)
    recipe = make_recipe(args, **describe_start(model, train_data, model_args, data_args))
    is_main_process = args.process_index == 0
    if is_main_process:
        deviations = recipe.deviations() or "nothing"
        print(f"{model.num_parameters() / 1e6:.1f} M parameters; other than in the paper: {deviations}")

    checkpoint = find_checkpoint(args.output_dir, recipe, args.resume_from_checkpoint, is_main_process)
    train_dataset = create_train_dataset(
        train_data,
        data_args,
        recipe,
        batch_size=args.train_batch_size,
        first_step=0 if checkpoint is None else get_step(checkpoint),
        process_index=args.process_index,
        num_processes=args.world_size,
    )
    trainer = create_trainer(model, processor, recipe, train_dataset, validation_data, data_args.num_overlays, args)
    set_seed(args.seed + args.process_index)  # drop path differs between the processes
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if trainer.stopped:
        print("Stopped by SIGTERM, with a checkpoint: the same command goes on from there.", file=sys.stderr)
        sys.exit(EXIT_CODE_TERMINATED)
    finish_run(
        trainer.accelerator,
        trainer.model,
        processor,
        args.output_dir,
        recipe,
        data_args,
        validation_data,
        repo_id=(args.hub_model_id or trainer.output_dir.resolve().name) if args.push_folder_to_hub else None,
        private=args.hub_private_repo,
        token=args.hub_token,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = HfArgumentParser([ModelArguments, DataArguments, ReferringTrainingArguments])  # type: ignore[list-item]
    try:
        train(*parser.parse_args_into_dataclasses(arguments))
    except (LossNotFiniteError, ValueError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error


if __name__ == "__main__":
    main()
