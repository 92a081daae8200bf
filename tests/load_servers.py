"""
Load on a server: many clients ask at the same time, and each answer is compared with the pipeline's in this process.

    python tests/load_servers.py --what endpoint
    python tests/load_servers.py --what demo

`endpoint` is `restr serve`, and `demo` is examples/space/app.py, with its API and its page's events. A client sends its
next request when it has an answer. Photographs are drawn from more than the servers keep in memory. Some requests are
bad, and have to be refused with their reason. The report counts answers by kind and has the latency and the memory of
the server. The exit code is 1 if an answer is wrong or missing.
"""

import base64
import itertools
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from enum import StrEnum
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from uuid import uuid4

import httpx
import numpy as np
import psutil
import typer
from PIL import Image
from transformers import pipeline

import modeling_restr  # noqa: F401  (registers the pipeline's task)


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SENTENCES = (
    "the person",
    "the man on the left",
    "the biggest thing",
    "the thing on the right",
    "the red thing",
    "the white thing",
    "the dog at the bottom",
    "the clock",
    "the bus",
    "the plane",
    "the pizza on the table",
    "the flowers at the top",
)
THRESHOLDS = (0.3, 0.5)
CASES_PER_PHOTO = 2
BAD_SHARE = 0.1  # of the rounds of a client
# float32 noise between batches and attention kernels moves few pixels; the page rounds scores to two decimals.
MAX_OTHER_PIXELS, MAX_SCORE_DIFFERENCE = 0.001, 0.006

Answer = list[tuple[str, float, np.ndarray]]  # sentence, score and mask (bool)


class Case(NamedTuple):
    """A photograph with sentences. `expected` has an answer per threshold, or what a refusal has to say."""

    photo: Path
    texts: list[str]
    expected: dict[float, Answer | str]


class RefusedError(Exception):
    """The server's reason for not answering a request."""


class BusyError(Exception):
    """Too many requests are waiting."""


def write_photos(folder: Path) -> list[Path]:
    """Write the shipped photographs, each mirrored and rotated in five ways."""
    paths = []
    for path in sorted((EXAMPLES / "photos").glob("**/*.jpg")):
        with Image.open(path) as photo:
            for change in tuple(Image.Transpose)[:5]:
                paths.append(folder / f"{path.stem}_{change.name.lower()}.jpg")
                photo.transpose(change).save(paths[-1], quality=90)
    return paths


def agree(answer: Answer, expected: Answer) -> bool:
    if [text for text, _, _ in answer] != [text for text, _, _ in expected]:
        return False
    return all(
        mask.shape == other.shape
        and (mask != other).mean() <= MAX_OTHER_PIXELS
        and abs(score - other_score) <= MAX_SCORE_DIFFERENCE
        for (_, score, mask), (_, other_score, other) in zip(answer, expected)
    )


def make_cases(model: str, folder: Path) -> list[Case]:
    """Ask the pipeline. Cases with an empty mask, or with the answer of another case, are left out."""
    pipe: Any = pipeline("referring-image-segmentation", model=model)
    rng, cases = random.Random(0), []
    known: list[Answer] = []
    for photo in write_photos(folder):
        encoded = pipe.encode_image(str(photo))
        for number in range(1, CASES_PER_PHOTO + 1):
            texts = rng.sample(SENTENCES, number)
            expected = {
                threshold: [
                    (result["label"], result["score"], np.asarray(result["mask"]) > 0)
                    for result in pipe(encoded, text=texts, threshold=threshold)
                ]
                for threshold in THRESHOLDS
            }
            answers = list(expected.values())
            pairs = itertools.chain(itertools.combinations(answers, 2), itertools.product(answers, known))
            if all(mask.any() for answer in answers for _, _, mask in answer) and not any(agree(*p) for p in pairs):
                cases.append(Case(photo, texts, expected))
                known += answers
    return cases


def make_bad_cases(cases: list[Case], folder: Path) -> list[Case]:
    """Requests that must be refused, and the reasons of endpoint and demo."""
    damaged = folder / "damaged.jpg"
    damaged.write_bytes(b"not an image")
    no_image = "Expected an image in 'inputs'|This file cannot be read as an image"
    photo, texts, _ = cases[0]
    return [
        Case(damaged, texts, dict.fromkeys(THRESHOLDS, no_image)),
        Case(photo, [], dict.fromkeys(THRESHOLDS, "Expected 1 to 32 sentences, got 0|There is no sentence yet")),
        Case(photo, texts, {1.5: "Expected one threshold from 0 to 1|The threshold is a probability"}),
    ]


class EndpointClient:
    """A client of `restr serve`."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=url, timeout=None)

    def ask(self, case: Case, threshold: float) -> Answer:
        photo = base64.b64encode(case.photo.read_bytes()).decode()
        request = {"inputs": photo, "text": case.texts, "parameters": {"threshold": threshold}}
        response = self.http.post("/", json=request)
        if response.status_code == 503:
            raise BusyError
        if response.status_code == 400:
            raise RefusedError(response.json()["error"])
        response.raise_for_status()
        return [
            (result["label"], result["score"], read_mask(base64.b64decode(result["mask"])))
            for result in response.json()
        ]

    def list_requests(self) -> list[Callable[[Case, float], Answer]]:
        return [self.ask]


class DemoClient:
    """A visitor of the demo: a session that speaks to its queue as the page does."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=url, timeout=None)
        self.session = uuid4().hex
        functions = self.http.get("config").raise_for_status().json()["dependencies"]
        self.ids = {function["api_name"]: function["id"] for function in functions}

    def list_requests(self) -> list[Callable[[Case, float], Answer]]:
        return [self.ask_api, self.press_segment, self.move_slider]

    def ask_api(self, case: Case, threshold: float) -> Answer:
        records, files = self._call("segment", [self._upload(case.photo), "\n".join(case.texts), threshold])
        return [
            (record["label"], record["score"], read_mask(self._download(file)))
            for record, file in zip(records, files, strict=True)
        ]

    def press_segment(self, case: Case, threshold: float) -> Answer:
        inputs = [self._upload(case.photo), "\n".join(case.texts), threshold]
        return self._read_page(self._call("ask_and_show", inputs)[1:])

    def move_slider(self, case: Case, threshold: float) -> Answer:
        """Only `press_segment` says which photograph and sentences the page shows."""
        return self._read_page(self._call("show", [None, threshold]))

    def _upload(self, photo: Path) -> dict[str, Any]:
        response = self.http.post("gradio_api/upload", files={"files": (photo.name, photo.read_bytes())})
        return {"path": response.raise_for_status().json()[0], "meta": {"_type": "gradio.FileData"}}

    def _download(self, file: dict[str, Any]) -> bytes:
        return self.http.get(f"gradio_api/file={file['path']}").raise_for_status().content

    def _call(self, name: str, data: list[Any]) -> list[Any]:
        """Put a call into the queue, and wait for what it returns."""
        call = {"data": data, "fn_index": self.ids[name], "session_hash": self.session}
        response = self.http.post("gradio_api/queue/join", json=call)
        if response.status_code == 503:
            raise BusyError
        response.raise_for_status()
        with self.http.stream("GET", "gradio_api/queue/data", params={"session_hash": self.session}) as events:
            for line in events.iter_lines():
                event = json.loads(line.removeprefix("data:")) if line else {"msg": "heartbeat"}
                if event["msg"] == "process_completed":
                    completed = event
        if not completed["success"]:
            raise RefusedError(completed["output"].get("error"))
        return completed["output"]["data"]

    def _read_page(self, outputs: list[Any]) -> Answer:
        overlay, cards, download = (output.get("value") if isinstance(output, dict) else output for output in outputs)
        sentences = [annotation["label"].split("  ", 1)[1] for annotation in overlay["annotations"]]
        scores = [float(score) for score in re.findall(r"score (\d\.\d\d) · ", cards)]
        with zipfile.ZipFile(BytesIO(self._download(download))) as archive:
            masks = [read_mask(archive.read(name)) for name in archive.namelist()]
        return list(zip(sentences, scores, masks, strict=True))


def read_mask(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(png))) > 0


class What(StrEnum):
    endpoint = "endpoint"
    demo = "demo"


COMMANDS = {
    What.endpoint: ["-m", "modeling_restr.cli", "serve", "--port", "0"],
    What.demo: [str(EXAMPLES / "space" / "app.py")],
}
CLIENTS = {What.endpoint: EndpointClient, What.demo: DemoClient}


@contextmanager
def serve(what: What, model: str, folder: Path) -> Iterator[tuple[psutil.Popen, str]]:
    """Start a server on a free port: its process and URL. Its log is `server.log` in `folder`."""
    command = [sys.executable, *COMMANDS[what], *([model] if what == What.endpoint else [])]
    settings = {"MODEL_ID": model, "GRADIO_TEMP_DIR": str(folder / "gradio"), "GRADIO_ANALYTICS_ENABLED": "False"}
    environment = {**os.environ, **settings, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    with open(folder / "server.log", "w") as log:
        process = psutil.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        try:
            lines = iter(process.stdout.readline, "")
            yield process, next(match[0] for match in (re.search(r"http://\S+", line) for line in lines) if match)
        finally:
            process.terminate()
            process.wait()


def measure_memory(process: psutil.Process) -> float:
    """Megabytes of a process and its children. Pages that they share count once."""
    processes = [process, *process.children(recursive=True)]
    return sum(one.memory_full_info().pss for one in processes) / 1e6


def check(send: Callable[[Case, float], Answer], case: Case, threshold: float) -> str:
    """Send a request, and name the kind of its answer."""
    expected = case.expected[threshold]
    try:
        answer = send(case, threshold)
    except BusyError:
        return "busy"
    except RefusedError as error:
        is_right = isinstance(expected, str) and re.search(expected, str(error))
        return "refused with the reason" if is_right else f"refused wrongly: {error}"
    except (httpx.HTTPError, ValueError, KeyError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "right" if not isinstance(expected, str) and agree(answer, expected) else "wrong"


def run_client(
    client: Any, seed: int, cases: list[Case], bad_cases: list[Case], end: float
) -> list[tuple[str, float]]:
    """Ask until `end`. Returns the kind of each answer and its latency in seconds."""
    rng, records = random.Random(seed), []
    while time.monotonic() < end:
        is_bad = rng.random() < BAD_SHARE
        case = rng.choice(bad_cases if is_bad else cases)
        sends = client.list_requests()[:1] if is_bad else client.list_requests()
        for send in sends:
            threshold = rng.choice(list(case.expected))
            start = time.monotonic()
            kind = check(send, case, threshold)
            records.append((f"{send.__name__}: {kind}", time.monotonic() - start))
            if kind != "right" or time.monotonic() > end:
                break  # after an error, the slider would show an earlier answer
    return records


def report(records: list[tuple[str, float]], memory: list[tuple[float, float]]) -> bool:
    """Print the results. Returns whether all answers were right."""
    kinds = Counter(kind for kind, _ in records)
    for kind, number in kinds.most_common():
        print(f"{number:7,}  {kind}")
    times, sizes = np.array(memory).T
    latencies = [latency for kind, latency in records if kind.endswith(": right")]
    middle, high, highest = np.percentile(latencies, [50, 95, 99])
    print(f"{len(latencies) / times[-1]:.1f} right answers per second")
    print(f"latency of right answers: p50 {middle:.2f} s, p95 {high:.2f} s, p99 {highest:.2f} s")
    later = times >= times[-1] / 5
    slope = np.polyfit(times[later], sizes[later], 1)[0] * 60
    first, last = sizes[later][[0, -1]]
    print(
        f"memory: {first:.0f} MB after {times[later][0]:.0f} s, {last:.0f} MB at the end, {slope:+.1f} MB per minute"
    )
    return all(kind.endswith((": right", ": refused with the reason", ": busy")) for kind in kinds)


def put_load(
    what: What, model: str, folder: Path, cases: list[Case], num_clients: int, seconds: float
) -> tuple[list[tuple[str, float]], list[tuple[float, float]]]:
    """Let clients ask a server. Returns its answers by kind with their latency, and its memory by time."""
    bad_cases = make_bad_cases(cases, folder)
    with serve(what, model, folder) as (process, url), ThreadPoolExecutor(num_clients) as pool:
        clients = [CLIENTS[what](url) for _ in range(num_clients)]
        start, memory = time.monotonic(), []
        run = partial(run_client, cases=cases, bad_cases=bad_cases, end=start + seconds)
        futures = [pool.submit(run, client, seed) for seed, client in enumerate(clients)]
        while not all(future.done() for future in futures):
            memory.append((time.monotonic() - start, measure_memory(process)))
            time.sleep(1)
    return [record for future in futures for record in future.result()], memory


def main(
    what: Annotated[What, typer.Option(help="Server: `restr serve` or the demo.")],
    clients: Annotated[int, typer.Option(help="Number of clients.")] = 64,
    seconds: Annotated[float, typer.Option(help="Time in which clients send requests.")] = 300,
    model: Annotated[str, typer.Option(help="Folder or Hub id of the model.")] = str(EXAMPLES / "restr_mini"),
) -> None:
    """Put load on a server, and report its answers, latency and memory."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cases = make_cases(model, folder)
        num_photos = len({case.photo for case in cases})
        print(f"{what.value}, {clients} clients, {len(cases)} cases about {num_photos} photographs", flush=True)
        records, memory = put_load(what, model, folder, cases, clients, seconds)
        num_tracebacks = (folder / "server.log").read_text().count("Traceback")
    is_right = report(records, memory)
    print(f"{num_tracebacks} tracebacks in the server's log")
    raise SystemExit(0 if is_right and not num_tracebacks else 1)


if __name__ == "__main__":
    typer.run(main)
