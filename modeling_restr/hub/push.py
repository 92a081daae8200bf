"""Push a model to the Hub with everything that a machine without this package needs to run it, and its web page."""

import json
import os
import re
import tempfile
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, RepoCard
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, validate_repo_id

from ..data.records import read_json_object
from ..modeling_restr import ReSTRForImageSegmentation
from ..processing_restr import ReSTRProcessor
from .bundle import WEIGHT_PATTERNS, add_code, save_bundle
from .model_card import (
    MODEL_ID_PLACEHOLDER,
    Example,
    build_model_card,
    check_card,
    find_card,
    is_boilerplate,
    write_model_card,
)


# The files of a model. Training may leave others in the folder.
_PATTERNS = ("*.safetensors", "*.json", "*.py", "*.md", "*.png", "*.jpg", "*.jpeg", "LICENSE*", "requirements.txt")
_REQUIRED_FILES = ("config.json", "processor_config.json", "tokenizer.json")
_PAGE_FILES = ("README.md", "index.html", "settings.json", "image_encoder.onnx", "sentence_query.onnx")
_TAG = re.compile(r"[\w.+-]+(/[\w.+-]+)*", re.ASCII)
_SPACE_LINK = re.compile(r"\]\(https://huggingface\.co/spaces/([\w.-]+/[\w.-]+)\)")


def push_to_hub(
    bundle: str | os.PathLike | tuple[ReSTRForImageSegmentation, ReSTRProcessor],
    repo_id: str,
    *,
    private: bool | None = None,
    tag: str | None = None,
    commit_message: str = "Upload ReSTR",
    token: str | None = None,
) -> CommitInfo:
    """
    Push a model to the Hub in one commit: weights, config, processor, code, model card and its pictures.
    [`save_bundle`] explains how to load it. Everything is checked before a repository is created. If nothing has
    changed since the last push, there is no commit.

    `model.push_to_hub`, `processor.push_to_hub` and the stock Trainer write transformers' own model card instead. This
    function replaces such a card unless it was edited.

    Args:
        bundle (`str`, `os.PathLike` or `tuple`):
            A model's folder, or a model and its processor. A folder without code, such as examples/restr_mini, is
            pushed with this package's code. Subfolders are not pushed. If the folder has no README.md, or only the one
            that transformers generates, the repository keeps its card, or gets one that says how to use the model.
        repo_id (`str`): The repository, created if absent.
        private (`bool`, *optional*): Whether a new repository is private.
        tag (`str`, *optional*): A tag for this version.
        commit_message (`str`, defaults to `"Upload ReSTR"`): The commit's title.
        token (`str`, *optional*): A token with write access; the one of `hf auth login` by default.

    Returns:
        `CommitInfo`: The commit, or the repository's last one if nothing has changed.

    Raises:
        `ValueError`: The folder lacks a part of the model; its card, or the repository's, belongs to other weights,
            links to a Space that does not exist, or has metadata that the Hub rejects; `repo_id` or `tag` is invalid;
            or the tag exists at another commit (the model is pushed nevertheless).
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = save_bundle(*bundle, Path(temporary) / "bundle") if isinstance(bundle, tuple) else Path(bundle)
        files = _collect_files(folder, Path(temporary))
        api = HfApi(token=token)
        repo_id = _complete_id(repo_id, api)
        if tag is not None and not _TAG.fullmatch(tag):
            raise ValueError(f"Expected a tag of letters, digits and any of . _ + - /, such as v1, got {tag!r}.")
        files["README.md"] = _prepare_card(folder, repo_id, Path(temporary), api)
        api.create_repo(repo_id, private=private, exist_ok=True)
        # `from_pretrained` could take old weights instead of the new ones.
        stale = [
            name for name in api.list_repo_files(repo_id) if name not in files and _matches(name, WEIGHT_PATTERNS)
        ]
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationAdd(name, path) for name, path in sorted(files.items())),
            *(CommitOperationDelete(name, is_folder=False) for name in stale),
        ]
        commit = api.create_commit(repo_id, operations, commit_message=commit_message)
    if tag is not None:
        _add_tag(api, repo_id, tag, commit.oid)
    return commit


def push_page_to_hub(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    model_id: str | None = None,
    private: bool | None = None,
    commit_message: str = "Upload the page",
    token: str | None = None,
) -> CommitInfo:
    """
    Push the web page of a model (`restr export --web`) to a static Space on the Hub, in one commit. Other files in the
    Space are deleted. If nothing has changed since the last push, there is no commit.

    Args:
        folder (`str` or `os.PathLike`): The page's folder.
        repo_id (`str`): The Space, created if absent.
        model_id (`str`, *optional*): Repository of the model on the Hub, to which the page and the Space then link.
        private (`bool`, *optional*): Whether a new Space is private.
        commit_message (`str`, defaults to `"Upload the page"`): The commit's title.
        token (`str`, *optional*): A token with write access; the one of `hf auth login` by default.

    Returns:
        `CommitInfo`: The commit, or the Space's last one if nothing has changed.

    Raises:
        `ValueError`: The folder lacks a part of the page, `repo_id` or `model_id` is invalid, or the Space is of
            another kind, such as a Gradio demo.
    """
    folder = Path(folder)
    missing = [name for name in _PAGE_FILES if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"Expected the folder of a page, got {folder}, which lacks {', '.join(missing)}: write it with "
            "`restr export MODEL --web FOLDER`."
        )
    api = HfApi(token=token)
    repo_id = _complete_id(repo_id, api)
    if api.repo_exists(repo_id, repo_type="space") and api.space_info(repo_id).sdk not in (None, "static"):
        raise ValueError(f"Expected a static Space, got {repo_id}, which has another SDK: choose another id.")
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    files: dict[str, Path | bytes] = {path.relative_to(folder).as_posix(): path for path in paths}
    if model_id is not None:
        files |= _link_model(folder, _complete_id(model_id, api))
    api.create_repo(repo_id, repo_type="space", space_sdk="static", private=private, exist_ok=True)
    others = set(api.list_repo_files(repo_id, repo_type="space")) - {*files, ".gitattributes"}
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        *(CommitOperationAdd(name, content) for name, content in files.items()),
        *(CommitOperationDelete(name, is_folder=False) for name in sorted(others)),
    ]
    return api.create_commit(repo_id, operations, commit_message=commit_message, repo_type="space")


def _link_model(folder: Path, model_id: str) -> dict[str, bytes]:
    """The files of a page that name its model, with a link to the model's repository."""
    settings = read_json_object(folder / "settings.json") | {"name": model_id}
    settings["links"]["model"] = f"https://huggingface.co/{model_id}"
    card = RepoCard.load(folder / "README.md")
    card.data.models = [model_id]
    return {"settings.json": json.dumps(settings, indent=2).encode(), "README.md": str(card).encode()}


def _complete_id(repo_id: str, api: HfApi) -> str:
    """Add the user's name to an id without one, as the Hub does."""
    validate_repo_id(repo_id)
    return repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}"


def rewrite_card(
    folder: str | os.PathLike,
    *,
    recipe: str | os.PathLike | None = None,
    photo: str | os.PathLike | None = None,
    sentences: Sequence[str] = (),
    credit: str | None = None,
    evaluations: Sequence[str | os.PathLike] = (),
    **options: Any,
) -> Path:
    """
    Regenerate the card in a model's folder.

    Args:
        folder (`str` or `os.PathLike`): The model's folder.
        recipe (`str` or `os.PathLike`, *optional*): JSON file with the settings of the training.
        photo (`str` or `os.PathLike`, *optional*): Photo that shows what the model does with `sentences`.
        sentences (`Sequence[str]`): Sentences about the photo.
        credit (`str`, *optional*): Author and licence of the photo.
        evaluations (`Sequence[str | os.PathLike]`), options: Arguments of [`write_model_card`].

    Raises:
        `ValueError`: Only some of `photo`, `sentences` and `credit` are given; the card has results, which would be
            lost because there is no evaluation; or [`write_model_card`] cannot write the card.
    """
    if len({bool(photo), bool(sentences), bool(credit)}) > 1:
        raise ValueError("Expected a photo, at least one sentence and a credit together, or none of them.")
    card = Path(folder) / "README.md"
    if not evaluations and card.exists() and ModelCard.load(card).data.eval_results:
        raise ValueError(
            f"Expected an evaluation, because {card} has results that would be lost: pass its evaluation and recipe "
            "again, or remove it first."
        )
    return write_model_card(
        folder,
        training=None if recipe is None else read_json_object(Path(recipe)),
        example=Example(photo, sentences, credit) if photo and credit else None,
        evaluations=evaluations,
        **options,
    )


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _collect_files(folder: Path, temporary: Path) -> dict[str, Path]:
    """The files to push, by name. Code that `folder` lacks is written to `temporary`."""
    if not folder.is_dir():
        raise ValueError(f"Expected the folder of a saved model, or a model and its processor; there is no {folder}.")
    files = {path.name: path for path in folder.iterdir() if path.is_file() and _matches(path.name, _PATTERNS)}
    missing = [name for name in _REQUIRED_FILES if name not in files] or _missing_weights(files)
    if not missing:
        if "auto_map" not in read_json_object(files["config.json"]):
            add_code(folder, temporary / "code")
            files |= {path.name: path for path in (temporary / "code").iterdir()}
        missing = _missing_code(files)
    if missing:
        raise ValueError(
            f"Expected a complete model, but {folder} lacks {', '.join(missing)}: save it with save_bundle."
        )
    return files


def _missing_weights(files: dict[str, Path]) -> list[str]:
    if "model.safetensors" in files:
        return []
    if "model.safetensors.index.json" not in files:
        return ["model.safetensors"]
    return sorted(set(read_json_object(files["model.safetensors.index.json"])["weight_map"].values()) - files.keys())


def _missing_code(files: dict[str, Path]) -> list[str]:
    """The Python files that the configs refer to and the folder lacks."""
    config, processor_config = read_json_object(files["config.json"]), read_json_object(files["processor_config.json"])
    references = [*config["auto_map"].values(), *processor_config.get("auto_map", {}).values()]
    references += [task["impl"] for task in config.get("custom_pipelines", {}).values()]
    return sorted({f"{reference.partition('.')[0]}.py" for reference in references} - files.keys())


def _prepare_card(folder: Path, repo_id: str, temporary: Path, api: HfApi) -> Path:
    """The folder's card with the model's id filled in, or else the repository's card, or else a general one."""
    path, written = temporary / "README.md", folder / "README.md"
    text = written.read_bytes().decode() if written.exists() else None
    if text is None or is_boilerplate(text):
        text = find_card(repo_id, token=api.token) or str(build_model_card(None, model_id=repo_id))
    text = text.replace(MODEL_ID_PLACEHOLDER, repo_id)
    check_card(text, folder)
    _check_metadata(text, api)
    for space in _SPACE_LINK.findall(text):
        if not api.repo_exists(space, repo_type="space"):
            raise ValueError(f"The model card links to the Space {space}, which does not exist: create it first.")
    path.write_bytes(text.encode())
    return path


def _check_metadata(text: str, api: HfApi) -> None:
    """Let the Hub validate a card's metadata. `create_commit` does the same, but only once there is a repository."""
    response = get_session().post(
        f"{api.endpoint}/api/validate-yaml",
        json={"content": text, "repoType": "model"},
        headers=build_hf_headers(token=api.token),
    )
    if response.status_code == 400:
        problems = "; ".join(error["message"] for error in response.json().get("errors", []))
        raise ValueError(f"Expected a model card with metadata that the Hub accepts, but it says: {problems}")
    hf_raise_for_status(response)


def _add_tag(api: HfApi, repo_id: str, tag: str, commit: str) -> None:
    tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id).tags}
    if tag not in tags:
        api.create_tag(repo_id, tag=tag, revision=commit)
    elif tags[tag] != commit:
        raise ValueError(
            f"The model is pushed, as {commit}, but the tag {tag!r} of {repo_id} is at {tags[tag]}: choose another tag."
        )


__all__ = ["push_page_to_hub", "push_to_hub", "rewrite_card"]
