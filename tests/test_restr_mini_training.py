"""restr-mini's recipe: a short run of everything, what its parts compute, and its evaluation."""

import json
from pathlib import Path

import evaluation
import numpy as np
import pytest
import torch
import train
from photographs import write_photographs
from PIL import Image
from scenes import Photographs, PhotoScenes
from sentences import mistype, say_absent, spoken_words
from transformers import Dinov2Config, Dinov2Model

from modeling_restr import ReSTRForImageSegmentation, ReSTRProcessor


pytestmark = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="needs torch 2.9")

WORDS = ["person", "man", "dog", "puppy", "elephant", "animal", "left", "right", "top", "bottom", "middle"]
WORDS += ["the", "on", "in", "from", "second", "big", "small", "blue"]


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
    sizes = {
        "image_size": 56,
        "vision_num_hidden_layers": 2,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_fusion_layers": 1,
        "num_fusion_attention_heads": 2,
        "text_hidden_size": 16,
        "text_num_hidden_layers": 1,
        "text_num_attention_heads": 2,
    }
    places = {"photos": folder, "vision_encoder": folder / "encoder", "word_vectors": folder / "words.txt"}
    steps = {"max_steps": 4, "warmup_steps": 1, "vision_warmup_steps": 2, "save_steps": 2, "eval_steps": 4}
    machine = {"per_device_train_batch_size": 2, "logging_steps": 1, "use_cpu": True, "output_dir": folder / "run"}
    options = {**sizes, **places, **steps, **machine, **options}
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def run(folder):
    """A run that was interrupted after two of its four steps, and resumed."""
    for max_steps in (2, 4):
        train.main(arguments(folder, max_steps=max_steps))
    return folder / "run"


def test_training_resumes_and_validates(run):
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3, 4]
    assert any("eval_mean_iou" in entry for entry in history)


def test_a_trained_model_is_trained_further(folder, run, tmp_path, capsys):
    options = {"start_from": run / "model", "output_dir": tmp_path / "run", "max_steps": 3, "learning_rate": 1e-6}
    train.main(arguments(folder, **options, adamw_learning_rate=1e-6, hidden_size=48))
    before, after = (
        ReSTRForImageSegmentation.from_pretrained(path / "model").state_dict() for path in (run, tmp_path / "run")
    )
    assert before.keys() == after.keys()
    moved = {name: (before[name] - after[name]).abs().amax().item() for name in before}
    assert any(moved.values()) and max(moved.values()) < 5e-3


def test_words_that_no_sentence_has_stay_where_they_are(folder, run):
    model = ReSTRForImageSegmentation.from_pretrained(run / "model")
    vocabulary = ReSTRProcessor.from_pretrained(run / "model").tokenizer.get_vocab()
    args, training_args = train.parse_args(arguments(folder))
    train.set_seed(training_args.seed)
    *_, categories = train.create_datasets(args, training_args)
    spoken = spoken_words(categories)
    start = train.create_model(args, train.create_processor(args, spoken)[1]).get_input_embeddings().weight
    moved = (model.get_input_embeddings().weight - start.half().float()).abs().amax(1) > 0
    silent = torch.tensor([number for word, number in vocabulary.items() if word not in spoken])
    assert moved.any() and not moved[silent].any()


def test_a_trained_model_is_evaluated(folder, run, tmp_path, capsys):
    wordings = [{"image_id": 10, "instance": 0, "wordings": ["left one", "the left thing"]}]
    (tmp_path / "wordings.json").write_text(json.dumps(wordings))
    evaluation.main(
        model=str(run / "model"),
        photos=[folder],
        wordings=tmp_path / "wordings.json",
        output_dir=tmp_path / "results",
        device="cpu",
    )
    results = json.loads((tmp_path / "results" / "evaluation.json").read_text())
    sentences = results["results"]["model"]["all"]["sentences"]
    assert sentences > 0 and f"| all | {sentences} |" in capsys.readouterr().out
    assert set(results["results"]) == {"model", "other sentence", "bare category", "constant box"}
    assert results["wordings"]["wordings"] == 2 and results["data"].startswith("1 test photograph")
    assert Image.open(tmp_path / "results" / "sheet.png").width > 0


def test_as_many_sentences_are_changed_as_asked_for(folder):
    photographs = Photographs.load([folder], "train", progress=False)
    scenes = PhotoScenes(photographs, 20, 56, seed=1, paste=0.0)
    noise_words = train.NoiseWords(["standing", "there"], ["dog"])

    def draw(**shares: float) -> list[dict]:
        args, _ = train.parse_args(arguments(folder, **{"absent": 0, "noise": 0, "typos": 0, **shares}))
        dataset = train.SceneDataset(scenes, 3, args, ["zebra", "dog", "elephant", "person"], noise_words)
        return [dataset[index] for index in range(20)]

    plain, noisy, mistyped, absent = draw(), draw(noise=1), draw(typos=1), draw(absent=1)
    assert all(mask.shape == item["image"].size[::-1] and mask.any() for item in plain for mask in item["masks"])
    ids = [sent_id for item in plain for sent_id in item["sent_ids"]]
    assert len(set(ids)) == len(ids) and [item["image_id"] for item in plain] == list(range(20))
    for changed in (noisy, mistyped):
        assert all(np.array_equal(a["masks"], b["masks"]) for a, b in zip(plain, changed))
    assert all({"standing", "there"} & {*text.split()} for item in noisy for text in item["texts"])
    assert sum(a["texts"] != b["texts"] for a, b in zip(plain, mistyped)) > 10
    empty = [not mask.any() for item in absent for mask in item["masks"]]
    assert sum(empty) > len(empty) / 2


def test_each_parameter_learns_at_its_rate(folder):
    args, training_args = train.parse_args(arguments(folder))
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
    names = {group["name"] for group in groups}
    assert names == {"vision -1", "vision 0", "vision 1", "positions", "words", "muon", "new"}
    assert all(parameter.ndim == 2 for group in groups if group["muon"] for parameter in group["params"])


def test_rates_rise_and_fall_to_zero():
    factors = [train.schedule_factor(step, warmup=4, num_steps=12) for step in range(13)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0] and factors[8] == pytest.approx(0.5) and factors[12] == 0


def test_soft_dice_of_a_sure_answer_is_one_minus_the_dice_coefficient():
    labels = torch.zeros(2, 10, 10)
    labels[0, :4], labels[1, :, :5] = 1, 1
    logits = torch.full((2, 10, 10), -50.0)
    logits[0, 2:6], logits[1] = 50, 50
    expected = np.mean([1 - (2 * 20 + 1) / 81, 1 - (2 * 50 + 1) / 151])
    assert train.soft_dice_loss(logits, labels).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("name", "size", "scenes"), [("cpu.args", 224, 8), ("gpu.args", 336, 64)])
def test_the_configuration_files_are_read(name, size, scenes):
    path = Path(train.__file__).with_name(name)
    required = ["--photos", "photos", "--vision_encoder", "encoder", "--word_vectors", "words.txt"]
    args, training_args = train.parse_args(["--config", str(path), *required])
    assert (args.image_size, training_args.per_device_train_batch_size) == (size, scenes)


def test_a_missing_config_is_an_error():
    with pytest.raises(SystemExit, match=r"got missing\.args"):
        train.parse_args(["--config", "missing.args"])


def test_absent_things_are_not_in_the_scene(folder):
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
    """Compared with random boxes, on the sentences that they were found on."""
    described = evaluation.describe(Photographs.load([folder], "train", progress=False), 6)
    boxes = evaluation.ConstantBoxes(described)
    rng = np.random.default_rng(0)
    for words in boxes.best:
        masks = [
            scene.masks[expression.target]
            for scene, expressions, _ in described
            for expression in expressions
            if evaluation.place_words(expression.text) == words
        ]
        best = np.mean([_iou(boxes.draw(" ".join(words), mask.shape), mask) for mask in masks])
        for _ in range(20):
            box = evaluation.ConstantBoxes([])
            (x0, x1), (y0, y1) = np.sort(rng.random((2, 2)), axis=1)
            box.best = {frozenset(): (x0, y0, x1, y1)}
            assert (
                np.mean([_iou(box.draw("", mask.shape), mask) for mask in masks]) <= best + 0.03
            )  # they lie on a grid


def _iou(first, second):
    return (first & second).sum() / max((first | second).sum(), 1)


def test_area_under_the_curve_is_that_of_all_pairs():
    rng = np.random.default_rng(0)
    present, absent = rng.integers(3, 10, 30) / 10, rng.integers(0, 7, 20) / 10
    pairs = [1.0 if p > a else 0.5 if p == a else 0.0 for p in present for a in absent]
    assert evaluation.area_under_curve(list(present), list(absent)) == pytest.approx(np.mean(pairs))


def test_the_score_threshold_separates_present_from_absent():
    scores = evaluation.Scores(present=[0.9, 0.8, 0.95], absent=[0.5, 0.7, 0.6])
    assert evaluation.choose_score_threshold(scores) == 0.71  # the first of the best


def test_unheard_names_are_names_that_no_training_has():
    names = {name for names in evaluation.UNHEARD.values() for name in names}
    assert names and not spoken_words(evaluation.UNHEARD) & names
