"""Loading of prepared data: a folder or a Hub id, complete or as a stream."""

from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa


def find_data_files(
    path_or_id: str | Path, config_name: str | None = None, revision: str | None = None
) -> dict[str, list[str]]:
    """{split: its files} of a folder or a Hub id."""
    builder = datasets.load_dataset_builder(str(path_or_id), config_name, revision=revision)
    return {str(split): list(files) for split, files in (builder.config.data_files or {}).items()}


def are_parquet(files: list[str]) -> bool:
    return all(file.endswith(".parquet") for file in files)


def load_files(*args: Any, place: str | Path, **kwargs: Any) -> Any:
    """Call `datasets.load_dataset`. If files are damaged, the message of the `ValueError` begins with `place`."""
    try:
        return datasets.load_dataset(*args, **kwargs)
    except (datasets.exceptions.DatasetGenerationError, pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and not Path(place).is_dir():  # of the network
            raise
        raise ValueError(f"{place}: its files cannot be read: {error.__cause__ or error}") from error


def load_prepared(
    path_or_id: str | Path,
    split: str,
    *,
    max_images: int | None = None,
    config_name: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
) -> Any:
    """
    A split of prepared data: a `datasets.Dataset`, or a `datasets.IterableDataset` if `streaming`.

    A folder is read again when its files have changed. `datasets` alone identifies a folder by its name and its card,
    and may return another folder's rows from its cache.

    Args:
        path_or_id: Folder or Hub id.
        split: Name of the split, such as train or val.
        max_images: Number of rows to load, from the first on; all by default.
        config_name: Name of the configuration, if there are several.
        revision: Branch, tag or commit on the Hub; main by default.
        streaming: Whether to read rows on demand, without a copy of the whole split.

    Raises:
        ValueError: There is no such split, or its files are damaged.
    """
    files = find_data_files(path_or_id, config_name) if Path(path_or_id).is_dir() else {}
    if files and split not in files:
        raise ValueError(f"Expected a split among {', '.join(files)} in {path_or_id}, got {split}.")
    if files and are_parquet(files[split]):
        found = {split: files[split]}
        dataset = load_files("parquet", data_files=found, split=split, streaming=streaming, place=path_or_id)
    else:
        options = {"name": config_name, "revision": revision, "split": split, "streaming": streaming}
        dataset = load_files(str(path_or_id), place=path_or_id, **options)
    if max_images is None:
        return dataset
    return dataset.take(max_images if streaming else min(max_images, len(dataset)))


def name_rows(split: str, max_images: int | None, num_rows: int) -> str:
    """Name the rows that [`load_prepared`] returned, as `datasets` does: SPLIT, or SPLIT[:N] for its first rows."""
    return split if max_images is None or num_rows < max_images else f"{split}[:{num_rows}]"
