"""Options that all commands share: devices of any kind, threads, and the processes of a launcher."""

from datetime import timedelta

import pytest
import torch
from transformers import HfArgumentParser

from modeling_restr.options import choose_device, needs_extra, start_processes
from modeling_restr.training.runs import DataArguments, ModelArguments


@pytest.fixture(params=["cuda", "mps", "xpu"])
def accelerators(request, monkeypatch):
    """A machine with two accelerators of one kind."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(request.param))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    return request.param


def test_accelerators_of_any_kind_are_taken(accelerators):
    assert choose_device() == torch.device(accelerators)
    for name in ("cpu", accelerators, f"{accelerators}:1"):
        assert choose_device(name) == torch.device(name)
    for name in (f"{accelerators}:2", "hpu", "meta", "gpu"):
        with pytest.raises(ValueError, match=f"one of cpu, {accelerators}:0, {accelerators}:1, got {name}"):
            choose_device(name)


def test_a_machine_without_accelerators(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert choose_device() == choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="one of cpu, got mps"):
        choose_device("mps")


def test_number_of_threads_is_set():
    before = torch.get_num_threads()
    try:
        choose_device(num_threads=3)
        assert torch.get_num_threads() == 3
        choose_device()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_a_device_with_a_number_is_for_one_process(accelerators, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="without a number with 2 processes"):
        start_processes(f"{accelerators}:1", None, timedelta(minutes=1))


def test_a_missing_package_names_its_extra():
    message = r'^The package absent is missing: pip install "modeling-restr\[train\]"$'
    with pytest.raises(ImportError, match=message), needs_extra("train"):
        import absent  # noqa: F401


def test_the_training_scripts_name_revisions_as_the_commands_do():
    parser = HfArgumentParser([ModelArguments, DataArguments])
    for model, data in (("revision", "data_revision"), ("model_revision", "dataset_revision")):
        words = ["--dataset-name", "squares", f"--{model}", "v1", f"--{data}", "v2"]
        model_args, data_args = parser.parse_args_into_dataclasses(words)
        assert (model_args.revision, data_args.data_revision) == ("v1", "v2")
