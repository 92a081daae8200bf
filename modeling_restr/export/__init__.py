"""ReSTR as two graphs for other runtimes; never imported by the model files. ONNX needs the extra `onnx`."""

from .graphs import export_image_encoder, export_sentence_query
from .onnx_folder import save_onnx


__all__ = ["export_image_encoder", "export_sentence_query", "save_onnx"]
