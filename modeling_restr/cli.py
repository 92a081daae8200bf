"""The console command `restr`. Each command reads its options, calls the engine that does the work, and prints."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from . import __version__
from .options import SETTINGS, Device, Model, NumThreads, OutputDir, Revision, Threshold, run


USE, DATA, SHARE = "Use a model", "Prepare data", "Share a model"  # the groups of commands in `restr --help`

app = typer.Typer(context_settings=SETTINGS, add_completion=False)


def _show_version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def restr(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """ReSTR, referring image segmentation: a photo and a sentence in, a mask out."""


@app.command(rich_help_panel=USE)
def segment(
    model: Model,
    photo: Annotated[Path, typer.Argument(metavar="PHOTO", help="Image file.")],
    sentences: Annotated[
        list[str], typer.Argument(metavar="SENTENCE...", help="Referring expressions, each in quotes.")
    ],
    output_dir: OutputDir = Path("."),
    threshold: Threshold = 0.5,
    revision: Revision = None,
    device: Device = None,
    num_threads: NumThreads = None,
) -> None:
    """
    Find what sentences refer to in a photo.

    Writes an overlay picture with a legend and one mask per sentence as PNG files. Prints the score of each sentence
    and its mask's share of the picture, and warns of words that the model does not know.

    Example: restr segment examples/restr_mini photo.jpg "the upper dog" "the lower dog"
    """
    if not photo.is_file():
        raise ValueError(f"Expected an image file as PHOTO, got {photo}, which does not exist.")
    import numpy as np
    from transformers import pipeline

    from .options import choose_device
    from .visualization import add_legend, draw_masks, read_photo, save_image

    task: Any = "referring-image-segmentation"  # transformers types its own tasks only
    pipe: Any = pipeline(task, model=model, revision=revision, device=choose_device(device, num_threads))
    image = read_photo(photo, pipe.processor.image_processor)
    results = pipe(image, text=sentences, threshold=threshold)

    output_dir.mkdir(parents=True, exist_ok=True)
    print(f"{'score':>5}  {'share':>6}  sentence")
    for number, result in enumerate(results, start=1):
        share = (np.asarray(result["mask"]) > 0).mean()
        words = re.sub(r"\W+", "-", result["label"].lower()).strip("-")[:40]
        path = save_image(result["mask"], output_dir / f"{photo.stem}_mask{number}_{words}.png")
        print(f"{result['score']:5.2f}  {share:6.1%}  {result['label']}  -> {path}")
    overlay = draw_masks(image, [result["mask"] for result in results])
    labels = [f"{result['label']} ({result['score']:.2f})" for result in results]
    print(f"Overlay: {save_image(add_legend(overlay, labels), output_dir / f'{photo.stem}_overlay.png')}")


def main() -> None:
    run(app)


if __name__ == "__main__":
    main()
