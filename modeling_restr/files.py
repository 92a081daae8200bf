"""Files that are written as a whole or not at all, in folders that one run at a time writes to."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def replace_file(path: Path, label: str = "") -> Iterator[Path]:
    """
    Yield a temporary path beside `path`. What is written there becomes `path` in one move, unless the body raises. No
    other process has the same temporary path.

    Args:
        label: Part of the temporary name, `.NAME.LABEL.RANDOM.tmp`, which tells whose it is should the process be killed.
    """
    parts = (path.name, label, uuid.uuid4().hex, "tmp")
    temporary = path.with_name(f".{'.'.join(filter(None, parts))}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def hold_folder(folder: Path, name: str) -> Iterator[None]:
    """
    Keep other runs from writing to a folder; they know of it by the file `.NAME.lock`.

    Raises:
        ValueError: Another run has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / f".{name}.lock", timeout=0):
            yield
    except Timeout:
        raise ValueError(f"Another process writes to {folder}: wait for it, or stop it.") from None
