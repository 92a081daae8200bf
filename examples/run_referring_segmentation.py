"""
Train ReSTR with transformers' Trainer, on prepared data with one row per image (`restr prepare`). The defaults are the
paper's recipe, which starts from a pretrained ViT and GloVe:

    python examples/run_referring_segmentation.py --dataset_name data/refcoco --word_vectors glove.840B.300d.txt \\
        --output_dir runs/refcoco

`--model_name_or_path` starts from a trained model instead. `torchrun` or `accelerate launch` uses several devices and
machines. Divide `--per_device_train_batch_size` by their number to keep the paper's 8 pairs per step.

The same command resumes a stopped run from its last complete checkpoint. On SIGTERM the script saves a checkpoint and
exits with code 143 (`torchrun` itself exits with 1). The result is OUTPUT_DIR/model, a folder with a model card that
`pipeline` loads; `--push_to_hub` uploads it. All other options of transformers' TrainingArguments work, such as `--bf16`,
`--gradient_checkpointing`, `--torch_compile` and `--report_to tensorboard`. See docs/training.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import SchedulerType, TrainingArguments, set_seed

from modeling_restr.training.arguments import DataArguments, ModelArguments, RecipeArguments, option, paper_option
from modeling_restr.training.batches import ReferringCollator, ReferringStream
from modeling_restr.training.runs import create_eval_dataset, create_train_dataset, finish_run, run_script, start_run
from modeling_restr.training.trainer import ReferringTrainer, use_one_device


@dataclass
class ReferringTrainingArguments(RecipeArguments, TrainingArguments):  # type: ignore[misc]  # output_dir is never None
    """transformers' TrainingArguments with the paper's recipe as defaults."""

    lr_scheduler_type: str = paper_option("schedule", "Schedule of the learning rate after the warm-up.")
    eval_strategy: str = option("steps", "When to evaluate: steps or no.")

    def __post_init__(self) -> None:
        if "epoch" in (str(self.eval_strategy), str(self.save_strategy)):
            raise ValueError(
                "Expected eval_strategy and save_strategy to be steps or no, got epoch: the data is one stream of all"
                " epochs."
            )
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()  # otherwise bf16 fails on a CPU
        if self.accelerator_config is None:
            self.accelerator_config = {"non_blocking": True}
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # all are used
        if self.lr_scheduler_type == "polynomial" and self.lr_scheduler_kwargs is None:
            self.lr_scheduler_kwargs = {"power": self.power, "lr_end": 0.0}
        super().__post_init__()
        use_one_device(self)


def train(model_args: ModelArguments, data_args: DataArguments, args: ReferringTrainingArguments) -> bool:
    """Train, save and evaluate. Returns False if SIGTERM stopped the run."""
    run = start_run(
        model_args,
        data_args,
        args,
        images_per_step=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        by_trainer=True,
        schedule=SchedulerType(args.lr_scheduler_type).value,
        precision="bfloat16" if args.bf16 else "float16" if args.fp16 else "float32",
    )
    train_dataset = create_train_dataset(run, args.train_batch_size)
    eval_dataset = None
    if run.validation_data is None:
        args.eval_strategy = "no"
    else:
        eval_dataset = create_eval_dataset(run.validation_data)
    args.ignore_data_skip = isinstance(train_dataset, ReferringStream)  # it starts at the right step by itself
    args.push_to_hub = False  # `finish_run` pushes the evaluated model; Trainer would push its checkpoints
    trainer = ReferringTrainer(
        model=run.model,
        args=args,
        data_collator=ReferringCollator(run.processor, run.model.config.text_config.vocab_size),
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processor=run.processor,
        recipe=run.recipe,
        overlay_rows=run.overlay_rows,
    )
    set_seed(args.seed + args.process_index)  # drop path differs between processes
    trainer.train(resume_from_checkpoint=None if run.checkpoint is None else str(run.checkpoint))
    if trainer.stopped:
        return False
    finish_run(trainer.accelerator, trainer.model, run)
    return True


def main(arguments: Sequence[str] | None = None) -> None:
    run_script(train, [ModelArguments, DataArguments, ReferringTrainingArguments], arguments)


if __name__ == "__main__":
    main()
