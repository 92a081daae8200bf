"""Options that all commands share: spelled with underscores or dashes, with one meaning, for any kind of device."""

import argparse
import runpy
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from transformers import HfArgumentParser

from modeling_restr.options import ArgumentParser, add_options, choose_device, start_processes
from modeling_restr.training.runs import DataArguments, ModelArguments


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
# Those with HfArgumentParser have transformers' own options.
SCRIPTS = [path for path in sorted(EXAMPLES.rglob("*.py")) if "options import ArgumentParser" in path.read_text()]


def make_parser(*names, **changes):
    parser = ArgumentParser()
    add_options(parser, *names, **changes)
    return parser


@pytest.mark.parametrize("words", [["--output_dir", "a-b"], ["--output-dir", "a-b"], ["--output-dir=a-b"]])
def test_underscores_and_dashes_are_the_same(words):
    assert make_parser("output_dir").parse_args(words).output_dir == Path("a-b")
    parser = ArgumentParser()
    command = parser.add_subparsers().add_parser("prepare")
    add_options(command, output_dir={"required": True})
    assert parser.parse_args(["prepare", *words]).output_dir == Path("a-b")


def test_words_after_two_dashes_stay_as_they_are(monkeypatch):
    parser = ArgumentParser()
    parser.add_argument("words", nargs="*")
    monkeypatch.setattr(sys, "argv", ["command", "t-shirt", "--", "--with-dashes"])
    assert parser.parse_args().words == ["t-shirt", "--with-dashes"]


@pytest.mark.parametrize(("words", "message"), [(["--num_threads", "0"], "1 or more"), (["--device", "gpu"], "mps")])
def test_values_that_are_none_are_explained(words, message, capsys):
    with pytest.raises(SystemExit):
        make_parser("num_threads", "device").parse_args(words)
    assert message in capsys.readouterr().err


def choose(*words):
    return choose_device(make_parser("device", "num_threads").parse_args(words))


@pytest.fixture(params=["cuda", "mps", "xpu"])
def accelerators(request, monkeypatch):
    """A machine with two accelerators of a kind."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(request.param))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    return request.param


def test_accelerators_of_any_kind_are_taken(accelerators):
    assert choose() == torch.device(accelerators)
    assert choose("--device", "cpu") == torch.device("cpu")
    for name in (accelerators, f"{accelerators}:1"):
        assert choose("--device", name) == torch.device(name)
    for name in (f"{accelerators}:2", "hpu", "meta"):
        with pytest.raises(ValueError, match=f"one of cpu, {accelerators}:0, {accelerators}:1, got {name}"):
            choose("--device", name)


def test_a_machine_without_accelerators(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert choose() == choose("--device", "cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="one of cpu, got mps"):
        choose("--device", "mps")


def test_number_of_threads_is_set():
    number = torch.get_num_threads()
    try:
        choose("--num_threads", "3")
        assert torch.get_num_threads() == 3
        choose()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(number)


def test_a_number_of_a_device_is_for_one_process(accelerators, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    args = make_parser("device", "num_threads").parse_args(["--device", f"{accelerators}:1"])
    with pytest.raises(ValueError, match="without a number with 2 processes"):
        start_processes(args, timedelta(minutes=1))


@pytest.fixture(scope="module")
def options():
    """{script: {flag: argparse's action}}"""

    class Parsing(Exception):
        pass

    def stop(self, *args, **kwargs):
        raise Parsing(self)

    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ArgumentParser, "parse_args", stop)
        patch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
        for path in SCRIPTS:
            with pytest.raises(Parsing) as caught:
                runpy.run_path(str(path), run_name="__main__")
            found[path.stem] = dict(list_options(caught.value.args[0]))
    return found


def list_options(parser):
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from list_options(command)
        for flag in action.option_strings:
            yield flag, action


def test_every_command_takes_both_spellings(options):
    assert len(options) >= 10
    others = [path for path in EXAMPLES.rglob("*.py") if "argparse.ArgumentParser(" in path.read_text()]
    assert not others
    assert not [flag for flags in options.values() for flag in flags if "-" in flag.lstrip("-")]


@pytest.mark.parametrize("name", ["--revision", "--data_revision", "--device", "--num_threads"])
def test_a_flag_means_the_same_everywhere(options, name):
    meanings = {(flags[name].help, flags[name].type) for flags in options.values() if name in flags}
    assert len(meanings) == 1


def test_what_runs_a_model_says_which_and_where(options):
    for script in ("segment", "serve", "predict", "evaluate_refcoco", "evaluation"):
        assert {"--revision", "--device", "--num_threads"} <= options[script].keys()
    assert not [script for script, flags in options.items() if {"--output", "--model_revision"} & flags.keys()]


def test_the_training_scripts_name_revisions_as_the_others_do():
    parser = HfArgumentParser([ModelArguments, DataArguments])
    for model, data in (("revision", "data_revision"), ("model_revision", "dataset_revision")):
        words = ["--dataset-name", "squares", f"--{model}", "v1", f"--{data}", "v2"]
        model_args, data_args = parser.parse_args_into_dataclasses(words)
        assert (model_args.revision, data_args.data_revision) == ("v1", "v2")
