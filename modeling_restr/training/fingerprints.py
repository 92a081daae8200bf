"""Which data a run is trained on, as one hash, so that it is never resumed on other data."""

import hashlib
from typing import Any

import datasets
import fsspec
from accelerate.utils import broadcast_object_list

from ..data.canonical import FEATURES
from ..metrics.evaluation import fingerprint_rows


MAX_SHARDS = 8  # of a stream
ROWS_PER_SHARD = 4


def fingerprint_data(data: datasets.Dataset | datasets.IterableDataset) -> str:
    """
    A hash (hexadecimal) of the rows in their order: ids, masks, expressions and the images' files. Where the data lies
    and in how many files makes no difference.

    Of a stream, which takes as long to read as an epoch, only the first rows of a few of its shards are read, and
    their number counts.

    Args:
        data: In the canonical form.
    """
    digest = hashlib.sha256()
    if isinstance(data, datasets.IterableDataset):
        digest.update(str(data.num_shards).encode())
        data = _take_sample(data)
    for row_digest in fingerprint_rows(data):
        digest.update(row_digest.encode())
    for row in data.select_columns("image").cast_column("image", datasets.Image(decode=False)):
        digest.update(hashlib.sha256(_read_file(row["image"])).digest())
    return digest.hexdigest()


def _take_sample(data: datasets.IterableDataset) -> datasets.Dataset:
    """The first rows of shards that are evenly spread, with the images as they are."""
    num_shards = data.num_shards
    step = -(-num_shards // MAX_SHARDS)
    undecoded = data.select_columns(list(FEATURES)).cast_column("image", datasets.Image(decode=False))
    shards = [undecoded.shard(num_shards, index).take(ROWS_PER_SHARD) for index in range(0, num_shards, step)]
    return datasets.Dataset.from_list([row for shard in shards for row in shard], FEATURES)


def _read_file(image: dict[str, Any]) -> bytes:
    if image["bytes"] is not None:
        return image["bytes"]
    with fsspec.open(image["path"], "rb") as file:
        return file.read()


def fingerprint_on_main_process(data: datasets.Dataset | datasets.IterableDataset, is_main_process: bool) -> str:
    """[`fingerprint_data`], for which the main process reads the data and all others wait."""
    fingerprints = [fingerprint_data(data) if is_main_process else None]
    return broadcast_object_list(fingerprints)[0]


__all__ = ["fingerprint_data", "fingerprint_on_main_process"]
