"""The package and the code of a saved model say why they cannot work."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_training import make_model, make_processor

from modeling_restr.hub import save_bundle
from modeling_restr.hub.model_card import find_template
from modeling_restr.requirements_restr import TRANSFORMERS


ROOT = Path(__file__).resolve().parents[1]
# Imports the modules argv[1:], each as the first, and prints what is raised.
IMPORTS = """
import importlib, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(name, error)
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    processor = make_processor()
    return save_bundle(make_model(processor), processor, tmp_path_factory.mktemp("saved") / "bundle")


def run_python(*arguments: str, path: list[Path], cwd: Path | None = None) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, *arguments]
    return subprocess.run(command, check=False, env=environment, cwd=cwd, capture_output=True, text=True)


def test_an_old_transformers_is_named_by_the_package_and_by_each_module_of_a_bundle(bundle, tmp_path):
    stub = tmp_path / "old" / "transformers" / "__init__.py"  # with nothing to import
    stub.parent.mkdir(parents=True)
    stub.write_text('__version__ = "4.57.1"\n')
    names = ["modeling_restr", *(f"bundle.{path.stem}" for path in sorted(bundle.glob("*_restr.py")))]
    done = run_python("-c", IMPORTS, *names, path=[tmp_path / "old", ROOT, bundle.parent])
    expected = (
        f'ReSTR needs transformers 5.17 or later, found 4.57.1: run `pip install --upgrade "{TRANSFORMERS}"` and start'
        " Python again."
    )
    assert len(names) > 5
    assert done.stdout.splitlines() == [f"{name} {expected}" for name in names]


@pytest.mark.parametrize("place", ["examples/space/requirements.txt", "bundle", "card"])
def test_the_same_version_is_asked_for_everywhere(bundle, place):
    path = {"bundle": bundle / "requirements.txt", "card": find_template()}.get(place, ROOT / place)
    assert TRANSFORMERS in path.read_text()


def test_the_import_says_that_a_saved_model_s_code_hides_the_package(bundle):
    done = run_python("-c", "import modeling_restr", path=[ROOT], cwd=bundle)
    error = done.stderr.splitlines()[-1]
    assert error.startswith(f"ImportError: Expected the package modeling_restr, but {bundle / 'modeling_restr.py'} is")
    assert "Run Python in another folder, or as `python -P`" in error
    code = "import importlib.util; print(importlib.util.find_spec('modeling_restr').origin)"
    done = run_python("-P", "-c", code, path=[ROOT], cwd=bundle)
    assert Path(done.stdout.strip()) == ROOT / "modeling_restr" / "__init__.py"
