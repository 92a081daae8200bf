"""Rows of images and sentences in Parquet files of any layout and place, read by row group."""

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm.contrib.concurrent import thread_map

from .loading import are_parquet, find_data_files
from .sentence_files import SUFFIXES, load_sentences


MASK = pa.struct([("size", pa.list_(pa.int32())), ("counts", pa.string())])


class RowGroup(NamedTuple):
    """A row group of a file. Its rows are numbered across all files, from `first_row` on."""

    file: str
    number: int  # in the file
    first_row: int
    num_rows: int
    num_bytes: int


class Source(NamedTuple):
    """The row groups of a split, the schema of its files, and a hash by which a later run recognizes them."""

    split: str
    groups: list[RowGroup]
    schema: pa.Schema
    fingerprint: str


def open_source(
    data: str,
    split: str | None = None,
    *,
    config_name: str | None = None,
    revision: str | None = None,
    image_dir: str | None = None,
    max_images: int | None = None,
    sentences_path: Path | None = None,
) -> Source:
    """
    Find the rows of a folder, Hub id or URL of Parquet files, or of a .csv or .jsonl file of sentences.

    Args:
        sentences_path: Parquet file that a file of sentences is converted to.

    Raises:
        ValueError: There is no such split, or its files are not Parquet or damaged.
    """
    if data.lower().endswith(SUFFIXES):
        pq.write_table(load_sentences(data, image_dir).data.table, sentences_path, row_group_size=1000)
        splits = {"sentences": [str(sentences_path)]}
    elif "://" in data:
        filesystem, path = fsspec.core.url_to_fs(data)
        found = [path] if path.endswith(".parquet") else sorted(filesystem.glob(f"{path.rstrip('/')}/**/*.parquet"))
        splits = {"all": [filesystem.unstrip_protocol(file) for file in found]}
    else:
        splits = find_data_files(data, config_name, revision)
    name = split or (next(iter(splits)) if len(splits) == 1 else None)
    if name not in splits:
        raise ValueError(f"Expected --split to be one of {', '.join(splits)}, got {split}.")
    if not splits[name] or not are_parquet(splits[name]):
        raise ValueError(
            f"Expected Parquet files in {data}, got {', '.join(splits[name][:3]) or 'none'}. The Hub's own conversion"
            " of a dataset is at --data-revision refs/convert/parquet."
        )
    return _read_footers(name, splits[name], max_images)


def _read_footers(split: str, files: list[str], max_images: int | None) -> Source:
    def read(name: str) -> tuple[pq.FileMetaData, pa.Schema]:
        try:
            with fsspec.open(name, "rb") as opened:
                file = pq.ParquetFile(opened)
                return file.metadata, file.schema_arrow
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{name} cannot be read: {error}") from error

    footers = thread_map(read, files, max_workers=16, desc="Files", disable=len(files) < 20)
    groups: list[RowGroup] = []
    row = 0
    for name, (metadata, _) in zip(files, footers):
        for index in range(metadata.num_row_groups):
            group = metadata.row_group(index)
            groups.append(RowGroup(name, index, row, group.num_rows, group.total_byte_size))
            row += group.num_rows
    described = json.dumps([[Path(group.file).name, *group[1:]] for group in groups])  # the same in any folder
    limit = row if max_images is None else max_images
    kept = [group._replace(num_rows=min(group.num_rows, limit - group.first_row)) for group in groups]
    fingerprint = hashlib.sha256(described.encode()).hexdigest()
    return Source(split, [group for group in kept if group.num_rows > 0], footers[0][1], fingerprint)


def read_row_group(group: RowGroup, columns: list[str]) -> list[pa.Table]:
    """Read a row group as a list of one table, as Ray expects it, with the column `row` that numbers all rows."""
    with fsspec.open(group.file, "rb") as opened:
        table = pq.ParquetFile(opened).read_row_group(group.number, columns).slice(0, group.num_rows)
    rows = np.arange(group.first_row, group.first_row + group.num_rows)
    return [table.replace_schema_metadata(None).append_column("row", pa.array(rows))]


class Columns(NamedTuple):
    """Where images, ids and sentences are in a row."""

    image: str
    text: str
    ids: dict[str, pa.DataType]  # the ids that results repeat
    sentence_ids: list[str]

    @property
    def decoded(self) -> pa.Schema:
        """The columns for the model, one row per image."""
        numbers = [(name, pa.int64()) for name in (*self.sentence_ids, "text_index")]
        lost = [("unknown_words", pa.list_(pa.string())), ("truncated", pa.bool_())]
        sentence = pa.struct([*numbers, ("text", pa.string()), *lost, ("error", pa.string())])
        image = [("size", pa.list_(pa.int64())), ("shape", pa.list_(pa.int64())), ("pixel_values", pa.large_binary())]
        return pa.schema([("row", pa.int64()), *self.ids.items(), ("sentences", pa.list_(sentence)), *image])

    @property
    def results(self) -> pa.Schema:
        """The columns of the results, one row per image and sentence."""
        sentence = self.decoded.field("sentences").type.value_type
        score = [("score", pa.float32()), ("mask", MASK)]
        return pa.schema([("row", pa.int64()), *self.ids.items(), *sentence, *score])


def find_columns(schema: pa.Schema, image_column: str = "image", text_column: str | None = None) -> Columns:
    """
    Find the columns of images, ids and sentences in a schema.

    Raises:
        ValueError: A column is missing, or the texts are of another kind.
    """
    text = text_column or next((name for name in ("references", "texts", "text") if name in schema.names), "text")
    if not {image_column, text} <= set(schema.names):
        raise ValueError(
            f"Expected the columns {image_column} and {text}, got {', '.join(schema.names)}: choose others with"
            " --image-column and --text-column."
        )
    kind = schema.field(text).type
    element = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
    names = {field.name for field in element} if pa.types.is_struct(element) else set()
    has_references = {"ref_id", "expressions"} <= names
    if not has_references and element not in (pa.string(), pa.large_string()):
        raise ValueError(f"Expected references, sentences or lists of sentences in {text}, got {kind}.")
    ids = {name: schema.field(name).type for name in ("image_id", "file_name") if name in schema.names}
    return Columns(image_column, text, {"file_name": pa.string(), **ids}, ["ref_id", "sent_id"] * has_references)


def list_sentences(value: Any) -> list[dict[str, Any]]:
    """The sentences about an image with their ids, from its references, sentence or list of sentences, or None."""
    if value and isinstance(value, list) and isinstance(value[0], dict):
        sentences = [
            {"ref_id": reference["ref_id"], **text} for reference in value for text in reference["expressions"]
        ]
    else:
        texts = value if isinstance(value, list) else [value] * (value is not None)
        sentences = [{"text": text} for text in texts]
    return [{**sentence, "text_index": index} for index, sentence in enumerate(sentences)]
