"""One hash of a run's training data, so that the run never resumes on other data."""

import hashlib
from typing import Any

import datasets
import fsspec

from ..data.canonical import FEATURES
from ..evaluation.counts import fingerprint_rows


MAX_SHARDS = 8  # of a stream
ROWS_PER_SHARD = 4


def fingerprint_data(data: datasets.Dataset | datasets.IterableDataset) -> str:
    """
    Hash the rows in their order (hexadecimal): ids, masks, expressions and image files. The hash does not depend on
    where the data is stored or on the number of its files.

    For a stream, which takes an epoch to read, it covers the number of shards and the first rows of a few of them.

    Args:
        data: Data in the canonical form.
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
    """The first rows of evenly spread shards. Images stay encoded."""
    num_shards = data.num_shards
    step = -(-num_shards // MAX_SHARDS)
    encoded = data.select_columns(list(FEATURES)).cast_column("image", datasets.Image(decode=False))
    shards = [encoded.shard(num_shards, index).take(ROWS_PER_SHARD) for index in range(0, num_shards, step)]
    return datasets.Dataset.from_list([row for shard in shards for row in shard], FEATURES)


def _read_file(image: dict[str, Any]) -> bytes:
    if image["bytes"] is not None:
        return image["bytes"]
    with fsspec.open(image["path"], "rb") as file:
        return file.read()
