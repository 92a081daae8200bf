"""Registration in transformers' own registries: Auto classes and `pipeline` then know ReSTR without remote code."""

from transformers import AutoConfig, AutoModel, AutoModelForImageSegmentation, AutoProcessor

# `transformers.AutoImageProcessor` itself may be a stand-in that raises where torchvision is missing.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_restr import ReSTRConfig, ReSTRTextConfig, ReSTRVisionConfig
from .image_processing_restr import ReSTRImageProcessor
from .modeling_restr import ReSTRForImageSegmentation, ReSTRModel, ReSTRTextModel, ReSTRVisionModel
from .pipeline_restr import TASK, ReSTRPipeline
from .processing_restr import ReSTRProcessor


def register() -> None:
    """Register ReSTR's classes; calling it again changes nothing."""
    for config_class, model_class in (
        (ReSTRConfig, ReSTRModel),
        (ReSTRVisionConfig, ReSTRVisionModel),
        (ReSTRTextConfig, ReSTRTextModel),
    ):
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModel.register(config_class, model_class, exist_ok=True)
    AutoModelForImageSegmentation.register(ReSTRConfig, ReSTRForImageSegmentation, exist_ok=True)
    AutoImageProcessor.register(ReSTRConfig, image_processor_classes={"pil": ReSTRImageProcessor}, exist_ok=True)
    AutoProcessor.register(ReSTRConfig, ReSTRProcessor, exist_ok=True)
    # `save_pretrained` and `push_to_hub` then write the code as well, so that folders load without this package.
    for code_class, auto_class in (
        (ReSTRConfig, "AutoConfig"),
        (ReSTRModel, "AutoModel"),
        (ReSTRForImageSegmentation, "AutoModelForImageSegmentation"),
        (ReSTRImageProcessor, "AutoImageProcessor"),
        (ReSTRProcessor, "AutoProcessor"),
    ):
        code_class.register_for_auto_class(auto_class)
    if TASK not in PIPELINE_REGISTRY.get_supported_tasks():
        PIPELINE_REGISTRY.register_pipeline(TASK, ReSTRPipeline, pt_model=AutoModelForImageSegmentation)
