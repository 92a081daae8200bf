"""
Predict the masks of a dataset of any size, with any number of processes and machines:

    python examples/predict.py path/or/id data/photos --output_dir runs/masks
    accelerate launch --num_processes 8 examples/predict.py path/or/id data/photos --output_dir runs/masks

The data is a folder of Parquet or a Hub id: rows as `restr prepare` writes them, or rows with an image and
a text or a list of texts. Or it is a .csv or .jsonl file of own sentences, with the columns image and sentence, and
the photos in --image_dir. Each image is encoded once. The output folder gets data/SPLIT-00000-of-000NN.parquet with a
row for each (image, expression): ids, text, score, mask (COCO RLE at the image's own size), unknown_words (those that the
model does not know) and truncated (whether the text has more words than it reads); prediction.json, what they were made
with; and summary.json. `load_dataset("parquet", data_dir="runs/masks")` reads the masks.

Stopped, the same command goes on where it was, with any number of processes (without GPUs `torchrun --nproc_per_node
CORES ...` starts several). See docs/prediction_at_scale.md.
"""

import argparse
import hashlib
import json
import logging
import os
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from itertools import accumulate, islice, repeat, takewhile
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from filelock import FileLock, Timeout
from PIL import Image, UnidentifiedImageError
from tqdm.auto import tqdm
from tqdm.contrib.concurrent import thread_map
from transformers import AutoModelForImageSegmentation, AutoProcessor, BatchFeature

import modeling_restr  # noqa: F401  (registers ReSTR with the Auto classes)
from modeling_restr.arguments import ArgumentParser, add_options, positive_int, start_processes
from modeling_restr.data.canonical import MASK_FEATURE, BadImage, encode_mask
from modeling_restr.data.loading import are_parquet, find_data_files, load_prepared
from modeling_restr.data.sentence_files import SUFFIXES, load_sentences
from modeling_restr.data.shards import shard_paths
from modeling_restr.evaluation.counts import predict_batch
from modeling_restr.files import replace_file
from modeling_restr.tokenization_restr import split_expression


SETTINGS_NAME = "prediction.json"
SUMMARY_NAME = "summary.json"
VERSION = 2  # of the rows that this file writes; those of different versions are never mixed
CONTENT_KEY = b"prediction"  # in a shard's metadata: what it was made with and from, and what is bad
ROWS_PER_READ = 100  # of the dataset, images included
MASKS_PER_GROUP = 10_000
NUM_FILE_READERS = 16  # threads that read the ends of Parquet files, where what they hold is written
MAX_SHARDS = 99_999  # five digits, in which `datasets` recognises the names of shards
PATIENCE = timedelta(days=7)  # processes wait at the end for the slowest; torch's default is minutes
# In configurations: where a model was loaded from, by which version, and how it is found.
IRRELEVANT = ("_name_or_path", "transformers_version", "architectures", "auto_map", "custom_pipelines")
LOST_WORDS = ("unknown_words", "cut_words")
MAX_LOST_WORDS = 1000  # of a kind in the summary
_END: Any = object()

logger = logging.getLogger(__name__)


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description="Predict the masks of a dataset of images and expressions.")
    add = parser.add_argument
    add("model", help="folder or Hub id")
    add("data", help="folder of Parquet, Hub id of a dataset, or .csv or .jsonl file of own sentences")
    add("--image_dir", type=Path, help="folder of the photos of own sentences (default: that of their file)")
    output_dir = {"required": True, "help": "where masks go; on a disk that all processes share"}
    add_options(parser, "revision", "data_revision", "device", "num_threads", output_dir=output_dir)
    add_options(parser, "threshold", "dtype", "expressions_per_batch", "max_images")
    add("--split", help="which split of the data (default: its only one)")
    add("--config_name", help="which configuration of the data, where it has several")
    add(
        "--streaming", action="store_true", help="read Parquet where it is, instead of making a copy of all data first"
    )
    add("--image_column", default="image", help="(default: image)")
    add("--text_column", help="references, sentences or lists of sentences (default: references, texts or text)")
    add("--images_per_shard", type=positive_int, default=1000, metavar="N", help="rows that a file covers (1000)")
    add("--batch_size", type=positive_int, default=8, metavar="N", help="images that are encoded at a time (8)")
    add("--num_workers", type=positive_int, default=4, metavar="N", help="threads of a process that read images (4)")
    add("--skip_bad", action="store_true", help="leave out bad images and texts, and list them")
    add(
        "--part",
        type=parse_part,
        default=(1, 1),
        metavar="I/N",
        help="part I of N, for jobs that know nothing of each other",
    )
    args = parser.parse_args(arguments)
    if not 0 <= args.threshold <= 1:
        parser.error(f"Expected a --threshold from 0 to 1, got {args.threshold}.")
    return args


def parse_part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"expected I/N such as 3/8, got {text!r}")
    return int(match[1]), int(match[2])


def on_main(state: PartialState, function: Callable[[], Any]) -> Any:
    """What `function` returns on the main process, on all; an error ends all, and the main one says it."""
    result, error = None, None
    if state.is_main_process:
        try:
            result = function()
        except (ValueError, OSError) as caught:
            error = str(caught)
    result, error = broadcast_object_list([result, error])
    if error is None:
        return result
    raise ValueError(error) if state.is_main_process else SystemExit(1)


# --- Reading ----------------------------------------------------------------------------------------------------------


class LoadedRows:
    """The rows of a dataset that lies in the cache."""

    def __init__(self, dataset: datasets.Dataset):
        self.features, self.num_rows = dataset.features, len(dataset)
        self.dataset = dataset
        for name, feature in dataset.features.items():
            if isinstance(feature, datasets.Image):
                self.dataset = self.dataset.cast_column(name, datasets.Image(decode=False))

    def read(self, start: int, stop: int, columns: list[str]) -> Iterator[dict[str, Any]]:
        return iter(self.dataset.select_columns(columns).select(range(start, stop)))


class ParquetRows:
    """The rows of Parquet files, here or on the Hub, in the files' order. Only the row groups asked for are read."""

    def __init__(self, files: list[str], group_sizes: list[list[int]], features: datasets.Features):
        self.features, self.files, self.group_sizes = features, files, group_sizes
        self.num_rows = sum(map(sum, group_sizes))

    def read(self, start: int, stop: int, columns: list[str]) -> Iterator[dict[str, Any]]:
        first_rows = [0, *accumulate(map(sum, self.group_sizes))]
        for file, sizes, first_row in zip(self.files, self.group_sizes, first_rows):
            ends = [*accumulate(sizes, initial=first_row)]
            groups = [index for index in range(len(sizes)) if ends[index] < stop and ends[index + 1] > start]
            if not groups:
                continue
            with fsspec.open(file, "rb") as opened:
                row = ends[groups[0]]
                for batch in pq.ParquetFile(opened).iter_batches(ROWS_PER_READ, groups, columns):
                    low, high = max(start - row, 0), min(stop - row, len(batch))
                    yield from batch.slice(low, max(high - low, 0)).to_pylist()
                    row += len(batch)


Rows = LoadedRows | ParquetRows


def open_rows(args: argparse.Namespace, state: PartialState) -> tuple[Rows, str, str]:
    """The rows, the split's name and a fingerprint of the files that they are in."""
    if args.data.lower().endswith(SUFFIXES):
        dataset, fingerprint = on_main(state, lambda: read_sentence_file(args))
        return LoadedRows(dataset), args.split or "sentences", fingerprint
    split, files, fingerprint, features = on_main(state, lambda: find_split(args))
    if args.streaming:
        group_sizes, features = on_main(state, lambda: read_footers(files, features))
        return ParquetRows(files, group_sizes, features), split, fingerprint
    with state.local_main_process_first():
        dataset = load_prepared(args.data, split, config_name=args.config_name, revision=args.data_revision)
    return LoadedRows(dataset), split, fingerprint


def read_sentence_file(args: argparse.Namespace) -> tuple[datasets.Dataset, str]:
    """The rows of own sentences, and a fingerprint of them and their photos."""
    dataset = load_sentences(args.data, args.image_dir)
    columns = [dataset["file_name"][:], dataset["texts"][:]]
    photos = fingerprint_files([image["path"] for image in dataset["image"]])
    return dataset, hashlib.sha256(json.dumps([*columns, photos]).encode()).hexdigest()


def find_split(args: argparse.Namespace) -> tuple[str, list[str], str, datasets.Features | None]:
    data_files, features = find_data_files(args.data, args.config_name, args.data_revision)
    split = args.split or (next(iter(data_files)) if len(data_files) == 1 else None)
    if split not in data_files:
        raise ValueError(f"Expected --split to be one of {', '.join(data_files)}, got {args.split}.")
    return split, data_files[split], fingerprint_files(data_files[split]), features


def fingerprint_files(files: list[str]) -> str:
    """A hash of names and sizes, wherever a folder lies; names on the Hub have the commit in them."""
    identities = [[Path(file).name, os.path.getsize(file)] if os.path.isfile(file) else [file] for file in files]
    return hashlib.sha256(json.dumps(identities).encode()).hexdigest()


def read_footers(files: list[str], features: datasets.Features | None) -> tuple[list[list[int]], datasets.Features]:
    """The sizes of each file's row groups, and the features."""
    if not are_parquet(files):
        raise ValueError(
            "Expected Parquet files with --streaming, got others. Leave it out, or name the Hub's own conversion"
            " with --data_revision refs/convert/parquet."
        )

    def read(name: str) -> tuple[list[int], pa.Schema]:
        with fsspec.open(name, "rb") as opened:
            file = pq.ParquetFile(opened)
            metadata = file.metadata
            sizes = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
            return sizes, file.schema_arrow

    footers = thread_map(read, files, max_workers=NUM_FILE_READERS, desc="Files", unit="file", disable=len(files) < 20)
    return [sizes for sizes, _ in footers], features or datasets.Features.from_arrow_schema(footers[0][1])


# --- Columns ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Columns:
    """Where images, ids and expressions are in a row, and what the rows of masks are made of."""

    image: str
    text: str
    ids: tuple[str, ...]
    mask_features: datasets.Features

    @property
    def names(self) -> list[str]:
        return [self.image, self.text, *self.ids]


def find_columns(features: datasets.Features, image_column: str, text_column: str | None) -> Columns:
    """
    Raises:
        ValueError: for columns that are not there, or are of another kind.
    """
    text = text_column or next((name for name in ("references", "texts", "text") if name in features), "text")
    missing = [name for name in (image_column, text) if name not in features]
    if missing:
        raise ValueError(
            f"The data has no column {' and no '.join(missing)}, but {', '.join(features)}: see --image_column and"
            " --text_column."
        )
    element = getattr(features[text], "feature", features[text])  # of a list
    has_references = isinstance(element, dict) and {"ref_id", "expressions"} <= set(element)
    if not has_references and getattr(element, "dtype", None) not in ("string", "large_string"):
        raise ValueError(f"Expected references, sentences or lists of them in {text!r}, got {features[text]}.")
    ids = [name for name in ("image_id", "file_name") if isinstance(features.get(name), datasets.Value)]
    numbers = ["row", *(["ref_id", "sent_id"] if has_references else []), "text_index"]
    mask_features = {name: datasets.Value("int64") for name in numbers} | {name: features[name] for name in ids}
    mask_features |= {"text": datasets.Value("string"), "score": datasets.Value("float32"), "mask": MASK_FEATURE}
    mask_features |= {"unknown_words": datasets.List(datasets.Value("string")), "truncated": datasets.Value("bool")}
    return Columns(image_column, text, tuple(ids), datasets.Features(mask_features))


def list_expressions(value: Any) -> list[dict[str, Any]]:
    """The expressions about an image, with their ids, from whatever is in the text column; `None` is none."""
    if value is None or isinstance(value, str):
        expressions = [] if value is None else [{"text": value}]
    elif value and isinstance(value[0], dict):
        expressions = [
            {"ref_id": reference["ref_id"], **expression}
            for reference in value
            for expression in reference["expressions"]
        ]
    else:
        expressions = [{"text": text} for text in value]
    return [{**expression, "text_index": index} for index, expression in enumerate(expressions)]


# --- From rows to masks -----------------------------------------------------------------------------------------------


@dataclass
class Prepared:
    """A row that is ready for the model; `inputs` is `None` if there is nothing to ask."""

    ids: dict[str, Any]
    expressions: list[dict[str, Any]]
    inputs: BatchFeature | None = None
    lost_words: list[dict[str, list[str]]] = field(default_factory=list)
    bad_images: list[str] = field(default_factory=list)
    bad_texts: list[str] = field(default_factory=list)


def prepare_row(processor: Any, columns: Columns, numbered_row: tuple[int, dict[str, Any]]) -> Prepared:
    number, row = numbered_row
    ids = {"row": number, **{name: row[name] for name in columns.ids}}
    name = ", ".join(f"{key} {value}" for key, value in ids.items())
    prepared = Prepared(ids, [])
    for expression in list_expressions(row[columns.text]):
        text = expression["text"]
        if text and split_expression(text):
            prepared.expressions.append(expression)
        else:
            prepared.bad_texts.append(f"{name}: text {expression['text_index']} has no words: {text!r}")
    texts = [expression["text"] for expression in prepared.expressions]
    if texts:
        try:
            prepared.inputs = processor(images=decode_image(row[columns.image]), text=texts, return_tensors="pt")
            prepared.lost_words = processor.find_lost_words(texts)
        except ValueError as error:  # the image's: the texts were looked at
            prepared.bad_images = [f"{name}: {error}"]
        for expression, lost in zip(prepared.expressions, prepared.lost_words):
            expression |= {"unknown_words": lost["unknown_words"], "truncated": bool(lost["cut_words"])}
    return prepared


def decode_image(value: Any) -> Image.Image:
    """
    Raises:
        BadImage: for an image that is missing or cannot be decoded.
        OSError: for a disk or a network that failed.
    """
    if isinstance(value, (bytes, str)):
        value = {
            "bytes": value if isinstance(value, bytes) else None,
            "path": value if isinstance(value, str) else None,
        }
    if value is None or (value["bytes"] is None and value["path"] is None):
        raise BadImage("missing")
    try:
        return datasets.Image().decode_example(value)
    except FileNotFoundError as error:
        raise BadImage(f"missing ({error.filename})") from None
    except UnidentifiedImageError:
        raise BadImage("cannot be decoded (not an image)") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises nearly anything on a damaged file, but sets errno on none
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise BadImage(f"cannot be decoded ({error})") from error


def run_ahead(pool: ThreadPoolExecutor, tasks: Iterable[Callable[[], Any]], number: int) -> Iterator[Any]:
    """The results of the tasks in their order, with up to `number` under way in the pool."""
    waiting: deque = deque()
    for task in tasks:
        waiting.append(pool.submit(task))
        if len(waiting) > number:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def prepare_rows(
    rows: Iterator[dict[str, Any]],
    start: int,
    prepare: Callable[[tuple[int, dict]], Prepared],
    num_workers: int,
    ahead: int,
) -> Iterator[Prepared]:
    """Read in one thread and prepare in others, while the model works."""
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(num_workers) as pool:
        numbered = enumerate(rows, start)
        read = takewhile(lambda row: row is not _END, run_ahead(reader, repeat(partial(next, numbered, _END)), ahead))
        yield from run_ahead(pool, (partial(prepare, row) for row in read), ahead)


class Predictor:
    """A model and all that it takes to go from rows to rows of masks."""

    def __init__(self, model: Any, processor: Any, rows: Rows, columns: Columns, args: argparse.Namespace):
        self.model, self.processor, self.rows, self.columns, self.args = model, processor, rows, columns, args

    def predict(self, start: int, stop: int) -> Iterator[tuple[list[Prepared], list[dict[str, Any]]]]:
        """The masks of a range of rows, a batch at a time, with the rows that they belong to."""
        args = self.args
        rows = self.rows.read(start, stop, self.columns.names)
        prepare = partial(prepare_row, self.processor, self.columns)
        prepared = prepare_rows(rows, start, prepare, args.num_workers, max(args.batch_size, 2 * args.num_workers))
        while batch := list(islice(prepared, args.batch_size)):
            bad = [problem for row in batch for problem in (*row.bad_images, *row.bad_texts)]
            if bad and not args.skip_bad:
                listing = "\n".join(f"  {problem}" for problem in bad)
                raise BadImage(f"Bad rows, which --skip_bad leaves out and lists:\n{listing}")
            yield batch, self._predict_batch([row for row in batch if row.inputs is not None])

    def _predict_batch(self, batch: list[Prepared]) -> list[dict[str, Any]]:
        if not batch:
            return []
        args, inputs = self.args, collate([row.inputs for row in batch])
        results = predict_batch(self.model, self.processor, inputs, args.expressions_per_batch, args.threshold)
        masks = []
        try:
            for row in batch:
                for expression, result in zip(row.expressions, results):
                    mask = encode_mask(result["mask"].cpu().numpy())
                    masks.append({**row.ids, **expression, "score": result["score"], "mask": mask})
        except ValueError as error:  # logits that are not finite
            raise ValueError(f"Rows {batch[0].ids['row']} to {batch[-1].ids['row']}: {error}") from error
        return masks


def collate(inputs: list[Any]) -> BatchFeature:
    """Join the inputs of one image each; `image_indices` then count the images of the batch."""
    batch = {name: torch.cat([item[name] for item in inputs]) for name in inputs[0]}
    counts = torch.tensor([len(item["input_ids"]) for item in inputs])
    return BatchFeature({**batch, "image_indices": torch.arange(len(inputs)).repeat_interleave(counts)})


# --- Shards -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """A file of masks, and the rows of the dataset that they are of."""

    path: Path
    start: int
    stop: int


def plan_shards(folder: Path, split: str, num_rows: int, images_per_shard: int) -> list[Shard]:
    paths = shard_paths(folder, split, num_rows, images_per_shard)
    if len(paths) > MAX_SHARDS:
        raise ValueError(f"{len(paths):,} shards are more than {MAX_SHARDS:,}: raise --images_per_shard.")
    starts = range(0, num_rows, images_per_shard)
    return [Shard(path, start, min(start + images_per_shard, num_rows)) for path, start in zip(paths, starts)]


def read_content(shard: Shard, settings_hash: str) -> dict[str, Any] | None:
    """What a shard says about itself; `None` if it is not there, damaged, or not of these rows and settings."""
    try:
        metadata = pq.read_metadata(shard.path)
    except (OSError, pa.ArrowInvalid):
        return None
    content = json.loads((metadata.metadata or {}).get(CONTENT_KEY, b"{}"))
    expected = {"rows": [shard.start, shard.stop], "settings": settings_hash, "num_masks": metadata.num_rows}
    return content if expected.items() <= content.items() else None


def read_contents(shards: list[Shard], settings_hash: str) -> list[dict[str, Any] | None]:
    read = partial(read_content, settings_hash=settings_hash)
    return thread_map(
        read, shards, max_workers=NUM_FILE_READERS, desc="Shards", unit="shard", disable=len(shards) < 1000
    )


def find_unfinished(shards: list[Shard], settings_hash: str, skip_bad: bool) -> list[Shard]:
    """The shards that have to be made: those that leave out bad rows are made again where that is not wanted."""
    contents = read_contents(shards, settings_hash)
    return [
        shard
        for shard, content in zip(shards, contents)
        if content is None or not (skip_bad or not (content["bad_images"] or content["bad_texts"]))
    ]


def write_shard(predictor: Predictor, shard: Shard, settings_hash: str, progress: "Progress") -> None:
    """Write one Parquet file under a temporary name, and move it when it is whole."""
    schema = predictor.columns.mask_features.arrow_schema
    content: dict[str, Any] = {"rows": [shard.start, shard.stop], "settings": settings_hash, "num_masks": 0}
    content |= {"num_images": 0, "bad_images": [], "bad_texts": [], **{key: Counter() for key in LOST_WORDS}}
    masks: list[dict[str, Any]] = []
    with (
        replace_file(shard.path, name_part(predictor.args.part)) as temporary,
        pq.ParquetWriter(temporary, schema, compression="zstd") as writer,
    ):
        for batch, new_masks in predictor.predict(shard.start, shard.stop):
            masks += new_masks
            content["num_masks"] += len(new_masks)
            content["num_images"] += sum(not row.bad_images for row in batch)
            for key in ("bad_images", "bad_texts"):
                content[key] += [problem for row in batch for problem in getattr(row, key)]
            for key in LOST_WORDS:
                content[key].update(word for row in batch for lost in row.lost_words for word in lost[key])
            progress.update(len(batch), len(new_masks), sum(len(row.bad_images) for row in batch))
            if len(masks) >= MASKS_PER_GROUP:
                writer.write_table(pa.Table.from_pylist(masks, schema=schema))
                masks = []
        if masks:
            writer.write_table(pa.Table.from_pylist(masks, schema=schema))
        if content["num_images"] + len(content["bad_images"]) != shard.stop - shard.start:
            raise ValueError(f"The dataset ended before row {shard.stop}: it was changed since it was opened.")
        writer.add_key_value_metadata({CONTENT_KEY: json.dumps(content)})


class Progress:
    """A bar over this process's images, with its rates, and a count of all processes' shards; the main process's."""

    def __init__(self, shards: list[Shard], num_all_shards: int, state: PartialState):
        total = sum(shard.stop - shard.start for shard in shards)
        label = "Images" if state.num_processes == 1 else f"Images of process 1 of {state.num_processes}"
        layout = "{desc}: {n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}"
        self.bar = tqdm(total=total, desc=label, bar_format=layout, disable=not state.is_main_process)
        self.images = self.masks = self.bad_images = self.shards = 0
        self.num_all_shards, self.begun = num_all_shards, time.monotonic()

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self.begun, 1e-9)

    def update(self, images: int, masks: int, bad_images: int) -> None:
        self.images, self.masks = self.images + images, self.masks + masks
        self.bad_images += bad_images
        rates = f"{self.images / self.seconds:.3g} images/s, {self.masks / self.seconds:.3g} pairs/s"
        shards = f"{self.shards} of {self.num_all_shards} shards"
        self.bar.set_postfix_str(f"{rates}, {self.bad_images} bad, {shards}", refresh=False)
        self.bar.update(images)

    def count_shards(self, folder: Path) -> None:
        if not self.bar.disable:
            self.shards = sum(1 for _ in folder.glob("[!.]*.parquet"))


# --- Settings and summary ---------------------------------------------------------------------------------------------


def fingerprint_model(model: Any, processor: Any) -> str:
    """A hash of the weights, the configuration and the processor, wherever they were loaded from."""
    parts = [model.config.to_dict(), processor.image_processor.to_dict()]
    described = [{name: value for name, value in part.items() if name not in IRRELEVANT} for part in parts]
    described.append(processor.tokenizer.backend_tokenizer.to_str())
    digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def check_settings(output_dir: Path, settings: dict[str, Any]) -> None:
    """Record what the folder is made with, or check that it is the same as before."""
    path = output_dir / SETTINGS_NAME
    (output_dir / "data").mkdir(parents=True, exist_ok=True)
    if not path.exists():
        if any((output_dir / "data").glob("*.parquet")):
            raise ValueError(f"{output_dir} has Parquet files of another origin: choose an empty folder.")
        write_json(path, settings)
        return
    earlier = json.loads(path.read_text(encoding="utf-8"))
    differences = [
        f"  {key}: then {earlier.get(key)}, now {value}"
        for key, value in settings.items()
        if earlier.get(key) != value and key not in ("model", "data")  # they may be moved
    ]
    if differences:
        listing = "\n".join(differences)
        raise ValueError(
            f"{output_dir} was begun with other settings; choose another folder or the same settings:\n{listing}"
        )


def hash_settings(settings: dict[str, Any]) -> str:
    content = {key: value for key, value in settings.items() if key not in ("model", "data")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_json(path: Path, content: dict[str, Any]) -> None:
    with replace_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def sum_counts(counts: Iterable[dict[str, int]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return total


def summarize(
    output_dir: Path, shards: list[Shard], settings: dict[str, Any], last_run: dict[str, Any]
) -> dict[str, Any] | None:
    """
    Check that all shards are there, and write what the folder holds; `None` while shards of other parts are missing.
    """
    contents = read_contents(shards, hash_settings(settings))
    found = [content for content in contents if content is not None]
    if len(found) < len(shards):
        return None
    summary = {
        "images": sum(content["num_images"] for content in found),
        "pairs": sum(content["num_masks"] for content in found),
        "shards": len(shards),
        "bytes": sum(shard.path.stat().st_size for shard in shards),
        "num_bad_images": sum(len(content["bad_images"]) for content in found),
        "num_bad_texts": sum(len(content["bad_texts"]) for content in found),
        "settings": settings,
        "last_run": last_run,
        "bad_images": [problem for content in found for problem in content["bad_images"]],
        "bad_texts": [problem for content in found for problem in content["bad_texts"]],
        # {word: number of texts}, the most frequent first
        **{key: dict(sum_counts(content[key] for content in found).most_common(MAX_LOST_WORDS)) for key in LOST_WORDS},
    }
    if last_run["images"] or not (output_dir / SUMMARY_NAME).exists():
        write_json(output_dir / SUMMARY_NAME, summary)
    return summary


# --- The run ----------------------------------------------------------------------------------------------------------


def load_model(args: argparse.Namespace, state: PartialState, device: torch.device) -> tuple[Any, Any]:
    with state.local_main_process_first():
        options = {"revision": args.revision} if args.revision else {}
        dtype = getattr(torch, args.dtype)
        model = AutoModelForImageSegmentation.from_pretrained(args.model, dtype=dtype, **options)
        processor = AutoProcessor.from_pretrained(args.model, **options)
    return model.eval().to(device), processor


def describe(args: argparse.Namespace, predictor: Predictor, split: str, files: str, num_rows: int) -> dict[str, Any]:
    """All that decides on what the shards hold, but for the rounding of batches of another size."""
    return {
        "version": VERSION,
        "model": args.model,
        "model_fingerprint": fingerprint_model(predictor.model, predictor.processor),
        "data": args.data,
        "split": split,
        "files_fingerprint": files,
        "num_images": num_rows,
        "images_per_shard": args.images_per_shard,
        "columns": predictor.columns.names,
        "dtype": args.dtype,
        "threshold": args.threshold,
    }


def make_shards(
    predictor: Predictor, shards: list[Shard], num_all_shards: int, settings_hash: str, state: PartialState
) -> dict[str, Any]:
    """Make this process's shards among those that are missing; returns what all processes did."""
    todo = on_main(state, lambda: find_unfinished(shards, settings_hash, predictor.args.skip_bad))
    mine = todo[state.process_index :: state.num_processes]
    progress = Progress(mine, num_all_shards, state)
    with progress.bar:
        for shard in mine:
            progress.count_shards(shard.path.parent)
            write_shard(predictor, shard, settings_hash, progress)
    counts = gather_object([(progress.images, progress.masks)])  # waits for all
    images, pairs = map(sum, zip(*counts))
    seconds, device = progress.seconds, predictor.model.device
    return {
        "images": images,
        "pairs": pairs,
        "seconds": round(seconds, 2),
        "images_per_second": round(images / seconds, 3),
        "pairs_per_second": round(pairs / seconds, 3),
        "num_processes": state.num_processes,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def finish(
    args: argparse.Namespace,
    shards: list[Shard],
    mine: list[Shard],
    settings: dict[str, Any],
    last_run: dict[str, Any],
) -> dict[str, Any] | None:
    """The summary, once all shards are there; `None` after a part of them."""
    missing = find_unfinished(mine, hash_settings(settings), args.skip_bad)
    if missing:
        names = ", ".join(shard.path.name for shard in missing[:20])
        raise ValueError(f"{len(missing)} shards are missing or damaged; run the same command again: {names} ...")
    summary = summarize(args.output_dir, shards, settings, last_run)
    if summary is not None:
        remove_leftovers(args.output_dir, args.part)
    return summary


def name_part(part: tuple[int, int]) -> str:
    return f"{part[0]}-of-{part[1]}"


def lock_part(output_dir: Path, name: str) -> FileLock:
    return FileLock(output_dir / f".prediction-{name}.lock", timeout=0)


def remove_leftovers(output_dir: Path, part: tuple[int, int]) -> None:
    """Remove what killed runs left: the temporary files of this part, and of all parts that no run is making."""
    for path in output_dir.glob(".prediction-*.lock"):
        name = path.stem.removeprefix(".prediction-")
        with suppress(Timeout), nullcontext() if name == name_part(part) else lock_part(output_dir, name):
            for leftover in (output_dir / "data").glob(f".*.{name}.*.tmp"):
                leftover.unlink(missing_ok=True)


def run(args: argparse.Namespace) -> dict[str, Any] | None:
    """Predict all that is missing; returns the summary on every process, or `None` while other parts are missing."""
    state, device = start_processes(args, timeout=PATIENCE)
    rows, split, files = open_rows(args, state)
    columns = find_columns(rows.features, args.image_column, args.text_column)
    predictor = Predictor(*load_model(args, state, device), rows, columns, args)
    num_rows = min(rows.num_rows, args.max_images or rows.num_rows)
    settings = describe(args, predictor, split, files, num_rows)
    shards = plan_shards(args.output_dir / "data", split, num_rows, args.images_per_shard)
    part, num_parts = args.part
    mine = shards[part - 1 :: num_parts]

    lock = lock_part(args.output_dir, name_part(args.part))
    try:
        on_main(state, lambda: begin(lock, args.output_dir, settings))
        last_run = make_shards(predictor, mine, len(shards), hash_settings(settings), state)
        summary = on_main(state, lambda: finish(args, shards, mine, settings, last_run))
    finally:
        lock.release()
    if summary is not None and state.is_main_process:
        warning = predictor.processor.describe_lost_words([{key: list(summary[key]) for key in LOST_WORDS}])
        if warning:
            logger.warning(warning)
    return summary


def begin(lock: FileLock, output_dir: Path, settings: dict[str, Any]) -> None:
    output_dir.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(f"Another run writes to {output_dir}: wait for it, or stop it.") from None
    check_settings(output_dir, settings)


def report(summary: dict[str, Any] | None, args: argparse.Namespace) -> None:
    if summary is None:
        print(f"Part {args.part[0]} of {args.part[1]} is there. The part that comes last writes {SUMMARY_NAME}.")
        return
    last_run = summary["last_run"]
    print(
        f"{summary['pairs']:,} masks of {summary['images']:,} images in {summary['shards']:,} shards,"
        f" {summary['bytes'] / 1e6:,.1f} MB; left out {summary['num_bad_images']:,} images and"
        f" {summary['num_bad_texts']:,} texts, listed in {args.output_dir / SUMMARY_NAME}\n"
        f"This run: {last_run['images']:,} images in {last_run['seconds']:,} s, {last_run['images_per_second']} images/s,"
        f" {last_run['pairs_per_second']} pairs/s, processes: {last_run['num_processes']}, on {last_run['device']}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_args(arguments)
    try:
        summary = run(args)
    except (ValueError, OSError) as error:  # settings that differ, bad images, no such model, ...
        raise SystemExit(str(error)) from error
    if PartialState().is_main_process:
        report(summary, args)
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main()
