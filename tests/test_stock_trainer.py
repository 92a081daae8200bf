"""transformers' own Trainer: correct with one sentence per image, refused in evaluation with several."""

import pytest
import torch
from tiny_training import make_dataset, make_model, make_processor
from torch.utils.data import IterableDataset
from training_runs import read_log, run_code
from transformers import Trainer, TrainingArguments

from modeling_restr.training.batches import ReferringCollator, ReferringDataset, split_ids


class Collator:
    """A user's own collator."""

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, items):
        return self.processor(
            images=[item["image"] for item in items],
            text=[item["texts"] for item in items],
            segmentation_maps=[mask for item in items for mask in item["masks"]],
            return_tensors="pt",
        )


class Stream(IterableDataset):
    def __init__(self, dataset):
        self.dataset = dataset

    def __iter__(self):
        return iter([self.dataset[position] for position in range(len(self.dataset))])


def make_trainer(folder, data, collator, seen, **options):
    """A Trainer that appends the numbers of predictions and labels for its metrics to `seen`."""
    processor = make_processor()

    def compute_metrics(prediction):
        seen.append((len(prediction.predictions), len(prediction.label_ids)))
        return {}

    args = TrainingArguments(
        str(folder),
        per_device_eval_batch_size=2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        **options,
    )
    return Trainer(
        make_model(processor),
        args,
        collator(processor),
        train_dataset=data if args.max_steps > 0 else None,
        eval_dataset=data,
        compute_metrics=compute_metrics,
    )


@pytest.mark.parametrize("collator", [Collator, ReferringCollator])
@pytest.mark.parametrize("is_stream", [False, True])
def test_metrics_see_every_item_of_one_sentence(tmp_path, collator, is_stream):
    data = ReferringDataset(make_dataset(5), 1, shuffle=False)
    seen = []
    metrics = make_trainer(tmp_path, Stream(data) if is_stream else data, collator, seen).evaluate()
    assert seen == [(11, 11)] and metrics["eval_loss"] > 0


@pytest.mark.parametrize("collator", [Collator, ReferringCollator])
@pytest.mark.parametrize("ask", [Trainer.evaluate, lambda trainer: trainer.predict(trainer.eval_dataset)])
def test_evaluation_of_several_sentences_per_image_is_refused(tmp_path, collator, ask):
    data = ReferringDataset(make_dataset(5), 4, shuffle=False)
    with pytest.raises(ValueError, match=r"\d sentences about \d images.* Evaluate with .*\.ReferringTrainer"):
        ask(make_trainer(tmp_path, data, collator, []))


def test_shared_images_are_refused_in_evaluation(tmp_path):
    data = ReferringDataset(make_dataset(5), 1, shuffle=False)
    with pytest.raises(ValueError, match=r"2 sentences about 1 images.*ReferringTrainer"):
        make_trainer(tmp_path, data, lambda processor: ReferringCollator(processor, share_images=True), []).evaluate()


def test_shares_of_data_parallel_are_refused():
    """With several GPUs in one process, Trainer uses it and passes the number of items as a (1, 1) tensor."""
    model, data = make_model(make_processor()), ReferringDataset(make_dataset(5), 1, shuffle=False)
    batch, _ = split_ids(ReferringCollator(make_processor())([data[0], data[1]]))
    number = torch.tensor([[2]])
    with pytest.raises(ValueError, match=r"DataParallel.*torchrun.*ReferringTrainer"):
        model(**batch, num_items_in_batch=number)
    batch.pop("image_indices")
    assert model(**batch, num_items_in_batch=number).loss.shape == (1, 1)


@pytest.mark.parametrize(("expressions_per_image", "codes"), [(1, [0, 0]), (4, [1, 1])])
def test_two_processes_behave_like_one(tmp_path, expressions_per_image, codes):
    code = f"""
import sys
sys.path.insert(0, {str(__file__.rpartition("/")[0])!r})
from test_stock_trainer import *

seen = []
data = ReferringDataset(make_dataset(5), {expressions_per_image}, shuffle=False)
make_trainer({str(tmp_path)!r}, data, Collator, seen).evaluate()
assert seen == [(11, 11)]
"""
    assert run_code(code, tmp_path, 2) == codes, read_log(tmp_path)
    if codes == [1, 1]:
        assert all("ReferringTrainer" in read_log(tmp_path, rank) for rank in (0, 1))


@pytest.mark.parametrize("collator", [Collator, ReferringCollator])
def test_a_training_step_follows_the_mean_over_its_sentences(tmp_path, collator):
    """Batches have unequal numbers of sentences."""
    data = ReferringDataset(make_dataset(5), 4, shuffle=False)
    options = {"max_steps": 1, "learning_rate": 1.0, "optim": "sgd", "max_grad_norm": 0.0, "save_strategy": "no"}
    options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "lr_scheduler_type": "constant"}
    trainer = make_trainer(tmp_path, data, collator, [], train_sampling_strategy="sequential", **options)
    trainer.train()
    model = make_model(make_processor())
    batch, _ = split_ids(ReferringCollator(make_processor())([data[position] for position in range(4)]))
    model(**batch).loss.backward()
    for (name, trained), start in zip(trainer.model.named_parameters(), model.parameters(), strict=True):
        moved = (start - trained).detach()
        torch.testing.assert_close(
            moved, start.grad, rtol=0, atol=1e-6 + 1e-4 * float(start.grad.abs().max()), msg=name
        )
