"""Save a model with everything that a machine without this package needs to run it."""

import copy
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers.dynamic_module_utils import custom_object_save

from ..configuration_restr import ReSTRConfig
from ..modeling_restr import ReSTRForImageSegmentation
from ..processing_restr import ReSTRProcessor
from ..requirements_restr import TRANSFORMERS


WEIGHT_PATTERNS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
# What a reloaded tokenizer would save of how it was loaded.
_LOADING_KEYS = ("is_local", "local_files_only")
_CODE_KEYS = ("auto_map", "custom_pipelines")


def save_bundle(
    model: ReSTRForImageSegmentation,
    processor: ReSTRProcessor,
    folder: str | os.PathLike,
    *,
    dtype: torch.dtype | str | None = None,
    include_code: bool = True,
) -> Path:
    """
    Save weights, config, processor and the code that they need. Where this package is not installed, the Auto classes
    and `pipeline("image-segmentation", model=folder, trust_remote_code=True)` load the folder; where it is imported,
    the Auto classes and `pipeline("referring-image-segmentation", model=folder)` do, and need no trust. With
    handler.py and requirements.txt, an Inference Endpoint serves it.

    One of the files is called modeling_restr.py: with the folder as Python's working directory it hides the package.

    Everything is written to a temporary folder first and then moved. An existing folder is updated file by file, its
    other files are kept; old weights go first and the new ones come last, so an update that is cut off leaves a folder
    without weights, never one of mixed parts.

    Args:
        model ([`ReSTRForImageSegmentation`]): The model to save; it is not changed.
        processor ([`ReSTRProcessor`]): Its processor; it is not changed.
        folder (`str` or `os.PathLike`): Where to save; parent folders are made as needed.
        dtype (`torch.dtype` or `str`, *optional*):
            What the weights are stored in, such as `torch.float16` for half the size; the model's own by default.
            They still load in the model's own dtype unless `from_pretrained` is told otherwise.
        include_code (`bool`, defaults to `True`):
            Whether the folder carries the code. Without it, it loads only where this package is installed.

    Returns:
        `Path`: The folder.

    Raises:
        `ValueError`: `model` or `processor` is of another class, they do not fit each other, `dtype` is no floating
            point type or cannot hold the weights, or `folder` is a file.
    """
    folder = Path(folder).absolute()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"Expected a folder to save to, but {folder} is a file.")
    check_pair(model, processor)
    state_dict = _cast_state_dict(model, dtype)
    folder.parent.mkdir(parents=True, exist_ok=True)
    place = folder if folder.exists() else folder.parent  # on the same disk, so that moving is renaming
    with tempfile.TemporaryDirectory(dir=place, prefix=f".{folder.name}.") as temporary:
        staging = Path(temporary) / folder.name
        staging.mkdir()
        _with_own_config(model).save_pretrained(staging, state_dict=state_dict)
        _normalize_processor(processor).save_pretrained(staging)
        if include_code:
            _add_handler(staging)
        else:
            _remove_code(staging)
        _move_into_place(staging, folder)
    return folder


def check_pair(model: ReSTRForImageSegmentation, processor: ReSTRProcessor) -> None:
    if not isinstance(model, ReSTRForImageSegmentation) or not isinstance(processor, ReSTRProcessor):
        raise ValueError(
            f"Expected a ReSTRForImageSegmentation and a ReSTRProcessor, got a {type(model).__name__} and a "
            f"{type(processor).__name__}."
        )
    config: Any = model.config
    text_config, vision_config = config.text_config, config.vision_config
    largest_id = max(processor.tokenizer.get_vocab().values())
    if largest_id >= text_config.vocab_size:
        raise ValueError(
            f"The tokenizer has ids up to {largest_id}, but the model has {text_config.vocab_size} word vectors: they "
            f"do not belong together."
        )
    image_size = vision_config.image_size
    expected_size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    size = processor.image_processor.size
    if (size["height"], size["width"]) != expected_size:
        raise ValueError(
            f"The image processor makes images of {size['height']}x{size['width']} pixels, but the model expects "
            f"{expected_size[0]}x{expected_size[1]}."
        )


def _cast_state_dict(model: ReSTRForImageSegmentation, dtype: torch.dtype | str | None) -> dict[str, torch.Tensor]:
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, dtype)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"Expected `dtype` to be a floating point type such as torch.float16, got {dtype!r}.")
    state_dict = {name: tensor if dtype is None else tensor.to(dtype) for name, tensor in model.state_dict().items()}
    broken = [name for name, tensor in state_dict.items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"Weights are not finite, as stored in {dtype or model.dtype}: {broken}.")
    return state_dict


def hash_weights(folder: str | os.PathLike) -> dict[str, str]:
    """
    SHA-256 of a saved model's weights, by file name: what evaluations record, and model cards compare.

    Raises:
        `ValueError`: The folder has no weights.
    """
    paths = [path for path in weight_files(Path(folder)) if path.suffix == ".safetensors"]
    if not paths:
        raise ValueError(f"Expected the folder of a saved model, but {folder} has no weights (model.safetensors).")
    return {path.name: hash_file(path) for path in paths}


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def add_code(folder: Path, output: Path) -> None:
    """Write to `output` the code for a folder that was saved without it, and the configs that refer to the code."""
    ReSTRConfig.from_pretrained(folder).save_pretrained(output)
    _normalize_processor(ReSTRProcessor.from_pretrained(folder)).save_pretrained(output)
    custom_object_save(ReSTRForImageSegmentation, output)
    _add_handler(output)


def _add_handler(folder: Path) -> None:
    shutil.copyfile(Path(__file__).with_name("handler.py"), folder / "handler.py")
    # What an Inference Endpoint installs before it loads the handler: its own transformers may be too old.
    (folder / "requirements.txt").write_text(f"{TRANSFORMERS}\n", encoding="utf-8")


def _with_own_config(model: ReSTRForImageSegmentation) -> ReSTRForImageSegmentation:
    """The same model with a config of its own, for transformers to change while it saves."""
    model = copy.copy(model)
    config: Any = copy.deepcopy(model.config)
    for part in (config, config.vision_config, config.text_config):
        part.dtype = model.dtype  # as `from_pretrained` sets them, so that a reloaded model is saved the same
    for key in _CODE_KEYS:  # those of a bundle that the model was loaded from
        config.__dict__.pop(key, None)
    model.config = config
    return model


def _normalize_processor(processor: Any) -> ReSTRProcessor:
    processor = copy.deepcopy(processor)
    for key in (*_LOADING_KEYS, *_CODE_KEYS):
        processor.tokenizer.init_kwargs.pop(key, None)
    for part in (processor, processor.image_processor):
        part.__dict__.pop("auto_map", None)
    return processor


def _remove_code(folder: Path) -> None:
    for path in folder.glob("*.py"):
        path.unlink()
    for path in folder.glob("*config.json"):
        values = json.loads(path.read_text(encoding="utf-8"))
        for part in (values, values.get("image_processor", {})):
            for key in _CODE_KEYS:
                part.pop(key, None)
        path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _move_into_place(staging: Path, folder: Path) -> None:
    if not folder.exists():
        os.replace(staging, folder)
        return
    for path in weight_files(folder):
        path.unlink()
    weights = weight_files(staging)
    others = sorted(set(staging.iterdir()) - set(weights))
    for path in (*others, *weights):
        os.replace(path, folder / path.name)


def weight_files(folder: Path) -> list[Path]:
    """The files that `from_pretrained` may take weights from; an index comes after its parts."""
    return sorted(path for pattern in WEIGHT_PATTERNS for path in folder.glob(pattern))
