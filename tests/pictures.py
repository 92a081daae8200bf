"""Image files in memory."""

import io

from PIL import ExifTags, Image


def encode(image: Image.Image, file_format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def make_exif(orientation: int | None) -> Image.Exif:
    """EXIF data with this orientation: 6 is shown rotated clockwise by a quarter turn."""
    exif = Image.Exif()
    if orientation is not None:
        exif[ExifTags.Base.Orientation] = orientation
    return exif
