"""A saved bundle runs with and without the package."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from folders import read_files
from fresh_process import run_without_package
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import ViTConfig
from transformers.dynamic_module_utils import get_imports, get_relative_imports

import modeling_restr
from modeling_restr import (
    ReSTRConfig,
    ReSTRForImageSegmentation,
    ReSTRImageProcessor,
    ReSTRModel,
    ReSTRPipeline,
    ReSTRProcessor,
    build_tokenizer,
)
from modeling_restr.hub import save_bundle
from modeling_restr.hub.bundle import add_code


PACKAGE = Path(modeling_restr.__file__).parent
CODE_FILES = {
    "configuration_restr.py",
    "image_processing_restr.py",
    "image_reading_restr.py",
    "modeling_restr.py",
    "pipeline_restr.py",
    "processing_restr.py",
    "requirements_restr.py",
    "vision_encoder_restr.py",
}
SERVING_FILES = {"handler.py", "requirements.txt"}
MODEL_FILES = {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}
SENTENCES = ["the dog on the left", "ball"]

# Loads the folder argv[1] with remote code, asks about the image argv[2], and writes the results to the folder argv[3].
LOADS = """
import json, sys
import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from transformers.models.auto.image_processing_auto import AutoImageProcessor

folder, photo, output, *sentences = sys.argv[1:]
image = Image.open(photo)
load = dict(trust_remote_code=True)
config = transformers.AutoConfig.from_pretrained(folder, **load)
base_model = transformers.AutoModel.from_pretrained(folder, **load)
model = transformers.AutoModelForImageSegmentation.from_pretrained(folder, **load)
processor = transformers.AutoProcessor.from_pretrained(folder, **load)
image_processor = AutoImageProcessor.from_pretrained(folder, **load)
tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **load)
pipe = transformers.pipeline(model=folder, **load)

inputs = processor(images=image, text=sentences, return_tensors="pt")
with torch.no_grad():
    results = {
        "patch_logits": base_model(**inputs).patch_logits,
        "logits": model(**inputs).logits,
        "pixel_values": image_processor(image, return_tensors="pt")["pixel_values"],
        "input_ids": tokenizer(sentences, padding="max_length", return_tensors="pt")["input_ids"],
    }
answers = pipe(image, text=sentences)
results["masks"] = torch.stack([torch.from_numpy(np.array(answer["mask"])) for answer in answers])
pipe.save_pretrained(f"{output}/saved")
assert transformers.pipeline(model=f"{output}/saved", **load)(image, text=sentences) == answers
results["scores"] = torch.tensor([answer["score"] for answer in answers], dtype=torch.float64)
save_file({name: tensor.contiguous() for name, tensor in results.items()}, f"{output}/results.safetensors")
loaded = (config, base_model, model, processor, image_processor, pipe)
with open(f"{output}/classes.json", "w") as file:
    json.dump([[type(part).__module__, type(part).__name__] for part in loaded], file)
"""


def build_model(seed: int = 3, **options) -> ReSTRForImageSegmentation:
    torch.manual_seed(seed)
    encoder = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    options = {"vision_config": {**encoder, "image_size": 32, "patch_size": 8}, **options}
    text_config = {**encoder, "vocab_size": 10, "projection_dim": 16}
    config = ReSTRConfig(text_config=text_config, num_attention_heads=2, **options)
    return ReSTRForImageSegmentation(config).eval()


def build_processor(image_size: int = 32, largest_id: int = 9) -> ReSTRProcessor:
    words = ["<pad>", "<go>", "<eos>", "<unk>", "the", "dog", "on"]
    vocabulary = {word: index for index, word in enumerate(words)} | {"left": largest_id}  # ids have gaps
    image_processor = ReSTRImageProcessor(size={"height": image_size, "width": image_size})
    return ReSTRProcessor(image_processor, build_tokenizer(vocabulary))


def build_image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8))


@pytest.fixture
def bundle(tmp_path) -> Path:
    model, processor = build_model(), build_processor()
    folder = save_bundle(model, processor, tmp_path / "bundle")
    assert not any(hasattr(part, "auto_map") for part in (model.config, processor, processor.image_processor))
    return folder


def test_bundle_is_complete_and_flat(bundle):
    files = read_files(bundle)
    assert files.keys() == CODE_FILES | SERVING_FILES | MODEL_FILES
    assert all(files[name] == (PACKAGE / name).read_bytes() for name in CODE_FILES)
    assert files["handler.py"] == (PACKAGE / "hub" / "handler.py").read_bytes()
    assert list(bundle.parent.iterdir()) == [bundle]


def test_code_imports_only_itself_and_required_packages(bundle):
    allowed = sys.stdlib_module_names | {"huggingface_hub", "numpy", "packaging", "PIL", "torch", "transformers"}
    for name in CODE_FILES | {"handler.py"}:
        assert set(get_imports(bundle / name)) <= allowed
        assert {f"{module}.py" for module in get_relative_imports(bundle / name)} <= CODE_FILES


def test_fresh_process_without_the_package_computes_the_same(bundle, tmp_path):
    (tmp_path / "output").mkdir()
    build_image().save(tmp_path / "photo.png")
    environment = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    arguments = [bundle, tmp_path / "photo.png", tmp_path / "output", *SENTENCES]
    run_without_package(LOADS, *arguments, cwd=tmp_path, **environment)

    model, processor, image = build_model(), build_processor(), build_image()
    inputs = processor(images=image, text=SENTENCES, return_tensors="pt")
    answers = ReSTRPipeline(model=model, processor=processor)(image, text=SENTENCES)
    results = load_file(tmp_path / "output" / "results.safetensors")
    with torch.no_grad():
        outputs = model(**inputs)
    assert torch.equal(results["logits"], outputs.logits)
    assert torch.equal(results["patch_logits"], outputs.patch_logits)
    assert torch.equal(results["pixel_values"], inputs["pixel_values"])
    assert torch.equal(results["input_ids"], inputs["input_ids"])
    assert results["scores"].tolist() == [answer["score"] for answer in answers]
    masks = np.stack([np.array(answer["mask"]) for answer in answers])
    assert np.array_equal(results["masks"].numpy(), masks)
    assert 0 < np.count_nonzero(masks) < masks.size

    saved, whole = read_files(tmp_path / "output" / "saved"), read_files(bundle)
    assert saved.keys() == CODE_FILES | MODEL_FILES
    assert all(saved[name] == whole[name] for name in {*CODE_FILES, "model.safetensors", "tokenizer.json"})

    classes = json.loads((tmp_path / "output" / "classes.json").read_text())
    assert all(module.startswith("transformers_modules.bundle.") for module, _ in classes)
    expected = (ReSTRConfig, ReSTRModel, ReSTRForImageSegmentation, ReSTRProcessor, ReSTRImageProcessor, ReSTRPipeline)
    assert [name for _, name in classes] == [part.__name__ for part in expected]


def test_second_call_gives_identical_bytes(bundle, tmp_path):
    first = read_files(bundle)
    loaded = ReSTRForImageSegmentation.from_pretrained(bundle), ReSTRProcessor.from_pretrained(bundle)
    save_bundle(*loaded, bundle)
    assert read_files(bundle) == first
    assert read_files(save_bundle(*loaded, tmp_path / "new" / "folder")) == first


def test_parts_that_are_saved_alone_have_the_same_code(bundle, tmp_path):
    build_model().save_pretrained(tmp_path / "parts")
    processor = build_processor()
    processor.save_pretrained(tmp_path / "parts")
    assert not hasattr(processor, "auto_map")
    parts = read_files(tmp_path / "parts")
    assert parts.keys() == CODE_FILES | MODEL_FILES
    assert all(parts[name] == (PACKAGE / name).read_bytes() for name in CODE_FILES)
    for key in ("auto_map", "custom_pipelines"):
        saved = [json.loads((folder / "config.json").read_text())[key] for folder in (tmp_path / "parts", bundle)]
        assert saved[0] == saved[1]


def test_code_is_added_to_a_folder_without_it(bundle, tmp_path):
    whole = read_files(bundle)
    model, processor = ReSTRForImageSegmentation.from_pretrained(bundle), ReSTRProcessor.from_pretrained(bundle)
    plain = save_bundle(model, processor, tmp_path / "plain", dtype="float16", include_code=False)
    add_code(plain, tmp_path / "code")
    added = read_files(tmp_path / "code")
    assert added == {name: content for name, content in whole.items() if name != "model.safetensors"}


def test_without_code_nothing_refers_to_it(bundle, tmp_path):
    loaded = ReSTRForImageSegmentation.from_pretrained(bundle), ReSTRProcessor.from_pretrained(bundle)
    folder = save_bundle(*loaded, tmp_path / "plain", include_code=False)
    assert {path.name for path in folder.iterdir()} == MODEL_FILES
    for name in ("config.json", "processor_config.json", "tokenizer_config.json"):
        assert "auto_map" not in (folder / name).read_text() and "custom_pipelines" not in (folder / name).read_text()
    model = ReSTRForImageSegmentation.from_pretrained(folder)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in loaded[0].state_dict().items())
    assert "auto_map" in json.loads((save_bundle(*loaded, folder) / "config.json").read_text())


def test_existing_folder_is_updated_and_keeps_other_files(bundle):
    (bundle / "README.md").write_text("mine")
    (bundle / "checkpoint-1").mkdir()
    save_file({"old": torch.zeros(1)}, bundle / "model-00001-of-00002.safetensors")
    (bundle / "model.safetensors.index.json").touch()
    model = build_model(seed=1)
    save_bundle(model, build_processor(), bundle)
    files = CODE_FILES | SERVING_FILES | MODEL_FILES | {"README.md", "checkpoint-1"}
    assert {path.name for path in bundle.iterdir()} == files
    assert (bundle / "README.md").read_text() == "mine"
    loaded = ReSTRForImageSegmentation.from_pretrained(bundle).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_failure_while_writing_leaves_everything_as_it_was(bundle, tmp_path, monkeypatch):
    before = read_files(bundle)

    def fail(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(ReSTRProcessor, "save_pretrained", fail)
    for folder in (bundle, tmp_path / "new"):
        with pytest.raises(OSError, match="no space left"):
            save_bundle(build_model(seed=1), build_processor(), folder)
    assert read_files(bundle) == before
    assert list(tmp_path.iterdir()) == [bundle]


def test_interrupted_update_does_not_load(bundle, monkeypatch):
    replace, calls = os.replace, []

    def replace_twice(source, target):
        calls.append(target)
        if len(calls) > 2:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_twice)
    with pytest.raises(KeyboardInterrupt):
        save_bundle(build_model(seed=1), build_processor(), bundle)
    monkeypatch.undo()
    assert len(calls) == 3
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        ReSTRForImageSegmentation.from_pretrained(bundle)
    save_bundle(build_model(), build_processor(), bundle)
    ReSTRForImageSegmentation.from_pretrained(bundle)


def test_half_precision_loads_in_the_dtype_of_the_model(bundle, tmp_path):
    vit = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8
    )
    model = build_model(vision_config=vit)
    folder = save_bundle(model, build_processor(), tmp_path / "half", dtype="float16")
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.float16}
    assert model.dtype == torch.float32
    loaded = ReSTRForImageSegmentation.from_pretrained(folder)
    assert loaded.dtype == torch.float32
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.half().float())
    assert ReSTRForImageSegmentation.from_pretrained(folder, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "restr"}, "Expected a ReSTRForImageSegmentation and a ReSTRProcessor, got a str"),
        ({"processor": None}, "and a NoneType"),
        ({"processor": build_processor(image_size=64)}, "images of 64x64 pixels, but the model expects 32x32"),
        ({"processor": build_processor(largest_id=10)}, "ids up to 10, but the model has 10 word vectors"),
        ({"dtype": torch.int8}, "floating point type"),
        ({"dtype": "half16"}, "floating point type"),
    ],
)
def test_bad_arguments_are_explained(tmp_path, arguments, message):
    arguments = {"model": build_model(), "processor": build_processor(), **arguments}
    with pytest.raises(ValueError, match=message):
        save_bundle(folder=tmp_path / "bundle", **arguments)
    assert not list(tmp_path.iterdir())


def test_weights_beyond_the_dtype_are_refused(tmp_path):
    model = build_model()
    with torch.no_grad():
        model.pixel_decoder.head.weight[0, 0] = 1e5
    with pytest.raises(ValueError, match=r"not finite, as stored in torch.float16: \['pixel_decoder.head.weight'\]"):
        save_bundle(model, build_processor(), tmp_path / "bundle", dtype=torch.float16)
    save_bundle(model, build_processor(), tmp_path / "bundle", dtype=torch.bfloat16)


def test_file_instead_of_a_folder_is_refused(tmp_path):
    (tmp_path / "bundle").write_text("a file")
    with pytest.raises(ValueError, match="is a file"):
        save_bundle(build_model(), build_processor(), tmp_path / "bundle")
    assert (tmp_path / "bundle").read_text() == "a file"
