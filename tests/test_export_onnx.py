"""Exported graphs compute what the model computes, and run without PyTorch and Transformers."""

import base64
import copy
import json
import pickle
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import fields
from io import BytesIO, StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from annotated_images import make_images
from doc_pages import run_page
from numerics import assert_as_precise
from pictures import encode
from PIL import EpsImagePlugin, Image
from transformers import ViTConfig

from modeling_restr import (
    ReSTRConfig,
    ReSTRForImageSegmentation,
    ReSTRImageProcessor,
    ReSTRProcessor,
    ReSTRTextConfig,
    ReSTRVisionConfig,
    build_tokenizer,
)
from modeling_restr.cli import main
from modeling_restr.data.canonical import decode_mask
from modeling_restr.data.dataset_card import Source
from modeling_restr.data.loading import load_prepared
from modeling_restr.data.preparation import prepare
from modeling_restr.files import write_json
from modeling_restr.pipeline_restr import ReSTRPipeline
from modeling_restr.tokenization_restr import vocabulary_from_expressions


for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package, reason=f"needs {package}: pip install onnx onnxruntime onnxscript")

import onnxruntime
from onnx import load, numpy_helper

from modeling_restr.export import onnx_folder, save_onnx
from modeling_restr.export.restr_onnx import EncodedImage, ReSTROnnxPipeline, UnreadableImageError


REPOSITORY = Path(__file__).resolve().parents[1]
MINI = REPOSITORY / "examples" / "restr_mini"
PHOTO = REPOSITORY / "examples" / "photos" / "held_out" / "000000173350.jpg"
SENTENCES = ["the upper dog", "the dog on the left", "a red ball", "the ring, left of it."]
VOCABULARY = vocabulary_from_expressions(SENTENCES)
IMAGE_SIZE, PATCH_SIZE = 48, 8
SHAPES = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}


def make_model(vision_config=None, **values):
    """A tiny random model whose weights are large enough that its masks differ by image and by sentence."""
    config = ReSTRConfig(
        vision_config=vision_config
        or ReSTRVisionConfig(num_hidden_layers=1, image_size=IMAGE_SIZE, patch_size=PATCH_SIZE, **SHAPES),
        text_config=ReSTRTextConfig(
            vocab_size=len(VOCABULARY), num_hidden_layers=1, projection_dim=32, **(SHAPES | {"hidden_size": 24})
        ),
        **({"num_fusion_layers": 1} | SHAPES | values),
    )
    model = ReSTRForImageSegmentation(config).eval()
    torch.manual_seed(9)
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.25)
    return model


@pytest.fixture(scope="module")
def pipe():
    processor = ReSTRProcessor(ReSTRImageProcessor(size=IMAGE_SIZE), build_tokenizer(VOCABULARY))
    return ReSTRPipeline(model=make_model(), processor=processor, device="cpu")


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    """What `restr export` writes for the pipeline's model, moved to another place."""
    work = tmp_path_factory.mktemp("export")
    pipe.model.save_pretrained(work / "model")
    pipe.processor.save_pretrained(work / "model")
    words = ["export", work / "model", "--int8", "--programs", "--output-dir", work / "first"]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as output:
        patch.setattr(sys, "argv", ["restr", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            main()
    assert not stopped.value.code
    printed = output.getvalue()
    names = [
        *("image_encoder.onnx", "image_encoder.pt2", "image_encoder_int8.onnx", "restr_onnx.json", "restr_onnx.py"),
        *("sentence_query.onnx", "sentence_query.pt2", "sentence_query_int8.onnx", "tokenizer.json"),
    ]
    assert sorted(path.name for path in (work / "first").iterdir()) == names
    assert all(name in printed for name in names)
    return (work / "first").rename(work / "restr-onnx")


@pytest.fixture(scope="module")
def runner(folder):
    return ReSTROnnxPipeline(folder)


@pytest.fixture(scope="module")
def images():
    """A photograph, and parts of it of other sizes."""
    photo = Image.open(PHOTO)
    return [photo, photo.crop((0, 0, 64, 50)), photo.crop((20, 10, 70, 74))]


def make_inputs(num_images, num_sentences, height=IMAGE_SIZE, width=IMAGE_SIZE):
    generator = torch.Generator().manual_seed(num_images + num_sentences)
    words = torch.randint(3, len(VOCABULARY), (num_sentences, 20), generator=generator)
    words[:, : num_sentences + 8] = 0  # padding
    return {
        "pixel_values": torch.rand(num_images, 3, height, width, generator=generator) * 2 - 1,
        "input_ids": words,
        "image_indices": torch.randint(num_images, (num_sentences,), generator=generator),
    }


def run_graph(path, inputs):
    session = onnxruntime.InferenceSession(path)
    names = [graph_input.name for graph_input in session.get_inputs()]
    return session.run(None, {name: np.asarray(inputs[name]) for name in names})


def assert_precise(model, inputs, **results):
    """The results of other programs are the model's, as precise as its own."""
    double = copy.deepcopy(model).double()
    single = model(**inputs, interpolate_pos_encoding=True)
    exact = double(**inputs | {"pixel_values": inputs["pixel_values"].double()}, interpolate_pos_encoding=True)
    for name, result in results.items():
        assert_as_precise(torch.as_tensor(result), single[name], exact[name])


def assert_agree(results, expected):
    """Labels, scores and masks are the same, except for pixels that float32's rounding may flip."""
    assert len(results) == len(expected)
    for result, other in zip(results, expected):
        assert result.keys() == other.keys() and result["label"] == other["label"]
        assert abs(result["score"] - other["score"]) < 1e-4
        masks = [np.asarray(item["mask"]) for item in (result, other)]
        assert result["mask"].mode == other["mask"].mode == "L" and masks[0].shape == masks[1].shape
        assert (masks[0] == masks[1]).mean() > 0.999


# The graphs


@pytest.mark.numerics
@pytest.mark.parametrize(
    ("num_images", "num_sentences", "height", "width"),
    [(1, 1, IMAGE_SIZE, IMAGE_SIZE), (3, 7, IMAGE_SIZE, IMAGE_SIZE), (2, 3, 72, 32), (1, 2, 16, 80)],
)
@torch.no_grad()
def test_graphs_give_the_models_logits(pipe, folder, num_images, num_sentences, height, width):
    inputs = make_inputs(num_images, num_sentences, height, width)
    (vision_embeds,) = run_graph(folder / "image_encoder.onnx", inputs)
    assert vision_embeds.shape == (num_images, height // PATCH_SIZE, width // PATCH_SIZE, 32)
    logits, patch_logits = run_graph(folder / "sentence_query.onnx", inputs | {"vision_embeds": vision_embeds})
    assert_precise(pipe.model, inputs, logits=logits, patch_logits=patch_logits)


@pytest.mark.long
@pytest.mark.numerics
@torch.no_grad()
def test_the_shipped_checkpoint_gives_the_same_logits_on_photographs(tmp_path):
    model, processor = (kind.from_pretrained(MINI) for kind in (ReSTRForImageSegmentation, ReSTRProcessor))
    save_onnx(model.eval(), processor, tmp_path / "restr-onnx")
    photos = sorted((MINI.parent / "photos").rglob("*.jpg"))[:3]  # float64 is slow
    sentences = ["the guy on the left", "biggest dog"]
    inputs = processor(images=[Image.open(photo) for photo in photos], text=[sentences] * len(photos))
    inputs = {
        name: torch.as_tensor(np.asarray(inputs[name])) for name in ("pixel_values", "input_ids", "image_indices")
    }
    (vision_embeds,) = run_graph(tmp_path / "restr-onnx" / "image_encoder.onnx", inputs)
    logits, _ = run_graph(tmp_path / "restr-onnx" / "sentence_query.onnx", inputs | {"vision_embeds": vision_embeds})
    assert len(photos) == 3 and logits.std() > 1
    assert_precise(model, inputs, logits=logits)


@pytest.mark.numerics
@pytest.mark.parametrize(
    "values",
    [
        {"fusion_type": "vanilla", "use_pixel_decoder": False, "attend_to_padding": False},
        {"fusion_type": "independent", "num_fusion_layers": 2, "share_fusion_layers": True},
    ],
)
@torch.no_grad()
def test_graphs_of_the_variants(tmp_path, values):
    model = make_model(**values)
    inputs = make_inputs(2, 5)
    onnx_folder.save_graph(model, "sentence_query", tmp_path)
    vision_embeds = model(**inputs).vision_embeds
    logits, patch_logits = run_graph(tmp_path / "sentence_query.onnx", inputs | {"vision_embeds": vision_embeds})
    assert logits.std() > 0.3
    assert_precise(model, inputs, logits=logits, patch_logits=patch_logits)


@pytest.mark.numerics
@torch.no_grad()
def test_another_vision_encoder_has_a_fixed_image_size(tmp_path):
    model = make_model(ViTConfig(num_hidden_layers=1, image_size=IMAGE_SIZE, patch_size=PATCH_SIZE, **SHAPES))
    inputs = make_inputs(3, 1)
    onnx_folder.save_graph(model, "image_encoder", tmp_path)
    (vision_embeds,) = run_graph(tmp_path / "image_encoder.onnx", inputs)
    assert_precise(model, inputs, vision_embeds=vision_embeds)
    with pytest.raises(Exception, match="dimension"):
        run_graph(tmp_path / "image_encoder.onnx", make_inputs(3, 1, 64, 64))


def test_int8_graphs_hold_rounded_weights(pipe, folder):
    name = "model.vision_model.layers.0.mlp.fc1.weight"
    weight = pipe.model.state_dict()[name].T.numpy()
    graph = load(folder / "image_encoder_int8.onnx").graph
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    found = []
    for tensor_name, tensor in tensors.items():
        if tensor.dtype == np.int8 and tensor.shape == weight.shape:
            scale = tensors[tensor_name.replace("_quantized", "_scale")]
            found.append(np.abs(tensor * scale - weight).max() / scale.max())
    assert min(found) <= 0.51  # half a step
    for graph_name in ("image_encoder", "sentence_query"):
        sizes = [sum(tensor.nbytes for tensor in read_linear_maps(folder, graph_name + end)) for end in ("", "_int8")]
        assert sizes[1] * 4 == sizes[0] > 0


def read_linear_maps(folder, name):
    """The weights of a graph's `MatMul` and `MatMulInteger` nodes."""
    graph = load(folder / f"{name}.onnx").graph
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    nodes = [node for node in graph.node if node.op_type.startswith("MatMul")]
    return [tensors[node.input[1]] for node in nodes if node.input[1] in tensors]


def test_int8_answers_nearly_the_same(runner, folder, images):
    quantized = ReSTROnnxPipeline(folder, precision="int8")
    pairs = [
        (np.asarray(result["mask"]), np.asarray(other["mask"]))
        for image in images
        for result, other in zip(runner(image, text=SENTENCES), quantized(image, text=SENTENCES))
    ]
    assert np.mean([(mask == other).mean() for mask, other in pairs]) > 0.9
    assert any((mask != other).any() for mask, other in pairs)  # these are other graphs


@pytest.mark.numerics
@torch.no_grad()
def test_programs_are_loaded_with_equal_results(pipe, folder):
    encoder, query = (
        torch.export.load(folder / f"{name}.pt2").module() for name in ("image_encoder", "sentence_query")
    )
    for inputs in (make_inputs(2, 4), make_inputs(1, 2, 72, 32)):
        logits, patch_logits = query(encoder(inputs["pixel_values"]), inputs["input_ids"], inputs["image_indices"])
        assert_precise(pipe.model, inputs, logits=logits, patch_logits=patch_logits)
    weights = sum(weight.numel() for weight in pipe.model.state_dict().values())
    exported = [torch.export.load(folder / f"{name}.pt2").state_dict for name in ("image_encoder", "sentence_query")]
    assert sum(weight.numel() for part in exported for weight in part.values()) == weights  # each once


# The runner


def test_runner_answers_as_the_pipeline(pipe, runner, images):
    for image in images:
        assert_agree(runner(image, text=SENTENCES), pipe(image, text=SENTENCES))
    assert_agree(runner(str(PHOTO), text=SENTENCES[0]), pipe(str(PHOTO), text=SENTENCES[0]))
    shares = [(np.asarray(result["mask"]) > 0).mean() for result in runner(images[0], text=SENTENCES)]
    assert len(set(shares)) == len(SENTENCES) and 0 < min(shares) < max(shares) < 1  # none is empty or full


def test_runner_takes_lists_generators_and_datasets(pipe, runner, images):
    rows = [{"image": image, "text": SENTENCES[: 1 + index]} for index, image in enumerate(images)]
    expected = pipe(rows)
    for options in ({}, {"batch_size": 2}, {"batch_size": 8, "num_workers": 2}, {"show_progress": True}):
        results = runner(rows, **options)
        assert isinstance(results, list) and len(results) == len(rows)
        for result, other in zip(results, expected):
            assert_agree(result, other)
    for lazy in ((row for row in rows), torch.utils.data.Subset(rows, range(3))):
        results = runner(lazy, batch_size=2)
        assert not isinstance(results, list)
        assert [len(result) for result in results] == [1, 2, 3]
    assert_agree(runner(images, text="a red ball")[2], pipe(images[2], text="a red ball"))
    assert runner([], text="a red ball") == []


def test_many_sentences_are_asked_in_parts(runner, images):
    many = [SENTENCES[index % 4] for index in range(70)]
    rows = [{"image": images[0], "text": many}, {"image": images[1], "text": SENTENCES}]
    results = runner(rows, batch_size=2)
    assert_agree(results[0], [runner(images[0], text=sentence)[0] for sentence in SENTENCES] * 17 + results[0][68:])
    assert_agree(results[1], runner(images[1], text=SENTENCES))


def test_encoded_images_are_not_encoded_again(runner, pipe, images, monkeypatch):
    encoded = [runner.encode_image(image) for image in images]
    same = pipe.encode_image(images[0])
    assert [field.name for field in fields(EncodedImage)] == [field.name for field in fields(same)]
    assert (encoded[0].size, encoded[0].input_size) == (same.size, same.input_size)
    np.testing.assert_allclose(encoded[0].vision_embeds, same.vision_embeds, rtol=0, atol=1e-5)
    expected = [runner(image, text=SENTENCES) for image in images]
    mixed = [{"image": image, "text": SENTENCES} for image in (encoded[0], images[1], encoded[2])]
    for result, other in zip(runner(mixed, batch_size=2), expected, strict=True):
        assert_agree(result, other)
    monkeypatch.setattr(runner, "image_encoder", None)
    for image in (encoded[0], pickle.loads(pickle.dumps(encoded[0]))):
        assert_agree(runner(image, text=SENTENCES), expected[0])
        assert_agree(runner({"image": image, "text": SENTENCES}), expected[0])
    for result, other in zip(runner(encoded, text=SENTENCES[1], batch_size=3), expected, strict=True):
        assert_agree(result, other[1:2])


def test_images_that_others_encoded_are_refused(runner, folder, pipe, images, tmp_path):
    for other in (pipe, ReSTROnnxPipeline(folder, "int8")):
        with pytest.raises(ValueError, match=r"Item 1: Expected an image that this pipeline's .* another encoder"):
            runner([images[0], other.encode_image(images[0])], text="a ball")
    with pytest.raises(ValueError, match="Expected an image that this pipeline's"):
        pipe(runner.encode_image(images[0]), text="a ball")
    larger = shutil.copytree(folder, tmp_path / "larger")
    settings = json.loads((larger / "restr_onnx.json").read_text())
    side = 2 * PATCH_SIZE + settings["size"]["height"]
    write_json(larger / "restr_onnx.json", settings | {"size": {"height": side, "width": side}})
    with pytest.raises(ValueError, match=rf"encoded at \(height, width\) \({IMAGE_SIZE}, .*got one at \({side}, "):
        runner(ReSTROnnxPipeline(larger).encode_image(images[0]), text="a ball")


def png_of_16_bits(values, transparent):
    values.flat[:9] = transparent
    return BytesIO(encode(Image.fromarray(values.astype(np.uint16)), transparency=transparent))


def make_odd_images():
    """Images of every kind for which the image processor has code of its own."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (37, 90, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    rotated = image.copy()
    rotated.getexif()[0x0112] = 6  # a quarter turn
    return {
        "rgb": image,
        "tall": Image.fromarray(pixels.transpose(1, 0, 2)),
        "thin": Image.fromarray(pixels[:1]),
        "exact": Image.fromarray(rng.integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)),
        "exif": rotated,
        "rgba": Image.fromarray(rng.integers(0, 256, (40, 30, 4), dtype=np.uint8)),
        "grey and alpha": Image.fromarray(rng.integers(0, 256, (40, 30, 4), dtype=np.uint8)).convert("LA"),
        "grey": image.convert("L"),
        "bilevel": image.convert("1"),
        "palette": image.convert("P"),
        "cmyk": image.convert("CMYK"),
        "16 bits and transparency": Image.open(png_of_16_bits(rng.integers(0, 65536, (20, 50)), transparent=1000)),
        "opaque": image.convert("RGBA"),
        "16 bits": Image.fromarray(rng.integers(0, 65536, (20, 50)).astype(np.uint16)),
        "float image": Image.fromarray(rng.random((20, 50), dtype=np.float32)),
        "array": pixels,
        "channels first": pixels.transpose(2, 0, 1),
        "two dimensions": pixels[..., 0],
        "booleans": pixels[..., 0] > 99,
        "floats in 0..1": rng.random((30, 40, 3)),
        "floats in 0..255": rng.random((30, 40, 3), dtype=np.float32) * 255,
        "integers": rng.integers(0, 65536, (30, 40, 3)),
    }


@pytest.mark.parametrize("name", make_odd_images())
def test_images_are_prepared_to_the_bit(pipe, runner, monkeypatch, name):
    image = make_odd_images()[name]
    expected = pipe.processor.image_processor(image)["pixel_values"][0]
    np.testing.assert_array_equal(runner._prepare_image(image)[0], expected, strict=True)
    for pad_after_normalization in (False, True):
        options = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25], "rescale_factor": 1 / 255}
        options["pad_after_normalization"] = pad_after_normalization
        expected = pipe.processor.image_processor(image, **options)
        monkeypatch.setattr(runner, "settings", runner.settings | options)
        pixels, size = runner._prepare_image(image)
        assert size == tuple(expected["original_sizes"][0])
        np.testing.assert_array_equal(pixels, expected["pixel_values"][0], strict=True)


@pytest.mark.parametrize(
    "sentence",
    [
        *SENTENCES,
        "<pad> ball",
        "UNKNOWN words; the  ball.",
        "the ring, left of it " * 9,
        "\tThe Ball\u2003\u0394\u03a3",
        "red.",
    ],
)
def test_words_are_those_of_the_tokenizer(pipe, runner, sentence):
    expected = pipe.processor(text=sentence)["input_ids"]
    np.testing.assert_array_equal(runner._encode_sentences([sentence]).input_ids, expected)


FRESH_PROCESS = """
import json, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "modeling_restr", "onnx", "onnxscript"):
            raise ImportError(f"{name} is not for this process")

sys.meta_path.insert(0, Refuse())
from restr_onnx import ReSTROnnxPipeline

results = ReSTROnnxPipeline()(sys.argv[1], text=json.loads(sys.argv[2]))
for number, result in enumerate(results):
    result.pop("mask").save(f"{sys.argv[3]}/{number}.png")
assert not {"torch", "transformers"} & set(sys.modules)
print(json.dumps(results))
"""


def test_folder_runs_without_torch_and_transformers(pipe, folder, tmp_path):
    command = [sys.executable, "-c", FRESH_PROCESS, PHOTO, json.dumps(SENTENCES), tmp_path]
    done = subprocess.run(command, check=False, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    for number, result in enumerate(results):
        result["mask"] = Image.open(tmp_path / f"{number}.png")
    assert_agree(results, pipe(str(PHOTO), text=SENTENCES))


@pytest.mark.parametrize("kind", ["bytes", "open file", "BytesIO", "data URI", "base64"])
def test_runner_takes_images_in_any_form(pipe, runner, kind):
    content = PHOTO.read_bytes()
    encoded = base64.b64encode(content).decode()
    just_written = BytesIO()
    just_written.write(content)
    with PHOTO.open("rb") as file:
        forms = {"bytes": content, "open file": file, "BytesIO": just_written, "base64": encoded}
        image = forms.get(kind, f"data:image/jpeg;base64,{encoded}")
        assert_agree(runner(image, text=SENTENCES[0]), pipe(str(PHOTO), text=SENTENCES[0]))
        assert_agree(runner([image], text=SENTENCES[0])[0], pipe(str(PHOTO), text=SENTENCES[0]))


def test_runner_names_images_that_cannot_be_read(runner, tmp_path, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args: pytest.fail("Ghostscript was started"))
    content = PHOTO.read_bytes()[:-500]
    (tmp_path / "cut.jpg").write_bytes(content)
    Image.new("RGB", (9, 9)).save(tmp_path / "drawing.eps")
    for name in ("cut.jpg", "drawing.eps"):
        with pytest.raises(UnreadableImageError, match=f"^'.*{name}' cannot be read: "):
            runner(tmp_path / name, text="a ball")
    with pytest.raises(UnreadableImageError, match=r"^The image cannot be read: .*truncated"):
        runner(content, text="a ball")
    with pytest.raises(UnreadableImageError, match=r"^The image cannot be read: .*truncated"):
        runner.encode_image(content)
    with pytest.raises(UnreadableImageError, match=r"^Item 1: The image cannot be read: .*truncated"):
        runner([PHOTO, content], text="a ball", num_workers=2)


@pytest.mark.parametrize("drop", [False, True])
def test_runner_says_what_sentences_lose(runner, caplog, monkeypatch, drop):
    tokenizer = build_tokenizer(VOCABULARY, drop_unknown_punctuation=drop)
    monkeypatch.setattr(runner, "tokenizer", onnx_folder._padding_tokenizer(tokenizer))
    processor = ReSTRProcessor(ReSTRImageProcessor(size=IMAGE_SIZE), tokenizer)
    sentences = ["the ball!", "Xyzzy cafe\u0301", "上面的狗 🐶", "?!", "the ring " * 10 + "left qwrty", "a red ball"]
    image = Image.new("RGB", (20, 10))
    results = runner([{"image": image, "text": sentences[:3]}, {"image": image, "text": sentences[3:]}], batch_size=2)
    lost = processor.find_lost_words(sentences)
    for result, expected in zip(results[0] + results[1], lost, strict=True):
        assert result["unknown_words"] == expected["unknown_words"]
        assert result["truncated"] is bool(expected["cut_words"])
    assert [record.getMessage() for record in caplog.records] == [processor.describe_lost_words(lost)]


def test_runner_explains_bad_input(runner, folder, tmp_path):
    image = Image.new("RGB", (20, 10))
    for arguments, options, message in [
        ((image,), {}, "sentence or a list"),
        ((image, "  "), {}, "at least one word"),
        ((image, ["a ball", 3]), {}, "got 3 of type int"),
        ((image, []), {}, "got none"),
        (([image], ["a", "b"]), {}, "one image with a list of sentences"),
        (({"image": image},), {}, "Expected dicts"),
        (({"image": image, "text": "ball"}, "ball"), {}, "no other text"),
        ((image, "a ball"), {"threshold": 1.5}, "threshold from 0 to 1"),
        ((image, "a ball"), {"batch_size": 0}, "batch_size >= 1"),
        ((image, "\ud800 ball"), {}, "surrogate pair"),
        (([image, image], " "), {}, "Item 0: Expected sentences with at least one word"),
        (("absent.jpg", "a ball"), {}, "'absent.jpg' cannot be read: there is no such file"),
        (([[image]], "a ball"), {}, "Item 0: The image cannot be read: "),
        ((3.5, "a ball"), {}, "got float"),
        ((np.full((9, 9, 3), 7e4), "a ball"), {}, "0..1 or 0..255"),
        ((np.zeros((9, 9, 2)), "a ball"), {}, "channels"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            runner(*arguments, **options)
    with pytest.raises(ValueError, match="precision among float32, int8"):
        ReSTROnnxPipeline(folder, precision="int4")
    shutil.copyfile(folder / "image_encoder.onnx", tmp_path / "image_encoder.onnx")
    with pytest.raises(ValueError, match=r"lacks \['sentence_query.onnx', 'restr_onnx.json', 'tokenizer.json'\]"):
        ReSTROnnxPipeline(tmp_path)


# The measurement


def test_costs_are_measured(folder, tmp_path):
    """The overall IoU is the same when it is counted again on the same rows."""
    images = make_images(tmp_path / "photos", [1, 2])
    prepare(
        Source(name="noise", title="Noise", description="Noise.", origins=(), options={}, published={}),
        {"val": images},
        tmp_path / "data",
    )
    num_threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(REPOSITORY / "examples")
        from benchmarks.exported import benchmark_export

        benchmark_export(str(folder.parent / "model"), folder, str(tmp_path / "data"), output_dir=tmp_path / "results")
    torch.set_num_threads(num_threads)
    results = json.loads((tmp_path / "results" / "results.json").read_text())["results"]
    assert list(results) == ["torch", "float32", "int8"]
    intersection = union = sentences = 0
    for row in load_prepared(tmp_path / "data", "val"):
        for reference in row["references"]:
            texts = [expression["text"] for expression in reference["expressions"]]
            target = decode_mask(reference["mask"]).astype(bool)
            for answer in ReSTROnnxPipeline(folder)(row["image"], text=texts):
                mask = np.asarray(answer["mask"]) > 0
                intersection, union = intersection + (mask & target).sum(), union + (mask | target).sum()
                sentences += 1
    assert results["float32"]["overall_iou"] == round(100 * intersection / union, 2)
    assert results["torch"]["sentences"] == sentences
    assert abs(results["torch"]["overall_iou"] - results["float32"]["overall_iou"]) < 0.1
    assert 0 < results["int8"]["size_ratio"] < 1 == results["float32"]["size_ratio"]


# The folder


def write_names(model, name, folder, int8=False, program=False):
    for ending in [".onnx"] + ["_int8.onnx"] * int8 + [".pt2"] * program:
        (folder / f"{name}{ending}").write_text("new")


def test_an_earlier_export_is_replaced(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_folder, "save_graph", write_names)
    out = tmp_path / "a" / "out"
    save_onnx(pipe.model, pipe.processor, out, int8=True, programs=True)
    (out / "notes.txt").write_text("mine")
    save_onnx(pipe.model, pipe.processor, out)
    files = ["image_encoder.onnx", "notes.txt", "restr_onnx.json", "restr_onnx.py", "sentence_query.onnx"]
    assert sorted(path.name for path in out.iterdir()) == [
        *files,
        "tokenizer.json",
    ]  # no int8 graphs of the earlier export


def test_an_export_that_fails_leaves_the_earlier_one(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_folder, "save_graph", write_names)
    save_onnx(pipe.model, pipe.processor, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def fail(model, name, folder, **options):
        write_names(model, name, folder)
        if name == "sentence_query":
            raise OSError("disk full")

    monkeypatch.setattr(onnx_folder, "save_graph", fail)
    with pytest.raises(OSError, match="disk full"):
        save_onnx(pipe.model, pipe.processor, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_export_explains_what_it_cannot_do(pipe, tmp_path, monkeypatch):
    processor = ReSTRProcessor(ReSTRImageProcessor(size=IMAGE_SIZE, do_normalize=False), pipe.processor.tokenizer)
    with pytest.raises(ValueError, match=r"\['do_normalize'\] switched off"):
        save_onnx(pipe.model, processor, tmp_path / "out")
    with pytest.raises(ValueError, match="Expected a ReSTRForImageSegmentation"):
        save_onnx(pipe.model.model, pipe.processor, tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        save_onnx(pipe.model, pipe.processor, tmp_path / "file")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    with pytest.raises(ValueError, match="a folder without a model in it"):
        save_onnx(pipe.model, pipe.processor, tmp_path / "model")
    monkeypatch.setattr(onnx_folder, "PACKAGES", ("onnx", "absent_package"))
    with pytest.raises(ImportError, match="needs absent_package: pip install"):
        save_onnx(pipe.model, pipe.processor, tmp_path / "out")
    assert {path.name for path in tmp_path.rglob("*")} == {"file", "model", "config.json"}


# The documentation


@pytest.mark.slow
def test_everything_on_the_page_runs(folder, tmp_path, own_cache):
    """With a small model instead of restr-mini."""
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "restr_mini").symlink_to(folder.parent / "model")
    for name in ("benchmark.py", "benchmarks", "photos"):
        (tmp_path / "examples" / name).symlink_to(REPOSITORY / "examples" / name)
    shutil.copyfile(PHOTO, tmp_path / "photo.jpg")
    printed = run_page("export.md", tmp_path)
    assert "the upper dog 0." in printed and "the lower dog 0." in printed
    assert (tmp_path / "restr-programs" / "image_encoder.pt2").is_file()
    results = json.loads((tmp_path / "runs" / "onnx" / "results.json").read_text())["results"]
    assert list(results) == ["torch", "float32", "int8"]
