"""The page on the architecture prints what it shows."""

import re
from pathlib import Path


DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = (DOCS / "architecture.md").read_text(encoding="utf-8")


def test_shapes_are_as_shown(capsys):
    (code,), (printed,) = (
        re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL) for language in ("python", "text")
    )
    exec(code, {})  # noqa: S102
    assert capsys.readouterr().out == printed
