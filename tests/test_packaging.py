"""setup.py declares all imports, and the built package works from an empty folder."""

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fresh_process import HIDE
from packaging.requirements import Requirement
from PIL import Image
from tiny_training import make_model, make_processor

from modeling_restr import __version__
from modeling_restr.hub import save_bundle


ROOT = Path(__file__).resolve().parents[1]
PACKAGE_FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "model_card.md")


def normalize(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def find_installed(requirements: list[str]) -> set[str]:
    """The names of the packages that pip installs for some requirements."""
    names: set[str] = set()
    pending = list(map(Requirement, requirements))
    while pending:
        requirement = pending.pop()
        name = normalize(requirement.name)
        if name not in names and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            names.add(name)
            with suppress(PackageNotFoundError):
                pending += map(Requirement, requires(name) or [])
    return names


@pytest.fixture
def declared(monkeypatch) -> SimpleNamespace:
    """The arguments of `setup` in setup.py."""
    given: dict = {}
    monkeypatch.setattr("setuptools.setup", lambda **arguments: given.update(arguments))
    runpy.run_path(str(ROOT / "setup.py"))
    return SimpleNamespace(**given)


def find_imports(folder: Path) -> dict[str, set[Path]]:
    """The top-level modules that the files of a folder import anywhere, without Python's, and the importing files."""
    found: dict[str, set[Path]] = {}
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for name in {name.partition(".")[0] for name in names} - sys.stdlib_module_names:
                found.setdefault(name, set()).add(path)
    return found


def test_every_import_is_declared(declared):
    requirements = [*declared.install_requires, *declared.extras_require["dev"]]
    names = {normalize(Requirement(requirement).name) for requirement in requirements}
    found = find_imports(ROOT / "modeling_restr") | find_imports(ROOT / "examples")
    examples = [*(ROOT / "examples").rglob("*.py")]
    ours = {"modeling_restr", *(path.stem for path in examples), *(path.parent.name for path in examples)}
    installed = packages_distributions()
    sources = {module: installed.get(module, [module]) for module in found.keys() - ours}
    undeclared = [module for module, source in sources.items() if not names & set(map(normalize, source))]
    assert not undeclared, {module: found[module] for module in undeclared}


def test_the_space_asks_for_the_versions_of_the_package(declared):
    lines = (ROOT / "examples" / "space" / "requirements.txt").read_text().splitlines()
    requirements = {line for line in lines if not line.startswith("#")}
    assert requirements <= {*declared.install_requires, *declared.extras_require["space"]}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> SimpleNamespace:
    """An sdist of the repository, a wheel that is built from it, and a folder with the wheel installed."""
    root = tmp_path_factory.mktemp("built")
    source, sdists, wheels, target = (root / name for name in ("source", "sdists", "wheels", "target"))
    without_caches = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in ("modeling_restr", "tests"):
        shutil.copytree(ROOT / folder, source / folder, ignore=without_caches)
    for name in PACKAGE_FILES:
        shutil.copy(ROOT / name, source)
    run([sys.executable, "setup.py", "-q", "sdist", "-d", sdists], cwd=source)
    (sdist,) = sdists.iterdir()
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    run([*pip, "wheel", "--no-index", "--no-deps", "--no-build-isolation", "-w", wheels, sdist], cwd=root)
    (wheel,) = wheels.iterdir()
    run([*pip, "install", "--no-index", "--no-deps", "--target", target, wheel], cwd=root)
    return SimpleNamespace(sdist=sdist, wheel=wheel, target=target)


def run(command: list, cwd: Path, **environment: str) -> str:
    words = [str(word) for word in command]
    variables = os.environ | environment
    done = subprocess.run(words, check=False, cwd=cwd, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_archives_hold_the_package_and_nothing_else(built):
    with tarfile.open(built.sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames() if "egg-info" not in name}
    with zipfile.ZipFile(built.wheel) as archive:
        installed = {name for name in archive.namelist() if ".dist-info/" not in name}
        licences = [name for name in archive.namelist() if name.endswith("LICENSE")]
    code = {str(path.relative_to(ROOT)) for path in (ROOT / "modeling_restr").rglob("*.py")}
    code |= {"modeling_restr/py.typed"}
    code |= {str(path.relative_to(ROOT)) for path in (ROOT / "modeling_restr" / "export" / "web").iterdir()}
    assert installed == code | {"modeling_restr/hub/model_card.md"} and len(licences) == 1
    folders = {str(Path(path).parent) for path in code} | {"", "."}
    assert packed - folders == code | set(PACKAGE_FILES) | {"PKG-INFO", "setup.cfg"}
    assert built.sdist.stat().st_size < 500_000


@pytest.mark.slow
def test_the_installed_wheel_works_in_an_empty_folder_without_the_extras(built, tmp_path, declared):
    processor = make_processor()
    save_bundle(make_model(processor), processor, tmp_path / "model", include_code=False)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(
        tmp_path / "photo.png"
    )
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(HIDE)
    installed = find_installed(declared.install_requires) | {"modeling-restr"}
    modules = packages_distributions().items()
    hidden = [module for module, names in modules if not installed & set(map(normalize, names))]
    assert {"datasets", "accelerate", "pytest"} <= set(hidden)
    place = tmp_path / "empty"
    place.mkdir()
    environment = {"PYTHONPATH": f"{tmp_path / 'site'}{os.pathsep}{built.target}", "HIDDEN": " ".join(hidden)}

    code = "import modeling_restr as m; from modeling_restr.hub.model_card import find_template as f; print(m.__file__, f())"
    paths = run([sys.executable, "-c", code], place, **environment).split()
    assert all(path.startswith(str(built.target)) for path in paths)
    assert run([built.target / "bin" / "restr", "--version"], place, **environment).strip() == __version__
    assert f"-{__version__}-" in built.wheel.name
    command = [sys.executable, "-m", "modeling_restr.cli", "segment", tmp_path / "model", tmp_path / "photo.png"]
    run([*command, "the red square"], place, **environment)
    names = sorted(path.name for path in place.iterdir())
    assert names == ["photo_mask1_the-red-square.png", "photo_overlay.png"]
