"""Write a folder that runs a ReSTR model with ONNX Runtime, without PyTorch and Transformers."""

import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from ..files import replace_files, write_json
from ..hub.bundle import check_pair
from ..modeling_restr import ReSTRForImageSegmentation
from ..processing_restr import ReSTRProcessor
from .graphs import GRAPHS


RUNNER = Path(__file__).with_name("restr_onnx.py")
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
# Weights above 2 GB are in a file next to their graph, with the same name and the ending .data.
GRAPH_PATTERNS = tuple(f"{name}{ending}" for name in GRAPHS for ending in ("*.onnx", "*.onnx.data", ".pt2"))


def save_onnx(
    model: ReSTRForImageSegmentation,
    processor: ReSTRProcessor,
    folder: str | os.PathLike,
    *,
    int8: bool = False,
    programs: bool = False,
) -> Path:
    """
    Save the two graphs of a model (see `graphs.py`), with the settings, the tokenizer and `restr_onnx.py`, which has
    `ReSTROnnxPipeline` to run them.

    The graphs of an earlier export in the folder are replaced. Other files are kept. An export that fails changes
    nothing.

    Args:
        model ([`ReSTRForImageSegmentation`]): The model, which is exported in float32 and not changed.
        processor ([`ReSTRProcessor`]): Its processor.
        folder (`str` or `os.PathLike`): Folder to write to. Parent folders are created as needed.
        int8 (`bool`, defaults to `False`):
            Whether to add graphs with 8-bit weights in linear maps, with one scale per channel, and 8-bit inputs, with
            scales computed at run time.
        programs (`bool`, defaults to `False`):
            Whether to add the `torch.export` programs, `image_encoder.pt2` and `sentence_query.pt2`.

    Returns:
        `Path`: The folder.

    Raises:
        `ValueError`: `model` or `processor` is of another class, they do not fit each other, a step of the processor
            is switched off, or `folder` is a file or holds a model.
        `ImportError`: A package of the extra `onnx` is missing.
    """
    folder = Path(folder).absolute()
    if (folder / "config.json").exists():  # the export would overwrite its tokenizer.json
        raise ValueError(f"Expected a folder without a model in it, got {folder}. Export to another folder.")
    check_packages()
    check_pair(model, processor)
    settings = image_settings(processor)
    with replace_files(folder, essential=GRAPH_PATTERNS) as staging:
        for name in GRAPHS:
            save_graph(model, name, staging, int8=int8, program=programs)
        write_json(staging / "restr_onnx.json", settings)
        _padding_tokenizer(processor.tokenizer).save(os.fspath(staging / "tokenizer.json"))
        shutil.copyfile(RUNNER, staging / RUNNER.name)
    return folder


def check_packages() -> None:
    """
    Raises:
        `ImportError`: A package of the extra `onnx` is missing.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f'The export needs {", ".join(missing)}: pip install "modeling-restr[onnx]"')


def save_graph(
    model: ReSTRForImageSegmentation, name: str, folder: Path, *, int8: bool = False, program: bool = False
) -> None:
    """Write one of `GRAPHS` to an existing folder."""
    graph = GRAPHS[name]
    exported = graph.export(model)
    options: Any = {"input_names": graph.input_names, "output_names": graph.output_names}
    onnx_program: Any = torch.onnx.export(exported, **options, dynamo=True, verbose=False)
    onnx_program.save(folder / f"{name}.onnx")
    if int8:
        quantize(folder / f"{name}.onnx", folder / f"{name}_int8.onnx")
    if program:
        torch.export.save(exported, folder / f"{name}.pt2")


def quantize(path: Path, output: Path) -> None:
    """Write a graph with 8-bit weights in its linear maps, but not in the channel maps after upsampling."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    large = path.with_name(f"{path.name}.data").exists()
    quantize_dynamic(
        path,
        output,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        weight_type=QuantType.QInt8,
        use_external_data_format=large,
    )


def image_settings(processor: ReSTRProcessor) -> dict[str, Any]:
    """The settings of the image processor that are needed to prepare images."""
    image_processor: Any = processor.image_processor
    steps = ("do_convert_rgb", "do_resize", "do_rescale", "do_normalize")
    skipped = [step for step in steps if not getattr(image_processor, step)]
    if skipped:
        raise ValueError(f"Expected an image processor that takes every step, got one with {skipped} switched off.")
    names = ("size", "resample", "rescale_factor", "image_mean", "image_std", "pad_after_normalization")
    values = image_processor.to_dict()
    return {name: values[name] for name in names}


def _padding_tokenizer(tokenizer: Any) -> Tokenizer:
    """The tokenizer with the padding and truncation that the processor applies at every call."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    length = tokenizer.model_max_length
    backend.enable_truncation(length, direction=tokenizer.truncation_side)
    backend.enable_padding(
        direction=tokenizer.padding_side, pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token, length=length
    )
    return backend
