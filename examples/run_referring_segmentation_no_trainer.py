"""
Train ReSTR on prepared data, as run_referring_segmentation.py does, with Accelerate instead of Trainer: the same
recipe (the paper's), items and weights, in a loop to read from top to bottom and to change.

    accelerate launch --config_file examples/accelerate_configs/one_gpu_bf16.yaml \\
        examples/run_referring_segmentation_no_trainer.py --dataset_name data/refcoco \\
        --word_vectors glove.840B.300d.txt --output_dir runs/refcoco

How many devices and machines, and in what precision: the configuration files next to that one say it, or `accelerate
launch`'s options; divide `--per_device_train_batch_size` by the number of devices to keep the paper's step of 8 pairs.

Whenever it is stopped, the same command resumes from the last whole checkpoint. On SIGTERM it saves one and exits with
code 143. (Where `accelerate launch` starts one process only, it does not pass the signal on: send it to the script.)
A run ends in OUTPUT_DIR/model, a folder that `pipeline` loads, with a card; `--push_to_hub` uploads it.
"""

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin, load, send_to_device, set_seed
from PIL import Image
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import EvalPrediction, HfArgumentParser

from modeling_restr import ReSTRForImageSegmentation, ReSTRProcessor
from modeling_restr.training.batches import ReferringCollator, ReferringDataset, loss_weight, split_ids
from modeling_restr.training.checkpoints import (
    EXIT_CODE_TERMINATED,
    LossMonitor,
    LossNotFiniteError,
    ResumeError,
    StopSignal,
    check_weights,
    get_step,
    keep_last_checkpoints,
    outlive_stop_signal,
    write_checkpoint,
)
from modeling_restr.training.overlays import draw_overlays
from modeling_restr.training.recipe import Recipe, create_optimizer, create_scheduler
from modeling_restr.training.runs import (
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
from modeling_restr.training.trainer import compute_metrics, count_pixels
from modeling_restr.visualization import save_image


PADDING = -100  # what count_pixels fills up with
PRECISIONS = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}
TRACKER_PROJECT = "referring-segmentation"


@dataclass
class LoopArguments(RecipeArguments):
    """How to train, in what TrainingArguments already has for Trainer."""

    mixed_precision: str | None = option(None, "no or bf16; by default what `accelerate launch` says.")
    gradient_checkpointing: bool = option(False, "Compute activations twice instead of keeping them.")
    torch_compile: bool = option(False, "Compile the model.")
    report_to: list[str] = field(
        default_factory=list, metadata={"help": "Where to log: tensorboard, trackio, or another of Accelerate's."}
    )


def create_accelerator(args: LoopArguments) -> Accelerator:
    """Devices and precision are what `accelerate launch` and its configuration file decided."""
    return Accelerator(
        cpu=True if not torch.accelerator.is_available() else None,  # else processes on CPUs do not find one another
        mixed_precision=args.mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=args.gradient_accumulation_steps),
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
        log_with=args.report_to or None,
        project_dir=args.output_dir,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=False)],
    )


def count_images_per_step(args: LoopArguments, accelerator: Accelerator) -> int:
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes


@dataclass
class Run:
    """What the steps of a run work on."""

    args: LoopArguments
    data_args: DataArguments
    recipe: Recipe
    accelerator: Accelerator
    processor: ReSTRProcessor
    model: Any
    optimizer: AcceleratedOptimizer
    scheduler: LambdaLR
    losses: LossMonitor = field(default_factory=LossMonitor)


def prepare_run(
    args: LoopArguments,
    data_args: DataArguments,
    recipe: Recipe,
    accelerator: Accelerator,
    model: ReSTRForImageSegmentation,
    processor: ReSTRProcessor,
) -> Run:
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if args.torch_compile:
        model.compile()
    optimizer = create_optimizer(model, recipe)
    scheduler = create_scheduler(optimizer, recipe)  # not prepared: Accelerate would step it once per process
    accelerator.register_for_checkpointing(scheduler)
    model, optimizer = accelerator.prepare(model.train(), optimizer)
    set_seed(recipe.seed, device_specific=True)  # drop path differs between the processes
    return Run(args, data_args, recipe, accelerator, processor, model, optimizer, scheduler)


def create_train_loader(run: Run, data: datasets.Dataset | datasets.IterableDataset, first_step: int) -> DataLoader:
    """This process's batches from a step on. An item depends on its place in the run alone."""
    dataset = create_train_dataset(
        data,
        run.data_args,
        run.recipe,
        batch_size=run.args.per_device_train_batch_size,
        first_step=first_step,
        process_index=run.accelerator.process_index,
        num_processes=run.accelerator.num_processes,
    )
    options = loader_options(run) | {"batch_size": run.args.per_device_train_batch_size}
    if not isinstance(dataset, ReferringDataset):
        return DataLoader(dataset, **options)  # a stream is this process's share already
    positions = range(first_step * run.recipe.images_per_step, len(dataset))
    return run.accelerator.prepare_data_loader(DataLoader(dataset, sampler=positions, **options))


def loader_options(run: Run) -> dict[str, Any]:
    vocab_size = run.accelerator.unwrap_model(run.model).config.text_config.vocab_size
    return {
        "collate_fn": ReferringCollator(run.processor, vocab_size),
        "num_workers": run.args.dataloader_num_workers,
        "pin_memory": run.accelerator.device.type != "cpu",
        "worker_init_fn": outlive_stop_signal(),
        "generator": torch.Generator(),  # else starting to read, which a resumed run does again, draws a random number
    }


def take_step(run: Run, batches: Sequence[dict[str, torch.Tensor]], step: int) -> torch.Tensor:
    """
    One optimizer step on the accumulated batches of this process. Its gradients are those of the mean over the step's
    pairs, of all batches and processes, as if they were one large batch; that mean is returned. Nothing here waits for
    the device.

    Args:
        step: This one, counted from 1.
    """
    accelerator, model = run.accelerator, run.model
    num_pairs = torch.full((), sum(len(batch["input_ids"]) for batch in batches), device=accelerator.device)
    num_pairs = accelerator.reduce(num_pairs, "sum")
    mean_loss = torch.zeros((), device=accelerator.device)
    for number, batch in enumerate(batches, start=1):
        inputs, ids = split_ids(send_to_device(batch, accelerator.device, non_blocking=True))
        with nullcontext() if number == len(batches) else accelerator.no_sync(model):
            loss = model(**inputs).loss
            run.losses.add(loss, step, ids)
            loss = loss * loss_weight(inputs, num_pairs, len(batches) * accelerator.num_processes)
            accelerator.backward(loss)  # divides by the number of accumulated batches
        mean_loss += loss.detach() / len(batches)
    if run.recipe.max_grad_norm > 0:
        accelerator.clip_grad_norm_(model.parameters(), run.recipe.max_grad_norm)
    run.optimizer.step()
    run.scheduler.step()
    run.optimizer.zero_grad()
    return accelerator.reduce(mean_loss, "mean")


class Validation:
    """The validation data: metrics, and a panel of some of its images with the masks that the model finds."""

    def __init__(self, run: Run, data: datasets.Dataset):
        self.run = run
        self.overlay_rows = list(data.take(min(run.data_args.num_overlays, len(data))))
        options = loader_options(run) | {"batch_size": run.args.per_device_eval_batch_size}
        self.loader = run.accelerator.prepare_data_loader(DataLoader(create_eval_dataset(data), **options))

    @torch.no_grad()
    def evaluate(self, step: int) -> None:
        """Evaluate the model as it is, and log it."""
        accelerator, model = self.run.accelerator, self.run.model.eval()
        metrics = self.compute_metrics()
        numbers = {f"eval/{name}": value for name, value in metrics.items() if isinstance(value, int | float)}
        accelerator.log(numbers, step=step)
        accelerator.print(f"Step {step}:", ", ".join(f"{name} {value:.4g}" for name, value in numbers.items()))
        if self.overlay_rows:
            panel = draw_overlays(model, self.run.processor, self.overlay_rows)
            if panel is not None and accelerator.is_main_process:
                save_image(panel, Path(self.run.args.output_dir) / "overlays" / f"step-{step:07d}.png")
                log_panel(accelerator, panel, step)
        model.train()

    def compute_metrics(self) -> dict[str, float]:
        """Over all expressions, at the size of the model's input."""
        accelerator, counts = self.run.accelerator, []
        for batch in self.loader:
            inputs, _ = split_ids(batch)
            batch_counts = count_pixels(self.run.model(**inputs).logits, inputs["labels"], inputs["image_indices"])
            batch_counts = accelerator.pad_across_processes(batch_counts, dim=1, pad_index=PADDING)
            counts.append(accelerator.gather_for_metrics(batch_counts).reshape(-1, 2).cpu())
        return compute_metrics(EvalPrediction(torch.cat(counts).numpy(), label_ids=np.empty(0)))


def log_panel(accelerator: Accelerator, panel: Image.Image, step: int) -> None:
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({"eval/overlays": np.asarray(panel)[None]}, step=step, dataformats="NHWC")
            tracker.writer.flush()  # so that a look meanwhile shows it
        elif tracker.name == "trackio":
            import trackio

            tracker.log({"eval/overlays": trackio.Image(panel)}, step=step)


def save_checkpoint(run: Run, step: int) -> None:
    """Write all that the run needs to resume, atomically."""
    accelerator = run.accelerator
    check_weights(run.model, step, run.optimizer, accelerator.gather)
    with write_checkpoint(
        run.args.output_dir,
        step,
        is_main_process=accelerator.is_main_process,
        wait_for_everyone=accelerator.wait_for_everyone,
    ) as folder:
        accelerator.save_state(str(folder))
        if accelerator.is_main_process:
            accelerator.unwrap_model(run.model).config.save_pretrained(folder)
            run.processor.save_pretrained(folder)
            run.recipe.save(folder)
    if accelerator.is_main_process:
        new = Path(run.args.output_dir) / folder.name
        keep_last_checkpoints(run.args.output_dir, run.args.save_total_limit, protected=[new])


def load_checkpoint(run: Run, checkpoint: Path) -> None:
    """
    Resume from a checkpoint.

    Raises:
        ValueError: its files are damaged, or it was renamed.
    """
    random_states = checkpoint / f"random_states_{run.accelerator.process_index}.pkl"
    try:
        run.accelerator.load_state(str(checkpoint))
        if random_states.exists():  # load_state passes over a damaged one
            torch.set_rng_state(load(random_states)["torch_manual_seed"])
    except Exception as error:  # each kind of file has its own
        raise ResumeError(checkpoint, error) from error
    if run.scheduler.last_epoch != get_step(checkpoint):
        raise ValueError(
            f"Expected a checkpoint of step {get_step(checkpoint)}, as its name says, got {checkpoint} of step"
            f" {run.scheduler.last_epoch}. Give the folder its name back."
        )


def is_stop_requested(run: Run, stop: StopSignal) -> bool:
    """Whether SIGTERM has reached any process."""
    received = torch.full((), int(stop.received), device=run.accelerator.device)
    return bool(run.accelerator.reduce(received, "sum"))


def log_step(run: Run, loss: torch.Tensor, step: int) -> None:
    rates = {f"train/learning_rate/{group['name']}": group["lr"] for group in run.optimizer.param_groups}
    run.accelerator.log({"train/loss": loss.item(), **rates}, step=step)


def run_steps(
    run: Run,
    train_data: datasets.Dataset | datasets.IterableDataset,
    validation: Validation | None,
    first_step: int,
) -> bool:
    """All steps from one on. Returns whether the run is finished: SIGTERM ends it before."""
    args, last_step, is_stopped = run.args, run.recipe.max_steps, False
    batches = iter(create_train_loader(run, train_data, first_step))
    progress = tqdm(total=last_step, initial=first_step, unit="step", disable=not run.accelerator.is_main_process)
    with progress, StopSignal() as stop:
        for step in range(first_step + 1, last_step + 1):
            loss = take_step(run, list(islice(batches, args.gradient_accumulation_steps)), step)
            progress.update()
            is_logged, is_saved = step % args.logging_steps == 0, step % args.save_steps == 0 or step == last_step
            if is_logged or is_saved:  # else nothing is read from the device
                run.losses.check(run.accelerator.gather)
                is_stopped = is_stop_requested(run, stop)
            if is_logged:
                progress.set_postfix(loss=f"{loss.item():.4f}")
                log_step(run, loss, step)
            if is_saved or is_stopped:
                save_checkpoint(run, step)
            if is_stopped:
                return step == last_step
            if validation is not None and step % args.eval_steps == 0:
                validation.evaluate(step)
    return True


def finish(run: Run, validation_data: datasets.Dataset | None) -> None:
    """Save the model, evaluate what was saved, write its card, upload it."""
    args = run.args
    finish_run(
        run.accelerator,
        run.model,
        run.processor,
        args.output_dir,
        run.recipe,
        run.data_args,
        validation_data,
        repo_id=choose_repo_id(args, args.push_to_hub),
        private=args.hub_private_repo,
        token=args.hub_token,
    )


def train(model_args: ModelArguments, data_args: DataArguments, args: LoopArguments) -> None:
    accelerator = create_accelerator(args)
    set_seed(args.seed)
    train_data, validation_data = load_data(data_args, accelerator.main_process_first())
    model, processor = load_model(model_args, train_data)
    if args.num_train_epochs > 0:
        images_per_step = count_images_per_step(args, accelerator)
        args.max_steps = count_steps(train_data, data_args, args.num_train_epochs, images_per_step)
    recipe = args.make_recipe(
        images_per_step=count_images_per_step(args, accelerator),
        precision=PRECISIONS[accelerator.mixed_precision],
        **describe_start(model, train_data, model_args, data_args, accelerator.is_main_process),
    )
    deviations = recipe.deviations() or "nothing"
    accelerator.print(f"{model.num_parameters() / 1e6:.1f} M parameters; other than in the paper: {deviations}")

    if accelerator.is_main_process:
        prepare_push(args, choose_repo_id(args, args.push_to_hub))
    checkpoint = find_checkpoint(
        args.output_dir,
        recipe,
        args.resume_from_checkpoint,
        by_trainer=False,
        is_main_process=accelerator.is_main_process,
    )
    run = prepare_run(args, data_args, recipe, accelerator, model, processor)
    if checkpoint is not None:
        load_checkpoint(run, checkpoint)
    validation = None if validation_data is None else Validation(run, validation_data)
    config = {name: value for name, value in asdict(recipe).items() if value is not None}
    names = {"trackio": {"name": Path(args.output_dir).resolve().name, "resume": "allow"}}
    accelerator.init_trackers(TRACKER_PROJECT, config, names)
    is_finished = run_steps(run, train_data, validation, 0 if checkpoint is None else get_step(checkpoint))
    if is_finished:
        finish(run, validation_data)
    accelerator.end_training()
    if not is_finished:
        print("Stopped by SIGTERM, with a checkpoint: the same command resumes from there.", file=sys.stderr)
        sys.exit(EXIT_CODE_TERMINATED)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = HfArgumentParser([ModelArguments, DataArguments, LoopArguments])  # type: ignore[list-item]
    try:
        train(*parser.parse_args_into_dataclasses(arguments))
    except (LossNotFiniteError, ValueError, OSError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from error


if __name__ == "__main__":
    main()
