"""
Draw the figure of docs/architecture.md, with the masks that restr-mini finds:

    python docs/figures/draw_architecture.py

Needs matplotlib (`pip install "modeling-restr[tracking]"`). Coordinates are pixels of a page that is 800 wide.
"""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Circle, FancyBboxPatch, Rectangle
from PIL import Image
from transformers import AutoModelForImageSegmentation, AutoProcessor

import modeling_restr  # noqa: F401  (registers ReSTR with the Auto classes)
from modeling_restr.visualization import draw_masks


ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "examples" / "restr_mini"
OUTPUT = Path(__file__).with_name("architecture.png")
SENTENCE = "the upper dog"
WIDTH, HEIGHT = 800, 500
INK, GREY = "#222222", "#6b6b6b"
# Fill and edge of what is computed once per image, of what is computed per sentence, and of the fusion's frame.
PER_IMAGE, PER_SENTENCE, FRAME = ("#d9ecf7", "#2b83ba"), ("#fde8d0", "#d9822b"), ("#f6f6f6", "#d0d0d0")


def compute_pictures() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The model's input (H, W, 3) uint8, its patch logits (h, w), and the input with the mask drawn on it."""
    model = AutoModelForImageSegmentation.from_pretrained(MODEL).eval()
    processor: Any = AutoProcessor.from_pretrained(MODEL)
    inputs = processor(images=Image.open(MODEL / "example.jpg"), text=SENTENCE, return_tensors="pt")
    del inputs["original_sizes"]
    with torch.inference_mode():
        outputs = model(**inputs)
    settings = processor.image_processor
    pixels = inputs["pixel_values"][0].permute(1, 2, 0).numpy()  # (H, W, 3)
    pixels = ((pixels * settings.image_std + settings.image_mean).clip(0, 1) * 255).round().astype(np.uint8)
    overlay = draw_masks(
        Image.fromarray(pixels), [np.zeros(pixels.shape[:2]), outputs.logits[0].numpy() > 0]
    )  # the second colour
    return pixels, outputs.patch_logits[0].numpy(), np.asarray(overlay)


def draw_box(axes: Axes, left: float, top: float, width: float, height: float, colors: tuple[str, str]) -> None:
    fill, edge = colors
    style = "round,pad=0,rounding_size=6"
    axes.add_patch(FancyBboxPatch((left, top), width, height, boxstyle=style, facecolor=fill, edgecolor=edge, lw=1))


def write(axes: Axes, x: float, y: float, text: str, size: float = 7, **options: Any) -> None:
    text = text.replace(" x ", " \N{MULTIPLICATION SIGN} ")
    axes.text(x, y, text, **{"ha": "center", "va": "center", "color": INK, "fontsize": size, **options})


def draw_part(
    axes: Axes, left: float, top: float, width: float, height: float, name: str, text: str, colors: Any
) -> None:
    """A box with a name and what it does."""
    draw_box(axes, left, top, width, height, colors)
    middle, center = left + width / 2, top + height / 2
    write(axes, middle, center - 4 - 6 * text.count("\n"), name, 7.5, weight="bold", va="bottom", linespacing=1.1)
    write(axes, middle, center + 2 - 6 * text.count("\n"), text, 6.5, va="top", linespacing=1.3)


def draw_arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    style = {"arrowstyle": "-|>,head_width=0.22,head_length=0.4", "color": INK, "lw": 1, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", xy=end, xytext=start, arrowprops=style)


def draw_picture(axes: Axes, left: float, top: float, side: float, pixels: np.ndarray, **options: Any) -> None:
    axes.imshow(pixels, extent=(left, left + side, top + side, top), zorder=2, **options)
    axes.add_patch(Rectangle((left, top), side, side, facecolor="none", edgecolor=GREY, lw=0.8, zorder=4))


def draw_grid(axes: Axes, left: float, top: float, side: float, num_cells: int) -> None:
    for offset in np.linspace(0, side, num_cells + 1)[1:-1]:
        axes.plot([left + offset] * 2, [top, top + side], color="white", lw=0.35, alpha=0.6, zorder=3)
        axes.plot([left, left + side], [top + offset] * 2, color="white", lw=0.35, alpha=0.6, zorder=3)


def draw_inputs(axes: Axes, photo: np.ndarray, num_patches: int) -> None:
    draw_box(axes, 10, 72, 112, 36, PER_SENTENCE)
    write(axes, 66, 90, f"“{SENTENCE}”", 8.5, style="italic")
    write(axes, 66, 119, "N sentences, T words", 7, color=GREY)
    draw_picture(axes, 11, 195, 110, photo)
    draw_grid(axes, 11, 195, 110, num_patches)
    write(axes, 66, 316, "B images, P patches", 7, color=GREY)


def draw_encoders(axes: Axes) -> None:
    draw_part(axes, 146, 62, 116, 56, "Language encoder", "6 post-norm blocks", PER_SENTENCE)
    draw_part(axes, 146, 222, 116, 56, "Vision encoder", "ViT-B/16, 12 blocks", PER_IMAGE)
    for top, colors in ((62, PER_SENTENCE), (222, PER_IMAGE)):
        draw_part(axes, 315, top, 78, 56, "Project", "L2 norm, linear", colors)
        center = top + 28
        draw_arrow(axes, (122, center), (146, center))
        draw_arrow(axes, (262, center), (315, center))
        draw_arrow(axes, (393, center), (434, center))
    write(axes, 287, 81, "N x T x D", 6.5, color=GREY)
    write(axes, 287, 241, "B x P x D", 6.5, color=GREY)
    write(axes, 413, 81, "words", 6.5, color=GREY)
    write(axes, 413, 241, "patches", 6, color=GREY)


def draw_fusion(axes: Axes, patch_logits: np.ndarray) -> None:
    text = "2 pre-norm blocks\nover patches\nand words"
    draw_part(axes, 434, 62, 112, 216, "Visual-linguistic\nencoder", text, PER_SENTENCE)
    draw_part(axes, 590, 62, 130, 56, "Class-seed encoder", "2 blocks, words + seed", PER_SENTENCE)
    write(axes, 655, 24, "learned class seed", 7, weight="bold", color=PER_SENTENCE[1])
    draw_arrow(axes, (655, 33), (655, 62))
    draw_arrow(axes, (546, 90), (590, 90))
    write(axes, 567, 81, "words", 6.5, color=GREY)
    draw_arrow(axes, (655, 118), (655, 238))
    write(axes, 660, 168, "adaptive classifier\nN x D", 6.5, color=GREY, ha="left", linespacing=1.3)
    axes.add_patch(Circle((655, 250), 12, facecolor=PER_SENTENCE[0], edgecolor=PER_SENTENCE[1], lw=1))
    write(axes, 655, 249.5, "·", 16, weight="bold")
    draw_arrow(axes, (546, 250), (643, 250))
    write(axes, 582, 241, "N x P x D", 6.5, color=GREY)
    draw_arrow(axes, (667, 250), (696, 250))
    limit = np.abs(patch_logits).max()
    draw_picture(axes, 696, 205, 90, patch_logits, cmap="RdBu_r", vmin=-limit, vmax=limit)
    write(axes, 741, 196, "patch logits", 7, weight="bold")
    write(axes, 735, 308, "N x h x w", 6.5, color=GREY, ha="right")


def draw_decoder(axes: Axes, overlay: np.ndarray) -> None:
    draw_part(axes, 606, 384, 180, 56, "Weight", "each patch times its logit", PER_SENTENCE)
    draw_arrow(axes, (741, 295), (741, 384))
    axes.plot(620, 250, "o", color=INK, markersize=3)
    draw_arrow(axes, (620, 250), (620, 384))
    text = "4 x (linear map, upsampling x 2, LeakyReLU)\nits image half runs once per image"
    draw_part(axes, 300, 377, 250, 70, "Pixel decoder", text, PER_SENTENCE)
    axes.plot(408, 250, "o", color=INK, markersize=3)
    draw_arrow(axes, (408, 250), (408, 377))
    write(axes, 402, 352, "patches before the fusion", 6.5, color=GREY, ha="right")
    draw_arrow(axes, (606, 412), (550, 412))
    write(axes, 578, 403, "N x P x D", 6.5, color=GREY)
    draw_arrow(axes, (300, 412), (121, 412))
    write(axes, 210, 403, "pixel logits N x H x W", 7, weight="bold")
    draw_picture(axes, 11, 357, 110, overlay)
    write(axes, 66, 478, "N masks (logit > 0)", 7, color=GREY)


def draw_legend(axes: Axes) -> None:
    for left, colors, text in ((300, PER_IMAGE, "once per image"), (410, PER_SENTENCE, "once per sentence")):
        draw_box(axes, left, 470, 16, 12, colors)
        write(axes, left + 22, 476, text, 7, ha="left")


def main() -> None:
    photo, patch_logits, overlay = compute_pictures()
    plt.rcParams["font.family"] = "DejaVu Sans"
    figure = plt.figure(figsize=(WIDTH / 100, HEIGHT / 100), dpi=200)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    draw_box(axes, 304, 8, 488, 322, FRAME)
    write(axes, 314, 20, "Fusion", 9, weight="bold", color=GREY, ha="left")
    draw_inputs(axes, photo, patch_logits.shape[0])
    draw_encoders(axes)
    draw_fusion(axes, patch_logits)
    draw_decoder(axes, overlay)
    draw_legend(axes)
    axes.set(xlim=(0, WIDTH), ylim=(HEIGHT, 0), aspect="auto")  # y grows downwards
    figure.savefig(OUTPUT, facecolor="white")
    image = Image.open(OUTPUT).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    image.save(OUTPUT, optimize=True)
    print(f"Wrote {OUTPUT}")


if __name__ == "__main__":
    main()
