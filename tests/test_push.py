"""What is pushed to a Hub loads from it where the package is not: with real HTTP, from fresh processes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from annotated_images import make_images
from datasets import load_dataset
from hub_server import TOKEN, serve
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_training import make_model, make_processor

import modeling_restr
from modeling_restr import ReSTRForImageSegmentation, ReSTRPipeline
from modeling_restr.data import preparation
from modeling_restr.data.canonical import decode_mask
from modeling_restr.data.dataset_card import Source
from modeling_restr.hub import Example, push_to_hub, save_bundle, write_model_card


REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = Path(modeling_restr.__file__).parent
PYTHONPATH = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
PHOTO = REPOSITORY / "examples" / "photos" / "held_out" / "000000173350.jpg"
CODE_FILES = {
    "configuration_restr.py",
    "image_processing_restr.py",
    "image_reading_restr.py",
    "modeling_restr.py",
    "pipeline_restr.py",
    "processing_restr.py",
    "requirements_restr.py",
    "vision_encoder_restr.py",
}
SERVING_FILES = {"handler.py", "requirements.txt"}
MODEL_FILES = {"config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}
PICTURES = {"example.jpg", "example_overlay.png", "example_1.png", "example_2.png"}
TEXTS = ["the red square", "blue thing"]

# Pushes the folder argv[1] by the command, part by part and by Trainer; each twice. Then trains the model and on
# the dataset that were pushed, by their ids, and pushes the result; trains with both scripts on a stream of it; and
# predicts its masks. argv[3] is for files.
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

for name, options in {"loaded": [], "streamed": ["--streaming"]}.items():
    sys.argv = ["predict.py", "tester/restr", "tester/boxes", "--output_dir", f"{output}/masks/{name}", *options]
    runpy.run_path(f"{examples}/predict.py", run_name="__main__")
"""

# Loads the dataset argv[3] and the models argv[4:] (ids or id@revision), where the package is not, and writes what it
# reads and what the models say of the photo argv[1] to the folder argv[2]; runs the snippet of the first one's card.
LOADS = '''
import json, os, re, sys
from importlib.abc import MetaPathFinder


class Hidden(MetaPathFinder):
    """Whatever is installed or on the path: here the package is not."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "modeling_restr":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Hidden())
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
'''


def run_python(code: str, *arguments: object, cwd: Path, environment: dict[str, str]) -> None:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, check=False, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """
    A Hub with two states of one model, the first tagged "v1", the same model pushed in other ways, and a dataset; and
    the folders that hold what was pushed.
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
        environment = hub.environment(root / "pushing", PYTHONPATH=PYTHONPATH)
        run_python(PUSHES, folders[2], REPOSITORY / "examples", root, cwd=root, environment=environment)
        yield SimpleNamespace(hub=hub, root=root, folders=folders, shas=shas)


@pytest.fixture(scope="module")
def names(pushed) -> dict[str, Path]:
    """What to load, and the folder that is behind it."""
    first, second, third = pushed.folders
    revisions = {"tester/restr": second, "tester/restr@v1": first, f"tester/restr@{pushed.shas[0]}": first}
    others = {f"tester/by-{way}": third for way in ("command", "parts", "trainer")}
    return {**revisions, **others, "tester/trained": pushed.root / "trained" / "model"}


def load(pushed, names, output: str, **environment: str) -> Path:
    folder = pushed.root / output
    folder.mkdir()
    environment = pushed.hub.environment(pushed.root / "loading", **environment)
    run_python(LOADS, PHOTO, folder, "tester/boxes", *names, cwd=folder, environment=environment)
    return folder


@pytest.fixture(scope="module")
def loaded(pushed, names) -> Path:
    return load(pushed, names, "online")


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def one_thread():
    """As in the other processes: the last bits of sums depend on the number of threads."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def test_everything_loads_at_main_at_a_tag_and_at_a_sha_and_gives_the_same(loaded, names, one_thread):
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
    offline = load(pushed, names, "offline", HF_HUB_OFFLINE="1")
    assert len(pushed.hub.requests) == before
    for name in ("results.safetensors", "rows.json", "mask1.png", "mask2.png"):
        assert (offline / name).read_bytes() == (loaded / name).read_bytes()


def test_snippet_of_the_card_finds_what_the_pipeline_finds(loaded):
    masks = load_file(loaded / "results.safetensors")["tester/restr masks"].numpy()
    for number, mask in enumerate(masks, start=1):
        assert np.array_equal(np.asarray(Image.open(loaded / f"mask{number}.png")), mask)


@pytest.mark.parametrize("name", ["restr", "by-command", "by-parts", "by-trainer", "trained"])
def test_code_is_the_package_s_to_the_byte(pushed, name):
    files = pushed.hub.repositories["model", f"tester/{name}"].files()
    assert {path for path in files if path.endswith(".py")} - SERVING_FILES == CODE_FILES
    assert all(files[path] == (PACKAGE / path).read_bytes() for path in CODE_FILES)


def test_folder_is_pushed_whole_in_one_commit_and_the_second_time_not_at_all(pushed):
    repository = pushed.hub.repositories["model", "tester/restr"]
    assert repository.titles == ["Upload ReSTR"] * 2  # of four pushes
    assert pushed.shas == [repository.commits[1].sha] * 2 + [repository.commits[2].sha] * 2
    assert repository.tags == {"v1": pushed.shas[0]}
    for revision, folder in (("v1", pushed.folders[0]), ("main", pushed.folders[1])):
        expected = read_files(folder)
        assert expected.keys() == CODE_FILES | SERVING_FILES | MODEL_FILES | PICTURES | {"README.md"}
        expected["README.md"] = expected["README.md"].replace(b"path/or/id", b"tester/restr")
        assert repository.files(revision) == expected


def test_command_pushes_a_folder_without_code_with_it_and_the_weights_as_they_are(pushed):
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


def test_push_to_hub_of_model_and_processor_changes_nothing_the_second_time(pushed):
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


def test_predictions_by_ids_are_the_pipeline_s(pushed, one_thread):
    model, processor = ReSTRForImageSegmentation.from_pretrained(pushed.folders[1]), make_processor()
    pipe = ReSTRPipeline(model=model.eval(), processor=processor)
    rows = load_dataset(str(pushed.root / "data"), split="val", cache_dir=str(pushed.root / "cache"))
    sentences = [[text["text"] for part in row["references"] for text in part["expressions"]] for row in rows]
    expected = [answer for row, texts in zip(rows, sentences) for answer in pipe(row["image"], text=texts)]
    for name in ("loaded", "streamed"):
        folder = str(pushed.root / "masks" / name)
        found = load_dataset("parquet", data_dir=folder, split="val", cache_dir=str(pushed.root / "cache"))
        assert found["text"] == [text for texts in sentences for text in texts]
        for mask, answer in zip(found["mask"], expected, strict=True):
            assert np.array_equal(decode_mask(mask), np.asarray(answer["mask"]) > 0)


def test_the_hub_was_asked_nothing_that_it_does_not_know(pushed, loaded):
    assert not [request for request in pushed.hub.unknown_requests if "tester/" in request]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with serve() as hub:
        hub.connect(tmp_path, monkeypatch)
        yield hub


def test_model_and_processor_are_pushed_with_a_card_that_later_pushes_keep(hub):
    processor = make_processor()
    push_to_hub((make_model(processor), processor), "restr")
    repository = hub.repositories["model", "tester/restr"]
    assert repository.files().keys() == CODE_FILES | SERVING_FILES | MODEL_FILES | {"README.md"}
    HfApi().upload_file(path_or_fileobj=b"mine", path_in_repo="README.md", repo_id="tester/restr")
    push_to_hub((make_model(processor, seed=1), processor), "tester/restr", commit_message="Train for longer")
    assert repository.files()["README.md"] == b"mine"
    assert repository.titles[-1] == "Train for longer"


def test_old_weights_go_with_the_commit_that_brings_the_new_ones(hub, tmp_path):
    processor = make_processor()
    folder = save_bundle(make_model(processor), processor, tmp_path / "model")
    push_to_hub(folder, "restr")
    model = make_model(processor, seed=1)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="30KB")
    (folder / "checkpoint-1").mkdir()
    save_file({"a": torch.zeros(1)}, folder / "checkpoint-1" / "model.safetensors")
    torch.save({}, folder / "training_args.bin")
    push_to_hub(folder, "restr")
    repository = hub.repositories["model", "tester/restr"]
    others = CODE_FILES | SERVING_FILES | MODEL_FILES | {"README.md"}
    weights = {path for path in repository.files() if path not in others}
    assert "model.safetensors.index.json" in weights and len(weights) > 2
    assert all(path.startswith("model") for path in weights) and "model.safetensors" not in repository.files()
    assert len(repository.titles) == 2


def test_tag_of_another_commit_is_explained(hub, tmp_path):
    processor = make_processor()
    first = push_to_hub((make_model(processor), processor), "restr", tag="v1")
    with pytest.raises(ValueError, match=f"the tag 'v1' of tester/restr is at {first.oid}: choose another"):
        push_to_hub((make_model(processor, seed=1), processor), "restr", tag="v1")
    assert hub.repositories["model", "tester/restr"].tags == {"v1": first.oid}


def test_card_of_other_weights_is_not_pushed(hub, tmp_path):
    processor = make_processor()
    folder = save_bundle(make_model(processor), processor, tmp_path / "model")
    write_model_card(folder, example=Example(PHOTO, TEXTS, "somebody"))
    push_to_hub(folder, "restr")
    pair = make_model(processor, seed=1), processor
    with pytest.raises(ValueError, match="got one of other weights"):
        push_to_hub(pair, "restr")  # whose card is in the repository
    save_bundle(*pair, folder)
    with pytest.raises(ValueError, match="got one of other weights"):
        push_to_hub(folder, "restr")
    with pytest.raises(ValueError, match="got one of other weights"):
        push_to_hub(folder, "other")
    assert len(hub.repositories["model", "tester/restr"].titles) == 1 and len(hub.repositories) == 1


@pytest.mark.parametrize(
    ("repo_id", "options", "card", "message"),
    [
        ("restr", {}, {"license": "All mine!"}, 'the Hub takes, but it says: "license" must be one of'),
        ("tester/no name", {}, {}, "Repo id must use alphanumeric"),
        ("a/b/c", {}, {}, "Repo id must be in the form"),
        ("restr", {"tag": "first try"}, {}, "Expected a tag of letters, digits and .* got 'first try'"),
    ],
)
def test_what_the_hub_would_refuse_makes_no_repository(hub, tmp_path, repo_id, options, card, message):
    processor = make_processor()
    folder = save_bundle(make_model(processor), processor, tmp_path / "model")
    write_model_card(folder, **card)
    with pytest.raises(ValueError, match=message):
        push_to_hub(folder, repo_id, **options)
    assert not hub.repositories


def test_card_without_readable_metadata_makes_no_repository(hub, tmp_path):
    processor = make_processor()
    folder = save_bundle(make_model(processor), processor, tmp_path / "model")
    (folder / "README.md").write_text("---\nlicense: [mit\n---\n\nMine.\n")
    with pytest.raises(
        ValueError, match="Expected a model card with metadata that the Hub takes, but it says: while parsing"
    ):
        push_to_hub(folder, "restr")
    assert not hub.repositories


def test_card_links_a_space_that_is_there(hub, tmp_path):
    processor = make_processor()
    folder = save_bundle(make_model(processor), processor, tmp_path / "model")
    write_model_card(folder, space="tester/demo")
    with pytest.raises(ValueError, match="links the Space tester/demo, which does not exist"):
        push_to_hub(folder, "restr")
    assert not hub.repositories
    HfApi().create_repo("demo", repo_type="space", space_sdk="gradio")
    push_to_hub(folder, "restr")
    card = hub.repositories["model", "tester/restr"].files()["README.md"].decode()
    assert "The Space [tester/demo](https://huggingface.co/spaces/tester/demo) runs it." in card


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors", "pipeline_restr.py"])
def test_folder_that_lacks_a_part_is_not_pushed(hub, tmp_path, missing):
    processor = make_processor()
    folder = save_bundle(make_model(processor), processor, tmp_path / "model")
    (folder / missing).unlink()
    with pytest.raises(ValueError, match=f"lacks {missing}: save it"):
        push_to_hub(folder, "restr")
    assert not hub.repositories


def test_what_is_no_folder_is_not_pushed(hub, tmp_path):
    with pytest.raises(ValueError, match="there is no"):
        push_to_hub(tmp_path / "absent", "restr")
    assert not hub.repositories


@pytest.mark.parametrize(("repo_id", "message"), [("restr", "Invalid user token"), ("tester/restr", "401")])
def test_nothing_is_pushed_without_a_token(hub, monkeypatch, repo_id, message):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    processor = make_processor()
    with pytest.raises(HfHubHTTPError, match=message):
        push_to_hub((make_model(processor), processor), repo_id)
    assert not hub.repositories
    push_to_hub((make_model(processor), processor), repo_id, token=TOKEN)
    assert len(hub.repositories["model", "tester/restr"].titles) == 1
