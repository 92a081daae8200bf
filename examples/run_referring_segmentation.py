"""
Train ReSTR on prepared data, one row per image, as `restr prepare` writes it. The defaults are the paper's
recipe; `--help` says which choice is the paper's.

    python examples/run_referring_segmentation.py --dataset_name data/refcoco --word_vectors glove.840B.300d.txt \\
        --output_dir runs/refcoco

starts from a pretrained ViT and GloVe, as the paper does; `--model_name_or_path` starts from a trained model. With
`torchrun` or `accelerate launch` it runs on many devices and machines; divide `--per_device_train_batch_size` by their
number to keep the paper's step of 8 pairs.

Whenever it is stopped, the same command resumes from the last whole checkpoint. On SIGTERM it saves one and exits with
code 143 (`torchrun`, when it is sent the signal itself, then exits with 1). A run ends in OUTPUT_DIR/model, a folder
that `pipeline` loads, with a card; `--push_to_hub` uploads it. Every other option of transformers' TrainingArguments
works, too: `--bf16`, `--gradient_accumulation_steps`, `--gradient_checkpointing`, `--torch_compile`, `--report_to
tensorboard`, ...
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

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
    RecipeArguments,
    choose_repo_id,
    count_steps,
    create_eval_dataset,
    create_train_dataset,
    describe_start,
    find_checkpoint,
    finish_run,
    load_data,
    load_model,
    option,
    prepare_push,
)
from modeling_restr.training.trainer import ReferringTrainer, use_one_device


@dataclass
class ReferringTrainingArguments(RecipeArguments, TrainingArguments):  # type: ignore[misc]  # output_dir is never None
    """transformers' TrainingArguments with the paper's recipe as defaults."""

    lr_scheduler_type: str = option(
        PAPER.schedule, "How the learning rate falls after the warm-up. The paper's, to 0."
    )
    eval_strategy: str = option("steps", "When to evaluate: steps or no.")

    def __post_init__(self) -> None:
        if "epoch" in (str(self.eval_strategy), str(self.save_strategy)):
            raise ValueError(
                "Expected eval_strategy and save_strategy in steps: the data is one stream, epoch by epoch."
            )
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()  # bf16 on a CPU has to be asked for
        if self.accelerator_config is None:
            self.accelerator_config = {"non_blocking": True}
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # all are used
        if self.lr_scheduler_type == "polynomial" and self.lr_scheduler_kwargs is None:
            self.lr_scheduler_kwargs = {"power": self.power, "lr_end": 0.0}
        super().__post_init__()
        use_one_device(self)
        # Trainer's own push would upload half a folder.
        self.push_folder_to_hub, self.push_to_hub = self.push_to_hub, False

    @property
    def images_per_step(self) -> int:
        return self.train_batch_size * self.gradient_accumulation_steps * self.world_size


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
        data_collator=ReferringCollator(processor, model.config.text_config.vocab_size),
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
    is_main_process = args.process_index == 0
    recipe = args.make_recipe(
        images_per_step=args.images_per_step,
        schedule=SchedulerType(args.lr_scheduler_type).value,
        precision="bfloat16" if args.bf16 else "float16" if args.fp16 else "float32",
        **describe_start(model, train_data, model_args, data_args, is_main_process),
    )
    if is_main_process:
        deviations = recipe.deviations() or "nothing"
        print(f"{model.num_parameters() / 1e6:.1f} M parameters; other than in the paper: {deviations}")

    repo_id = choose_repo_id(args, args.push_folder_to_hub)
    if is_main_process:
        prepare_push(args, repo_id)
    checkpoint = find_checkpoint(
        args.output_dir,
        recipe,
        args.resume_from_checkpoint,
        by_trainer=True,
        is_main_process=is_main_process,
    )
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
        print("Stopped by SIGTERM, with a checkpoint: the same command resumes from there.", file=sys.stderr)
        sys.exit(EXIT_CODE_TERMINATED)
    finish_run(
        trainer.accelerator,
        trainer.model,
        processor,
        args.output_dir,
        recipe,
        data_args,
        validation_data,
        repo_id=repo_id,
        private=args.hub_private_repo,
        token=args.hub_token,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = HfArgumentParser([ModelArguments, DataArguments, ReferringTrainingArguments])  # type: ignore[list-item]
    try:
        train(*parser.parse_args_into_dataclasses(arguments))
    except (LossNotFiniteError, ValueError, OSError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error


if __name__ == "__main__":
    main()
