"""Atomic writing of files and folders, hashes of files, and locks on folders."""

import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """
    Yield a temporary path in the folder of `path`, `.NAME.RANDOM.tmp`. A file written there is moved to `path`, unless
    the body raises. No other process has the same temporary path.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8 atomically."""
    with replace_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(content, indent=indent) + "\n")


def record_settings(path: Path, settings: dict[str, Any], is_new: bool) -> dict[str, tuple[Any, Any]]:
    """
    Compare what the results in a folder depend on with the JSON file that records it, which a new folder gets first.

    Returns:
        {name: (recorded value, value now)} of each setting that differs. A value that was not recorded is None.
    """
    if is_new:
        write_json(path, settings)
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {name: (earlier.get(name), value) for name, value in settings.items() if earlier.get(name) != value}


@contextmanager
def replace_files(folder: Path, essential: Iterable[str]) -> Iterator[Path]:
    """
    Yield a temporary folder. The files that are written there are moved to `folder` unless the body raises. Other files
    of an existing folder are kept. A subfolder that is written replaces one with the same name.

    Args:
        folder: Where to move the files; parent folders are created as needed.
        essential: Patterns of the files that the folder cannot be used without. Old ones are removed first, and new
            ones are moved last, so that an interrupted move leaves none of them instead of a mixture.

    Raises:
        ValueError: `folder` is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"Expected a folder to save to, got {folder}, which is a file.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    place = folder if folder.exists() else folder.parent  # on the same disk, so that moving is renaming
    with tempfile.TemporaryDirectory(dir=place, prefix=f".{folder.name}.") as temporary:
        staging = Path(temporary) / folder.name
        staging.mkdir()
        yield staging
        if not folder.exists():
            os.replace(staging, folder)
            return
        for path in find_files(folder, essential):
            path.unlink()
        last = find_files(staging, essential)
        for path in (*sorted(set(staging.iterdir()) - set(last)), *last):
            target = folder / path.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(path, target)


def find_files(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """The files of a folder that match any of the patterns, by name."""
    return sorted({path for pattern in patterns for path in folder.glob(pattern)})


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def hold_folder(folder: Path, name: str) -> Iterator[None]:
    """
    Keep other runs from writing to a folder, by a lock on its file `.NAME.lock`.

    Raises:
        ValueError: Another run holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / f".{name}.lock", timeout=0):
            yield
    except Timeout:
        raise ValueError(f"Another process is writing to {folder}: wait for it, or stop it.") from None
