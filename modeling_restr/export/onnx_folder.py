"""Write a folder that runs a ReSTR model with ONNX Runtime, without PyTorch and Transformers."""

import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from ..files import replace_files
from ..hub.bundle import check_pair
from ..modeling_restr import ReSTRForImageSegmentation
from ..processing_restr import ReSTRProcessor
from .graphs import GRAPHS


RUNNER = Path(__file__).with_name("restr_onnx.py")
PACKAGES = ("onnx", "onnxruntime", "onnxscript")
# Weights above 2 GB stand beside their graph, in a file of the same name and the ending .data.
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
    Save the two graphs of a model (see `graphs.py`) with the settings, the tokenizer and the code that run them:
    `restr_onnx.py` in the folder has `ReSTROnnxPipeline`.

    Everything is written to a temporary folder first and then moved. In an existing folder the graphs of an earlier
    export are removed first and the new ones come last; other files are kept.

    Args:
        model ([`ReSTRForImageSegmentation`]): The model, exported in float32; it is not changed.
        processor ([`ReSTRProcessor`]): Its processor; it is not changed.
        folder (`str` or `os.PathLike`): Where to save; parent folders are made as needed.
        int8 (`bool`, defaults to `False`):
            Whether to add graphs whose linear maps have 8-bit weights, one scale a channel, and 8-bit inputs, scaled
            as they come.
        programs (`bool`, defaults to `False`):
            Whether to add the `torch.export` programs, `image_encoder.pt2` and `sentence_query.pt2`.

    Returns:
        `Path`: The folder.

    Raises:
        `ValueError`: `model` or `processor` is of another class, they do not fit each other, the processor leaves out
            a step of its work, or `folder` is a file or holds a model.
        `ImportError`: A package of the extra `onnx` is missing.
    """
    folder = Path(folder).absolute()
    if (folder / "config.json").exists():  # its tokenizer.json, which is another one, would be lost
        raise ValueError(f"Expected a folder for the export alone, got {folder}, which has a model in it.")
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"The export needs {', '.join(missing)}: pip install onnx onnxruntime onnxscript")
    check_pair(model, processor)
    settings = _image_settings(processor)
    with replace_files(folder, essential=GRAPH_PATTERNS) as staging:
        for name in GRAPHS:
            save_graph(model, name, staging, int8=int8, program=programs)
        (staging / "restr_onnx.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        _padding_tokenizer(processor.tokenizer).save(os.fspath(staging / "tokenizer.json"))
        shutil.copyfile(RUNNER, staging / RUNNER.name)
    return folder


def save_graph(
    model: ReSTRForImageSegmentation, name: str, folder: Path, *, int8: bool = False, program: bool = False
) -> None:
    """Write one of `GRAPHS` to an existing folder, under its name."""
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
    """Write a graph again with 8-bit weights of its linear maps; the channel maps after upsampling stay as they are."""
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


def _image_settings(processor: ReSTRProcessor) -> dict[str, Any]:
    """What `restr_onnx.py` has to know of the image processor."""
    image_processor: Any = processor.image_processor
    steps = ("do_convert_rgb", "do_resize", "do_rescale", "do_normalize")
    skipped = [step for step in steps if not getattr(image_processor, step)]
    if skipped:
        raise ValueError(f"Expected an image processor that takes every step, got one with {skipped} switched off.")
    names = ("size", "resample", "rescale_factor", "image_mean", "image_std", "pad_after_normalization")
    values = image_processor.to_dict()
    return {name: values[name] for name in names}


def _padding_tokenizer(tokenizer: Any) -> Tokenizer:
    """The tokenizer, with the padding and truncation that the processor asks of it on every call."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    length = tokenizer.model_max_length
    backend.enable_truncation(length, direction=tokenizer.truncation_side)
    backend.enable_padding(
        direction=tokenizer.padding_side, pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token, length=length
    )
    return backend
