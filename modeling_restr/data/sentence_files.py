"""
Reading of your own photos and sentences: a JSONL or CSV file, one sentence per line.

    {"image": "kitchen.jpg", "sentence": "the cup on the left", "mask": "masks/kitchen_1.png"}
    {"image": "kitchen.jpg", "sentence": "the cup behind the plate", "polygon": [[61, 40], [90, 40], [90, 77], [61, 77]]}

| column | holds |
|---|---|
| image | name of the photo's file, below the folder of the photos |
| sentence | referring expression about one thing in it |
| mask | name of a picture of the photo's size: 0 (black, transparent) outside, one other value inside |
| polygon | outline in pixels: [x0, y0, x1, y1, ...], [[x0, y0], [x1, y1], ...] or a list of several of the first |
| rle | COCO's run-length encoding, compressed or not: {"size": [height, width], "counts": ...} |
| box | [left, top, width, height] in pixels, where boxes may stand for masks |
| split | optional, in all lines or in none: train, val or another name |

Each line needs one of mask, polygon, rle and box, except for prediction. Other columns are ignored. In CSV, polygons,
RLEs and boxes are written as in JSON. Coordinates are in pixels of the photo as a viewer shows it.
"""

import csv
import io
import json
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import datasets
import numpy as np
from PIL import Image, ImageOps

from .canonical import AnnotatedImage, AnnotatedReference
from .coco import SPLITS, check_val_share, draw_share, split_of
from .image_files import image_finder, is_file, resolve_image
from .records import TEXT, Problems, check_fields
from .segmentation import Segmentation, are_numbers


SUFFIXES = (".csv", ".jsonl")
MASK_COLUMNS = ("mask", "polygon", "rle", "box")
NUM_ERRORS_SHOWN = 20


class Line(NamedTuple):
    """The number of a line, and its columns that have a value."""

    number: int
    columns: dict[str, Any]

    @property
    def image(self) -> str:
        """The photo's name, with slashes between folders."""
        return str(PurePosixPath(self.columns["image"].replace("\\", "/")))

    @property
    def sentence(self) -> str:
        return self.columns["sentence"]


def read_sentences(
    path: str | Path,
    image_dir: str | Path | None = None,
    *,
    mask_dir: str | Path | None = None,
    val_share: float = 0.1,
    boxes_as_masks: bool = False,
    problems: Problems | None = None,
) -> dict[str, list[AnnotatedImage]]:
    """
    Read {split: its photos} from a file of your own sentences, in the order in which the file first names them.

    Sentences about one mask of a photo refer to one object. `ref_id` and `sent_id` are line numbers.

    Args:
        path: The file, .jsonl or .csv. The docstring of this module lists its columns.
        image_dir: Folder of the photos; the file's folder by default.
        mask_dir: Folder of the masks; the file's folder by default.
        val_share: Expected share of the photos in "val", 0 to 1, if the file has no column `split`. A photo's split
            depends on its name only. At least one of several photos is in "val" unless the share is 0.
        boxes_as_masks: Whether to use a box's rectangle as a mask. A model that learns from boxes finds boxes.
        problems: Collects lines that repeat another. They are left out.

    Returns:
        Images without pixels, for [`build_dataset`]. They include photos that cannot be used or have an unusable mask:
        building their rows raises the error.

    Raises:
        ValueError: The file is not as described. The message names the lines.
    """
    path = Path(path)
    check_val_share(val_share)
    lines = _read_lines(path)
    mask_dir, image_dir = Path(mask_dir or path.parent), Path(image_dir or path.parent)
    names = dict.fromkeys(line.columns["mask"] for line in lines if "mask" in line.columns)
    masks = _Masks(_find_files(path, names, mask_dir), mask_dir, boxes_as_masks)
    references = _group_references(path, lines, masks, Problems() if problems is None else problems)
    split_of_photo = _read_splits(path, lines) or _draw_splits(list(references), val_share)
    splits: dict[str, list[AnnotatedImage]] = {split: [] for split in sorted(set(split_of_photo.values()))}
    paths = _find_files(path, references, image_dir)
    for image_id, (name, own) in enumerate(references.items(), start=1):
        image = AnnotatedImage(image_id, name, paths[name], tuple(own.values()), image_dir=image_dir)
        splits[split_of_photo[name]].append(image)
    return splits


def load_sentences(path: str | Path, image_dir: str | Path | None = None) -> datasets.Dataset:
    """
    Load a file of your own sentences for prediction, one row per photo: `image`, `file_name` and `texts`. Masks are
    ignored. Arguments and errors are as in [`read_sentences`].
    """
    path = Path(path)
    texts: dict[str, list[str]] = {}
    for line in _read_lines(path):
        texts.setdefault(line.image, []).append(line.sentence)
    paths = _find_files(path, texts, Path(image_dir or path.parent).absolute())  # read by processes elsewhere, too
    columns = {
        "image": [{"bytes": None, "path": str(found)} for found in paths.values()],
        "file_name": list(texts),
        "texts": list(texts.values()),
    }
    text = datasets.Value("string")
    features = {"image": datasets.Image(decode=False), "file_name": text, "texts": datasets.List(text)}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def _read_lines(path: Path) -> list[Line]:
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"Expected a file {' or '.join(SUFFIXES)}, got {path}.")
    if not path.is_file():
        raise ValueError(f"Expected a file {path}, found none.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8: {error}. Save it as UTF-8.") from None
    parse = _parse_csv if path.suffix.lower() == ".csv" else _parse_jsonl
    lines, errors = [], []
    for number, columns in parse(path, text):
        try:
            lines.append(_check_line(number, columns))
        except ValueError as error:
            errors.append(str(error))
    _raise_errors(path, errors)
    if not lines:
        raise ValueError(f"Expected at least one sentence in {path}, found none.")
    return lines


def _raise_errors(path: Path, errors: list[str]) -> None:
    if errors:
        more = f"\n  ... and {len(errors) - NUM_ERRORS_SHOWN:,} more" if len(errors) > NUM_ERRORS_SHOWN else ""
        listing = "\n".join(f"  {error}" for error in errors[:NUM_ERRORS_SHOWN])
        raise ValueError(f"{path} cannot be used. Correct or remove these lines:\n{listing}{more}")


def _parse_jsonl(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield number, error


def _parse_csv(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """Rows and the line that each ends in. The cells may be separated by commas, semicolons or tabs."""
    header = text.partition("\n")[0]
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # an outline may be long
    delimiter = max(",;\t", key=header.count)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        names = [name.strip() for name in next(rows, [])]
        if not {"image", "sentence"} <= set(names) or len(set(names)) < len(names):
            raise ValueError(f"{path}: expected different columns, image and sentence among them, got {names}.")
        for cells in rows:
            if len(cells) > len(names):
                advice = 'write "a sentence, with a comma"'
                yield rows.line_num, ValueError(f"got {len(cells)} cells for {len(names)} columns: {advice}")
            elif any(cells):
                yield rows.line_num, {name: cell.strip() for name, cell in zip(names, cells) if cell.strip()}
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.line_num}: not in CSV's format: {error}.") from None


def _check_line(number: int, columns: Any) -> Line:
    place = f"line {number}"
    if isinstance(columns, Exception):
        raise ValueError(f"{place}: {columns}")
    if isinstance(columns, dict):
        columns = {name: value for name, value in columns.items() if value not in (None, "")}
    check_fields(columns, {"image": TEXT, "sentence": TEXT}, place)
    check_fields(columns, {name: TEXT for name in ("mask", "split") if name in columns}, place)
    if not re.search(r"\w", columns["sentence"]):
        raise ValueError(f"{place}: expected a sentence with words, got {columns['sentence']!r}.")
    return Line(number, columns)


class _Masks:
    """Reads the masks of a file's lines. Mask files are opened when rows are built."""

    def __init__(self, paths: Mapping[str, Path], folder: Path, boxes_as_masks: bool):
        self.paths, self.folder, self.boxes_as_masks = paths, folder, boxes_as_masks

    def read(self, line: Line) -> tuple[str, Segmentation]:
        """A key that is equal for equal masks, and the segmentation; `ValueError` unless there is one valid mask."""
        given = [name for name in MASK_COLUMNS if name in line.columns]
        if len(given) != 1:
            expected = f"one of {', '.join(MASK_COLUMNS[:-1])}"
            raise ValueError(f"expected {expected}, got {' and '.join(given) or 'none of them'}.")
        (name,) = given
        value = line.columns[name]
        if name == "mask":
            return value, partial(load_mask, self.paths[value], self.folder)
        if isinstance(value, str):
            value = _parse_cell(name, value)
        key = json.dumps(value)
        if name == "box":
            value = self._box_to_polygon(value)
        elif not isinstance(value, dict if name == "rle" else list) or not value:
            expected = '{"size": [height, width], "counts": ...}' if name == "rle" else "[x0, y0, x1, y1, ...]"
            raise ValueError(f"expected {name} to be {expected}, got {reprlib.repr(value)}.")
        return key, value

    def _box_to_polygon(self, box: Any) -> list[float]:
        if not self.boxes_as_masks:
            raise ValueError(
                f"expected one of {', '.join(MASK_COLUMNS[:-1])}, got a box: boxes_as_masks takes its rectangle as mask."
            )
        if not are_numbers(box) or len(box) != 4:
            raise ValueError(f"expected box to be [left, top, width, height], got {reprlib.repr(box)}.")
        left, top, width, height = box
        return [left, top, left + width, top, left + width, top + height, left, top + height]


def _parse_cell(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"expected {name} as JSON, got {reprlib.repr(text)}: {error}.") from None


def load_mask(path: Path, folder: Path) -> np.ndarray:
    """
    Read a mask from a picture in `folder`: (height, width) bool, False where the picture is 0, black or transparent.
    `ValueError` if it cannot be read or has several values inside.
    """
    try:
        with Image.open(resolve_image(path, folder)) as opened:
            upright = ImageOps.exif_transpose(opened)
            if upright.mode not in ("L", "P", "I", "I;16"):
                black = Image.new("RGBA", upright.size, "black")
                upright = Image.alpha_composite(black, upright.convert("RGBA")).convert("RGB")
            values = np.asarray(upright)
    except FileNotFoundError:
        raise ValueError(f"The mask {path} is missing.") from None
    except Exception as error:  # Pillow raises nearly anything on a damaged file
        raise ValueError(f"The mask {path} cannot be read ({error}).") from error
    values = values.reshape(*values.shape[:2], -1)  # (height, width, channels)
    mask = values.max(axis=2) != 0
    if (values[mask] != values[mask][:1]).any():
        raise ValueError(
            f"The mask {path} must have two values, 0 outside and another one inside, got more: save one object per "
            "file as PNG, without smooth edges."
        )
    return mask


def _group_references(
    path: Path, lines: list[Line], masks: _Masks, problems: Problems
) -> dict[str, dict[str, AnnotatedReference]]:
    """{name of a photo: {key of a mask: its reference}}."""
    references: dict[str, dict[str, AnnotatedReference]] = {}
    errors = []
    for line in lines:
        try:
            key, segmentation = masks.read(line)
        except ValueError as error:
            errors.append(f"line {line.number}: {error}")
            continue
        known = references.setdefault(line.image, {})
        reference = known.get(key) or AnnotatedReference(line.number, line.number, "", segmentation, ())
        if line.sentence in (text for _, text in reference.expressions):
            problems.add(f"lines of {path.name} that repeat another, dropped", f"line {line.number}")
        else:
            known[key] = replace(reference, expressions=(*reference.expressions, (line.number, line.sentence)))
    _raise_errors(path, errors)
    return references


def _find_files(path: Path, names: Iterable[str], folder: Path) -> dict[str, Path]:
    """{name: its file in the folder, or where the file was expected}."""
    find = image_finder(folder)
    paths = {name: find(name) for name in names}
    first: dict[Path, str] = {}
    for name, found in paths.items():
        other = first.setdefault(found, name)
        if other != name and is_file(found):
            raise ValueError(
                f"{path}: expected a file in {folder} for each name, found {found} for {other} and {name}."
            )
    return paths


def _read_splits(path: Path, lines: list[Line]) -> dict[str, str]:
    """{name of a photo: its split}, empty if the file names no splits."""
    splits: dict[str, str] = {}
    errors = []
    named = [line for line in lines if "split" in line.columns]
    for line in lines if named else ():
        split = line.columns.get("split")
        if split is None or splits.setdefault(line.image, split) != split:
            expected = splits.get(line.image, "a name, as other lines have")
            errors.append(f"line {line.number}: expected split to be {expected}, got {split}.")
    _raise_errors(path, errors)
    return splits


def _draw_splits(names: list[str], val_share: float) -> dict[str, str]:
    val = SPLITS[1]
    splits = {name: split_of(name, val_share) for name in names}
    if val_share > 0 and val not in splits.values() and len(names) > 1:
        splits[min(names, key=draw_share)] = val
    return splits
