"""Runs of the training scripts in processes of their own, which can be killed at any moment, and their results."""

import importlib.util
import json
import multiprocessing
import os
import runpy
import signal
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import datasets
import dill
import numpy as np
import torch
import yaml
from accelerate import DistributedType, PartialState
from safetensors.torch import load_file
from tiny_training import make_dataset, make_model, make_processor, write_prepared
from torch import nn
from torch.distributed import TCPStore
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import ViTConfig, ViTModel, pipeline

from modeling_restr.data.canonical import decode_mask
from modeling_restr.hub import save_bundle
from modeling_restr.training.recipe import create_parameter_groups


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NUM_EXPRESSIONS = 11  # in the validation data
TIMEOUT = 300  # seconds that the processes of a run may take
OPTIONS = {
    "max_steps": 6,
    "save_steps": 2,
    "logging_steps": 1,
    "validation_split": "",
    "per_device_train_batch_size": 4,
    "expressions_per_image": 3,
    "learning_rate": 1e-2,
    "dataloader_num_workers": 0,
}


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script  # its dataclasses look themselves up
    spec.loader.exec_module(script)
    return script


@dataclass
class Script:
    """A training script. The same call of `run` means the same for both."""

    name: str
    optimizer_file: str
    random_file: str
    sharded_files: set[str]
    options: dict = field(default_factory=dict)
    evaluation_options: dict = field(default_factory=dict)

    @property
    def module(self) -> ModuleType:
        return sys.modules.get(self.name) or load_script(self.name)

    @property
    def is_loop(self) -> bool:
        return self.name.endswith("no_trainer")

    def run(
        self, output_dir, inputs, before=None, num_processes=1, model="drop_path", sgd=False, sharded=False, **options
    ):
        """
        Exit codes of the script's processes.

        Args:
            before: Called in each process before the script starts.
            sgd: Use SGD. Adam would amplify the rounding noise of gradients that are zero.
            sharded: Use FSDP.
        """
        defaults = {"dataset_name": inputs, "model_name_or_path": inputs / model, **OPTIONS, **self.options}
        if options.get("validation_split"):
            defaults |= self.evaluation_options
        options = defaults | options
        preparations, flags = [before], []
        if sgd and self.is_loop:
            preparations.append(_use_sgd)
        elif sgd:
            options["optim"] = "sgd"
        if sharded:
            preparations.append(_shard_on_cpus)
        if sharded and self.is_loop:
            preparations.append(_shard_as_configured)
        elif sharded:
            flags.append("--fsdp")
        words = [f"--{name}={value}" for name, value in options.items() if value is not None]
        arguments = [*flags, *words, f"--output_dir={output_dir}"]
        return run_script(self.name, arguments, output_dir, num_processes, filter(None, preparations))


TRAINER = Script(
    "run_referring_segmentation",
    "optimizer.pt",
    "rng_state.pth",
    {"pytorch_model_fsdp.bin"},
    {"eval_strategy": "no", "disable_tqdm": True},
    {"eval_strategy": "steps"},
)
LOOP = Script(
    "run_referring_segmentation_no_trainer",
    "optimizer.bin",
    "random_states_0.pkl",
    {"pytorch_model_fsdp_0/__0_0.distcp", "pytorch_model_fsdp_0/__1_0.distcp"},
)


def make_inputs(folder, seed=0):
    """
    A folder of data with two tiny models, `drop_path` with a high rate of drop path and `plain` without any, a tiny ViT
    `vit`, and word vectors `vectors.txt`.
    """
    sizes = {"train": 9, "val": 5}
    splits = {split: make_dataset(number, seed=seed + len(split)) for split, number in sizes.items()}
    write_prepared(folder, splits, num_files=2)
    processor = make_processor()
    for name, rate in {"drop_path": 0.5, "plain": 0.0}.items():
        save_bundle(make_model(processor, rate), processor, folder / name)
    sizes = {"hidden_size": 36, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    ViTModel(ViTConfig(**sizes, image_size=48, patch_size=8)).save_pretrained(folder / "vit")
    vectors = np.random.default_rng(0).normal(size=(5, 300))
    words = ("red", "green", "thing", "left", "dog")
    lines = [f"{word} {' '.join(map(str, vector))}" for word, vector in zip(words, vectors)]
    (folder / "vectors.txt").write_text("\n".join(lines))
    return folder


def read_vectors(inputs):
    """{word: vector} of `vectors.txt`."""
    lines = [line.split() for line in (inputs / "vectors.txt").read_text().splitlines()]
    return {word: np.array(vector, dtype=np.float32) for word, *vector in lines}


def make_validation_data():
    """The validation data of `make_inputs`."""
    return make_dataset(5, seed=len("val"))


# Runs are forked from a process that has imported everything and started no thread. A fork of this process would lack
# the threads of PyTorch's pool.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["training_runs", "transformers.trainer", "modeling_restr.training.trainer"])


def run_script(name, arguments, output_dir, num_processes=1, preparations=()):
    """Exit codes of a script's processes. Each calls the preparations first."""
    preparations = dill.dumps(list(preparations), recurse=True)
    return _run_processes(output_dir, num_processes, _run_script, name, arguments, preparations)


def run_code(code, output_dir, num_processes=1):
    """Exit codes of processes that each run a piece of code."""
    (output_dir / "code.py").write_text(code)
    return _run_processes(output_dir, num_processes, _run_code, output_dir / "code.py")


def _run_processes(output_dir, num_processes, target, *arguments):
    """Start processes with the environment that torchrun gives them. Those that hang are killed."""
    # This process keeps the store, as torchrun does. It chooses a free port and holds it, so no other run can take it.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    group = {"MASTER_ADDR": store.host, "MASTER_PORT": str(store.port), "WORLD_SIZE": str(num_processes)}
    group["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    output_dir.mkdir(exist_ok=True, parents=True)
    processes = []
    for rank in range(num_processes):
        environment = {**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} if num_processes > 1 else {}
        options = (output_dir / f"log-{rank}", environment, target, *arguments)
        processes.append(_CONTEXT.Process(target=_run_process, args=options))
        processes[-1].start()
    stop = time.monotonic() + TIMEOUT
    for process in processes:
        process.join(max(stop - time.monotonic(), 0))
        process.kill()
        process.join()
    codes = [process.exitcode for process in processes]
    return codes[0] if num_processes == 1 else codes


def _run_process(log, environment, target, *arguments):
    sys.stdout = sys.stderr = open(log, "a", buffering=1)  # noqa: SIM115  (stays open until the process ends)
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stdout.fileno(), 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # for the workers that read data
    # `datasets` waits after each epoch for threads that read from the network.
    datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0
    target(*arguments)


def _run_script(name, arguments, preparations):
    script = load_script(name)
    for prepare in dill.loads(preparations):
        prepare()
    script.main(arguments)


def _run_code(path):
    os.environ["ACCELERATE_USE_CPU"] = "true"  # else processes on CPUs do not find one another
    runpy.run_path(str(path), run_name="__main__")


def _use_sgd():
    def create_optimizer(model, recipe):
        return torch.optim.SGD(create_parameter_groups(model, recipe.learning_rate), lr=recipe.learning_rate)

    LOOP.module.create_optimizer = create_optimizer


def _shard_on_cpus():
    """Accelerate uses FSDP on GPUs only. It does the same on CPUs if it takes them for GPUs."""
    init = PartialState.__init__

    def init_with_gpus(self, *args, **kwargs):
        init(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = init_with_gpus


def _shard_as_configured():
    config = yaml.safe_load((EXAMPLES / "accelerate_configs" / "fsdp.yaml").read_text())["fsdp_config"]
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    os.environ.update({name.upper(): str(value) for name, value in config.items()})


class CountReads(TorchDispatchMode):
    """Counts how often a value is read from a tensor. On a GPU each such read would wait for its work."""

    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


class LinearModel(nn.Module):
    """With the parameter names and the loss of a ReSTR. Its forward reads no values."""

    def __init__(self):
        super().__init__()
        self.vision_model, self.head = nn.Linear(3, 1), nn.Linear(1, 1)

    def forward(self, pixel_values, labels, **kwargs):
        logits = self.head(self.vision_model(pixel_values.mean((2, 3))))
        return SimpleNamespace(loss=(logits.mean() - labels.float().mean()) ** 2)


def read_log(output_dir, rank=0):
    return (output_dir / f"log-{rank}").read_text()


def read_events(folder):
    """What TensorBoard shows of a folder, including images."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder)).Reload()


def read_weights(output_dir):
    return load_file(output_dir / "model" / "model.safetensors")


def measure_overall_iou(model):
    """Overall IoU on the validation data, measured with the pipeline."""
    pipe = pipeline("referring-image-segmentation", model=str(model))
    intersection = union = 0
    for row in make_validation_data():
        for reference in row["references"]:
            target = decode_mask(reference["mask"])
            texts = [expression["text"] for expression in reference["expressions"]]
            for result in pipe(row["image"], text=texts):
                predicted = np.asarray(result["mask"]) > 0
                intersection += (predicted & target).sum()
                union += (predicted | target).sum()
    return intersection / union


def assert_equal(output_dir, other_dir):
    """Equal weights, bit for bit."""
    one, other = read_weights(output_dir), read_weights(other_dir)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def assert_close(output_dir, other_dir, start_dir, share=1e-5):
    """
    Equal weights up to float32 rounding, relative to how far all weights together have moved. Each of the some hundred
    operations of a gradient rounds by 2**-24, and these errors add up like a random walk: after six steps to 5e-7, on
    processors with and without AVX. The default allows twenty times as much.
    """
    one, other, begin = read_weights(output_dir), read_weights(other_dir), load_file(start_dir / "model.safetensors")
    moved = torch.cat([(one[name] - begin[name]).flatten() for name in one])
    difference = torch.cat([(one[name] - other[name]).flatten() for name in one])
    assert difference.norm() <= share * moved.norm() and moved.norm() > 0


# What the package does with a run's files: the name of the audit event, and the end of its path.
MOMENTS = {
    "the first checkpoint is begun": ("os.mkdir", ".unfinished/checkpoint-2"),
    "the first checkpoint is written": ("open", ".unfinished/checkpoint-2/complete.json"),
    "the first checkpoint is moved": ("os.rename", ".unfinished/checkpoint-2"),
    "the second checkpoint is begun": ("os.mkdir", ".unfinished/checkpoint-4"),
    "the second checkpoint is moved": ("os.rename", ".unfinished/checkpoint-4"),
    "the model is moved": ("os.rename", "/model"),
}


def signal_when(moment, number):
    """Send this process and its workers a signal when a moment comes for the first time."""
    expected, path = MOMENTS[moment]
    moments = iter([moment])

    def hook(event, arguments):
        if event == expected and str(arguments[0]).endswith(path) and next(moments, None):
            for process in (*multiprocessing.active_children(), multiprocessing.current_process()):
                os.kill(process.pid, number)

    sys.addaudithook(hook)


def kill_in_the_middle_of(name):
    """Kill the process when half of a file in the second checkpoint is written."""
    save = torch.save

    def save_half(value, path, *args, **kwargs):
        save(value, path, *args, **kwargs)
        if Path(path).parts[-2:] == ("checkpoint-4", name):
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = save_half


def on_process(rank, action, *arguments):
    """`action`, but on the process of this rank only."""
    return partial(_act_on_process, rank, action, *arguments)


def _act_on_process(rank, action, *arguments):
    if os.environ["RANK"] == str(rank):
        action(*arguments)


def spoil_batch(index):
    """Let the collator make one batch of NaN."""
    from modeling_restr.training.batches import ReferringCollator

    collate, calls = ReferringCollator.__call__, iter(range(1_000_000))

    def collate_and_spoil(self, items):
        batch = collate(self, items)
        if next(calls) == index:
            batch["pixel_values"] = torch.full_like(batch["pixel_values"], float("nan"))
        return batch

    ReferringCollator.__call__ = collate_and_spoil


def replace_file(path, content):
    """Replace a file in a checkpoint, which still counts as complete."""
    path.write_bytes(content)
    marker = path.parent / "complete.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {path.name: path.stat().st_size}))
