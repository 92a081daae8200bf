"""Pictures of masks: overlays on the image, one colour per expression, with a legend."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

from .files import replace_file


# Bright, and distinct also for readers with a colour vision deficiency (Okabe and Ito, 2008, without black).
COLORS = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (204, 121, 167),
    (213, 94, 0),
    (240, 228, 66),
    (0, 114, 178),
)
OPACITY = 0.5
TILE_SIZE = 320  # pixels on the longer side of an image on a sheet of many
TILES_PER_ROW = 4


def get_color(index: int) -> tuple[int, int, int]:
    """RGB colour of the expression `index`. After the last colour, the first one follows."""
    return COLORS[index % len(COLORS)]


def read_photo(photo: Path | Image.Image, image_processor: Any) -> Image.Image:
    """Read a photo as the model sees it before resizing: upright, 8-bit RGB, transparency on white."""
    pixels = image_processor.process_image(photo, do_convert_rgb=True, do_rescale=True)  # (3, height, width)
    return Image.fromarray(np.ascontiguousarray(np.moveaxis(pixels, 0, -1)))


def draw_masks(image: Image.Image, masks: Sequence[np.ndarray | Image.Image]) -> Image.Image:
    """
    Tint each mask in its colour and outline it. The rest of the image stays as it is.

    Args:
        image (`PIL.Image.Image`): The image.
        masks (sequence of N arrays or images of the image's size): Non-zero inside.

    Raises:
        `ValueError`: A mask has another size than the image.
    """
    canvas = image.convert("RGB")
    line_width = max(1, round(max(canvas.size) / 300))
    for index, mask in enumerate(masks):
        selected = Image.fromarray((np.asarray(mask) > 0).astype(np.uint8) * 255)
        if selected.size != canvas.size:
            raise ValueError(
                f"Expected masks of the image's size (width x height) {canvas.size[0]}x{canvas.size[1]}, got "
                f"{selected.size[0]}x{selected.size[1]} pixels for mask {index}."
            )
        color = Image.new("RGB", canvas.size, get_color(index))
        canvas.paste(color, mask=selected.point(lambda value: int(value * OPACITY)))
        grown = selected.filter(ImageFilter.MaxFilter(2 * line_width + 1))
        outline = Image.fromarray(np.asarray(grown) & ~np.asarray(selected))
        canvas.paste(color, mask=outline)
    return canvas


def add_legend(image: Image.Image, labels: Sequence[str]) -> Image.Image:
    """Add a white strip below the image with a coloured square and a label per line. Long labels are wrapped."""
    font_size = max(14, round(image.width / 32))
    font = ImageFont.load_default(font_size)
    swatch, margin, line_height = font_size, font_size // 2, round(font_size * 1.5)
    lines: list[tuple[int, str]] = []  # the label's number for its first line, otherwise -1
    for index, label in enumerate(labels):
        wrapped = _wrap(label, font, image.width - swatch - 3 * margin)
        lines += [(index if number == 0 else -1, line) for number, line in enumerate(wrapped)]
    canvas = Image.new("RGB", (image.width, image.height + line_height * len(lines) + 2 * margin), "white")
    canvas.paste(image)
    draw = ImageDraw.Draw(canvas)
    for row, (index, line) in enumerate(lines):
        top = image.height + margin + row * line_height
        if index >= 0:
            draw.rectangle((margin, top + 2, margin + swatch, top + 2 + swatch), fill=get_color(index))
        draw.text((swatch + 2 * margin, top), line, fill="black", font=font)
    return canvas


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Break `text` between words into lines of at most `width` pixels. A longer word gets its own line."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def draw_tile(
    image: Image.Image, masks: Sequence[np.ndarray | Image.Image], labels: Sequence[str], size: int = TILE_SIZE
) -> Image.Image:
    """
    Draw a small picture for a sheet of many: the resized image with its masks, and a legend below.

    Args:
        image (`PIL.Image.Image`): The image.
        masks (sequence of N arrays or images of the image's size): Non-zero inside.
        labels (sequence of N strings): Legend of each mask.
        size (`int`): Longer side of the image in pixels.
    """
    upright = ImageOps.exif_transpose(image).convert("RGB")
    width, height = (max(1, round(side * size / max(upright.size))) for side in upright.size)
    small = upright.resize((width, height), Image.Resampling.BICUBIC)
    inside = [Image.fromarray(np.asarray(mask) > 0) for mask in masks]
    resized = [mask.resize((width, height), Image.Resampling.NEAREST) for mask in inside]
    return add_legend(draw_masks(small, resized), labels)


def arrange_in_grid(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Put images row by row on a white sheet, with cells for the widest and the tallest of them."""
    width, height = max(image.width for image in images), max(image.height for image in images)
    sheet = Image.new("RGB", (min(columns, len(images)) * width, -(-len(images) // columns) * height), "white")
    for number, image in enumerate(images):
        sheet.paste(image, ((number % columns) * width, (number // columns) * height))
    return sheet


def save_image(image: Image.Image, path: Path) -> Path:
    """Write a PNG file atomically. Returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as temporary:
        image.save(temporary, format="PNG")
    return path
