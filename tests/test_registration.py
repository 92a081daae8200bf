"""With the package imported, transformers knows ReSTR without remote code and is otherwise unchanged."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fresh_process import run_python
from PIL import Image
from tiny_training import make_model, make_processor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageSegmentation,
    AutoProcessor,
    AutoTokenizer,
    pipeline,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.testing_utils import CaptureLogger
from transformers.utils import PushToHubMixin, logging

import modeling_restr
from modeling_restr import (
    ReSTRConfig,
    ReSTRForImageSegmentation,
    ReSTRImageProcessor,
    ReSTRModel,
    ReSTRPipeline,
    ReSTRProcessor,
    ReSTRTextModel,
    ReSTRVisionModel,
)
from modeling_restr.hub import save_bundle


TASK = "referring-image-segmentation"
ROOT = Path(__file__).resolve().parents[1]
PYTHONPATH = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
SENTENCE = "the red square"

# Compares what transformers and huggingface_hub define before and after the package is imported, and the answers of
# another model's pipeline. Names that a module gets later do not count: transformers loads its own lazily.
FRESH_PROCESS = """
import importlib, json, sys, tempfile
from types import ModuleType

import torch
from PIL import Image
from transformers import SegformerConfig, SegformerForSemanticSegmentation, pipeline
from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil

for name in ("modelcard", "trainer", "processing_utils", "image_processing_backends", "models.auto.tokenization_auto"):
    importlib.import_module(f"transformers.{name}")


def walk(value, path, found, depth=0):
    found[path] = tuple(value) if isinstance(value, list) else value
    own = type(value).__module__.partition(".")[0] == "transformers" and not isinstance(value, ModuleType)
    if type(value) is dict:
        items = value.items()
    elif own or (isinstance(value, type) and value.__module__ == path[0]):
        items = vars(value).items()
    else:
        return
    if depth < 3:
        for name, part in list(items):
            walk(part, (*path, name if isinstance(name, str) else getattr(name, "__name__", repr(name))), found, depth + 1)


def take_snapshot():
    found = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ("transformers", "huggingface_hub"):
            for attribute, value in list(vars(module).items()):
                walk(value, (name, attribute), found)
    return found


def is_one_thing(parent):
    return parent is not None and not isinstance(parent, ModuleType)


def ask_another_model():
    pipe = pipeline("image-segmentation", model=folder, image_processor=image_processor)
    results = pipe(Image.linear_gradient("L").convert("RGB"))
    return [type(pipe).__name__, [[result["label"], result["mask"].tobytes().hex()] for result in results]]


folder = tempfile.mkdtemp()
torch.manual_seed(0)
sizes = dict(hidden_sizes=[8, 8], depths=[1, 1], num_attention_heads=[1, 1], decoder_hidden_size=8, num_labels=3)
lists = dict(num_encoder_blocks=2, sr_ratios=[2, 1], patch_sizes=[7, 3], strides=[4, 2], mlp_ratios=[2, 2])
SegformerForSemanticSegmentation(SegformerConfig(**sizes, **lists)).save_pretrained(folder)
image_processor = SegformerImageProcessorPil(size={"height": 32, "width": 32})

answer = ask_another_model()
before = take_snapshot()
import modeling_restr
after = take_snapshot()
print(json.dumps({
    "changed": [p for p, value in before.items() if p not in after or not (after[p] is value or after[p] == value)],
    "added": [p for p in after if p not in before and len(p) > 2 and is_one_thing(before.get(p[:-1]))],
    "same_answer": ask_another_model() == answer,
    "answer": answer,
}))
"""
# New entries of the registries of Auto classes and pipelines: (name of the dict, key).
REGISTERED = {
    *(("_extra_content", name) for name in ("restr", "restr_text_model", "restr_vision_model")),
    *(("_extra_content", name) for name in ("ReSTRConfig", "ReSTRTextConfig", "ReSTRVisionConfig")),
    ("SUPPORTED_TASKS", TASK),
    ("supported_tasks", TASK),  # the same, as an attribute of PIPELINE_REGISTRY
}


@pytest.fixture(scope="module")
def processor() -> ReSTRProcessor:
    return make_processor()


@pytest.fixture(scope="module")
def model(processor) -> ReSTRForImageSegmentation:
    return make_model(processor).eval()


@pytest.fixture(scope="module")
def folders(model, processor, tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("saved")
    save_bundle(model, processor, root / "bundle")
    save_bundle(model, processor, root / "without code", include_code=False)
    for part in (model, processor):
        part.save_pretrained(root / "part by part")
    return {path.name: str(path) for path in root.iterdir()}


@pytest.fixture
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8))


def test_importing_the_package_changes_nothing_but_registries():
    found = json.loads(run_python(FRESH_PROCESS, cwd=ROOT, HF_HUB_OFFLINE="1"))
    assert found["changed"] == []
    assert {tuple(path[-2:]) for path in found["added"]} == REGISTERED
    assert found["answer"][0] == "ImageSegmentationPipeline" and len(found["answer"][1]) > 0
    assert found["same_answer"]


def test_auto_classes_need_no_remote_code(folders, model, processor, image):
    folder = folders["bundle"]
    assert type(AutoConfig.from_pretrained(folder)) is ReSTRConfig
    assert type(AutoProcessor.from_pretrained(folder)) is ReSTRProcessor
    assert type(AutoImageProcessor.from_pretrained(folder)) is ReSTRImageProcessor
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == processor.tokenizer.get_vocab()

    inputs = processor(images=image, text=SENTENCE, return_tensors="pt")
    expected = model(**inputs)
    loaded = AutoModelForImageSegmentation.from_pretrained(folder)
    assert type(loaded) is ReSTRForImageSegmentation
    assert torch.equal(loaded(**inputs).logits, expected.logits)
    loaded = AutoModel.from_pretrained(folder)
    assert type(loaded) is ReSTRModel
    assert torch.equal(loaded(**inputs).patch_logits, expected.patch_logits)


def test_encoders_are_registered_too(model, tmp_path):
    for config, model_class in (
        (model.config.vision_config, ReSTRVisionModel),
        (model.config.text_config, ReSTRTextModel),
    ):
        encoder = AutoModel.from_config(config)
        assert type(encoder) is model_class
        encoder.save_pretrained(tmp_path / config.model_type)
        assert type(AutoModel.from_pretrained(tmp_path / config.model_type)) is model_class


def check_pipeline(pipe, model, processor, image) -> None:
    assert type(pipe).__name__ == "ReSTRPipeline"
    assert type(pipe.model) is ReSTRForImageSegmentation and type(pipe.processor) is ReSTRProcessor
    (answer,) = pipe(image, text=SENTENCE)
    (expected,) = ReSTRPipeline(model=model, processor=processor)(image, text=SENTENCE)
    assert answer["score"] == expected["score"]
    assert np.array_equal(np.array(answer["mask"]), np.array(expected["mask"]))


@pytest.mark.parametrize("trust", [None, False, True])
@pytest.mark.parametrize("saved", ["bundle", "without code", "part by part"])
def test_its_own_task_needs_no_remote_code(folders, saved, trust, model, processor, image):
    with CaptureLogger(logging.get_logger("transformers.configuration_utils")) as log:
        pipe = pipeline(TASK, model=folders[saved], trust_remote_code=trust)
    assert log.out == "" and type(pipe) is ReSTRPipeline
    check_pipeline(pipe, model, processor, image)


def test_its_own_task_takes_a_model_in_memory_with_its_processor(model, processor, image):
    check_pipeline(pipeline(TASK, model=model, processor=processor), model, processor, image)
    with pytest.raises(Exception, match="Please provide a processor"):
        pipeline(TASK, model=model)
    with pytest.raises(ValueError, match="Expected the model's processor, got none: pass `processor=`"):
        ReSTRPipeline(model=model, tokenizer=processor.tokenizer)


@pytest.mark.parametrize("task", ["image-segmentation", None])
@pytest.mark.parametrize("saved", ["bundle", "part by part"])
def test_the_hub_s_task_works_with_the_saved_code(folders, saved, task, model, processor, image):
    pipe = pipeline(task, model=folders[saved], trust_remote_code=True)
    check_pipeline(pipe, model, processor, image)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        pipeline(task, model=folders[saved])


def test_the_hub_s_task_names_the_other_one_without_saved_code(folders, model, processor, image):
    pipe = pipeline("image-segmentation", model=folders["without code"])
    with pytest.raises(ValueError, match=f'pipeline\\("{TASK}", model=...\\)'):
        pipe(image, text=SENTENCE)
    parts = {"image_processor": processor.image_processor, "tokenizer": processor.tokenizer}
    with pytest.raises(ValueError, match=f'pipeline\\("{TASK}", model=...\\)'):
        pipeline("image-segmentation", model=model, **parts)(image)


def test_a_config_names_the_hub_s_task_alone(folders, tmp_path):
    ReSTRConfig.from_pretrained(folders["without code"]).save_pretrained(tmp_path / "config")
    pipeline(TASK, model=folders["without code"]).save_pretrained(tmp_path / "pipeline")
    for folder in (tmp_path / "config", tmp_path / "pipeline", Path(folders["bundle"])):
        saved = json.loads((folder / "config.json").read_text())["custom_pipelines"]
        assert saved == {
            "image-segmentation": {"impl": "pipeline_restr.ReSTRPipeline", "pt": ["AutoModelForImageSegmentation"]}
        }
    assert not hasattr(ReSTRConfig(), "custom_pipelines")


@pytest.mark.parametrize("pushed", [ReSTRForImageSegmentation, ReSTRProcessor, ReSTRPipeline])
def test_classes_are_pushed_as_transformers_pushes_its_own(pushed):
    assert pushed._upload_modified_files is PushToHubMixin._upload_modified_files


def test_registration_may_be_repeated(folders):
    with CaptureLogger(logging.get_logger("transformers.pipelines.base")) as log:
        importlib.reload(modeling_restr)
        modeling_restr.register()
    assert log.out == ""
    assert type(pipeline(TASK, model=folders["bundle"])) is ReSTRPipeline
    assert type(AutoProcessor.from_pretrained(folders["bundle"])) is ReSTRProcessor


def test_import_is_light_and_silent():
    names = "['datasets', 'evaluate', 'pycocotools', 'modeling_restr.data', 'modeling_restr.hub', 'modeling_restr.metrics']"
    code = f"import sys, modeling_restr; print([name for name in {names} if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": PYTHONPATH}, capture_output=True, check=True
    )
    assert (result.stdout.decode().strip(), result.stderr.decode()) == ("[]", "")
