"""The parts of examples/train_photographs.py and what goes with it, and a short run of the whole."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import training_runs
from photographs import CATEGORIES, write_photographs
from PIL import Image

from modeling_restr.data.photo_scenes import Photographs, PhotoScenes


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
import evaluate_photographs
import teacher_features
import train_photographs


WORDS = [
    "person",
    "man",
    "dog",
    "puppy",
    "elephant",
    "animal",
    "left",
    "right",
    "top",
    "bottom",
    "middle",
    "the",
    "on",
    "in",
    "from",
    "second",
    "big",
    "small",
    "blue",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Photographs, word vectors, and random numbers for the features of a teacher."""
    folder = tmp_path_factory.mktemp("photos") / "data"
    write_photographs(folder, number=12, colored=True)
    rng = np.random.default_rng(0)
    ids = np.array([number for number in range(1, 13) if number != 10])
    maps = {name: rng.normal(size=(len(ids), 4, 4, 3)).astype(np.float16) for name in ("coarse", "fine")}
    np.savez(folder / "teacher.npz", image_ids=ids, **maps)
    vectors = rng.normal(size=(len(WORDS), 10))
    lines = [" ".join([word, *(f"{number:.4f}" for number in row)]) for word, row in zip(WORDS, vectors)]
    (folder / "words.txt").write_text("\n".join(lines) + "\n")
    return folder


def test_teacher_is_looked_up_as_torch_samples_a_grid(folder):
    teacher = teacher_features.TeacherFeatures(folder / "teacher.npz")
    height, width = size = (60, 90)
    rng = np.random.default_rng(1)
    x, y = rng.uniform(0, width, 50), rng.uniform(0, height, 50)
    seen = teacher.look(12, size, x, y)
    points = np.stack([x / 90 * 2 - 1, (y + 15) / 90 * 2 - 1], axis=1)  # of the letterboxed square, from -1 to 1
    grid = torch.from_numpy(points).float()[None, None]
    for maps, part in zip(teacher.maps, (seen[:, :3], seen[:, 3:])):
        features = torch.from_numpy(maps[10].astype(np.float32)).permute(2, 0, 1)[None]
        expected = F.grid_sample(features, grid, align_corners=False, padding_mode="border")[0, :, 0].T
        assert np.allclose(part, expected, atol=2e-3)
    with pytest.raises(ValueError, match="image 10"):
        teacher.look(10, size, x, y)


def test_reduced_features_are_the_principal_components():
    rng = np.random.default_rng(0)
    deviations = np.array([9.0, 4.0, 1.0, 0.1, 0.1])
    rotation = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    plain = rng.normal(size=(40, 8, 8, 5)) * deviations
    reduced = teacher_features.reduce((plain @ rotation + 3).astype(np.float32), 3, rng).astype(np.float64)
    flat, components = plain.reshape(-1, 5)[:, :3], reduced.reshape(-1, 3)
    correlation = np.abs(np.corrcoef(flat.T, components.T)[:3, 3:])
    assert np.allclose(correlation, np.eye(3), atol=0.08)
    assert np.isclose(components.var(0).mean(), 1, atol=0.1)
    assert np.allclose(components.std(0) ** 2 / components.std(0)[0] ** 2, deviations[:3] / 9, atol=0.05)


def test_patches_are_told_what_covers_them_and_where_it_is(folder):
    photographs = Photographs.load(folder / "instances.json", folder / "images", held_out=False, progress=False)
    teacher = teacher_features.TeacherFeatures(folder / "teacher.npz")
    scenes = PhotoScenes(photographs, 20, 64, seed=0, paste=0.5)
    patches = train_photographs.PatchDataset(scenes, teacher, CATEGORIES, 16)
    placed = 0
    for index in range(len(scenes)):
        scene, row = scenes[index], patches[index]
        height, width = scene.image.shape[:2]
        top, left = (64 - height) // 2, (64 - width) // 2
        for patch in range(16):
            y, x = patch // 4 * 16 - top, patch % 4 * 16 - left
            window = (slice(max(y, 0), max(y + 16, 0)), slice(max(x, 0), max(x + 16, 0)))
            shares = np.array([mask[window].sum() / 256 for mask in scene.masks])
            for number, name in enumerate(CATEGORIES):
                covers = [share >= 0.3 for share, own in zip(shares, scene.categories) if own == name]
                assert row["patch_labels"][patch, number] == any(covers)
            assert row["is_placed"][patch] == (max(shares, default=0) >= 0.4)
            if row["is_placed"][patch]:
                rows, columns = scene.masks[shares.argmax()].nonzero()
                way = [columns.min() + columns.max() + 1 - 2 * x - 16, rows.min() + rows.max() + 1 - 2 * y - 16]
                assert np.allclose(row["places"][patch, :2], 4 * np.array(way) / 2 / 64, atol=1e-5)
                placed += 1
            is_outside = not (0 <= y + 8 < height and 0 <= x + 8 < width)
            assert np.isnan(row["teacher"][patch]).all() == is_outside
    assert placed > 30


def test_soft_dice_of_a_sure_answer_is_one_minus_the_dice_coefficient():
    labels = torch.zeros(2, 10, 10)
    labels[0, :4], labels[1, :, :5] = 1, 1
    logits = torch.full((2, 10, 10), -50.0)
    logits[0, 2:6], logits[1] = 50, 50
    expected = [1 - 2 * 20 / 80, 1 - 2 * 50 / 150]
    assert train_photographs.soft_dice_loss(logits, labels).item() == pytest.approx(np.mean(expected), abs=0.01)


def test_constant_boxes_are_the_best_for_their_words(folder):
    """Compared with boxes drawn at random, on the very sentences they were found on."""
    photographs = Photographs.load(folder / "instances.json", folder / "images", held_out=False, progress=False)
    described = evaluate_photographs.describe(photographs, 6)
    boxes = evaluate_photographs.ConstantBoxes(described)
    rng = np.random.default_rng(0)
    for words in boxes.best:
        cases = [
            (scene.masks[e.target], scene.image.shape[:2])
            for scene, expressions in described
            for e in expressions
            if evaluate_photographs.place_words(e.text) == words
        ]
        text = " ".join(words)
        best = np.mean([_iou(boxes.draw(text, size), mask) for mask, size in cases])
        for _ in range(20):
            x, y = np.sort(rng.random((2, 2)), axis=1)
            others = []
            for mask, (height, width) in cases:
                other = np.zeros_like(mask)
                other[round(y[0] * height) : round(y[1] * height), round(x[0] * width) : round(x[1] * width)] = True
                others.append(_iou(other, mask))
            assert np.mean(others) <= best + 0.03  # boxes lie on a grid


def _iou(first, second):
    return (first & second).sum() / max((first | second).sum(), 1)


def test_training_on_photographs_resumes_and_its_model_is_evaluated(folder, tmp_path, capsys):
    data = {"instances_file": folder / "instances.json", "image_dir": folder / "images"}
    options = {"image_size": 32, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3}
    options |= {"num_fusion_layers": 1, "num_fusion_attention_heads": 2, "text_num_hidden_layers": 1}
    options |= {"per_device_train_batch_size": 2, "pretraining_steps": 2, "pretraining_batch_size": 2}
    options |= {"eval_steps": 4, "save_steps": 2, "logging_steps": 1, "warmup_steps": 1, "decay_steps": 2}
    options |= {"teacher_file": folder / "teacher.npz", "word_vectors": folder / "words.txt", **data}
    flags = ["--config", str(EXAMPLES / "restr_mini_configs" / "cpu_2_cores.args")]
    for max_steps in (2, 4):
        code = training_runs.run(train_photographs, tmp_path / "run", flags=flags, max_steps=max_steps, **options)
        assert code == 0, training_runs.read_log(tmp_path / "run")
    history = json.loads((tmp_path / "run/trainer_state.json").read_text())["log_history"]
    assert max(entry["step"] for entry in history) == 4 and any("eval_unseen_mean_iou" in entry for entry in history)
    steps = [entry["step"] for entry in history if "loss" in entry]
    assert sorted(steps) == [1, 2, 3, 4]  # it did not begin again

    files = ["--output", str(tmp_path / "results.json"), "--sheet", str(tmp_path / "sheet.png")]
    inputs = [f"--{name}={value}" for name, value in data.items()]
    evaluate_photographs.main([str(tmp_path / "run" / "model"), *inputs, *files])
    results = json.loads((tmp_path / "results.json").read_text())
    sentences = results["results"]["all"]["sentences"]
    assert sentences > 0 and f"| all | {sentences} |" in capsys.readouterr().out
    assert results["data"].startswith("1 held-out photograph")
    assert set(results["results"]) == set(results["results_of_the_best_constant_box"])
    assert Image.open(tmp_path / "sheet.png").width > 0


@pytest.mark.parametrize("name", ["cpu_2_cores", "gpu"])
def test_models_of_the_configurations_are_small_enough_to_ship(folder, name):
    options = ["--instances_file", "a", "--image_dir", "b", "--teacher_file", "c"]
    options += ["--word_vectors", str(folder / "words.txt"), "--text_num_attention_heads", "2"]
    config = f"{EXAMPLES}/restr_mini_configs/{name}.args"
    args, training_args = train_photographs.parse_args(["--config", config, *options])
    _, vectors = train_photographs.create_processor(args)
    num_parameters = train_photographs.create_model(args, vectors).num_parameters() + 25_000 * 50  # GloVe's words
    assert 2 * num_parameters < 40e6  # bytes of float16
    assert training_args.decay_steps < training_args.max_steps


def test_a_missing_config_is_not_passed_over(folder):
    with pytest.raises(SystemExit, match=r"got missing\.args"):
        train_photographs.parse_args(["--config", "missing.args"])
