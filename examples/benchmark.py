"""
Measure ReSTR:

    python examples/benchmark.py --output_dir runs/speed   # one table of all that a CPU can show, in 15 minutes
    python examples/benchmark.py --what answers     # answers at the paper's size next to a bare ViT-B/16
    python examples/benchmark.py --what training    # steps with 1, 4 and 8 sentences per image
    python examples/benchmark.py --what file-to-mask   # every stage from a photo's file to its masks' files
    python examples/benchmark.py --what training-data  # the loader next to training steps
    python examples/benchmark.py --what evaluation  # the sentences of an image together next to one at a time
    python examples/benchmark.py --what gpu --output_dir runs/gpu
    python examples/benchmark.py --what prediction  # restr predict compared with a loop over the pipeline
    python examples/benchmark.py --what prediction-memory
    python examples/benchmark.py --what onnx --model examples/restr_mini --exported restr-onnx --data data/photos
    python examples/benchmark.py --what web --exported restr-page   # a page in Chromium next to ONNX Runtime

All variants run alternately in one process, so that a noisy machine slows all of them alike. Medians are compared.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, NoReturn, get_args


try:
    import torch
    import typer

    from modeling_restr.options import (
        DataRevision,
        Device,
        DType,
        MaxImages,
        NumThreads,
        Revision,
        choose_device,
        needs_extra,
        run,
    )
except ModuleNotFoundError as error:
    sys.exit(f"The benchmark needs {error.name}: pip install {error.name}")

Part = Literal[  # of the table
    "answers", "stages", "clipseg", "growth", "training", "file-to-mask", "training-data", "evaluation"
]


def benchmark(
    what: Annotated[
        Literal["all", Part, "gpu", "onnx", "web", "prediction", "prediction-memory"],
        typer.Option(
            help="Measurement: all is the whole table, gpu is for a GPU and takes four minutes, onnx is for an exported"
            " model, web for an exported page, prediction compares restr predict with a loop over the pipeline."
        ),
    ] = "all",
    output_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the table as Markdown, JSON and chart, of gpu.*, or of results.json for onnx and web."
        ),
    ] = None,
    device: Device = None,
    num_threads: NumThreads = None,
    image_size: Annotated[
        int, typer.Option(min=16, help="Side of the image in pixels.", rich_help_panel="Table")
    ] = 480,
    runs: Annotated[int, typer.Option(min=1, help="Runs of each variant.", rich_help_panel="Table")] = 5,
    dtype: Annotated[DType, typer.Option(help="Floating-point type.", rich_help_panel="Table")] = DType.float32,
    time_limit: Annotated[
        float, typer.Option(help="Seconds in total, without the imports.", rich_help_panel="GPU")
    ] = 220,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="Try the measurements with a tiny model, on any device.")
    ] = False,
    compile_backend: Annotated[
        str, typer.Option(help="Backend of torch.compile.", rich_help_panel="GPU")
    ] = "inductor",
    model: Annotated[str | None, typer.Option(help="Folder or Hub id of the model.", rich_help_panel="ONNX")] = None,
    exported: Annotated[
        Path | None, typer.Option(help="Folder that restr export wrote.", rich_help_panel="ONNX")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Folder or Hub id of prepared data.", rich_help_panel="ONNX")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of the data.", rich_help_panel="ONNX")] = "val",
    max_images: MaxImages = None,
    revision: Revision = None,
    data_revision: DataRevision = None,
) -> None:
    """
    Measure the speed of ReSTR's answers and training, or compare an exported model with the original.

    Example: python examples/benchmark.py --what gpu --output_dir runs/gpu
    """
    chosen = choose_device(device, num_threads)
    if what == "gpu":
        from benchmarks.gpu import benchmark_gpu

        failures = benchmark_gpu(chosen, output_dir or Path("runs/gpu"), time_limit, tiny, compile_backend)
        sys.exit("\n".join(failures) or None)
    if what == "onnx":
        if model is None or exported is None or data is None:
            raise ValueError("Expected --model, --exported and --data with --what onnx.")
        with needs_extra("train,onnx"):
            from benchmarks.exported import benchmark_export

        benchmark_export(
            model,
            exported,
            data,
            split,
            revision=revision,
            data_revision=data_revision,
            max_images=max_images,
            output_dir=output_dir,
        )
        return
    if what == "web":
        if exported is None:
            raise ValueError("Expected --exported with --what web.")
        with needs_extra("dev"):
            from benchmarks.web import benchmark_web

        return benchmark_web(exported, runs, output_dir)
    if what.startswith("prediction"):
        with needs_extra("train,scale"):
            from benchmarks.prediction import benchmark_memory, benchmark_throughput

        return benchmark_throughput(image_size, runs) if what == "prediction" else benchmark_memory()
    parts = get_args(Part) if what == "all" else [what]
    with needs_extra("train"):
        measure_parts(parts, chosen, getattr(torch, dtype), image_size, runs, tiny, output_dir)


def measure_parts(
    parts: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    image_size: int,
    runs: int,
    tiny: bool,
    output_dir: Path | None,
) -> None:
    """Measure parts of the table, print it, and write it to a folder."""
    from benchmarks import clipseg, data_and_evaluation, file_to_mask, growth, paper_size, stages
    from benchmarks.measuring import describe_machine, tiny_config
    from benchmarks.report import format_table, write_report

    from modeling_restr import ReSTRConfig, ReSTRVisionConfig

    functions = {
        "answers": paper_size.measure_answers,
        "stages": stages.measure_stages,
        "clipseg": clipseg.measure_clipseg,
        "growth": growth.measure_growth,
        "training": paper_size.measure_training,
        "file-to-mask": file_to_mask.measure_file_to_mask,
        "training-data": data_and_evaluation.measure_training_data,
        "evaluation": data_and_evaluation.measure_evaluation,
    }
    config = tiny_config() if tiny else ReSTRConfig(vision_config=ReSTRVisionConfig(image_size=image_size))
    facts = describe_machine(device) | {"medians of": f"{runs} alternated runs"}
    rows = []
    for part in parts:
        start = time.perf_counter()
        rows += functions[part](config, device, dtype, runs)
        print(f"{part}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    print(format_table(rows, facts))
    if output_dir is not None:
        write_report(rows, facts, output_dir)


def main() -> NoReturn:
    run(benchmark)


if __name__ == "__main__":
    main()
