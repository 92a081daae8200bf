"""
Combination of prepared datasets, without evaluation images in the training split.

RefCOCO, RefCOCO+, RefCOCOg and gRefCOCO share their photographs: the training split of one contains evaluation images
of another. Such images are dropped from training. Evaluation splits stay as they are, under their own names.
"""

import hashlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from .canonical import AnnotatedImage, AnnotatedReference, ImageInDataset, read_image
from .dataset_card import Source
from .loading import load_files
from .preparation import list_shards, read_settings, read_source
from .published_counts import Counts, count_images


TRAIN = "train"

# COCO_train2014_000000581857.jpg, COCO_train2014_000000581857_16.jpg (REFER's), 000000581857.jpg (COCO 2017's). An id
# means the same photograph in all of COCO's parts and years.
_COCO_FILE_NAME = re.compile(r"(?:COCO_(?:train|val|test)\d{4}_)?(\d{12})(?:_\d+)?\.jpg")
_THUMBNAIL_SIZE = (32, 32)
_LARGEST_DIFFERENCE = 8  # of 255, mean over a thumbnail's pixels: recompression as JPEG may change as much


@dataclass(frozen=True)
class Combination:
    """The combined data to prepare. `notes` say which images were dropped and united."""

    source: Source
    splits: Mapping[str, Sequence[AnnotatedImage]]
    notes: tuple[str, ...]


def combine(folders: Mapping[str, str | Path], cache_dir: str | Path | None = None) -> Combination:
    """
    Combine prepared folders.

    Splits called "train" are for training, all others for evaluation. A training image is dropped if any evaluation
    split of any folder has it. Images are the same if their file names have the same COCO id, or else if their files
    hold the same bytes. An image in several training sets becomes one row with all references. If two files with the
    same COCO id do not show the same picture in the same size, each keeps its row.

    Args:
        folders: {name: folder}. Evaluation splits become NAME_SPLIT.
        cache_dir: Where `datasets` unpacks the folders, by default its own cache.

    Raises:
        ValueError: A folder was not prepared or is not finished, or there are fewer than two.
    """
    if len(folders) < 2:
        raise ValueError(f"Expected at least two prepared folders to combine, got {len(folders)}.")
    photos = {name: _read_photos(folder, cache_dir) for name, folder in folders.items()}
    key_of = _key_function([photo for splits in photos.values() for split in splits.values() for photo in split])
    evaluation = _name_evaluation_splits(photos)
    evaluated = {key_of(photo) for split in evaluation.values() for photo in split}
    kept: list[_Photo] = []
    notes = []
    for name, splits in photos.items():
        training = splits.get(TRAIN, [])
        dropped = [photo for photo in training if key_of(photo) in evaluated]
        kept += [photo for photo in training if key_of(photo) not in evaluated]
        if training:
            notes.append(_describe_dropped(name, _count(dropped), _count(training)))
    united = _unite(kept, key_of)
    if kept:
        notes.append(_describe_united(_count(kept), count_images(united)))
    combined = {TRAIN: united} if united else {}
    combined |= {name: [photo.image for photo in split] for name, split in evaluation.items()}
    return Combination(_describe_source(folders), combined, tuple(notes))


def read_prepared_images(folder: str | Path, cache_dir: str | Path | None = None) -> dict[str, list[AnnotatedImage]]:
    """Read the rows of a prepared folder back as annotated images, by split."""
    shards = list_shards(folder)
    missing = read_settings(folder)["splits"].keys() - shards.keys()
    if missing:
        raise ValueError(f"{folder} is not finished: {', '.join(sorted(missing))}. Finish preparing it first.")
    images = {split: _read_rows(folder, paths, split, cache_dir) for split, paths in shards.items()}
    # Rows contain their images. If one names a file instead, the file must be in the folder.
    return {split: [replace(image, image_dir=Path(folder)) for image in found] for split, found in images.items()}


def _read_rows(
    folder: str | Path, paths: Sequence[Path], split: str, cache_dir: str | Path | None
) -> list[AnnotatedImage]:
    dataset = load_files(
        "parquet",
        data_files={split: [str(path) for path in paths]},
        split=split,
        cache_dir=None if cache_dir is None else str(cache_dir),
        place=folder,
    )
    dataset = dataset.cast_column("image", datasets.Image(decode=False))
    images = dataset.select_columns(["image"])
    rows = tqdm(dataset.remove_columns(["image"]), desc=f"Annotations of {split}", unit="image", leave=False)
    return [_read_row(row, ImageInDataset(images, index)) for index, row in enumerate(rows)]


def _read_row(row: dict[str, Any], image: ImageInDataset) -> AnnotatedImage:
    references = tuple(
        AnnotatedReference(
            ref_id=reference["ref_id"],
            ann_id=reference["ann_id"],
            category=reference["category"],
            segmentation=reference["mask"] or [[]],
            expressions=tuple((expression["sent_id"], expression["text"]) for expression in reference["expressions"]),
            bbox=reference["bbox"],
        )
        for reference in row["references"]
    )
    masks = [reference["mask"] for reference in row["references"] if reference["mask"]]
    size: Any = tuple(masks[0]["size"] or ()) if masks else None
    return AnnotatedImage(row["image_id"], row["file_name"], image, references, size)


class _Photo(NamedTuple):
    image: AnnotatedImage
    digest: bytes  # of its file
    coco_id: int | None  # in its file name


Key = int | bytes  # COCO's id of a photograph, or else the digest of its file


def coco_id_of(file_name: str) -> int | None:
    """The COCO id in a file name, or None if it is not one of COCO's names."""
    match = _COCO_FILE_NAME.fullmatch(Path(file_name).name)
    return int(match[1]) if match else None


def _read(image: AnnotatedImage) -> bytes:
    return read_image(image.image, image.image_dir)


def _read_photos(folder: str | Path, cache_dir: str | Path | None) -> dict[str, list[_Photo]]:
    return {
        split: [
            _Photo(image, hashlib.sha256(_read(image)).digest(), coco_id_of(image.file_name))
            for image in tqdm(images, desc=f"Images of {split}", unit="image")
        ]
        for split, images in read_prepared_images(folder, cache_dir).items()
    }


def _key_function(photos: Sequence[_Photo]) -> Callable[[_Photo], Key]:
    """Photos with equal keys are the same. A file with another name gets the id of a COCO file with equal bytes."""
    ids = {photo.digest: photo.coco_id for photo in photos if photo.coco_id is not None}

    def key_of(photo: _Photo) -> Key:
        return ids.get(photo.digest, photo.digest) if photo.coco_id is None else photo.coco_id

    return key_of


def _name_evaluation_splits(photos: Mapping[str, Mapping[str, list[_Photo]]]) -> dict[str, list[_Photo]]:
    evaluation: dict[str, list[_Photo]] = {}
    for name, splits in photos.items():
        for split in splits.keys() - {TRAIN}:
            if f"{name}_{split}" in evaluation:
                raise ValueError(f"Two evaluation splits would be called {name}_{split}: give the sets other names.")
        evaluation |= {f"{name}_{split}": found for split, found in splits.items() if split != TRAIN}
    return evaluation


def _unite(photos: Sequence[_Photo], key_of: Callable[[_Photo], Key]) -> list[AnnotatedImage]:
    """Unite equal training images in one row, at the position of the first."""
    groups: dict[Key, list[list[_Photo]]] = {}
    for photo in photos:
        rows = groups.setdefault(key_of(photo), [])
        row = next((row for row in rows if _show_the_same(row[0], photo)), None)
        if row is None:
            rows.append([photo])
        else:
            row.append(photo)
    return [_unite_row([photo.image for photo in row]) for rows in groups.values() for row in rows]


def _unite_row(row: Sequence[AnnotatedImage]) -> AnnotatedImage:
    references: list[AnnotatedReference] = []
    for image in row:
        references += [reference for reference in image.references if reference not in references]
    size = next((image.size for image in row if image.size is not None), None)
    return replace(row[0], references=tuple(references), size=size)


def _show_the_same(first: _Photo, second: _Photo) -> bool:
    """Whether two files show the same picture in the same size. Equal ids may be a coincidence or a resized image."""
    if first.digest == second.digest:
        return True
    sizes, thumbnails = zip(*(_shrink(_read(photo.image)) for photo in (first, second)))
    return sizes[0] == sizes[1] and float(np.abs(thumbnails[0] - thumbnails[1]).mean()) <= _LARGEST_DIFFERENCE


def _shrink(encoded: bytes) -> tuple[tuple[int, int], np.ndarray]:
    with Image.open(io.BytesIO(encoded)) as opened:
        image = ImageOps.exif_transpose(opened).convert("RGB")
    return image.size, np.asarray(image.resize(_THUMBNAIL_SIZE, Image.Resampling.BOX), dtype=np.float32)


def _count(photos: Sequence[_Photo]) -> Counts:
    return count_images([photo.image for photo in photos])


def _describe_counts(counts: Counts) -> str:
    images, references, expressions = (
        f"{number:,} {name if number != 1 else name.removesuffix('s')}" for name, number in counts._asdict().items()
    )
    return f"{images}, {references} and {expressions}"


def _describe_dropped(name: str, dropped: Counts, before: Counts) -> str:
    split = f"the training split of {name} ({_describe_counts(before)})"
    if not dropped.images:
        return f"Nothing was dropped from {split}: none of its images is in an evaluation split."
    return f"From {split}, {_describe_counts(dropped)} were dropped, because the images are in an evaluation split."


def _describe_united(before: Counts, after: Counts) -> str:
    repeated = before.references - after.references
    text = f"The other {before.images:,} training images became {after.images:,} rows, one for each different image"
    if repeated:
        text += f"; {repeated:,} references that several sets have were kept once"
    return f"{text}. `ref_id` and `sent_id` come from the sets, so a number may occur more than once in training."


def _describe_source(folders: Mapping[str, str | Path]) -> Source:
    sources = {name: read_source(folder) for name, folder in folders.items()}
    titles = [source.title for source in sources.values()]
    title = f"{', '.join(titles[:-1])} and {titles[-1]}"
    return Source(
        name="combined",
        title=f"{title}, combined",
        description=f"This is {title}, combined. Training has no image of an evaluation split.",
        origins=tuple(dict.fromkeys(origin for source in sources.values() for origin in source.origins)),
        options={"sets": {name: read_settings(folder)["splits"] for name, folder in folders.items()}},
        published={
            f"{name}_{split}": names
            for name, source in sources.items()
            for split, names in source.published.items()
            if split != TRAIN
        },
    )
