"""
The page of `restr export --web` in a headless Chromium. Quick tests have a stand-in for the model (stand_in_worker.js).
Screenshots go to the folder WEB_SCREENSHOTS, if it is set.
"""

import base64
import importlib
import io
import json
import os
import re
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from browsers import open_chromium, run_script, serve
from pictures import make_exif
from PIL import Image

from modeling_restr import ReSTRForImageSegmentation, ReSTRPipeline, ReSTRProcessor
from modeling_restr.export import export_web, web_runtime
from modeling_restr.export.web import HEADERS, SITE, read_examples
from modeling_restr.visualization import COLORS


TESTS = Path(__file__).resolve().parent
RESTR_MINI = TESTS.parent / "examples" / "restr_mini"
EXAMPLES = read_examples(TESTS.parent / "examples" / "photos" / "examples.json")
DOGS, CLOCK, KID = (Path(example.photo) for example in EXAMPLES)
WAIT = 60  # seconds, for a busy machine
STAND_IN_SIZE = 64  # of the canvas of stand_in_worker.js
STAND_IN_FILES = {"image_encoder.onnx": 3, "sentence_query.onnx": 1}
# Centres of patches of the stand-in on a photo of 4:3, of which the canvas shows the middle 6 of 8 rows.
CENTERS = [((column + 0.5) / 8, (row + 0.5) / 6) for row in range(6) for column in range(8)]
CAMERA = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")
# Notes every message to the worker.
SPY = """
window.sent = [];
const post = Worker.prototype.postMessage;
Worker.prototype.postMessage = function (message) { window.sent.push(message.type); post.call(this, message); };
"""
MAKE_FILE = """
const [name, type, content] = arguments;
const file = new File([Uint8Array.from(atob(content), (character) => character.charCodeAt(0))], name, { type });
const data = new DataTransfer();
data.items.add(file);
"""
DROP = """
const target = document.getElementById("canvas");
for (const type of ["dragenter", "dragover", "drop"]) {
  target.dispatchEvent(new DragEvent(type, { dataTransfer: data, bubbles: true, cancelable: true }));
}
"""
PASTE = """
document.body.dispatchEvent(new ClipboardEvent("paste", { clipboardData: data, bubbles: true, cancelable: true }));
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A site with the stand-in for the model."""
    folder = tmp_path_factory.mktemp("web") / "site"
    shutil.copytree(SITE, folder)
    shutil.copy(TESTS / "stand_in_worker.js", folder / "worker.js")
    shutil.copy(RESTR_MINI / "tokenizer.json", folder)
    examples = []
    for example in EXAMPLES:
        shutil.copy(example.photo, folder)
        examples.append({"file": Path(example.photo).name, "texts": example.texts, "credit": example.credit})
    for name, size in STAND_IN_FILES.items():
        (folder / name).write_bytes(bytes(size))
    settings = {
        "name": "me/discs",
        "links": {"model": "https://huggingface.co/me/discs", "paper": "https://arxiv.org/abs/2203.16768"},
        "parameters": 1_500_000,
        "imageSize": [STAND_IN_SIZE, STAND_IN_SIZE],
        "tokenizer": {"maxLength": 20, "padId": 0, "unknownId": 3, "dropUnknownPunctuation": True},
        "threshold": 0.5,
        "colors": ["#{:02x}{:02x}{:02x}".format(*color) for color in COLORS],
        "opacity": 0.5,
        "files": STAND_IN_FILES,
        "version": "1",
        "examples": examples,
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def url(site):
    with serve(site) as url:
        yield url


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def browser(downloads):
    options = {"goog:loggingPrefs": {"performance": "ALL"}}
    hosts = "--host-resolver-rules=MAP plain.test 127.0.0.1"
    driver = open_chromium(*CAMERA, hosts, downloads=downloads, **options)
    driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": SPY})
    yield driver
    driver.quit()


class Page:
    """The page in a browser window of some width, by default with the masks of its first example."""

    def __init__(self, driver, url, width=1280, is_loaded=True):
        self.driver = driver
        self.width = width
        self.resize(900)
        driver.get(url)
        if is_loaded:
            self.wait(lambda: self.status.startswith("Ready"), "the model")
            self.wait_for_masks()

    def resize(self, height):
        metrics = {"width": self.width, "height": height, "deviceScaleFactor": 1, "mobile": self.width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def run(self, script, *values):
        return self.driver.execute_script(script, *values)

    def find(self, selector):
        return self.driver.find_element("css selector", selector)

    def find_all(self, selector):
        return self.driver.find_elements("css selector", selector)

    def wait(self, condition, what):
        WebDriverWait = importlib.import_module("selenium.webdriver.support.ui").WebDriverWait
        message = f"{what} did not appear on the page: {self.run('return document.body.innerText')}"
        return WebDriverWait(self.driver, WAIT, poll_frequency=0.05).until(lambda _: condition(), message)

    def wait_for_masks(self):
        done = "return document.querySelector('.sentences li') && !document.querySelector('.waiting, #busy:not([hidden])')"
        self.wait(lambda: self.run(done), "a mask")

    def read_all(self, selector):
        """The texts of elements, which the page may replace at any time."""
        script = "return [...document.querySelectorAll(arguments[0])].map((element) => element.textContent)"
        return self.run(script, selector)

    @property
    def status(self):
        (text,) = self.read_all("#status-text") or [""]
        return text

    @property
    def notice(self):
        (text,) = self.read_all("#notice:not([hidden]) p") or [""]
        return text

    @property
    def sentences(self):
        return self.read_all(".sentences .words")

    @property
    def results(self):
        return self.read_all(".sentences .result")

    def ask(self, text):
        """Type a sentence and press Enter."""
        field = self.find("#sentence")
        field.clear()
        field.send_keys(f"{text}\n")

    def give(self, how, path, kind="image/jpeg"):
        """Drop or paste a file."""
        content = base64.b64encode(Path(path).read_bytes()).decode()
        self.run(MAKE_FILE + how, Path(path).name, kind, content)

    def upload(self, path):
        self.find("#file").send_keys(str(path))

    def wait_for_photo(self, size):
        """Wait for a photo of some width and height, without sentences."""
        ratio = f"{size[0] / size[1]:.4f}"
        script = "return Number(document.getElementById('stage').style.getPropertyValue('--ratio')).toFixed(4)"
        self.wait(lambda: self.run(script) == ratio, "the photo")
        encoded = "return document.getElementById('busy').hidden && !document.querySelector('.sentences li')"
        self.wait(lambda: self.run(encoded), "the end of the reading")

    def set_threshold(self, value):
        script = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))"
        self.run(script, self.find("#threshold"), str(value))

    def screenshot(self, name):
        """A picture of the whole page."""
        if folder := os.environ.get("WEB_SCREENSHOTS"):
            self.resize(self.run("return document.documentElement.scrollHeight"))
            self.driver.save_screenshot(str(Path(folder) / f"{name}_{self.width}.png"))
            self.resize(900)

    def download(self, button, folder, name):
        """Press a button, and return the content of the file that it downloads."""
        path = folder / name
        path.unlink(missing_ok=True)
        button.click()
        self.wait(path.is_file, name)
        return path.read_bytes()


@pytest.fixture
def page(browser, url):
    return Page(browser, url)


def read_mask(content):
    image = Image.open(io.BytesIO(content))
    mask = np.asarray(image)
    assert image.mode == "L" and set(np.unique(mask)) <= {0, 255}
    return mask > 0


def compute_disc(center, size, threshold=0.5):
    """The mask of the stand-in's disc, by the package's processor. `size` is (height, width)."""
    processor = ReSTRProcessor.from_pretrained(RESTR_MINI)
    processor.image_processor.size = {"height": STAND_IN_SIZE, "width": STAND_IN_SIZE}
    y, x = (np.mgrid[:STAND_IN_SIZE, :STAND_IN_SIZE] + 0.5) / STAND_IN_SIZE
    logits = 40 * (0.2 - np.hypot(x - center, y - 0.5))
    outputs = SimpleNamespace(logits=torch.tensor(logits, dtype=torch.float32)[None])
    (result,) = processor.post_process_referring_segmentation(outputs, [size], threshold)
    return result["mask"].numpy(), result["score"]


def describe(mask, score):
    return f"score {score:.2f} · {100 * mask.mean():.1f} % of the photo"


def get_size(path):
    with Image.open(path) as image:
        return image.size


@pytest.mark.parametrize("width", [1280, 390])
def test_first_visit_shows_masks_of_an_example_and_fits_the_window(browser, url, width):
    page = Page(browser, url, width)
    page.wait(lambda: page.status == "Ready · works offline · 2 threads", "offline use")
    assert page.sentences == EXAMPLES[0].texts
    assert "Model: me/discs, 1.5 million parameters" in page.find("#about").text
    assert "Attribution-ShareAlike 2.0" in page.find("#credit").text
    assert page.run("return document.documentElement.scrollWidth") <= width
    page.screenshot("start")


def test_page_loads_nothing_from_elsewhere(browser, url):
    browser.get_log("performance")
    Page(browser, url)
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert asked and all(address.startswith((url, "data:", "blob:")) for address in asked)


def test_everything_has_a_name_for_screen_readers(page):
    page.ask("the xyzzy on the left")
    page.wait_for_masks()
    nodes = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    names = {}
    for node in nodes:
        if not node["ignored"] and "role" in node:
            names.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
    for role in ("button", "textbox", "slider", "switch", "image", "link", "list", "region"):
        assert all(names.get(role, [""])), (role, names.get(role))
    (picture,) = (name for name in names["image"] if name.startswith("The photo with masks"))
    assert "the xyzzy on the left, score" in picture
    assert any("does not know “xyzzy”" in name for name in names["StaticText"])


def test_keyboard_reaches_everything_and_enter_looks_at_one_mask_alone(page):
    Keys = importlib.import_module("selenium.webdriver.common.keys").Keys
    page.run("document.body.tabIndex = -1; document.body.focus()")
    reached = []
    for _ in range(30):
        page.driver.switch_to.active_element.send_keys(Keys.TAB)
        element = page.driver.switch_to.active_element
        if element.tag_name == "body":
            break
        reached.append(element.get_attribute("aria-label") or element.text or element.get_attribute("id"))
    expected = ["Your photo", "Camera", "sentence", "Find", "Remove “the upper dog”", "threshold", "patches"]
    places = [reached.index(name) for name in expected]
    assert places == sorted(places) and "Download masks" in reached
    show = page.find("[aria-label='Look at the mask of “the upper dog” alone']")
    show.send_keys(Keys.ENTER)
    assert show.get_attribute("aria-pressed") == "true"
    show.send_keys(Keys.SPACE)
    assert show.get_attribute("aria-pressed") == "false"


def test_photos_are_dropped_pasted_chosen_and_taken(page):
    page.give(DROP, CLOCK)
    page.wait_for_photo(get_size(CLOCK))
    assert not page.find("#credit").text and page.find("#controls").get_attribute("disabled")
    page.give(PASTE, KID)
    page.wait_for_photo(get_size(KID))
    page.upload(DOGS)
    page.wait_for_photo(get_size(DOGS))
    page.find("#camera").click()
    page.wait(lambda: page.find("#take").is_displayed() and page.find("#take").is_enabled(), "the camera's picture")
    page.find("#take").click()
    page.wait(
        lambda: page.run("return video.srcObject === null && canvas.width * 9 === canvas.height * 16"), "a frame"
    )
    page.find_all("#examples button")[1].click()
    page.wait(lambda: page.sentences == EXAMPLES[1].texts, "the example")
    page.wait_for_masks()
    assert page.find_all("#examples button")[1].get_attribute("aria-pressed") == "true"


def test_photo_is_encoded_once_and_the_slider_runs_nothing(page):
    size = get_size(DOGS)[::-1]
    page.ask("a thing on the left")
    page.wait_for_masks()
    page.ask("a thing on the right")
    page.wait_for_masks()
    assert page.run("return window.sent") == ["load", "encode", "segment", "segment", "segment"]
    for threshold in (0.5, 0.85):
        page.set_threshold(threshold)
        centers = (0.5, 0.5, 0.3, 0.7)
        assert page.results == [describe(*compute_disc(center, size, threshold)) for center in centers]
        assert page.find("#threshold-value").text == f"{threshold:.2f}"
    assert len(page.run("return window.sent")) == 5


def test_empty_mask_is_explained_and_can_be_downloaded(page, downloads):
    page.ask("something absent")
    page.wait_for_masks()
    assert page.results[-1] == "no pixel is above the threshold"
    content = page.download(page.find_all(".sentences .save")[2], downloads, "3_something-absent.png")
    assert read_mask(content).shape == get_size(DOGS)[::-1] and not read_mask(content).any()


READ_PIXELS = """
const canvas = document.getElementById("canvas");
return args.map(([x, y]) =>
  [...canvas.getContext("2d").getImageData(x * canvas.width, y * canvas.height, 1, 1).data.slice(0, 3)]);
"""


@pytest.mark.parametrize("width", [1280, 390])
def test_patch_map_is_drawn_on_a_toggle(browser, url, width):
    page = Page(browser, url, width)
    page.upload(DOGS)
    page.wait_for_photo(get_size(DOGS))
    page.ask("a thing on the left")
    page.wait_for_masks()
    before = run_script(browser, READ_PIXELS, *CENTERS)
    page.find("#patches").click()
    assert page.find("#canvas").get_attribute("aria-label").startswith("The photo with coarse patch maps: ")
    page.screenshot("patches")
    for (x, y), pixel in zip(CENTERS, run_script(browser, READ_PIXELS, *CENTERS)):
        probability = 1 / (1 + np.exp(-40 * (0.2 - np.hypot(x - 0.3, (y - 0.5) * 0.75))))
        grey = (np.array(pixel) - 0.9 * probability * np.array(COLORS[0])) / (1 - 0.9 * probability)
        assert np.ptp(grey) < 30 and 100 < grey.mean() < 240, (x, y, pixel)
    page.find("#patches").click()
    assert run_script(browser, READ_PIXELS, *CENTERS) == before
    assert page.find("#canvas").get_attribute("aria-label").startswith("The photo with masks: ")


def test_each_sentence_has_its_colour_until_it_is_removed(page):
    for number in range(3, len(COLORS) + 1):
        page.ask(f"thing {number}")
    page.wait_for_masks()
    colors = [element.value_of_css_property("background-color") for element in page.find_all(".sentences .number")]
    assert colors == ["rgba({}, {}, {}, 1)".format(*color) for color in COLORS]
    page.ask("one more thing")
    assert page.notice == f"At most {len(COLORS)} sentences at a time, please. Remove one first."
    page.find_all(".sentences .remove")[2].click()
    page.ask("one more thing")
    page.wait_for_masks()
    assert page.sentences[-1] == "one more thing"
    assert page.find_all(".sentences .number")[-1].value_of_css_property("background-color") == colors[2]
    assert not page.notice
    page.screenshot("many")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "There is no sentence yet: write what to look for."),
        ("   ", "There is no sentence yet: write what to look for."),
        ("?!", "The sentence has no words: say what to look for."),
        ("a " * 150, "The sentence has 299 characters. The limit is 200."),
        ("the  upper dog", "This is already sentence 1."),
    ],
)
def test_sentence_that_cannot_be_asked_is_explained(page, text, message):
    before = page.results
    page.ask(text)
    assert page.notice == message and page.results == before
    page.screenshot("error")
    page.find("#dismiss").click()
    assert not page.find("#notice").is_displayed()


def test_service_worker_keeps_every_file_of_the_page():
    shell = re.search(r"SHELL = \[(.*?)\]", (SITE / "service-worker.js").read_text(), flags=re.DOTALL)[1]
    names = {path.name for path in SITE.iterdir()} - {"index.html", "service-worker.js"}
    assert set(re.findall(r'"(.*?)"', shell)) == names | {"./", "settings.json", "tokenizer.json"}


def test_messages_are_those_of_the_demo():
    demo = (TESTS.parent / "examples" / "space" / "app.py").read_text()
    code = "".join(path.read_text() for path in SITE.glob("*.js")) + (SITE / "index.html").read_text()
    for text in (
        "Say what you mean, get its mask",
        "There is no sentence yet: write what to look for",
        "has no words: say what to look for.",
        "There is no photo yet: upload one, take one, paste one, or choose an example.",
        "This file cannot be read as an image: try a JPEG, PNG or WebP file.",
        "sentences at a time, please.",
        "Use other words.",
        "was not read. Use fewer words.",
        "no pixel is above the threshold",
    ):
        assert text in demo and text in code


@pytest.mark.parametrize("width", [1280, 390])
def test_unknown_words_are_marked_while_typing(browser, url, width):
    page = Page(browser, url, width)
    field = page.find("#sentence")
    field.send_keys("the xyz")
    assert not page.find_all("#marks u")  # it may become a word
    field.send_keys("zy dog ")
    assert page.read_all("#marks u") == ["xyzzy"]
    assert page.find("#hint").text == "The model does not know “xyzzy”. Use other words."
    page.screenshot("typing")
    field.send_keys("qwxq")
    page.wait(lambda: page.find("#hint").text.count("“") == 2, "the last word, after a pause")
    field.send_keys("\n")
    page.wait_for_masks()
    assert page.read_all(".sentences u") == ["xyzzy", "qwxq"]
    assert page.notice == "The model does not know “xyzzy”, “qwxq”. Use other words."
    page.ask("the dog " * 11)
    assert len(page.find_all(".sentences s")) == 2
    assert page.notice == "The sentence is too long, and “the”, “dog” was not read. Use fewer words."


def test_masks_are_downloaded_at_the_photos_own_size(page, downloads):
    page.upload(KID)
    page.wait_for_photo(get_size(KID))
    page.ask("the <b>thing</b> on the left")
    page.wait_for_masks()
    expected, _ = compute_disc(0.3, get_size(KID)[::-1])
    name = "1_the-b-thing-b-on-the-left.png"
    assert (read_mask(page.download(page.find("#save-masks"), downloads, name)) == expected).all()
    page.ask("ÄÖ on the right")
    page.wait_for_masks()
    page.set_threshold(0.8)
    content = page.download(page.find("#save-masks"), downloads, "masks.zip")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.namelist() == [name, "2_äö-on-the-right.png"] and archive.testzip() is None
        masks = [read_mask(archive.read(name)) for name in archive.namelist()]
    for mask, center in zip(masks, (0.3, 0.7)):
        assert (mask == compute_disc(center, get_size(KID)[::-1], 0.8)[0]).all()
    picture = Image.open(io.BytesIO(page.download(page.find("#save-picture"), downloads, "picture.png")))
    assert picture.height == 1024 and abs(picture.width / 1024 - get_size(KID)[0] / get_size(KID)[1]) < 1e-3


def test_files_that_are_no_photos_change_nothing(page, tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    before = page.results
    page.give(DROP, tmp_path / "text.jpg")
    page.wait(
        lambda: page.notice == "This file cannot be read as an image: try a JPEG, PNG or WebP file.", "a message"
    )
    link = "const data = new DataTransfer(); data.setData('text/uri-list', 'https://example.com/a.jpg');"
    page.run(link + DROP)
    page.wait(lambda: page.notice.startswith("There is no photo in what you dropped."), "a message")
    assert page.results == before and not page.find("#drop").is_displayed()


def test_page_is_usable_while_the_model_runs(page):
    page.ask("something slow")
    assert page.results[-1] == "looking …" and page.find("#busy").is_displayed()
    page.ask("a thing on the left")
    page.set_threshold(0.6)
    assert page.results[-2:] == ["looking …", "looking …"]
    page.wait_for_masks()
    page.ask("something slow again")
    page.give(DROP, CLOCK)  # the answer about the other photo comes later
    page.wait_for_photo(get_size(CLOCK))
    assert not page.results


def test_error_of_the_model_is_shown_and_the_next_sentence_works(page):
    page.ask("something broken")
    page.wait(lambda: "it is broken. Reload the page if it happens again." in page.notice, "the message")
    assert page.sentences == EXAMPLES[0].texts
    page.ask("a thing on the left")
    page.wait_for_masks()
    assert page.results[-1] == describe(*compute_disc(0.3, get_size(DOGS)[::-1]))


def test_download_shows_its_progress(browser, site, tmp_path):
    shutil.copytree(site, tmp_path / "site")
    message = "{type: 'progress', file: 'image_encoder.onnx', loaded: 12e6, total: 40e6}"
    (tmp_path / "site" / "worker.js").write_text(f"onmessage = () => postMessage({message})")
    with serve(tmp_path / "site") as url:
        page = Page(browser, url, is_loaded=False)
        page.wait(lambda: page.status == "Loading the model: 12 MB of 40 MB", "the progress")
        assert page.run("return document.getElementById('progress').value") == 0.3
        page.wait(lambda: page.results == ["waiting for the model …"] * 2, "the sentences")
        page.screenshot("loading")


def test_failed_download_can_be_tried_again(browser, site, tmp_path):
    shutil.copytree(site, tmp_path / "site")
    (tmp_path / "site" / "worker.js").write_text(
        "onmessage = () => postMessage({type: 'error', message: 'No network.'})"
    )
    with serve(tmp_path / "site") as url:
        page = Page(browser, url, is_loaded=False)
        page.wait(lambda: "The model could not be loaded: No network." in page.notice, "the message")
        assert page.sentences == EXAMPLES[0].texts and set(page.results) == {"waiting for the model …"}
        shutil.copy(site / "worker.js", tmp_path / "site")
        page.find("#start").click()
        page.wait_for_masks()
        assert not page.notice


def test_page_without_examples_starts_empty(browser, site, tmp_path):
    shutil.copytree(site, tmp_path / "site")
    settings = json.loads((site / "settings.json").read_text()) | {"examples": []}
    (tmp_path / "site" / "settings.json").write_text(json.dumps(settings))
    with serve(tmp_path / "site") as url:
        page = Page(browser, url, is_loaded=False)
        page.wait(lambda: page.status.startswith("Ready"), "the model")
        page.ask("the dog")
        assert page.notice == "There is no photo yet: upload one, take one, paste one, or choose an example."
        page.screenshot("empty")
        page.give(DROP, CLOCK)
        page.wait_for_photo(get_size(CLOCK))
        assert not page.find("#empty").is_displayed() and not page.notice


def test_browser_that_saves_data_asks_before_the_download(browser, url):
    source = "Object.defineProperty(navigator.connection, 'saveData', { get: () => true })"
    script = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": source})
    try:
        page = Page(browser, url, is_loaded=False)
        page.wait(lambda: page.find("#start").is_displayed(), "the button")
        assert "your browser is set to save data" in page.status and page.run("return window.sent") == []
        page.find("#start").click()
        page.wait_for_masks()
    finally:
        browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)


def test_old_browser_is_told_so(browser, site, tmp_path):
    shutil.copytree(site, tmp_path / "site")
    with (tmp_path / "site" / "tokenizer.js").open("a") as file:
        file.write("a syntax of later times")
    with serve(tmp_path / "site") as url:
        page = Page(browser, url, is_loaded=False)
        page.wait(lambda: "Please use a recent Chrome" in page.status, "the message")


def test_page_works_offline_after_the_first_visit(browser, site):
    with serve(site) as url:
        page = Page(browser, url)
        page.wait(lambda: "works offline" in page.status, "offline use")
    page = Page(browser, url)
    page.find_all("#examples button")[2].click()
    page.wait(lambda: page.sentences == EXAMPLES[2].texts, "the example")
    page.wait_for_masks()
    assert "works offline" in page.status


def test_files_that_changed_are_downloaded_again(browser, site, tmp_path):
    """Large files by their version, the others always."""
    shutil.copytree(site, tmp_path / "site")
    with serve(tmp_path / "site") as url:
        page = Page(browser, url)
        page.wait(lambda: "works offline" in page.status, "offline use")
        settings = json.loads((site / "settings.json").read_text()) | {"name": "me/other", "version": "2"}
        (tmp_path / "site" / "settings.json").write_text(json.dumps(settings))
        (tmp_path / "site" / "image_encoder.onnx").write_bytes(b"new")
        page = Page(browser, url)
        assert page.find("#about").text.startswith("Model: me/other")
        page.wait(lambda: "works offline" in page.status, "offline use")
        kept = page.driver.execute_async_script(
            "const done = arguments[0]; (async () => { const response = await caches.match('image_encoder.onnx?v=2');"
            "const old = await caches.match('image_encoder.onnx?v=1'); done([await response.text(), old]) })()"
        )
        assert kept == ["new", None]


def test_page_works_without_a_service_worker(browser, url):
    """Browsers have none, and no threads, for other machines' addresses without https."""
    page = Page(browser, url.replace("127.0.0.1", "plain.test"))
    assert page.status == "Ready · 1 thread"
    page.ask("a thing on the left")
    page.wait_for_masks()
    page.find("#camera").click()
    page.wait(lambda: page.notice.startswith("The camera cannot be used."), "the message")


def test_host_that_isolates_the_page_gives_threads_at_once(browser, site):
    """As a Space does, by the headers in README.md."""
    with serve(site, HEADERS) as url:
        page = Page(browser, url)
        assert "2 threads" in page.status
        assert page.run("return crossOriginIsolated && sessionStorage.getItem('reloaded') === null")


@pytest.fixture(scope="module")
def real_site(tmp_path_factory):
    """The site of restr-mini."""
    if web_runtime.find_missing(web_runtime.get_cache()):
        pytest.skip("needs onnxruntime-web in the cache: CONTRIBUTING.md says how to get it")
    model = ReSTRForImageSegmentation.from_pretrained(RESTR_MINI)
    processor = ReSTRProcessor.from_pretrained(RESTR_MINI)
    return export_web(model, processor, tmp_path_factory.mktemp("real") / "site", name="restr-mini", examples=EXAMPLES)


@pytest.fixture(scope="module")
def pipe():
    model = ReSTRForImageSegmentation.from_pretrained(RESTR_MINI).eval()
    return ReSTRPipeline(model=model, processor=ReSTRProcessor.from_pretrained(RESTR_MINI))


def compute_iou(first, second):
    return (first & second).sum() / (first | second).sum()


@pytest.mark.slow
def test_masks_equal_pythons_also_offline_and_for_a_turned_photo_of_12_megapixels(
    browser, real_site, pipe, downloads, tmp_path
):
    with serve(real_site) as url:
        page = Page(browser, url)
        page.wait(lambda: "works offline" in page.status, "offline use")
    page = Page(browser, url)  # which nobody serves
    page.screenshot("real")
    for example in EXAMPLES:
        page.upload(example.photo)
        page.wait_for_photo(get_size(example.photo))
        check_masks(page, pipe, downloads, example.photo, example.texts)
    big = Image.open(DOGS).resize((4000, 3000), Image.Resampling.LANCZOS)
    big.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "big.jpg", quality=95, exif=make_exif(6))
    page.give(DROP, tmp_path / "big.jpg")
    page.wait_for_photo((4000, 3000))
    check_masks(page, pipe, downloads, tmp_path / "big.jpg", EXAMPLES[0].texts)


def check_masks(page, pipe, downloads, photo, texts):
    """Compare the page's downloads and scores with the pipeline's results. The page's weights have 8 bits."""
    for text in texts:
        page.ask(text)
    page.wait_for_masks()
    for number, result in enumerate(pipe(photo, text=list(texts))):
        name = f"{number + 1}_{result['label'].replace(' ', '-')}.png"
        mask = read_mask(page.download(page.find_all(".sentences .save")[number], downloads, name))
        expected = np.asarray(result["mask"]) > 0
        assert mask.shape == expected.shape and compute_iou(mask, expected) >= 0.98, (photo, result["label"])
        score, share = re.findall(r"\d+\.\d+", page.results[number])
        assert abs(float(score) - result["score"]) < 0.02 and abs(float(share) / 100 - mask.mean()) < 1e-3
