"""
Search for the image files that annotations name. The names come from other machines and may be hostile, so only regular
files below the folder of the images are opened.
"""

import os
import re
import stat
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote


# Folders of images below the given one, as in COCO's archives and REFER's own instructions.
IMAGE_FOLDERS = (
    ".",
    "train2014",
    "images/train2014",
    "mscoco/images/train2014",
    "images/mscoco/images/train2014",
    "saiapr_tc-12",
    "images/saiapr_tc-12",
    "train2017",
)
MAX_NAME = 4096  # characters, Linux's limit
MAX_BYTES = 2**31 - 1  # of a file, the limit of a cell in a Parquet file


def image_finder(image_dir: str | Path) -> Callable[[str], Path]:
    """
    Make a function that finds an image by its name in `image_dir` or a usual folder below it (`IMAGE_FOLDERS`).

    Folders in a name that do not exist are dropped one by one: "C:/work/photos/a.jpg" is photos/a.jpg or a.jpg.
    Backslashes may stand for slashes, "%20" for a space, and COCO 2014's names for COCO 2017's. If an image does not
    exist, the function returns the path where it was expected.

    Raises:
        ValueError: `image_dir` is not a folder.
    """
    if not Path(image_dir).is_dir():
        raise ValueError(f"Expected a folder of images, got {image_dir}.")
    folders = [folder for name in IMAGE_FOLDERS if (folder := Path(image_dir, name)).is_dir()]

    def find_image(file_name: str) -> Path:
        names = dict.fromkeys(_names_below(file_name)) if len(file_name) <= MAX_NAME else ()
        candidates = (folder / name for name in names for folder in folders)
        expected = folders[:2][-1].joinpath(*_parts_of(file_name)[-1:])
        return next((path for path in candidates if is_file(path)), expected)

    return find_image


def _names_below(file_name: str) -> Iterator[str]:
    """The name and its last parts in every spelling, the likeliest first. None of them leads out of a folder."""
    unquoted = unquote(file_name)
    for spelling in (file_name, unquoted, *(unicodedata.normalize(form, unquoted) for form in ("NFC", "NFD"))):
        for parts in (_parts_of(spelling, "/"), _parts_of(spelling)):
            yield from ("/".join(parts[start:]) for start in range(len(parts)))
    yield from (part.removeprefix("COCO_train2014_") for part in _parts_of(file_name)[-1:])


def _parts_of(file_name: str, separators: str = r"[/\\]|\?d=") -> list[str]:
    """The parts of a name without drives and dots. Label Studio's local files have "?d=" as a separator."""
    return [part for part in re.split(separators, file_name) if part.strip(".") and not part.endswith(":")]


def is_file(path: Path) -> bool:
    """Whether a path leads to a regular file. Invalid paths do not."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # the name is too long, or has a zero byte in it
        return False


def resolve_image(path: Path, image_dir: Path | None = None) -> Path:
    """
    The file that a path leads to, to be opened.

    Raises:
        FileNotFoundError: There is none.
        OSError, ValueError: It is not a regular file, is too large, or is outside `image_dir`. In the Hub's cache,
            links from the folder to the cache's blobs are allowed.
    """
    resolved = Path(os.path.realpath(path, strict=True))
    if image_dir is not None and not any(resolved.is_relative_to(folder) for folder in _folders_of(image_dir)):
        raise ValueError(f"it leads out of the folder of the images, {image_dir}, to {resolved}")
    status = resolved.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is not a regular file")
    if status.st_size > MAX_BYTES:
        raise ValueError(f"it has {status.st_size:,} bytes, more than the limit of {MAX_BYTES:,}")
    return resolved


def _folders_of(image_dir: Path) -> Iterator[Path]:
    """The folder itself, and the blobs of a repository in the Hub's cache: datasets--NAME/snapshots/COMMIT/..."""
    folder = Path(os.path.realpath(image_dir))
    yield folder
    for snapshot in (folder, *folder.parents):
        repository = snapshot.parent.parent
        if snapshot.parent.name == "snapshots" and re.match(r"(datasets|models|spaces)--", repository.name):
            yield repository / "blobs"
