"""
ReSTR, referring image segmentation with transformers.

Importing the package registers it with transformers: Auto classes and `pipeline` then load its models without
`trust_remote_code`.
"""

from .configuration_restr import ReSTRConfig, ReSTRTextConfig, ReSTRVisionConfig
from .image_processing_restr import ReSTRImageProcessor, UnreadableImageError
from .modeling_restr import (
    ReSTRForImageSegmentation,
    ReSTRModel,
    ReSTRPreTrainedModel,
    ReSTRTextModel,
    ReSTRVisionModel,
)
from .pipeline_restr import EncodedImage, ReSTRPipeline
from .processing_restr import ReSTRProcessor
from .registration import register
from .tokenization_restr import build_tokenizer


__version__ = "0.2.0"

register()

__all__ = [
    "EncodedImage",
    "ReSTRConfig",
    "ReSTRForImageSegmentation",
    "ReSTRImageProcessor",
    "ReSTRModel",
    "ReSTRPipeline",
    "ReSTRPreTrainedModel",
    "ReSTRProcessor",
    "ReSTRTextConfig",
    "ReSTRTextModel",
    "ReSTRVisionConfig",
    "ReSTRVisionModel",
    "UnreadableImageError",
    "__version__",
    "build_tokenizer",
]
