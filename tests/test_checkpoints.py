"""Checkpoints when the process is killed at any moment, the stop signal, and checks of losses and weights."""

import json
import multiprocessing
import os
import shutil
import signal
import sys

import pytest
import torch

from modeling_restr.training import checkpoints
from modeling_restr.training.checkpoints import (
    LossMonitor,
    LossNotFiniteError,
    StopSignal,
    check_weights,
    find_checkpoint,
    get_step,
    keep_last_checkpoints,
    list_checkpoints,
    write_checkpoint,
)


CONTENT = {"model.bin": b"weights" * 100, "optimizer/state.bin": b"moments" * 50}


def save(output_dir, step):
    with write_checkpoint(output_dir, step) as folder:
        for name, content in CONTENT.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content + str(step).encode())
    keep_last_checkpoints(output_dir, 2)


def content(checkpoint):
    return {name: (checkpoint / name).read_bytes() for name in CONTENT}


def expected_content(step):
    return {name: value + str(step).encode() for name, value in CONTENT.items()}


def save_and_die(output_dir, steps, moment):
    """Save one checkpoint after another. The given event of the file system kills the process."""
    events = iter(range(1_000_000))

    def kill_at_moment(event, arguments):
        is_change = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "open", "shutil.rmtree")
        if is_change and str(output_dir) in str(arguments[0]) and next(events) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(kill_at_moment)
    for step in steps:
        save(output_dir, step)


def test_a_kill_at_any_moment_leaves_the_last_complete_checkpoint(tmp_path):
    context = multiprocessing.get_context("fork")
    for moment in range(1000):
        output_dir = tmp_path / f"run-{moment}"
        process = context.Process(target=save_and_die, args=(output_dir, [10, 20, 30, 40], moment))
        process.start()
        process.join()
        last = find_checkpoint(output_dir)
        complete = list_checkpoints(output_dir)
        assert all(content(path) == expected_content(get_step(path)) for path in complete)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        steps = [get_step(path) for path in complete]
        assert steps in ([], [10], [10, 20], [10, 20, 30], [20, 30], [20, 30, 40], [30, 40])
        assert not (output_dir / ".unfinished").exists()
        save(output_dir, 50)  # leftovers do not disturb the next run
        assert get_step(find_checkpoint(output_dir)) == 50 and (last is None or last.parent == output_dir)
    assert moment > 40 and [get_step(path) for path in complete] == [30, 40]
    assert {path.name for path in output_dir.iterdir()} == {"checkpoint-30", "checkpoint-40"}


def test_a_failure_while_writing_changes_nothing(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(OSError, match="disk"), write_checkpoint(tmp_path, 2) as folder:
        (folder / "model.bin").write_bytes(b"half")
        raise OSError("the disk is full")
    assert find_checkpoint(tmp_path).name == "checkpoint-1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1"]


def test_an_older_checkpoint_of_the_same_step_is_replaced(tmp_path):
    for text in ("first", "second"):
        with write_checkpoint(tmp_path, 5) as folder:
            (folder / "text").write_text(text)
    assert (find_checkpoint(tmp_path) / "text").read_text() == "second"


@pytest.mark.parametrize("damage", ["missing", "short", "unmarked", "torn marker"])
def test_incomplete_copies_are_reported_and_not_removed(tmp_path, caplog, damage):
    save(tmp_path, 9)
    save(tmp_path, 10)
    torn = tmp_path / "checkpoint-10"
    if damage == "missing":
        (torn / "optimizer" / "state.bin").unlink()
    elif damage == "short":
        (torn / "model.bin").write_bytes(b"weig")
    elif damage == "unmarked":
        (torn / "complete.json").unlink()
    else:
        (torn / "complete.json").write_text(json.dumps({"model.bin": 3})[:-2])
    (tmp_path / "checkpoint-11-notes").mkdir()  # no checkpoint's name
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoint-9"
    assert "checkpoint-10 is ignored" in caplog.text and "notes" not in caplog.text
    assert torn.exists()


@pytest.mark.parametrize("marker", ["null", "[]", "1", '"x"', '{"model.bin": "700"}', "[" * 10**5, "\udcff"])
def test_markers_of_another_type_are_ignored(tmp_path, caplog, marker):
    save(tmp_path, 10)
    (tmp_path / "checkpoint-10" / "complete.json").write_text(marker, errors="surrogateescape")
    assert find_checkpoint(tmp_path) is None
    assert "checkpoint-10 is ignored" in caplog.text
    with pytest.raises(ValueError, match=r"Expected a complete folder checkpoint-STEP .*, got .*checkpoint-10\."):
        find_checkpoint(tmp_path, tmp_path / "checkpoint-10")


def test_a_checkpoint_of_another_name_is_refused(tmp_path):
    save(tmp_path, 10)
    checkpoint = tmp_path / "checkpoint-10"
    assert find_checkpoint(tmp_path / "absent", str(checkpoint)) == checkpoint
    for name in ("copy", "checkpoint-ten", "checkpoint-1" + 20 * "0"):
        checkpoint = checkpoint.rename(tmp_path / name)
        with pytest.raises(ValueError, match=f"got .*{name}"):
            find_checkpoint(tmp_path, checkpoint)
        assert find_checkpoint(tmp_path) is None


def test_no_checkpoint_in_a_folder_that_is_empty_or_absent(tmp_path):
    assert find_checkpoint(tmp_path) is None
    assert find_checkpoint(tmp_path / "absent") is None


def test_checkpoints_are_ordered_by_number_and_the_protected_stay(tmp_path):
    for step in (5, 40, 300):
        shutil.copytree(tmp_path / "checkpoint-5", tmp_path / f"checkpoint-{step}") if step > 5 else save(tmp_path, 5)
    for everything in (None, 0, -1):
        keep_last_checkpoints(tmp_path, everything)
    assert [get_step(path) for path in list_checkpoints(tmp_path)] == [5, 40, 300]
    keep_last_checkpoints(tmp_path, 1, protected=[tmp_path / "checkpoint-5"])
    assert [get_step(path) for path in list_checkpoints(tmp_path)] == [5, 300]


def test_sigterm_is_noticed_and_the_earlier_handler_restored():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert not stop.is_requested()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.is_requested()
    assert signal.getsignal(signal.SIGTERM) is before


def add_losses(monitor, *losses):
    for step, loss in enumerate(losses, start=4):
        batch = {"image_ids": [step, 10 * step], "sent_ids": [100 * step]}
        monitor.add(torch.tensor(loss, requires_grad=True), step, batch)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_losses_that_are_not_finite_raise_with_the_ids_since_the_last_check(value):
    monitor = LossMonitor()
    monitor.check()
    add_losses(monitor, 1.0, 2.0)
    monitor.check()
    add_losses(monitor, 1.0, value, value)
    with pytest.raises(LossNotFiniteError) as raised:
        monitor.check()
    assert "in step 5. This process's batch in that step: image_ids [5, 50], sent_ids [500]." in str(raised.value)
    ids = "image_ids [4, 40, 5, 50, 6, 60], sent_ids [400, 500, 600]"
    assert f"from step 4 to 6: {ids}." in str(raised.value)
    monitor.check()  # each is reported once


def test_all_processes_stop_at_the_loss_of_one(monkeypatch):
    monitor = LossMonitor()
    add_losses(monitor, 1.0, 2.0)
    monkeypatch.setattr(checkpoints, "gather", lambda index: torch.cat([index, torch.tensor([1.0])]))
    with pytest.raises(LossNotFiniteError, match=r"step 5 of process 1.*image_ids \[5, 50\]"):
        monitor.check()
    add_losses(monitor, 1.0)
    monkeypatch.setattr(checkpoints, "gather", lambda index: torch.cat([index, index]))
    monitor.check()


def test_adding_a_loss_reads_no_value():
    monitor = LossMonitor()
    for step in range(3):  # a tensor without a value cannot be read
        monitor.add(torch.zeros((), device="meta"), step, {"image_ids": [1], "sent_ids": [2]})


def test_weights_that_are_not_finite_are_named(monkeypatch):
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2, 2)).sum().backward()
    optimizer.step()
    check_weights(model, 4, optimizer)
    with monkeypatch.context() as patch, pytest.raises(LossNotFiniteError, match="another process"):
        patch.setattr(checkpoints, "gather", lambda flag: torch.cat([flag, ~flag]))
        check_weights(model, 4, optimizer)
    optimizer.state[model[0].weight]["exp_avg_sq"][0] = float("inf")
    check_weights(model, 4)
    with pytest.raises(LossNotFiniteError, match=r"after step 4, .*\['exp_avg_sq of 0.weight'\]"):
        check_weights(model, 4, optimizer)
    model[0].bias.data[1] = float("nan")
    model[1].running_mean[0] = float("nan")
    with pytest.raises(LossNotFiniteError, match=r"\['0.bias', '1.running_mean'\]"):
        check_weights(model, 4)
