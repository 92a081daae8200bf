"""
Data for training and evaluation; never imported by the model files.

The readers need `datasets` and `pycocotools` (`pip install "modeling-restr[train]"`). Exported names are imported on
first use, so that modules that need neither work without them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .canonical import build_dataset
    from .coco import read_coco
    from .grefcoco import read_grefcoco
    from .hub_copies import read_hub_copy
    from .loading import load_prepared
    from .refer import load_refer, read_refer
    from .referit import read_referit
    from .segmentation import decode_mask, encode_mask
    from .sentence_files import load_sentences, read_sentences

_MODULES = {
    "build_dataset": "canonical",
    "decode_mask": "segmentation",
    "encode_mask": "segmentation",
    "load_prepared": "loading",
    "load_refer": "refer",
    "load_sentences": "sentence_files",
    "read_coco": "coco",
    "read_grefcoco": "grefcoco",
    "read_hub_copy": "hub_copies",
    "read_refer": "refer",
    "read_referit": "referit",
    "read_sentences": "sentence_files",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = import_module(f".{_MODULES[name]}", __name__)
    except ImportError as error:
        raise ImportError(f'{name} cannot be imported ({error}): `pip install "modeling-restr[train]"`.') from error
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})


__all__ = [
    "build_dataset",
    "decode_mask",
    "encode_mask",
    "load_prepared",
    "load_refer",
    "load_sentences",
    "read_coco",
    "read_grefcoco",
    "read_hub_copy",
    "read_refer",
    "read_referit",
    "read_sentences",
]
