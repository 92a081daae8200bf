"""
Run transformers' own common tests on this package.

They are in transformers' source archive only. This downloads the archive of the installed version once, to
`build/hf_common`, unpacks its tests to a temporary folder, adds the four small modules that the archive leaves out
(`stand_ins`) and our test modules next to this file, and runs pytest there. Without network, put the archive into
`build/hf_common` first.

    python tests/hf_common/run.py [pytest arguments]
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import transformers


HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]


def fetch_archive() -> Path:
    """The source archive of the installed transformers, downloaded with pip unless it is there."""
    folder = REPOSITORY / "build" / "hf_common"
    archive = folder / f"transformers-{transformers.__version__}.tar.gz"
    if not archive.exists():
        requirement = f"transformers=={transformers.__version__}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
        subprocess.run([*command, "--dest", folder, requirement], check=False)
        if not archive.exists():
            sys.exit(
                f"The common tests did not run: pip could not download the source archive of {requirement}. Put "
                f"{archive.name} into {folder}."
            )
    return archive


def build_test_tree(archive: Path, root: Path) -> None:
    """Lay out `root` as transformers' repository: its tests, the stand-ins, and ours under `tests/models/restr`."""
    with tarfile.open(archive) as tar:
        prefix = f"{archive.name.removesuffix('.tar.gz')}/"
        members = [member for member in tar.getmembers() if member.name.startswith(f"{prefix}tests/")]
        if not members:
            sys.exit(f"The common tests did not run: {archive} has no folder {prefix}tests.")
        for member in members:
            member.name = member.name.removeprefix(prefix)
        tar.extractall(root, members=members, filter="data")
    shutil.copytree(HERE / "stand_ins", root, dirs_exist_ok=True)
    package = root / "tests" / "models" / "restr"
    package.mkdir(parents=True, exist_ok=True)
    for module in HERE.glob("*_restr.py"):
        shutil.copy(module, package / f"test_{module.name}")
    for folder in (package, *package.parents[:2]):  # restr, models, tests
        (folder / "__init__.py").touch()
    (root / "tests" / "fixtures").mkdir(exist_ok=True)
    (root / "tests" / "fixtures" / "sample_text.txt").write_text("A text to tokenize.\n")
    (root / "pytest.ini").write_text("[pytest]\n")


def main() -> None:
    archive = fetch_archive()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        build_test_tree(archive, root)
        # -rs prints the reason of every skip.
        command = [sys.executable, "-m", "pytest", "-q", "-rs", "-W", "ignore", "-p", "no:cacheprovider"]
        paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
        command += [*sys.argv[1:], "tests/models/restr"]
        sys.exit(subprocess.run(command, cwd=root, env=environment, check=False).returncode)


if __name__ == "__main__":
    main()
