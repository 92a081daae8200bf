"""The stages of the pipeline: row groups are read, CPU tasks decode images, actors that hold the model predict masks."""

from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import torch
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from ..data.parquet_rows import Columns, RowGroup, list_sentences, read_row_group
from ..data.segmentation import encode_mask
from ..evaluation.counts import predict_batch
from ..evaluation.run import load_model
from ..image_reading_restr import UnreadableImageError
from ..tokenization_restr import split_expression


class RowGroupDatasource(Datasource):
    """The source of the pipeline: one block per row group."""

    def __init__(self, groups: Sequence[RowGroup], columns: Sequence[str]):
        self.groups, self.columns = groups, list(columns)

    def estimate_inmemory_data_size(self) -> int:
        return sum(group.num_bytes for group in self.groups)

    def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
        tasks = []
        for group in self.groups:
            size: dict[str, Any] = {"num_rows": group.num_rows, "size_bytes": group.num_bytes}
            metadata = BlockMetadata(**size, input_files=(group.file,), exec_stats=None)
            tasks.append(ReadTask(partial(read_row_group, group, self.columns), metadata))
        return tasks


def decode(
    table: pa.Table, processor: Any, columns: Columns, image_dir: str | None = None, raise_errors: bool = False
) -> pa.Table:
    """
    Read and resize the images of some rows, and check their sentences.

    Returns:
        One row per image with the columns `columns.decoded`. An error of a sentence or its image is in `error`.

    Raises:
        ValueError: A row has an error, and `raise_errors` is set.
        OSError: A disk or network failed.
    """
    rows = [_decode_row(row, processor, columns, image_dir) for row in table.to_pylist()]
    errors = [f"  row {row['row']}: {text['error']}" for row in rows for text in row["sentences"] if text["error"]]
    if errors and raise_errors:
        raise ValueError("\n".join(["Bad rows, which --on-error row writes as rows with an error:", *errors]))
    return pa.Table.from_pylist(rows, schema=columns.decoded)


def _decode_row(row: dict[str, Any], processor: Any, columns: Columns, image_dir: str | None) -> dict[str, Any]:
    image = row[columns.image]
    if not isinstance(image, dict):  # as `datasets` stores images
        image = {"bytes": image, "path": None} if isinstance(image, bytes) else {"bytes": None, "path": image}
    sentences = [_check_sentence(sentence, processor) for sentence in list_sentences(row[columns.text])]
    decoded = {"file_name": image["path"] and Path(image["path"]).name, **row, "sentences": sentences}
    good = [sentence for sentence in sentences if sentence["error"] is None]
    if good:
        try:
            inputs = processor.image_processor(_read_image(image, image_dir), return_tensors="pt")
        except UnreadableImageError as error:
            for sentence in good:
                sentence["error"] = str(error)
        else:
            pixels = inputs["pixel_values"][0].float().numpy()  # (3, height, width)
            size = inputs["original_sizes"][0].tolist()
            decoded |= {"pixel_values": pixels.tobytes(), "shape": pixels.shape, "size": size}
    return decoded


def _check_sentence(sentence: dict[str, Any], processor: Any) -> dict[str, Any]:
    text = sentence["text"]
    if not text or not split_expression(text):
        return {**sentence, "error": f"Expected a sentence with words, got {text!r}."}
    (lost,) = processor.find_lost_words([text])
    return {**sentence, "unknown_words": lost["unknown_words"], "truncated": bool(lost["cut_words"]), "error": None}


def _read_image(image: dict[str, Any], image_dir: str | None) -> bytes:
    if image["bytes"] is not None:
        return image["bytes"]
    if not (path := image["path"]):
        raise UnreadableImageError("The row has no image.")
    if image_dir is not None and "://" not in path and not Path(path).is_absolute():
        path = f"{image_dir.rstrip('/')}/{path}"
    try:
        with fsspec.open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        raise UnreadableImageError(f"The image {path} is missing. --image-dir chooses its folder.") from None


class Predictor:
    """An actor that loads the model once and turns decoded rows into results."""

    def __init__(
        self,
        model: str,
        revision: Any,
        columns: Columns,
        *,
        dtype: str = "float32",
        device: str = "cpu",
        num_threads: int = 1,
        expressions_per_batch: int = 16,
        threshold: float = 0.5,
    ):
        torch.set_num_threads(num_threads)
        self.model, self.processor = load_model(model, revision, dtype, torch.device(device))
        self.columns, self.expressions_per_batch, self.threshold = columns, expressions_per_batch, threshold

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = table.to_pylist()
        readable = [row for row in rows if row["pixel_values"] is not None]
        if readable:
            self._predict(readable)
        ids = ("row", *self.columns.ids)
        results = [{name: row[name] for name in ids} | sentence for row in rows for sentence in row["sentences"]]
        return pa.Table.from_pylist(results, schema=self.columns.results)

    def _predict(self, rows: list[dict[str, Any]]) -> None:
        """Add score and mask to the sentences of these rows. Each image is encoded once."""
        sentences = [[sentence for sentence in row["sentences"] if sentence["error"] is None] for row in rows]
        texts = [[sentence["text"] for sentence in in_row] for in_row in sentences]
        inputs = self.processor(text=texts, return_tensors="pt")
        pixels = [np.frombuffer(row["pixel_values"], np.float32).reshape(row["shape"]) for row in rows]
        inputs["pixel_values"] = torch.from_numpy(np.stack(pixels))  # (B, 3, height, width)
        inputs["original_sizes"] = torch.tensor([row["size"] for row in rows])  # (B, 2)
        results = predict_batch(self.model, self.processor, inputs, self.expressions_per_batch, self.threshold)
        try:
            for sentence, result in zip(chain.from_iterable(sentences), results):
                sentence |= {"score": result["score"], "mask": encode_mask(result["mask"].cpu().numpy())}
        except ValueError as error:  # logits that are not finite
            raise ValueError(f"Rows {rows[0]['row']} to {rows[-1]['row']}: {error}") from error
