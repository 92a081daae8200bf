"""Both training scripts, started as users start them, on generated photos."""

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from .data_and_evaluation import create_processor, make_dataset
from .measuring import create_model


EXAMPLES = Path(__file__).parents[1]
PRECISIONS = {  # the option of each script for bfloat16
    "run_referring_segmentation.py": "--bf16",
    "run_referring_segmentation_no_trainer.py": "--mixed_precision=bf16",
}
NUM_PHOTOS, NUM_STEPS, LOGGING_STEPS = 64, 50, 10
LOSS = re.compile(r"\bloss\b")  # in the lines that both scripts log


def time_training_scripts(config: Any, num_images: int, sentences_per_image: int) -> dict[str, float]:
    """
    Measure the seconds per step of both scripts in bfloat16, after their first ten steps. All parts of a script count:
    reading, decoding and collating the photos, and logging.

    Raises:
        RuntimeError: A script failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        model, data = Path(folder, "model"), Path(folder, "data")
        create_model(config, torch.device("cpu")).save_pretrained(model)
        create_processor(config).save_pretrained(model)
        data.mkdir()
        make_dataset(NUM_PHOTOS).to_parquet(data / "train.parquet")
        options = {
            "dataset_name": data,
            "validation_split": "",
            "model_name_or_path": model,
            "per_device_train_batch_size": num_images,
            "expressions_per_image": sentences_per_image,
            "max_steps": NUM_STEPS,
            "logging_steps": LOGGING_STEPS,
        }
        words = [f"--{name}={value}" for name, value in options.items()]
        return {
            script: _time_script([EXAMPLES / script, *words, precision, f"--output_dir={folder}/{Path(script).stem}"])
            for script, precision in PRECISIONS.items()
        }


def _time_script(command: list[str | Path]) -> float:
    """Measure seconds per step from the first to the last line with a loss."""
    lines, times = [], []
    python = [sys.executable, "-u", *command]
    with subprocess.Popen(python, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            for line in process.stdout or ():
                lines.append(line)
                if LOSS.search(line):
                    times.append(time.perf_counter())
        except BaseException:  # the benchmark's time is up
            process.kill()
            raise
    if process.returncode or len(times) < 2:
        raise RuntimeError(f"{command[0]} failed:\n{''.join(lines[-20:])}")
    return (times[-1] - times[0]) / (LOGGING_STEPS * (len(times) - 1))
