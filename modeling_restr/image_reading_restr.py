"""Reading of images in any form, upright and decoded: the first step of ReSTR's image processor."""

from .requirements_restr import TRANSFORMERS  # noqa: F401  (first: checks the version of transformers)


# isort: split
import base64
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any
from urllib.request import urlopen

import numpy as np
import torch
from huggingface_hub.utils import get_session
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from transformers.image_utils import ChannelDimension


_CHANNELS = (1, 3, 4)
# How far a float image may overshoot its range, as resampling filters do, before it counts as another range.
_OVERSHOOT = 1e-3
# Maximum depth of nested lists of images. Without it, a list that contains itself would never end.
MAX_DEPTH = 3


class UnreadableImageError(ValueError):
    """An image is missing, damaged, too large or of an unknown kind, or not an image at all. The message names it."""


def is_image_file(value: Any) -> bool:
    """Whether a value is the content of a file, or an open file."""
    return isinstance(value, (bytes, bytearray, memoryview)) or callable(getattr(value, "read", None))


def list_images(images: Any, max_depth: int = MAX_DEPTH) -> list[Any]:
    """Flatten lists of images and arrays of shape (images, ...) without opening anything.

    Raises:
        UnreadableImageError: Lists are nested too deeply.
    """
    if isinstance(images, (list, tuple)):
        if not max_depth:
            raise UnreadableImageError(f"Expected images in lists at most {MAX_DEPTH} deep, got deeper ones.")
        return [leaf for item in images for leaf in list_images(item, max_depth - 1)]
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        return list(images)
    return [images]


@contextmanager
def naming_the_image(source: Any, place: int | None = None) -> Iterator[None]:
    """Turn every error of reading an image into an [`UnreadableImageError`] that says which image it is."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises nearly anything on a damaged file
        name = _name_image(source, place)
        reason = str(error)
        if isinstance(error, UnidentifiedImageError):
            reason = "it is not an image of a known format, such as JPEG or PNG"
        raise UnreadableImageError(f"{name} cannot be read: {reason or type(error).__name__}") from error


def open_image(source: Any) -> Image.Image | np.ndarray | torch.Tensor:
    """Open an image in any form. Its pixels may still be encoded.

    Args:
        source: A path, a URL, a data URI, base64, bytes of a file, an open file (read from its start if it can seek),
            or a PIL image, array or tensor, which are returned as they are.
    """
    if isinstance(source, (str, os.PathLike)):
        source = _open_text(os.fspath(source))
    elif is_image_file(source):
        source = Image.open(BytesIO(_read_bytes(source)))
    if not isinstance(source, (Image.Image, np.ndarray, torch.Tensor)):
        raise ValueError(
            "expected an image as a PIL image, a NumPy array, a tensor, a path, a URL, a data URI, bytes or an open"
            f" file, got {type(source).__name__}."
        )
    if getattr(source, "format", None) == "EPS" and getattr(source, "tile", None):
        raise ValueError("expected no EPS file, which is a program that Ghostscript runs. Convert it to PNG first.")
    return source


def read_image(
    source: Any,
    input_data_format: str | ChannelDimension | None = None,
    draft_size: tuple[int, int] | None = None,
) -> tuple[Image.Image | np.ndarray, tuple[int, int]]:
    """Decode an image in any form, turned as in a viewer.

    Args:
        source: An image as [`open_image`] takes it.
        input_data_format: Where the channels of an array are. By default they are found.
        draft_size: (height, width) of a canvas that the image only needs to fill. JPEG files are then decoded at 1/2,
            1/4 or 1/8 of their size if that is enough, which is several times faster.

    Returns:
        A PIL image of mode "L" or "RGB", or an array of shape (1, 3 or 4 channels, height, width) for images with
        transparency, 16 bits or floats, and for arrays and tensors; and (height, width) of the image in its file.
    """
    image = open_image(source)
    if isinstance(image, Image.Image):
        size = (image.height, image.width)
        if draft_size is not None and image is not source:  # it would change an image of the caller
            _request_draft(image, draft_size)
        decoded = _decode(image)
        is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) > 4  # by a quarter
        return decoded, size[::-1] if is_turned else size
    array = _to_channels_first(image, input_data_format)
    if array.size == 0:
        raise ValueError(f"expected at least one pixel, got (channels, height, width) {array.shape}.")
    return array, array.shape[1:]


def _request_draft(image: Image.Image, canvas_size: tuple[int, int]) -> None:
    """Have a JPEG file decoded at the smallest of its sizes that fills the canvas. Other files stay as they are."""
    sides = sorted(image.size)  # it may be turned by a quarter
    scale = min(canvas / side for canvas, side in zip(sorted(canvas_size), sides))
    image.draft(None, (math.ceil(image.width * scale), math.ceil(image.height * scale)))


def to_uint8(array: np.ndarray) -> np.ndarray:
    """Scale an image of any number type to 0..255."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if array.dtype.kind not in "iuf":
        raise ValueError(f"expected an array of numbers, got one of {array.dtype}.")
    low, high = float(array.min()), float(array.max())
    ranges = [65535] if array.dtype.kind == "u" and array.dtype.itemsize == 2 else [255, 65535]
    if array.dtype.kind == "f":
        ranges = [1, 255]
    full = next((full for full in ranges if -_OVERSHOOT * full <= low and high <= full * (1 + _OVERSHOOT)), None)
    if full is None:  # also for NaN
        raise ValueError(
            "expected values in 0..1 or 0..255 for floats, in 0..255 or 0..65535 for integers, before any"
            f" normalization; got {array.dtype} from {low} to {high}."
        )
    return np.clip(np.round(array * (255.0 / full)), 0, 255).astype(np.uint8)


def to_rgb(array: np.ndarray) -> np.ndarray:
    """Convert (1, 3 or 4 channels, height, width) to RGB, with transparency composited onto white."""
    if array.shape[0] not in _CHANNELS:
        raise ValueError(f"expected 1, 3 or 4 channels, got {array.shape[0]}.")
    if array.shape[0] == 4:
        white = 255 if array.dtype == np.uint8 else 1
        alpha = array[3:].astype(np.float32) / white
        composite = alpha * array[:3] + (1 - alpha) * white
        array = np.round(composite).astype(np.uint8) if white == 255 else composite
    return np.repeat(array, 3, axis=0) if array.shape[0] == 1 else array


def _name_image(source: Any, place: int | None) -> str:
    file_name = getattr(source, "filename", None) or getattr(source, "name", None)  # of a PIL image, or an open file
    name = source if isinstance(source, (str, os.PathLike)) else file_name
    if isinstance(name, (str, os.PathLike)) and name:
        return repr(os.fspath(name)[:100])
    return "The image" if place is None else f"Image {place} of the list"


def _open_text(source: str | bytes) -> Image.Image:
    # transformers' `load_image` would convert to RGB, which clips 16-bit images and drops transparency.
    if isinstance(source, bytes) or os.path.isfile(source):
        return Image.open(source)
    if source.startswith(("http://", "https://")):
        response = get_session().get(source, follow_redirects=True, timeout=60)
        response.raise_for_status()
        return Image.open(BytesIO(response.content))
    try:
        return Image.open(BytesIO(_decode_text(source)))
    except (ValueError, UnidentifiedImageError) as error:
        raise ValueError("there is no such file, and it is not a URL, a base64 image or a data URI.") from error


def _decode_text(text: str) -> bytes:
    if text[:5].lower() != "data:":
        return base64.b64decode(text)
    with urlopen(text) as content:  # decodes a data URI without opening a connection
        return content.read()


def _read_bytes(source: Any) -> bytes:
    if not callable(getattr(source, "read", None)):
        return bytes(source)
    if getattr(source, "seekable", lambda: False)():
        source.seek(0)
    content = source.read()
    if not isinstance(content, (bytes, bytearray, memoryview)):
        raise ValueError(f'expected a file opened in binary mode ("rb"), got one that reads {type(content).__name__}.')
    return bytes(content)


def _decode(image: Image.Image) -> Image.Image | np.ndarray:
    image.load()
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # otherwise it would be copied
        image = ImageOps.exif_transpose(image)
    if min(image.size) < 1:
        raise ValueError(f"expected at least one pixel, got (width, height) {image.size}.")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _decode_high_bit_depth(image)
    if image.has_transparency_data:
        return np.moveaxis(np.asarray(image.convert("RGBA")), -1, 0)
    return image if image.mode in ("L", "RGB") else image.convert("L" if image.mode == "1" else "RGB")


def _decode_high_bit_depth(image: Image.Image) -> np.ndarray:
    """Decode more than 8 bits to (1, height, width). A grey value that a PNG marks as transparent becomes white."""
    array = np.asarray(image)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int) and image.mode != "F":
        array = np.where(array == transparent, 65535, array).astype(np.uint16)
    return array[None]


def _to_channels_first(
    image: np.ndarray | torch.Tensor, input_data_format: str | ChannelDimension | None
) -> np.ndarray:
    """Convert to an array of shape (channels, height, width) from channels at either end."""
    is_tensor = isinstance(image, torch.Tensor)
    if isinstance(image, torch.Tensor):
        image = (image.float() if image.dtype == torch.bfloat16 else image).numpy(force=True)
    if image.ndim == 2:
        return image[None]
    ends = [end for end in ((0, -1) if is_tensor else (-1, 0)) if image.ndim == 3 and image.shape[end] in _CHANNELS]
    if ends and input_data_format is not None:
        ends = [0 if ChannelDimension(input_data_format) == ChannelDimension.FIRST else -1]
    if not ends:
        raise ValueError(
            "expected (height, width), (height, width, channels) or (channels, height, width) with 1, 3 or 4 channels,"
            f" got {image.shape}."
        )
    return np.moveaxis(image, ends[0], 0)


__all__ = [
    "UnreadableImageError",
    "is_image_file",
    "list_images",
    "naming_the_image",
    "open_image",
    "read_image",
    "to_rgb",
    "to_uint8",
]
