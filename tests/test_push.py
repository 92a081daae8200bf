"""Pushing a model to a local Hub: its checks, the uploaded files, and the files that are kept."""

import json
from pathlib import Path

import pytest
import torch
from hub_server import TOKEN, serve
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import save_file
from test_bundle import CODE_FILES, MODEL_FILES, SERVING_FILES
from tiny_training import make_model, make_processor

from modeling_restr.hub import Example, push_page_to_hub, push_to_hub, save_bundle, write_model_card


PHOTO = Path(__file__).resolve().parents[1] / "examples" / "photos" / "held_out" / "000000173350.jpg"
FILES = CODE_FILES | SERVING_FILES | MODEL_FILES | {"README.md"}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with serve() as hub:
        hub.connect(tmp_path, monkeypatch)
        yield hub


@pytest.fixture
def folder(tmp_path) -> Path:
    return save_bundle(*make_pair(), tmp_path / "model")


def make_pair(seed: int = 0) -> tuple:
    processor = make_processor()
    return make_model(processor, seed=seed), processor


def test_model_and_processor_are_pushed_with_a_card_that_later_pushes_keep(hub):
    for _ in range(2):
        push_to_hub(make_pair(), "restr")
    repository = hub.repositories["model", "tester/restr"]
    assert repository.files().keys() == FILES and repository.titles == ["Upload ReSTR"]
    HfApi().upload_file(path_or_fileobj=b"mine", path_in_repo="README.md", repo_id="tester/restr")
    push_to_hub(make_pair(seed=1), "tester/restr", commit_message="Train for longer")
    assert repository.files()["README.md"] == b"mine"
    assert repository.titles[-1] == "Train for longer"


def test_the_command_writes_the_card_and_pushes(hub, folder, restr, tmp_path):
    (tmp_path / "recipe.json").write_text('{"max_steps": 7}')
    card = ["--recipe", tmp_path / "recipe.json", "--license", "cc-by-4.0", "--dataset", "a/b", "--dataset", "c/d"]
    example = ["--photo", PHOTO, "--sentence", "the red square", "--sentence", "blue thing", "--credit", "by me"]
    texts = ["--training-data", "Squares.", "--limits", "Only squares.", "--base_model", "me/start"]
    done = restr("push", folder, "restr", "--private", "--tag", "v1", *card, *example, *texts)
    repository = hub.repositories["model", "tester/restr"]
    assert done.code == 0 and f"is at {repository.tags['v1']}" in done.out and repository.private
    files = repository.files()
    assert files.keys() == FILES | {"example.jpg", "example_overlay.png", "example_1.png", "example_2.png"}
    text = files["README.md"].decode()
    for part in ("| `max_steps` | 7 |", "license: cc-by-4.0", "- a/b\n- c/d", "Squares.", "Only squares.", "me/start"):
        assert part in text


def test_old_weights_go_with_the_commit_that_brings_the_new_ones(hub, folder):
    push_to_hub(folder, "restr")
    (folder / "model.safetensors").unlink()
    make_pair(seed=1)[0].save_pretrained(folder, max_shard_size="30KB")
    (folder / "checkpoint-1").mkdir()
    save_file({"a": torch.zeros(1)}, folder / "checkpoint-1" / "model.safetensors")
    torch.save({}, folder / "training_args.bin")
    push_to_hub(folder, "restr")
    repository = hub.repositories["model", "tester/restr"]
    weights = repository.files().keys() - FILES
    assert "model.safetensors.index.json" in weights and len(weights) > 2
    assert all(path.startswith("model") for path in weights) and "model.safetensors" not in repository.files()
    assert len(repository.titles) == 2


def test_tag_of_another_commit_is_explained(hub):
    first = push_to_hub(make_pair(), "restr", tag="v1")
    with pytest.raises(ValueError, match=f"the tag 'v1' of tester/restr is at {first.oid}: choose another"):
        push_to_hub(make_pair(seed=1), "restr", tag="v1")
    assert hub.repositories["model", "tester/restr"].tags == {"v1": first.oid}


def test_card_of_other_weights_is_not_pushed(hub, folder):
    write_model_card(folder, example=Example(PHOTO, ["the red square"], "somebody"))
    push_to_hub(folder, "restr")
    save_bundle(*make_pair(seed=1), folder)
    # The first has no card of its own: that of the repository is of other weights.
    for bundle, repo_id in ((make_pair(seed=1), "restr"), (folder, "restr"), (folder, "other")):
        with pytest.raises(ValueError, match="got one of other weights"):
            push_to_hub(bundle, repo_id)
    assert len(hub.repositories["model", "tester/restr"].titles) == 1 and len(hub.repositories) == 1


@pytest.mark.parametrize(
    ("repo_id", "options", "card", "message"),
    [
        ("restr", {}, "---\nlicense: All mine!\n---\n", 'the Hub accepts, but it says: "license" must be one of'),
        ("restr", {}, "---\nlicense: [mit\n---\n", "with metadata that the Hub accepts, but it says: while parsing"),
        ("tester/no name", {}, None, "Repo id must use alphanumeric"),
        ("a/b/c", {}, None, "Repo id must be in the form"),
        ("restr", {"tag": "first try"}, None, "Expected a tag of letters, digits and .* got 'first try'"),
    ],
)
def test_what_the_hub_would_refuse_creates_no_repository(hub, folder, repo_id, options, card, message):
    if card is not None:
        (folder / "README.md").write_text(card)
    with pytest.raises(ValueError, match=message):
        push_to_hub(folder, repo_id, **options)
    assert not hub.repositories


def test_card_links_an_existing_space(hub, folder):
    write_model_card(folder, space="tester/demo")
    with pytest.raises(ValueError, match="links to the Space tester/demo, which does not exist"):
        push_to_hub(folder, "restr")
    assert not hub.repositories
    HfApi().create_repo("demo", repo_type="space", space_sdk="gradio")
    push_to_hub(folder, "restr")
    card = hub.repositories["model", "tester/restr"].files()["README.md"].decode()
    assert "**Try it in your browser: [tester/demo](https://huggingface.co/spaces/tester/demo).**" in card


@pytest.fixture
def page(tmp_path) -> Path:
    """The files of a page that matter to a push."""
    folder = tmp_path / "page"
    (folder / "runtime").mkdir(parents=True)
    for name in ("index.html", "image_encoder.onnx", "sentence_query.onnx", "runtime/a.wasm", ".hidden"):
        (folder / name).write_bytes(name.encode())
    (folder / "settings.json").write_text('{"name": "model", "links": {"model": null, "paper": "https://a.b"}}')
    (folder / "README.md").write_text("---\ntitle: Model\nsdk: static\n---\n\n# Model\n")
    return folder


def test_page_is_pushed_to_a_static_space_that_the_card_links_first(hub, folder, page, restr):
    done = restr("push", folder, "restr", "--space", "tester/page", "--web", page)
    assert done.code == 0, done.err
    space = hub.repositories["space", "tester/page"]
    assert f"{hub.url}/spaces/tester/page is at {space.branches['main']}" in done.out and space.sdk == "static"
    names = {"index.html", "image_encoder.onnx", "sentence_query.onnx", "runtime/a.wasm", "settings.json", "README.md"}
    assert space.files().keys() == names
    assert space.files()["runtime/a.wasm"] == b"runtime/a.wasm"
    settings = json.loads(space.files()["settings.json"])
    assert settings["name"] == "tester/restr"
    assert settings["links"] == {"model": "https://huggingface.co/tester/restr", "paper": "https://a.b"}
    card = ModelCard(space.files()["README.md"].decode())
    assert card.data.to_dict() == {"title": "Model", "sdk": "static", "models": ["tester/restr"]}
    text = ModelCard(hub.repositories["model", "tester/restr"].files()["README.md"].decode()).text
    link = "**Try it in your browser: [tester/page](https://huggingface.co/spaces/tester/page).**"
    assert text.strip().split("\n\n")[1] == link
    assert '"name": "model"' in (page / "settings.json").read_text()


def test_page_replaces_the_one_before(hub, page):
    push_page_to_hub(page, "page", private=True)
    (page / "runtime" / "a.wasm").rename(page / "runtime" / "b.wasm")
    for _ in range(2):
        push_page_to_hub(page, "tester/page")
    space = hub.repositories["space", "tester/page"]
    assert {"runtime/b.wasm"} == {name for name in space.files() if name.startswith("runtime/")}
    assert space.private and space.titles == ["Upload the page"] * 2
    assert json.loads(space.files()["settings.json"])["name"] == "model"


def test_page_is_not_pushed_in_part_or_over_another_space(hub, folder, page, restr):
    HfApi().create_repo("demo", repo_type="space", space_sdk="gradio")
    with pytest.raises(ValueError, match="Expected a static Space, got tester/demo, which has another SDK"):
        push_page_to_hub(page, "demo")
    (page / "sentence_query.onnx").unlink()
    with pytest.raises(ValueError, match=r"which lacks sentence_query\.onnx: write it with `restr export MODEL --web"):
        push_page_to_hub(page, "page")
    done = restr("push", folder, "restr", "--web", page)
    assert done.code and "add --space you/page" in done.err
    assert hub.repositories.keys() == {("space", "tester/demo")}
    assert not hub.repositories["space", "tester/demo"].titles


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors", "pipeline_restr.py"])
def test_folder_that_lacks_a_part_is_not_pushed(hub, folder, missing):
    (folder / missing).unlink()
    with pytest.raises(ValueError, match=f"lacks {missing}: save it"):
        push_to_hub(folder, "restr")
    with pytest.raises(ValueError, match="there is no"):
        push_to_hub(folder / "absent", "restr")
    assert not hub.repositories


@pytest.mark.parametrize(("repo_id", "message"), [("restr", "Invalid user token"), ("tester/restr", "401")])
def test_nothing_is_pushed_without_a_token(hub, folder, monkeypatch, repo_id, message):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HfHubHTTPError, match=message):
        push_to_hub(folder, repo_id)
    assert not hub.repositories
    push_to_hub(folder, repo_id, token=TOKEN)
    assert len(hub.repositories["model", "tester/restr"].titles) == 1
