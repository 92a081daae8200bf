"""
Measure ReSTR:

    python examples/benchmark.py                    # answers at the paper's size next to a bare ViT-B/16
    python examples/benchmark.py --what training    # steps with 1, 4 and 8 sentences per image
    python examples/benchmark.py --what gpu --output_dir runs/gpu
    python examples/benchmark.py --what prediction  # restr predict compared with a loop over the pipeline
    python examples/benchmark.py --what prediction-memory
    python examples/benchmark.py --what onnx --model examples/restr_mini --exported restr-onnx --data data/photos

All variants run alternately in one process, so that a noisy machine slows all of them alike. Medians are compared.
"""

import sys
from pathlib import Path
from typing import Annotated, Literal, NoReturn


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


def benchmark(
    what: Annotated[
        Literal["inference", "training", "gpu", "onnx", "prediction", "prediction-memory"],
        typer.Option(
            help="Measurement: gpu is for a GPU and takes four minutes, onnx is for an exported model, prediction"
            " compares restr predict with a loop over the pipeline."
        ),
    ] = "inference",
    output_dir: Annotated[
        Path | None, typer.Option(help="Folder of gpu.json and gpu.md, or of results.json for onnx.")
    ] = None,
    device: Device = None,
    num_threads: NumThreads = None,
    image_size: Annotated[
        int, typer.Option(min=16, help="Side of the image in pixels.", rich_help_panel="Inference and training")
    ] = 480,
    runs: Annotated[
        int, typer.Option(min=1, help="Runs of each variant.", rich_help_panel="Inference and training")
    ] = 5,
    dtypes: Annotated[
        list[DType], typer.Option(help="Floating-point type. Repeatable.", rich_help_panel="Inference and training")
    ] = [DType.float32, DType.bfloat16],  # noqa: B006  (only read)
    time_limit: Annotated[
        float, typer.Option(help="Seconds in total, without the imports.", rich_help_panel="GPU")
    ] = 220,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="Try all sections with a tiny model, even on a CPU.", rich_help_panel="GPU")
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
    if what.startswith("prediction"):
        with needs_extra("train,scale"):
            from benchmarks.prediction import benchmark_memory, benchmark_throughput

        return benchmark_throughput(image_size, runs) if what == "prediction" else benchmark_memory()
    from benchmarks.measuring import describe_machine
    from benchmarks.paper_size import benchmark_inference, benchmark_training

    print(", ".join(f"{name} {value}" for name, value in describe_machine(chosen).items()))
    for dtype in dtypes:
        function = benchmark_inference if what == "inference" else benchmark_training
        function(getattr(torch, dtype), chosen, image_size, runs)


def main() -> NoReturn:
    run(benchmark)


if __name__ == "__main__":
    main()
