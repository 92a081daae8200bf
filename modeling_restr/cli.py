"""The console command `restr`. Each command reads its options, calls the engine that does the work, and prints."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from . import __version__
from .options import SETTINGS, Device, Model, NumThreads, OutputDir, Revision, Threshold, run


USE, DATA, SHARE = "Use a model", "Prepare data", "Share a model"  # the groups of commands in `restr --help`
CARD = "Model card"

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


@app.command(rich_help_panel=USE)
def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen on.", rich_help_panel="Server")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 picks a free one.", rich_help_panel="Server")
    ] = 8080,
    revision: Revision = None,
    device: Device = None,
    num_threads: NumThreads = None,
) -> None:
    """
    Serve a model over HTTP on this machine, as a Hugging Face Inference Endpoint does.

    POST / takes a request as JSON, or a photo as it is with the sentences in the query. GET /health reports that the
    server is up. The server is for trials: it has neither TLS nor authentication.

    Example: restr serve examples/restr_mini --port 8080
    """
    from .hub.handler import EndpointHandler
    from .hub.serve import Server
    from .options import choose_device

    handler = EndpointHandler(model, revision=revision, device=choose_device(device, num_threads))
    with Server((host, port), handler) as server:
        print(f"Serving {model} at http://{server.server_name}:{server.server_port}", flush=True)
        server.serve_forever()


@app.command(rich_help_panel=SHARE)
def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of the model.")],
    repo_id: Annotated[
        str, typer.Argument(metavar="REPO_ID", help="Repository on the Hub such as you/restr, created if absent.")
    ],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    tag: Annotated[str | None, typer.Option(help="Tag of this version, such as v1.")] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="JSON file with the settings of the training.", rich_help_panel=CARD)
    ] = None,
    evaluation: Annotated[
        list[Path] | None,
        typer.Option(help="JSON file of an evaluation of these weights. Repeatable.", rich_help_panel=CARD),
    ] = None,
    training_data: Annotated[
        str | None,
        typer.Option(help="Markdown about the training data and its terms of use.", rich_help_panel=CARD),
    ] = None,
    dataset: Annotated[
        list[str] | None, typer.Option(help="Hub id of a training dataset. Repeatable.", rich_help_panel=CARD)
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Hub id of the model that the training started from.", rich_help_panel=CARD)
    ] = None,
    license: Annotated[
        str | None,
        typer.Option(help="Licence of the weights, such as cc-by-4.0.", show_default="none", rich_help_panel=CARD),
    ] = None,
    limits: Annotated[
        str | None, typer.Option(help="Markdown about limits of this model in particular.", rich_help_panel=CARD)
    ] = None,
    photo: Annotated[
        Path | None,
        typer.Option(help="Photo that shows the model's work, with --sentence and --credit.", rich_help_panel=CARD),
    ] = None,
    sentence: Annotated[
        list[str] | None, typer.Option(help="Sentence about the photo. Repeatable.", rich_help_panel=CARD)
    ] = None,
    credit: Annotated[str | None, typer.Option(help="Author and licence of the photo.", rich_help_panel=CARD)] = None,
    space: Annotated[
        str | None, typer.Option(help="Hub id of a Space that runs the model.", rich_help_panel=CARD)
    ] = None,
) -> None:
    """
    Push a model to the Hub with its code and model card, in one commit.

    With any option of the model card, the folder's README.md is regenerated first. Otherwise README.md is pushed as it
    is, or, if there is none, a general card. Trainings write evaluation.json and recipe.json to their output folder.
    Log in with `hf auth login` first, or set HF_TOKEN to a token with write access.

    Example: restr push runs/model you/restr --evaluation runs/evaluation.json --recipe runs/recipe.json
    """
    from .hub.push import push_to_hub, rewrite_card

    card = {
        "recipe": recipe,
        "evaluations": evaluation,
        "data": training_data,
        "datasets": dataset,
        "base_model": base_model,
        "license": license,
        "limits": limits,
        "photo": photo,
        "sentences": sentence,
        "credit": credit,
        "space": space,
    }
    given = {name: value for name, value in card.items() if value}
    if given:
        print(f"Card: {rewrite_card(folder, **given)}")
    commit = push_to_hub(folder, repo_id, private=private or None, tag=tag)
    print(f"{commit.repo_url} is at {commit.oid}")


def main() -> None:
    run(app)


if __name__ == "__main__":
    main()
