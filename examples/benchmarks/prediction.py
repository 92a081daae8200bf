"""
`restr predict` compared with plain loops over the pipeline, in turns within one run, and its memory.

Two actors are compared with two loops, which share the machine's cores and memory bandwidth in the same way. Rates are
measured from the first to the last result, without Ray's start of about ten seconds. On a busy machine, CPU seconds are
more reliable than rates. They include all processes, also Ray's own and this one, which takes the samples.
"""

import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageFilter
from transformers import pipeline

from modeling_restr import ReSTRConfig, ReSTRImageProcessor, ReSTRProcessor, ReSTRVisionConfig, build_tokenizer
from modeling_restr.prediction.engine import predict
from modeling_restr.tokenization_restr import vocabulary_from_expressions

from .measuring import create_model, tiny_config


WORDS = ("the", "left", "right", "upper", "big", "small", "red", "green", "blue", "dog", "cat", "bowl", "car", "man")
PHOTO_SIZE = (640, 480)
MIB = 2**20


def benchmark_throughput(image_size: int, runs: int, num_images: int = 24, num_sentences: int = 4) -> None:
    """Measure images per second at the paper's size with random weights: one and two loops, one and two actors."""
    names = ("one loop", "one actor", "two loops", "two actors")
    rates: dict[str, list[float]] = {name: [] for name in names}
    costs: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        model, data = Path(folder, "model"), Path(folder, "data")
        _save_model(model, ReSTRConfig(vision_config=ReSTRVisionConfig(image_size=image_size)))
        write_photos(data, num_images, num_sentences)
        for _ in range(runs):
            for name in names:
                measure = _time_loops if name.endswith(("loop", "loops")) else _time_actors
                rate, cost = measure(model, data, 1 if name.startswith("one") else 2)
                rates[name].append(rate)
                costs[name].append(cost)
                print(f"{name}: {rate:.4f} images/s, {cost:.2f} CPU s per image", flush=True)
    for name in names:
        rate, cost = statistics.median(rates[name]), statistics.median(costs[name])
        print(f"{name}: {rate:.4f} images/s, {cost:.2f} CPU s per image (medians)")
    for actors, loops in (("one actor", "one loop"), ("two actors", "two loops")):
        rate, cost = (
            statistics.median(values[actors]) / statistics.median(values[loops]) for values in (rates, costs)
        )
        print(f"{actors} / {loops}: {rate:.3f} of the images/s, {cost:.3f} of the CPU s")


def benchmark_memory(numbers_of_images: tuple[int, ...] = (1000, 10_000)) -> None:
    """Measure the peak memory of all processes together (PSS, with the object store), with a tiny model at 240x240."""
    for number in numbers_of_images:
        with tempfile.TemporaryDirectory() as folder:
            model, data = Path(folder, "model"), Path(folder, "data")
            _save_model(model, tiny_config(image_size=240))
            write_photos(data, number, num_sentences=1)
            with sample_processes(with_memory=True) as samples:
                start = time.perf_counter()
                predict(str(model), str(data), Path(folder, "output"), pairs_per_file=200)
            seconds = time.perf_counter() - start
            peak = max(sample.memory for sample in samples)
            print(f"{number} images: at most {peak / MIB:.0f} MiB, {seconds:.0f} s", flush=True)


def _save_model(folder: Path, config: ReSTRConfig) -> None:
    tokenizer = build_tokenizer(vocabulary_from_expressions([" ".join(WORDS)]))
    create_model(config, torch.device("cpu")).save_pretrained(folder)
    size = {"height": config.vision_config.image_size, "width": config.vision_config.image_size}
    ReSTRProcessor(ReSTRImageProcessor(size=size), tokenizer).save_pretrained(folder)


def write_photos(folder: Path, num_images: int, num_sentences: int) -> None:
    """Write a Parquet file with JPEG images of smooth noise, 100 rows per row group."""
    rng = np.random.default_rng(0)
    text = datasets.Value("string")
    features = datasets.Features({"image": datasets.Image(), "texts": datasets.List(text)})
    sentences = [" ".join(rng.choice(WORDS, 4)) for _ in range(num_sentences)]
    noise = [rng.integers(0, 256, (PHOTO_SIZE[1] // 8, PHOTO_SIZE[0] // 8, 3), dtype=np.uint8) for _ in range(20)]
    photos = [Image.fromarray(pixels).resize(PHOTO_SIZE).filter(ImageFilter.BLUR) for pixels in noise]
    folder.mkdir()
    for index, photo in enumerate(photos):
        photo.save(folder / f"{index}.jpg")
    files = [{"bytes": (folder / f"{index}.jpg").read_bytes(), "path": None} for index in range(len(photos))]
    with pq.ParquetWriter(folder / "val.parquet", features.arrow_schema) as writer:
        for start in range(0, num_images, 100):
            group = [files[index % len(files)] for index in range(start, min(start + 100, num_images))]
            writer.write_table(pa.table([group, [sentences] * len(group)], schema=features.arrow_schema))


def _time_loops(model: Path, data: Path, number: int) -> tuple[float, float]:
    """Measure images per second and CPU seconds per image of loops in several processes at the same time."""
    with ProcessPoolExecutor(number, mp_context=multiprocessing.get_context("spawn")) as processes:
        results = list(processes.map(_time_loop, [model] * number, [data] * number))
    return sum(rate for rate, _ in results), statistics.mean(cost for _, cost in results)


def _time_loop(model: Path, data: Path) -> tuple[float, float]:
    torch.set_num_threads(1)
    task: Any = "referring-image-segmentation"
    pipe: Any = pipeline(task, model=str(model), device="cpu")
    rows = datasets.Dataset.from_parquet(str(data / "val.parquet"), cache_dir=str(model.parent / "cache"))
    times = []
    for row in rows:
        pipe(row["image"], text=row["texts"])
        times.append((time.perf_counter(), time.process_time()))
    rate = (len(times) - 1) / (times[-1][0] - times[0][0])
    return rate, (times[-1][1] - times[0][1]) / (len(times) - 1)


def _time_actors(model: Path, data: Path, number: int) -> tuple[float, float]:
    """Measure images per second and CPU seconds per image of `restr predict`, and print how busy the actors are."""
    with tempfile.TemporaryDirectory() as output, sample_processes() as samples:
        predict(str(model), str(data), output, batch_size=1, pairs_per_file=1, num_actors=number)
        times = sorted(path.stat().st_mtime for path in Path(output, "data").glob("*.parquet"))
    times = times[number - 1 :]  # each actor has finished an image
    when, cpu_seconds = zip(*((sample.when, sample.cpu_seconds) for sample in samples))
    first, last = np.interp([times[0], times[-1]], when, cpu_seconds)
    within = [sample for sample in samples if times[0] <= sample.when <= times[-1]]
    print(f"busy {statistics.mean(sample.num_busy for sample in within or samples) / number:.1%}: ", end="")
    return (len(times) - 1) / (times[-1] - times[0]), float(last - first) / (len(times) - 1)


class Sample(NamedTuple):
    """CPU and memory of all processes at one time, and the number of actors that are working."""

    when: float
    cpu_seconds: float
    num_busy: int
    memory: int  # bytes; 0 if not measured, which is slow


@contextmanager
def sample_processes(with_memory: bool = False) -> Iterator[list[Sample]]:
    """Sample this process and its children at intervals while the body runs."""
    samples: list[Sample] = []
    cpu_seconds: dict[int, float] = {}
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.5):
            samples.append(_take_sample(cpu_seconds, with_memory))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join()


def _take_sample(cpu_seconds: dict[int, float], with_memory: bool) -> Sample:
    """Sample all processes. `cpu_seconds` of each process keeps the last value of those that have ended."""
    own = psutil.Process(os.getpid())
    num_busy, memory = 0, 0
    for process in [own, *own.children(recursive=True)]:
        try:
            cpu_seconds[process.pid] = sum(process.cpu_times()[:2])
            memory += process.memory_full_info().pss if with_memory else 0
            title = " ".join(process.cmdline()).strip()  # Ray writes its current task into it
        except psutil.NoSuchProcess:
            continue
        num_busy += "Predictor" in title and title.endswith(".submit")
    return Sample(time.time(), sum(cpu_seconds.values()), num_busy, memory)
