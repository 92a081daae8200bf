"""Registration with transformers, so that its Auto classes and `pipeline` know ReSTR without remote code."""

from functools import wraps
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForImageSegmentation, AutoProcessor
from transformers.modelcard import TrainingSummary

# `transformers.AutoImageProcessor` itself may be a stand-in that raises where torchvision is missing.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.pipelines import SUPPORTED_TASKS, ImageSegmentationPipeline, Pipeline

from .configuration_restr import ReSTRConfig, ReSTRTextConfig, ReSTRVisionConfig
from .image_processing_restr import ReSTRImageProcessor
from .modeling_restr import ReSTRForImageSegmentation, ReSTRModel, ReSTRTextModel, ReSTRVisionModel
from .pipeline_restr import ReSTRPipeline
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
    # What `save_pretrained` and `push_to_hub` write then carries its code, and loads where this package is not installed.
    for code_class, auto_class in (
        (ReSTRConfig, "AutoConfig"),
        (ReSTRModel, "AutoModel"),
        (ReSTRForImageSegmentation, "AutoModelForImageSegmentation"),
        (ReSTRImageProcessor, "AutoImageProcessor"),
        (ReSTRProcessor, "AutoProcessor"),
    ):
        code_class.register_for_auto_class(auto_class)
    _register_pipeline()
    _register_model_card()


def _register_pipeline() -> None:
    """
    Let the task "image-segmentation" make a [`ReSTRPipeline`] for ReSTR's models and what it made before for others.

    Transformers has one pipeline a task, and demands `trust_remote_code=True` for the tasks in a config's
    `custom_pipelines`, whatever is registered. So the pipeline class is chosen by the model, and a config names its
    task, which `pipeline` infers when none is given, without claiming it.
    """
    task: Any = SUPPORTED_TASKS["image-segmentation"]
    previous = task["impl"] if isinstance(task["impl"], type) else ImageSegmentationPipeline  # or its dotted path
    previous = getattr(previous, "other_pipeline", previous)

    class ImageSegmentationPipelineByModel(previous):  # type: ignore[valid-type, misc]
        other_pipeline = previous
        # Loaded where there is one: ReSTR's is part of its processor, which may be given alone.
        _load_image_processor = None
        _load_video_processor = False

        def __new__(cls, model: Any, *args: Any, **kwargs: Any) -> Pipeline:  # type: ignore[misc]
            if getattr(model.config, "model_type", None) != ReSTRConfig.model_type:
                return previous(model, *args, **kwargs)
            if kwargs.get("processor") is None:
                kwargs["processor"] = ReSTRProcessor(kwargs.get("image_processor"), kwargs.get("tokenizer"))
            return ReSTRPipeline(model, *args, **kwargs)

    task["impl"] = ImageSegmentationPipelineByModel
    config_class: Any = ReSTRConfig
    config_class.custom_pipelines = property(_get_custom_pipelines, _set_custom_pipelines)


class _UnclaimedTask(dict):
    """A config's `custom_pipelines` whose "image-segmentation" can be listed but is not `in` it."""

    def __contains__(self, task: object) -> bool:
        return task != "image-segmentation" and super().__contains__(task)


def _get_custom_pipelines(config: ReSTRConfig) -> dict[str, Any]:
    # A model saved alone lacks the key, and `pipeline` would ask the Hub for its task.
    return _UnclaimedTask(config.__dict__.get("custom_pipelines", {"image-segmentation": {}}))


def _set_custom_pipelines(config: ReSTRConfig, value: dict[str, Any]) -> None:
    config.__dict__["custom_pipelines"] = value


def _register_model_card() -> None:
    """Let what transformers pushes of ReSTR come with ReSTR's card where transformers would write one of its own."""
    pushed_classes: tuple[Any, ...] = (ReSTRForImageSegmentation, ReSTRProcessor, ReSTRPipeline)
    for pushed_class in pushed_classes:
        pushed_class._upload_modified_files = _upload_with_card
    summary_class: Any = TrainingSummary
    previous = summary_class.from_trainer.__func__
    previous = getattr(previous, "of_other_models", previous)

    @wraps(previous)
    def from_trainer(cls: Any, trainer: Any, **options: Any) -> Any:
        summary = previous(cls, trainer, **options)
        if isinstance(trainer.model, ReSTRForImageSegmentation):
            from .hub.automatic_card import build_trainer_card

            summary.to_model_card = lambda: build_trainer_card(trainer, summary, options.get("dataset_tags"))
        return summary

    from_trainer.of_other_models = previous  # type: ignore[attr-defined]
    summary_class.from_trainer = classmethod(from_trainer)


def _upload_with_card(self: Any, *args: Any, **kwargs: Any) -> Any:
    from .hub.automatic_card import upload_with_card  # what only a push needs

    return upload_with_card(self, *args, **kwargs)
