"""Model cards show the results and pictures of their weights."""

import json
import re
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
from hub_server import serve
from huggingface_hub import ModelCard, ModelCardData
from PIL import Image
from tiny_training import make_dataset, make_model, make_processor, write_prepared

from modeling_restr import ReSTRPipeline
from modeling_restr.evaluation.run import run_evaluation
from modeling_restr.hub import Example, hash_weights, push_to_hub, save_bundle, write_model_card
from modeling_restr.visualization import add_legend, draw_masks


REPOSITORY = Path(__file__).resolve().parents[1]
EXAMPLES = REPOSITORY / "examples"
PHOTO = EXAMPLES / "photos" / "held_out" / "000000173350.jpg"
TEXTS = ["the red square", 'thing on the left, "blue"']
PRECISIONS = [f"precision@0.{tenth}" for tenth in range(5, 10)]
METRICS = ["overall_iou", "mean_iou", *PRECISIONS]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    processor = make_processor()
    return save_bundle(make_model(processor), processor, tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture(scope="module")
def evaluation(saved, tmp_path_factory) -> dict:
    """The results that `restr evaluate` writes for the model."""
    root = tmp_path_factory.mktemp("evaluation")
    write_prepared(root / "squares", {"val": make_dataset(4)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(root / "cache"))
        patch.setattr("datasets.config.HF_DATASETS_CACHE", root / "cache")
        return run_evaluation(str(saved), str(root / "squares"), "val", root / "output")


def write_json(path: Path, content: dict) -> Path:
    path.write_text(json.dumps(content))
    return path


def read_tables(text: str) -> list[list[str]]:
    """The rows of the tables in a section."""
    lines = [line for line in text.splitlines() if line.startswith("|") and "---" not in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def read_sections(path: Path) -> dict[str, str]:
    parts = re.split(r"^## (.*)$", ModelCard.load(path).text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2]))


def test_results_are_those_of_the_evaluation(folder, evaluation, tmp_path):
    path = write_model_card(folder, model_id="me/squares", evaluations=[write_json(tmp_path / "val.json", evaluation)])
    data = ModelCard.load(path).data
    found = {result.metric_type: result.metric_value for result in data.eval_results}
    assert found == {name: round(100 * evaluation["metrics"][name], 2) for name in METRICS}
    assert data.metrics == METRICS and data.model_name == "squares"
    for result in data.eval_results:
        assert (result.dataset_name, result.dataset_split) == ("squares", "val")
        assert result.task_type == "image-segmentation"
        assert result.dataset_args == {"fingerprint": evaluation["data"]["fingerprint"]}
        assert "images' own size, input 32x32, float32, threshold 0.5" in result.metric_name
    head, row = read_tables(read_sections(path)["Evaluation"])
    shown = dict(zip(head, row))
    assert shown["overall IoU"] == f"{100 * evaluation['metrics']['overall_iou']:.2f}"
    assert shown["mean IoU"] == f"{100 * evaluation['metrics']['mean_iou']:.2f}"
    assert shown["Precision@0.5"] == f"{100 * evaluation['metrics']['precision@0.5']:.2f}"
    assert shown["expressions"] == str(evaluation["metrics"]["num_expressions"]) and shown["threshold"] == "0.5"
    assert str(folder.parent) not in path.read_text() and "pytest" not in path.read_text()


def test_numbers_of_the_paper_have_their_own_column_and_need_the_same_data(folder, evaluation, tmp_path):
    evaluation = evaluation | {"data": evaluation["data"] | {"benchmark": "refcoco", "differences": []}}
    path = write_model_card(folder, evaluations=[write_json(tmp_path / "val.json", evaluation)])
    head, row = read_tables(read_sections(path)["Evaluation"])
    assert dict(zip(head, row))["*overall IoU of the paper's own model*"] == "*67.22*"
    assert "not a result of these weights" in path.read_text()
    assert 67.22 not in [result.metric_value for result in ModelCard.load(path).data.eval_results]
    evaluation["data"]["differences"] = ["1 image of 1,500"]
    path = write_model_card(folder, evaluations=[write_json(tmp_path / "val.json", evaluation)])
    assert "paper's own model" not in path.read_text() and "67.22" not in path.read_text()


def test_figures_are_copied_and_shown_with_captions(folder, tmp_path):
    figure = EXAMPLES / "photos" / "clock.jpg"
    path = write_model_card(folder, figures={figure: "A [clock](https://example.org). Taken by somebody."})
    assert (folder / "clock.jpg").read_bytes() == figure.read_bytes()
    section = read_sections(path)["Evaluation"]
    assert "](clock.jpg)\n\nA [clock](https://example.org). Taken by somebody." in section
    assert "SHA-256" in section  # so that it is not pushed with other weights


@pytest.mark.parametrize("change", ["weights", "processor", "more weights", "fewer weights"])
def test_evaluation_of_another_model_is_refused(folder, evaluation, tmp_path, change):
    recorded = dict(evaluation["model"]["revision"])
    if change == "weights":
        make_model(make_processor(), seed=1).save_pretrained(folder)
    elif change == "processor":
        (folder / "processor_config.json").write_text("{}")
    elif change == "more weights":
        shutil.copy(folder / "model.safetensors", folder / "model-00001-of-00002.safetensors")
    else:
        recorded["model-00002-of-00002.safetensors"] = "0" * 64
    path = write_json(tmp_path / "val.json", evaluation | {"model": {"name": "model", "revision": recorded}})
    with pytest.raises(ValueError, match="Expected an evaluation of the model in "):
        write_model_card(folder, evaluations=[path])
    assert not (folder / "README.md").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"metrics": {}, "model": {"name": "model"}}, "does not say which weights"),
        ({"results": {}}, r"Expected a JSON file of `restr evaluate` .* with the keys \['results'\]"),
        ({"mean_iou": 0.7}, "Expected a JSON file of `restr evaluate`"),
    ],
)
def test_files_that_are_not_evaluations_of_known_weights_are_refused(folder, tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        write_model_card(folder, evaluations=[write_json(tmp_path / "val.json", content)])


def test_evaluations_of_one_split_may_not_contradict_each_other(folder, evaluation, tmp_path):
    first, again = (write_json(tmp_path / f"{name}.json", evaluation) for name in ("first", "again"))
    stricter = write_json(tmp_path / "stricter.json", evaluation | {"threshold": 0.7})
    path = write_model_card(folder, evaluations=[first, again, stricter])
    head, *rows = read_tables(read_sections(path)["Evaluation"])
    assert [row[head.index("threshold")] for row in rows] == ["0.5", "0.7"]
    metrics = evaluation["metrics"] | {"mean_iou": 0.999}
    other = write_json(tmp_path / "other.json", evaluation | {"metrics": metrics})
    with pytest.raises(ValueError, match=r"one result for squares, val, but .*other\.json contradicts another"):
        write_model_card(folder, evaluations=[first, other])


def test_evaluation_of_a_commit_on_the_hub_is_valid_for_the_same_weights(folder, evaluation, tmp_path, monkeypatch):
    with serve() as hub:
        hub.connect(tmp_path, monkeypatch)
        commit = push_to_hub(folder, "restr").oid
        evaluation = evaluation | {"model": {"name": "tester/restr", "revision": commit}}
        path = write_json(tmp_path / "val.json", evaluation)
        write_model_card(folder, evaluations=[path])
        make_model(make_processor(), seed=1).save_pretrained(folder)
        with pytest.raises(ValueError, match=r"model\.safetensors differ"):
            write_model_card(folder, evaluations=[path])


def test_recipe_data_and_limits_are_shown(folder):
    training = {"max_steps": 400_000, "learning_rate": 1e-5, "dataset": "me/refcoco", "start": "/home/me/vit|base"}
    training |= {"metric_for_best_model": "mean_iou"}
    path = write_model_card(
        folder,
        training=training,
        data="RefCOCO. Mean IoU 71.2 in the paper.",
        datasets=["me/refcoco"],
        base_model="google/vit-base-patch16-384",
        license="cc-by-4.0",
        limits="It never saw a night.",
        space="me/try-it",
    )
    sections = read_sections(path)
    assert read_tables(sections["Training"].replace("\\|", "/"))[1:] == [
        ["`max_steps`", "400000"],
        ["`learning_rate`", "1e-05"],
        ["`dataset`", "me/refcoco"],
        ["`start`", "vit/base"],
        ["`metric_for_best_model`", "mean_iou"],
    ]
    assert "It never saw a night." in sections["Limits"]
    assert "32x32 pixels" in sections["Limits"] and "first 6 words" in sections["Limits"]
    assert "RefCOCO. Mean IoU 71.2 in the paper." in sections["Data and licence"]
    assert "The weights are under the licence `cc-by-4.0`" in sections["Data and licence"]
    assert "no live widget" in sections["Use"]
    assert "@inproceedings{kim2022restr" in sections["Citation"]
    data = ModelCard.load(path).data.to_dict()
    assert data["license"] == "cc-by-4.0" and data["datasets"] == ["me/refcoco"]
    assert data["base_model"] == "google/vit-base-patch16-384" and "model-index" not in data


def test_without_evaluation_there_is_no_result(folder):
    path = write_model_card(folder)
    data = ModelCard.load(path).data.to_dict()
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "image-segmentation"
    assert data["language"] == "en" and "referring-image-segmentation" in data["tags"]
    assert not {"model-index", "metrics", "widget", "license"} & data.keys()
    assert "No licence was named for the weights" in read_sections(path)["Data and licence"]
    assert read_sections(path)["Evaluation"].strip() == "Not evaluated."


def test_example_shows_what_the_model_finds(folder):
    path = write_model_card(folder, model_id="me/restr", example=Example(PHOTO, TEXTS, "by her, CC BY-SA 2.0"))
    pipe = ReSTRPipeline(model=make_model(make_processor()).eval(), processor=make_processor())
    masks = [result["mask"] for result in pipe(Image.open(PHOTO), text=TEXTS)]
    photo = Image.open(PHOTO).convert("RGB")
    pictures = {"example_overlay.png": add_legend(draw_masks(photo, masks), TEXTS)}
    pictures |= {
        f"example_{number}.png": add_legend(draw_masks(photo, [mask]), [text])
        for number, (text, mask) in enumerate(zip(TEXTS, masks), start=1)
    }
    for name, picture in pictures.items():
        assert np.array_equal(np.asarray(Image.open(folder / name)), np.asarray(picture))
    assert (folder / "example.jpg").read_bytes() == PHOTO.read_bytes()
    card = ModelCard.load(path)
    assert [(entry["src"], entry["text"], entry["output"]["url"]) for entry in card.data.to_dict()["widget"]] == [
        ("example.jpg", TEXTS[0], "example_1.png"),
        ("example.jpg", TEXTS[1], "example_2.png"),
    ]
    assert "(example_overlay.png)" in card.text and "Photo: by her, CC BY-SA 2.0." in card.text
    code = re.search(r"```python\n(.*?)```", card.text, flags=re.DOTALL)[1]
    assert f"text={json.dumps(TEXTS)})" in code
    assert f"- `model.safetensors`: SHA-256 `{hash_weights(folder)['model.safetensors']}`" in card.text


def test_the_command_keeps_results_and_wants_complete_examples(folder, evaluation, tmp_path, restr):
    path = write_model_card(folder, evaluations=[write_json(tmp_path / "val.json", evaluation)])
    before = path.read_text()
    done = restr("push", folder, "a/b", "--space", "a/c")
    assert done.code == 1 and f"because {path} has results that would be lost: pass its evaluation" in done.err
    for options in (["--photo", PHOTO], ["--photo", PHOTO, "--sentence", "the dog"], ["--credit", "by me"]):
        done = restr("push", folder, "a/b", *options)
        assert done.code == 1 and "Expected a photo, at least one sentence and a credit together" in done.err
    assert path.read_text() == before


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (Example("photo.webp", TEXTS, "by me"), "Expected a photo as .jpg, .jpeg or .png"),
        (Example(PHOTO, [], "by me"), "at least one sentence"),
        (Example(PHOTO, TEXTS, " "), "and the photo's credit"),
    ],
)
def test_bad_example_is_explained(folder, example, message):
    with pytest.raises(ValueError, match=message):
        write_model_card(folder, example=example)
    assert not (folder / "README.md").exists()


def test_snippet_without_example_runs_with_another_photo(folder, tmp_path, monkeypatch, capsys):
    path = write_model_card(folder)
    code = re.search(r"```python\n(.*?)```", path.read_text(), flags=re.DOTALL)[1]
    shutil.copy(PHOTO, tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "snippet.py").write_text(code.replace("path/or/id", str(folder)))
    runpy.run_path(str(tmp_path / "snippet.py"))
    assert Image.open("mask1.png").size == Image.open("mask2.png").size == Image.open(PHOTO).size
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no weights"):
        write_model_card(folder, example=Example(PHOTO, TEXTS, "by me"))


def test_template_fills_without_any_value():
    card = ModelCard.from_template(ModelCardData(), template_path=str(REPOSITORY / "model_card.md"))
    assert card.data.library_name == "transformers" and "Not evaluated." in card.text
    assert 'model="path/or/id", trust_remote_code=True)' in card.text
