"""The guide for contributors, and the files that other programs read: workflow, issue forms, hooks, citation."""

import json
import re
import textwrap
import tomllib
from pathlib import Path

import pytest
import yaml
from annotated_images import TWO_BOXES, write_photo

import modeling_restr
from modeling_restr.data import build_dataset, decode_mask


REPOSITORY = Path(__file__).resolve().parents[1]
FORMS = sorted((REPOSITORY / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


GUIDE = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")


def read(path: str) -> dict:
    return yaml.safe_load((REPOSITORY / path).read_text(encoding="utf-8"))


def test_the_citation_names_this_version_and_the_paper():
    citation = read("CITATION.cff")
    assert citation["version"] == modeling_restr.__version__
    paper = citation["preferred-citation"]
    authors = " and ".join(f"{author['family-names']}, {author['given-names']}" for author in paper["authors"])
    for page in ("examples/restr_mini/README.md", "docs/architecture.md"):
        text = (REPOSITORY / page).read_text(encoding="utf-8")
        assert f"title     = {{{paper['title']}}}" in text and f"author    = {{{authors}}}" in text, page


def test_the_workflow_runs_what_is_there():
    workflow = read(".github/workflows/ci.yml")
    jobs = workflow["jobs"]
    steps = [step for job in jobs.values() for step in job["steps"]]
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"]) for step in steps if "uses" in step)
    commands = [step["run"] for step in steps if "run" in step]
    for command in commands:
        script = REPOSITORY / command.split()[0]
        assert command.startswith("python -m ") or script.stat().st_mode & 0o100, command
    assert ".ci/run" in commands and any("pip_audit" in command for command in commands)


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_forms_have_what_github_asks_for(path):
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.stem == "config":
        assert set(form) <= {"blank_issues_enabled", "contact_links"}
        return
    assert {"name", "description", "body"} <= set(form)
    names = [part["id"] for part in form["body"]]
    assert len(set(names)) == len(names)
    assert all(part["type"] in ("textarea", "input") and part["attributes"]["label"] for part in form["body"])


def test_hooks_are_those_of_the_checks():
    hooks = [hook["id"] for repo in read(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    assert {"ruff-check", "ruff-format", "trailing-whitespace", "check-yaml"} <= set(hooks)


def test_contributors_are_told_the_test_commands_that_exist():
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert "not slow" in settings["addopts"]
    linked = re.findall(r"\]\(([^)#]+)\)", GUIDE)
    assert linked and all((REPOSITORY / path).exists() for path in linked if "://" not in path)
    for command in ("python -m pytest -n 2", "python -m pytest -n 2 -m slow"):
        assert f"\n{command}\n" in GUIDE


def test_the_example_reader_in_the_guide_works(tmp_path):
    toy = {"category": "car", "polygons": TWO_BOXES, "texts": ["the red car", "car"]}
    (tmp_path / "train.json").write_text(json.dumps({"a.png": [toy], "b.png": [toy, toy]}))
    for seed, name in enumerate(("a.png", "b.png")):
        write_photo(tmp_path / name, seed)
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)
    names: dict = {}
    exec(textwrap.dedent(code), names)  # noqa: S102
    rows = build_dataset(names["read_toys"](tmp_path, tmp_path, "train"), progress=False)
    assert [len(row["references"]) for row in rows] == [1, 2]
    reference = rows[1]["references"][1]
    assert [expression["text"] for expression in reference["expressions"]] == toy["texts"]
    assert decode_mask(reference["mask"]).sum() == 10 * 8 + 10 * 10
