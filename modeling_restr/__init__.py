from .configuration_restr import ReSTRConfig, ReSTRTextConfig, ReSTRVisionConfig
from .modeling_restr import (
    ReSTRForImageSegmentation,
    ReSTRModel,
    ReSTRPreTrainedModel,
    ReSTRTextModel,
    ReSTRVisionModel,
)
