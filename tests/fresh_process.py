"""Fresh Python processes in which some packages are hidden, as if they were not installed."""

import os
import subprocess
import sys
from pathlib import Path


# Hides the packages in the environment variable HIDDEN.
HIDE = """
import os, sys

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        hidden = name.partition(".")[0] in os.environ["HIDDEN"].split()
        return None if hidden else self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Hiding, sys.meta_path)
"""


def run_python(code: str, *arguments: object, cwd: Path, hidden: str = "", **environment: str) -> str:
    """Run code in a process without the packages `hidden`. Returns its output."""
    command = [sys.executable, "-c", HIDE + code, *map(str, arguments)]
    variables = os.environ | environment | {"HIDDEN": hidden}
    done = subprocess.run(command, check=False, cwd=cwd, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def run_without_package(code: str, *arguments: object, cwd: Path, **environment: str) -> str:
    """Run code where `modeling_restr` is not installed."""
    return run_python(code, *arguments, cwd=cwd, hidden="modeling_restr", **environment)
