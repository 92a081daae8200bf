"""Atomic writing of files, and folders that one run at a time writes to."""

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout


@contextmanager
def replace_file(path: Path, label: str = "") -> Iterator[Path]:
    """
    Yield a temporary path in the folder of `path`. What is written there becomes `path` in one move, unless the body
    raises. No other process has the same temporary path.

    Args:
        label: Part of the temporary name, `.NAME.LABEL.RANDOM.tmp`, by which leftovers of a killed process are known.
    """
    parts = (path.name, label, uuid.uuid4().hex, "tmp")
    temporary = path.with_name(f".{'.'.join(filter(None, parts))}")
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
