"""The stream of items: content of an epoch, dependence on the seed alone, batches, and gradients that add up."""

import pickle
import random
from collections import Counter

import numpy as np
import pytest
import torch
from numerics import algebra, assert_same_gradients, gradients
from tiny_training import make_dataset, make_model, make_processor
from torch.utils.data import DataLoader

from modeling_restr.data.canonical import decode_mask
from modeling_restr.training.augmentation import Augmentation
from modeling_restr.training.batches import (
    ReferringCollator,
    ReferringDataset,
    ReferringStream,
    count_expressions,
    create_loader,
    loss_weight,
    split_ids,
)


@pytest.fixture(scope="module")
def dataset():
    return make_dataset(10, num_expressions=lambda index: (0, 1, 2, 7, 3)[index % 5])


@pytest.fixture(scope="module")
def masks(dataset):
    """sent_id -> (image_id, text, mask), read from the rows."""
    return {
        expression["sent_id"]: (row["image_id"], expression["text"], decode_mask(reference["mask"]))
        for row in dataset
        for reference in row["references"]
        for expression in reference["expressions"]
    }


def ids(items):
    return [(item["image_id"], tuple(item["sent_ids"])) for item in items]


def read_stream(dataset, num_workers=0, **kwargs):
    """Batches of ids that a DataLoader reads from a stream."""
    stream = ReferringStream(dataset, **kwargs)
    return list(DataLoader(stream, batch_size=kwargs["batch_size"], collate_fn=ids, num_workers=num_workers))


def test_counts_of_expressions(dataset):
    assert count_expressions(dataset).tolist() == [0, 1, 2, 7, 3] * 2


@pytest.mark.parametrize("expressions_per_image", [1, 3, 100])
@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_has_every_expression_once(dataset, masks, expressions_per_image, shuffle):
    stream = ReferringDataset(dataset, expressions_per_image, shuffle=shuffle)
    items = [stream[position] for position in range(len(stream))]
    assert Counter(sent_id for item in items for sent_id in item["sent_ids"]) == Counter(list(masks))
    counts = [-(-count // expressions_per_image) for count in (0, 1, 2, 7, 3)]
    assert len(items) == 2 * sum(counts)
    for item in items:
        assert 1 <= len(item["sent_ids"]) <= expressions_per_image
        for sent_id, text, mask in zip(item["sent_ids"], item["texts"], item["masks"], strict=True):
            assert (item["image_id"], text) == masks[sent_id][:2]
            np.testing.assert_array_equal(mask, masks[sent_id][2])
    in_order = ids(items) == sorted(ids(items))
    assert in_order == (not shuffle)


def test_an_item_depends_on_the_seed_and_its_position_alone(dataset):
    stream = ReferringDataset(dataset, 2, seed=5, num_items=60)
    expected = ids(stream[position] for position in range(60))
    copy = pickle.loads(pickle.dumps(ReferringDataset(dataset, 2, seed=5, num_items=60)))
    for position in np.random.default_rng(0).permutation(60):
        torch.manual_seed(position)
        np.random.seed(position)
        random.seed(int(position))
        assert ids([copy[int(position)]]) == [expected[position]]
    assert expected != ids(ReferringDataset(dataset, 2, seed=6, num_items=60))
    epochs = [expected[start : start + stream.items_per_epoch] for start in (0, stream.items_per_epoch)]
    assert epochs[0] != epochs[1]
    assert {item for item in epochs[0] if item[0] == 3} != {
        item for item in epochs[1] if item[0] == 3
    }  # in other batches


def test_batches_do_not_depend_on_the_number_of_workers(dataset):
    collator, augmentation = ReferringCollator(make_processor()), Augmentation(scale=0.5, color=0.5, mirror=0.5)
    items = ReferringDataset(dataset, 2, augmentation=augmentation, num_items=40)  # epochs have 16
    expected = list(create_loader(items, 3, collator))
    for num_workers in (1, 2, 3):
        batches = list(create_loader(items, 3, collator, num_workers=num_workers))
        resumed = list(create_loader(items, 3, collator, num_workers=num_workers, sampler=range(15, 40)))
        for batch, wanted in zip(batches + resumed, expected + expected[5:], strict=True):
            assert batch.keys() == wanted.keys()
            assert all(np.array_equal(batch[name], wanted[name]) for name in wanted)


def test_augmentation_differs_between_epochs_and_is_reproducible(dataset):
    def note(image, masks, texts, rng):
        return image, masks, [f"{rng.random()} {text}" for text in texts]

    stream = ReferringDataset(dataset, 2, augmentation=note, num_items=40)
    texts = [tuple(item["texts"]) for item in stream]
    assert texts == [tuple(item["texts"]) for item in ReferringDataset(dataset, 2, augmentation=note, num_items=40)]
    numbers = [text.split()[0] for item in texts for text in item]
    assert len(set(numbers)) == len(numbers)


def test_a_batch_agrees_with_the_processor(dataset):
    processor = make_processor()
    items = [ReferringDataset(dataset, 3)[position] for position in range(4)]
    inputs, item_ids = split_ids(ReferringCollator(processor)(items))
    assert item_ids["image_ids"] == [item["image_id"] for item in items]
    assert item_ids["sent_ids"] == [sent_id for item in items for sent_id in item["sent_ids"]]
    assert inputs.keys() == {"pixel_values", "input_ids", "attention_mask", "image_indices", "labels"}
    number = 0
    for index, item in enumerate(items):
        for text, mask in zip(item["texts"], item["masks"]):
            one = processor(images=item["image"], text=text, segmentation_maps=mask, return_tensors="pt")
            assert inputs["image_indices"][number] == index
            torch.testing.assert_close(inputs["pixel_values"][index], one["pixel_values"][0])
            torch.testing.assert_close(inputs["input_ids"][number], one["input_ids"][0])
            torch.testing.assert_close(inputs["labels"][number], one["labels"][0])
            number += 1
    assert number == len(inputs["input_ids"])


def test_neighbours_share_their_image_and_expressions_keep_their_order(dataset):
    processor, stream = make_processor(), ReferringDataset(dataset, 1, shuffle=False)
    items = [stream[position] for position in (0, 1, 2, 5, 3, 4, 1)]
    assert [item["image_id"] for item in items] == [1, 2, 2, 3, 3, 3, 2]
    apart, ids_apart = split_ids(ReferringCollator(processor)(items))
    shared, ids_shared = split_ids(ReferringCollator(processor, share_images=True)(items))
    assert ids_shared == {"image_ids": [1, 2, 3, 2], "sent_ids": ids_apart["sent_ids"]}
    assert shared["image_indices"].tolist() == [0, 1, 1, 2, 2, 2, 3]
    for name in ("input_ids", "attention_mask", "labels"):
        torch.testing.assert_close(shared[name], apart[name], rtol=0, atol=0)
    torch.testing.assert_close(shared["pixel_values"][shared["image_indices"]], apart["pixel_values"], rtol=0, atol=0)
    items[1]["image"] = items[1]["image"].convert("L").convert("RGB")  # as after augmentation
    assert len(ReferringCollator(processor, share_images=True)(items)["pixel_values"]) == 5


def test_values_that_the_model_does_not_accept_are_refused_with_their_sent_ids(dataset):
    processor = make_processor()
    items = [ReferringDataset(dataset, 2, shuffle=False)[position] for position in range(2)]
    vocab_size = len(processor.tokenizer)
    sent_ids = ReferringCollator(processor, vocab_size)(items)["sent_ids"]
    with pytest.raises(
        ValueError, match=rf"below the model's vocab_size 5, got others in the sent_ids \[{sent_ids[0]}"
    ):
        ReferringCollator(processor, 5)(items)
    for name, value, expected in (
        ("attention_mask", 0, "one word"),
        ("labels", 255, "0 and 1"),
        ("input_ids", -1, "ids"),
    ):

        def spoil(name=name, value=value, **kwargs):
            inputs = processor(**kwargs)
            inputs[name][1] = value
            return inputs

        with pytest.raises(ValueError, match=rf"{expected}.*sent_ids \[{sent_ids[1]}\]"):
            ReferringCollator(spoil, vocab_size)(items)


@algebra
def test_weighted_gradients_of_small_batches_are_those_of_the_large_one(dataset):
    processor = make_processor()
    model, collate = make_model(processor), ReferringCollator(processor)
    items = [ReferringDataset(dataset, 4)[position] for position in range(6)]
    assert len({len(item["texts"]) for item in items}) > 1  # otherwise all weights are 1

    def add_up(*batches):
        num_pairs = sum(len(batch["input_ids"]) for batch in batches)
        for batch in batches:
            inputs, _ = split_ids(batch)
            (model(**inputs).loss * loss_weight(batch, num_pairs, len(batches)) / len(batches)).backward()
        return gradients(model)

    large = add_up(collate(items))
    small = add_up(collate(items[:1]), collate(items[1:3]), collate(items[3:]))
    assert_same_gradients(small, large)


@pytest.mark.parametrize("num_processes", [1, 2, 3])  # 4 files cannot be shared evenly by 3 processes
@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_processes_of_a_stream_share_an_epoch(num_processes, num_workers):
    iterable = make_dataset(12).to_iterable_dataset(num_shards=4)
    options = {"expressions_per_image": 4, "batch_size": 1, "num_batches": 12 // num_processes, "buffer_size": 3}
    options["num_processes"] = num_processes
    batches = [
        batch
        for process_index in range(num_processes)
        for batch in read_stream(iterable, num_workers, process_index=process_index, **options)
    ]
    assert sorted(image_id for ((image_id, _),) in batches) == list(range(12))


@pytest.mark.parametrize("num_workers", [0, 1, 2, 3])
def test_a_stream_resumes_exactly(dataset, num_workers):
    iterable = dataset.to_iterable_dataset(num_shards=4)
    options = {"expressions_per_image": 2, "batch_size": 2, "num_batches": 17, "buffer_size": 5, "seed": 3}
    whole = read_stream(iterable, num_workers, **options)
    assert len(whole) == 17 and all(len(batch) == 2 for batch in whole)  # more than an epoch of 16 items
    if num_workers == 1:
        assert whole == read_stream(iterable, 0, **options)
    for first_batch in (1, 6, 16, 17):
        assert read_stream(iterable, num_workers, first_batch=first_batch, **options) == whole[first_batch:]


def test_the_order_of_a_stream_depends_on_epoch_and_seed(dataset):
    iterable = dataset.to_iterable_dataset(num_shards=2)
    options = {"batch_size": 26, "num_batches": 2, "buffer_size": 100}
    first, second = read_stream(iterable, **options)
    assert first != second and sorted(first) == sorted(second)
    assert read_stream(iterable, **options)[0] == first
    assert read_stream(iterable, seed=1, **options)[0] != first


def test_a_stream_leaves_out_sentences_without_words(caplog):
    rows = make_dataset(4).to_list()
    rows[1]["references"][0]["expressions"][0]["text"] = " . "
    dataset = make_dataset(1).from_list(rows, features=make_dataset(1).features)
    (batch,) = read_stream(dataset.to_iterable_dataset(), batch_size=9, num_batches=1)
    assert 100 not in {sent_id for _, sent_ids in batch for sent_id in sent_ids}
    assert "0001.png" in caplog.text and "100" in caplog.text


def test_errors_say_what_was_expected(dataset):
    with pytest.raises(ValueError, match=r"lacks \['file_name'\]"):
        ReferringDataset(dataset.remove_columns("file_name"))
    with pytest.raises(ValueError, match="expressions_per_image >= 1"):
        ReferringDataset(dataset, 0)
    with pytest.raises(ValueError, match="none in 1 images"):
        ReferringDataset(dataset.select([0]))
    with pytest.raises(ValueError, match="fewer processes or workers"):
        iterable = dataset.select([1]).to_iterable_dataset()
        read_stream(iterable, batch_size=1, num_batches=1, process_index=1, num_processes=2)
    stream = ReferringDataset(dataset)
    for position in (-1, len(stream)):
        with pytest.raises(IndexError):
            stream[position]
