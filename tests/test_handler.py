"""The handler of an Inference Endpoint and the server of `restr serve`: their answers, and what they refuse."""

import base64
import http.client
import json
import os
import re
import socket
import struct
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO, StringIO
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlencode

import numpy as np
import pytest
import torch
from fresh_process import run_without_package
from huggingface_hub import InferenceClient
from huggingface_hub.errors import BadRequestError
from pictures import encode, make_exif
from PIL import Image
from tiny_models import randomize
from tiny_training import make_model, make_processor

from modeling_restr import ReSTRForImageSegmentation, ReSTRPipeline, ReSTRProcessor
from modeling_restr.hub import save_bundle, serve as server_module
from modeling_restr.hub.handler import EndpointHandler, RequestError
from modeling_restr.hub.serve import DeadlineReader, Server


REPOSITORY = Path(__file__).resolve().parents[1]
WAIT = 600  # seconds, for a busy machine
BOUNDS = {
    "RESTR_MAX_IMAGE_BYTES": 30_000,
    "RESTR_MAX_IMAGE_PIXELS": 10_000,
    "RESTR_MAX_SENTENCES": 3,
    "RESTR_MAX_SENTENCE_LENGTH": 40,
}
TEXTS = ["the red square", "blue thing", "a box that is green"]

# Loads the handler of the folder argv[1] as an Endpoint's web service does, and answers the request in the file argv[2].
ENDPOINT = """
import importlib.util, json, sys

folder, request = sys.argv[1:]
spec = importlib.util.spec_from_file_location("handler.EndpointHandler", f"{folder}/handler.py")
sys.path.insert(0, folder)
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
spec.loader.exec_module(module)
handler = module.EndpointHandler(folder)
with open(request) as file:
    print(json.dumps(handler(json.load(file))))
"""


def make_image(seed: int = 0, size: tuple[int, int] = (60, 40)) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size)


def to_base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def read_masks(results: list[dict]) -> list[np.ndarray]:
    masks = [Image.open(BytesIO(base64.b64decode(result["mask"], validate=True))) for result in results]
    assert all(mask.format == "PNG" and mask.mode == "L" for mask in masks)
    return [np.asarray(mask) for mask in masks]


def assert_same(results: list[dict], expected: list[dict]) -> None:
    names = ("label", "score", "unknown_words", "truncated")
    assert [[result[name] for name in names] for result in results] == [[e[name] for name in names] for e in expected]
    assert all(result.keys() == {*names, "mask"} for result in results)
    for mask, result in zip(read_masks(results), expected, strict=True):
        np.testing.assert_array_equal(mask, np.asarray(result["mask"]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    processor = make_processor()
    model = randomize(make_model(processor), seed=1, std=0.4)
    return save_bundle(model, processor, tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture(scope="module")
def pipe(folder) -> ReSTRPipeline:
    model = ReSTRForImageSegmentation.from_pretrained(folder).eval()
    return ReSTRPipeline(model=model, processor=ReSTRProcessor.from_pretrained(folder), device="cpu")


@pytest.fixture(scope="module")
def handler(pipe, tmp_path_factory):
    plain = tmp_path_factory.mktemp("plain")  # without code, so that the cache of remote code stays empty
    save_bundle(pipe.model, pipe.processor, plain, include_code=False)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # a handler sets it for its process
        for name, value in BOUNDS.items():
            patch.setenv(name, str(value))
        yield EndpointHandler(str(plain))


@pytest.fixture(scope="module")
def url(handler):
    with Server(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def post(url: str, body: bytes | dict, query: dict | None = None, **headers) -> tuple[int, list | dict]:
    """Status and answer, which is always JSON."""
    if isinstance(body, dict):
        body, headers = json.dumps(body).encode(), {"Content-Type": "application/json", **headers}
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=WAIT)
    connection.request("POST", f"/?{urlencode(query)}" if query else "/", body, headers)
    response = connection.getresponse()
    assert response.headers["Content-Type"] == "application/json"
    answer = json.loads(response.read())
    connection.close()
    return response.status, answer


def make_request(image: Image.Image | None = None, **others) -> dict:
    return {"inputs": to_base64(encode(image or make_image())), "text": TEXTS[0], **others}


HEADS = ("data:image/png;base64,", "data:;base64,", "DATA:image/x;charset=utf-8;base64,")


@pytest.mark.parametrize(
    ("changes", "texts", "threshold"),
    [
        ({"text": TEXTS}, TEXTS, 0.5),
        ({"text": "\n".join(TEXTS) + "\n"}, TEXTS, 0.5),
        ({"text": None, "parameters": {"text": TEXTS, "threshold": None}}, TEXTS, 0.5),
        ({"text": TEXTS, "parameters": None}, TEXTS, 0.5),
        ({"parameters": {"threshold": 0.8}}, TEXTS[:1], 0.8),
        ({"parameters": {"mask_threshold": 0.8}}, TEXTS[:1], 0.8),
        ({"parameters": {"threshold": "0.8"}}, TEXTS[:1], 0.8),
        *(({"inputs": head + to_base64(encode(make_image()))}, TEXTS[:1], 0.5) for head in HEADS),
    ],
)
def test_answers_are_those_of_the_pipeline(url, pipe, changes, texts, threshold):
    status, results = post(url, make_request(**changes))
    assert status == 200
    assert_same(results, pipe(make_image(), text=texts, threshold=threshold))


def test_sentences_and_thresholds_give_different_masks(pipe):
    masks = [np.asarray(result["mask"]) for result in pipe(make_image(), text=TEXTS)]
    assert all(0 < np.count_nonzero(mask) < mask.size for mask in masks)
    masks.append(np.asarray(pipe(make_image(), text=TEXTS[0], threshold=0.8)[0]["mask"]))
    assert all((masks[0] != mask).any() for mask in masks[1:])


def test_photo_may_be_the_body_with_sentences_in_the_query(url, pipe):
    photo = encode(make_image())
    query = {"text": "\n".join(TEXTS[:2]), "threshold": 0.4}
    status, results = post(url, photo, query, **{"Content-Type": "image/png"})
    assert status == 200
    assert_same(results, pipe(make_image(), text=TEXTS[:2], threshold=0.4))


def test_pil_images_and_photos_of_cameras_are_read(handler, pipe):
    assert_same(handler({"inputs": make_image(), "text": TEXTS[0]}), pipe(make_image(), text=TEXTS[0]))
    turned = encode(make_image(), exif=make_exif(6))
    results = handler({"inputs": turned, "text": TEXTS[0]})
    assert_same(results, pipe(make_image().transpose(Image.Transpose.ROTATE_270), text=TEXTS[0]))
    preview = make_image(1, (6, 4))
    several = encode(make_image(), "MPO", save_all=True, append_images=[preview], quality=95)
    assert Image.open(BytesIO(several)).n_frames == 2
    photo = Image.open(BytesIO(encode(make_image(), "JPEG", quality=95)))
    assert_same(handler({"inputs": several, "text": TEXTS[0]}), pipe(photo, text=TEXTS[0]))


def test_open_files_are_read_from_the_start(handler, pipe):
    expected = pipe(make_image(), text=TEXTS[0])
    written = BytesIO()
    make_image().save(written, "PNG")
    for inputs in (
        written,
        BytesIO(written.getvalue()),
        bytearray(written.getvalue()),
        memoryview(written.getvalue()),
    ):
        assert_same(handler({"inputs": inputs, "text": TEXTS[0]}), expected)
    with pytest.raises(RequestError, match="at most 30000 bytes"):
        handler({"inputs": BytesIO(noise(40_000)), "text": TEXTS[0]})
    with pytest.raises(RequestError, match="got str"):
        handler({"inputs": StringIO("text"), "text": TEXTS[0]})


def test_unread_words_are_in_the_answer_and_in_the_log(url, caplog):
    texts = ["the red xyzzy", TEXTS[0], "the red red red red red zzz"]
    status, results = post(url, make_request(text=texts))
    assert status == 200
    assert [result["unknown_words"] for result in results] == [["xyzzy"], [], []]
    assert [result["truncated"] for result in results] == [False, False, True]
    (warning,) = (message for message in caplog.messages if "'xyzzy'" in message)
    assert "'xyzzy'" in warning and "'zzz'" in warning


def test_thirty_two_simultaneous_requests(url, handler, pipe, monkeypatch):
    images = [make_image(seed, (40 + seed, 30)) for seed in range(32)]
    texts = [TEXTS[: 1 + seed % 3][::-1] for seed in range(32)]
    start, busy, model = threading.Barrier(32), threading.Lock(), handler.pipe
    threads = set()

    def ask(number):
        request = make_request(images[number], text=texts[number])
        start.wait()
        return post(url, request)

    def ask_model(*args, **kwargs):
        assert busy.acquire(blocking=False), "two requests in the model at once"
        threads.add(threading.get_ident())
        try:
            return model(*args, **kwargs)
        finally:
            busy.release()

    monkeypatch.setattr(handler, "pipe", ask_model)
    ask_model.encode_image = model.encode_image
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(ask, range(32)))
    assert [status for status, _ in answers] == [200] * 32
    assert len(threads) == 1  # each would keep memory
    for (_, results), image, text in zip(answers, images, texts, strict=True):
        assert_same(results, pipe(image, text=text))


def test_latest_images_are_neither_decoded_nor_encoded_again(handler, pipe, monkeypatch):
    monkeypatch.setattr(handler, "max_cached_images", 2)
    handler._encoded_images.clear()
    encoded, encode_image = [], handler.pipe.encode_image
    monkeypatch.setattr(handler.pipe, "encode_image", lambda image: encoded.append(image) or encode_image(image))
    images = [make_image(seed) for seed in range(3)]
    for number, num_encoded in ((0, 1), (0, 1), (1, 2), (0, 2), (2, 3), (0, 3), (1, 4)):
        results = handler(make_request(images[number], text=TEXTS))
        assert_same(results, pipe(images[number], text=TEXTS))
        assert len(encoded) == num_encoded and len(handler._encoded_images) <= 2
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda number: handler(make_request(images[number % 3])), range(24)))
    for number, results in enumerate(answers):
        assert_same(results, pipe(images[number % 3], text=TEXTS[0]))
    assert len(handler._encoded_images) == 2


def test_inference_client_reads_the_answers(url, pipe, tmp_path):
    make_image().save(tmp_path / "photo.png")
    query = urlencode({"text": "\n".join(TEXTS[:2]), "threshold": 0.4})
    results = InferenceClient(f"{url}?{query}").image_segmentation(tmp_path / "photo.png")
    expected = pipe(make_image(), text=TEXTS[:2], threshold=0.4)
    assert [(r.label, r.score) for r in results] == [(e["label"], e["score"]) for e in expected]
    for result, wanted in zip(results, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(result.mask), np.asarray(wanted["mask"]))
    client = InferenceClient(url)
    with pytest.raises(BadRequestError, match="Expected 'text' next to 'inputs' or in 'parameters', got it 0 times"):
        client.image_segmentation(tmp_path / "photo.png", mask_threshold=0.4)


def claim_size(width: int, height: int) -> bytes:
    """A PNG file whose header claims a wrong size."""
    content = bytearray(encode(make_image()))
    content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


def noise(num_bytes: int) -> bytes:
    return np.random.default_rng(0).bytes(num_bytes)


FRAMES = {"save_all": True, "append_images": [make_image(1)]}
BAD_REQUESTS = {
    "no image": ({"inputs": None}, "Expected an image as 'inputs', got none"),
    "no text": ({"text": None}, "got it 0 times"),
    "two texts": ({"parameters": {"text": "blue thing"}}, "got it 2 times"),
    "unknown name": (
        {"threshold": 0.4},
        "Expected only inputs, text, parameters in the request, got threshold",
    ),
    "unknown parameter": ({"parameters": {"subtask": "semantic"}}, "in 'parameters', got subtask"),
    "parameters as a list": ({"parameters": []}, "'parameters' as an object with text, .* got list"),
    "a number as text": ({"text": 5}, "Expected 'text' as a list of sentences"),
    "half a character": ({"text": "dog \ud83d"}, "Expected sentences in Unicode"),
    "numbers as sentences": ({"text": ["a", 5]}, "Expected 'text' as a list of sentences"),
    "no sentences": ({"text": []}, "Expected 1 to 3 sentences, got 0"),
    "an empty sentence": ({"text": " \n "}, "Expected 1 to 3 sentences, got 0"),
    "a sentence without words": ({"text": ["blue thing", "  "]}, "sentences with at least one word, got '  '"),
    "too many sentences": ({"text": ["blue thing"] * 4}, "Expected 1 to 3 sentences, got 4"),
    "too long a sentence": ({"text": "blue " * 9}, "at most 40 characters, got 45"),
    "a threshold above 1": ({"parameters": {"threshold": 1.5}}, "Expected one threshold from 0 to 1"),
    "NaN as threshold": ({"parameters": {"threshold": float("nan")}}, "Expected one threshold from 0 to 1"),
    "a word as threshold": ({"parameters": {"mask_threshold": "low"}}, "Expected one threshold from 0 to 1"),
    "truth as threshold": ({"parameters": {"threshold": True}}, "Expected one threshold from 0 to 1"),
    "two thresholds": ({"parameters": {"threshold": 0.4, "mask_threshold": 0.6}}, "Expected one threshold"),
    "a list of images": ({"inputs": ["iVBO"]}, "Expected an image as base64 in 'inputs', got list"),
    "no base64": ({"inputs": "***"}, "as standard base64 in one line"),
    "letters beyond ASCII": ({"inputs": "ü" * 8}, "as standard base64 in one line"),
    "an empty image": ({"inputs": ""}, "Expected an image in 'inputs' .*, got something else"),
    "no image file": ({"inputs": to_base64(noise(300))}, "Expected an image in 'inputs' .*, got something else"),
    "a format that runs programs": ({"inputs": to_base64(encode(make_image(), "EPS"))}, "got something else"),
    "half of an image": ({"inputs": to_base64(encode(make_image())[:-2000])}, "complete image .* got a damaged one"),
    "too many bytes": ({"inputs": to_base64(noise(30_001))}, "at most 30000 bytes, got 30001"),
    "too many bytes, no base64": ({"inputs": "*" * 40_004}, "at most 30000 bytes, got 30003"),
    "too many pixels": (
        {"inputs": to_base64(encode(make_image(0, (101, 100))))},
        "1 to 10000 pixels, got a larger one",
    ),
    "a bomb": ({"inputs": to_base64(claim_size(60_000, 60_000))}, "1 to 10000 pixels, got a larger one"),
    "an animation": ({"inputs": to_base64(encode(make_image(), "GIF", **FRAMES))}, "several frames or pages"),
    "an animated PNG": ({"inputs": to_base64(encode(make_image(), "PNG", **FRAMES))}, "several frames or pages"),
    "pixels that are not finite": (
        {"inputs": to_base64(encode(Image.fromarray(np.full((9, 9), np.nan, np.float32)), "TIFF"))},
        "cannot be read: expected values in 0..1 or 0..255",
    ),
    "several pages": ({"inputs": to_base64(encode(make_image(), "TIFF", **FRAMES))}, "several frames or pages"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_REQUESTS.values(), ids=BAD_REQUESTS)
def test_bad_requests_are_explained(url, changes, message):
    status, answer = post(url, make_request(**changes))
    assert status == 400 and answer.keys() == {"error"}
    assert re.search(message, answer["error"]) and len(answer["error"]) < 300


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # as a handler does in its process
def test_images_at_the_limits_are_read(url, handler):
    exact = encode(make_image(0, (100, 100)), "BMP")  # of known size
    assert 30_000 < len(exact) < 30_100
    status, answer = post(url, {"inputs": to_base64(exact), "text": TEXTS[0]})
    assert status == 400 and "30000 bytes" in answer["error"]
    status, results = post(url, make_request(make_image(0, (100, 100)), text=["blue " * 8] * 3))
    assert status == 200 and len(results) == 3


def test_pillow_refuses_bombs_that_the_server_decodes_itself(handler):
    with pytest.raises(Image.DecompressionBombError):
        Image.open(BytesIO(claim_size(60_000, 60_000)))
    with pytest.raises(ValueError, match="Expected an image of 1 to 10000 pixels, got 101 x 100"):
        handler({"inputs": make_image(0, (101, 100)), "text": TEXTS[0]})


def test_neither_paths_nor_urls_are_opened(url, tmp_path):
    asked = []

    class Photo(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(encode(make_image()))

    path = tmp_path / "photo.png"
    make_image().save(path)
    (tmp_path / "abcd").write_bytes(path.read_bytes())
    with ThreadingHTTPServer(("127.0.0.1", 0), Photo) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        urls = [f"http://127.0.0.1:{server.server_port}/photo.png", path.as_uri(), "HTTPS://127.0.0.1/photo.png"]
        for inputs in urls:
            status, answer = post(url, {"inputs": inputs, "text": TEXTS[0]})
            assert status == 400 and "URLs are not opened" in answer["error"]
        server.shutdown()
    for inputs in (str(path), "/etc/passwd", os.path.relpath(path)):
        status, answer = post(url, {"inputs": inputs, "text": TEXTS[0]})
        assert status == 400 and re.search("Paths are not opened|got something else", answer["error"])
    assert not asked


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, ValueError, KeyError, OSError, TypeError])
def test_failure_of_the_model_is_only_logged(url, handler, monkeypatch, caplog, error):
    def fail(*args, **kwargs):
        raise error("at /secret/place")

    monkeypatch.setattr(handler.pipe, "postprocess", fail)
    status, answer = post(url, make_request())
    assert status == 500
    assert answer == {"error": "The model failed on this request; the server's log says why."}
    assert "at /secret/place" in caplog.text
    monkeypatch.undo()
    assert post(url, make_request())[0] == 200


def test_weights_that_are_not_finite_give_status_500(url, handler, caplog):
    bias = handler.pipe.model.model.fusion.visual_projection.bias
    kept = bias.detach().clone()
    try:
        torch.nn.init.constant_(bias, float("nan"))
        status, answer = post(url, make_request())
    finally:
        bias.data.copy_(kept)
    assert (status, answer["error"]) == (500, "The model failed on this request; the server's log says why.")
    assert "finite" in caplog.text


def test_bad_requests_raise_request_errors(handler):
    for data in (None, {}, {"inputs": 5, "text": "dog"}, {"inputs": make_image(), "text": [" "]}):
        with pytest.raises(RequestError):
            handler(data)


@pytest.mark.parametrize("value", ["0", "-1", "many", "1e6", ""])
def test_limits_have_to_be_positive_integers(monkeypatch, value):
    monkeypatch.setenv("RESTR_MAX_SENTENCES", value)
    with pytest.raises(ValueError, match="positive integer in the environment variable RESTR_MAX_SENTENCES"):
        EndpointHandler("path")


def test_server_refuses_bodies_of_wrong_length_or_content(url):
    json_type = {"Content-Type": "application/json"}
    for length in ("100000000", "-1", "many", "9" * 5000):
        status, answer = post(url, b"{}", **json_type, **{"Content-Length": length})
        assert status == 413 and "Expected a Content-Length of at most" in answer["error"]
    for body in (b"{", b"\xff", b"[" * 20_000):
        status, answer = post(url, body, **json_type)
        assert status == 400 and "Expected JSON" in answer["error"]
    status, answer = post(url, b"[1]", {"text": "blue thing"}, **json_type)
    assert status == 400 and "Expected the request as an object" in answer["error"]


def send(url: str, request: bytes) -> bytes:
    """Everything that the server sends until it closes the connection."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=WAIT) as connection:
        connection.sendall(request)
        return b"".join(iter(lambda: connection.recv(1000), b""))


@pytest.mark.parametrize("path", ["/", "/health", "/health?verbose=1"])
@pytest.mark.parametrize("version", ["1.0", "1.1", "2", "2.0", "3.11"])
def test_server_reports_its_health(url, path, version):
    headers, body = send(url, f"GET {path} HTTP/{version}\r\nConnection: close\r\n\r\n".encode()).split(b"\r\n\r\n")
    assert headers.startswith(b"HTTP/1.1 200 OK\r\n")
    assert json.loads(body) == {"status": "ok"}


@pytest.mark.parametrize("request_line", ["GET /\r\n", "GET / HTTP/0.9\r\n\r\n"])
def test_http_0_9_is_answered_without_headers(url, request_line):
    assert json.loads(send(url, request_line.encode())) == {"status": "ok"}


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        ("GET /photo.png HTTP/1.1", 404),
        ("PUT / HTTP/1.1", 501),
        ("GET / HTTP/one", 400),
        ("GET / a photo HTTP/1.1", 400),
        (f"GET /{'a' * 70_000} HTTP/1.1", 414),
    ],
)
def test_server_refuses_in_json(url, request_line, status):
    headers, body = send(url, f"{request_line}\r\nConnection: close\r\n\r\n".encode()).split(b"\r\n\r\n")
    assert headers.startswith(f"HTTP/1.1 {status} ".encode()) and json.loads(body).keys() == {"error"}


def test_head_gets_no_body(url):
    answer = send(url, b"HEAD /health HTTP/1.1\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 ") and answer.endswith(b"\r\n\r\n")


def test_a_request_has_a_deadline_however_slowly_it_arrives(monkeypatch):
    moments = iter([0, 4, 8, 12])
    monkeypatch.setattr(server_module, "time", SimpleNamespace(monotonic=lambda: next(moments)))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"dripping")
        reader, buffer = DeadlineReader(ours), bytearray(1)
        reader.deadline = 10
        assert [reader.readinto(buffer) for _ in range(3)] == [1, 1, 1]
        assert ours.gettimeout() == 2
        with pytest.raises(TimeoutError, match="did not arrive in time"):
            reader.readinto(buffer)


def test_a_slow_client_is_dropped(url, monkeypatch):
    moments = iter([0, 1])  # for the first line
    monkeypatch.setattr(server_module, "time", SimpleNamespace(monotonic=lambda: next(moments, 61)))
    assert send(url, b"POST / HTTP/1.1\r\nContent-Length: 5000\r\n\r\n" + b"a" * 4000) == b""


def make_handler(answer):
    """A handler without a model, which answers with a function's result."""
    bounds = {"max_bytes": 1000, "max_sentences": 1, "max_sentence_length": 10}
    return type("Handler", (), {**bounds, "__call__": lambda self, data: answer(data)})()


def test_a_client_that_leaves_is_not_an_error(handler, capfd):
    """Before its request, in the middle of it, and while the model runs."""
    asked, left = threading.Event(), threading.Event()

    def ask_model(data):
        asked.set()
        left.wait()
        return [{"label": "dog"}] * 100_000

    head = b"POST / HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 4\r\n\r\n"
    with Server(("127.0.0.1", 0), make_handler(ask_model)) as server:
        server.daemon_threads = False  # so that the server waits for them at the end
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for request in (b"", head + b"nu", head + b"null"):
            connection = socket.create_connection(server.server_address, timeout=WAIT)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closes with a reset
            connection.sendall(request)
            if request.endswith(b"null"):
                asked.wait()
            connection.close()
        left.set()
        server.shutdown()
    assert "Traceback" not in capfd.readouterr().err


def test_a_request_beyond_the_limit_is_refused_at_once():
    asked, answered = threading.Event(), threading.Event()

    def ask_model(data):
        asked.set()
        answered.wait(WAIT)
        return []

    with Server(("127.0.0.1", 0), make_handler(ask_model)) as server, ThreadPoolExecutor(1) as pool:
        server.places = threading.BoundedSemaphore(1)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        waiting = pool.submit(post, url, {})
        assert asked.wait(WAIT)
        status, answer = post(url, {})
        answered.set()
        assert status == 503 and "Try again later" in answer["error"]
        assert waiting.result() == (200, []) == post(url, {})
        server.shutdown()


def test_an_endpoint_without_the_package_answers_from_the_folder(folder, pipe, tmp_path):
    (tmp_path / "request.json").write_text(json.dumps(make_request(text=TEXTS)))
    environment = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    printed = run_without_package(ENDPOINT, folder, tmp_path / "request.json", cwd=tmp_path, **environment)
    assert_same(json.loads(printed.splitlines()[-1]), pipe(make_image(), text=TEXTS))
