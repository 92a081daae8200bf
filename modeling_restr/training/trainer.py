"""transformers' Trainer for referring expressions: the paper's optimizer, whole checkpoints, pairs that count alike."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from torch import nn
from torch.utils.data import DataLoader
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..hub.model_card import write_training_card
from ..metrics import ReferringIoU
from ..visualization import save_image
from .batches import ReferringDataset, ReferringStream, loss_weight, split_ids
from .checkpoints import (
    LossMonitor,
    ResumeError,
    StopSignal,
    check_weights,
    keep_last_checkpoints,
    outlive_stop_signal,
    write_checkpoint,
)
from .overlays import draw_overlays
from .recipe import Recipe, create_parameter_groups


logger = logging.getLogger(__name__)

_PADDING = -100  # what Trainer fills up with when batches have different sizes


def use_one_device(args: TrainingArguments) -> None:
    """
    One device per process, also where several GPUs are seen: Trainer would spread a batch over them with `DataParallel`,
    which splits images and sentences alike and knows nothing of `image_indices`. `torchrun` uses all of them.
    """
    if args.n_gpu > 1:
        logger.warning(f"One of {args.n_gpu} GPUs is used: start with torchrun or accelerate launch to use all.")
        args._n_gpu = 1


class ReferringTrainer(Trainer):
    """
    Trainer with what this task needs, and what it otherwise gets wrong:

    - two learning rates, and weight decay on every parameter;
    - a step's gradients are those of the mean over its (image, expression) pairs, however they are spread over
      accumulated batches and processes;
    - checkpoints are atomic and hold no NaN: a loss or a weight that is NaN or infinite stops the run; SIGTERM saves
      and stops it (`stopped` is then true). Both are looked at when Trainer logs and before every checkpoint, so that
      no step waits for the device;
    - evaluation is per expression, at the size of the model's input, and leaves the random state as it was.

    Args:
        processor ([`ReSTRProcessor`]): The model's; it is saved with each checkpoint.
        recipe ([`Recipe`]): The run's; it is saved with each checkpoint.
        overlay_rows: Rows of the validation data, drawn after each evaluation.
        (all others): See `transformers.Trainer`; the training data is a [`ReferringDataset`] or [`ReferringStream`].
    """

    model: Any

    def __init__(
        self, *args: Any, processor: Any, recipe: Recipe, overlay_rows: Iterable[Mapping[str, Any]] = (), **kwargs: Any
    ):
        kwargs.setdefault("compute_metrics", compute_metrics)
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # `compute_loss` weights the batches of a step itself
        self.args.remove_unused_columns = False  # the collator takes images and sentences
        self.args.train_sampling_strategy = "sequential"  # the order is the dataset's own
        self.args.logging_nan_inf_filter = False  # it would hide them, and wait for the device in every step
        self.processor = processor
        self.recipe = recipe
        self.overlay_rows = list(overlay_rows)
        self.stopped = False
        self.has_begun = False  # a step of `train`
        self._run_dir: str | None = None
        self._losses = LossMonitor()
        self._stop_signal = StopSignal()
        self.add_callback(_StepCallback(self))

    @property
    def output_dir(self) -> Path:
        return Path(str(self.args.output_dir))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            recipe = self.recipe
            groups = create_parameter_groups(
                self.model if model is None else model,
                recipe.learning_rate,
                recipe.vision_learning_rate_ratio,
                recipe.weight_decay,
            )
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def get_train_dataloader(self) -> DataLoader:
        if not isinstance(self.train_dataset, ReferringStream):
            return _outlive_stop_signal(super().get_train_dataloader())
        return DataLoader(  # Trainer's own would shard it once more
            self.train_dataset,
            batch_size=self.args.train_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            worker_init_fn=outlive_stop_signal(),
            generator=torch.Generator(),  # else starting it, which a resumed run does once more, draws a number
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        return _outlive_stop_signal(super().get_eval_dataloader(eval_dataset))

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor]:
        """The accumulated batches of a step, and the number of pairs in it over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        num_pairs = torch.full((), sum(len(batch["input_ids"]) for batch in batches), device=device)
        batches = send_to_device(batches, device, non_blocking=True)  # those of a stream; Accelerate sent the others
        return batches, self.accelerator.reduce(num_pairs, "sum")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        inputs, ids = split_ids(inputs)
        outputs = model(**inputs)
        loss = outputs.loss
        if model.training:
            self._losses.add(loss, self.state.global_step + 1, ids)
        if num_items_in_batch is not None:
            num_batches = self.current_gradient_accumulation_steps * self.accelerator.num_processes
            loss = loss * loss_weight(inputs, num_items_in_batch, num_batches)
        return (loss, outputs) if return_outputs else loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # transformers' estimate takes every pixel for a token

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        As in transformers.

        Raises:
            ResumeError: the checkpoint cannot be loaded.
        """
        self.has_begun = False
        with self._stop_signal:
            try:
                output = super().train(resume_from_checkpoint, *args, **kwargs)
            except Exception as error:
                if resume_from_checkpoint and not self.has_begun:  # each kind of file has its own
                    raise ResumeError(str(resume_from_checkpoint), error) from error
                raise
            self._check_numbers()
            self.stopped = self.is_stop_requested()
        return output

    def check_losses(self) -> None:
        """
        Raises:
            LossNotFiniteError: in every process, after a loss that was NaN or infinite in any of them.
        """
        self._losses.check(self.accelerator.gather)

    def _check_numbers(self) -> None:
        self.check_losses()
        check_weights(self.model, self.state.global_step, self.optimizer, self.accelerator.gather)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """
        Write ReSTR's card to the output folder: the recipe, and no results, which come from an evaluation of saved
        weights alone ([`~modeling_restr.hub.write_model_card`]). A card that somebody wrote or edited stays: that of
        the folder, or else that of the repository.

        Args:
            license, tags, finetuned_from, dataset_tags: see `transformers.Trainer.create_model_card`.
            (all others): are not used; the card says them itself, or they are about results.

        Raises:
            ValueError: the card that stays tells of other weights.
        """
        if self.is_world_process_zero():
            write_training_card(
                self.output_dir,
                {"steps": self.state.global_step, **self.recipe.describe()},
                repo_id=self.hub_model_id,
                revision=self.args.hub_revision,
                token=self.args.hub_token,
                tags=tags,
                license=license,
                base_model=finetuned_from or self.recipe.base_model,
                datasets=dataset_tags,
            )

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, with the processor. A run of the scripts pushes its evaluated model instead."""
        if self.args.should_save:
            self.processor.save_pretrained(self.output_dir)
        return super().push_to_hub(*args, **kwargs)

    def is_stop_requested(self) -> bool:
        """Whether SIGTERM has reached any process."""
        received = torch.full((), int(self._stop_signal.received), device=self.args.device)
        return bool(self.accelerator.reduce(received, "sum"))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with torch.random.fork_rng(devices=[]):  # so that training takes the same course without it
            metrics = super().evaluate(*args, **kwargs)
            if self.overlay_rows:
                self._show_overlays()
        return metrics

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """The loss, and the pixel counts of each image's expressions: no masks are gathered, neither of the labels."""
        inputs, _ = split_ids(self._prepare_inputs(inputs))
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs)
        counts = count_pixels(outputs.logits, inputs["labels"], inputs["image_indices"])
        return outputs.loss, None if prediction_loss_only else counts, (counts[..., 0] != _PADDING).long()

    def _show_overlays(self) -> None:
        panel = draw_overlays(self.model, self.processor, self.overlay_rows)
        if panel is None or not self.is_world_process_zero():
            return
        step = self.state.global_step
        save_image(panel, self.output_dir / "overlays" / f"step-{step:07d}.png")
        for callback in self.callback_handler.callbacks:
            if getattr(callback, "tb_writer", None) is not None:
                callback.tb_writer.add_image("eval/overlays", np.asarray(panel), step, dataformats="HWC")
                callback.tb_writer.flush()  # as Trainer does after its metrics, so that a look meanwhile shows both
        if "trackio" in (self.args.report_to or ()):
            import trackio

            trackio.log({"eval/overlays": trackio.Image(panel)}, step=step)

    def _get_output_dir(self, trial: Any) -> str:
        return self._run_dir or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Trainer's checkpoint, with processor and recipe, written elsewhere and moved as a whole."""
        output_dir, step = self.output_dir, self.state.global_step
        self._check_numbers()
        with write_checkpoint(
            output_dir,
            step,
            is_main_process=self.is_world_process_zero(),
            wait_for_everyone=self.accelerator.wait_for_everyone,
        ) as folder:
            if self.is_fsdp_enabled:
                type(self.model)._auto_class = None  # one that FSDP made: its code is PyTorch's, not to be saved
            self._run_dir = str(folder.parent)
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._run_dir = None
            if self.state.best_global_step == step:
                self.state.best_model_checkpoint = str(output_dir / folder.name)
            if self.is_world_process_zero():
                self.state.save_to_json(str(folder / "trainer_state.json"))
                self.processor.save_pretrained(folder)
                self.recipe.save(folder)
        if self.is_world_process_zero():
            kept = [output_dir / folder.name, self.state.best_model_checkpoint]
            keep_last_checkpoints(output_dir, self.args.save_total_limit, [path for path in kept if path])


def _outlive_stop_signal(loader: DataLoader) -> DataLoader:
    inner = getattr(loader, "base_dataloader", loader)  # Accelerate's has one in it
    inner.worker_init_fn = outlive_stop_signal(inner.worker_init_fn)
    return loader


class _StepCallback(TrainerCallback):
    """Counts epochs of the data, for Trainer's own epoch is the whole run, and stops the run on SIGTERM."""

    def __init__(self, trainer: ReferringTrainer):
        self.trainer = trainer

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.has_begun = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        dataset = self.trainer.train_dataset
        if isinstance(dataset, ReferringDataset):
            state.epoch = state.global_step * self.trainer.recipe.images_per_step / dataset.items_per_epoch
        else:
            state.epoch = state.global_step / state.max_steps  # a stream's length is not known
        if not (control.should_log or control.should_save):
            return
        self.trainer.check_losses()
        if self.trainer.is_stop_requested():
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # there may not be time for it


def count_pixels(
    logits: torch.Tensor, labels: torch.Tensor, image_indices: torch.Tensor | None = None
) -> torch.Tensor:
    """
    Pixels of the intersection and of the union of predicted (logit > 0) and true masks.

    Args:
        logits: (N, h, w), resized where they are coarser than the labels.
        labels: (N, height, width) of 0 and 1.
        image_indices: (N,) in ascending order, for one row per image.

    Returns:
        (N, 2), or with `image_indices` (images, largest number of expressions, 2), filled up with -100: tools that
        gather results count the items of the data, which are expressions or images.
    """
    if logits.shape != labels.shape:
        logits = F.interpolate(logits[:, None].float(), labels.shape[1:], mode="bilinear", align_corners=False)[:, 0]
    predicted, target = logits > 0, labels > 0
    counts = torch.stack([(predicted & target).sum((1, 2)), (predicted | target).sum((1, 2))], dim=1)  # (N, 2)
    if image_indices is None:
        return counts
    numbers = torch.bincount(image_indices)
    places = torch.arange(len(counts), device=counts.device) - (numbers.cumsum(0) - numbers)[image_indices]
    result = counts.new_full((len(numbers), int(numbers.max()), 2), _PADDING)
    result[image_indices, places] = counts
    return result


def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """The metrics of [`ReferringIoU`] over all expressions, from the counts of [`count_pixels`]."""
    counts = np.asarray(prediction.predictions).reshape(-1, 2)
    counts = counts[counts[:, 0] != _PADDING]
    predictions = [{"intersection": int(i), "union": int(u)} for i, u in counts]
    return ReferringIoU(keep_in_memory=True).compute(predictions=predictions)


__all__ = ["ReferringTrainer", "compute_metrics", "count_pixels", "use_one_device"]
