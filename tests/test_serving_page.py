"""The page on serving: its command, its code, and its table of limits."""

import re
import shlex
import signal
import subprocess
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
from numerics import assert_same_text

from modeling_restr.hub.handler import EndpointHandler


REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = (REPOSITORY / "docs" / "serving.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_page_shows_what_the_command_serves(monkeypatch, capsys):
    blocks = re.findall(r"```(\w+)\n(.*?)```", PAGE, flags=re.DOTALL)
    (command,) = (shlex.split(code) for language, code in blocks if language == "bash")
    assert command == ["restr", "serve", "examples/restr_mini", "--port", "8080"]
    command = [sys.executable, "-m", "modeling_restr.cli", *command[1:-1], "0"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # Programs in the background of a script, as these tests may be, ignore SIGINT, and so do those that they start.
    options["preexec_fn"] = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    monkeypatch.chdir(REPOSITORY)
    with subprocess.Popen(command, **options) as process, ExitStack() as stack:
        stack.callback(process.kill)
        line = process.stdout.readline()
        assert line.startswith("Serving examples/restr_mini at http://"), process.stderr.read()
        url = f"http://127.0.0.1:{line.rpartition(':')[2].strip()}"
        shown = [number for number, (language, _) in enumerate(blocks) if language == "python"]
        assert len(shown) == 2
        for number in shown:
            code = blocks[number][1].replace("http://127.0.0.1:8080", url)
            exec(compile(code, "docs/serving.md", "exec"), {})  # noqa: S102
            language, shown_output = blocks[number + 1]
            assert language == "text"
            assert_same_text(capsys.readouterr().out, shown_output)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in errors


def test_the_limits_are_documented():
    bounds = dict(re.findall(r"^\| `(RESTR_\w+)` \| ([\d,]+) \|", PAGE, flags=re.MULTILINE))
    assert bounds == dict(re.findall(r"- `(RESTR_\w+)` \(([\d,]+)\)", EndpointHandler.__doc__))
    read = re.findall(r'_read_bound\("(\w+)", ([\d_]+)\)', (REPOSITORY / "modeling_restr/hub/handler.py").read_text())
    assert bounds == {name: value.replace("_", ",") for name, value in read}
