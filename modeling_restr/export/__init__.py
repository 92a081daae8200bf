"""ReSTR as two graphs for other runtimes and for browsers. The model files never import it. ONNX needs the extra `onnx`."""

from .graphs import export_image_encoder, export_sentence_query
from .onnx_folder import save_onnx
from .web import export_web


__all__ = ["export_image_encoder", "export_sentence_query", "export_web", "save_onnx"]
