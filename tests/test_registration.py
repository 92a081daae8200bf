"""With the package installed, transformers knows ReSTR without remote code and treats other models as before."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageSegmentation,
    AutoProcessor,
    AutoTokenizer,
    ImageSegmentationPipeline,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    pipeline,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil

import modeling_restr
from modeling_restr import (
    ReSTRConfig,
    ReSTRForImageSegmentation,
    ReSTRImageProcessor,
    ReSTRModel,
    ReSTRPipeline,
    ReSTRProcessor,
    ReSTRTextConfig,
    ReSTRTextModel,
    ReSTRVisionConfig,
    ReSTRVisionModel,
    build_tokenizer,
)
from modeling_restr.hub import save_bundle


PYTHONPATH = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
ENCODER = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
VISION = {**ENCODER, "image_size": 32, "patch_size": 8}
TEXT = {**ENCODER, "vocab_size": 6, "projection_dim": 16}


@pytest.fixture(scope="module")
def model() -> ReSTRForImageSegmentation:
    torch.manual_seed(0)
    return ReSTRForImageSegmentation(ReSTRConfig(vision_config=VISION, text_config=TEXT, num_attention_heads=2)).eval()


@pytest.fixture(scope="module")
def processor() -> ReSTRProcessor:
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<go>", "<eos>", "<unk>", "dog", "left"])}
    return ReSTRProcessor(ReSTRImageProcessor(size={"height": 32, "width": 32}), build_tokenizer(vocabulary))


@pytest.fixture(scope="module")
def folder(model, processor, tmp_path_factory) -> str:
    return str(save_bundle(model, processor, tmp_path_factory.mktemp("saved") / "restr"))


@pytest.fixture
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8))


def test_auto_classes_need_no_remote_code(folder, model, processor, image):
    assert type(AutoConfig.from_pretrained(folder)) is ReSTRConfig
    assert type(AutoProcessor.from_pretrained(folder)) is ReSTRProcessor
    assert type(AutoImageProcessor.from_pretrained(folder)) is ReSTRImageProcessor
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == processor.tokenizer.get_vocab()

    inputs = processor(images=image, text="dog", return_tensors="pt")
    expected = model(**inputs)
    loaded = AutoModelForImageSegmentation.from_pretrained(folder)
    assert type(loaded) is ReSTRForImageSegmentation
    assert torch.equal(loaded(**inputs).logits, expected.logits)
    loaded = AutoModel.from_pretrained(folder)
    assert type(loaded) is ReSTRModel
    assert torch.equal(loaded(**inputs).patch_logits, expected.patch_logits)


def test_encoders_are_registered_too(tmp_path):
    for config, model_class in (
        (ReSTRVisionConfig(**VISION), ReSTRVisionModel),
        (ReSTRTextConfig(**TEXT), ReSTRTextModel),
    ):
        model = AutoModel.from_config(config)
        assert type(model) is model_class
        model.save_pretrained(tmp_path / config.model_type)
        assert type(AutoModel.from_pretrained(tmp_path / config.model_type)) is model_class


@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": True}], ids=["", "trust_remote_code"])
@pytest.mark.parametrize("task", [{}, {"task": "image-segmentation"}], ids=["no task", "task"])
def test_pipeline_needs_no_remote_code(folder, model, processor, image, task, trust):
    pipe = pipeline(**task, model=folder, **trust)
    assert type(pipe) is ReSTRPipeline
    assert type(pipe.model) is ReSTRForImageSegmentation
    assert type(pipe.processor) is ReSTRProcessor
    (answer,) = pipe(image, text="dog left")
    (expected,) = ReSTRPipeline(model=model, processor=processor)(image, text="dog left")
    assert answer["score"] == expected["score"]
    assert np.array_equal(np.array(answer["mask"]), np.array(expected["mask"]))


@pytest.mark.parametrize("names", [("image_processor", "tokenizer"), ("processor",)])
def test_pipeline_of_a_model_in_memory(model, processor, image, names):
    parts = {"image_processor": processor.image_processor, "tokenizer": processor.tokenizer, "processor": processor}
    pipe = pipeline("image-segmentation", model=model, **{name: parts[name] for name in names})
    assert type(pipe) is ReSTRPipeline
    assert pipe(image, text="dog")[0]["mask"].size == image.size


def test_pipeline_of_a_folder_saved_part_by_part(model, processor, image, tmp_path):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    pipe = pipeline(model=str(tmp_path))
    assert type(pipe) is ReSTRPipeline
    assert pipe(image, text="dog")[0]["mask"].size == image.size


def test_config_of_a_bundle_keeps_its_pipeline(folder, tmp_path):
    config = AutoConfig.from_pretrained(folder)
    config.save_pretrained(tmp_path)
    saved = ReSTRConfig.from_json_file(tmp_path / "config.json").to_dict()["custom_pipelines"]
    assert saved == {
        "image-segmentation": {"impl": "pipeline_restr.ReSTRPipeline", "pt": ["AutoModelForImageSegmentation"]}
    }
    assert "custom_pipelines" not in ReSTRConfig().to_dict()


def test_pipelines_of_other_models_are_as_before(image, tmp_path):
    sizes = {"hidden_sizes": [8, 8], "depths": [1, 1], "num_attention_heads": [1, 1], "decoder_hidden_size": 8}
    lists = {
        "num_encoder_blocks": 2,
        "sr_ratios": [2, 1],
        "patch_sizes": [7, 3],
        "strides": [4, 2],
        "mlp_ratios": [2, 2],
    }
    torch.manual_seed(0)
    other = SegformerForSemanticSegmentation(SegformerConfig(**sizes, **lists, num_labels=3)).eval()
    other.save_pretrained(tmp_path)
    image_processor = SegformerImageProcessorPil(size={"height": 32, "width": 32})
    pipe = pipeline("image-segmentation", model=str(tmp_path), image_processor=image_processor)
    assert type(pipe) is ImageSegmentationPipeline
    answers = pipe(image)
    expected = ImageSegmentationPipeline(model=other, image_processor=image_processor)(image)
    assert [answer["label"] for answer in answers] == [answer["label"] for answer in expected]
    for answer, reference in zip(answers, expected, strict=True):
        assert np.array_equal(np.array(answer["mask"]), np.array(reference["mask"]))


def test_registration_may_be_repeated(folder):
    importlib.reload(modeling_restr)
    modeling_restr.register()
    assert type(pipeline(model=folder)) is ReSTRPipeline
    assert type(AutoProcessor.from_pretrained(folder)) is ReSTRProcessor


def test_import_is_light():
    names = "['datasets', 'evaluate', 'pycocotools', 'modeling_restr.data', 'modeling_restr.hub', 'modeling_restr.metrics']"
    code = f"import sys, modeling_restr; print([name for name in {names} if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": PYTHONPATH}, capture_output=True, check=True
    )
    assert result.stdout.decode().strip() == "[]"
