"""
Canonical data (`data/canonical.py`) as batches of images with up to K sentences each, which share the image's encoding.
K = 1 gives the paper's batches of (image, expression) pairs.

A run reads one sequence of items. With random access, the seed alone determines the item at each position. Global random
generators, the numbers of processes and workers, and interruptions have no influence. Data that is read as a stream is
divided among processes and workers, whose numbers have to stay the same when a run resumes. Epochs follow one another
without a gap, so that every batch is full. Each epoch has every expression once.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import count, islice
from typing import Any

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from PIL import Image
from torch.utils.data import DataLoader

from ..data.canonical import FEATURES, decode_mask
from ..tokenization_restr import split_expression
from .checkpoints import ignore_sigterm_in_workers


logger = logging.getLogger(__name__)

# (image, masks, texts, rng) -> the same, changed; see `augmentation.py`.
Augment = Callable[
    [Image.Image, list[np.ndarray], list[str], np.random.Generator], tuple[Image.Image, list[np.ndarray], list[str]]
]
# Purposes of random numbers. Each has its own generator.
_ORDER, _SENTENCES, _AUGMENTATION, _STREAM = range(4)


@dataclass(eq=False)
class ReferringDataset(torch.utils.data.Dataset):
    """
    A dataset with random access as one stream of items. Position p is in the epoch `p // items_per_epoch`.

    An item is an image with up to `expressions_per_image` of its expressions, drawn without replacement. An image with
    more of them appears several times per epoch, each time with different ones. Read the positions in order
    (`SequentialSampler`), with any number of processes. To resume, start at a later position.

    Args:
        dataset (`datasets.Dataset`): In the canonical form.
        expressions_per_image: K, the maximum number of sentences per item.
        seed: Seed of the order, the grouping of sentences and the augmentation.
        augmentation: Applied to each item, see `augmentation.py`.
        num_items: Length of the stream. Default: one epoch.
        shuffle: Whether to draw a new random order of images and sentences for each epoch.

    Raises:
        ValueError: The dataset is not in the canonical form, or has no expressions.
    """

    dataset: datasets.Dataset
    expressions_per_image: int = 1
    seed: int = 0
    augmentation: Augment | None = None
    num_items: int | None = None
    shuffle: bool = True

    def __post_init__(self) -> None:
        _check_arguments(self.dataset.features, self.expressions_per_image, self.seed)
        self.num_expressions = count_expressions(self.dataset)  # (images,)
        self.item_ends = np.cumsum(-(-self.num_expressions // self.expressions_per_image))  # (images,)
        self.items_per_epoch = int(self.item_ends[-1]) if len(self.item_ends) else 0
        if self.items_per_epoch == 0:
            raise ValueError(f"Expected expressions to train on, got none in {len(self.dataset)} images.")
        self._order = (-1, np.empty(0, dtype=np.int64))

    def __len__(self) -> int:
        return self.items_per_epoch if self.num_items is None else self.num_items

    def __getitem__(self, position: int) -> dict[str, Any]:
        """A dict of `image` (PIL), `texts`, `masks` (bool arrays of the image's size), `image_id` and `sent_ids`."""
        if not 0 <= position < len(self):
            raise IndexError(f"Expected a position from 0 to {len(self) - 1}, got {position}.")
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
        """The order of an epoch, (items_per_epoch,). The latest one is cached."""
        if self._order[0] != epoch:
            order = np.arange(self.items_per_epoch)
            if self.shuffle:
                order = np.random.default_rng([self.seed, _ORDER, epoch]).permutation(order)
            self._order = (epoch, order)
        return self._order[1]


@dataclass(eq=False)
class ReferringStream(torch.utils.data.IterableDataset):
    """
    The items of one process from a dataset that is read as a stream (`datasets.load_dataset(..., streaming=True)`).

    Each worker of each process reads its own share: whole files if the number of files is a multiple of the number of
    workers, otherwise every n-th image. Files are shuffled, and items within a buffer. The items depend on the seed, the
    batch size and the numbers of processes and workers. If these stay the same, a run resumes exactly at `first_batch`:
    earlier items are read again, but not decoded. Pass the stream to a `DataLoader` with the same `batch_size`, and do
    not shard it again.

    Args:
        dataset (`datasets.IterableDataset`): In the canonical form.
        expressions_per_image, seed, augmentation: See [`ReferringDataset`].
        batch_size: Number of items per batch.
        num_batches: Number of this process's batches in the whole run.
        first_batch: Number of batches to skip.
        process_index, num_processes: Index of this process, and number of processes.
        buffer_size: Number of items to hold in memory for shuffling, with encoded images.
    """

    dataset: datasets.IterableDataset
    expressions_per_image: int = 1
    seed: int = 0
    augmentation: Augment | None = None
    _: KW_ONLY
    batch_size: int
    num_batches: int
    first_batch: int = 0
    process_index: int = 0
    num_processes: int = 1
    buffer_size: int = 1000

    def __post_init__(self) -> None:
        _check_arguments(self.dataset.features, self.expressions_per_image, self.seed)
        self.dataset = self.dataset.cast_column("image", datasets.Image(decode=False))

    def __len__(self) -> int:
        """Number of this process's items in the whole run."""
        return self.num_batches * self.batch_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = torch.utils.data.get_worker_info()
        num_workers = 1 if info is None else info.num_workers
        # A DataLoader cycles through its workers from the first one on: give the first one the share that is due next.
        worker = (self.first_batch + (0 if info is None else info.id)) % num_workers
        num_done = len(range(worker, self.first_batch, num_workers))
        num_all = len(range(worker, self.num_batches, num_workers))
        items = self._draw(self.process_index * num_workers + worker, self.num_processes * num_workers)
        for row, chosen, augmentation_seed in islice(items, num_done * self.batch_size, num_all * self.batch_size):
            row = row | {"image": datasets.Image().decode_example(row["image"])}
            rng = np.random.default_rng([self.seed, _AUGMENTATION, augmentation_seed])
            yield build_item(row, chosen, self.augmentation, rng)

    def _draw(self, share: int, num_shares: int) -> Iterator[tuple[dict[str, Any], np.ndarray, int]]:
        """Yield (row, indices of its expressions, seed) for the items of one share, without end."""
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
                    f"Expected expressions for each of {num_shares} processes and workers, got none for number {share}."
                    " Use fewer processes or workers, or split the data into more files."
                )

    def _split(
        self, rows: datasets.IterableDataset, rng: np.random.Generator
    ) -> Iterator[tuple[dict[str, Any], np.ndarray, int]]:
        # `iter(rows)` would divide the files among workers again.
        for batch in rows.iter(batch_size=1):
            row = {name: values[0] for name, values in batch.items()}
            sentences = rng.permutation(_find_expressions_with_words(row))
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


def _find_expressions_with_words(row: Mapping[str, Any]) -> list[int]:
    """Indices of the expressions that have words. A stream cannot be checked for others before training."""
    expressions = [expression for reference in row["references"] for expression in reference["expressions"]]
    wordless = [expression["sent_id"] for expression in expressions if not split_expression(expression["text"])]
    if wordless:
        logger.warning(f"{row['file_name']}: the sent_ids {wordless} have no words and are left out.")
    return [index for index, expression in enumerate(expressions) if expression["sent_id"] not in wordless]


def _check_arguments(features: datasets.Features | None, expressions_per_image: int, seed: int) -> None:
    missing = [name for name in FEATURES if name not in (features or ())]
    if missing:
        raise ValueError(
            f"Expected a dataset with one row per image, got one that lacks {missing} and has {list(features or ())}."
            " Prepare it with `restr prepare`."
        )
    if expressions_per_image < 1 or seed < 0:
        raise ValueError(f"Expected expressions_per_image >= 1 and seed >= 0, got {expressions_per_image} and {seed}.")


def count_expressions(dataset: datasets.Dataset) -> np.ndarray:
    """Count the expressions per image, (images,). Images are not decoded."""
    counts = [
        sum(len(reference["expressions"]) for reference in references)
        for references in dataset.select_columns("references")["references"]
    ]
    return np.array(counts, dtype=np.int64)


def build_item(
    row: Mapping[str, Any], chosen: Sequence[int] | np.ndarray, augmentation: Augment | None, rng: np.random.Generator
) -> dict[str, Any]:
    """Build the item of [`ReferringDataset`] for some expressions of a canonical row, by their indices in the row."""
    references = row["references"]
    pairs = [(number, expression) for number, r in enumerate(references) for expression in r["expressions"]]
    pairs = [pairs[index] for index in chosen]
    decoded = {number: decode_mask(references[number]["mask"]) for number in {number for number, _ in pairs}}
    image, masks = row["image"], [decoded[number] for number, _ in pairs]
    texts = [expression["text"] for _, expression in pairs]
    if augmentation is not None:
        image, masks, texts = augmentation(image, masks, texts, rng)
    sent_ids = [expression["sent_id"] for _, expression in pairs]
    return {"image": image, "texts": texts, "masks": masks, "image_id": row["image_id"], "sent_ids": sent_ids}


@dataclass
class ReferringCollator:
    """
    Collates items into the model's inputs with `labels`, and the ids for error messages: `image_ids` (B ints) and
    `sent_ids` (N ints). [`split_ids`] separates the two.

    The model's forward checks shapes only. The collator checks values: word ids that the model has, labels of 0 and 1,
    and sentences with words.

    Args:
        processor ([`ReSTRProcessor`]): The model's processor.
        vocab_size: `model.config.text_config.vocab_size`. With None, word ids have no upper limit.
        share_images: Whether neighbours in a batch with the same image share its encoding. If items have one expression
            each, N stays the number of items, and B becomes the number of different images.

    Raises:
        ValueError: When called with values that the model does not accept. The message gives the sent_ids.
    """

    processor: Any
    vocab_size: int | None = None
    share_images: bool = False

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
    """Merge neighbours with the same pixels. Augmentation may have changed one of them."""
    merged: list[dict[str, Any]] = []
    for item in items:
        if merged and merged[-1]["image_id"] == item["image_id"] and merged[-1]["image"] == item["image"]:
            merged[-1] |= {name: [*merged[-1][name], *item[name]] for name in ("texts", "masks", "sent_ids")}
        else:
            merged.append(dict(item))
    return merged


def _check_values(inputs: Mapping[str, torch.Tensor], sent_ids: Sequence[int], vocab_size: int | None) -> None:
    input_ids, labels = inputs["input_ids"], inputs["labels"]
    has_words = inputs["attention_mask"].bool().any(1)  # (N,)
    is_known = (input_ids >= 0) & (vocab_size is None or input_ids < vocab_size)  # (N, T)
    is_mask = (labels == 0) | (labels == 1)  # (N, h, w)
    for is_right, expected in (
        (has_words, "sentences of at least one word"),
        (is_known.all(1), f"word ids from 0 to below the model's vocab_size {vocab_size}"),
        (is_mask.flatten(1).all(1), "labels of 0 and 1"),
    ):
        if not is_right.all():
            rows = [sent_id for sent_id, right in zip(sent_ids, is_right.tolist(), strict=True) if not right]
            raise ValueError(
                f"Expected {expected}, got others in the sent_ids {rows}. Correct these rows or leave them out."
            )


def split_ids(batch: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, list[int]]]:
    """Split a batch of [`ReferringCollator`] into the model's inputs and the ids."""
    ids = {name: batch[name] for name in ("image_ids", "sent_ids")}
    return {name: value for name, value in batch.items() if name not in ids}, ids


def create_loader(
    dataset: torch.utils.data.Dataset, batch_size: int, collator: Callable[..., dict[str, Any]], **options: Any
) -> DataLoader:
    """
    Create a `DataLoader` for a run that can be resumed: starting it draws no number from the global random generator,
    and SIGTERM does not end its workers.
    """
    generator = torch.Generator()
    return ignore_sigterm_in_workers(
        DataLoader(dataset, batch_size, collate_fn=collator, generator=generator, **options)
    )


def loss_weight(batch: Mapping[str, torch.Tensor], num_pairs: int | torch.Tensor, num_batches: int) -> Any:
    """
    Factor for a batch's mean loss, with which the mean over a step's batches equals the mean over its pairs. Without
    it, sentences about images with many sentences would count less.

    Args:
        batch: Batch with `input_ids` (N, words).
        num_pairs: Number of (image, expression) pairs in the step, over all accumulated batches and processes.
        num_batches: Number of accumulated batches times number of processes.
    """
    return len(batch["input_ids"]) * num_batches / num_pairs
