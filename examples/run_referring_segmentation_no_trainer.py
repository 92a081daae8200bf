"""
Train ReSTR in a plain loop with Accelerate instead of Trainer. Recipe, data and resulting weights are the same as with
run_referring_segmentation.py. The loop in `train` is meant to be read and changed.

    accelerate launch --config_file examples/accelerate_configs/one_gpu_bf16.yaml \\
        examples/run_referring_segmentation_no_trainer.py --dataset_name data/refcoco \\
        --word_vectors glove.840B.300d.txt --output_dir runs/refcoco

The configuration file or the options of `accelerate launch` select devices, machines and precision. Divide
`--per_device_train_batch_size` by the number of devices to keep the paper's 8 pairs per step.

The same command resumes a stopped run from its last complete checkpoint. On SIGTERM the script saves a checkpoint and
exits with code 143. (If `accelerate launch` starts only one process, it does not forward the signal: send it to the
script.) The result is OUTPUT_DIR/model, a folder with a model card that `pipeline` loads; `--push_to_hub` uploads it.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin, load, send_to_device
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import set_seed

from modeling_restr.training.arguments import DataArguments, ModelArguments, RecipeArguments, option
from modeling_restr.training.batches import (
    ReferringCollator,
    ReferringDataset,
    create_loader,
    loss_weight,
    split_ids,
)
from modeling_restr.training.checkpoints import (
    LossMonitor,
    ResumeError,
    StopSignal,
    check_weights,
    get_step,
    keep_last_checkpoints,
    write_checkpoint,
)
from modeling_restr.training.recipe import Recipe, create_optimizer, create_scheduler
from modeling_restr.training.runs import (
    Run,
    create_eval_dataset,
    create_train_dataset,
    finish_run,
    run_script,
    start_run,
)
from modeling_restr.training.validation import PADDING, compute_metrics, count_pixels, show_panel


PRECISIONS = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}
TRACKER_PROJECT = "referring-segmentation"


@dataclass
class LoopArguments(RecipeArguments):
    """Settings of the training, with the names that TrainingArguments uses."""

    mixed_precision: str | None = option(None, "Precision: no or bf16; without it, the one of `accelerate launch`.")
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass to save memory.")
    torch_compile: bool = option(False, "Compile the model with torch.compile.")
    report_to: list[str] = field(
        default_factory=list, metadata={"help": "Trackers to log to, such as tensorboard and trackio."}
    )


def create_accelerator(args: LoopArguments) -> Accelerator:
    return Accelerator(
        cpu=True
        if not torch.accelerator.is_available()
        else None,  # otherwise processes on CPUs do not find one another
        mixed_precision=args.mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=args.gradient_accumulation_steps),
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
        log_with=args.report_to or None,
        project_dir=args.output_dir,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=False)],
    )


def prepare(accelerator: Accelerator, run: Run, args: LoopArguments) -> tuple[Any, Any, LambdaLR]:
    """Create the model to train and its optimizer, wrapped by Accelerate, and the schedule."""
    model = run.model.train()
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if args.torch_compile:
        model.compile()
    optimizer = create_optimizer(model, run.recipe)
    scheduler = create_scheduler(optimizer, run.recipe)  # not prepared: Accelerate would step it once per process
    accelerator.register_for_checkpointing(scheduler)
    return *accelerator.prepare(model, optimizer), scheduler


def create_loaders(accelerator: Accelerator, run: Run, args: LoopArguments) -> tuple[DataLoader, DataLoader | None]:
    """Create loaders of this process's training batches from the run's first step on, and of any validation data."""
    collator = ReferringCollator(run.processor, run.model.config.text_config.vocab_size)
    options = {"num_workers": args.dataloader_num_workers, "pin_memory": accelerator.device.type != "cpu"}
    batch_size = args.per_device_train_batch_size
    train_dataset = create_train_dataset(run, batch_size)
    if isinstance(train_dataset, ReferringDataset):
        positions = range(run.first_step * run.recipe.images_per_step, len(train_dataset))
        loader = create_loader(train_dataset, batch_size, collator, sampler=positions, **options)
        train_loader = accelerator.prepare_data_loader(loader)
    else:
        train_loader = create_loader(train_dataset, batch_size, collator, **options)  # this process's share already
    if run.validation_data is None:
        return train_loader, None
    eval_dataset = create_eval_dataset(run.validation_data)
    loader = create_loader(eval_dataset, args.per_device_eval_batch_size, collator, **options)
    return train_loader, accelerator.prepare_data_loader(loader)


def load_checkpoint(accelerator: Accelerator, scheduler: LambdaLR, checkpoint: Path) -> None:
    """
    Restore everything that was saved in a checkpoint.

    Raises:
        ValueError: Its files are damaged, or the folder was renamed.
    """
    random_states = checkpoint / f"random_states_{accelerator.process_index}.pkl"
    try:
        accelerator.load_state(str(checkpoint))
        if random_states.exists():  # load_state ignores a damaged one
            torch.set_rng_state(load(random_states)["torch_manual_seed"])
    except Exception as error:  # each kind of file raises different errors
        raise ResumeError(checkpoint, error) from error
    if scheduler.last_epoch != get_step(checkpoint):
        raise ValueError(
            f"Expected a checkpoint of step {get_step(checkpoint)}, as its name says, got {checkpoint} of step"
            f" {scheduler.last_epoch}. Rename the folder back."
        )


def save_checkpoint(accelerator: Accelerator, model: Any, optimizer: Any, run: Run, step: int) -> None:
    """Atomically write everything that the run needs to resume."""
    output_dir = Path(run.args.output_dir)
    check_weights(model, step, optimizer)
    with write_checkpoint(output_dir, step) as folder:
        accelerator.save_state(str(folder))
        if accelerator.is_main_process:
            accelerator.unwrap_model(model).config.save_pretrained(folder)
            run.processor.save_pretrained(folder)
            run.recipe.save(folder)
    if accelerator.is_main_process:
        keep_last_checkpoints(output_dir, run.args.save_total_limit, protected=[output_dir / folder.name])


def compute_gradients(
    accelerator: Accelerator, model: Any, batches: Sequence[dict[str, torch.Tensor]], losses: LossMonitor, step: int
) -> torch.Tensor:
    """
    Compute the gradients of the mean loss over the pairs of a step, as if the accumulated batches of all processes were
    one batch. Nothing here waits for the device.

    Returns:
        The mean loss (scalar).
    """
    num_pairs = torch.full((), sum(len(batch["input_ids"]) for batch in batches), device=accelerator.device)
    num_pairs = accelerator.reduce(num_pairs, "sum")
    mean_loss = torch.zeros((), device=accelerator.device)
    for number, batch in enumerate(batches, start=1):
        inputs, ids = split_ids(send_to_device(batch, accelerator.device, non_blocking=True))
        with nullcontext() if number == len(batches) else accelerator.no_sync(model):
            loss = model(**inputs).loss
            losses.add(loss, step, ids)
            loss = loss * loss_weight(inputs, num_pairs, len(batches) * accelerator.num_processes)
            accelerator.backward(loss)  # divides by the number of accumulated batches
        mean_loss += loss.detach() / len(batches)
    return accelerator.reduce(mean_loss, "mean")


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: Any, loader: DataLoader, run: Run, step: int) -> None:
    """Log metrics over all expressions at the model's input size, and a panel of images with their masks."""
    model.eval()
    gathered = []
    for batch in loader:
        inputs, _ = split_ids(batch)
        counts = count_pixels(model(**inputs).logits, inputs["labels"], inputs["image_indices"])
        counts = accelerator.pad_across_processes(counts, dim=1, pad_index=PADDING)
        gathered.append(accelerator.gather_for_metrics(counts).reshape(-1, 2).cpu())
    metrics = compute_metrics(torch.cat(gathered))
    numbers = {f"eval/{name}": value for name, value in metrics.items() if isinstance(value, int | float)}
    accelerator.log(numbers, step=step)
    accelerator.print(f"Step {step}:", ", ".join(f"{name} {value:.4g}" for name, value in numbers.items()))
    show_panel(
        model,
        run.processor,
        run.overlay_rows,
        run.args.output_dir,
        step,
        tensorboard_writers=(tracker.writer for tracker in accelerator.trackers if tracker.name == "tensorboard"),
        with_trackio="trackio" in (tracker.name for tracker in accelerator.trackers),
    )
    model.train()


def init_trackers(accelerator: Accelerator, recipe: Recipe, args: LoopArguments) -> None:
    config = {name: value for name, value in asdict(recipe).items() if value is not None}
    names = {"trackio": {"name": Path(args.output_dir).resolve().name, "resume": "allow"}}
    accelerator.init_trackers(TRACKER_PROJECT, config, names)


def train(model_args: ModelArguments, data_args: DataArguments, args: LoopArguments) -> bool:
    """Train, save and evaluate. Returns False if SIGTERM stopped the run."""
    accelerator = create_accelerator(args)
    batches_per_step = args.gradient_accumulation_steps * accelerator.num_processes
    run = start_run(
        model_args,
        data_args,
        args,
        images_per_step=args.per_device_train_batch_size * batches_per_step,
        by_trainer=False,
        precision=PRECISIONS[accelerator.mixed_precision],
    )
    recipe = run.recipe
    model, optimizer, scheduler = prepare(accelerator, run, args)
    set_seed(recipe.seed + accelerator.process_index)  # drop path differs between processes
    if run.checkpoint is not None:
        load_checkpoint(accelerator, scheduler, run.checkpoint)
    train_loader, eval_loader = create_loaders(accelerator, run, args)
    init_trackers(accelerator, recipe, args)

    batches, losses, is_stopped = iter(train_loader), LossMonitor(), False
    progress = tqdm(
        total=recipe.max_steps, initial=run.first_step, unit="step", disable=not accelerator.is_main_process
    )
    with progress, StopSignal() as stop:
        for step in range(run.first_step + 1, recipe.max_steps + 1):
            step_batches = list(islice(batches, args.gradient_accumulation_steps))
            loss = compute_gradients(accelerator, model, step_batches, losses, step)
            if recipe.max_grad_norm > 0:
                accelerator.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            progress.update()

            is_logged = step % args.logging_steps == 0
            is_saved = step % args.save_steps == 0 or step == recipe.max_steps
            if is_logged or is_saved:  # other steps read nothing from the device
                losses.check()
                is_stopped = stop.is_requested()
            if is_logged:
                progress.set_postfix(loss=f"{loss.item():.4f}")
                rates = {f"train/learning_rate/{group['name']}": group["lr"] for group in optimizer.param_groups}
                accelerator.log({"train/loss": loss.item(), **rates}, step=step)
            if is_saved or is_stopped:
                save_checkpoint(accelerator, model, optimizer, run, step)
            if is_stopped:
                break
            if eval_loader is not None and step % args.eval_steps == 0:
                evaluate(accelerator, model, eval_loader, run, step)

    is_finished = not is_stopped or step == recipe.max_steps
    if is_finished:
        finish_run(accelerator, model, run)
    accelerator.end_training()
    return is_finished


def main(arguments: Sequence[str] | None = None) -> None:
    run_script(train, [ModelArguments, DataArguments, LoopArguments], arguments)


if __name__ == "__main__":
    main()
