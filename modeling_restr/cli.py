"""The console command `restr`. Each command reads its options, calls the engine that does the work, and prints."""

import functools
import inspect
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from . import __version__
from .options import (
    FILE,
    FOLDER,
    SETTINGS,
    Data,
    DataRevision,
    Device,
    DType,
    ExpressionsPerBatch,
    MaxImages,
    Model,
    ModelDType,
    NumThreads,
    OutputDir,
    Revision,
    Threshold,
    needs_extra,
    run,
)


if TYPE_CHECKING:
    from .data.sources import Plan

USE, DATA, SHARE = "Use a model", "Prepare data", "Share a model"  # the groups of commands in `restr --help`
CARD = "Model card"
PAGE = "Web page"

app = typer.Typer(context_settings=SETTINGS, add_completion=False, rich_markup_mode="markdown")


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
    photo: Annotated[Path, typer.Argument(metavar="PHOTO", help="Image file.", **FILE)],
    sentences: Annotated[
        list[str], typer.Argument(metavar="SENTENCE...", help="Referring expressions, each in quotes.")
    ],
    output_dir: OutputDir = Path("."),
    format: Annotated[
        Literal["png", "coco"],
        typer.Option(help="PNG files, or a COCO instances file instead of the masks.", rich_help_panel="Output"),
    ] = "png",
    threshold: Threshold = 0.5,
    revision: Revision = None,
    device: Device = None,
    num_threads: NumThreads = None,
) -> None:
    """
    Segment the objects in a photo that sentences refer to.

    Writes an overlay picture with a legend and one mask per sentence as PNG files, or all masks as one COCO instances
    file. Prints the score of each sentence and its mask's share of the picture, and warns about words that the model
    does not know.

    Example: restr segment examples/restr_mini photo.jpg "the upper dog" "the lower dog"
    """
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
        line = f"{result['score']:5.2f}  {share:6.1%}  {result['label']}"
        if format == "png":
            words = re.sub(r"\W+", "-", result["label"].lower()).strip("-")[:40]
            line += f"  -> {save_image(result['mask'], output_dir / f'{photo.stem}_mask{number}_{words}.png')}"
        print(line)
    if format == "coco":
        print(f"Masks: {_write_instances(photo, results, output_dir / f'{photo.stem}_instances.json')}")
    overlay = draw_masks(image, [result["mask"] for result in results])
    labels = [f"{result['label']} ({result['score']:.2f})" for result in results]
    print(f"Overlay: {save_image(add_legend(overlay, labels), output_dir / f'{photo.stem}_overlay.png')}")


def _write_instances(photo: Path, results: list[dict[str, Any]], path: Path) -> Path:
    with needs_extra("train"):
        from .data.coco_export import build_instances
        from .data.segmentation import encode_mask
    import numpy as np

    from .files import write_json

    found = []
    for result in results:
        mask = encode_mask(np.asarray(result["mask"]))
        found.append(
            {"row": 0, "file_name": photo.name, "text": result["label"], "score": result["score"], "mask": mask}
        )
    write_json(path, build_instances(found), indent=None)
    return path


@app.command(rich_help_panel=USE)
def evaluate(
    model: Model,
    data: Data,
    split: Annotated[str, typer.Option(help="Split such as val, testA or testB.", rich_help_panel="Data")],
    output_dir: OutputDir,
    revision: Revision = None,
    data_revision: DataRevision = None,
    benchmark: Annotated[
        Literal["refcoco", "refcoco+", "refcocog"] | None,
        typer.Option(
            help="Benchmark in DATA, to compare with the published counts and the paper's results.",
            rich_help_panel="Data",
        ),
    ] = None,
    max_images: MaxImages = None,
    threshold: Threshold = 0.5,
    dtype: ModelDType = DType.float32,
    by_length: Annotated[
        bool, typer.Option("--by-length", help="Also group results by number of words.", rich_help_panel="Output")
    ] = False,
    bootstrap: Annotated[
        int | None,
        typer.Option(min=1, help="Resamples of the images for 95 % confidence intervals.", rich_help_panel="Output"),
    ] = None,
    expressions_per_batch: ExpressionsPerBatch = 16,
    device: Device = None,
    num_threads: NumThreads = None,
) -> None:
    """
    Evaluate a model on a split of prepared data.

    Compares masks at the images' own size. Writes results.json (metrics, pixel counts of every expression, what
    exactly was evaluated), results.md (a table next to the paper's numbers) and contact_sheet.png (best, median and
    worst masks). If the evaluation is stopped, the same command resumes it.

    To share the images among processes, with the same results, run the command with torchrun --nproc-per-node 2 or
    accelerate launch, followed by -m modeling_restr.cli evaluate.

    Example: restr evaluate you/restr data/refcoco --split val --benchmark refcoco --output-dir runs/val
    """
    with needs_extra("train"):
        from .evaluation.report import format_report
        from .evaluation.run import run_evaluation

    results = run_evaluation(
        model,
        data,
        split,
        output_dir,
        revision=revision,
        data_revision=data_revision,
        benchmark=benchmark,
        max_images=max_images,
        threshold=threshold,
        dtype=dtype,
        by_length=by_length,
        num_bootstrap=bootstrap,
        expressions_per_batch=expressions_per_batch,
        device=device,
        num_threads=num_threads,
    )
    if results is not None:
        print(f"\n{format_report(results)}\nWritten: {output_dir / 'results.json'}, results.md, contact_sheet.png")


@app.command(rich_help_panel=USE)
def predict(
    model: Model,
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA", help="Folder, Hub id or URL of Parquet files, or a .csv or .jsonl file of sentences."
        ),
    ],
    output_dir: OutputDir,
    revision: Revision = None,
    data_revision: DataRevision = None,
    split: Annotated[
        str | None, typer.Option(help="Split of the data.", show_default="the only one", rich_help_panel="Data")
    ] = None,
    config_name: Annotated[
        str | None, typer.Option(help="Configuration of the data on the Hub.", rich_help_panel="Data")
    ] = None,
    image_dir: Annotated[
        str | None,
        typer.Option(help="Folder or URL below which paths of images are looked up.", rich_help_panel="Data"),
    ] = None,
    image_column: Annotated[
        str, typer.Option(help="Column of the images, embedded or as paths.", rich_help_panel="Data")
    ] = "image",
    text_column: Annotated[
        str | None,
        typer.Option(
            help="Column of references, sentences or lists of sentences.",
            show_default="references, texts or text",
            rich_help_panel="Data",
        ),
    ] = None,
    max_images: MaxImages = None,
    threshold: Threshold = 0.5,
    dtype: ModelDType = DType.float32,
    on_error: Annotated[
        Literal["row", "raise"],
        typer.Option(help="Write a bad image or sentence as a row with its error, or stop.", rich_help_panel="Output"),
    ] = "row",
    format: Annotated[
        Literal["parquet", "coco"],
        typer.Option(help="Parquet files, or a COCO instances file as well.", rich_help_panel="Output"),
    ] = "parquet",
    pairs_per_file: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Pairs of an image and a sentence per file; a killed run repeats the files that it had begun.",
            show_default="60 per CPU actor, 10000 per GPU",
            rich_help_panel="Output",
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="Address of a Ray cluster, or auto on its machines.",
            show_default="this machine alone",
            rich_help_panel="Machine",
        ),
    ] = None,
    num_actors: Annotated[
        int | None,
        typer.Option(
            min=1, help="Copies of the model.", show_default="one per GPU, or per CPU", rich_help_panel="Machine"
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Images that the model encodes at a time.",
            show_default="8 on a CPU, 64 on a GPU",
            rich_help_panel="Machine",
        ),
    ] = None,
    expressions_per_batch: ExpressionsPerBatch = 16,
    device: Annotated[
        str | None,
        typer.Option(
            help="Device such as cpu, cuda:0, mps or xpu.",
            show_default="cuda if Ray finds GPUs, otherwise cpu",
            rich_help_panel="Machine",
        ),
    ] = None,
    num_threads: Annotated[
        int, typer.Option(min=1, help="CPU threads of each process.", rich_help_panel="Machine")
    ] = 1,
) -> None:
    """
    Predict the masks of a dataset of any size, on one machine or a Ray cluster.

    Each image is encoded once for all its sentences. The folder gets data/*.parquet with a row per image and sentence
    (ids, text, score, mask as COCO RLE, unknown_words, truncated, error) and summary.json. If the run is stopped or
    killed, the same command resumes it.

    Example: restr predict you/restr data/photos --output-dir runs/masks
    """
    with needs_extra("train,scale"):
        from .prediction.engine import predict as run_prediction

    summary = run_prediction(
        model,
        data,
        output_dir,
        revision=revision,
        data_revision=data_revision,
        split=split,
        config_name=config_name,
        image_dir=image_dir,
        image_column=image_column,
        text_column=text_column,
        max_images=max_images,
        threshold=threshold,
        dtype=dtype,
        raise_errors=on_error == "raise",
        coco=format == "coco",
        pairs_per_file=pairs_per_file,
        address=address,
        num_actors=num_actors,
        batch_size=batch_size,
        expressions_per_batch=expressions_per_batch,
        device=device,
        num_threads=num_threads,
    )
    print(
        f"{summary['num_pairs']:,} pairs of {summary['num_images']:,} images in {summary['num_files']:,} files,"
        f" {summary['num_bytes'] / 1e6:,.1f} MB; {summary['num_errors']:,} rows with an error"
    )
    if error := summary.get("first_error"):  # summaries of earlier versions lack it
        print(f"The first error: {error}")
    if summary["unknown_words"]:
        words = ", ".join(repr(word) for word in list(summary["unknown_words"])[:20])
        print(f"The model does not know {len(summary['unknown_words']):,} words, such as {words}.")
    print(f"Written: {output_dir / 'data'}, summary.json{', instances.json' if format == 'coco' else ''}")


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

    POST / takes a request as JSON, or a photo as the body with sentences in the query. GET /health reports that the
    server is up. The server is for trials: it has neither TLS nor authentication.

    Example: restr serve examples/restr_mini --port 8080
    """
    from .hub.handler import EndpointHandler
    from .hub.serve import Server
    from .options import choose_device

    handler = EndpointHandler(model, revision=revision, device=choose_device(device, num_threads))
    try:
        server = Server((host, port), handler)
    except OSError as error:
        raise ValueError(
            f"Expected a free address, got {host}:{port} ({error}). Choose another --port or --host."
        ) from error
    with server:
        print(f"Serving {model} at http://{server.server_name}:{server.server_port}", flush=True)
        server.serve_forever()


@app.command(rich_help_panel=SHARE)
def export(
    model: Model,
    output_dir: Annotated[
        Path | None, typer.Option(help="Folder to write ONNX graphs to.", rich_help_panel="Output", **FOLDER)
    ] = None,
    revision: Revision = None,
    int8: Annotated[
        bool,
        typer.Option("--int8", help="Add graphs with 8-bit weights, a third of the size.", rich_help_panel="Output"),
    ] = False,
    programs: Annotated[
        bool, typer.Option("--programs", help="Add the torch.export programs (.pt2).", rich_help_panel="Output")
    ] = False,
    web: Annotated[
        Path | None,
        typer.Option(
            help="Folder to write a web page to that runs the model in the browser.", rich_help_panel=PAGE, **FOLDER
        ),
    ] = None,
    examples: Annotated[
        Path | None,
        typer.Option(help="JSON file of photos with sentences and credits to offer.", rich_help_panel=PAGE, **FILE),
    ] = None,
    runtime_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the npm package onnxruntime-web.",
            show_default="a download, kept in the cache",
            rich_help_panel=PAGE,
        ),
    ] = None,
) -> None:
    """
    Export a model to ONNX, to run it without PyTorch and Transformers, or to a web page.

    --output-dir writes two graphs, the image encoder and the sentence query, with restr_onnx.py, which runs them. The
    folder needs NumPy, Pillow, ONNX Runtime and Tokenizers only, and may be moved anywhere. --web writes a static site
    that runs the model in the browser, so that photos stay on the user's machine.

    Example: restr export examples/restr_mini --output-dir restr-onnx --int8
    """
    import logging

    from transformers import AutoModelForImageSegmentation, AutoProcessor

    from .export import export_web, save_onnx
    from .export.web import read_examples

    if not output_dir and not web:
        raise typer.BadParameter("Expected --output-dir FOLDER for ONNX graphs, --web FOLDER for a page, or both.")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns about torchvision, which nothing here uses
    restr_model = AutoModelForImageSegmentation.from_pretrained(model, revision=revision)
    processor = AutoProcessor.from_pretrained(model, revision=revision)
    if output_dir:
        _list_files(save_onnx(restr_model, processor, output_dir, int8=int8, programs=programs))
    if web:
        name = Path(model).resolve().name if Path(model).is_dir() else model
        shown = read_examples(examples) if examples else []
        folder = export_web(restr_model, processor, web, name=name, examples=shown, runtime_dir=runtime_dir)
        _list_files(folder)
        print(f"Show the page: python -m http.server --directory {shlex.quote(str(web))}")


def _list_files(folder: Path) -> None:
    print(f"Wrote {folder}:")
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            print(f"  {path.stat().st_size / 1e6:8.1f} MB  {path.relative_to(folder)}")


@app.command(rich_help_panel=SHARE)
def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of the model.")],
    repo_id: Annotated[
        str, typer.Argument(metavar="REPO_ID", help="Repository on the Hub such as you/restr, created if absent.")
    ],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    tag: Annotated[str | None, typer.Option(help="Tag of this version, such as v1.")] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="JSON file with the settings of the training.", rich_help_panel=CARD, **FILE)
    ] = None,
    evaluation: Annotated[
        list[Path] | None,
        typer.Option(help="JSON file of an evaluation of these weights. Repeatable.", rich_help_panel=CARD, **FILE),
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
        str | None, typer.Option(help="Markdown about the limits of this particular model.", rich_help_panel=CARD)
    ] = None,
    photo: Annotated[
        Path | None,
        typer.Option(
            help="Photo that shows the model's work, with --sentence and --credit.", rich_help_panel=CARD, **FILE
        ),
    ] = None,
    sentence: Annotated[
        list[str] | None, typer.Option(help="Sentence about the photo. Repeatable.", rich_help_panel=CARD)
    ] = None,
    credit: Annotated[str | None, typer.Option(help="Author and licence of the photo.", rich_help_panel=CARD)] = None,
    space: Annotated[
        str | None,
        typer.Option(help="Hub id of a Space that runs the model, which the card links.", rich_help_panel=PAGE),
    ] = None,
    web: Annotated[
        Path | None,
        typer.Option(
            help="Folder that restr export --web wrote, pushed to --space first.",
            rich_help_panel=PAGE,
        ),
    ] = None,
) -> None:
    """
    Push a model to the Hub with its code and model card, in one commit.

    With any option of the model card, the folder's README.md is regenerated first. Otherwise README.md is pushed as it
    is, or, if there is none, a general card. Training writes evaluation.json and recipe.json to its output folder.
    Log in with `hf auth login` first, or set HF_TOKEN to a token with write access.

    Example: restr push runs/model you/restr --evaluation runs/evaluation.json --recipe runs/recipe.json
    """
    from .hub.push import push_page_to_hub, push_to_hub, rewrite_card

    if web and not space:
        raise typer.BadParameter("Expected the Space to push the page to, got none: add --space you/page.")
    card: dict[str, Any] = {
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
    if web and space:
        page = push_page_to_hub(web, space, model_id=repo_id, private=private or None)
        print(f"{page.repo_url} is at {page.oid}")
    commit = push_to_hub(folder, repo_id, private=private or None, tag=tag)
    print(f"{commit.repo_url} is at {commit.oid}")


prepare = typer.Typer()
app.add_typer(prepare, name="prepare", rich_help_panel=DATA)

SKIP_BAD = (
    "Leave out and list images that cannot be used instead of stopping: missing, damaged, of another size than their "
    "annotations, or with an object without a mask."
)
DataOption = functools.partial(typer.Option, rich_help_panel="Data")
ExpressionOption = functools.partial(typer.Option, rich_help_panel="Expressions")
AnnotationDir = Annotated[Path, DataOption(help="Folder of the annotations.")]
ImageDir = Annotated[Path, DataOption(help="Folder of the images, or one above it.")]
DataName = Annotated[str, DataOption(help="Short name of the data: letters, digits and _.")]
ValShare = Annotated[float, DataOption(min=0, max=1, help="Share of the images in the split val.")]


@prepare.callback()
def prepare_data() -> None:
    """
    Prepare referring expressions for training and evaluation.

    Reads RefCOCO and its family, or your own photos. Writes a card and Parquet files with the images, one row per
    image. Prints counts next to the published ones, and what was left out. If the preparation is stopped, the same
    command resumes it.
    """


def _split_at_commas(words: list[str] | None) -> list[str] | None:
    return ",".join(words).split(",") if words else None


def _prepare(
    plan: "Plan",
    output_dir: OutputDir,
    splits: Annotated[
        list[str] | None,
        DataOption(help="Splits such as val,testA.", show_default="all", callback=_split_at_commas),
    ] = None,
    skip_bad: Annotated[bool, DataOption("--skip-bad", help=SKIP_BAD)] = False,
    images_per_shard: Annotated[
        int, typer.Option(min=1, help="Rows per Parquet file.", rich_help_panel="Output")
    ] = 1500,
    push_to_hub: Annotated[
        str | None,
        typer.Option(metavar="REPO_ID", help="Dataset repository to upload to.", rich_help_panel="Output"),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private.", rich_help_panel="Output")
    ] = False,
    num_proc: Annotated[
        int, typer.Option(min=1, help="Processes that decode and write.", rich_help_panel="Machine")
    ] = 1,
) -> None:
    """Carry out a plan. All commands of `restr prepare` have these options."""
    from .data import preparation, sources

    options: dict[str, Any] = {"skip_bad": skip_bad, "images_per_shard": images_per_shard, "num_proc": num_proc}
    print(sources.prepare_plan(plan, output_dir, splits, **options))
    if push_to_hub:
        print(f"Uploaded: {preparation.push_to_hub(output_dir, push_to_hub, private=private or None)}")


def _prepare_command(source: Callable[..., None]) -> Callable[..., None]:
    """Register a command for `sources.plan_NAME`, with the parameters of `source` and of `_prepare`."""
    own, shared = (dict(inspect.signature(function).parameters) for function in (source, _prepare))
    del shared["plan"]

    @functools.wraps(source)
    def command(**values: Any) -> None:
        with needs_extra("train"):
            from .data import sources
        plan = getattr(sources, f"plan_{source.__name__}")(**{name: values[name] for name in own})
        _prepare(plan, **{name: values[name] for name in shared})

    parameters = [option.replace(kind=option.KEYWORD_ONLY) for option in {**own, **shared}.values()]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {option.name: option.annotation for option in parameters}
    return prepare.command()(command)


@_prepare_command
def refer(
    annotation_dir: AnnotationDir,
    image_dir: ImageDir,
    dataset: Annotated[
        Literal["refcoco", "refcoco+", "refcocog", "refclef"], DataOption(help="Dataset to read.")
    ] = "refcoco",
    split_by: Annotated[
        Literal["unc", "umd", "google", "berkeley"] | None,
        DataOption(help="Author of the splits.", show_default="unc, or umd for refcocog"),
    ] = None,
) -> None:
    """
    RefCOCO, RefCOCO+, RefCOCOg and RefCLEF in REFER's layout.

    Example: restr prepare refer --annotation-dir refer/data --image-dir coco/train2014 --output-dir data/refcoco
    """


@_prepare_command
def grefcoco(annotation_dir: AnnotationDir, image_dir: ImageDir) -> None:
    """
    gRefCOCO: several objects, or none, per expression.

    Example: restr prepare grefcoco --annotation-dir grefcoco --image-dir coco --output-dir data/grefcoco
    """


@_prepare_command
def referit(
    annotation_dir: AnnotationDir,
    mask_dir: Annotated[Path, DataOption(help="Folder of the IMAGE_OBJECT.mat files.")],
    image_dir: ImageDir,
) -> None:
    """
    ReferIt with MATLAB masks.

    Example: restr prepare referit --annotation-dir referit --mask-dir mask --image-dir images --output-dir data/referit
    """


@_prepare_command
def hub(
    path_or_id: Annotated[str, typer.Argument(metavar="COPY", help="Folder or Hub id such as jxu124/refcoco.")],
    image_dir: Annotated[
        Path | None, DataOption(help="Folder of COCO's train2014 images, for copies without images.")
    ] = None,
    data_revision: DataRevision = None,
) -> None:
    """
    A copy of RefCOCO, RefCOCO+ or RefCOCOg on the Hub.

    Example: restr prepare hub jxu124/refcocoplus --image-dir coco --output-dir data/refcocoplus
    """


@_prepare_command
def coco(
    instances_file: Annotated[Path, DataOption(help="JSON file with images and annotations.", **FILE)],
    image_dir: ImageDir,
    name: DataName = "coco",
    val_share: ValShare = 0.1,
    expressions_per_instance: Annotated[
        int, ExpressionOption(min=1, max=100, help="Maximum number of expressions per object.")
    ] = 3,
    seed: Annotated[int, ExpressionOption(min=0, help="Seed of the generated expressions.")] = 0,
    captions: Annotated[
        bool, ExpressionOption("--captions", help="Use the captions of the annotations, not generated expressions.")
    ] = False,
    crowds_as_instances: Annotated[
        bool,
        ExpressionOption(
            "--crowds-as-instances",
            help="Read annotations marked as crowds (iscrowd 1), as CVAT's brush makes them, as one object each.",
        ),
    ] = False,
) -> None:
    """
    COCO instances files, with generated expressions or the captions of the annotations.

    Example: restr prepare coco --instances-file instances.json --image-dir photos --output-dir data/own
    """


@_prepare_command
def sentences(
    sentences_file: Annotated[
        Path,
        DataOption(help="CSV or JSONL file: image, sentence and a mask, polygon, rle or box per line.", **FILE),
    ],
    image_dir: Annotated[
        Path | None, DataOption(help="Folder of the photos.", show_default="the file's folder")
    ] = None,
    mask_dir: Annotated[Path | None, DataOption(help="Folder of the masks.", show_default="the file's folder")] = None,
    name: DataName = "own",
    val_share: ValShare = 0.1,
    boxes_as_masks: Annotated[bool, DataOption("--boxes-as-masks", help="Use a box's rectangle as the mask.")] = False,
) -> None:
    """
    Your own photos, sentences and masks in a CSV or JSONL file.

    Example: restr prepare sentences --sentences-file own.csv --image-dir photos --output-dir data/mine
    """


@_prepare_command
def combine(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER", help="Folders that restr prepare wrote.")],
    output_dir: OutputDir,
    names: Annotated[
        list[str] | None,
        DataOption(
            help="Names such as a,b, one per folder. Evaluation splits become NAME_SPLIT.",
            show_default="the names of the sources",
            callback=_split_at_commas,
        ),
    ] = None,
) -> None:
    """
    Several prepared folders, combined without training on evaluation images.

    Example: restr prepare combine data/refcoco data/refcocoplus --output-dir data/both
    """


def main() -> None:
    run(app)


if __name__ == "__main__":
    main()
