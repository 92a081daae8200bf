"""Push a model to the Hub with everything that a machine without this package needs to run it."""

import json
import os
import re
import tempfile
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, validate_repo_id

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


# What of a folder belongs to the model; not what a training left there for itself.
_PATTERNS = ("*.safetensors", "*.json", "*.py", "*.md", "*.png", "*.jpg", "*.jpeg", "LICENSE*", "requirements.txt")
_TAG = re.compile(r"[\w.+-]+(/[\w.+-]+)*", re.ASCII)
_SPACE_LINK = re.compile(r"\]\(https://huggingface\.co/spaces/([\w.-]+/[\w.-]+)\)")
_REQUIRED_FILES = ("config.json", "processor_config.json", "tokenizer.json")


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
    Push a model to the Hub in one commit: weights, config, processor, code, model card and its pictures, to be loaded as
    [`save_bundle`] says. Everything is checked before a repository is made. Where nothing has changed since the last
    push, there is no commit.

    `model.push_to_hub`, `processor.push_to_hub` and the stock Trainer write transformers' own model card instead; this
    function replaces it as long as nobody has edited it.

    Args:
        bundle (`str`, `os.PathLike` or `tuple`):
            A model's folder, or a model and its processor. A folder without code, such as examples/restr_mini, is
            pushed with this package's; its subfolders are not pushed. A folder without README.md, or with the one that
            transformers generates, gets a card that says how to use the model, unless the repository has one.
        repo_id (`str`): The repository, made as needed.
        private (`bool`, *optional*): Whether a new repository is private.
        tag (`str`, *optional*): A name for this state of the repository.
        commit_message (`str`, defaults to `"Upload ReSTR"`): The commit's title.
        token (`str`, *optional*): A token to write with; that of `hf auth login` by default.

    Returns:
        `CommitInfo`: The commit, or the repository's last one where nothing has changed.

    Raises:
        `ValueError`: The folder lacks a part of the model; its card or that of the repository tells of other weights,
            links a Space that is not there, or has metadata that the Hub refuses; `repo_id` or `tag` is no such name;
            or the tag exists at another commit (then the push itself is done).
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = save_bundle(*bundle, Path(temporary) / "bundle") if isinstance(bundle, tuple) else Path(bundle)
        files = _collect_files(folder, Path(temporary))
        api = HfApi(token=token)
        repo_id = _complete_repo_id(repo_id, api)
        _check_tag(tag)
        files["README.md"] = _prepare_card(folder, repo_id, Path(temporary), api)
        api.create_repo(repo_id, private=private, exist_ok=True)  # once all is known to be right
        there = api.list_repo_files(repo_id)
        # Of old weights `from_pretrained` could take these instead of the new ones.
        stale = [name for name in there if name not in files and _matches(name, WEIGHT_PATTERNS)]
        commit = api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(name, path) for name, path in sorted(files.items())),
                *(CommitOperationDelete(name, is_folder=False) for name in stale),
            ],
            commit_message=commit_message,
        )
    if tag is not None:
        _add_tag(api, repo_id, tag, commit.oid)
    return commit


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
    Write a folder's card again, from the files that a training leaves.

    Args:
        folder (`str` or `os.PathLike`): The model's folder.
        recipe (`str` or `os.PathLike`, *optional*): JSON file with the settings of the training.
        photo (`str` or `os.PathLike`, *optional*): Photo that shows the model's work on `sentences`, with its `credit`.
        evaluations (`Sequence[str | os.PathLike]`), options: Further arguments of [`write_model_card`].

    Raises:
        `ValueError`: Only some of `photo`, `sentences` and `credit` are given, or the card has results that would be
            lost because there is no evaluation; besides, as [`write_model_card`] says.
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
        training=None if recipe is None else json.loads(Path(recipe).read_text(encoding="utf-8")),
        example=Example(photo, sentences, credit) if photo and credit else None,
        evaluations=evaluations,
        **options,
    )


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _collect_files(folder: Path, temporary: Path) -> dict[str, Path]:
    """The files to push, by name; those that `folder` lacks are made in `temporary`."""
    if not folder.is_dir():
        raise ValueError(f"Expected the folder of a saved model, or a model and its processor; there is no {folder}.")
    files = {path.name: path for path in folder.iterdir() if path.is_file() and _matches(path.name, _PATTERNS)}
    missing = [name for name in _REQUIRED_FILES if name not in files] or _missing_weights(files)
    if not missing:
        if "auto_map" not in json.loads(files["config.json"].read_text(encoding="utf-8")):
            add_code(folder, temporary / "code")
            files |= {path.name: path for path in (temporary / "code").iterdir()}
        missing = _missing_code(files)
    if missing:
        raise ValueError(f"{folder} is no whole model: it lacks {', '.join(missing)}. Save it with save_bundle.")
    return files


def _missing_weights(files: dict[str, Path]) -> list[str]:
    if "model.safetensors" in files:
        return []
    if "model.safetensors.index.json" not in files:
        return ["model.safetensors"]
    index = json.loads(files["model.safetensors.index.json"].read_text(encoding="utf-8"))
    return sorted(set(index["weight_map"].values()) - files.keys())


def _missing_code(files: dict[str, Path]) -> list[str]:
    """The Python files that the configs refer to and the folder lacks."""
    config, processor_config = (
        json.loads(files[name].read_text(encoding="utf-8")) for name in ("config.json", "processor_config.json")
    )
    references = [*config["auto_map"].values(), *processor_config.get("auto_map", {}).values()]
    references += [task["impl"] for task in config.get("custom_pipelines", {}).values()]
    return sorted({f"{reference.partition('.')[0]}.py" for reference in references} - files.keys())


def _complete_repo_id(repo_id: str, api: HfApi) -> str:
    """The id with the namespace that the Hub would give it."""
    validate_repo_id(repo_id)
    return repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}"


def _check_tag(tag: str | None) -> None:
    if tag is not None and not _TAG.fullmatch(tag):
        raise ValueError(f"Expected a tag of letters, digits and any of . _ + - /, such as v1, got {tag!r}.")


def _prepare_card(folder: Path, repo_id: str, temporary: Path, api: HfApi) -> Path:
    """The folder's card, in which the model gets its id; or else the repository's; or else one for any model."""
    path, written = temporary / "README.md", folder / "README.md"
    text = written.read_bytes().decode() if written.exists() else None
    if text is None or is_boilerplate(text):
        text = find_card(repo_id, token=api.token) or str(build_model_card(None, model_id=repo_id))
    text = text.replace(MODEL_ID_PLACEHOLDER, repo_id)
    check_card(text, folder)
    _check_metadata(text, api)
    for space in _SPACE_LINK.findall(text):
        if not api.repo_exists(space, repo_type="space"):
            raise ValueError(f"The model card links the Space {space}, which is not there: create it first.")
    path.write_bytes(text.encode())
    return path


def _check_metadata(text: str, api: HfApi) -> None:
    """Ask the Hub what it thinks of a card's first lines, as `create_commit` does, which needs a repository."""
    response = get_session().post(
        f"{api.endpoint}/api/validate-yaml",
        json={"content": text, "repoType": "model"},
        headers=build_hf_headers(token=api.token),
    )
    if response.status_code == 400:
        problems = "; ".join(error["message"] for error in response.json().get("errors", []))
        raise ValueError(f"Expected a model card with metadata that the Hub takes, but it says: {problems}")
    hf_raise_for_status(response)


def _add_tag(api: HfApi, repo_id: str, tag: str, commit: str) -> None:
    named = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id).tags}
    if tag not in named:
        api.create_tag(repo_id, tag=tag, revision=commit)
    elif named[tag] != commit:
        raise ValueError(
            f"The model is pushed, as {commit}, but the tag {tag!r} of {repo_id} names {named[tag]}: choose another tag."
        )


__all__ = ["push_to_hub", "rewrite_card"]
