"""Checkpoints under processes that are killed at every moment of their writing."""

import json
import multiprocessing
import os
import shutil
import signal
import sys

import pytest
import torch

from modeling_restr.training.checkpoints import (
    LossNotFiniteError,
    StopSignal,
    check_loss,
    check_weights,
    find_last_checkpoint,
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
    """Save one checkpoint after another; at the given event of the file system the process is killed."""
    events = iter(range(1_000_000))

    def kill_at_moment(event, arguments):
        is_change = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "open", "shutil.rmtree")
        if is_change and str(output_dir) in str(arguments[0]) and next(events) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(kill_at_moment)
    for step in steps:
        save(output_dir, step)


def test_a_kill_at_any_moment_leaves_the_last_whole_checkpoint(tmp_path):
    context = multiprocessing.get_context("fork")
    for moment in range(1000):
        output_dir = tmp_path / f"run-{moment}"
        process = context.Process(target=save_and_die, args=(output_dir, [10, 20, 30, 40], moment))
        process.start()
        process.join()
        last = find_last_checkpoint(output_dir)
        whole = list_checkpoints(output_dir)
        assert all(content(path) == expected_content(get_step(path)) for path in whole)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        steps = [get_step(path) for path in whole]
        assert steps in ([], [10], [10, 20], [10, 20, 30], [20, 30], [20, 30, 40], [30, 40])
        assert not (output_dir / ".unfinished").exists()
        save(output_dir, 50)  # the next run is not disturbed by what was left
        assert get_step(find_last_checkpoint(output_dir)) == 50 and (last is None or last.parent == output_dir)
    assert moment > 40 and [get_step(path) for path in whole] == [30, 40]
    assert {path.name for path in output_dir.iterdir()} == {"checkpoint-30", "checkpoint-40"}


def test_a_failure_while_writing_leaves_what_was_there(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(OSError, match="disk"), write_checkpoint(tmp_path, 2) as folder:
        (folder / "model.bin").write_bytes(b"half")
        raise OSError("the disk is full")
    assert find_last_checkpoint(tmp_path).name == "checkpoint-1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1"]


def test_an_older_checkpoint_of_the_same_step_is_replaced(tmp_path):
    for text in ("first", "second"):
        with write_checkpoint(tmp_path, 5) as folder:
            (folder / "text").write_text(text)
    assert (find_last_checkpoint(tmp_path) / "text").read_text() == "second"


@pytest.mark.parametrize("damage", ["missing", "short", "unmarked", "torn marker"])
def test_torn_copies_are_ignored_by_name_and_not_removed(tmp_path, caplog, damage):
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
    assert find_last_checkpoint(tmp_path) == tmp_path / "checkpoint-9"
    assert "checkpoint-10 is ignored" in caplog.text and "notes" not in caplog.text
    assert torn.exists()


def test_no_checkpoint_in_a_folder_that_is_empty_or_absent(tmp_path):
    assert find_last_checkpoint(tmp_path) is None
    assert find_last_checkpoint(tmp_path / "absent") is None


def test_checkpoints_are_ordered_by_number_and_the_protected_stay(tmp_path):
    for step in (5, 40, 300):
        shutil.copytree(tmp_path / "checkpoint-5", tmp_path / f"checkpoint-{step}") if step > 5 else save(tmp_path, 5)
    for everything in (None, 0, -1):
        keep_last_checkpoints(tmp_path, everything)
    assert [get_step(path) for path in list_checkpoints(tmp_path)] == [5, 40, 300]
    keep_last_checkpoints(tmp_path, 1, protected=[tmp_path / "checkpoint-5"])
    assert [get_step(path) for path in list_checkpoints(tmp_path)] == [5, 300]


def test_sigterm_is_noticed_and_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert not stop.received
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_not_finite_stops_with_the_ids(value):
    batch = {"image_ids": torch.tensor([7, 8]), "sent_ids": torch.tensor([71, 72, 81])}
    check_loss(torch.tensor(1.0), 4, batch)
    with pytest.raises(LossNotFiniteError, match=r"step 5 .*image_ids \[7, 8\], sent_ids \[71, 72, 81\]"):
        check_loss(torch.tensor(value), 4, batch)


def test_weights_that_are_not_finite_are_named():
    model = torch.nn.Linear(2, 3)
    check_weights(model, 4)
    model.bias.data[1] = float("nan")
    with pytest.raises(LossNotFiniteError, match=r"\['bias'\]"):
        check_weights(model, 4)
