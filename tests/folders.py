"""The content of folders."""

from pathlib import Path


def read_files(folder: Path) -> dict[str, bytes]:
    """The content of all files, by their paths in the folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
