"""The pages: their links lead somewhere, and the commands that they show exist with these options."""

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from modeling_restr.cli import app


REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = [
    path
    for pattern in ("*.md", "docs/*.md", "examples/**/*.md")
    for path in sorted(REPOSITORY.glob(pattern))
    if path.name != "model_card.md"  # a template
]
COMMAND = get_command(app)


def find_anchors(page):
    """The names of a page's headings in links, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_links_lead_to_files_and_headings(page):
    for link in re.findall(r"\]\(([^)\s]+)", page.read_text()):
        name, _, anchor = link.partition("#")
        if "://" not in link:
            target = page.parent / name if name else page
            assert target.exists(), link
            assert not anchor or anchor in find_anchors(target), link


def read_commands():
    for page in PAGES:
        for code in re.findall(r"```(?:bash|sh)\n(.*?)```", page.read_text(), flags=re.DOTALL):
            for line in code.replace("\\\n", " ").splitlines():
                match = re.search(r"(?:^|&& |bin/|modeling_restr\.)(?:restr|cli) (.*)", line)
                if match:
                    yield pytest.param(match[1], id=f"{page.name}: {match[1]}"[:80])


@pytest.mark.parametrize("line", read_commands())
def test_commands_have_the_options_shown(line):
    words = shlex.split(line, comments=True)
    command = COMMAND
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    known = {name.replace("_", "-") for parameter in command.params for name in parameter.opts}
    shown = {word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--")}
    assert shown <= known | {"--help"}


def test_every_page_is_in_the_index():
    index = (REPOSITORY / "docs" / "README.md").read_text()
    pages = {page.name for page in PAGES if page.parent == REPOSITORY / "docs"} - {"README.md"}
    assert not {name for name in pages if f"({name})" not in index}
