"""Options that commands share, each with one name and one meaning, and the error reports of commands."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer


if TYPE_CHECKING:
    import torch

# Typer shows dashes; words with underscores, as transformers' scripts spell them, mean the same.
SETTINGS = {"token_normalize_func": lambda word: word.replace("_", "-"), "help_option_names": ["-h", "--help"]}
WHERE_MODELS_ARE = (
    "A model is a folder or a Hub id. The project's repository ships restr-mini, a small model of photographs, in "
    "examples/restr_mini; models that people share are at https://huggingface.co/models?other=restr."
)


class DType(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


# What Typer checks of a path.
FILE: dict[str, Any] = {"exists": True, "dir_okay": False}
FOLDER: dict[str, Any] = {"file_okay": False}  # it may be absent


def _check_folder_or_id(name: str) -> str:
    is_id = re.fullmatch(r"([\w-][\w.-]*/)?[\w-][\w.-]*", name) and not Path(name).is_file()
    if not is_id and not Path(name).is_dir():
        raise typer.BadParameter(f"Expected a folder or a Hub id such as you/restr, got {name}.")
    return name


def _check_model(name: str) -> str:
    folder = Path(_check_folder_or_id(name))
    configs = [folder / "config.json", folder / "adapter_config.json"]  # of a model, or of PEFT's adapters for one
    if folder.is_dir() and not any(config.is_file() for config in configs):
        raise typer.BadParameter(f"Expected a folder with a model's config.json, got {name}, which has none.")
    return name


Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id of the model.", callback=_check_model)]
Data = Annotated[
    str, typer.Argument(metavar="DATA", help="Folder or Hub id of prepared data.", callback=_check_folder_or_id)
]
OutputDir = Annotated[Path, typer.Option(help="Folder to write to.", rich_help_panel="Output", **FOLDER)]
Revision = Annotated[
    str | None,
    typer.Option(help="Branch, tag or commit of the model on the Hub.", show_default="main", rich_help_panel="Model"),
]
DataRevision = Annotated[
    str | None,
    typer.Option(help="Branch, tag or commit of the data on the Hub.", show_default="main", rich_help_panel="Data"),
]
Device = Annotated[
    str | None,
    typer.Option(
        help="Device such as cpu, cuda:0, mps or xpu.", show_default="an accelerator if any", rich_help_panel="Machine"
    ),
]
NumThreads = Annotated[
    int | None,
    typer.Option(
        min=1, help="CPU threads of each process.", show_default="PyTorch's choice", rich_help_panel="Machine"
    ),
]
ModelDType = Annotated[
    DType, typer.Option("--dtype", help="Floating-point type of the model.", rich_help_panel="Model")
]
Threshold = Annotated[
    float,
    typer.Option(min=0, max=1, help="Probability above which a pixel is in the mask.", rich_help_panel="Model"),
]
ExpressionsPerBatch = Annotated[
    int, typer.Option(min=1, help="Expressions that the model decodes at a time.", rich_help_panel="Machine")
]
MaxImages = Annotated[
    int | None, typer.Option(min=1, help="Use the first N images only.", show_default="all", rich_help_panel="Data")
]


def run(command: Any) -> NoReturn:
    """
    Run a Typer app, or a function as one, on the words of the command line. Errors that users can fix are reported in
    one line without a traceback; lists below that line are indented. The exit code is 2 for wrong usage, otherwise 1.
    """
    app = command
    if not isinstance(command, typer.Typer):
        app = typer.Typer(context_settings=SETTINGS, add_completion=False, rich_markup_mode="markdown")
        app.command()(command)
    try:
        sys.exit(app(standalone_mode=False))
    except typer.TyperException as error:
        hint = f" {WHERE_MODELS_ARE}" if getattr(getattr(error, "param", None), "name", None) == "model" else ""
        _fail(error.format_message() + hint, error.exit_code)
    except (ValueError, OSError, ImportError) as error:
        _fail(str(error), 1)
    except (KeyboardInterrupt, typer.Abort):
        _fail("Stopped.", 130)
    except Exception as error:
        if _is_error_of("safetensors", "SafetensorError", error):
            _fail(f"Expected whole weights, got a file that is damaged or cut off ({error}). Copy it again.", 1)
        if not _is_error_of("huggingface_hub.errors", "HTTPError", error):  # its class differs between versions
            raise
        _fail(f"The connection to the Hub failed ({str(error) or type(error).__name__}). Run the command again.", 1)


def _is_error_of(module: str, name: str, error: Exception) -> bool:
    """Whether the error is of a class in a module, which need not be imported."""
    return module in sys.modules and isinstance(error, getattr(sys.modules[module], name))


def _fail(message: str, exit_code: int) -> NoReturn:
    in_one_line = re.sub(r"\n+(?! )", " ", message.strip())
    print(f"Error: {in_one_line}", file=sys.stderr)
    sys.exit(exit_code)


@contextmanager
def needs_extra(extra: str) -> Iterator[None]:
    """Name the extra to install if an import inside the `with` block fails."""
    try:
        yield
    except ModuleNotFoundError as error:
        message = f'The package {error.name} is missing: pip install "modeling-restr[{extra}]"'
        raise ImportError(message) from error


def choose_device(device: str | None = None, num_threads: int | None = None) -> "torch.device":
    """
    Choose the named device, or else an accelerator, or else the CPU, and set the number of CPU threads if given.

    Raises:
        ValueError: There is no such device on this machine.
    """
    import torch

    if num_threads is not None:
        torch.set_num_threads(num_threads)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    found = [] if accelerator is None else [f"{accelerator.type}:{n}" for n in range(torch.accelerator.device_count())]
    try:
        chosen = torch.device(device or accelerator or "cpu")
    except RuntimeError:
        chosen = None
    if chosen is None or (chosen.type != "cpu" and f"{chosen.type}:{chosen.index or 0}" not in found):
        raise ValueError(f"Expected --device to be one of {', '.join(['cpu', *found])}, got {device}.")
    return chosen


def start_processes(device: str | None, num_threads: int | None, timeout: timedelta) -> tuple[Any, "torch.device"]:
    """
    Connect the processes that `torchrun` or `accelerate launch` started.

    Args:
        timeout: How long processes wait for one another.

    Returns:
        accelerate's `PartialState`, and the device of this process: one accelerator per process, or CPUs if there is
        none or `--device cpu` is given.

    Raises:
        ValueError: There is no such device on this machine, the device has a number although several processes share
            the work, or not all processes found one another.
    """
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    chosen, num_started = choose_device(device, num_threads), int(os.environ.get("WORLD_SIZE", "1"))
    if device is not None and chosen.index is not None and num_started > 1:
        raise ValueError(f"Expected --device without a number with {num_started} processes, got {device}.")
    on_cpu = chosen.type == "cpu" or (device is None and parse_flag_from_env("ACCELERATE_USE_CPU"))
    state = PartialState(cpu=on_cpu, timeout=timeout)
    if state.num_processes != num_started:
        raise ValueError(f"Expected {num_started} connected processes, got {state.num_processes}: start them again.")
    return state, state.device if device is None or num_started > 1 else chosen
