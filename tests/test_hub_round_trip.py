"""Pushed models and data load without the package, over real HTTP, in fresh processes."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from annotated_images import make_images
from datasets import load_dataset
from folders import read_files
from fresh_process import run_python, run_without_package
from hub_server import serve
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from test_bundle import CODE_FILES, MODEL_FILES, PACKAGE, SERVING_FILES
from tiny_training import make_model, make_processor

from modeling_restr import ReSTRForImageSegmentation, ReSTRPipeline
from modeling_restr.data import preparation
from modeling_restr.data.canonical import decode_mask
from modeling_restr.data.dataset_card import Source
from modeling_restr.hub import Example, push_to_hub, save_bundle, write_model_card


pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[1]
PHOTO = REPOSITORY / "examples" / "photos" / "held_out" / "000000173350.jpg"
PICTURES = {"example.jpg", "example_overlay.png", "example_1.png", "example_2.png"}
TEXTS = ["the red square", "blue thing"]

# Pushes the folder argv[1] with the command, in parts and with Trainer, each twice. Then trains the pushed model on the
# pushed dataset, by their ids, and pushes the result; trains with both scripts on a stream of the dataset; and predicts
# its masks. argv[2] is the folder of examples, argv[3] a folder for files.
PUSHES = """
import runpy, sys
from transformers import Trainer, TrainingArguments
from modeling_restr import ReSTRForImageSegmentation, ReSTRProcessor
from modeling_restr.cli import app

folder, examples, output = sys.argv[1:]
model, processor = ReSTRForImageSegmentation.from_pretrained(folder), ReSTRProcessor.from_pretrained(folder)
trainer = Trainer(
    model, TrainingArguments(f"{output}/by-trainer", use_cpu=True, report_to="none"), processing_class=processor
)
for _ in range(2):
    app(["push", folder, "by-command", "--tag", "v1", "--private"], standalone_mode=False)
    model.push_to_hub("by-parts")
    processor.push_to_hub("by-parts")
    trainer.push_to_hub()

options = "--model_name_or_path tester/restr --dataset_name tester/boxes --train_split val --validation_split val"
options += " --max_steps 2 --eval_strategy no --dataloader_num_workers 0 --hub_model_id trained --push_to_hub True"
sys.argv = ["run_referring_segmentation.py", *options.split(), "--output_dir", f"{output}/trained"]
runpy.run_path(f"{examples}/run_referring_segmentation.py", run_name="__main__")

options = "--model_name_or_path tester/restr --dataset_name tester/boxes --streaming --train_split val --max_steps 3"
options += " --validation_split= --warmup_steps 1 --learning_rate 0.01 --dataloader_num_workers 0"
for script in ("run_referring_segmentation", "run_referring_segmentation_no_trainer"):
    sys.argv = [f"{script}.py", *options.split(), "--output_dir", f"{output}/streamed/{script}"]
    runpy.run_path(f"{examples}/{script}.py", run_name="__main__")

predict = ["predict", "tester/restr", "tester/boxes", "--output-dir", f"{output}/masks", "--num-actors", "1"]
app(predict, standalone_mode=False)
"""

# Loads the dataset argv[3] and the models argv[4:] (ids or id@revision). Writes the rows, and the models' outputs for the
# photo argv[1], to the folder argv[2]. Runs the snippet in the first model's card.
LOADS = """
import json, os, re, sys

import numpy as np
import torch
from datasets import load_dataset
from huggingface_hub import hf_hub_download
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForImageSegmentation, AutoProcessor, pipeline

photo, output, dataset, *names = sys.argv[1:]
os.chdir(output)
torch.set_num_threads(1)
texts = ["the red square", "blue thing"]
results = {}
for name in names:
    model, _, revision = name.partition("@")
    if revision:
        pipe = pipeline("image-segmentation", model=model, revision=revision, trust_remote_code=True)
    else:
        pipe = pipeline("image-segmentation", model=model, trust_remote_code=True)
    options = {"trust_remote_code": True, "revision": revision or "main"}
    inputs = AutoProcessor.from_pretrained(model, **options)(images=Image.open(photo), text=texts, return_tensors="pt")
    with torch.inference_mode():
        results[f"{name} logits"] = AutoModelForImageSegmentation.from_pretrained(model, **options)(**inputs).logits
        results[f"{name} patch_logits"] = AutoModel.from_pretrained(model, **options)(**inputs).patch_logits
    masks = [np.array(result["mask"]) for result in pipe(photo, text=texts)]
    results[f"{name} masks"] = torch.from_numpy(np.stack(masks))
save_file(results, "results.safetensors")

with open(hf_hub_download(names[0], "README.md")) as file:
    exec(re.search(r"```python\\n(.*?)```", file.read(), flags=re.DOTALL)[1])

rows = load_dataset(dataset, split="val").to_list()
if not os.environ.get("HF_HUB_OFFLINE"):
    streamed = list(load_dataset(dataset, split="val", streaming=True).decode(False))
    assert streamed == rows
with open("rows.json", "w") as file:
    json.dump([{**row, "image": row["image"]["bytes"].hex()} for row in rows], file)
"""


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """
    A Hub with two versions of a model, the first tagged "v1", another model pushed in three ways, and a dataset; and the
    folders that were pushed.
    """
    root = tmp_path_factory.mktemp("pushed")
    processor = make_processor()
    folders = [
        save_bundle(make_model(processor, seed=seed), processor, root / f"seed-{seed}", dtype=dtype, include_code=code)
        for seed, dtype, code in ((0, None, True), (1, None, True), (2, "float16", False))
    ]
    source = Source(name="boxes", title="Boxes", description="Noise with boxes.")
    preparation.prepare(source, {"val": make_images(root / "images", range(5))}, root / "data", images_per_shard=2)
    with serve() as hub, pytest.MonkeyPatch.context() as patch:
        hub.connect(root / "here", patch)
        shas = []
        for folder, tag in ((folders[0], "v1"), (folders[1], None)):
            write_model_card(folder, example=Example(PHOTO, TEXTS, "somebody, CC BY-SA 2.0"))
            shas += [push_to_hub(folder, "restr", tag=tag).oid for _ in range(2)]
        for _ in range(2):
            preparation.push_to_hub(root / "data", "tester/boxes")
        environment = hub.environment(root / "pushing", PYTHONPATH=str(REPOSITORY))
        run_python(PUSHES, folders[2], REPOSITORY / "examples", root, cwd=root, **environment)
        yield SimpleNamespace(hub=hub, root=root, folders=folders, shas=shas)


@pytest.fixture(scope="module")
def names(pushed) -> dict[str, Path]:
    """What to load, and the folder that was pushed."""
    first, second, third = pushed.folders
    revisions = {"tester/restr": second, "tester/restr@v1": first, f"tester/restr@{pushed.shas[0]}": first}
    others = {f"tester/by-{way}": third for way in ("command", "parts", "trainer")}
    return {**revisions, **others, "tester/trained": pushed.root / "trained" / "model"}


def load(pushed, names, output: str, **environment: str) -> Path:
    folder = pushed.root / output
    folder.mkdir()
    environment = pushed.hub.environment(pushed.root / "loading", **environment)
    run_without_package(LOADS, PHOTO, folder, "tester/boxes", *names, cwd=folder, **environment)
    return folder


@pytest.fixture(scope="module")
def loaded(pushed, names) -> Path:
    return load(pushed, names, "online")


def test_everything_loads_at_main_at_a_tag_and_at_a_commit_and_computes_the_same(loaded, names, one_thread):
    results = load_file(loaded / "results.safetensors")
    processor, image = make_processor(), Image.open(PHOTO)
    inputs = processor(images=image, text=TEXTS, return_tensors="pt")
    for name, folder in names.items():
        model = ReSTRForImageSegmentation.from_pretrained(folder).eval()
        with torch.inference_mode():
            outputs = model(**inputs)
        answers = ReSTRPipeline(model=model, processor=processor)(image, text=TEXTS)
        assert torch.equal(results[f"{name} logits"], outputs.logits)
        assert torch.equal(results[f"{name} patch_logits"], outputs.patch_logits)
        masks = np.stack([np.array(answer["mask"]) for answer in answers])
        assert np.array_equal(results[f"{name} masks"].numpy(), masks)
    states = {results[f"{name} logits"].numpy().tobytes() for name in names}
    assert len(states) == 4  # or nothing would tell the revisions apart


def test_everything_loads_offline_from_the_cache_afterwards(pushed, loaded, names):
    before = len(pushed.hub.requests)
    offline = load(pushed, list(names)[:2], "offline", HF_HUB_OFFLINE="1")
    assert len(pushed.hub.requests) == before
    for name in ("rows.json", "mask1.png", "mask2.png"):
        assert (offline / name).read_bytes() == (loaded / name).read_bytes()
    results, expected = load_file(offline / "results.safetensors"), load_file(loaded / "results.safetensors")
    assert results and all(torch.equal(results[name], expected[name]) for name in results)


def test_snippet_of_the_card_finds_what_the_pipeline_finds(loaded):
    masks = load_file(loaded / "results.safetensors")["tester/restr masks"].numpy()
    for number, mask in enumerate(masks, start=1):
        assert np.array_equal(np.asarray(Image.open(loaded / f"mask{number}.png")), mask)


@pytest.mark.parametrize("name", ["restr", "by-command", "by-parts", "by-trainer", "trained"])
def test_code_is_that_of_the_package(pushed, name):
    files = pushed.hub.repositories["model", f"tester/{name}"].files()
    assert {path for path in files if path.endswith(".py")} - SERVING_FILES == CODE_FILES
    assert all(files[path] == (PACKAGE / path).read_bytes() for path in CODE_FILES)


def test_folder_is_pushed_in_one_commit_and_only_once(pushed):
    repository = pushed.hub.repositories["model", "tester/restr"]
    assert repository.titles == ["Upload ReSTR"] * 2  # of four pushes
    assert pushed.shas == [repository.commits[1].sha] * 2 + [repository.commits[2].sha] * 2
    assert repository.tags == {"v1": pushed.shas[0]}
    for revision, folder in (("v1", pushed.folders[0]), ("main", pushed.folders[1])):
        expected = read_files(folder)
        assert expected.keys() == CODE_FILES | SERVING_FILES | MODEL_FILES | PICTURES | {"README.md"}
        expected["README.md"] = expected["README.md"].replace(b"path/or/id", b"tester/restr")
        assert repository.files(revision) == expected


def test_command_adds_code_to_a_folder_without_it_and_keeps_the_weights(pushed):
    repository = pushed.hub.repositories["model", "tester/by-command"]
    folder = read_files(pushed.folders[2])
    assert folder.keys() == MODEL_FILES  # the folder itself is left alone
    assert repository.titles == ["Upload ReSTR"] and repository.private
    files = repository.files("v1")
    assert files.keys() == CODE_FILES | SERVING_FILES | MODEL_FILES | {"README.md"}
    for name in ("model.safetensors", "tokenizer.json"):
        assert files[name] == folder[name]
    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "image-segmentation"
    assert 'pipeline("image-segmentation", model="tester/by-command", trust_remote_code=True)' in card.text


def test_second_push_of_model_and_processor_changes_nothing(pushed):
    repository = pushed.hub.repositories["model", "tester/by-parts"]
    assert repository.titles == ["Upload ReSTRForImageSegmentation", "Upload processor"]
    assert repository.files().keys() == CODE_FILES | MODEL_FILES | {"README.md"}
    assert pushed.hub.repositories["model", "tester/by-trainer"].titles == ["End of training"]
    configs = [
        json.loads(pushed.hub.repositories["model", f"tester/{name}"].files()["config.json"])
        for name in ("restr", "by-parts", "by-trainer")
    ]
    for key in ("auto_map", "custom_pipelines"):
        assert configs[0][key] == configs[1][key] == configs[2][key]


def test_dataset_is_pushed_once_and_loads_by_id(pushed, loaded):
    repository = pushed.hub.repositories["dataset", "tester/boxes"]
    assert repository.titles == ["Upload the prepared dataset"]
    rows = json.loads((loaded / "rows.json").read_text())
    expected = load_dataset(str(pushed.root / "data"), split="val", cache_dir=str(pushed.root / "cache")).to_list()
    assert rows == [{**row, "image": row["image"]["bytes"].hex()} for row in expected]
    assert len(rows) == 5


def test_training_by_ids_ends_in_a_card_with_its_evaluation(pushed):
    repository = pushed.hub.repositories["model", "tester/trained"]
    assert len(repository.titles) == 1
    data = ModelCard(repository.files()["README.md"].decode()).data
    metrics = json.loads((pushed.root / "trained" / "evaluation.json").read_text())["metrics"]
    found = {result.metric_type: result.metric_value for result in data.eval_results}
    assert found["overall_iou"] == round(100 * metrics["overall_iou"], 2)
    assert data.datasets == ["tester/boxes"]


@pytest.mark.parametrize("script", ["run_referring_segmentation", "run_referring_segmentation_no_trainer"])
def test_training_streams_data_by_id(pushed, script):
    folder = pushed.root / "streamed" / script
    start = load_file(pushed.folders[1] / "model.safetensors")
    trained = load_file(folder / "model" / "model.safetensors")
    changed = [name for name in start if not torch.equal(trained[name], start[name])]
    assert len(changed) == len(start) and all(trained[name].isfinite().all() for name in start)
    twin = load_file(folder.parent / "run_referring_segmentation" / "model" / "model.safetensors")
    different = {name: (trained[name] - twin[name]).abs().max().item() for name in start}
    # Attention does not depend on the keys' bias: its gradient is noise around zero, which Adam blows up.
    assert not {name: gap for name, gap in different.items() if gap > 1e-6 and not name.endswith("k_proj.bias")}
    card = ModelCard.load(folder / "model" / "README.md")
    assert card.data.datasets == ["tester/boxes"] and card.data.base_model == "tester/restr"
    assert "The split `val` of `tester/boxes`, a stream." in card.text


def test_predictions_by_ids_are_those_of_the_pipeline(pushed, one_thread):
    model, processor = ReSTRForImageSegmentation.from_pretrained(pushed.folders[1]), make_processor()
    pipe = ReSTRPipeline(model=model.eval(), processor=processor)
    rows = load_dataset(str(pushed.root / "data"), split="val", cache_dir=str(pushed.root / "cache"))
    sentences = [[text["text"] for part in row["references"] for text in part["expressions"]] for row in rows]
    expected = [answer for row, texts in zip(rows, sentences) for answer in pipe(row["image"], text=texts)]
    folder = str(pushed.root / "masks" / "data")
    found = load_dataset("parquet", data_dir=folder, split="train", cache_dir=str(pushed.root / "cache"))
    results = sorted(found, key=lambda result: (result["row"], result["text_index"]))
    assert [result["text"] for result in results] == [text for texts in sentences for text in texts]
    for result, answer in zip(results, expected, strict=True):
        assert np.array_equal(decode_mask(result["mask"]), np.asarray(answer["mask"]) > 0)


def test_the_local_hub_knew_every_request(pushed, loaded):
    assert not [request for request in pushed.hub.unknown_requests if "tester/" in request]
