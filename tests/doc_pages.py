"""Runs the commands and code of a page of the documentation."""

import re
import runpy
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

from modeling_restr.cli import main


REPOSITORY = Path(__file__).resolve().parents[1]
LAUNCHERS = {"torchrun": "torch.distributed.run", "accelerate": "accelerate.commands.accelerate_cli"}


def run_page(name: str, folder: Path) -> str:
    """
    Run the commands and the Python code of docs/NAME in `folder`, in their order. Leaves out commands of `pip`, and
    starts processes only for launchers, because imports take longest. Returns the output.
    """
    page = (REPOSITORY / "docs" / name).read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    num_threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as printed:
        patch.chdir(folder)
        patch.syspath_prepend(REPOSITORY / "examples")
        for language, code in re.findall(r"```(bash|python)\n(.*?)```", page, flags=re.DOTALL):
            if language == "python":
                exec(code, names)  # noqa: S102
                continue
            for command in code.strip().split("\n"):
                run_command(shlex.split(command), patch)
    torch.set_num_threads(num_threads)  # which the commands change
    return printed.getvalue()


def run_command(words: list[str], patch: pytest.MonkeyPatch) -> None:
    program, *arguments = words
    if program in LAUNCHERS:
        done = subprocess.run(
            [sys.executable, "-m", LAUNCHERS[program], *arguments], check=False, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    elif program in ("restr", "python"):
        patch.setattr(sys, "argv", words if program == "restr" else arguments)
        with pytest.raises(SystemExit) as stopped:
            main() if program == "restr" else runpy.run_path(arguments[0], run_name="__main__")
        assert not stopped.value.code, words
    else:
        assert program == "pip", words
