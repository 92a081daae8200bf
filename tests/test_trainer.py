"""Parts of the trainer: learning rates of both groups, evaluation, pictures for trackers, checks of numbers."""

import io
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_training import make_dataset, make_model, make_processor
from training_runs import CountReads, LinearModel, read_events
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback

from modeling_restr.training.batches import ReferringCollator, ReferringDataset
from modeling_restr.training.checkpoints import LossNotFiniteError, list_checkpoints
from modeling_restr.training.recipe import Recipe
from modeling_restr.training.trainer import ReferringTrainer, use_one_device


@pytest.fixture
def trainer(tmp_path):
    processor = make_processor()
    args = TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        max_steps=100,
        learning_rate=1e-5,
        warmup_steps=0.1,
        lr_scheduler_type="polynomial",
        lr_scheduler_kwargs={"power": 0.9, "lr_end": 0.0},
        per_device_eval_batch_size=2,
        report_to="none",
        disable_tqdm=True,
    )
    return ReferringTrainer(
        make_model(processor),
        args,
        ReferringCollator(processor),
        eval_dataset=ReferringDataset(make_dataset(5), 3, shuffle=False),
        processor=processor,
        recipe=Recipe(max_steps=100),
        overlay_rows=make_dataset(2, num_expressions=lambda index: 4 - 3 * index),
    )


def test_label_smoothing_is_refused(tmp_path):
    processor = make_processor()
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match=r"Expected label_smoothing_factor=0.* got 0.1\. Leave it out\."):
        ReferringTrainer(make_model(processor), args, processor=processor, recipe=Recipe(max_steps=100))


def test_both_groups_follow_the_papers_schedule(trainer):
    trainer.create_optimizer_and_scheduler(100)
    for step in range(101):
        factor = step / 10 if step < 10 else ((100 - step) / 90) ** 0.9
        rates = {group["name"]: group["lr"] for group in trainer.optimizer.param_groups}
        assert rates == pytest.approx({"fusion and language": factor * 1e-5, "vision": factor * 1e-6})
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    options = [(group["weight_decay"], group["betas"]) for group in trainer.optimizer.param_groups]
    assert options == [(5e-4, (0.9, 0.999))] * 2


def test_evaluation_agrees_with_the_model(trainer):
    metrics = trainer.evaluate()
    intersections, unions = [], []
    for item in ReferringDataset(make_dataset(5), 4, shuffle=False):
        batch = ReferringCollator(trainer.processor)([item])
        logits = trainer.model.eval()(batch["pixel_values"], batch["input_ids"]).logits.detach().numpy()
        for predicted, target in zip(logits > 0, batch["labels"].numpy() > 0, strict=True):
            intersections.append((predicted & target).sum())
            unions.append((predicted | target).sum())
    assert metrics["eval_overall_iou"] == sum(intersections) / sum(unions)
    assert metrics["eval_mean_iou"] == pytest.approx(np.mean(np.divide(intersections, unions)))
    assert metrics["eval_num_expressions"] == len(unions) == 11


def test_panels_are_written_and_shown_by_tensorboard(trainer, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="needs `pip install tensorboard`")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tensorboard"))
    trainer.add_callback(TensorBoardCallback())
    state = torch.get_rng_state()
    metrics = trainer.evaluate()
    assert torch.equal(torch.get_rng_state(), state)
    events = read_events(tmp_path / "tensorboard")
    assert events.Scalars("eval/mean_iou")[0].value == pytest.approx(metrics["eval_mean_iou"])
    (shown,) = events.Images("eval/overlays")
    with Image.open(tmp_path / "overlays" / "step-0000000.png") as panel:
        np.testing.assert_array_equal(Image.open(io.BytesIO(shown.encoded_image_string)), panel)


def test_one_of_several_gpus_is_used(caplog):
    args = SimpleNamespace(n_gpu=2, _n_gpu=2)
    use_one_device(args)
    assert args._n_gpu == 1 and "torchrun" in caplog.text


def test_panels_are_sent_to_trackio(trainer, tmp_path, monkeypatch):
    sent = []
    trackio = SimpleNamespace(Image=np.asarray, log=lambda values, step: sent.append((values, step)))
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    trainer.args.report_to = ["trackio"]
    trainer.evaluate()
    ((values, step),) = sent
    with Image.open(tmp_path / "overlays" / "step-0000000.png") as panel:
        np.testing.assert_array_equal(values["eval/overlays"], panel)
    assert step == 0


@pytest.fixture
def make_stream_trainer(trainer):
    """A trainer with SGD and 8 steps of 8 images."""

    def make(model, **options):
        args = replace(trainer.args, optim="sgd", max_steps=8, max_grad_norm=1.0, **options)
        data = ReferringDataset(make_dataset(5), num_items=64)
        recipe = Recipe(max_steps=8)
        return ReferringTrainer(model, args, trainer.data_collator, data, processor=trainer.processor, recipe=recipe)

    return make


class ReadRecorder(TrainerCallback):
    """How many values were read during each step, and at its end."""

    def __init__(self, count):
        self.count, self.before, self.steps, self.ends = count, 0, [], []

    def on_step_begin(self, *args, **kwargs):
        self.before = self.count.number

    def on_optimizer_step(self, *args, **kwargs):
        self.steps.append(self.count.number - self.before)
        self.before = self.count.number

    def on_step_end(self, *args, **kwargs):
        self.ends.append(self.count.number - self.before)


def test_values_are_read_only_when_trainer_logs_and_saves(make_stream_trainer, tmp_path):
    trainer = make_stream_trainer(make_model(make_processor(), drop_path_rate=0.5), logging_steps=3, save_steps=4)
    with CountReads() as count:
        recorder = ReadRecorder(count)
        trainer.add_callback(recorder)
        trainer.train()
    assert recorder.steps == [0] * 8
    assert [number > 0 for number in recorder.ends] == [step in (3, 4, 6, 8) for step in range(1, 9)]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-8"]


def test_a_broken_loss_is_found_at_the_next_check_and_before_a_checkpoint(make_stream_trainer, tmp_path):
    model = LinearModel()
    torch.nn.init.constant_(model.head.bias, float("inf"))
    trainer = make_stream_trainer(model, logging_steps=100, save_steps=4)
    sent_ids = [sent_id for position in range(32) for sent_id in trainer.train_dataset[position]["sent_ids"]]
    with pytest.raises(LossNotFiniteError) as raised:
        trainer.train()
    assert "from step 1 to 4: image_ids [" in str(raised.value) and f"sent_ids {sent_ids}." in str(raised.value)
    assert list_checkpoints(tmp_path) == []


@pytest.mark.parametrize("save_strategy", ["steps", "no"])
def test_a_run_does_not_end_with_broken_weights(make_stream_trainer, tmp_path, save_strategy):
    class BreakWeights(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step == 7:  # the last step: no loss is computed with these weights
                torch.nn.init.constant_(model.head.bias, float("nan"))

    trainer = make_stream_trainer(LinearModel(), save_strategy=save_strategy, save_steps=100)
    trainer.add_callback(BreakWeights())
    with pytest.raises(LossNotFiniteError, match=r"after step 8.*head\.bias"):
        trainer.train()
    assert list_checkpoints(tmp_path) == []
