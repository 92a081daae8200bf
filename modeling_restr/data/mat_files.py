"""
Reading of MATLAB files in a separate process: a damaged file may crash SciPy's C code, and the process with it. This
file is also the program that the process runs.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np


TIME_LIMIT = 60  # seconds per file


class MatReader:
    """Reads one file at a time. Its process starts with the first file, and again after a crash."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def read_zeros(self, path: Path, variable: str) -> np.ndarray:
        """Where a variable of a file is 0, as a bool array; `ValueError` if it is damaged or lacks the variable."""
        with self._lock:
            if self._process is None:
                command = [sys.executable, "-P", __file__]  # SciPy must not import this folder's modules
                self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            timer = threading.Timer(TIME_LIMIT, self._process.kill)
            timer.start()
            try:
                return self._ask(self._process, path, variable)
            except (OSError, EOFError):
                code, self._process = self._process.wait(), None
                raise ValueError(f"the process that read it ended with code {code}") from None
            finally:
                timer.cancel()

    @staticmethod
    def _ask(process: subprocess.Popen[bytes], path: Path, variable: str) -> np.ndarray:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps([str(path.absolute()), variable]).encode() + b"\n")
        process.stdin.flush()
        if not (line := process.stdout.readline()):
            raise EOFError
        answer = json.loads(line)
        if "error" in answer:
            raise ValueError(answer["error"])
        packed = np.frombuffer(process.stdout.read(answer["num_bytes"]), np.uint8)
        if len(packed) < answer["num_bytes"]:
            raise EOFError
        return np.unpackbits(packed, count=int(np.prod(answer["shape"]))).reshape(answer["shape"]).astype(bool)


def main() -> None:
    """Answer each [path, variable] on standard input with a line of JSON and the bits."""
    from scipy.io import loadmat

    for line in sys.stdin:
        path, variable = json.loads(line)
        packed = b""
        try:
            zeros = loadmat(path, variable_names=[variable])[variable] == 0
            packed = np.packbits(zeros).tobytes()
            answer = {"shape": zeros.shape, "num_bytes": len(packed)}
        except Exception as error:  # noqa: BLE001  (SciPy raises nearly anything on a damaged file)
            answer = {"error": f"{type(error).__name__}: {error}"}
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n" + packed)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
