"""Image files before they are decoded: the sizes in their headers, and which names lead to one and the same file."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

from PIL import ExifTags, Image

from .image_files import resolve_image


Key = TypeVar("Key", bound=Hashable)


class ImageSize(NamedTuple):
    """(height, width) of an image file as it is shown, and as its pixels are stored: EXIF may turn it by 90 degrees."""

    shown: tuple[int, int]
    stored: tuple[int, int]


def read_size(path: Path, image_dir: Path | None = None) -> ImageSize:
    """
    The size in a file's header. The file must lie in `image_dir`, where that is given.

    Raises:
        ValueError: it is missing, lies elsewhere, or is no image.
    """
    try:
        with Image.open(resolve_image(path, image_dir)) as image:
            # Pillow would decode a PNG to look for EXIF behind its pixels.
            has_exif = image.format != "PNG" or "exif" in image.info
            is_turned = has_exif and image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            stored = (image.height, image.width)
    except Exception as error:  # Pillow raises nearly anything on a damaged file
        raise ValueError(f"{path} cannot be read ({error}).") from error
    return ImageSize(stored[::-1] if is_turned else stored, stored)


def find_shared_files(paths: Mapping[Key, Path]) -> dict[Key, list[Key]]:
    """{key: all keys of its file} of those whose file is also another's. Missing files count for nothing."""
    keys_of = defaultdict(list)
    for key, path in paths.items():
        keys_of[os.path.normpath(path)].append(key)
    shared = (keys for file, keys in keys_of.items() if len(keys) > 1 and os.path.isfile(file))
    return {key: keys for keys in shared for key in keys}


__all__ = ["ImageSize", "find_shared_files", "read_size"]
