"""The notebook runs from top to bottom, and its results are as described."""

import io
import re
from base64 import b64decode
from pathlib import Path

import pytest
from hub_server import serve
from huggingface_hub import ModelCard
from PIL import Image


nbformat = pytest.importorskip("nbformat", reason='needs nbclient and ipykernel: pip install "modeling-restr[test]"')
nbclient = pytest.importorskip("nbclient", reason='needs nbclient and ipykernel: pip install "modeling-restr[test]"')
pytest.importorskip("ipykernel", reason='needs nbclient and ipykernel: pip install "modeling-restr[test]"')

REPOSITORY = Path(__file__).resolve().parents[1]
NOTEBOOK = REPOSITORY / "examples" / "quickstart.ipynb"


def read_notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The notebook after a run at the repository's root, logged in to a Hub, and that Hub."""
    home, notebook = tmp_path_factory.mktemp("home"), read_notebook()
    with serve() as hub, pytest.MonkeyPatch.context() as patch:
        more = {"PYTHONPATH": str(REPOSITORY), "IPYTHONDIR": str(home), "TMPDIR": str(home)}
        for name, value in hub.environment(home, **more).items():
            patch.setenv(name, value)
        resources = {"metadata": {"path": str(REPOSITORY)}}
        nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
        yield notebook, hub


def read_text(notebook) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


def read_pictures(notebook) -> list[Image.Image]:
    outputs = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])]
    return [Image.open(io.BytesIO(b64decode(data["image/png"]))) for data in outputs if "image/png" in data]


def test_it_is_stored_without_outputs():
    code = [cell for cell in read_notebook().cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


@pytest.mark.parametrize("folder", [REPOSITORY, REPOSITORY / "examples"])
def test_its_files_are_found_from_the_root_and_from_its_own_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    names = {}
    exec(next(cell.source for cell in read_notebook().cells if cell.cell_type == "code"), names)  # noqa: S102
    assert (names["CHECKPOINT"] / "config.json").exists() and names["PHOTO"].exists()


@pytest.mark.long
def test_it_shows_masks_and_its_two_ways_to_ask_agree(run):
    notebook, _ = run
    assert len(read_pictures(notebook)) == 4
    shares = re.findall(r": ([\d.]+)% of the pixels as above", read_text(notebook))
    assert len(shares) == 3 and all(float(share) > 99.9 for share in shares)


@pytest.mark.long
def test_fine_tuning_helps_on_its_ten_photos(run):
    notebook, _ = run
    before, after = re.search(r"the ten: mean_iou ([\d.]+) -> ([\d.]+)", read_text(notebook)).groups()
    assert float(after) > float(before) + 0.05
    losses = [float(loss) for loss in re.findall(r"step \d+: loss ([\d.]+)", read_text(notebook))]
    assert len(losses) == 3 and losses[-1] < losses[0]


@pytest.mark.long
def test_it_pushes_a_complete_model_with_its_evaluation(run):
    notebook, hub = run
    repository = hub.repositories["model", "tester/restr-ten-photos"]
    assert len(repository.titles) == 1 and repository.private
    files = repository.files()
    assert {"model.safetensors", "modeling_restr.py", "processor_config.json", "tokenizer.json"} <= files.keys()
    results = {result.metric_type: result for result in ModelCard(files["README.md"].decode()).data.eval_results}
    shown = float(re.search(r"the other two: mean_iou [\d.]+ -> ([\d.]+)", read_text(notebook))[1])
    assert results["mean_iou"].metric_value == pytest.approx(100 * shown, abs=0.06)
    assert results["mean_iou"].dataset_name == "two photographs"
