"""ReSTR as two graphs for other runtimes. The model files never import it. ONNX needs the extra `onnx`."""

from .graphs import export_image_encoder, export_sentence_query
from .onnx_folder import save_onnx


__all__ = ["export_image_encoder", "export_sentence_query", "save_onnx"]
