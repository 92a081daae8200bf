"""The exported site computes what the package computes: words, pixels, logits and masks, in a headless Chromium."""

import base64
import hashlib
import io
import json
import random
import tarfile
import unicodedata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from browsers import open_chromium, run_script, serve
from huggingface_hub import RepoCard
from pictures import encode, make_exif
from PIL import Image
from scenes import Photographs
from tiny_training import IMAGE_SIZE, make_model, make_processor
from transformers import AddedToken

from modeling_restr import ReSTRForImageSegmentation, ReSTRImageProcessor, ReSTRPipeline, ReSTRProcessor
from modeling_restr.export import web_runtime
from modeling_restr.export.web import HEADERS, SITE, _describe_tokenizer, export_web, read_examples
from modeling_restr.hub.model_card import Example
from modeling_restr.image_processing_restr import get_letterbox
from modeling_restr.tokenization_restr import SPECIAL_TOKENS, add_words, build_tokenizer


for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package, reason=f"needs {package}: pip install onnx onnxruntime onnxscript")

import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from modeling_restr.export.weights import BLOCK_SIZE, store_int8_weights


REPOSITORY = Path(__file__).resolve().parents[1]
MINI = REPOSITORY / "examples" / "restr_mini"
PHOTOS = REPOSITORY / "examples" / "photos"
PHOTO = PHOTOS / "held_out" / "000000173350.jpg"
SENTENCES = ["the red square", "green thing", "a box that is blue, xyzzy"]
GRAPHS = ("image_encoder.onnx", "sentence_query.onnx")
SOFTWARE_GPU = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan")
# `ask(message)` sends a message to a worker and returns the answer.
START_WORKER = """
const worker = new Worker("/worker.js", { type: "module" });
const ask = (message) => new Promise((resolve, reject) => {
  worker.onmessage = ({ data }) => { if (data.type !== "progress") resolve(data); };
  worker.onerror = (event) => reject(new Error(event.message));
  worker.postMessage(message);
});
const readFile = async (text) => (await fetch(`data:;base64,${text}`)).blob();
"""
# The bytes of an array as base64.
ENCODE_BYTES = """
const encodeBytes = (array) => {
  let text = "";
  for (const byte of new Uint8Array(array.buffer)) text += String.fromCharCode(byte);
  return btoa(text);
};
"""


def to_text(content: bytes) -> str:
    return base64.b64encode(content).decode()


def to_floats(text: str, shape) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype=np.float32).reshape(shape)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page in a browser, next to the site's modules."""
    folder = tmp_path_factory.mktemp("modules")
    for path in SITE.glob("*.js"):
        (folder / path.name).symlink_to(path)
    (folder / "index.html").write_text("<title>Modules</title>")
    driver = open_chromium()
    with serve(folder) as url:
        driver.get(url)
        driver.set_script_timeout(120)
        yield driver
    driver.quit()


# Words

PUNCTUATION = {"'": 50, " - ": 51, "..": 52, "?": 53, "[": 54, "-": 55, "]^\\": 56}
WORDS = SPECIAL_TOKENS | {
    word: 4 + index for index, word in enumerate(["the", "dog", "guy", "s", "café", "left", "t"])
}
TEXTS = [
    "Man, left.", "  the   dog  ", "it's", "left. ", "left .", "left..", "left. .", ". left", "...", ".", " . ", "",
    " \t\n", "first\nsecond.\n", "snake_case 2nd 1.5", "Cafe\u0301 CAFÉ x\u0301", "ΟΔΟΣ ΣΑΣ", "\u0345Σ aΣ\u0345 aΣ\u0345b",
    "½ ² Ⅷ Ⓐ", "a\u00a0b\x1cc", "<pad> dog <unk>", "guy\u2019s hat; guy\u00b4s t-shirt", "\u201cdog\u201d \u2014 (left) ...",
    "dog\u200b \u200eleft\ufeff", "$dog = <hat>|^`~+", "the ← 🐶!", "dog_hat ?!", "İstanbul ǅ", "dog " * 25 + "lamp, lamp",
    "the dog - left", "[guy's - hat.. - dog? left? 't", "the kid's]^\\dog", "a\u0345\u0301\u1fb3 b\u1112f",
]  # fmt: skip


def make_texts(number: int) -> list[str]:
    """Random sentences of known words, punctuation and any characters of Python's Unicode tables."""
    generator = random.Random(0)
    points = [chr(i) for i in range(0x110000) if unicodedata.category(chr(i)) not in ("Cn", "Cs", "Co")]
    common = [
        *"aAbZ  ..,'-_17éÉΣ\u03c3\u0301\u0345İß½²日Ⓐ\x1c\x85\u00a0\u200b😀?[\"$€←`|~",
        "the ",
        "dog ",
        " left",
        "guy's",
    ]
    return [
        "".join(
            generator.choice(common if generator.random() < 0.7 else points) for _ in range(generator.randint(0, 14))
        )
        for _ in range(number)
    ]


def encode_in_python(processor, texts):
    encoded = processor.tokenizer(texts, padding="max_length", truncation=True)["input_ids"]
    lost = processor.find_lost_words(texts)
    return [[ids, words["unknown_words"], words["cut_words"]] for ids, words in zip(encoded, lost)]


ENCODE = """
const { Tokenizer } = await import("/tokenizer.js");
const tokenizer = new Tokenizer(args[0], args[1]);
return args[2].map((text) => {
  const { inputIds, unknownWords, cutWords } = tokenizer.encode(text);
  return [Array.from(inputIds, Number), unknownWords, cutWords];
});
"""


@pytest.mark.parametrize(("vocabulary", "drop"), [(WORDS, False), (WORDS, True), (WORDS | PUNCTUATION, True)])
def test_words_are_those_of_python(page, vocabulary, drop):
    tokenizer = build_tokenizer(vocabulary, drop_unknown_punctuation=drop)
    processor = ReSTRProcessor(ReSTRImageProcessor(), tokenizer)
    settings = {"maxLength": 20, "padId": 0, "unknownId": 3, "dropUnknownPunctuation": drop}
    texts = TEXTS + make_texts(10_000)
    found = run_script(page, ENCODE, json.loads(tokenizer.backend_tokenizer.to_str()), settings, texts)
    expected = encode_in_python(processor, texts)
    different = [triple for triple in zip(texts, found, expected) if triple[1] != triple[2]]
    assert not different, (len(different), different[:3])
    assert len({tuple(ids) for ids, _, _ in found}) > 500 and len({str(entry) for entry in found}) > 8000


def test_words_have_their_places_in_the_sentence(page):
    tokenizer = json.loads(
        build_tokenizer(WORDS, max_length=4, drop_unknown_punctuation=True).backend_tokenizer.to_str()
    )
    settings = {"maxLength": 4, "padId": 0, "unknownId": 3, "dropUnknownPunctuation": True}
    text = "  The cafe\u0301, 🐶 zebra\u0301s t-shirt!"
    script = """
        const { Tokenizer } = await import("/tokenizer.js");
        return new Tokenizer(args[0], args[1]).encode(args[2]).words;
    """
    words = run_script(page, script, tokenizer, settings, text)
    places = [(text.encode("utf-16-le")[2 * word["start"] : 2 * word["end"]].decode("utf-16-le")) for word in words]
    assert places == ["The", "cafe\u0301", ", 🐶 ", "zebra\u0301s", "t", "shirt"]
    assert [word["text"] for word in words] == ["The", "café", "🐶", "zebr\u00e1s", "t", "shirt"]
    assert [word["known"] for word in words] == [True, True, False, False, True, False]


# Photos

SIZES = [(1, 1), (1, 90), (450, 4), (37, 20), (31, 57), (64, 64), (200, 133), (500, 3), (640, 427)]


@pytest.mark.parametrize("filter_", [0, 1, 2, 3, 4, 5])
def test_photos_are_resized_as_by_pillow(page, filter_):
    rng = np.random.default_rng(filter_)
    script = (
        ENCODE_BYTES
        + """
        const { resize } = await import("/image.js");
        return args[0].map(([text, width, height, newWidth, newHeight, filter]) => {
          const rgba = Uint8ClampedArray.from(atob(text), (character) => character.charCodeAt(0));
          return encodeBytes(resize(rgba, width, height, newWidth, newHeight, filter));
        });
    """
    )
    cases, expected = [], []
    for height, width in SIZES:
        pixels = rng.integers(0, 256, (height, width, 4), dtype=np.uint8)
        pixels[: height // 2] //= 128
        pixels[: height // 2] *= 255  # sharp edges, where filters overshoot
        for new_height, new_width in ((33, 48), (1, 7), (height, 50), (41, width)):
            cases.append((to_text(pixels.tobytes()), width, height, new_width, new_height, filter_))
            image = Image.fromarray(pixels[..., :3].copy()).resize((new_width, new_height), filter_)
            expected.append(np.asarray(image))
    for case, text, array in zip(cases, run_script(page, script, cases), expected, strict=True):
        found = np.frombuffer(base64.b64decode(text), dtype=np.uint8).reshape(*array.shape[:2], 4)[..., :3]
        np.testing.assert_array_equal(found, array, err_msg=str(case[1:]))


def test_photos_have_the_same_place_on_the_canvas(page):
    generator = random.Random(0)
    sizes = [([generator.randint(1, 5000), generator.randint(1, 5000)], [336, 480]) for _ in range(5000)]
    sizes += [([side, 2 * 448], [448, 448]) for side in range(1, 2000)]  # halves are rounded to even numbers
    script = """
        const { getLetterbox } = await import("/image.js");
        return args[0].map((pair) => getLetterbox(...pair)).map(({ top, left, height, width }) => [top, left, height, width]);
    """
    assert run_script(page, script, sizes) == [list(get_letterbox(*pair)) for pair in sizes]


PREPARE = (
    START_WORKER
    + ENCODE_BYTES
    + """
const { decodeImage, prepareImage } = await import("/image.js");
const results = [];
for (const text of args[0]) {
  const { rgba, width, height } = await decodeImage(await readFile(text));
  const { pixelValues } = prepareImage(rgba, width, height, args[1]);
  results.push([[height, width], encodeBytes(rgba), encodeBytes(pixelValues)]);
}
return results;
"""
)


def make_files() -> dict[str, bytes]:
    """Image files of several formats and modes."""
    rng = np.random.default_rng(0)
    image = Image.open(PHOTO).resize((90, 61))
    noise = Image.fromarray(rng.integers(0, 256, (40, 30, 4), dtype=np.uint8))
    files = {f"orientation {number}": encode(image, "JPEG", exif=make_exif(number)) for number in range(1, 9)}
    files |= {f"quality {quality}": encode(image, "JPEG", quality=quality) for quality in (10, 60, 98)}
    files |= {f"subsampling {number}": encode(image, "JPEG", subsampling=number) for number in range(3)}
    files |= {f"png {mode}": encode(image.convert(mode)) for mode in ("RGB", "L", "P", "1")}
    files |= {f"jpeg {mode}": encode(image.convert(mode), "JPEG") for mode in ("L", "CMYK")}
    files |= {"webp": encode(image, "WEBP", lossless=True), "gif": encode(image, "GIF"), "bmp": encode(image, "BMP")}
    files |= {
        "one pixel": encode(Image.new("RGB", (1, 1), (1, 2, 3))),
        "progressive": encode(image, "JPEG", progressive=True),
    }
    # What canvases and Pillow composite may differ by one.
    files |= {"transparent RGBA": encode(noise), "transparent LA": encode(noise.convert("LA"))}
    return files


@pytest.mark.parametrize("pad_after_normalization", [False, True])
def test_photos_are_prepared_to_the_bit(page, pad_after_normalization):
    options = {"pad_after_normalization": pad_after_normalization, "image_std": [0.2, 0.3, 0.25]}
    processor = ReSTRImageProcessor(size={"height": 56, "width": 64}, **options)
    settings = {
        "imageSize": [56, 64],
        "resample": int(processor.resample),
        "rescaleFactor": processor.rescale_factor,
        "mean": processor.image_mean,
        "std": processor.image_std,
        "padAfterNormalization": pad_after_normalization,
    }
    files = make_files()
    results = run_script(page, PREPARE, [to_text(content) for content in files.values()], settings)
    for (name, content), (size, rgba, values) in zip(files.items(), results):
        array = np.moveaxis(processor.process_image(content, do_convert_rgb=True, do_rescale=True), 0, -1)
        decoded = np.frombuffer(base64.b64decode(rgba), dtype=np.uint8).reshape(*size, 4)[..., :3]
        difference = np.abs(decoded.astype(int) - array).max()
        assert difference <= ("transparent" in name), name
        if difference == 0:
            expected = processor(content)["pixel_values"][0]
            np.testing.assert_array_equal(to_floats(values, (3, 56, 64)), expected, err_msg=name)


def test_a_photo_of_12_megapixels_is_decoded_in_parts(page):
    rng = np.random.default_rng(0)
    content = encode(
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize((4000, 3000)),
        "PNG",
        compress_level=1,
    )
    script = (
        START_WORKER
        + """
        const { decodeImage } = await import("/image.js");
        const { rgba, width, height } = await decodeImage(await readFile(args[0]));
        const digest = await crypto.subtle.digest("SHA-256", rgba);
        return [width, height, btoa(String.fromCharCode(...new Uint8Array(digest)))];
    """
    )
    expected = hashlib.sha256(np.asarray(Image.open(io.BytesIO(content)).convert("RGBA")).tobytes()).digest()
    assert run_script(page, script, to_text(content)) == [4000, 3000, to_text(expected)]


# Masks

MASKS = (
    ENCODE_BYTES
    + """
const { makeMask, makeProbabilities, measureMask } = await import("/mask.js");
const { getLetterbox } = await import("/image.js");
return args[0].map(({ logits, logitsSize, canvasSize, imageSize, threshold }) => {
  const [height, width] = imageSize;
  const result = { logits: Float32Array.from(logits), logitsSize, canvasSize, box: getLetterbox(imageSize, canvasSize) };
  return {
    probabilities: encodeBytes(makeProbabilities(result, width, height)),
    mask: Array.from(makeMask(result, width, height, threshold)),
    ...measureMask(result, width, height, threshold),
  };
});
"""
)


def test_masks_are_those_of_the_processor(page):
    rng = np.random.default_rng(0)
    processor = ReSTRImageProcessor(size={"height": 24, "width": 32})
    cases = []
    for image_size in ((24, 32), (7, 50), (61, 40), (100, 133), (1, 1)):
        for grid in ((24, 32), (6, 8)):  # with and without a pixel decoder
            for threshold in (0.01, 0.5, 0.83, 0.0, 1.0):
                cases.append((rng.normal(0, 3, grid).astype(np.float32), image_size, threshold))
    asked = [
        {"logits": logits.ravel().tolist(), "logitsSize": logits.shape, "canvasSize": [24, 32], "imageSize": size, "threshold": threshold}
        for logits, size, threshold in cases
    ]  # fmt: skip
    for (logits, size, threshold), found in zip(cases, run_script(page, MASKS, asked)):
        outputs = SimpleNamespace(logits=torch.from_numpy(logits)[None])
        (expected,) = processor.post_process_referring_segmentation(outputs, [size], threshold)
        probabilities = to_floats(found["probabilities"], size)
        np.testing.assert_allclose(probabilities, expected["probabilities"], atol=1e-5)
        near = np.abs(expected["probabilities"].numpy() - threshold) < 1e-5
        mask = np.array(found["mask"], dtype=bool).reshape(size)
        assert ((mask == expected["mask"].numpy()) | near).all()
        assert found["score"] == pytest.approx(expected["score"], abs=1e-4)
        assert found["share"] == pytest.approx(mask.mean())


def test_patch_maps_lie_under_the_pixels(page):
    script = """
        const { makePatchMap } = await import("/mask.js");
        const { getLetterbox } = await import("/image.js");
        const box = getLetterbox([10, 40], [16, 32]); // 8 x 32, with 4 rows above it
        const patchLogits = Float32Array.from({ length: 32 }, (_, place) => place - 16);
        return Array.from(makePatchMap({ patchLogits, patchSize: [4, 8], canvasSize: [16, 32], box }, 40, 10));
    """
    rows, columns = (np.arange(10) + 0.5) * 0.8 // 4 + 1, (np.arange(40) + 0.5) * 0.8 // 4
    expected = 1 / (1 + np.exp(16 - (8 * rows[:, None] + columns)))
    np.testing.assert_allclose(run_script(page, script), expected.ravel(), atol=1e-6)


# The model


@pytest.fixture(scope="module")
def runtime():
    """The folder of onnxruntime-web's files, in the cache. Tests have no network."""
    if web_runtime.find_missing(web_runtime.get_cache()):
        pytest.skip("needs onnxruntime-web in the cache: CONTRIBUTING.md says how to get it")
    return web_runtime.get_cache()


@pytest.fixture(scope="module")
def pipe():
    """A tiny random model whose weights are large enough that its masks differ by image and by sentence."""
    processor = make_processor()
    model = make_model(processor).eval()
    torch.manual_seed(1)
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.25)
    return ReSTRPipeline(model=model, processor=processor, device="cpu")


@pytest.fixture(scope="module")
def site(pipe, runtime, tmp_path_factory):
    examples = [Example(PHOTO, SENTENCES[:2], "A photographer, CC BY 2.0")]
    folder = tmp_path_factory.mktemp("web") / "site"
    return export_web(pipe.model, pipe.processor, folder, name="you/tiny", examples=examples, runtime_dir=runtime)


LOAD = START_WORKER + "self.ask = ask; return ask({ type: 'load', backend: args[0] });"
ASK = (
    ENCODE_BYTES
    + """
const { makeMask, measureMask } = await import("/mask.js");
const blob = await (await fetch(`data:;base64,${args[0]}`)).blob();
const { width, height, message } = await ask({ type: "encode", id: 1, blob });
if (message) throw new Error(message);
const { results, message: problem } = await ask({ type: "segment", id: 1, texts: args[1] });
if (problem) throw new Error(problem);
return results.map((result) => ({
  ...result,
  logits: encodeBytes(result.logits),
  patchLogits: encodeBytes(result.patchLogits),
  mask: encodeBytes(makeMask(result, width, height, 0.5)),
  imageSize: [height, width],
  ...measureMask(result, width, height, 0.5),
}));
"""
)


def ask_worker(driver, url, photos, sentences, backend="wasm"):
    """Load the model in a worker and ask about photos. Returns how it runs and, per photo, the results as arrays."""
    driver.get(f"{url}settings.json")  # without the page's own scripts
    ready = run_script(driver, LOAD, backend)
    answers = []
    for photo, texts in zip(photos, sentences, strict=True):  # one script each, because Selenium waits two minutes
        answers.append(run_script(driver, ASK, to_text(photo), texts))
        for result in answers[-1]:
            result["logits"] = to_floats(result["logits"], result["logitsSize"])
            result["patchLogits"] = to_floats(result["patchLogits"], result["patchSize"])
            mask = np.frombuffer(base64.b64decode(result["mask"]), dtype=np.uint8)
            result["mask"] = mask.reshape(result["imageSize"]) > 0
    return ready, answers


@torch.no_grad()
def compute_logits(pipe, photo: bytes, texts):
    inputs = pipe.processor(images=photo, text=texts, return_tensors="pt")
    inputs.pop("original_sizes")
    outputs = pipe.model(**inputs)
    return outputs.logits.numpy(), outputs.patch_logits.numpy()


def assert_agree(pipe, photo, texts, results, tolerance):
    logits, patch_logits = compute_logits(pipe, photo, texts)
    for index, (result, expected) in enumerate(zip(results, pipe(photo, text=texts), strict=True)):
        np.testing.assert_allclose(result["logits"], logits[index], atol=tolerance)
        np.testing.assert_allclose(result["patchLogits"], patch_logits[index], atol=tolerance)
        assert result["text"] == expected["label"] and result["unknownWords"] == expected["unknown_words"]
        assert bool(result["cutWords"]) == expected["truncated"]
        mask = np.asarray(expected["mask"]) > 0
        assert result["mask"].shape == mask.shape and (result["mask"] != mask).mean() < 1e-3
        assert result["score"] == pytest.approx(expected["score"], abs=1e-3)


def test_the_worker_answers_as_the_pipeline(page, pipe, site):
    photos = [PHOTO.read_bytes(), encode(Image.open(PHOTO).crop((30, 5, 61, 100)), exif=make_exif(6))]
    sentences = [SENTENCES, [*SENTENCES[:1], "the red square " * 4]]
    with serve(site, HEADERS) as url:
        ready, answers = ask_worker(page, url, photos, sentences)
    assert ready["backend"] == "wasm" and ready["threads"] >= 1
    for photo, texts, results in zip(photos, sentences, answers, strict=True):
        assert_agree(pipe, photo, texts, results, tolerance=1e-3)
    shares = {result["share"] for results in answers for result in results}
    assert len(shares) > 3 and max(shares) > 0 and min(shares) < 1  # the masks differ, and are not all full or empty


def test_the_worker_reports_problems_in_words(page, site):
    script = (
        START_WORKER
        + """
        const photo = await readFile(args[0]);
        const answers = [];
        for (const message of [
          { type: "load" },
          { type: "segment", id: 1, texts: ["the red square"] },
          { type: "encode", id: 1, blob: new Blob(["no image"]) },
          { type: "encode", id: 2, blob: photo },
          { type: "segment", id: 2, texts: ["the red square", " . "] },
          { type: "segment", id: 1, texts: ["the red square"] },
          { type: "segment", id: 2, texts: ["the red square"] },
        ]) answers.push(await ask(message));
        worker.terminate();
        return answers.map(({ type, message, threads }) => message ?? threads ?? type);
    """
    )
    with serve(site) as url:  # without the headers, there is one thread
        page.get(f"{url}settings.json")
        answers = run_script(page, script, to_text(PHOTO.read_bytes()))
    assert answers[0] == 1 and answers[3] == "encoded" and answers[6] == "masks"
    for place, part in {1: "no photo", 2: "JPEG, PNG or WebP", 4: "Sentence 2 has no words", 5: "replaced"}.items():
        assert part in answers[place]


def test_the_worker_reports_files_that_are_not_served(page, site, tmp_path):
    for path in site.iterdir():
        if path.name != GRAPHS[1]:
            (tmp_path / path.name).symlink_to(path)
    script = START_WORKER + 'return (await ask({ type: "load" })).message;'
    with serve(tmp_path) as url:
        page.get(f"{url}settings.json")
        assert run_script(page, script) == f"{GRAPHS[1]} could not be downloaded (status 404). Reload the page."
        (tmp_path / GRAPHS[1]).write_bytes((site / GRAPHS[1]).read_bytes()[:-1])
        assert "did not arrive whole" in run_script(page, script)


@pytest.mark.long
def test_webgpu_gives_the_same_numbers(pipe, site, tmp_path):
    driver = open_chromium(*SOFTWARE_GPU)
    driver.set_script_timeout(300)
    photo = PHOTO.read_bytes()
    try:
        with serve(site, HEADERS) as url:
            driver.get(f"{url}settings.json")
            if not run_script(driver, "return Boolean(await navigator.gpu?.requestAdapter());"):
                pytest.skip("needs a Chromium with WebGPU in software")
            ready, (results,) = ask_worker(driver, url, [photo], [SENTENCES], "webgpu")
            assert ready["backend"] == "webgpu"
            assert_agree(pipe, photo, SENTENCES, results, tolerance=1e-2)
            ready, _ = ask_worker(driver, url, [photo], [SENTENCES], None)
            assert ready["backend"] == "wasm"  # a GPU in software would be slower
        broken = json.loads((site / "settings.json").read_text())
        broken["check"][0] += 1
        for path in site.iterdir():
            (tmp_path / path.name).symlink_to(path)
        (tmp_path / "settings.json").unlink()
        (tmp_path / "settings.json").write_text(json.dumps(broken))
        with serve(tmp_path, HEADERS) as url:
            ready, (results,) = ask_worker(driver, url, [photo], [SENTENCES], "webgpu")
        assert ready["backend"] == "wasm"  # because the numbers are not those that the export found
        assert_agree(pipe, photo, SENTENCES, results, tolerance=1e-3)
    finally:
        driver.quit()


# The shipped model


@pytest.fixture(scope="module")
def mini():
    model, processor = (kind.from_pretrained(MINI) for kind in (ReSTRForImageSegmentation, ReSTRProcessor))
    return ReSTRPipeline(model=model.eval(), processor=processor, device="cpu")


@pytest.mark.long
def test_float_graphs_give_the_logits_of_pytorch_on_photographs(page, mini, runtime, tmp_path):
    folder = export_web(
        mini.model, mini.processor, tmp_path / "site", name="restr-mini", runtime_dir=runtime, int8=False
    )
    photos = [path.read_bytes() for path in sorted(PHOTOS.rglob("*.jpg"))]
    texts = ["the guy on the left", "biggest dog"]
    with serve(folder, HEADERS) as url:
        _, answers = ask_worker(page, url, photos, [texts] * len(photos))
    assert len(photos) == 15
    for photo, results in zip(photos, answers, strict=True):
        assert_agree(mini, photo, texts, results, tolerance=1e-2)


@pytest.mark.long
def test_8_bit_weights_cost_less_than_a_point(page, mini, runtime, tmp_path):
    folder = export_web(mini.model, mini.processor, tmp_path / "site", name="restr-mini", runtime_dir=runtime)
    photos, sentences, targets = read_wordings()
    with serve(folder, HEADERS) as url:
        _, answers = ask_worker(page, url, photos, sentences)
    found, expected, agreement = [], [], []
    for photo, texts, target, results in zip(photos, sentences, targets, answers, strict=True):
        for result, other in zip(results, mini(photo, text=texts), strict=True):
            mask = np.asarray(other["mask"]) > 0
            found.append(compute_iou(result["mask"], target))
            expected.append(compute_iou(mask, target))
            if mask.sum() >= 100:  # of fewer pixels, the IoU says little
                agreement.append(compute_iou(result["mask"], mask))
    assert len(found) == 96 and np.mean(expected) > 0.6
    assert abs(np.mean(found) - np.mean(expected)) < 0.01
    assert len(agreement) > 90 and np.mean(agreement) > 0.98


def read_wordings():
    """Photographs as files, and for each target in them its mask and the wordings that ask for it."""
    photographs = {
        photograph.image_id: photograph for photograph in Photographs.load([PHOTOS / "held_out"], "test", False)
    }
    entries = json.loads((MINI / "wordings.json").read_text())
    shown = [photographs[entry["image_id"]] for entry in entries]
    photos = [encode(Image.fromarray(photograph.image)) for photograph in shown]
    targets = [photograph.masks[entry["instance"]] for photograph, entry in zip(shown, entries)]
    return photos, [entry["wordings"] for entry in entries], targets


def compute_iou(mask, other):
    union = (mask | other).sum()
    return (mask & other).sum() / union if union else 1.0


# The folder


def test_the_site_is_complete(site, pipe):
    settings = json.loads((site / "settings.json").read_text())
    files = {path.relative_to(site).as_posix(): path.stat().st_size for path in site.rglob("*") if path.is_file()}
    assert files.pop("settings.json") and files == settings["files"]
    modules = {path.name for path in SITE.iterdir()}
    assert {"index.html", "worker.js", "tokenizer.js", "image.js", "mask.js"} <= modules
    runtime = {f"runtime/{name}" for name in (*web_runtime.FILES, *web_runtime.LICENCES)}
    assert set(files) == modules | runtime | {*GRAPHS, "tokenizer.json", "examples/1.jpg", "README.md"}
    assert (
        "MIT" in (site / "runtime" / "LICENSE").read_text()
        and "Microsoft" in (site / "runtime" / "LICENSE").read_text()
    )

    assert settings["examples"] == [
        {"file": "examples/1.jpg", "texts": SENTENCES[:2], "credit": "A photographer, CC BY 2.0"}
    ]
    assert settings["name"] == "you/tiny" and settings["links"]["model"] == "https://huggingface.co/you/tiny"
    assert settings["imageSize"] == [IMAGE_SIZE, IMAGE_SIZE] and settings["patchSize"] == [8, 8]
    card = RepoCard.load(site / "README.md").data
    assert card.sdk == "static" and card.models == ["you/tiny"] and card.custom_headers == HEADERS


def test_a_site_is_replaced_and_other_folders_are_refused(pipe, runtime, tmp_path, monkeypatch):
    monkeypatch.setattr("modeling_restr.export.web.save_graph", write_no_graph)
    monkeypatch.setattr("modeling_restr.export.web._answer_check", lambda *_: [])
    folder, options = tmp_path / "site", {"runtime_dir": runtime, "int8": False}
    (folder / ".git").mkdir(parents=True)
    example = Example(PHOTO, ["a dog"], "A photographer")
    export_web(pipe.model, pipe.processor, folder, name="first", examples=[example], **options)
    (folder / "examples" / "old.jpg").touch()
    export_web(pipe.model, pipe.processor, folder, name="second", examples=[example], **options)
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["name"] == "second" and settings["links"]["model"] is None
    assert [path.name for path in (folder / "examples").iterdir()] == ["1.jpg"] and (folder / ".git").is_dir()

    for example in (Example(PHOTO, [], "A photographer"), Example(PHOTO, ["a dog"], " ")):
        with pytest.raises(ValueError, match=r"sentence and a credit for the example .*173350\.jpg"):
            export_web(pipe.model, pipe.processor, folder, name="third", examples=[example], **options)
    assert json.loads((folder / "settings.json").read_text())["name"] == "second"
    (tmp_path / "home" / "examples").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"new or empty folder for the site, got .*home with examples"):
        export_web(pipe.model, pipe.processor, tmp_path / "home", name="third", **options)


def write_no_graph(model, name, folder):
    (folder / f"{name}.onnx").touch()


def test_other_tokenizers_are_refused(pipe, runtime, tmp_path):
    other = build_tokenizer(pipe.tokenizer.get_vocab(), max_length=6)
    other.add_tokens([AddedToken("kid", single_word=True)])
    right = build_tokenizer(pipe.tokenizer.get_vocab(), max_length=6)
    right.padding_side = "right"
    for tokenizer in (other, right):
        processor = ReSTRProcessor(pipe.processor.image_processor, tokenizer)
        with pytest.raises(ValueError, match="Expected a tokenizer of `build_tokenizer`"):
            _describe_tokenizer(processor.tokenizer)
    for drop in (False, True):
        tokenizer = build_tokenizer(WORDS | PUNCTUATION, 7, drop_unknown_punctuation=drop)
        add_words(tokenizer, ["zebra"])
        tokenizer("the dog", padding="max_length", truncation=True)  # which the tokenizer remembers
        expected = {"maxLength": 7, "padId": 0, "unknownId": 3, "dropUnknownPunctuation": drop}
        assert _describe_tokenizer(tokenizer) == expected


def test_examples_are_read_from_a_file(tmp_path):
    shipped = read_examples(PHOTOS / "examples.json")
    assert len(shipped) == 3 and all(Path(example.photo).is_file() and example.credit for example in shipped)
    for content in ([{"photo": "a.jpg"}], {"photo": "a.jpg", "texts": [], "credit": ""}, [3]):
        (tmp_path / "examples.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"Expected a list of .*examples\.json, got another form"):
            read_examples(tmp_path / "examples.json")


def test_the_command_needs_a_folder(restr, pipe, tmp_path):
    done = restr("export", MINI)
    assert done.code == 2 and "--output-dir FOLDER" in done.err and "--web FOLDER" in done.err
    (tmp_path / "dist").mkdir()
    pipe.save_pretrained(tmp_path / "model")
    done = restr("export", tmp_path / "model", "--web", tmp_path / "site", "--runtime-dir", tmp_path)
    assert done.code == 1 and f"onnxruntime-web {web_runtime.VERSION} in {tmp_path / 'dist'}, which lacks" in done.err
    assert not (tmp_path / "site").exists()


# onnxruntime-web's files


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An npm package of small files in place of the real one, and an empty cache."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name in (*web_runtime.FILES, "other.js"):
            content = f"/* ONNX Runtime Web v{web_runtime.VERSION} */ {name}".encode()
            member = tarfile.TarInfo(f"package/dist/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    path = tmp_path / "package.tgz"
    path.write_bytes(buffer.getvalue())
    monkeypatch.setattr(web_runtime, "URL", path.as_uri())
    monkeypatch.setattr(web_runtime, "SHA512", to_text(hashlib.sha512(path.read_bytes()).digest()))
    monkeypatch.setattr(web_runtime, "get_cache", lambda: tmp_path / "cache")
    return path


def test_the_runtime_is_downloaded_once(package):
    folder = web_runtime.find_runtime()
    assert {path.name for path in folder.iterdir()} == set(web_runtime.FILES)
    assert (folder / "ort.wasm.min.mjs").read_text().endswith("ort.wasm.min.mjs")
    package.unlink()
    assert web_runtime.find_runtime() == folder


def test_another_download_is_refused(package):
    package.write_bytes(package.read_bytes() + b" ")
    with pytest.raises(ValueError, match="Expected a file with the SHA-512"):
        web_runtime.find_runtime()
    assert not web_runtime.get_cache().exists()
    package.unlink()
    with pytest.raises(OSError, match=r"could not be downloaded .* --runtime-dir"):
        web_runtime.find_runtime()


def test_a_runtime_folder_is_checked(package, tmp_path):
    dist = web_runtime.find_runtime().rename(tmp_path / "dist")
    assert web_runtime.find_runtime(tmp_path) == web_runtime.find_runtime(dist) == dist
    (dist / "ort.wasm.min.mjs").write_text("/* ONNX Runtime Web v1.0.0 */")
    with pytest.raises(ValueError, match="got another version"):
        web_runtime.find_runtime(tmp_path)
    (dist / "ort.jspi.min.mjs").unlink()
    with pytest.raises(ValueError, match=r"lacks ort\.jspi\.min\.mjs\. Unpack"):
        web_runtime.find_runtime(tmp_path)


# 8-bit weights


def test_8_bit_weights_are_rounded_by_half_a_step(tmp_path):
    rng = np.random.default_rng(0)
    weights = (rng.normal(0, 1, (96, 128)) * 10.0 ** rng.integers(-3, 2, (96, 1))).astype(np.float32)
    weights[3] = 0
    bias = rng.normal(0, 1, 128).astype(np.float32)
    node_inputs = [
        helper.make_node("MatMul", ["x", "weights"], ["product"]),
        helper.make_node("Add", ["product", "bias"], ["y"]),
    ]
    graph = helper.make_graph(
        node_inputs,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 96])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 128])],
        [numpy_helper.from_array(weights, "weights"), numpy_helper.from_array(bias, "bias")],
    )
    program = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    external = {"save_as_external_data": True, "location": "graph.onnx.data", "size_threshold": 0}
    onnx.save(program, tmp_path / "graph.onnx", **external)  # as for large models
    store_int8_weights(tmp_path / "graph.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["graph.onnx"]
    onnx.checker.check_model(str(tmp_path / "graph.onnx"), full_check=True)
    assert (tmp_path / "graph.onnx").stat().st_size < 0.3 * weights.nbytes
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "graph.onnx", options)
    (found,) = session.run(None, {"x": np.eye(96, dtype=np.float32)})
    steps = np.repeat(np.abs(weights.reshape(-1, BLOCK_SIZE)).max(axis=1) / 127, BLOCK_SIZE).reshape(weights.shape)
    # Half a step, the scale's rounding to float16 (2^-11 of up to 127 steps), and the bias's rounding
    assert (np.abs(found - bias - weights) <= 0.57 * steps + 1e-6).all()
    # The runtime multiplies when it loads the graph, not at every run.
    kinds = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
    assert "Cast" not in kinds and "Mul" not in kinds
