"""
ReSTR on a GPU: whether it computes the same numbers as a CPU, whether forward waits for the device, how fast it answers
and trains, and how much memory that takes.

Only the section of the training scripts imports data and metrics, and it is left out where they are not installed. Each
section has a time limit, and so has the whole run. A row is printed and written as soon as it is measured. A section
that fails is reported, and the next one starts.
"""

import contextlib
import gc
import json
import logging
import math
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode

from modeling_restr import ReSTRConfig, ReSTRForImageSegmentation
from modeling_restr.convert_restr_original_to_hf import model_from_original_state_dict
from modeling_restr.files import write_json, write_text
from modeling_restr.training.recipe import create_parameter_groups

from .measuring import (
    create_batch,
    create_model,
    describe_machine,
    peak_memory,
    synchronize,
    time_calls,
    tiny_config,
)


logger = logging.getLogger(__name__)

GOLDEN = Path(__file__).parents[2] / "tests" / "fixtures" / "coupled.safetensors"
PAPER_STEPS, PAPER_PAIRS = 400_000, 8
# Another device adds the same numbers in another order. Its distance from float64 may be this many times the CPU's, or
# this share of the largest value if the CPU happens to be nearly exact.
TIMES_CPU_ERROR, LEAST_ERROR = 8, 1e-6
GOLDEN_ERROR = 1e-5  # as in the tests against the original implementation
PARITY = "parity with the CPU, float32"
TRAINING = "training, bfloat16 by autocast, fused AdamW"
Results = dict[str, torch.Tensor]


class TimeIsUp(BaseException):
    """A section has used up its time. Not an `Exception`, so that no library in between catches it."""


@dataclass
class Report:
    """Rows of measurements by section, printed and written to `gpu.json` and `gpu.md` in a folder one by one."""

    folder: Path
    facts: dict[str, Any]
    sections: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def add(self, section: str, what: str, **values: Any) -> None:
        values = {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in values.items()}
        self.sections.setdefault(section, []).append({"what": what, **values})
        print(f"[{section}] {what}: {', '.join(f'{name} {value}' for name, value in values.items())}", flush=True)
        self.write()

    def check(self, section: str, what: str, error: float, bound: float, **values: Any) -> None:
        """Add a row about a numerical error, and a failure when it exceeds its bound."""
        is_within = error <= bound  # NaN is not
        self.add(section, what, error=error, bound=bound, **values, ok=is_within)
        if not is_within:
            self.failures.append(f"{section}: {what}: expected an error of {bound:.2g} at most, got {error:.2g}")

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {"facts": self.facts, "failures": self.failures, "sections": self.sections}
        write_json(self.folder / "gpu.json", content)
        lines = [", ".join(f"{name} {value}" for name, value in self.facts.items())]
        for section, rows in self.sections.items():
            columns = list(dict.fromkeys(name for row in rows for name in row))
            lines += ["", f"### {section}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
            lines += [f"| {' | '.join(str(row.get(name, '')) for name in columns)} |" for row in rows]
        write_text(self.folder / "gpu.md", "\n".join(lines) + "\n")


@dataclass
class Setup:
    """The model, the device, and the amount of measurement."""

    device: torch.device
    config: ReSTRConfig
    report: Report
    backend: str  # of torch.compile
    batch_sizes: tuple[int, int, int] = (1, 8, 64)
    batch_per_step: tuple[int, int] = (16, 4)  # images, sentences per image
    matrix_side: int = 8192
    seconds: float = 1.0  # per measurement
    matmul_rate: float = math.nan  # FLOP/s, measured first

    def time(self, function: Callable[[], object]) -> float:
        """Median seconds per call over five blocks of calls, after three calls to warm up."""
        time_calls(function, self.device, 2)
        num_calls = max(1, int(self.seconds / 5 / time_calls(function, self.device)))
        return statistics.median(time_calls(function, self.device, num_calls) for _ in range(5))


def describe(num_images: int, sentences_per_image: int) -> str:
    return f"images: {num_images}, sentences per image: {sentences_per_image}"


def count_flops(config: Any, num_images: int, sentences_per_image: int) -> int:
    """
    Count the FLOPs of the matrix products in a forward pass, two per multiply-accumulate, on the meta device, which
    computes nothing. A backward pass takes twice as many.
    """
    meta = torch.device("meta")
    model = create_model(config, meta)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**create_batch(config, meta, num_images, sentences_per_image))
    return counter.get_total_flops()


def measure_card(setup: Setup) -> None:
    """Measure the card's rates of matrix products and copies, the yardstick for the rest."""
    side = setup.matrix_side
    with setup.device:
        left, right = torch.randn(2, side, side, dtype=torch.bfloat16)
        source = torch.randn(2 * side**2)
    setup.matmul_rate = 2 * side**3 / setup.time(lambda: left @ right)
    setup.report.add("card", f"bfloat16 product of two {side}x{side} matrices", tflops=setup.matmul_rate / 1e12)
    target = torch.empty_like(source)
    seconds = setup.time(lambda: target.copy_(source))
    setup.report.add("card", "copy, bytes read and written", gb_per_s=2 * source.nbytes / seconds / 1e9)


def run_golden(
    device: str | torch.device, dtype: torch.dtype = torch.float32, attn_implementation: str = "sdpa"
) -> Results:
    """Compute loss, logits and gradients of the small golden model. "golden" has the original implementation's logits."""
    with safe_open(GOLDEN, "pt") as file:
        settings = json.loads(file.metadata()["config"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    model: Any = model_from_original_state_dict(
        {name.removeprefix("sd."): tensor for name, tensor in tensors.items() if name.startswith("sd.")},
        image_size=settings["image_size"],
        num_attention_heads=settings["num_attention_heads"],
        text_num_attention_heads=settings["text_heads"],
        num_fusion_layers=settings["fusion_layers"],
    )
    model.to(device, dtype).set_attn_implementation(attn_implementation)
    outputs = model(
        pixel_values=tensors["pixel_values"].to(device, dtype),
        input_ids=tensors["input_ids"].to(device),
        labels=tensors["labels"][:, 0].to(device),
    )
    outputs.loss.backward()
    results = {"golden": tensors["pixel_logits"][:, 0], "loss": outputs.loss, "logits": outputs.logits}
    # A key's bias shifts all scores of a query alike, so its gradient is only rounding errors.
    gradients = {name: weight.grad for name, weight in model.named_parameters() if not name.endswith("k_proj.bias")}
    return {name: tensor.detach().cpu().double() for name, tensor in {**results, **gradients}.items()}


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference as a share of the largest value."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Compute products without TF32, which has 10 bits where float32 has 23."""
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    allowed = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    try:
        yield
    finally:
        for backend, is_allowed in zip(backends, allowed):
            backend.allow_tf32 = is_allowed


def check_parity(setup: Setup, attn_implementation: str) -> None:
    """Compare forward and backward of the golden model in float32, on the device and the CPU, with float64."""
    with full_float32():
        exact, cpu = run_golden("cpu", torch.float64), run_golden("cpu")
        device = run_golden(setup.device, attn_implementation=attn_implementation)
    gradients = exact.keys() - {"golden", "loss", "logits"}
    for what, names in (("loss", {"loss"}), ("logits", {"logits"}), ("gradients, the worst parameter", gradients)):
        cpu_error, error = (max(distance(each[name], exact[name]) for name in names) for each in (cpu, device))
        bound = max(TIMES_CPU_ERROR * cpu_error, LEAST_ERROR)
        setup.report.check(PARITY, f"{attn_implementation}, {what}", error, bound, cpu_error=cpu_error)
    error = distance(device["logits"], device["golden"])
    setup.report.check(PARITY, f"{attn_implementation}, the original's logits", error, GOLDEN_ERROR)


@contextlib.contextmanager
def waiting_is_an_error(device: torch.device) -> Iterator[None]:
    """Make PyTorch raise an error where the program waits for a GPU."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_waits(setup: Setup) -> None:
    """Check that neither forward nor backward waits for the device."""
    cases: dict[str, dict[str, Any]] = {
        "coupled": {},
        "vanilla": {"fusion_type": "vanilla"},
        "padding kept out of the attention": {"attend_to_padding": False},
        "patch logits only": {"use_pixel_decoder": False},
    }
    losses, outcome = {}, {"ok": True if setup.device.type == "cuda" else "not checked on a CPU"}
    for what, values in cases.items():
        config = tiny_config(**values)
        model = create_model(config, setup.device).train()
        batch = create_batch(config, setup.device, 2, 3, labels=True)
        for attn_implementation in ("eager", "sdpa"):
            model.set_attn_implementation(attn_implementation)
            model(**batch).loss.backward()  # the first call sets things up
            with waiting_is_an_error(setup.device):
                losses[f"{what}, {attn_implementation}"] = model(**batch).loss
            setup.report.add("no wait for the device", f"forward, {what}, {attn_implementation}", **outcome)
    for what, loss in losses.items():
        with waiting_is_an_error(setup.device):
            loss.backward()
        setup.report.add("no wait for the device", f"backward, {what}", **outcome)


def check_flex_attention(setup: Setup) -> None:
    if setup.device.type == "cpu":
        setup.report.add(PARITY, "flex_attention", note="has no backward pass on a CPU")
    else:
        check_parity(setup, "flex_attention")


def time_attention(setup: Setup, attn_implementation: str) -> None:
    """Time a batch in bfloat16 without torch.compile."""
    model, count = create_model(setup.config, setup.device, torch.bfloat16), setup.batch_sizes[1]
    model.set_attn_implementation(attn_implementation)
    batch = create_batch(setup.config, setup.device, count, 1, torch.bfloat16)
    with torch.inference_mode():
        seconds = setup.time(lambda: model(**batch))
    setup.report.add("attention, bfloat16", f"{attn_implementation}, {describe(count, 1)}", ms=seconds * 1e3)


def time_answers(setup: Setup, compiled: bool) -> None:
    """Time n images with a sentence each, and one image with n sentences, in bfloat16."""
    section = f"answers, bfloat16, {'torch.compile' if compiled else 'eager'}"
    one, *others = setup.batch_sizes
    # In this order one dynamic program serves several sizes. A size of 1 gets its own program.
    sizes = [*((n, 1) for n in others), (one, 1), *((1, n) for n in others)]
    model = create_model(setup.config, setup.device, torch.bfloat16)
    forward = torch.compile(model, dynamic=True, backend=setup.backend) if compiled else model
    for num_images, sentences_per_image in sizes:
        batch = create_batch(setup.config, setup.device, num_images, sentences_per_image, torch.bfloat16)
        with torch.inference_mode():
            first = time_calls(lambda: forward(**batch), setup.device)  # noqa: B023  (called at once)
            seconds = setup.time(lambda: forward(**batch))  # noqa: B023
        setup.report.add(
            section,
            describe(num_images, sentences_per_image),
            ms=seconds * 1e3,
            images_per_s=num_images / seconds,
            sentences_per_s=num_images * sentences_per_image / seconds,
            first_call_s=first,
        )


def create_step(
    setup: Setup, model: ReSTRForImageSegmentation, forward: Callable[..., Any], batch: dict[str, torch.Tensor]
) -> Callable[[], None]:
    """Create a training step in bfloat16 by autocast, with weights in float32 and fused AdamW."""
    optimizer = torch.optim.AdamW(create_parameter_groups(model), fused=True)

    def step() -> None:
        with torch.autocast(setup.device.type, torch.bfloat16):
            loss = forward(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure_memory(setup: Setup) -> None:
    """Measure MiB per pair as 16 pairs minus 8, so that weights, optimizer and other constants cancel out."""
    model, memory = create_model(setup.config, setup.device), {}
    for sentences in (1, 4, 8):
        for num_pairs in (8, 16):
            batch = create_batch(setup.config, setup.device, num_pairs // sentences, sentences, labels=True)
            step = create_step(setup, model.train(), model, batch)
            step()
            memory["training", num_pairs] = peak_memory(step, setup.device)
            model.eval()
            with torch.inference_mode(), torch.autocast(setup.device.type, torch.bfloat16):
                memory["answers", num_pairs] = peak_memory(lambda: model(**batch), setup.device)  # noqa: B023
        per_pair = {kind: (memory[kind, 16] - memory[kind, 8]) / 8 * 1024 for kind in ("training", "answers")}
        setup.report.add(
            "memory per pair, eager, bfloat16 by autocast",
            f"sentences per image: {sentences}",
            training_mib=per_pair["training"],
            answers_mib=per_pair["answers"],
            step_of_16_pairs_gib=memory["training", 16],
        )


def train(setup: Setup, num_images: int, sentences_per_image: int, compiled: bool = False) -> None:
    """Time a training step, and report its rate and the duration of the paper's training with these steps."""
    kind = f"{describe(num_images, sentences_per_image)}, {'torch.compile' if compiled else 'eager'}"
    model = create_model(setup.config, setup.device).train()
    forward = torch.compile(model, dynamic=False, backend=setup.backend) if compiled else model
    batch = create_batch(setup.config, setup.device, num_images, sentences_per_image, labels=True)
    step = create_step(setup, model, forward, batch)
    first = time_calls(step, setup.device)
    seconds, peak = setup.time(step), peak_memory(step, setup.device)
    rate = 3 * count_flops(setup.config, num_images, sentences_per_image) / seconds
    pairs_per_second = num_images * sentences_per_image / seconds
    setup.report.add(
        TRAINING,
        kind,
        ms=seconds * 1e3,
        tflops=rate / 1e12,
        share_of_matmul_rate=rate / setup.matmul_rate,
        pairs_per_s=pairs_per_second,
        hours_for_the_papers_pairs=count_paper_hours(pairs_per_second),
        peak_gib=peak,
        first_step_s=first,
    )
    profile_step(setup, step, f"step_of_{num_images}x{sentences_per_image}{'_compiled' if compiled else ''}")


def run_training_scripts(setup: Setup) -> None:
    """Time both training scripts with the batches of `train`. What they import may be missing on a machine with a GPU."""
    section = "training scripts, bfloat16, from photos to steps"
    try:
        from .training_scripts import time_training_scripts
    except ModuleNotFoundError as error:
        setup.report.add(section, "both", note=f'needs {error.name}: pip install -e ".[train]"')
        return
    num_images, sentences_per_image = setup.batch_per_step
    for script, seconds in time_training_scripts(setup.config, num_images, sentences_per_image).items():
        pairs_per_second = num_images * sentences_per_image / seconds
        setup.report.add(
            section,
            f"{script}, {describe(num_images, sentences_per_image)}",
            ms=seconds * 1e3,
            pairs_per_s=pairs_per_second,
            hours_for_the_papers_pairs=count_paper_hours(pairs_per_second),
        )


def count_paper_hours(pairs_per_second: float) -> float:
    """Compute the hours that the paper's training takes at this rate."""
    return PAPER_STEPS * PAPER_PAIRS / pairs_per_second / 3600


def profile_step(setup: Setup, step: Callable[[], None], name: str) -> None:
    """Profile a training step, and write the table to the folder of the report."""
    with torch.profiler.profile() as profile:
        step()
        synchronize(setup.device)
    sort_by = "self_cpu_time_total" if setup.device.type == "cpu" else "self_device_time_total"
    table = profile.key_averages().table(sort_by=sort_by, row_limit=25)
    write_text(setup.report.folder / f"{name}.txt", table)


# In order, with the seconds that each may take. Sections with long compilation come last.
SECTIONS: tuple[tuple[str, Callable[[Setup], None], float], ...] = (
    ("card", measure_card, 20),
    ("parity", lambda setup: check_parity(setup, "eager"), 20),
    ("parity", lambda setup: check_parity(setup, "sdpa"), 20),
    ("waits", check_waits, 20),
    ("attention", lambda setup: time_attention(setup, "eager"), 15),
    ("attention", lambda setup: time_attention(setup, "sdpa"), 15),
    ("answers", lambda setup: time_answers(setup, compiled=False), 25),
    ("training", lambda setup: train(setup, *setup.batch_per_step), 30),
    ("training as in the paper", lambda setup: train(setup, PAPER_PAIRS, 1), 20),
    ("memory", measure_memory, 20),
    ("training, compiled", lambda setup: train(setup, *setup.batch_per_step, compiled=True), 100),
    ("training scripts", run_training_scripts, 80),
    ("answers, compiled", lambda setup: time_answers(setup, compiled=True), 80),
    ("flex attention", check_flex_attention, 40),
    ("flex attention", lambda setup: time_attention(setup, "flex_attention"), 40),
)


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise `TimeIsUp` in the main thread when the time is up."""

    def stop(*_: Any) -> None:
        raise TimeIsUp

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def run_sections(setup: Setup, time_limit: float) -> None:
    start = time.monotonic()
    for name, measure, seconds in SECTIONS:
        begin = time.monotonic()
        limit = min(seconds, time_limit - (begin - start))
        try:
            if limit < 1:
                raise TimeIsUp
            with at_most(limit):
                measure(setup)
            outcome = "done"
        except TimeIsUp:
            outcome = f"stopped after {max(0.0, limit):.0f} s"
        except Exception as error:
            logger.exception(f"The section {name!r} failed.")
            outcome = f"failed: {type(error).__name__}: {str(error)[:200]}"
            setup.report.failures.append(f"{name}: {outcome}")
        setup.report.add("sections", name, seconds=time.monotonic() - begin, outcome=outcome)
        gc.collect()
        torch.compiler.reset()
        if setup.device.type == "cuda":
            torch.cuda.empty_cache()


def benchmark_gpu(device: torch.device, output_dir: Path, time_limit: float, is_tiny: bool, backend: str) -> list[str]:
    """
    Run all sections within `time_limit` seconds.

    Args:
        output_dir: Folder of `gpu.json` and `gpu.md`.
        is_tiny: Whether to try all sections with a tiny model and very short measurements.
        backend: Backend of torch.compile.

    Returns:
        The failures: errors beyond their bounds, waits for the device, sections that raised an error.
    """
    model = "tiny" if is_tiny else "ViT-B/16 at 480x480 with random weights"
    report = Report(output_dir, describe_machine(device) | {"model": model})
    if is_tiny:
        sizes: dict[str, Any] = {
            "batch_sizes": (1, 2, 3),
            "batch_per_step": (2, 4),
            "matrix_side": 64,
            "seconds": 0.01,
        }
        setup = Setup(device, tiny_config(), report, backend, **sizes)
    else:
        setup = Setup(device, ReSTRConfig(), report, backend)
    run_sections(setup, time_limit)
    return report.failures
