"""
Canonical data (`data/canonical.py`) as batches of images with up to K of their sentences each, which share the image's
encoding; K = 1 is the paper's batch of (image, expression) pairs.

A run sees one stream of items. Which item stands at which position follows from the seed alone: not from the state of
any random generator, the number of processes or workers, or where the run was stopped. Epochs follow one another in
the stream without a gap, so every batch is full; each goes through all expressions once.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count, islice
from typing import Any

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from PIL import Image

from ..data.canonical import FEATURES, decode_mask
from ..tokenization_restr import split_expression


logger = logging.getLogger(__name__)

# (image, masks, texts, rng) -> the same, changed; see `augmentation.py`.
Augment = Callable[
    [Image.Image, list[np.ndarray], list[str], np.random.Generator], tuple[Image.Image, list[np.ndarray], list[str]]
]
# What a random number is for, so that no two uses share one.
_ORDER, _SENTENCES, _AUGMENTATION, _STREAM = range(4)


class ReferringDataset(torch.utils.data.Dataset):
    """
    A dataset with random access as one stream of items: position p is an item of the epoch `p // items_per_epoch`.

    An item is an image with up to `expressions_per_image` of its expressions, drawn without replacement: an image with
    more of them comes several times in an epoch, each time with others. Read positions in their order
    (`SequentialSampler`), on any number of processes; to resume, begin at a later one.

    Args:
        dataset (`datasets.Dataset`): In the canonical form.
        expressions_per_image: K, the maximum number of sentences per item.
        seed: Of the order, of the sentences that come together, and of the augmentation.
        augmentation: What to do to each item, see `augmentation.py`.
        num_items: Length of the stream; by default one epoch.
        shuffle: Whether images and sentences are in random order, newly drawn each epoch.

    Raises:
        ValueError: the dataset is not in the canonical form, or lacks expressions.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        expressions_per_image: int = 1,
        seed: int = 0,
        augmentation: Augment | None = None,
        num_items: int | None = None,
        shuffle: bool = True,
    ):
        _check_arguments(dataset.features, expressions_per_image, seed)
        self.dataset = dataset
        self.expressions_per_image = expressions_per_image
        self.seed = seed
        self.augmentation = augmentation
        self.shuffle = shuffle
        self.num_expressions = count_expressions(dataset)  # (images,)
        self.item_ends = np.cumsum(-(-self.num_expressions // expressions_per_image))  # (images,)
        self.items_per_epoch = int(self.item_ends[-1]) if len(self.item_ends) else 0
        if self.items_per_epoch == 0:
            raise ValueError(f"Expected expressions to train on, got none in {len(dataset)} images.")
        self.num_items = self.items_per_epoch if num_items is None else num_items
        self._order = (-1, np.empty(0, dtype=np.int64))

    def __len__(self) -> int:
        return self.num_items

    def __getitem__(self, position: int) -> dict[str, Any]:
        """`image` (PIL), `texts`, `masks` (bool arrays of the image's size), `image_id` and `sent_ids`."""
        if not 0 <= position < len(self):
            raise IndexError(f"Position {position} in a stream of {len(self)} items.")
        epoch, place = divmod(position, self.items_per_epoch)
        item = int(self._get_order(epoch)[place])
        index = int(np.searchsorted(self.item_ends, item, side="right"))
        sentences = np.arange(self.num_expressions[index])
        if self.shuffle:
            sentences = np.random.default_rng([self.seed, _SENTENCES, epoch, index]).permutation(sentences)
        part = item - (int(self.item_ends[index - 1]) if index else 0)
        chosen = sentences[part * self.expressions_per_image :][: self.expressions_per_image]
        rng = np.random.default_rng([self.seed, _AUGMENTATION, epoch, item])
        return build_item(self.dataset[index], chosen, self.augmentation, rng)

    def _get_order(self, epoch: int) -> np.ndarray:
        """(items_per_epoch,) the items of an epoch; the last epoch's order is kept."""
        if self._order[0] != epoch:
            order = np.arange(self.items_per_epoch)
            if self.shuffle:
                order = np.random.default_rng([self.seed, _ORDER, epoch]).permutation(order)
            self._order = (epoch, order)
        return self._order[1]


class ReferringStream(torch.utils.data.IterableDataset):
    """
    A dataset that is read as a stream (`datasets.load_dataset(..., streaming=True)`), as the items of one process.

    Each worker of each process reads its own share: its own files where their number is a multiple of the workers',
    else every n-th image. Files and items are shuffled as far as the buffer reaches. What is read follows from the
    seed and from the numbers of processes and workers and the batch size; with the same ones a run that is resumed at
    `first_batch` resumes exactly: what came before is read again, but not decoded. Give it to a `DataLoader` with that
    `batch_size`, and do not shard it once more.

    Args:
        dataset (`datasets.IterableDataset`): In the canonical form.
        expressions_per_image, seed, augmentation: See [`ReferringDataset`].
        batch_size: Items of a batch of this process.
        num_batches: Batches of this process in the whole run.
        first_batch: How many of these are done.
        process_index, num_processes: Which process this is, of how many.
        buffer_size: Items that are in memory, with encoded images, to draw from.
    """

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        expressions_per_image: int = 1,
        seed: int = 0,
        augmentation: Augment | None = None,
        *,
        batch_size: int,
        num_batches: int,
        first_batch: int = 0,
        process_index: int = 0,
        num_processes: int = 1,
        buffer_size: int = 1000,
    ):
        _check_arguments(dataset.features, expressions_per_image, seed)
        self.dataset = dataset.cast_column("image", datasets.Image(decode=False))
        self.expressions_per_image = expressions_per_image
        self.seed = seed
        self.augmentation = augmentation
        self.batch_size = batch_size
        self.num_batches = num_batches
        self.first_batch = first_batch
        self.process_index = process_index
        self.num_processes = num_processes
        self.buffer_size = buffer_size

    def __len__(self) -> int:
        """Items of this process in the whole run."""
        return self.num_batches * self.batch_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = torch.utils.data.get_worker_info()
        num_workers = 1 if info is None else info.num_workers
        # A DataLoader asks its workers in turn, from the first one on: that one has to be whose turn it was.
        worker = (self.first_batch + (0 if info is None else info.id)) % num_workers
        num_done = len(range(worker, self.first_batch, num_workers))
        num_all = len(range(worker, self.num_batches, num_workers))
        items = self._draw(self.process_index * num_workers + worker, self.num_processes * num_workers)
        for row, chosen, augmentation_seed in islice(items, num_done * self.batch_size, num_all * self.batch_size):
            row = row | {"image": datasets.Image().decode_example(row["image"])}
            rng = np.random.default_rng([self.seed, _AUGMENTATION, augmentation_seed])
            yield build_item(row, chosen, self.augmentation, rng)

    def _draw(self, share: int, num_shares: int) -> Iterator[tuple[dict[str, Any], np.ndarray, int]]:
        """(row, numbers of its expressions, seed) of each item of one share, epoch after epoch without end."""
        for epoch in count():
            shuffle_seed = int(np.random.SeedSequence([self.seed, _ORDER, epoch]).generate_state(1)[0])
            shuffled = self.dataset.shuffle(seed=shuffle_seed, buffer_size=1)  # the order of the files
            rows = split_dataset_by_node(shuffled, share, num_shares)
            rng = np.random.default_rng([self.seed, _STREAM, epoch, share])
            is_empty = True
            for item in _shuffle(self._split(rows, rng), self.buffer_size, rng):
                is_empty = False
                yield item
            if is_empty:
                raise ValueError(
                    f"Expected expressions for each of {num_shares} processes and workers, got none for number {share}:"
                    " use fewer of them, or more files."
                )

    def _split(
        self, rows: datasets.IterableDataset, rng: np.random.Generator
    ) -> Iterator[tuple[dict[str, Any], np.ndarray, int]]:
        # `iter(rows)` would share the files among workers once more.
        for batch in rows.iter(batch_size=1):
            row = {name: values[0] for name, values in batch.items()}
            sentences = rng.permutation(_find_worded(row))
            for start in range(0, len(sentences), self.expressions_per_image):
                yield row, sentences[start : start + self.expressions_per_image], int(rng.integers(2**63))


def _shuffle(items: Iterable[Any], buffer_size: int, rng: np.random.Generator) -> Iterator[Any]:
    buffer: list[Any] = []
    for item in items:
        if len(buffer) < buffer_size:
            buffer.append(item)
            continue
        index = int(rng.integers(buffer_size))
        yield buffer[index]
        buffer[index] = item
    for index in rng.permutation(len(buffer)):
        yield buffer[index]


def _find_worded(row: Mapping[str, Any]) -> list[int]:
    """The numbers of the expressions that have words: in a stream, others cannot be found beforehand."""
    expressions = [expression for reference in row["references"] for expression in reference["expressions"]]
    wordless = [expression["sent_id"] for expression in expressions if not split_expression(expression["text"])]
    if wordless:
        logger.warning(f"{row['file_name']}: left out the sent_ids {wordless}, which have no words.")
    return [number for number, expression in enumerate(expressions) if expression["sent_id"] not in wordless]


def _check_arguments(features: datasets.Features | None, expressions_per_image: int, seed: int) -> None:
    missing = [name for name in FEATURES if name not in (features or ())]
    if missing:
        raise ValueError(
            f"Expected a dataset with one row per image, as `restr prepare` writes it; it lacks {missing} and"
            f" has {list(features or ())}."
        )
    if expressions_per_image < 1 or seed < 0:
        raise ValueError(f"Expected expressions_per_image >= 1 and seed >= 0, got {expressions_per_image} and {seed}.")


def count_expressions(dataset: datasets.Dataset) -> np.ndarray:
    """(images,) how many expressions each image has; images are not decoded."""
    counts = [
        sum(len(reference["expressions"]) for reference in references)
        for references in dataset.select_columns("references")["references"]
    ]
    return np.array(counts, dtype=np.int64)


def build_item(
    row: Mapping[str, Any], chosen: Sequence[int] | np.ndarray, augmentation: Augment | None, rng: np.random.Generator
) -> dict[str, Any]:
    """The item of some expressions of a canonical row, by their numbers in the row's order; see [`ReferringDataset`]."""
    pairs = [
        (number, expression)
        for number, reference in enumerate(row["references"])
        for expression in reference["expressions"]
    ]
    pairs = [pairs[index] for index in chosen]
    decoded = {number: decode_mask(row["references"][number]["mask"]) for number in {number for number, _ in pairs}}
    image, masks, texts = row["image"], [decoded[n] for n, _ in pairs], [expression["text"] for _, expression in pairs]
    if augmentation is not None:
        image, masks, texts = augmentation(image, masks, texts, rng)
    sent_ids = [expression["sent_id"] for _, expression in pairs]
    return {"image": image, "texts": texts, "masks": masks, "image_id": row["image_id"], "sent_ids": sent_ids}


class ReferringCollator:
    """
    Items -> the model's inputs with `labels`, and the rows' ids for error messages, lists `image_ids` of B and
    `sent_ids` of N ints, which [`split_ids`] takes out again.

    The model's forward checks shapes only. Values are checked here: word ids that the model has, labels of 0 and 1,
    sentences with words.

    Args:
        processor ([`ReSTRProcessor`]): The model's.
        vocab_size: Number of words of the model, `model.config.text_config.vocab_size`. Ids are not compared with it
            where it is None.
        share_images: Whether neighbours in a batch with the same image share its encoding. With items of one
            expression each, N is then the number of items, and B that of different images.

    Raises:
        ValueError: when called, for values that the model does not take; the message has the sent_ids.
    """

    def __init__(self, processor: Any, vocab_size: int | None = None, share_images: bool = False):
        self.processor = processor
        self.vocab_size = vocab_size
        self.share_images = share_images

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        items = _merge_neighbours(items) if self.share_images else items
        inputs = self.processor(
            images=[item["image"] for item in items],
            text=[list(item["texts"]) for item in items],
            segmentation_maps=[mask for item in items for mask in item["masks"]],
            return_tensors="pt",
        )
        inputs.pop("original_sizes")
        image_ids = [item["image_id"] for item in items]
        sent_ids = [sent_id for item in items for sent_id in item["sent_ids"]]
        _check_values(inputs, sent_ids, self.vocab_size)
        return {**inputs, "image_ids": image_ids, "sent_ids": sent_ids}


def _merge_neighbours(items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One item for neighbours with the same image: the same pixels, as augmentation may have changed them."""
    merged: list[dict[str, Any]] = []
    for item in items:
        if merged and merged[-1]["image_id"] == item["image_id"] and merged[-1]["image"] == item["image"]:
            merged[-1] |= {name: [*merged[-1][name], *item[name]] for name in ("texts", "masks", "sent_ids")}
        else:
            merged.append(dict(item))
    return merged


def _check_values(inputs: Mapping[str, torch.Tensor], sent_ids: Sequence[int], vocab_size: int | None) -> None:
    input_ids, labels = inputs["input_ids"], inputs["labels"]
    is_foreign = input_ids < 0 if vocab_size is None else (input_ids < 0) | (input_ids >= vocab_size)  # (N, T)
    is_wordless = ~inputs["attention_mask"].bool().any(1)  # (N,)
    is_no_mask = ((labels != 0) & (labels != 1)).flatten(1).any(1)  # (N,)
    for is_wrong, expected in (
        (is_wordless, "sentences of at least one word"),
        (is_foreign.any(1), f"word ids from 0 to below the model's vocab_size {vocab_size}"),
        (is_no_mask, "labels of 0 and 1"),
    ):
        if is_wrong.any():
            rows = [sent_id for sent_id, wrong in zip(sent_ids, is_wrong.tolist(), strict=True) if wrong]
            raise ValueError(
                f"Expected {expected}, got others in the sent_ids {rows}. Correct or leave out these rows."
            )


def split_ids(batch: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, list[int]]]:
    """(the model's inputs, the ids) of a batch of [`ReferringCollator`]."""
    ids = {name: batch[name] for name in ("image_ids", "sent_ids")}
    return {name: value for name, value in batch.items() if name not in ids}, ids


def loss_weight(batch: Mapping[str, torch.Tensor], num_pairs: int | torch.Tensor, num_batches: int) -> Any:
    """
    What to multiply a batch's mean loss with, so that the mean over the batches of a step is the mean over its pairs:
    images have different numbers of expressions.

    Args:
        batch: With `input_ids` (N, words).
        num_pairs: (image, expression) pairs of the whole step, over all accumulated batches and processes.
        num_batches: Accumulated batches times processes.
    """
    return len(batch["input_ids"]) * num_batches / num_pairs


__all__ = [
    "ReferringCollator",
    "ReferringDataset",
    "ReferringStream",
    "build_item",
    "count_expressions",
    "loss_weight",
    "split_ids",
]
