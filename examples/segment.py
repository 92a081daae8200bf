"""
Segment what sentences refer to in a photograph of your own:

    python examples/segment.py photo.jpg "the red circle" "the star left of the square"

Writes an overlay picture with a legend and one mask a sentence as PNG files, beside each other in `--output_dir`.
"""

import argparse
import os
import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from transformers import pipeline

import modeling_restr  # noqa: F401  (makes `pipeline` know ReSTR)
from modeling_restr.visualization import add_legend, draw_masks


CHECKPOINT = Path(__file__).parent / "checkpoint"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Segment what sentences refer to in a photograph.")
    parser.add_argument("photo", type=Path, help="the image file")
    parser.add_argument("sentences", nargs="+", help="one or more referring expressions, each in quotes")
    parser.add_argument("--model", default=str(CHECKPOINT), help="folder or Hub id (default: the shipped checkpoint)")
    parser.add_argument("--output_dir", type=Path, default=Path("."), help="where the PNG files go (default: here)")
    parser.add_argument("--threshold", type=float, default=0.5, help="probability above which a pixel is inside")
    parser.add_argument("--device", default=None, help="such as cpu or cuda:0 (default: a GPU where there is one)")
    return parser.parse_args()


def save_image(image: Image.Image, path: Path) -> Path:
    """Write to a temporary name first: a picture is whole or not there."""
    temporary = path.with_name(f".{path.name}.tmp")
    image.save(temporary, format="PNG")
    os.replace(temporary, path)
    return path


def main() -> None:
    args = parse_args()
    if not args.photo.is_file():
        raise SystemExit(f"There is no file {args.photo}: expected the path of an image.")
    pipe = pipeline("image-segmentation", model=args.model, device=args.device)
    with Image.open(args.photo) as opened:
        photo = ImageOps.exif_transpose(opened).convert("RGB")
    try:
        results = pipe(photo, text=args.sentences, threshold=args.threshold)
    except ValueError as error:  # a sentence without words, a threshold out of range, ...
        raise SystemExit(str(error)) from error

    args.output_dir.mkdir(parents=True, exist_ok=True)
    print(f"{'score':>5}  {'share':>6}  sentence")
    for number, result in enumerate(results, start=1):
        share = (np.asarray(result["mask"]) > 0).mean()
        words = re.sub(r"\W+", "-", result["label"].lower()).strip("-")[:40]
        path = save_image(result["mask"], args.output_dir / f"{args.photo.stem}_mask{number}_{words}.png")
        print(f"{result['score']:5.2f}  {share:6.1%}  {result['label']}  -> {path}")
    overlay = draw_masks(photo, [result["mask"] for result in results])
    labels = [f"{result['label']} ({result['score']:.2f})" for result in results]
    print(f"Overlay: {save_image(add_legend(overlay, labels), args.output_dir / f'{args.photo.stem}_overlay.png')}")


if __name__ == "__main__":
    main()
