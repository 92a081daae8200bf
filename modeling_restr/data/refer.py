"""
The layout of REFER (https://github.com/lichengunc/refer), in which RefCOCO, RefCOCO+, RefCOCOg and RefCLEF are
published: `refs(SPLITBY).p`, a pickle of references, next to `instances.json`, the objects in COCO's format.
"""

from __future__ import annotations

import codecs
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from .canonical import AnnotatedImage, AnnotatedReference, build_dataset, check_images
from .image_files import image_finder
from .records import ANYTHING, ID, LIST, TEXT, Kind, check_fields, index_records, read_json


# {dataset: authors of its splits, the default first}
DATASETS = {
    "refcoco": ("unc", "google"),
    "refcoco+": ("unc",),
    "refcocog": ("umd", "google"),
    "refclef": ("unc", "berkeley"),
}

REF_FIELDS = {"ref_id": ID, "ann_id": ID, "image_id": ID, "category_id": ID, "split": TEXT, "sentences": LIST}
SENTENCE_FIELDS = {"sent_id": ID, "sent": TEXT}
# Sizes and segmentations of any kind are accepted here and compared with the image when its row is built.
_INSTANCES_FIELDS = {
    "images": {"id": ID, "file_name": TEXT, "height": ANYTHING, "width": ANYTHING},
    "annotations": {"id": ID, "image_id": ID, "segmentation": ANYTHING},
    "categories": {"id": ID, "name": TEXT},
}


def load_refer(
    annotation_dir: str | Path,
    image_dir: str | Path,
    dataset: str = "refcoco",
    split_by: str = "unc",
    split: str = "val",
    skip_bad: bool = False,
) -> datasets.Dataset:
    """
    Load a dataset of the RefCOCO family in the canonical form, one row per image. [`read_refer`] explains the arguments.

    Raises:
        ValueError: As [`read_refer`]; or images are missing, damaged or of another size than the annotations say. The
            message lists them. `skip_bad=True` leaves them out with a warning.
    """
    return build_dataset(read_refer(annotation_dir, image_dir, dataset, split_by, split), skip_bad=skip_bad)


def read_refer(
    annotation_dir: str | Path,
    image_dir: str | Path,
    dataset: str = "refcoco",
    split_by: str = "unc",
    split: str = "val",
) -> list[AnnotatedImage]:
    """
    Read the annotations of a dataset in REFER's layout. Images and references are in the order of the file.

    The text of an expression is its `sent`: REFER's cleaned form, in lower case and without punctuation, on which the
    published results are based (`raw` is the text as typed). The pickle may contain containers, numbers and text only,
    and no code in it is run.

    Args:
        annotation_dir: The folder of `refs(SPLITBY).p` and `instances.json`, or the one above it.
        image_dir: The folder of the images, or one above it: `train2014/` and the folders of REFER's instructions are
            searched. COCO 2017's names (without `COCO_train2014_`) are also found.
        dataset: "refcoco", "refcoco+", "refcocog" or "refclef".
        split_by: Author of the splits: "unc", "google" (refcoco and refcocog), "umd" (refcocog) or "berkeley"
            (refclef).
        split: One of the file's splits. As in REFER, "testA" includes references in several test sets ("testAB"), and
            "test" is all of them.

    Returns:
        Images without pixels, for [`build_dataset`].

    Raises:
        ValueError: The dataset, its file or the split does not exist (the message lists those that do), or the files
            are not as expected.
    """
    check_split_by(dataset, split_by)
    folder = find_annotation_dir(annotation_dir, [dataset])
    path = find_file(folder, "refs({}).p", split_by)
    refs = select_split(check_refs(load_plain_pickle(path), path), split, path)
    return group_by_image(refs, Instances.read(folder / "instances.json"), image_dir, _build_reference)


def check_split_by(dataset: str, split_by: str | None = None) -> str:
    """Check an author of splits, by default the first in `DATASETS`; `ValueError` if they did not split the dataset."""
    if dataset not in DATASETS:
        raise ValueError(f"Expected a dataset of {', '.join(DATASETS)}, got {dataset!r}.")
    if split_by not in (None, *DATASETS[dataset]):
        raise ValueError(f"{dataset} was split by {' and '.join(DATASETS[dataset])}, got split_by={split_by!r}.")
    return split_by or DATASETS[dataset][0]


def _build_reference(ref: dict[str, Any], instances: Instances) -> AnnotatedReference:
    annotation = instances.annotation_of(ref, ref["ann_id"])
    return AnnotatedReference(
        ref_id=ref["ref_id"],
        ann_id=ref["ann_id"],
        category=instances.category_of(ref, ref["category_id"]),
        segmentation=parts_of(annotation),
        expressions=expressions_of(ref),
        bbox=annotation.get("bbox"),
    )


class _PlainUnpickler(pickle._Unpickler):
    """
    Without classes and functions, a pickle can build nothing but containers, numbers and text.

    This is the class in Python's own code. The one in C allocates up to 64 GB for a place in the memo that a damaged
    file names. It also allocates what a bytearray claims to hold, before it reads it: annotations have none.
    """

    dispatch = {code: load for code, load in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]}

    def find_class(self, module: str, name: str) -> Any:
        advice = "write NumPy's numbers as int() and float()" if module.startswith("numpy") else "do not trust it"
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which annotations do not need: {advice}")


def _decode_as_windows_1252(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return error.object[error.start : error.end].decode("cp1252", errors="replace"), error.end


codecs.register_error("restr_windows_1252", _decode_as_windows_1252)


def load_plain_pickle(path: Path) -> Any:
    """
    Load a pickle of plain containers, numbers and text. No code in it is run.

    Python 2 wrote two kinds of text: `unicode`, and `str`, which is bytes of unknown encoding. `str` is read as UTF-8,
    and what is not UTF-8 in it as Windows-1252.

    Raises:
        ValueError: The pickle asks for anything else (the message names it), or is damaged.
    """
    with open(path, "rb") as file:
        try:
            return _PlainUnpickler(file, encoding="utf-8", errors="restr_windows_1252").load()
        except pickle.UnpicklingError as error:
            raise ValueError(f"{path} was refused: {error}.") from error
        except Exception as error:  # a damaged pickle raises nearly anything
            raise ValueError(f"{path} was refused: it is damaged ({type(error).__name__}: {error}).") from error


def find_annotation_dir(annotation_dir: str | Path, names: Sequence[str]) -> Path:
    """
    Find the folder of a dataset by one of several names: below `annotation_dir`, or that folder itself. `ValueError` if
    there is none, or if the folder is named after another dataset.
    """
    folder = Path(annotation_dir)
    for name in names:
        if (folder / name).is_dir():
            return folder / name
    if not (folder / "instances.json").is_file() or folder.absolute().name in DATASETS.keys() - set(names):
        raise ValueError(f"Expected {folder} to be the folder of {names[0]}, with instances.json, or to contain it.")
    return folder


def find_file(folder: Path, pattern: str, key: str) -> Path:
    """Find the file named `pattern`, with `key` in place of {}, in a folder; `ValueError` if there is none."""
    path = folder / pattern.format(key)
    if not path.is_file():
        present = ", ".join(sorted(file.name for file in folder.glob(pattern.format("*")))) or "none"
        raise ValueError(f"Expected {path.name} in {folder}, got {present}.")
    return path


def check_refs(refs: Any, path: Path, fields: Mapping[str, Kind] = REF_FIELDS) -> list[dict[str, Any]]:
    """Return the references of a file unchanged; `ValueError`, with the reference and the field, for anything else."""
    if not isinstance(refs, list):
        raise ValueError(f"Expected {path} to hold a list of references, got {type(refs).__name__}.")
    for index, ref in enumerate(refs):
        check_fields(ref, fields, f"{path}, reference {index}")
        check_sentences(ref, f"{path}, ref_id {ref['ref_id']}")
    return refs


def check_sentences(ref: dict[str, Any], place: str) -> None:
    """Check that each sentence of a reference has an id and a text; raises `ValueError` as [`check_fields`]."""
    for sentence in ref["sentences"]:
        check_fields(sentence, SENTENCE_FIELDS, f"{place}, sentences")


def select_split(refs: Sequence[dict[str, Any]], split: str, path: Path) -> list[dict[str, Any]]:
    """The references of a split; `ValueError` if there are none."""
    selected = [ref for ref in refs if _belongs_to(ref["split"], split)]
    if not selected:
        found = ", ".join(sorted({ref["split"] for ref in refs}))
        raise ValueError(f"{path} has no split {split!r}; it has: {found}.")
    return selected


def _belongs_to(ref_split: str, split: str) -> bool:
    """RefCLEF (unc) has references in several test sets, such as "testAB". REFER counts them in each of these."""
    if split == "test":
        return ref_split.startswith("test")
    if split in ("testA", "testB", "testC"):
        return ref_split.startswith("test") and split[-1] in ref_split.removeprefix("test")
    return ref_split == split


def expressions_of(ref: dict[str, Any]) -> tuple[tuple[int, str], ...]:
    """(sent_id, sent) of all sentences."""
    return tuple((sentence["sent_id"], sentence["sent"]) for sentence in ref["sentences"])


def parts_of(annotation: dict[str, Any]) -> list[Any]:
    """The polygons or RLEs of an object. If there are none, one empty part makes its image a bad one."""
    segmentation = annotation["segmentation"] or [[]]
    return segmentation if isinstance(segmentation, list) else [segmentation]


@dataclass(frozen=True)
class Instances:
    """The records of an `instances.json` by id. They are checked when a reference uses them."""

    path: Path
    images: dict[int, dict[str, Any]]
    annotations: dict[int, dict[str, Any]]
    categories: dict[int, dict[str, Any]]

    @classmethod
    def read(cls, path: Path) -> Instances:
        content = read_json(path)
        return cls(path, **{table: index_records(content, table, path) for table in _INSTANCES_FIELDS})

    def _find(self, table: str, key: int, ref: dict[str, Any]) -> dict[str, Any]:
        records = getattr(self, table)
        if key not in records:
            raise ValueError(f"ref_id {ref['ref_id']}: {key} is not among the {table} of {self.path}.")
        check_fields(records[key], _INSTANCES_FIELDS[table], f"{self.path}, {key} of the {table}")
        return records[key]

    def image_of(self, ref: dict[str, Any]) -> dict[str, Any]:
        return self._find("images", ref["image_id"], ref)

    def annotation_of(self, ref: dict[str, Any], ann_id: int) -> dict[str, Any]:
        annotation = self._find("annotations", ann_id, ref)
        if annotation["image_id"] != ref["image_id"]:
            raise ValueError(
                f"ref_id {ref['ref_id']} is about image {ref['image_id']}, but its annotation {ann_id} in {self.path} "
                f"is about image {annotation['image_id']}."
            )
        return annotation

    def category_of(self, ref: dict[str, Any], category_id: int) -> str:
        return self._find("categories", category_id, ref)["name"]


def group_by_image(
    refs: Iterable[dict[str, Any]],
    instances: Instances,
    image_dir: str | Path,
    build_reference: Callable[[dict[str, Any], Instances], AnnotatedReference],
) -> list[AnnotatedImage]:
    """
    The images in the order in which `refs` first name them, each with its references. `ValueError` if references and
    instances do not fit, or if two images share a file.
    """
    find_image = image_finder(image_dir)
    records: dict[int, dict[str, Any]] = {}
    references: dict[int, list[AnnotatedReference]] = {}
    for ref in refs:
        records.setdefault(ref["image_id"], instances.image_of(ref))
        references.setdefault(ref["image_id"], []).append(build_reference(ref, instances))
    images = [
        AnnotatedImage(
            image_id=image_id,
            file_name=record["file_name"],
            image=find_image(record["file_name"]),
            references=tuple(references[image_id]),
            size=(record["height"], record["width"]),
            image_dir=Path(image_dir),
        )
        for image_id, record in records.items()
    ]
    check_images(images, instances.path.parent)
    return images
