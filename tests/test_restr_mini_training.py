"""restr-mini's recipe: a short run of the whole, what its parts compute, and its evaluation."""

import json

import evaluation
import numpy as np
import pytest
import torch
import train
from photographs import write_photographs
from PIL import Image
from scenes import Photographs, PhotoScenes, letterbox
from sentences import mistype, say_absent, spoken_words
from transformers import Dinov2Config, Dinov2Model

from modeling_restr import ReSTRForImageSegmentation, ReSTRProcessor


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
    """Photographs of all three parts, word vectors, and a small vision encoder."""
    folder = tmp_path_factory.mktemp("photos") / "data"
    write_photographs(folder, number=22, colored=True)
    vectors = np.random.default_rng(0).normal(size=(len(WORDS), 10))
    lines = [" ".join([word, *(f"{number:.4f}" for number in row)]) for word, row in zip(WORDS, vectors)]
    (folder / "words.txt").write_text("\n".join(lines) + "\n")
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=42, patch_size=14)
    Dinov2Model(config).save_pretrained(folder / "encoder")
    return folder


def arguments(folder, **options) -> list[str]:
    options = {
        "photos": folder,
        "vision_encoder": folder / "encoder",
        "word_vectors": folder / "words.txt",
        "image_size": 56,
        "vision_num_hidden_layers": 2,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_fusion_layers": 1,
        "num_fusion_attention_heads": 2,
        "text_hidden_size": 16,
        "text_num_hidden_layers": 1,
        "text_num_attention_heads": 2,
        "per_device_train_batch_size": 2,
        "warmup_steps": 1,
        "vision_warmup_steps": 2,
        "use_cpu": True,
        "logging_steps": 1,
        "save_steps": 2,
        "eval_steps": 4,
    } | options
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def test_training_resumes_and_its_model_is_evaluated(folder, tmp_path, capsys):
    for max_steps in (2, 4):
        train.main(arguments(folder, output_dir=tmp_path / "run", max_steps=max_steps))
    history = json.loads((tmp_path / "run/trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3, 4]  # it did not begin again
    assert any("eval_mean_iou" in entry for entry in history)

    files = ["--output_dir", str(tmp_path / "results")]
    wordings = [{"image_id": 10, "instance": 0, "wordings": ["left one", "the left thing"]}]
    (tmp_path / "wordings.json").write_text(json.dumps(wordings))
    model = str(tmp_path / "run" / "model")
    evaluation.main([model, "--photos", str(folder), "--wordings", str(tmp_path / "wordings.json"), *files])
    results = json.loads((tmp_path / "results" / "evaluation.json").read_text())
    sentences = results["results"]["model"]["all"]["sentences"]
    assert sentences > 0 and f"| all | {sentences} |" in capsys.readouterr().out
    assert set(results["results"]) == {"model", "other sentence", "bare category", "constant box"}
    assert results["wordings"]["wordings"] == 2 and results["data"].startswith("1 test photograph")
    assert Image.open(tmp_path / "results" / "sheet.png").width > 0


def test_a_batch_is_what_the_processor_makes_of_it(folder):
    args, training_args = train.parse_args(arguments(folder, output_dir=folder / "run", absent=0, noise=0, typos=0))
    dataset, _, categories = train.create_datasets(args, training_args)
    processor, _ = train.create_processor(args, spoken_words(categories))
    rows = [dataset[index] for index in range(3)]
    batch = train.unpack(train.SceneCollator(processor)(rows))
    scenes = [dataset.scenes[index] for index in range(3)]
    expected = processor(
        images=[Image.fromarray(scene.image) for scene in scenes],
        text=[row["texts"] for row in rows],
        return_tensors="pt",
    )
    for name in ("input_ids", "attention_mask", "image_indices"):
        assert torch.equal(batch[name], expected[name])
    torch.testing.assert_close(batch["pixel_values"], expected["pixel_values"], rtol=0, atol=1e-5)
    masks = np.concatenate([np.unpackbits(row["masks"], axis=2, count=56) for row in rows])
    assert np.array_equal(batch["labels"].numpy(), masks) and batch["labels"].any((1, 2)).all()


def test_each_parameter_learns_at_its_rate(folder):
    args, training_args = train.parse_args(arguments(folder, output_dir=folder / "run"))
    model = train.create_model(args, torch.randn(len(WORDS) + 4, 10))
    groups = train.create_groups(model, training_args)
    rate_of = {parameter: group for group in groups for parameter in group["params"]}
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(rate_of) == len(named) == sum(len(group["params"]) for group in groups)
    vision = [
        rate_of[named[name]]["lr"] for name in named if "encoder.layer" in name and name.endswith("q_proj.weight")
    ]
    last = training_args.vision_learning_rate
    assert vision == pytest.approx([last * training_args.vision_layer_decay, last])
    assert {group["name"] for group in groups} == {
        "vision -1",
        "vision 0",
        "vision 1",
        "positions",
        "words",
        "muon",
        "new",
    }
    assert all(parameter.ndim == 2 for group in groups if group.get("muon") for parameter in group["params"])


def test_words_that_no_sentence_has_stay_where_they_are(folder, tmp_path):
    train.main(arguments(folder, output_dir=tmp_path / "run", max_steps=2, eval_strategy="no"))
    model = ReSTRForImageSegmentation.from_pretrained(tmp_path / "run" / "model")
    processor = ReSTRProcessor.from_pretrained(tmp_path / "run" / "model")
    args, training_args = train.parse_args(arguments(folder, output_dir=tmp_path / "run", max_steps=2))
    train.set_seed(training_args.seed)
    *_, categories = train.create_datasets(args, training_args)
    spoken = spoken_words(categories)
    start = train.create_model(args, train.create_processor(args, spoken)[1]).get_input_embeddings().weight
    moved = (model.get_input_embeddings().weight - start.half().float()).abs().amax(1) > 0
    vocabulary = processor.tokenizer.get_vocab()
    silent = torch.tensor([number for word, number in vocabulary.items() if word not in spoken])
    assert moved.any() and not moved[silent].any()


def test_soft_dice_of_a_sure_answer_is_one_minus_the_dice_coefficient():
    labels = torch.zeros(2, 10, 10)
    labels[0, :4], labels[1, :, :5] = 1, 1
    logits = torch.full((2, 10, 10), -50.0)
    logits[0, 2:6], logits[1] = 50, 50
    expected = [1 - 2 * 20 / 80, 1 - 2 * 50 / 150]
    assert train.soft_dice_loss(logits, labels).item() == pytest.approx(np.mean(expected), abs=0.01)


def test_a_missing_config_is_not_passed_over():
    with pytest.raises(SystemExit, match=r"got missing\.args"):
        train.parse_args(["--config", "missing.args"])


def test_what_is_absent_is_shown_nowhere(folder):
    photographs = Photographs.load([folder], "train", progress=False)
    scenes = PhotoScenes(photographs, 100, 64, seed=1, paste=0.5)
    said = 0
    for index in range(100):
        text = say_absent(scenes[index], ["person", "dog", "elephant"], np.random.default_rng(index))
        shown = {*scenes[index].categories, *scenes[index].unclear_categories}
        assert text is None or not any(name in text.split() for name in shown)
        said += text is not None
    assert said > 20


def test_a_typo_changes_one_word_a_little():
    rng = np.random.default_rng(0)
    typos = [mistype("the elephant on the left", rng).split() for _ in range(100)]
    assert all(len(words) == 5 and words[0] == "the" for words in typos)
    assert {sum(a != b for a, b in zip(words, ["the", "elephant", "on", "the", "left"])) for words in typos} <= {0, 1}
    assert mistype("on it", rng) == "on it"


def test_constant_boxes_are_the_best_for_their_words(folder):
    """Compared with boxes drawn at random, on the very sentences they were found on."""
    described = evaluation.describe(Photographs.load([folder], "train", progress=False), 6)
    boxes = evaluation.ConstantBoxes(described)
    rng = np.random.default_rng(0)
    for words in boxes.best:
        cases = [
            (scene.masks[e.target], scene.image.shape[:2])
            for scene, expressions, _ in described
            for e in expressions
            if evaluation.place_words(e.text) == words
        ]
        best = np.mean([_iou(boxes.draw(" ".join(words), size), mask) for mask, size in cases])
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


def test_area_under_the_curve_is_that_of_all_pairs():
    rng = np.random.default_rng(0)
    present, absent = rng.integers(3, 10, 30) / 10, rng.integers(0, 7, 20) / 10
    pairs = [1.0 if p > a else 0.5 if p == a else 0.0 for p in present for a in absent]
    assert evaluation.area_under_curve(list(present), list(absent)) == pytest.approx(np.mean(pairs))
    scores = {"present": [0.9, 0.8, 0.95], "absent": [0.5, 0.7, 0.6]}
    assert 0.7 < evaluation.choose_score_threshold(scores) <= 0.8


def test_unheard_names_are_names_that_no_training_has():
    spoken = spoken_words(evaluation.UNHEARD)
    assert not spoken & {name for names in evaluation.UNHEARD.values() for name in names}


def test_letterboxed_masks_lie_on_their_image():
    inside = letterbox(np.ones((2, 30, 56), bool), 56)
    assert inside.sum() == 2 * 30 * 56 and inside[:, 13:43].all()
