"""The demo: its parts, its API, its page in a browser, and a Space without other files."""

import base64
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import struct
import sys
import threading
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from browsers import open_chromium
from fresh_process import run_without_package
from huggingface_hub import RepoCard
from packaging.requirements import Requirement
from pictures import make_exif
from PIL import Image
from tiny_training import make_model, make_processor

import modeling_restr
from modeling_restr import ReSTRForImageSegmentation
from modeling_restr.hub import save_bundle
from modeling_restr.visualization import COLORS


os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
gr = pytest.importorskip("gradio", reason='needs Gradio: pip install -e ".[space]"')

SPACE = Path(__file__).resolve().parents[1] / "examples" / "space"
PHOTOS = SPACE.parent / "photos"
WAIT = 120  # seconds, for a busy machine
RESTR_MINI = str(SPACE.parent / "restr_mini")
SENTENCES = ["the upper dog", "the lower dog"]


def load_app(folder):
    spec = importlib.util.spec_from_file_location("space_app", folder / "app.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["space_app"] = module  # where dataclasses look it up
    spec.loader.exec_module(module)
    return module


app = load_app(SPACE)


class Calls:
    """Counts the calls of a module."""

    def __init__(self, module):
        self.number = 0
        module.register_forward_hook(self.count)

    def count(self, *_):
        self.number += 1


@pytest.fixture(scope="module")
def segmenter():
    return app.Segmenter.from_pretrained(RESTR_MINI)


@pytest.fixture(scope="module")
def image_processor(segmenter):
    return segmenter.processor.image_processor


@pytest.fixture(scope="module")
def pipe(segmenter):
    return modeling_restr.ReSTRPipeline(
        model=ReSTRForImageSegmentation.from_pretrained(RESTR_MINI), processor=segmenter.processor
    )


def make_tiny_segmenter(**changes):
    processor = make_processor()
    config = make_model(processor).config
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = ReSTRForImageSegmentation._from_config(config, attn_implementation="eager")
    return app.Segmenter(modeling_restr.ReSTRPipeline(model=model, processor=processor, device="cpu"))


def make_photo(size=(20, 44), seed=0):
    return np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no sentence"),
        (None, "no sentence"),
        (" \n \n", "no sentence"),
        (["the dog"], "no sentence"),
        ("the dog\n...", "Sentence 2 has no words"),
        ("a " * 150, "300|299"),
        ("the dog\n" * 8, "At most 7 sentences"),
    ],
)
def test_bad_sentences_are_refused_with_a_reason(text, message):
    with pytest.raises(gr.Error, match=message):
        app.read_sentences(text)


def test_sentences_are_the_lines_without_blank_ones():
    assert app.read_sentences("  the  dog \n\n\tthe ball\r\n") == ["the dog", "the ball"]
    assert len(app.read_sentences("the dog\n" * 7)) == 7


def test_photos_are_read_upright_and_on_white(tmp_path, image_processor):
    pixels = make_photo((30, 50))
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=make_exif(6))
    assert (app.read_photo(tmp_path / "turned.png", image_processor) == np.rot90(pixels, -1)).all()

    alpha = np.zeros((30, 50, 1), dtype=np.uint8)
    alpha[:, :25] = 255
    Image.fromarray(np.concatenate([pixels, alpha], axis=2)).save(tmp_path / "transparent.png")
    read = app.read_photo(tmp_path / "transparent.png", image_processor)
    assert (read[:, :25] == pixels[:, :25]).all() and (read[:, 25:] == 255).all()

    Image.new("L", (1, 1), 7).save(tmp_path / "dot.png")
    assert (app.read_photo(tmp_path / "dot.png", image_processor) == np.full((1, 1, 3), 7)).all()


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "I;16", "P"])
def test_long_photos_are_resized(tmp_path, image_processor, mode):
    Image.new(mode, (5000, 100), 0).save(tmp_path / "long.png")
    assert app.read_photo(tmp_path / "long.png", image_processor).shape == (41, 2048, 3)


def write_png_header(path, width, height):
    """Write a PNG file that claims a size and has no pixels."""
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT"]
    framed = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(framed))


def test_damaged_and_too_large_files_are_refused(tmp_path, image_processor):
    with pytest.raises(gr.Error, match="no photo"):
        app.get_path(None)
    for size in ((8000, 8000), (60000, 60000)):  # Pillow itself refuses the second
        write_png_header(tmp_path / "bomb.png", *size)
        with pytest.raises(gr.Error, match="50 megapixels"):
            app.read_photo(tmp_path / "bomb.png", image_processor)
    (tmp_path / "text.png").write_text("no image")
    whole = (PHOTOS / "held_out" / "000000173350.jpg").read_bytes()
    (tmp_path / "torn.jpg").write_bytes(whole[: len(whole) // 2])
    for name in ("text.png", "torn.jpg"):
        with pytest.raises(gr.Error, match="cannot be read"):
            app.read_photo(tmp_path / name, image_processor)


@pytest.mark.parametrize("threshold", [0.5, 0.83])
def test_masks_and_scores_are_the_pipelines(segmenter, pipe, image_processor, threshold):
    photo = app.read_photo(PHOTOS / "held_out" / "000000173350.jpg", image_processor)
    results = segmenter.segment(segmenter.ask(photo, SENTENCES), threshold)
    for (mask, score), expected in zip(
        results, pipe(PHOTOS / "held_out" / "000000173350.jpg", text=SENTENCES, threshold=threshold)
    ):
        assert mask.any() and (mask == (np.asarray(expected["mask"]) > 0)).mean() > 0.9999
        assert score == pytest.approx(expected["score"], abs=1e-4)


def test_a_photo_is_encoded_once_and_thresholds_run_nothing():
    segmenter = make_tiny_segmenter()
    vision, fusion = Calls(segmenter.model.model.vision_model), Calls(segmenter.model.model.fusion)
    first = segmenter.ask(make_photo(), ["the red square"])
    answer = segmenter.ask(make_photo(), ["blue thing", "green thing"])
    assert (vision.number, fusion.number) == (1, 2)
    for threshold in (0.2, 0.5, 0.8):
        app.make_view(segmenter, answer, threshold)
    assert (vision.number, fusion.number) == (1, 2)
    segmenter.ask(make_photo(seed=1), ["blue thing"])
    segmenter.ask(make_photo().reshape(44, 20, 3), ["blue thing"])  # another photo with the same bytes
    assert vision.number == 3
    fresh = make_tiny_segmenter().ask(make_photo(), ["the red square"])
    assert torch.equal(first.logits, fresh.logits)


@pytest.mark.parametrize("fusion_type", ["coupled", "independent", "vanilla"])
@pytest.mark.parametrize("share", [False, True])
def test_words_have_the_attention_of_the_class_seed(fusion_type, share):
    segmenter = make_tiny_segmenter(fusion_type=fusion_type, num_fusion_layers=2, share_fusion_layers=share)
    fusion = segmenter.model.model.fusion
    layers = fusion.layers if fusion_type == "vanilla" else fusion.seed_layers
    rows = []

    def keep_last_row(module, args, output):  # softmax of the seed's scalar products, computed with NumPy
        tokens = args[0][0].double().numpy()
        weights = {name: getattr(module, f"{name}_proj") for name in "qk"}
        query, key = (
            tokens @ linear.weight.detach().double().numpy().T + linear.bias.detach().double().numpy()
            for linear in weights.values()
        )
        query, key = (each.reshape(len(tokens), -1, module.head_dim) for each in (query, key))
        products = np.exp(np.einsum("hd,khd->hk", query[-1], key) / module.head_dim**0.5)
        rows.extend(products / products.sum(axis=1, keepdims=True))

    for layer in layers:
        layer.self_attn.register_forward_hook(keep_last_row)
    (words,) = segmenter.ask(make_photo(), ["the red dog"]).words
    assert len(rows) == 2 * 2  # layers, heads
    assert [(word.text, word.is_known) for word in words] == [("the", True), ("red", True), ("dog", False)]
    np.testing.assert_allclose([word.attention for word in words], np.mean(rows, axis=0)[-4:-1], atol=1e-6)


def test_words_that_are_not_read_are_named(tmp_path, recwarn):
    segmenter = make_tiny_segmenter()
    Image.fromarray(make_photo()).save(tmp_path / "photo.png")
    answer = app.ask(segmenter, tmp_path / "photo.png", "the <i>zzz\nthe red red red red red Cafe\u0301\nblue thing")
    records = app.make_records(answer, segmenter.segment(answer, 0.5))
    unknown = [record["unknown_words"] for record in records]
    assert "zzz" in unknown[0] and unknown[1:] == [[], []]
    assert [record["truncated"] for record in records] == [False, True, False]
    warnings = [str(warning.message) for warning in recwarn if warning.category is UserWarning]
    assert len(warnings) == 2 and "zzz" in warnings[0] and "Café" in warnings[1]
    assert not any("<" in warning for warning in warnings)
    recwarn.clear()
    app.ask(segmenter, tmp_path / "photo.png", "the red square")
    assert not [warning for warning in recwarn if warning.category is UserWarning]


def test_words_beyond_the_limit_are_struck_through():
    (words,) = make_tiny_segmenter().ask(make_photo(), ["the red box, that is Blue"]).words
    assert [word.text for word in words] == ["the", "red", "box", ",", "that", "is", "Blue"]
    assert [word.attention is None for word in words] == [False] * 6 + [True]
    assert "<s>Blue</s>" in app.make_words(words)


def test_patch_maps_are_the_patches_on_the_photo():
    """The photo is twice as wide as the input, and half as high as wide: a patch is 16 pixels, in the patch rows 1 and 2."""
    segmenter = make_tiny_segmenter()
    answer = segmenter.ask(make_photo((32, 64)), ["the red square"])
    (patch_map,) = segmenter.get_patch_maps(answer, (32, 64))
    patches = answer.patch_logits[0].sigmoid().numpy()
    assert patches.shape == (4, 4) and patch_map.shape == (32, 64)
    centres = patch_map[8::16, 8::16]
    np.testing.assert_allclose(centres, patches[1:3], atol=1e-6)


def test_cards_escape_html():
    segmenter = make_tiny_segmenter()
    view = app.make_view(segmenter, segmenter.ask(make_photo(), ["<script>alert(1)</script> red"]), 0.5)
    assert "<script" not in view.cards and "&lt;" in view.cards


def test_the_page_shows_masks_patch_maps_and_words_of_each_sentence(segmenter, image_processor):
    answer = segmenter.ask(app.read_photo(PHOTOS / "held_out" / "000000173350.jpg", image_processor), SENTENCES)
    segmentations = segmenter.segment(answer, 0.5)
    view = app.make_view(segmenter, answer, 0.5)
    photo, layers = view.overlay
    assert [view.colors[label] for _, label in layers] == list(app.COLORS[:2])
    for (mask, _), (opacity, label), sentence in zip(segmentations, layers, SENTENCES):
        assert opacity.shape == photo.shape[:2] and label.endswith(sentence)
        small = np.asarray(Image.fromarray(opacity > 0).resize(mask.shape[::-1]))
        assert (small == mask).mean() > 0.98
        assert ((opacity == 1) != (opacity == 0.6))[opacity > 0].all()
    pictures = re.findall(r'<img src="data:image/jpeg;base64,([^"]+)" alt="(mask|patch map)"', view.cards)
    assert [kind for _, kind in pictures] == ["mask", "patch map"] * 2
    cutout = np.asarray(Image.open(io.BytesIO(base64.b64decode(pictures[0][0])))).astype(int)
    mask = segmentations[0].mask
    change = np.abs(cutout - answer.photo).mean(axis=2)
    assert change[mask].mean() < 10 and change[~mask].mean() > 60
    assert f"score {segmentations[0].score:.2f} · {mask.mean():.1%} of the photo" in view.cards
    with zipfile.ZipFile(view.archive) as archive:
        assert archive.namelist() == ["1_the-upper-dog.png", "2_the-lower-dog.png"]
        for name, segmentation in zip(archive.namelist(), segmentations):
            assert (np.asarray(Image.open(archive.open(name))) == 255 * segmentation.mask).all()


def test_a_card_says_that_its_mask_is_empty():
    segmenter = make_tiny_segmenter()
    answer = segmenter.ask(make_photo((3, 500)), ["blue thing"])
    answer.logits = torch.full(answer.logits.shape, -9.0)
    assert "no pixel is above the threshold" in app.make_view(segmenter, answer, 0.5).cards


def test_colours_are_those_of_the_packages_pictures():
    assert [tuple(bytes.fromhex(color[1:])) for color in app.COLORS] == list(COLORS)


def test_front_matter_fits_the_files():
    data = RepoCard.load(SPACE / "README.md").data
    assert data.sdk == "gradio" and (SPACE / data.app_file).is_file() and len(data.short_description) <= 60
    assert data.models and data.license == "apache-2.0"
    lines = (SPACE / "requirements.txt").read_text().splitlines()
    (gradio,) = (Requirement(line) for line in lines if line.startswith("gradio"))
    assert data.sdk_version in gradio.specifier and gr.__version__ in gradio.specifier


@pytest.fixture(scope="module")
def demo(segmenter):
    return app.build_demo(segmenter, RESTR_MINI)


@pytest.fixture(scope="module")
def url(demo):
    _, url, _ = app.launch(demo, prevent_thread_lock=True, quiet=True)
    yield url
    demo.close(verbose=False)


def test_slider_says_that_an_answer_has_expired(demo):
    (show,) = (event.fn for event in demo.fns.values() if event.name == "show")
    with pytest.raises(gr.Error, match="press Segment"):
        show(None, 0.5)


@pytest.fixture(scope="module")
def client(url):
    return importlib.import_module("gradio_client").Client(url, verbose=False)


def call(client, photo, sentences, threshold=0.5):
    """Records and masks (bool) of the endpoint."""
    path = None if photo is None else importlib.import_module("gradio_client").handle_file(photo)
    records, files = client.predict(photo=path, sentences=sentences, threshold=threshold, api_name="/segment")
    return records, [np.asarray(Image.open(file)) > 0 for file in files]


def test_api_answers_as_the_pipeline_and_encodes_a_photo_once(client, segmenter, pipe):
    calls = Calls(segmenter.model.model.vision_model)
    assert list(client.view_api(return_format="dict", print_info=False)["named_endpoints"]) == ["/segment"]
    for sentences in (SENTENCES, SENTENCES[::-1], ["the red shape"]):
        records, masks = call(client, PHOTOS / "school_bus.jpg", "\n".join(sentences))
        for record, mask, expected in zip(
            records, masks, pipe(PHOTOS / "school_bus.jpg", text=sentences), strict=True
        ):
            assert record["label"] == expected["label"]
            assert record["score"] == pytest.approx(expected["score"], abs=1e-3)
            assert (mask == (np.asarray(expected["mask"]) > 0)).mean() > 0.9999
            assert record["share"] == pytest.approx(mask.mean(), abs=1e-4)
            assert " ".join(word["word"] for word in record["words"]) == record["label"]
            assert 0 < sum(word["attention"] for word in record["words"]) <= 1
    assert calls.number == 1


def test_api_says_what_is_wrong(client, tmp_path):
    (tmp_path / "photo.jpg").write_text("no image")
    (tmp_path / "big.jpg").write_bytes(bytes(21 * 2**20))
    for photo, sentences, threshold, message in [
        (None, "the dog", 0.5, "no photo"),
        (PHOTOS / "clock.jpg", "  \n", 0.5, "no sentence"),
        (PHOTOS / "clock.jpg", "the dog\n" * 8, 0.5, "At most 7 sentences"),
        (PHOTOS / "clock.jpg", "the dog", 1.5, "from 0 to 1"),
        (PHOTOS / "clock.jpg", "the dog", "high", "from 0 to 1"),
        (tmp_path / "photo.jpg", "the dog", 0.5, "cannot be read"),
        (tmp_path / "big.jpg", "the dog", 0.5, "413|too large|exceed"),
    ]:
        with pytest.raises(Exception, match=message) as caught:
            call(client, photo, sentences, threshold)
        assert "Traceback" not in str(caught.value)


def test_api_reads_no_files_of_the_server(url):
    httpx = importlib.import_module("httpx")
    photo = {"path": str(PHOTOS / "clock.jpg"), "meta": {"_type": "gradio.FileData"}}
    body = {"data": [photo, "the white circle", 0.5]}
    event = httpx.post(f"{url}gradio_api/call/segment", json=body).json()["event_id"]
    answer = httpx.get(f"{url}gradio_api/call/segment/{event}", timeout=WAIT).text
    assert answer.startswith("event: error") and "score" not in answer


def test_simultaneous_users_get_their_own_masks(url, segmenter, image_processor, tmp_path, monkeypatch):
    Client = importlib.import_module("gradio_client").Client
    threads, ask = [], segmenter.ask
    monkeypatch.setattr(segmenter, "ask", lambda *args: threads.append(threading.current_thread().name) or ask(*args))
    photos = []
    for number in range(4):
        pixels = np.full((60, 80, 3), 90, dtype=np.uint8)
        pixels[10:40, 5 + 6 * number : 30 + 6 * number] = (220, 20, 20)
        photos.append(tmp_path / f"{number}.png")
        Image.fromarray(pixels).save(photos[-1])
    clients = [Client(url, verbose=False) for _ in range(2)]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda number: call(clients[number % 2], photos[number], "the red square"), range(4)))
    assert len(threads) == 4 and len(set(threads)) == 1  # each thread would keep memory
    assert threads[0].startswith("ThreadPoolExecutor")  # not one of Gradio's 40
    for path, (_, (mask,)) in zip(photos, answers):
        answer = segmenter.ask(app.read_photo(path, image_processor), ["the red square"])
        assert (segmenter.segment(answer, 0.5)[0].mask == mask).all()
    assert len({hashlib.sha256(mask).hexdigest() for _, (mask,) in answers}) == 4


# Runs the app of the folder argv[1], without serving it.
RUNS = """
import sys

sys.path.insert(0, sys.argv[1])
import app

made = []
app.build_demo = lambda segmenter, model_id: made.append(segmenter)
app.launch = lambda demo: None
app.main()
answer = made[0].ask(app.np.arange(20 * 44 * 3, dtype=app.np.uint8).reshape(20, 44, 3), ["the red square"])
print(app.get_default_model(), type(made[0].model).__module__, answer.logits.mean().item())
"""


@pytest.mark.slow
def test_a_space_needs_only_its_files_and_a_model_with_code(tmp_path):
    segmenter = make_tiny_segmenter()
    save_bundle(segmenter.model, segmenter.processor, tmp_path / "model")
    shutil.copytree(SPACE, tmp_path / "space", ignore=shutil.ignore_patterns("__pycache__"))
    environment = {"MODEL_ID": str(tmp_path / "model"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    printed = run_without_package(RUNS, tmp_path / "space", cwd=tmp_path, **environment)
    default, module, mean = printed.split()[-3:]
    assert default == RepoCard.load(SPACE / "README.md").data.models[0]
    assert module.startswith("transformers_modules.")
    photo = np.arange(20 * 44 * 3, dtype=np.uint8).reshape(20, 44, 3)
    assert float(mean) == pytest.approx(segmenter.ask(photo, ["the red square"]).logits.mean().item(), abs=1e-5)


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def browser(downloads):
    driver = open_chromium("--disable-gpu", downloads=downloads, **{"goog:loggingPrefs": {"performance": "ALL"}})
    yield driver
    driver.quit()


class Page:
    """The demo's page in a browser window of some width. Screenshots go to the folder SPACE_SCREENSHOTS, if it is set."""

    def __init__(self, driver, url, width):
        self.driver = driver
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        driver.get(url)
        self.wait(lambda: self.find("textarea") and self.find(".card"), "the page")

    def find(self, selector):
        return self.driver.find_elements("css selector", selector)

    def wait(self, condition, what):
        WebDriverWait = importlib.import_module("selenium.webdriver.support.ui").WebDriverWait
        return WebDriverWait(self.driver, WAIT, poll_frequency=0.1).until(
            lambda _: condition(), f"{what} did not appear"
        )

    @property
    def text(self):
        return self.driver.execute_script("return document.body.innerText")

    def upload(self, path):
        self.find('button[aria-label="Remove Image"]')[0].click()
        self.wait(lambda: self.find("input[type=file]"), "the upload")[0].send_keys(str(path))
        self.wait(lambda: self.find('button[aria-label="Remove Image"]'), "the photo")

    def ask(self, sentences):
        self.fill("textarea", sentences)
        next(button for button in self.find("button") if button.text == "Segment").click()

    def fill(self, selector, text):
        self.driver.execute_script(
            "arguments[0].value = arguments[1]; for (const type of ['input', 'change', 'pointerup', 'blur'])"
            " arguments[0].dispatchEvent(new Event(type, {bubbles: true}))",
            self.find(selector)[0],
            text,
        )

    def screenshot(self, name):
        if folder := os.environ.get("SPACE_SCREENSHOTS"):
            self.driver.save_screenshot(str(Path(folder) / f"{name}.png"))


def describe(pipe, photo, sentences, threshold):
    """The text of the cards about the masks."""
    results = pipe(photo, text=sentences, threshold=threshold)
    shares = [(np.asarray(result["mask"]) > 0).mean() for result in results]
    return [f"score {result['score']:.2f} · {share:.1%} of the photo" for result, share in zip(results, shares)]


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_page_shows_masks_after_an_upload_and_follows_the_slider(url, browser, segmenter, pipe, width):
    page = Page(browser, url, width)
    page.screenshot(f"{width}_start")
    page.upload(PHOTOS / "stop_sign.jpg")
    sentences = ["the red shape", "the biggest red thing ${1 + 1} <b>"]
    page.ask("\n".join(sentences))
    for shown in describe(pipe, PHOTOS / "stop_sign.jpg", sentences, 0.5):
        page.wait(lambda shown=shown: shown in page.text, shown)
    assert "${1 + 1} <b>" in page.text  # in the legend
    layers = page.wait(lambda: len(images := page.find("#overlay img")) == 3 and images, "the overlay")
    ready = "return [...arguments[0]].every((image) => image.complete && image.naturalWidth > 0)"
    page.wait(lambda: browser.execute_script(ready, [*layers, *page.find(".card img")]), "the pictures")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    inside = "const box = document.querySelector('#overlay .base-image').getBoundingClientRect();"
    inside += " return box.top > -1 && box.bottom <= window.innerHeight"
    page.wait(lambda: browser.execute_script(inside), "the overlay in the window")
    page.screenshot(f"{width}_masks")

    calls = Calls(segmenter.model)
    page.fill("input[type=range]", "0.9")
    for shown in describe(pipe, PHOTOS / "stop_sign.jpg", sentences, 0.9):
        page.wait(lambda shown=shown: shown in page.text, shown)
    assert calls.number == 0
    page.screenshot(f"{width}_slider")


@pytest.mark.slow
def test_masks_are_downloaded_as_they_are_shown(url, browser, pipe, downloads):
    page = Page(browser, url, 1280)
    page.find(".gallery-item")[1].click()  # an example
    photo, text = app.list_examples()[1]
    (shown,) = describe(pipe, photo, [text], 0.5)
    page.wait(lambda: shown in page.text, shown)
    next(button for button in page.find("button") if button.text == "Download the masks").click()
    page.wait(lambda: (downloads / "masks.zip").is_file(), "the download")
    with zipfile.ZipFile(downloads / "masks.zip") as archive:
        (name,) = archive.namelist()
        mask = np.asarray(Image.open(archive.open(name))) > 0
    assert f"{mask.mean():.1%}" in shown


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_an_empty_sentence_is_explained(url, browser, width):
    page = Page(browser, url, width)
    before = page.find(".cards")[0].text
    page.ask("   ")
    page.wait(lambda: "There is no sentence yet" in page.text, "the message")
    ended = "return document.getAnimations().every((animation) => animation.playState === 'finished')"
    page.wait(lambda: browser.execute_script(ended), "the end of its animation")
    page.screenshot(f"{width}_error")
    assert "Traceback" not in page.text
    assert page.find(".cards")[0].text == before


@pytest.mark.slow
def test_the_page_loads_nothing_from_elsewhere(url, browser):
    browser.get_log("performance")
    Page(browser, url, 1280)
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert asked and all(address.startswith((url, "data:", "blob:")) for address in asked)
