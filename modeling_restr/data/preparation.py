"""
Writing of annotated images to a folder of Parquet shards in the canonical form, with a card, for `datasets` and the Hub.

A preparation that was stopped resumes: finished shards are kept, and the others are made.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from ..files import hold_folder, write_json, write_text
from .canonical import AnnotatedImage, BadImage, check_distinct_files
from .dataset_card import Source, build_card
from .records import COUNT, ID, OBJECT, TEXT, TEXTS, check_fields, read_json
from .segmentation import SeveralObjects
from .shards import PreparedSplit, make_shards, plan_shards, read_split, shard_paths


SETTINGS_NAME = "preparation.json"
SETTINGS_FIELDS = {"version": ID, "images_per_shard": COUNT, "source": OBJECT, "splits": OBJECT}
SOURCE_FIELDS = {
    "name": TEXT,
    "title": TEXT,
    "description": TEXT,
    "origins": TEXTS,
    "options": OBJECT,
    "published": OBJECT,
}
SPLIT_FIELDS = {"num_images": COUNT, "annotations": TEXT}
IMAGES_PER_SHARD = 1500  # about 250 MB of COCO's images
VERSION = 1  # of the rows that this file makes; shards of different versions are never mixed


def prepare(
    source: Source,
    splits: Mapping[str, Sequence[AnnotatedImage]],
    output_dir: str | Path,
    *,
    images_per_shard: int = IMAGES_PER_SHARD,
    num_proc: int = 1,
    skip_bad: bool = False,
    notes: Sequence[str] = (),
) -> dict[str, PreparedSplit]:
    """
    Write data/SPLIT-00000-of-000NN.parquet, the card README.md and the settings preparation.json.

    Splits that are in the folder from an earlier run stay, and the card includes them.

    Args:
        source: Where the data comes from. Another source in the same folder is an error.
        splits: {name of a split: its images}.
        output_dir: The folder, created if needed.
        images_per_shard: Rows per Parquet file, fixed by the first run in the folder.
        num_proc: Processes that decode and write. The files are the same for any number.
        skip_bad: Whether to leave out images that are missing, damaged, of another size than their annotations say, or
            with an object without a mask. A later run with `False` makes shards that lack images again.
        notes: Paragraphs for the card on how the data was made.

    Returns:
        The content of each split in the folder, counted in its files, and the images that it lacks.

    Raises:
        BadImage: There are bad images and `skip_bad` is `False` (the message lists them, for all shards that were
            started), or a split has no image that can be used.
        ValueError: The folder holds something else, an argument is out of its range, or two images share a file.
    """
    output_dir = Path(output_dir)
    _check_arguments(splits, images_per_shard, num_proc)
    check_distinct_files(chain.from_iterable(splits.values()))
    (output_dir / "data").mkdir(parents=True, exist_ok=True)
    with hold_folder(output_dir, "preparation"):
        _write_settings(output_dir, source, splits, images_per_shard, notes)
        plans = [plan_shards(output_dir / "data", name, images, images_per_shard) for name, images in splits.items()]
        bad = make_shards(list(chain.from_iterable(plans)), num_proc, skip_bad)
        if bad and not skip_bad:
            listing = "\n".join(f"  {problem}" for problem in bad)
            raise BadImage(f"Images that cannot be used (skip_bad leaves them out): {len(bad):,}\n{listing}")
        prepared = read_prepared_splits(output_dir)
        _check_not_empty(prepared)
        write_text(output_dir / "README.md", str(build_card(source, prepared, notes)))
    return prepared


def _check_not_empty(prepared: Mapping[str, PreparedSplit]) -> None:
    for name, split in prepared.items():
        if not split.counts.images:
            raise BadImage(
                f"None of the {len(split.left_out)} images of the split {name!r} can be used; the first: "
                f"{split.left_out[0]}. Is the folder of the images the right one?"
            )


def _check_arguments(splits: Mapping[str, Sequence[AnnotatedImage]], images_per_shard: int, num_proc: int) -> None:
    for name, images in splits.items():
        if not re.fullmatch(r"\w+", name):
            raise ValueError(f"A split's name must be of letters, digits and '_', got {name!r}.")
        if not images:
            raise ValueError(f"The split {name!r} has no images.")
    if not splits or images_per_shard < 1 or num_proc < 1:
        raise ValueError(
            f"Expected at least one split, one image per shard and one process, got {len(splits)} splits, "
            f"images_per_shard={images_per_shard} and num_proc={num_proc}."
        )


def _write_settings(
    output_dir: Path,
    source: Source,
    splits: Mapping[str, Sequence[AnnotatedImage]],
    images_per_shard: int,
    notes: Sequence[str],
) -> None:
    """Write the settings of the folder, or check that they are the same as before."""
    settings = {
        "version": VERSION,
        "source": json.loads(json.dumps(asdict(source))),
        "images_per_shard": images_per_shard,
        "notes": list(notes),
        "splits": {},
    }
    if (output_dir / SETTINGS_NAME).exists():
        settings = _check_settings(output_dir, settings)
    elif any((output_dir / "data").glob("*.parquet")):
        raise ValueError(f"{output_dir} has Parquet files of another origin: choose an empty folder.")
    for name, images in splits.items():
        content = {"num_images": len(images), "annotations": fingerprint(images)}
        if settings["splits"].setdefault(name, content) != content:
            raise ValueError(
                f"The split {name!r} in {output_dir} was prepared from other annotations than those that were read "
                "now: choose another folder, or remove this one."
            )
    write_json(output_dir / SETTINGS_NAME, settings)


def _check_settings(output_dir: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Check that the settings of the content are as before, and return them with the splits in the folder."""
    earlier = read_settings(output_dir)
    before, now = _content_settings(earlier), _content_settings(settings)
    differences = [
        f"{key} was {before.get(key)!r:.100}, and is now {now.get(key)!r:.100}"
        for key in {**before, **now}
        if before.get(key) != now.get(key)
    ]
    if differences:
        raise ValueError(
            f"{output_dir} was prepared with other settings: {'; '.join(differences)}. Choose another folder, or "
            "remove this one."
        )
    return {**settings, "splits": earlier["splits"]}


def _content_settings(settings: dict[str, Any]) -> dict[str, Any]:
    source = settings["source"]
    own = {key: settings[key] for key in ("version", "images_per_shard")}
    return {**own, "source": source["title"], "name": source["name"], **source["options"]}


def read_settings(folder: str | Path) -> dict[str, Any]:
    """The settings of a prepared folder; `ValueError` for any other folder."""
    path = Path(folder) / SETTINGS_NAME
    if not path.is_file():
        raise ValueError(f"{folder} is not a prepared dataset: it has no {SETTINGS_NAME}.")
    settings = read_json(path)
    check_fields(settings, SETTINGS_FIELDS, str(path))
    check_fields(settings["source"], SOURCE_FIELDS, str(path))
    check_fields(settings["source"]["published"], dict.fromkeys(settings["source"]["published"], TEXTS), str(path))
    for name, split in settings["splits"].items():
        check_fields(split, SPLIT_FIELDS, f"{path}, split {name}")
    return settings


def read_source(folder: str | Path) -> Source:
    """Where the data of a prepared folder comes from."""
    source = read_settings(folder)["source"]
    published = {split: tuple(names) for split, names in source["published"].items()}
    try:
        return Source(**{**source, "origins": tuple(source["origins"]), "published": published})
    except (ValueError, TypeError) as error:  # unknown origins or fields
        raise ValueError(f"{Path(folder) / SETTINGS_NAME}, source: {error}") from error


def fingerprint(images: Sequence[AnnotatedImage]) -> str:
    """A hash of the annotations. It does not depend on the place or the content of the image files."""
    digest = hashlib.sha256()
    for image in images:
        references = [vars(reference) for reference in image.references]
        content = [image.image_id, image.file_name, image.size, references]
        try:
            digest.update(json.dumps(content, sort_keys=True, default=_to_json).encode())
        except RecursionError:
            raise ValueError(f"{image.file_name}: its annotations are nested too deeply.") from None
    return digest.hexdigest()


def _to_json(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return [str(value.dtype), value.shape, hashlib.sha256(value.tobytes()).hexdigest()]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, bytes):
        return value.decode("latin-1")
    if isinstance(value, Path):
        return value.name
    if isinstance(value, partial):  # loads a mask from its file
        return list(value.args)
    if isinstance(value, SeveralObjects):
        return list(chain.from_iterable(value.objects))
    raise TypeError(f"Annotations cannot hold a {type(value).__name__}: {value!r:.100}")


def list_shards(folder: str | Path) -> dict[str, list[Path]]:
    """The Parquet files of each finished split of a prepared folder."""
    settings = read_settings(folder)
    paths = {
        name: shard_paths(Path(folder) / "data", name, split["num_images"], settings["images_per_shard"])
        for name, split in settings["splits"].items()
    }
    return {name: shards for name, shards in paths.items() if all(path.is_file() for path in shards)}


def read_prepared_splits(folder: str | Path) -> dict[str, PreparedSplit]:
    """Count the content of each finished split of a prepared folder, in its files."""
    return {name: read_split(paths) for name, paths in list_shards(folder).items()}


def push_to_hub(folder: str | Path, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
    """
    Upload a prepared folder to a dataset repository on the Hub, created if needed, in one commit. It also removes
    older shards of the same splits. If nothing has changed since the last push, there is no commit.

    Returns:
        The URL of the commit.

    Raises:
        ValueError: The folder is not one that [`prepare`] has finished. No repository is created then.
    """
    folder, api = Path(folder), HfApi(token=token)
    shards = list_shards(folder)
    files = {f"data/{path.name}": path for paths in shards.values() for path in paths}
    files |= {name: folder / name for name in ("README.md", SETTINGS_NAME)}
    missing = [name for name, path in files.items() if not path.is_file()] + ["data/*.parquet"] * (not shards)
    if missing:
        raise ValueError(f"Expected a prepared folder, but {folder} lacks {', '.join(missing)}: prepare it first.")
    repo_id = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True).repo_id
    old = re.compile(rf"data/(?:{'|'.join(map(re.escape, shards))})-\d+-of-\d+\.parquet")
    present = api.list_repo_files(repo_id, repo_type="dataset")
    stale = [name for name in present if name not in files and old.fullmatch(name)]
    commit = api.create_commit(
        repo_id,
        [
            *(CommitOperationAdd(name, path) for name, path in sorted(files.items())),
            *(CommitOperationDelete(name, is_folder=False) for name in stale),
        ],
        commit_message="Upload the prepared dataset",
        repo_type="dataset",
    )
    return commit.commit_url
