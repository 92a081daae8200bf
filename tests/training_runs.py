"""Runs of the training scripts in processes of their own, which can be killed at any moment, and what they end in."""

import importlib.util
import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import dill
import torch
from accelerate import DistributedType, PartialState
from safetensors.torch import load_file
from tiny_training import make_dataset, make_model, make_processor
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_restr.hub import save_bundle


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script  # its dataclasses look themselves up
    spec.loader.exec_module(script)
    return script


def make_inputs(folder, seed=0):
    """A folder of data, with a tiny model with much drop path in `drop_path`, and one without any in `plain`."""
    for split, num_images in {"train": 9, "val": 5}.items():
        for shard in range(2):
            rows = make_dataset(num_images, seed=seed + len(split)).shard(2, shard)
            (folder / "data").mkdir(exist_ok=True)
            rows.to_parquet(folder / "data" / f"{split}-{shard:05d}-of-00002.parquet")
    files = "".join(f"  - split: {split}\n    path: data/{split}-*.parquet\n" for split in ("train", "val"))
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n")
    processor = make_processor()
    for name, rate in {"drop_path": 0.5, "plain": 0.0}.items():
        save_bundle(make_model(processor, rate), processor, folder / name)
    return folder


# A run is forked from a process that has everything imported and has started no thread. Forking this one, after tests
# that computed with several threads, would leave it with a pool of threads that are not there.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["training_runs", "transformers.trainer", "modeling_restr.training.trainer"])


def run(script, output_dir, before=None, num_processes=1, flags=(), **options):
    """Exit codes of a script's processes; `before` is called in each first."""
    arguments = [*flags, *(f"--{name}={value}" for name, value in options.items() if value is not None)]
    arguments = [*arguments, f"--output_dir={output_dir}"]
    return _run_processes(
        output_dir, num_processes, _run_script, script.__name__, arguments, dill.dumps(before, recurse=True)
    )


def run_code(code, output_dir, num_processes=1):
    """Exit codes of the processes that each run a piece of code."""
    (output_dir / "code.py").write_text(code)
    return _run_processes(output_dir, num_processes, _run_code, output_dir / "code.py")


def _run_processes(output_dir, num_processes, target, *arguments):
    """They find one another as torchrun has them do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(num_processes)}
    output_dir.mkdir(exist_ok=True, parents=True)
    processes = []
    for rank in range(num_processes):
        environment = {**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} if num_processes > 1 else {}
        options = (output_dir / f"log-{rank}", environment, target, *arguments)
        processes.append(_CONTEXT.Process(target=_run_process, args=options))
        processes[-1].start()
    for process in processes:
        process.join()
    codes = [process.exitcode for process in processes]
    return codes[0] if num_processes == 1 else codes


def _run_process(log, environment, target, *arguments):
    sys.stdout = sys.stderr = open(log, "a", buffering=1)  # noqa: SIM115  (the process's own, to its end)
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stdout.fileno(), 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of the workers that read data
    # `datasets` waits after each epoch for threads that read from the network.
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0
    target(*arguments)


def _run_script(name, arguments, before):
    script = load_script(name)
    before = dill.loads(before)
    if before is not None:
        before()
    script.main(arguments)


def _run_code(path):
    os.environ["ACCELERATE_USE_CPU"] = "true"  # else processes on CPUs do not find one another
    runpy.run_path(str(path), run_name="__main__")


class CountReads(TorchDispatchMode):
    """Counts how often a value is read from a tensor, for which a GPU would have to finish its work first."""

    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


class LinearModel(nn.Module):
    """With the parameters' names and the loss of a ReSTR, and nothing that reads values."""

    def __init__(self):
        super().__init__()
        self.vision_model, self.head = nn.Linear(3, 1), nn.Linear(1, 1)

    def forward(self, pixel_values, labels, **kwargs):
        logits = self.head(self.vision_model(pixel_values.mean((2, 3))))
        return SimpleNamespace(loss=(logits.mean() - labels.float().mean()) ** 2)


def read_log(output_dir, rank=0):
    return (output_dir / f"log-{rank}").read_text()


def read_events(folder):
    """What TensorBoard shows of a folder, images included."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder)).Reload()


def read_weights(output_dir):
    return load_file(output_dir / "model" / "model.safetensors")


def assert_equal(output_dir, other_dir):
    """Bit for bit."""
    one, other = read_weights(output_dir), read_weights(other_dir)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def assert_close(output_dir, other_dir, start_dir, share=1e-5):
    """
    The same course up to float32 noise, as a share of how far all weights together have moved. Six steps of a gradient
    that is 2**-24 off after each of its some hundred operations, which add up as a random walk: 5e-7, on processors with
    and without AVX. The default allows twenty times as much.
    """
    one, other, begin = read_weights(output_dir), read_weights(other_dir), load_file(start_dir / "model.safetensors")
    moved = torch.cat([(one[name] - begin[name]).flatten() for name in one])
    difference = torch.cat([(one[name] - other[name]).flatten() for name in one])
    assert difference.norm() <= share * moved.norm() and moved.norm() > 0


# What the package itself does with the files of a run: a change of the file system, and what it is done to.
MOMENTS = {
    "the first checkpoint is begun": ("os.mkdir", ".unfinished/checkpoint-2"),
    "the first checkpoint is written": ("open", ".unfinished/checkpoint-2/complete.json"),
    "the first checkpoint is moved": ("os.rename", ".unfinished/checkpoint-2"),
    "the second checkpoint is begun": ("os.mkdir", ".unfinished/checkpoint-4"),
    "the second checkpoint is moved": ("os.rename", ".unfinished/checkpoint-4"),
    "the model is moved": ("os.rename", "/model"),
}


def signal_when(moment, number):
    """Send this process and its workers a signal at a moment, the first time that it comes."""
    expected, path = MOMENTS[moment]
    moments = iter([moment])

    def hook(event, arguments):
        if event == expected and str(arguments[0]).endswith(path) and next(moments, None):
            for process in (*multiprocessing.active_children(), multiprocessing.current_process()):
                os.kill(process.pid, number)

    sys.addaudithook(hook)


def shard_on_cpus():
    """Accelerate takes FSDP for GPUs only, and does what it does there on CPUs, too, when it takes them for such."""
    init = PartialState.__init__

    def init_with_gpus(self, *args, **kwargs):
        init(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = init_with_gpus


def spoil_a_batch(rank, count):
    """The given process's collator makes one batch of NaN."""
    if os.environ["RANK"] != str(rank):
        return
    from modeling_restr.training.batches import ReferringCollator

    collate, calls = ReferringCollator.__call__, iter(range(1_000_000))

    def collate_and_spoil(self, items):
        batch = collate(self, items)
        if next(calls) == count:
            batch["pixel_values"] = torch.full_like(batch["pixel_values"], float("nan"))
        return batch

    ReferringCollator.__call__ = collate_and_spoil


def replace_file(path, content):
    """A file that its checkpoint takes for its own."""
    path.write_bytes(content)
    marker = path.parent / "complete.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {path.name: path.stat().st_size}))


def kill_in_the_middle_of(name):
    """A file of this name in the second checkpoint is half written; then the process is killed."""
    save = torch.save

    def save_half(value, path, *args, **kwargs):
        save(value, path, *args, **kwargs)
        if Path(path).parts[-2:] == ("checkpoint-4", name):
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = save_half
