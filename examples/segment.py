"""
Segment what sentences refer to in a photograph of your own:

    python examples/segment.py photo.jpg "the upper dog" "the lower dog"

Writes an overlay picture with a legend and one mask per sentence as PNG files into `--output_dir`. Words that the model
does not know, or has no place for, are named.
"""

import argparse
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import pipeline

import modeling_restr  # noqa: F401  (makes `pipeline` know ReSTR)
from modeling_restr.options import ArgumentParser, add_options, choose_device
from modeling_restr.visualization import add_legend, draw_masks, save_image


CHECKPOINT = Path(__file__).parent / "restr_mini"


def parse_args() -> argparse.Namespace:
    parser = ArgumentParser(description="Segment what sentences refer to in a photograph.")
    parser.add_argument("photo", type=Path, help="the image file")
    parser.add_argument("sentences", nargs="+", help="one or more referring expressions, each in quotes")
    parser.add_argument("--model", default=str(CHECKPOINT), help="folder or Hub id (default: the shipped checkpoint)")
    output_dir = {"default": Path("."), "help": "where the PNG files go (default: here)"}
    add_options(parser, "threshold", "revision", "device", "num_threads", output_dir=output_dir)
    return parser.parse_args()


def read_photo(path: Path, image_processor: Any) -> Image.Image:
    """The photo as the model sees it, before it is resized: upright, 8-bit RGB, transparency on white."""
    pixels = image_processor.process_image(path, do_convert_rgb=True, do_rescale=True)  # (3, height, width)
    return Image.fromarray(np.moveaxis(pixels, 0, -1))


def main() -> None:
    args = parse_args()
    if not args.photo.is_file():
        raise SystemExit(f"There is no file {args.photo}: expected the path of an image.")
    try:
        task: Any = "referring-image-segmentation"  # transformers types its own tasks only
        pipe: Any = pipeline(task, model=args.model, revision=args.revision, device=choose_device(args))
        photo = read_photo(args.photo, pipe.processor.image_processor)
        results = pipe(photo, text=args.sentences, threshold=args.threshold)
    # No model or image, a sentence without words, a threshold out of range, ...
    except (ValueError, OSError) as error:
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
