"""Save a model with everything that a machine without this package needs to run it."""

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers.dynamic_module_utils import custom_object_save

from ..configuration_restr import ReSTRConfig
from ..files import find_files, hash_file, replace_files
from ..modeling_restr import ReSTRForImageSegmentation
from ..processing_restr import ReSTRProcessor
from ..requirements_restr import TRANSFORMERS
from ..vision_encoder_restr import as_pair


# The files that `from_pretrained` may take weights from. By name, an index comes after its parts.
WEIGHT_PATTERNS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
# Settings of loading that a tokenizer keeps and should not save.
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
    and `pipeline("image-segmentation", model=folder, trust_remote_code=True)` load the folder. Where it is imported,
    the Auto classes and `pipeline("referring-image-segmentation", model=folder)` load it without that option. An
    Inference Endpoint serves the folder with its handler.py and requirements.txt.

    One of the files is called modeling_restr.py. It hides the package if Python is started in the folder.

    Everything is written to a temporary folder first and then moved. An existing folder keeps its other files. Its old
    weights are removed first and the new ones are moved last, so that an interrupted update leaves a folder without
    weights, never a mixture.

    Args:
        model ([`ReSTRForImageSegmentation`]): The model to save. It is not changed.
        processor ([`ReSTRProcessor`]): Its processor. It is not changed.
        folder (`str` or `os.PathLike`): Where to save. Parent folders are created as needed.
        dtype (`torch.dtype` or `str`, *optional*):
            Type in which the weights are stored, such as `torch.float16` for half the size; by default the model's own.
            `from_pretrained` still loads them in the model's own type unless told otherwise.
        include_code (`bool`, defaults to `True`):
            Whether to save the code. A folder without it loads only where this package is installed.

    Returns:
        `Path`: The folder.

    Raises:
        `ValueError`: `model` or `processor` has the wrong class, they do not fit each other, `dtype` is not a floating
            point type or cannot hold the weights, or `folder` is a file.
    """
    folder = Path(folder).absolute()
    check_pair(model, processor)
    state_dict = _cast_state_dict(model, dtype)
    with replace_files(folder, essential=WEIGHT_PATTERNS) as staging:
        _copy_with_clean_config(model).save_pretrained(staging, state_dict=state_dict)
        _copy_clean_processor(processor).save_pretrained(staging)
        if include_code:
            _add_handler(staging)
        else:
            _remove_code(staging)
    return folder


def check_pair(model: ReSTRForImageSegmentation, processor: ReSTRProcessor) -> None:
    """
    Raises:
        `ValueError`: `model` or `processor` has the wrong class, or they do not fit each other.
    """
    if not isinstance(model, ReSTRForImageSegmentation) or not isinstance(processor, ReSTRProcessor):
        raise ValueError(
            f"Expected a ReSTRForImageSegmentation and a ReSTRProcessor, got a {type(model).__name__} and a "
            f"{type(processor).__name__}."
        )
    config: Any = model.config
    largest_id, vocab_size = max(processor.tokenizer.get_vocab().values()), config.text_config.vocab_size
    if largest_id >= vocab_size:
        raise ValueError(
            f"The tokenizer has ids up to {largest_id}, but the model has {vocab_size} word vectors: they do not belong "
            "together."
        )
    height, width = as_pair(config.vision_config.image_size)
    size = processor.image_processor.size
    if (size["height"], size["width"]) != (height, width):
        raise ValueError(
            f"The image processor makes images of {size['height']}x{size['width']} pixels, but the model expects "
            f"{height}x{width}."
        )


def hash_weights(folder: str | os.PathLike) -> dict[str, str]:
    """
    SHA-256 of a saved model's weights, by file name. Evaluations record it and model cards compare it.

    Raises:
        `ValueError`: The folder has no weights.
    """
    paths = [path for path in find_files(Path(folder), WEIGHT_PATTERNS) if path.suffix == ".safetensors"]
    if not paths:
        raise ValueError(f"Expected the folder of a saved model, but {folder} has no weights (model.safetensors).")
    return {path.name: hash_file(path) for path in paths}


def add_code(folder: Path, output: Path) -> None:
    """Write to `output` the code for a folder that was saved without it, and configs that refer to the code."""
    ReSTRConfig.from_pretrained(folder).save_pretrained(output)
    _copy_clean_processor(ReSTRProcessor.from_pretrained(folder)).save_pretrained(output)
    custom_object_save(ReSTRForImageSegmentation, output)
    _add_handler(output)


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


def _copy_with_clean_config(model: ReSTRForImageSegmentation) -> ReSTRForImageSegmentation:
    """The same weights with a copy of the config, which transformers changes while it saves."""
    model = copy.copy(model)
    config: Any = copy.deepcopy(model.config)
    for part in (config, config.vision_config, config.text_config):
        part.dtype = model.dtype  # as `from_pretrained` sets it, so that a reloaded model is saved the same
    for key in _CODE_KEYS:  # left by a bundle that the model was loaded from
        config.__dict__.pop(key, None)
    model.config = config
    return model


def _copy_clean_processor(processor: Any) -> ReSTRProcessor:
    processor = copy.deepcopy(processor)
    for key in (*_LOADING_KEYS, *_CODE_KEYS):
        processor.tokenizer.init_kwargs.pop(key, None)
    for part in (processor, processor.image_processor):
        part.__dict__.pop("auto_map", None)
    return processor


def _add_handler(folder: Path) -> None:
    shutil.copyfile(Path(__file__).with_name("handler.py"), folder / "handler.py")
    # An Inference Endpoint installs this before it loads the handler. Its own transformers may be too old.
    (folder / "requirements.txt").write_text(f"{TRANSFORMERS}\n", encoding="utf-8")


def _remove_code(folder: Path) -> None:
    for path in folder.glob("*.py"):
        path.unlink()
    for path in folder.glob("*config.json"):
        values = json.loads(path.read_text(encoding="utf-8"))
        for part in (values, values.get("image_processor", {})):
            for key in _CODE_KEYS:
                part.pop(key, None)
        path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
