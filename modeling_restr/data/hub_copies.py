"""
Copies of the RefCOCO family on the Hugging Face Hub, read as they are.

A copy's layout is recognised by its columns, so mirrors of these are read as well:

- jxu124/refcoco, refcocoplus, refcocog: one reference per row, COCO's annotation as JSON, images by path only. The
  test split of refcoco and refcocoplus is testA. refcocog is the UMD split.
- jxu124/refcoco-benchmark: one image per row, eleven evaluation splits with names such as refcoco_unc_val.
- lmms-lab/RefCOCO, RefCOCOplus, RefCOCOg: one reference per row, its outline flattened to one polygon; evaluation
  only.
- moondream/refcoco-m: one image per row, RefCOCO's UNC validation split with new masks.
"""

import json
import re
import reprlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import numpy as np
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.file_download import repo_folder_name
from tqdm.auto import tqdm

from .canonical import AnnotatedImage, AnnotatedReference, ImageInDataset, check_images
from .image_files import image_finder
from .loading import load_files
from .records import ANYTHING, ID, LIST, OBJECT, TEXT, TEXT_OR_TEXTS, check_fields
from .refer import check_sentences, expressions_of
from .segmentation import are_numbers


logger = datasets.logging.get_logger(__name__)

# COCO's 80 categories by id; ten of the ids 1 to 90 were never used.
_COCO_UNUSED_IDS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
_COCO_NAMES = """
    person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,
    bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,skis,
    snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,
    fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,
    potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,
    refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush
"""
_COCO_CATEGORIES = dict(
    zip(
        (category_id for category_id in range(1, 91) if category_id not in _COCO_UNUSED_IDS),
        (name.strip() for name in _COCO_NAMES.split(",")),
        strict=True,
    )
)
# COCO_train2014_000000581857_16.jpg: REFER's name of object 16 on image 581857.
_COCO_FILE_NAME = re.compile(r"(?P<stem>COCO_[a-z]+\d{4}_(?P<image_id>\d{12}))(?:_\d+)?(?P<suffix>\.\w+)")
_NUMBER = re.compile(r"[0-9]{1,18}")
_IMAGE_FIELDS = {"id": ID, "file_name": TEXT, "height": ANYTHING, "width": ANYTHING}
_ANNOTATION_FIELDS = {"category_id": ID, "segmentation": ANYTHING, "bbox": ANYTHING}
_SAMPLE_FIELDS = {"id": ID, "category": TEXT, "sentences": TEXT_OR_TEXTS, "mask": ANYTHING, "bbox": ANYTHING}
_OTHER_NAMES = {"val": "validation", "validation": "val", "testA": "test"}
# The numbers of references in the val splits of RefCOCO (UNC), RefCOCO+ (UNC) and RefCOCOg (UMD).
_NUM_VAL_REFERENCES = {3811, 3805, 2573}


def read_hub_copy(
    path_or_id: str | Path, split: str, image_dir: str | Path | None = None, revision: str | None = None
) -> list[AnnotatedImage]:
    """
    Read one split of a copy of RefCOCO, RefCOCO+ or RefCOCOg on the Hub. Only the files of that split are fetched.

    The texts are `sent` if the copy keeps REFER's sentences. Ids that a copy lacks are numbered from 0 in its order
    (lmms-lab: `ref_id`, `sent_id`; refcoco-m: `sent_id`). A category that it lacks is "".

    Args:
        path_or_id: Hub id or local folder, as for `datasets.load_dataset`.
        split: The copy's own name of a split. val and validation stand for each other, and testA for test if there is
            a testB.
        image_dir: For copies without images: the folder of COCO's train2014 images, or one above it. If rows name
            files, the files must be in it, or by default in the copy.
        revision: A branch, tag or commit on the Hub.

    Returns:
        The images in the copy's order, each with all references to it, including images that `image_dir` lacks.

    Raises:
        ValueError: The split or the columns are not as expected, a row does not fit its layout, or an image folder is
            needed and not given.
    """
    split, dataset = _load_split(str(path_or_id), split, revision)
    layout = _recognise_layout(dataset.column_names, path_or_id)
    find_image, folder = _find_images(dataset, image_dir, path_or_id)
    try:
        images = [replace(image, image_dir=folder) for image in layout.read(dataset, find_image)]
    except ValueError as error:
        raise ValueError(f"{path_or_id}: {error}") from error
    if layout.flattened:
        _warn_of_flattened_polygons(dataset, split, path_or_id)
    check_images(images, path_or_id)
    return _unite_rows(images)


def _folder_of_copy(path_or_id: str | Path) -> Path:
    """The folder itself, or the folder of a Hub id in the Hub's cache."""
    if Path(path_or_id).is_dir():
        return Path(path_or_id)
    return Path(HF_HUB_CACHE, repo_folder_name(repo_id=str(path_or_id), repo_type="dataset"))


def _load_split(path_or_id: str, split: str, revision: str | None) -> tuple[str, datasets.Dataset]:
    data_files = datasets.load_dataset_builder(path_or_id, revision=revision).config.data_files
    name = _resolve_split(split, list(data_files), path_or_id)
    # Without `data_files`, the files of all splits would be fetched.
    data_files = {name: list(data_files[name])}
    try:
        return name, load_files(path_or_id, data_files=data_files, split=name, revision=revision, place=path_or_id)
    except (ValueError, TypeError) as error:
        raise ValueError(f"The files of {path_or_id} cannot be read: {error}") from error


def _resolve_split(split: str, available: Sequence[str], path_or_id: str) -> str:
    if split in available:
        return split
    other = _OTHER_NAMES.get(split, split)
    if other in available and (split != "testA" or "testB" in available):
        return other
    raise ValueError(f"{path_or_id} has no split {split!r}, it has {', '.join(sorted(available))}.")


ImageSource = Callable[[int, dict[str, Any]], Path | ImageInDataset]  # finds the image of (row number, columns)


def _find_images(
    dataset: datasets.Dataset, image_dir: str | Path | None, path_or_id: str | Path
) -> tuple[ImageSource, Path]:
    """Make a function that finds the image of a row, and choose the folder that must contain the image files."""
    if "image" in dataset.column_names:
        try:
            images = dataset.select_columns("image").cast_column("image", datasets.Image(decode=False))
        except (TypeError, NotImplementedError, ValueError) as error:
            found = dataset.features["image"]
            raise ValueError(f"{path_or_id}: expected images in the column image, got {found}.") from error
        folder = _folder_of_copy(path_or_id) if image_dir is None else Path(image_dir)
        return lambda index, row: ImageInDataset(images, index), folder
    if image_dir is None or not Path(image_dir).is_dir():
        given = "none was given" if image_dir is None else f"{image_dir} is not a folder"
        raise ValueError(
            f"{path_or_id} holds no images: expected an image_dir with COCO's train2014 images, {given}. They are at "
            "http://images.cocodataset.org/zips/train2014.zip."
        )
    find_image = image_finder(image_dir)
    return lambda index, row: find_image(row["image_path"]), Path(image_dir)


def _iterate_rows(dataset: datasets.Dataset) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, columns) of all rows, without the image, which is read when its row is built."""
    columns = [name for name in dataset.column_names if name != "image"]
    yield from enumerate(tqdm(dataset.select_columns(columns), desc="Annotations", unit="row", leave=False))


def _read_reference_rows(dataset: datasets.Dataset, find_image: ImageSource) -> Iterator[AnnotatedImage]:
    """jxu124/refcoco, refcocoplus and refcocog. The column `bbox` is [x0, y0, x1, y1], the annotation's is COCO's."""
    for index, row in _iterate_rows(dataset):
        check_fields(row, {"image_id": ID, "image_path": TEXT}, f"Row {index}")
        annotation = _parse_json(row, index, "raw_anns", ("segmentation", "bbox", "category_id"))
        info = _parse_json(row, index, "raw_image_info", ("height", "width"))
        yield AnnotatedImage(
            image_id=row["image_id"],
            file_name=PurePosixPath(row["image_path"]).name,
            image=find_image(index, row),
            references=(_build_refer_reference(row, annotation, f"Row {index}"),),
            size=(info["height"], info["width"]),
        )


def _parse_json(row: dict[str, Any], index: int, column: str, expected: tuple[str, ...]) -> dict[str, Any]:
    try:
        value = json.loads(row[column])
    except (TypeError, ValueError, RecursionError):  # some mirrors hold objects instead of JSON
        value = row[column]
    if not isinstance(value, dict) or not value.keys() >= set(expected):
        raise ValueError(
            f"Row {index}: expected {column} to be a JSON object with {', '.join(expected)}, got {reprlib.repr(value)}."
        )
    return value


def _read_benchmark(dataset: datasets.Dataset, find_image: ImageSource) -> Iterator[AnnotatedImage]:
    """jxu124/refcoco-benchmark."""
    for index, row in _iterate_rows(dataset):
        check_fields(row, {"image_info": OBJECT, "ref_list": LIST}, f"Row {index}")
        info = row["image_info"]
        check_fields(info, _IMAGE_FIELDS, f"Row {index}, image_info")
        for ref in row["ref_list"]:
            check_fields(ref, {"ref_info": OBJECT, "ann_info": OBJECT}, f"Row {index}, ref_list")
        yield AnnotatedImage(
            image_id=info["id"],
            file_name=info["file_name"],
            image=find_image(index, row),
            references=tuple(
                _build_refer_reference(ref["ref_info"], ref["ann_info"], f"Row {index}") for ref in row["ref_list"]
            ),
            size=(info["height"], info["width"]),
        )


def _build_refer_reference(ref: dict[str, Any], annotation: dict[str, Any], place: str) -> AnnotatedReference:
    """Build a reference from REFER's own `ref` and COCO's annotation."""
    check_fields(ref, {"ref_id": ID, "ann_id": ID, "sentences": LIST}, place)
    check_sentences(ref, f"{place}, ref_id {ref['ref_id']}")
    check_fields(annotation, _ANNOTATION_FIELDS, f"{place}, annotation {ref['ann_id']}")
    return AnnotatedReference(
        ref_id=ref["ref_id"],
        ann_id=ref["ann_id"],
        category=_COCO_CATEGORIES.get(annotation["category_id"], ""),
        segmentation=annotation["segmentation"] or [[]],  # a missing one is an error; it does not mean "no target"
        expressions=expressions_of(ref),
        bbox=annotation["bbox"],
    )


def _read_question_rows(dataset: datasets.Dataset, find_image: ImageSource) -> Iterator[AnnotatedImage]:
    """lmms-lab/RefCOCO, RefCOCOplus and RefCOCOg. `question_id` is the id of COCO's annotation."""
    sent_ids = count()
    for index, row in _iterate_rows(dataset):
        match = _COCO_FILE_NAME.fullmatch(str(row["file_name"]))
        if match is None or not _NUMBER.fullmatch(str(row["question_id"])):
            raise ValueError(
                f"Row {index}: expected a file_name such as COCO_train2014_000000581857_16.jpg and a number as "
                f"question_id, got {row['file_name']!r} and {row['question_id']!r}."
            )
        check_fields(row, {"answer": TEXT_OR_TEXTS}, f"Row {index}")
        reference = AnnotatedReference(
            ref_id=index,
            ann_id=int(row["question_id"]),
            category="",
            segmentation=[_restore_decimals(row["segmentation"])],
            expressions=_number_texts(row["answer"], sent_ids),
            bbox=row["bbox"],
        )
        file_name = match["stem"] + match["suffix"]
        yield AnnotatedImage(int(match["image_id"]), file_name, find_image(index, row), (reference,))


def _number_texts(texts: str | Sequence[str], sent_ids: Iterator[int]) -> tuple[tuple[int, str], ...]:
    return tuple((next(sent_ids), text) for text in ([texts] if isinstance(texts, str) else texts))


def _restore_decimals(numbers: Any) -> Any:
    """
    Restore decimal numbers that were stored as float32. Polygons are filled on a grid of fifths of a pixel, on which
    10.1 and its nearest float32 may lie on different points. Anything but numbers is returned unchanged, so that the
    image is refused.
    """
    return [float(str(np.float32(number))) for number in numbers] if are_numbers(numbers) else numbers


def _read_mask_rows(dataset: datasets.Dataset, find_image: ImageSource) -> Iterator[AnnotatedImage]:
    """moondream/refcoco-m. A sample's `id` serves as `ref_id` and `ann_id`."""
    sent_ids = count()
    for index, row in _iterate_rows(dataset):
        check_fields(row, {"image_id": ID, "file_name": TEXT, "samples": LIST}, f"Row {index}")
        for sample in row["samples"]:
            check_fields(sample, _SAMPLE_FIELDS, f"Row {index}, samples")
        references = tuple(
            AnnotatedReference(
                ref_id=sample["id"],
                ann_id=sample["id"],
                category=sample["category"],
                segmentation=sample["mask"] or [[]],
                expressions=_number_texts(sample["sentences"], sent_ids),
                bbox=sample["bbox"],
            )
            for sample in row["samples"]
        )
        sizes: list[Any] = [
            sample["mask"].get("size") for sample in row["samples"] if isinstance(sample["mask"], dict)
        ]
        size = tuple(sizes[0]) if sizes and are_numbers(sizes[0]) and len(sizes[0]) == 2 else None
        yield AnnotatedImage(row["image_id"], row["file_name"], find_image(index, row), references, size)


@dataclass(frozen=True)
class _Layout:
    copies: str
    columns: tuple[str, ...]
    read: Callable[[datasets.Dataset, ImageSource], Iterator[AnnotatedImage]]
    flattened: bool = False


_LAYOUTS = (
    _Layout(
        "jxu124/refcoco",
        ("ref_id", "ann_id", "image_id", "sentences", "raw_anns", "raw_image_info", "image_path"),
        _read_reference_rows,
    ),
    _Layout("jxu124/refcoco-benchmark", ("image", "image_info", "ref_list"), _read_benchmark),
    _Layout(
        "lmms-lab/RefCOCO",
        ("image", "file_name", "question_id", "answer", "segmentation", "bbox"),
        _read_question_rows,
        flattened=True,
    ),
    _Layout("moondream/refcoco-m", ("image", "image_id", "file_name", "samples"), _read_mask_rows),
)


def _recognise_layout(columns: Sequence[str], path_or_id: str | Path) -> _Layout:
    for layout in _LAYOUTS:
        if set(layout.columns) <= set(columns):
            return layout
    expected = "\n".join(f"  {', '.join(layout.columns)} (as {layout.copies})" for layout in _LAYOUTS)
    raise ValueError(
        f"{path_or_id} has the columns {', '.join(columns)}. Expected those of one of these layouts:\n{expected}"
    )


def _unite_rows(images: Sequence[AnnotatedImage]) -> list[AnnotatedImage]:
    """Unite the rows about one image, at the place of the first."""
    references: dict[tuple[int, str], list[AnnotatedReference]] = {}
    firsts: dict[tuple[int, str], AnnotatedImage] = {}
    for image in images:
        key = (image.image_id, image.file_name)
        firsts.setdefault(key, image)
        references.setdefault(key, []).extend(image.references)
    return [replace(first, references=tuple(references[key])) for key, first in firsts.items()]


def _warn_of_flattened_polygons(dataset: datasets.Dataset, split: str, path_or_id: str | Path) -> None:
    rows = dataset.select_columns(["segmentation", "bbox"])
    num_short = sum(not _spans_box(row["segmentation"], row["bbox"]) for row in rows)
    logger.warning(
        f"{path_or_id}: this copy has one polygon for each object, even for those that COCO draws in several parts. "
        f"Their masks are wrong. {num_short} of {len(dataset)} polygons do not reach the edges of their boxes. "
        "jxu124/refcoco-benchmark has the same splits with all parts."
    )
    if split in ("val", "validation") and len(dataset) not in _NUM_VAL_REFERENCES:
        logger.warning(
            f"{path_or_id}: the {split} split of this copy has {len(dataset)} references. lmms-lab's val splits of "
            "RefCOCO and RefCOCOg mix two splits (3,811 UNC and 5,000 Google; 2,573 UMD and 5,000 Google). Results on "
            "them cannot be compared with published ones."
        )


def _spans_box(polygon: Any, box: Any) -> bool:
    """Whether [x0, y0, x1, y1, ...] reaches all edges of the box [x, y, width, height], within one pixel."""
    if not are_numbers(polygon) or len(polygon) < 2 or not are_numbers(box) or len(box) != 4:
        return False
    x, y, width, height = box
    horizontal, vertical = polygon[0::2], polygon[1::2]
    edges = [min(horizontal), min(vertical), max(horizontal), max(vertical)]
    return np.allclose(edges, [x, y, x + width, y + height], rtol=0, atol=1)
