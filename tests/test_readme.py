"""The snippets of the README run and print what it shows."""

import re
from pathlib import Path

import pytest
from fresh_process import run_python
from numerics import assert_same_text


REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.numerics
def test_first_snippet_prints_the_output_shown_and_the_second_the_same_scores():
    index = next(number for number, (language, _) in enumerate(BLOCKS) if language == "python")
    (_, code), (language, printed), (_, code_with_encoded_image) = BLOCKS[index : index + 3]
    assert language == "text" and "pipe.encode_image" in code_with_encoded_image
    output = run_python(code + code_with_encoded_image, cwd=REPOSITORY)
    assert_same_text(output, printed + re.sub(r" \(.*\)", "", printed))


def test_snippet_that_keeps_image_features_runs():
    code = next(code for language, code in BLOCKS if language == "python" and "vision_embeds" in code)
    out = run_python(code + "\nprint(len(masks), tuple(masks[0]['mask'].shape))", cwd=REPOSITORY)
    assert out.split("\n")[-2] == "1 (264, 352)"


def test_ci_calls_the_test_command():
    commands = [code for language, code in BLOCKS if language == "bash" and "pytest" in code]
    assert len(commands) == 1
    test_command = commands[0].strip().rpartition("&& .venv/bin/python ")[2]
    assert f'"$python" {test_command}\n' in (REPOSITORY / ".ci" / "run").read_text()
