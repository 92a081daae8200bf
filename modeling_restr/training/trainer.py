"""transformers' Trainer for referring expressions: the paper's optimizer, atomic checkpoints, equally weighted pairs."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..hub.model_card import write_training_card
from .batches import ReferringDataset, ReferringStream, create_loader, loss_weight, split_ids
from .checkpoints import (
    LossMonitor,
    ResumeError,
    StopSignal,
    check_weights,
    ignore_sigterm_in_workers,
    keep_last_checkpoints,
    write_checkpoint,
)
from .recipe import Recipe, create_parameter_groups
from .validation import PADDING, compute_metrics, count_pixels, show_panel


logger = logging.getLogger(__name__)


def use_one_device(args: TrainingArguments) -> None:
    """
    Use one device per process, even if several GPUs are visible. Trainer would otherwise wrap the model in
    `DataParallel`, which cannot split a batch by `image_indices`. `torchrun` uses all GPUs.
    """
    if args.n_gpu > 1:
        logger.warning(f"Using one of {args.n_gpu} GPUs. Start with torchrun or accelerate launch to use all.")
        args._n_gpu = 1


class ReferringTrainer(Trainer):
    """
    transformers' Trainer with additions for referring image segmentation:

    - Two learning rates, and weight decay on every parameter.
    - The loss of a step is the mean over its (image, expression) pairs, however they are spread over accumulated
      batches and processes.
    - Atomic checkpoints without NaN. A loss or weight that is NaN or infinite stops the run. SIGTERM saves and stops it,
      and sets `stopped`. Both are checked when Trainer logs and before every checkpoint, so that no step waits for the
      device.
    - Evaluation per expression at the model's input size, which leaves the random state as it was.

    Args:
        processor ([`ReSTRProcessor`]): The model's processor. It is saved with each checkpoint.
        recipe ([`Recipe`]): The run's recipe. It is saved with each checkpoint.
        overlay_rows: Rows of the validation data to draw after each evaluation.
        (all others): See `transformers.Trainer`. The training data is a [`ReferringDataset`] or [`ReferringStream`].

    Raises:
        ValueError: The arguments have a `label_smoothing_factor`, which would have no effect.
    """

    model: Any

    def __init__(
        self, *args: Any, processor: Any, recipe: Recipe, overlay_rows: Iterable[Mapping[str, Any]] = (), **kwargs: Any
    ):
        kwargs.setdefault("compute_metrics", lambda prediction: compute_metrics(prediction.predictions))
        super().__init__(*args, **kwargs)
        if self.args.label_smoothing_factor:
            raise ValueError(
                "Expected label_smoothing_factor=0, because labels are masks and not classes, got"
                f" {self.args.label_smoothing_factor}. Leave it out."
            )
        self.model_accepts_loss_kwargs = False  # `compute_loss` weights the batches of a step
        self.args.remove_unused_columns = False  # the collator takes images and sentences
        self.args.train_sampling_strategy = "sequential"  # the dataset has its own order
        self.args.logging_nan_inf_filter = False  # it would hide NaN, and wait for the device in every step
        self.processor = processor
        self.recipe = recipe
        self.overlay_rows = list(overlay_rows)
        self.stopped = False
        self.has_begun = False  # the first step of `train`
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
            return ignore_sigterm_in_workers(super().get_train_dataloader())
        return create_loader(  # Trainer's own would shard the stream again
            self.train_dataset,
            self.args.train_batch_size,
            self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            prefetch_factor=self.args.dataloader_prefetch_factor,
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        return ignore_sigterm_in_workers(super().get_eval_dataloader(eval_dataset))

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor]:
        """The accumulated batches of a step, and the number of its pairs over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        num_pairs = torch.full((), sum(len(batch["input_ids"]) for batch in batches), device=device)
        batches = send_to_device(batches, device, non_blocking=True)  # for streams; Accelerate has sent the others
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
        return 0  # transformers' estimate counts every pixel as a token

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """
        See `transformers.Trainer.train`.

        Raises:
            LossNotFiniteError: A loss or weight became NaN or infinite.
            ResumeError: The checkpoint cannot be loaded.
        """
        self.has_begun = False
        with self._stop_signal:
            try:
                output = super().train(resume_from_checkpoint, *args, **kwargs)
            except Exception as error:  # each kind of file raises different errors
                if resume_from_checkpoint and not self.has_begun:
                    raise ResumeError(str(resume_from_checkpoint), error) from error
                raise
            self._check_numbers()
            self.stopped = self._stop_signal.is_requested()
        return output

    def _check_numbers(self) -> None:
        self._losses.check()
        check_weights(self.model, self.state.global_step, self.optimizer)

    def create_model_card(  # type: ignore[override]
        self,
        *,
        license: str | None = None,
        tags: str | list[str] | None = None,
        finetuned_from: str | None = None,
        dataset_tags: str | list[str] | None = None,
        **unused: Any,
    ) -> None:
        """
        Write ReSTR's card with the recipe to the output folder. It has no results, because they come from an evaluation
        of the saved weights ([`~modeling_restr.hub.write_model_card`]). A card that a user wrote or edited stays: the
        folder's, or else the repository's.

        Args:
            license, tags, finetuned_from, dataset_tags: See `transformers.Trainer.create_model_card`.
            unused: Its other options. They concern results, or facts that the card already has.

        Raises:
            ValueError: The card that stays describes other weights.
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
        """See `transformers.Trainer.push_to_hub`. The processor is also pushed."""
        if self.args.should_save:
            self.processor.save_pretrained(self.output_dir)
        return super().push_to_hub(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with torch.random.fork_rng(devices=[]):  # so that an evaluation does not change the course of training
            metrics = super().evaluate(*args, **kwargs)
            if self.overlay_rows:
                writers = [getattr(callback, "tb_writer", None) for callback in self.callback_handler.callbacks]
                show_panel(
                    self.model,
                    self.processor,
                    self.overlay_rows,
                    self.output_dir,
                    self.state.global_step,
                    tensorboard_writers=filter(None, writers),
                    with_trackio="trackio" in (self.args.report_to or ()),
                )
        return metrics

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """The loss, and pixel counts instead of masks, which would be expensive to gather."""
        inputs, _ = split_ids(self._prepare_inputs(inputs))
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs)
        counts = count_pixels(outputs.logits, inputs["labels"], inputs["image_indices"])
        return outputs.loss, None if prediction_loss_only else counts, (counts[..., 0] != PADDING).long()

    def _get_output_dir(self, trial: Any) -> str:
        return self._run_dir or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Trainer's checkpoint with processor and recipe, written to another folder and moved when it is complete."""
        output_dir, step = self.output_dir, self.state.global_step
        self._check_numbers()
        with write_checkpoint(output_dir, step) as folder:
            if self.is_fsdp_enabled:
                type(self.model)._auto_class = None  # of FSDP's class: save_pretrained would copy PyTorch's code
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


class _StepCallback(TrainerCallback):
    """Counts the data's epochs, because Trainer's own epoch is the whole run, and stops the run after SIGTERM."""

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
            state.epoch = state.global_step / state.max_steps  # the length of a stream is unknown
        if not (control.should_log or control.should_save):
            return
        self.trainer._losses.check()
        if self.trainer._stop_signal.is_requested():
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False  # there may not be time for it
