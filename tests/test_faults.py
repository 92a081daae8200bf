"""
Long work that is killed at random moments, or whose disk is full or read-only, and a Hub that fails during a push.

The result is that of undisturbed work. Prediction has tests of its own (test_prediction.py). On 2026-11-28, these commands
made 50 kills:

    RESTR_KILLS=14 RESTR_KILL_SEED=1 pytest -n 0 -m slow -s tests/test_faults.py -k killed
    RESTR_KILLS=8 RESTR_KILL_SEED=1 pytest -n 0 -m slow -s tests/test_prediction.py -k kills
"""

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from data_layouts import write_coco
from folders import read_files
from hub_server import Handler, serve
from tiny_training import make_dataset, make_model, make_processor, write_prepared
from training_runs import EXAMPLES, OPTIONS, TRAINER, assert_equal, make_inputs

from modeling_restr.hub import save_bundle


NUM_KILLS = int(os.environ.get("RESTR_KILLS", "1"))  # of each command
SEED = int(os.environ.get("RESTR_KILL_SEED", "0"))
LONG = [pytest.param(name, marks=pytest.mark.long) for name in ("preparation", "training")]
ONE_SLOW = pytest.mark.parametrize("name", [*LONG, pytest.param("evaluation", marks=pytest.mark.slow)])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Files that all commands read: annotations in COCO's layout, prepared data and a model."""
    folder = tmp_path_factory.mktemp("inputs")
    write_coco(folder / "instances.json", folder / "images", num_images=40)
    write_prepared(folder / "data", {"val": make_dataset(400)})
    processor = make_processor()
    save_bundle(make_model(processor), processor, folder / "model")
    return make_inputs(folder / "training").parent


def command_line(name, inputs, output_dir):
    if name == "training":
        options = OPTIONS | TRAINER.options | {"max_steps": 40, "save_steps": 4}
        options |= {"dataset_name": inputs / "training", "model_name_or_path": inputs / "training" / "drop_path"}
        words = [EXAMPLES / f"{TRAINER.name}.py", *(f"--{key}={value}" for key, value in options.items())]
        return [sys.executable, *words, f"--output_dir={output_dir}"]
    words = {
        "preparation": f"prepare coco --instances-file {inputs}/instances.json --image-dir {inputs}/images"
        " --splits train,val --val-share 0.2 --images-per-shard 2",
        "evaluation": f"evaluate {inputs}/model {inputs}/data --split val",
    }
    return [sys.executable, "-m", "modeling_restr.cli", *words[name].split(), "--output-dir", output_dir]


def start(name, inputs, output_dir):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(inputs / "cache")}
    with open(f"{output_dir}.log", "a") as log:
        command = [str(word) for word in command_line(name, inputs, output_dir)]
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def wait_for_files(run, output_dir, number):
    """Wait until a run has written this number of files, or has ended."""
    while run.poll() is None and sum(path.is_file() for path in output_dir.rglob("*")) < number:
        time.sleep(0.01)


def assert_same_result(name, output_dir, other_dir):
    if name == "training":
        assert_equal(output_dir, other_dir)
    elif name == "evaluation":
        one, other = (json.loads((folder / "results.json").read_text()) for folder in (output_dir, other_dir))
        assert one["metrics"] == other["metrics"] and one["expressions"] == other["expressions"]
    else:
        assert read_files(output_dir) == read_files(other_dir)


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory):
    """The results of the commands, each made when it is first asked for."""
    folder = tmp_path_factory.mktemp("undisturbed")

    def run(name):
        output_dir = folder / name
        if not output_dir.exists():
            assert start(name, inputs, output_dir).wait() == 0, Path(f"{output_dir}.log").read_text()[-3000:]
        return output_dir

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", ["preparation", "training", "evaluation"])
def test_work_that_is_killed_at_random_moments_ends_in_the_same_result(name, inputs, undisturbed, tmp_path):
    randomness, num_kills, trial = random.Random(SEED), 0, 0
    begin = time.time()
    expected = undisturbed(name)
    times = [path.stat().st_mtime for path in expected.rglob("*") if path.is_file()]
    seconds_of_work = max(times) - min(times)  # after the imports
    while num_kills < NUM_KILLS:
        trial += 1
        output_dir = tmp_path / str(trial)
        run = start(name, inputs, output_dir)
        while run.poll() is None and num_kills < NUM_KILLS:
            written = sum(path.is_file() for path in output_dir.rglob("*"))
            if randomness.random() < 0.8:  # otherwise mostly imports are interrupted
                wait_for_files(run, output_dir, written + 1)
            with suppress(subprocess.TimeoutExpired):
                run.wait(randomness.uniform(0, seconds_of_work / 2))
                break
            run.kill()
            run.wait()
            num_kills += 1
            run = start(name, inputs, output_dir)
        assert run.wait() == 0, Path(f"{output_dir}.log").read_text()[-3000:]
        assert_same_result(name, output_dir, expected)
    print(f"{name}: seed {SEED}, {num_kills} kills in {trial} runs, {time.time() - begin:.0f} s")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KiB. Call it with options to change it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], check=False, capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("this user cannot mount a file system")

    def change(options):
        subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)

    change.folder = folder
    yield change
    subprocess.run(["umount", "--lazy", folder], check=True)


@ONE_SLOW
def test_work_resumes_when_its_disk_has_space_again(name, inputs, undisturbed, small_disk):
    output_dir = small_disk.folder / "output"
    log = Path(f"{output_dir}.log")
    log.symlink_to(small_disk.folder.parent / "log")
    assert start(name, inputs, output_dir).wait() != 0
    assert "No space left on device" in log.read_text()
    small_disk("size=64m")
    assert start(name, inputs, output_dir).wait() == 0, log.read_text()[-3000:]
    assert_same_result(name, output_dir, undisturbed(name))


@ONE_SLOW
def test_a_read_only_disk_is_named_before_any_work(name, inputs, small_disk):
    output_dir = small_disk.folder / "output"
    log = small_disk.folder.parent / "log"
    Path(f"{output_dir}.log").symlink_to(log)
    log.touch()
    small_disk("ro")
    assert start(name, inputs, output_dir).wait() != 0
    assert "Read-only file system" in log.read_text().splitlines()[-1]


def fail(handler):
    handler.send(503, b'{"error": "Service Unavailable"}')


def cut(handler):
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def stall(handler):
    time.sleep(3)
    cut(handler)


@pytest.mark.parametrize(
    "fault",
    [
        *(pytest.param(fault, marks=pytest.mark.slow) for fault in (fail, cut)),
        pytest.param(stall, marks=pytest.mark.long),
    ],
)
def test_a_push_through_faults_of_the_hub_ends_in_the_same_files(fault, tmp_path, monkeypatch, restr):
    """Each request of a push fails in one push. A push that gives up is repeated."""
    processor = make_processor()
    save_bundle(make_model(processor), processor, tmp_path / "model")
    answer = Handler.answer
    with serve() as hub:
        hub.connect(tmp_path / "home", monkeypatch)
        assert push(restr, tmp_path / "model") == 0
        expected, num_requests = hub.repositories["model", "tester/restr"].files(), len(hub.requests)
        for number in range(num_requests):
            hub.repositories.clear()
            hub.lfs_objects.clear()
            countdown = iter(range(100))

            def answer_or_fail(handler, number=number, countdown=countdown):
                if next(countdown) == number:
                    handler.content = handler.read_content()
                    fault(handler)
                else:
                    answer(handler)

            for method in ("do_GET", "do_HEAD", "do_POST", "do_PUT"):
                monkeypatch.setattr(Handler, method, answer_or_fail)
            code = push(restr, tmp_path / "model")
            repository = hub.repositories.get(("model", "tester/restr"))
            assert repository is None or repository.files() in ({}, expected)
            if code != 0:
                assert push(restr, tmp_path / "model") == 0
            assert hub.repositories["model", "tester/restr"].files() == expected


def push(restr, folder):
    done = restr("push", folder, "restr")
    assert done.code == 0 or "Error: " in done.err, done.err
    assert "Traceback" not in done.err
    return done.code
