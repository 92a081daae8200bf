"""Write a static site that runs a ReSTR model in the browser. No server runs it, and photos stay on the user's machine."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import SpaceCardData

from ..data.records import read_json
from ..files import hash_file, replace_files, write_json, write_text
from ..hub.bundle import check_pair
from ..hub.model_card import Example
from ..modeling_restr import ReSTRForImageSegmentation
from ..processing_restr import ReSTRProcessor
from ..tokenization_restr import build_tokenizer
from ..vision_encoder_restr import as_pair
from ..visualization import COLORS, OPACITY
from . import web_runtime
from .graphs import GRAPHS
from .onnx_folder import check_packages, image_settings, save_graph
from .weights import store_int8_weights


SITE = Path(__file__).with_name("web")
THRESHOLD = 0.5
SETTINGS = "settings.json"
PAPER = "https://arxiv.org/abs/2203.16768"
# WebAssembly has threads only in pages that are isolated from others.
HEADERS = {
    "cross-origin-embedder-policy": "require-corp",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "cross-origin",
}
README = """\
# {name} in the browser

Say what you mean in a photo, get its mask. The page runs [ReSTR]({paper}) in your browser: photos never leave your
machine. `restr export --web` wrote this folder. Any web server can serve it, for example:

```bash
python -m http.server --directory FOLDER
```

WebAssembly uses several threads if the page is isolated from others: by the headers above, or on https and localhost by
the page's service worker.
"""


def export_web(
    model: ReSTRForImageSegmentation,
    processor: ReSTRProcessor,
    folder: str | os.PathLike,
    *,
    name: str,
    examples: Sequence[Example] = (),
    runtime_dir: str | os.PathLike | None = None,
    int8: bool = True,
) -> Path:
    """
    Save a static site with a model's graphs, onnxruntime-web and a page that runs them. README.md makes it a Space.

    An earlier site in the folder is replaced. Hidden files are kept. An export that fails changes nothing.

    Args:
        model ([`ReSTRForImageSegmentation`]): The model. It is not changed.
        processor ([`ReSTRProcessor`]): Its processor.
        folder (`str` or `os.PathLike`): Folder to write to: new, empty, or with an earlier site.
        name (`str`): Name of the model on the page. A Hub id becomes a link.
        examples (`Sequence[Example]`): Photos with sentences and credits, to try the model with.
        runtime_dir (`str` or `os.PathLike`, *optional*):
            The unpacked npm package onnxruntime-web. By default it is downloaded once and cached.
        int8 (`bool`, defaults to `True`):
            Whether the graphs store 8-bit weights. Otherwise they store float32 and are about four times as large.

    Returns:
        `Path`: The folder.

    Raises:
        `ValueError`: `model` and `processor` do not fit each other, the page does not know a setting of the processor,
            an example has no sentence or credit, the folder holds other files, or `runtime_dir` lacks some.
        `ImportError`: A package of the extra `onnx` is missing.
    """
    folder = Path(folder).absolute()
    _check_folder(folder)
    check_packages()
    check_pair(model, processor)
    settings = {
        "name": name,
        "links": {"model": f"https://huggingface.co/{name}" if name.count("/") == 1 else None, "paper": PAPER},
        "parameters": model.num_parameters(),
        **_describe_images(model, processor),
        "tokenizer": _describe_tokenizer(processor.tokenizer),
        "threshold": THRESHOLD,
        "colors": ["#{:02x}{:02x}{:02x}".format(*color) for color in COLORS],
        "opacity": OPACITY,
    }
    runtime = web_runtime.find_runtime(runtime_dir)
    with replace_files(folder, essential=[SETTINGS]) as staging:
        web_runtime.copy_runtime(runtime, staging / "runtime")
        for path in sorted(SITE.iterdir()):
            shutil.copyfile(path, staging / path.name)
        for graph in GRAPHS:
            save_graph(model, graph, staging)
            if int8:
                store_int8_weights(staging / f"{graph}.onnx")
            if (staging / f"{graph}.onnx.data").exists():
                raise ValueError("Expected graphs below 2 GB, which browsers can load, got a larger one: use 8 bits.")
        processor.tokenizer.backend_tokenizer.save(os.fspath(staging / "tokenizer.json"))
        settings["check"] = _answer_check(staging, settings)
        settings["examples"] = _copy_examples(examples, staging / "examples")
        write_text(staging / "README.md", _make_readme(name))
        files = sorted(path for path in staging.rglob("*") if path.is_file())
        settings["files"] = {path.relative_to(staging).as_posix(): path.stat().st_size for path in files}
        settings["version"] = _hash_files(path for path in files if path.suffix in (".onnx", ".wasm"))
        write_json(staging / SETTINGS, settings)
    return folder


def read_examples(path: Path) -> list[Example]:
    """
    Read a JSON file with a list of `{"photo": ..., "texts": [...], "credit": ...}`. Photos are relative to the file.

    Raises:
        `ValueError`: The file is missing or has another form.
    """
    entries = read_json(path)
    try:
        return [Example(path.parent / entry["photo"], list(entry["texts"]), entry["credit"]) for entry in entries]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f'Expected a list of {{"photo": ..., "texts": [...], "credit": ...}} in {path}, got another form: {error!r}'
        ) from error


def _check_folder(folder: Path) -> None:
    """Replacing would destroy a folder of the same name as one of the site's."""
    if not folder.is_dir() or (folder / SETTINGS).is_file():
        return
    others = [path.name for path in folder.iterdir() if not path.name.startswith(".") and path.name != "README.md"]
    if others:
        raise ValueError(f"Expected a new or empty folder for the site, got {folder} with {others[0]} in it.")


def _describe_images(model: ReSTRForImageSegmentation, processor: ReSTRProcessor) -> dict[str, Any]:
    settings, config = image_settings(processor), model.config
    return {
        "imageSize": [settings["size"]["height"], settings["size"]["width"]],
        "patchSize": list(as_pair(config.vision_config.patch_size)),  # type: ignore[union-attr]
        "mean": settings["image_mean"],
        "std": settings["image_std"],
        "rescaleFactor": settings["rescale_factor"],
        "resample": int(settings["resample"]),
        "padAfterNormalization": settings["pad_after_normalization"],
    }


def _describe_tokenizer(tokenizer: Any) -> dict[str, Any]:
    """The settings of a tokenizer of `build_tokenizer`. The page implements no other."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    for drop in (False, True):
        other = build_tokenizer(tokenizer.get_vocab(), tokenizer.model_max_length, drop_unknown_punctuation=drop)
        built = json.loads(other.backend_tokenizer.to_str())
        same = all(backend[part] == built[part] for part in ("added_tokens", "normalizer", "pre_tokenizer", "model"))
        if same and (tokenizer.padding_side, tokenizer.truncation_side) == ("left", "right"):
            return {
                "maxLength": tokenizer.model_max_length,
                "padId": tokenizer.pad_token_id,
                "unknownId": tokenizer.unk_token_id,
                "dropUnknownPunctuation": drop,
            }
    raise ValueError(
        "Expected a tokenizer of `build_tokenizer`, with words from `add_words` if any, got one with other rules. The "
        "page would read sentences in another way than the model."
    )


def _answer_check(folder: Path, settings: dict[str, Any]) -> list[float]:
    """The patch logits of a made-up image and word, with which the page checks a graphics card."""
    import onnxruntime

    image_encoder, sentence_query = (onnxruntime.InferenceSession(folder / f"{graph}.onnx") for graph in GRAPHS)
    shape = (1, 3, *settings["imageSize"])
    pixel_values = np.sin(np.arange(np.prod(shape), dtype=np.float64)).astype(np.float32).reshape(shape)
    (vision_embeds,) = image_encoder.run(None, {"pixel_values": pixel_values})
    tokenizer = settings["tokenizer"]
    input_ids = np.full((1, tokenizer["maxLength"]), tokenizer["padId"], dtype=np.int64)
    input_ids[:, -1] = tokenizer["unknownId"]
    inputs = {"vision_embeds": vision_embeds, "input_ids": input_ids, "image_indices": np.zeros(1, dtype=np.int64)}
    (patch_logits,) = sentence_query.run(["patch_logits"], inputs)
    return [round(logit, 4) for logit in patch_logits.ravel().tolist()]


def _copy_examples(examples: Sequence[Example], folder: Path) -> list[dict[str, Any]]:
    entries = []
    for number, example in enumerate(examples, start=1):
        if not example.texts or not example.credit.strip():
            raise ValueError(f"Expected at least one sentence and a credit for the example {example.photo}.")
        folder.mkdir(exist_ok=True)
        name = f"{number}{Path(example.photo).suffix.lower()}"
        shutil.copyfile(example.photo, folder / name)
        entries.append({"file": f"{folder.name}/{name}", "texts": list(example.texts), "credit": example.credit})
    return entries


def _hash_files(paths: Iterable[Path]) -> str:
    """A part of the large files' addresses, so that browsers keep them until they change."""
    return hashlib.sha256("".join(map(hash_file, paths)).encode()).hexdigest()[:16]


def _make_readme(name: str) -> str:
    is_id = name.count("/") == 1
    card = SpaceCardData(
        title=f"{name.rpartition('/')[2]} in the browser",
        emoji="🔎",
        colorFrom="yellow",
        colorTo="blue",
        sdk="static",
        short_description="Say what you mean in a photo, get its mask",
        models=[name] if is_id else None,
        tags=["image-segmentation", "referring-image-segmentation", "restr"],
        custom_headers=HEADERS,
    )
    return f"---\n{card.to_yaml()}\n---\n\n{README.format(name=name, paper=PAPER)}"
