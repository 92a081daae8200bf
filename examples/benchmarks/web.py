"""Size, times and memory of an exported page in a headless Chromium, next to ONNX Runtime in Python."""

import functools
import http.server
import json
import shutil
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import psutil
import torch
from selenium import webdriver

from modeling_restr.export.web import HEADERS
from modeling_restr.files import write_json

from .measuring import describe_machine


GRAPHS = ("image_encoder", "sentence_query")
WAIT = 300  # seconds
# Seconds until the model is ready, until the first mask, per photo and per sentence.
SCRIPT = """
const [runs, done] = arguments;
const worker = new Worker("worker.js", { type: "module" });
const ask = (message) => new Promise((resolve, reject) => {
  worker.onmessage = ({ data }) => {
    if (data.type === "error") reject(data.message);
    else if (data.type !== "progress") resolve(data);
  };
  worker.postMessage(message);
});
(async () => {
  const blob = await (await fetch("examples/1.jpg")).blob();
  const start = performance.now();
  const measure = () => (performance.now() - start) / 1000;
  const segment = () => ask({ type: "segment", id: 1, texts: ["the dog on the left"] });
  const { backend, threads } = await ask({ type: "load" });
  const ready = measure();
  await ask({ type: "encode", id: 1, blob });
  await segment();
  const firstMask = measure();
  const [photo, sentence] = [[], []];
  for (let run = 0; run < runs; run++) {
    photo.push((await ask({ type: "encode", id: 1, blob })).seconds);
    sentence.push((await segment()).seconds);
  }
  return { backend, threads, ready, firstMask, photo, sentence };
})().then(done, (error) => done({ error: String(error) }));
"""


def benchmark_web(folder: Path, runs: int = 5, output_dir: Path | None = None) -> None:
    """
    Measure a folder that `restr export --web` wrote, with an example photo in it. Prints one row per way to run the
    model, and writes `results.json` to `output_dir`. Downloads come from this machine, so that their time is left out.
    """
    results = {"onnxruntime in Python": measure_python(folder, runs)}
    for name, headers in (("page", HEADERS), ("page, one thread", {})):
        results[name] = measure_page(folder, headers, runs)
    print(json.dumps(results, indent=2))
    if output_dir is not None:
        output_dir.mkdir(parents=True, exist_ok=True)
        machine = describe_machine(torch.device("cpu")) | {"onnxruntime": onnxruntime.__version__}
        write_json(output_dir / "results.json", {"results": results, "machine": machine})


def measure_python(folder: Path, runs: int) -> dict[str, Any]:
    """The same graphs in this process."""
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    pixel_values = np.zeros((1, 3, *settings["imageSize"]), dtype=np.float32)
    words = {
        "input_ids": np.ones((1, settings["tokenizer"]["maxLength"]), dtype=np.int64),
        "image_indices": np.zeros(1, dtype=np.int64),
    }
    before = psutil.Process().memory_info().rss
    start = time.perf_counter()
    encoder, query = (onnxruntime.InferenceSession(folder / f"{graph}.onnx") for graph in GRAPHS)
    ready = time.perf_counter() - start
    seconds: dict[str, list[float]] = {"photo": [], "sentence": []}
    first_mask = 0.0
    for _ in range(runs + 1):
        begun = time.perf_counter()
        (vision_embeds,) = encoder.run(None, {"pixel_values": pixel_values})
        encoded = time.perf_counter()
        query.run(None, {"vision_embeds": vision_embeds, **words})
        answered = time.perf_counter()
        seconds["photo"].append(encoded - begun)
        seconds["sentence"].append(answered - encoded)
        first_mask = first_mask or answered - start
    return {
        "megabytes": round(sum((folder / f"{graph}.onnx").stat().st_size for graph in GRAPHS) / 1e6, 1),
        "seconds_until_ready": round(ready, 2),
        "seconds_until_the_first_mask": round(first_mask, 2),
        **{f"seconds_per_{name}": round(statistics.median(values[1:]), 3) for name, values in seconds.items()},
        "memory_in_megabytes": round((psutil.Process().memory_info().rss - before) / 1e6),
    }


def measure_page(folder: Path, headers: dict[str, str], runs: int) -> dict[str, Any]:
    with serve(folder, headers) as server, open_chromium() as driver:
        driver.get(f"http://127.0.0.1:{server.server_port}/settings.json")  # without the page's own scripts
        server.num_bytes = 0
        found = driver.execute_async_script(SCRIPT, runs)
        if "error" in found:
            raise ValueError(f"The page reported: {found['error']}")
        processes = psutil.Process(driver.service.process.pid).children(recursive=True)
        memory = max(process.memory_info().rss for process in processes)
    return {
        "megabytes": round(server.num_bytes / 1e6, 1),
        "seconds_until_ready": round(found["ready"], 2),
        "seconds_until_the_first_mask": round(found["firstMask"], 2),
        **{f"seconds_per_{name}": round(statistics.median(found[name]), 3) for name in ("photo", "sentence")},
        "memory_in_megabytes": round(memory / 1e6),
        "backend": found["backend"],
        "threads": found["threads"],
    }


class _Server(http.server.ThreadingHTTPServer):
    num_bytes = 0


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Serves files with some headers, and counts their bytes."""

    def __init__(self, *args: Any, headers: dict[str, str], **kwargs: Any) -> None:
        self.own_headers = headers
        super().__init__(*args, **kwargs)

    def send_header(self, keyword: str, value: str) -> None:
        if keyword == "Content-Length":
            self.server.num_bytes += int(value)  # type: ignore[attr-defined]
        super().send_header(keyword, value)

    def end_headers(self) -> None:
        for name, value in self.own_headers.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serve(folder: Path, headers: dict[str, str]) -> Iterator[_Server]:
    handler = functools.partial(_Handler, directory=str(folder), headers=headers)
    with _Server(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@contextmanager
def open_chromium() -> Iterator[Any]:
    chromium, chromedriver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        raise ValueError("Expected Chromium and its driver, got none: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    driver.set_script_timeout(WAIT)
    try:
        yield driver
    finally:
        driver.quit()
