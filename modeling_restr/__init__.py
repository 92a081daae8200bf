"""ReSTR, referring image segmentation with transformers. Importing the package registers it with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForImageSegmentation

from .configuration_restr import ReSTRConfig, ReSTRTextConfig, ReSTRVisionConfig
from .modeling_restr import (
    ReSTRForImageSegmentation,
    ReSTRModel,
    ReSTRPreTrainedModel,
    ReSTRTextModel,
    ReSTRVisionModel,
)


for _config_class, _model_class in (
    (ReSTRConfig, ReSTRModel),
    (ReSTRVisionConfig, ReSTRVisionModel),
    (ReSTRTextConfig, ReSTRTextModel),
):
    AutoConfig.register(_config_class.model_type, _config_class, exist_ok=True)
    AutoModel.register(_config_class, _model_class, exist_ok=True)
AutoModelForImageSegmentation.register(ReSTRConfig, ReSTRForImageSegmentation, exist_ok=True)

__all__ = [
    "ReSTRConfig",
    "ReSTRForImageSegmentation",
    "ReSTRModel",
    "ReSTRPreTrainedModel",
    "ReSTRTextConfig",
    "ReSTRTextModel",
    "ReSTRVisionConfig",
    "ReSTRVisionModel",
]
