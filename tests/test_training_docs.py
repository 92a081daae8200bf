"""All commands and snippets of docs/training.md, run on tiny data, and their results."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from safetensors.torch import load_file
from training_runs import (
    EXAMPLES,
    NUM_EXPRESSIONS,
    make_validation_data,
    read_log,
    read_vectors,
    run_code,
    run_script,
)

from modeling_restr import ReSTRForImageSegmentation, ReSTRProcessor
from modeling_restr.training.batches import ReferringCollator, ReferringDataset, split_ids
from modeling_restr.training.validation import compute_metrics, count_pixels


DOCS = (EXAMPLES.parent / "docs" / "training.md").read_text()
NEW_MODEL, OF_SENTENCES, OF_IMAGES, LORA = re.findall(r"```python\n(.*?)```", DOCS, flags=re.DOTALL)
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", DOCS, flags=re.DOTALL) for line in block.splitlines()]
WRITE_METRICS = """
import json, os
open(f"{folder}/metrics-{os.environ.get('RANK', 0)}.json", "w").write(json.dumps(metrics))
"""


def adapt(code, inputs, folder, **replaced):
    """Code or a command of the page with tiny data, and with the given other changes."""
    names = {
        "data/refcoco": str(inputs),
        "runs/refcoco/model": str(inputs / "plain"),
        "examples/restr_mini": str(inputs / "plain"),
        "glove.840B.300d.txt": str(inputs / "vectors.txt"),
        "google/vit-base-patch16-384": str(inputs / "vit"),
        "runs/": f"{folder}/",
    }
    for old, new in {**names, **replaced}.items():
        code = code.replace(old, new)
    return code


def run_page(code, inputs, folder, num_processes=1, **replaced):
    return run_code(f"folder = {str(folder)!r}\n{adapt(code, inputs, folder, **replaced)}", folder, num_processes)


@pytest.mark.parametrize("command", COMMANDS, ids=[command.split()[0] for command in COMMANDS])
def test_commands_end_with_a_model(inputs, tmp_path, command):
    program, *words = shlex.split(adapt(command, inputs, tmp_path))
    if program == "accelerate":
        parsed = launch_command_parser().parse_args(words[1:])
        assert words[0] == "launch" and Path(parsed.config_file).name == "ddp.yaml"
        words = [parsed.training_script, *parsed.training_script_args]
    elif program == "torchrun":
        assert words[:2] == ["--nproc_per_node", "8"]
        words = words[2:]
    assert program in ("accelerate", "torchrun", "python")
    output_dir = Path(words[words.index("--output_dir") + 1])
    fewer = {
        "vision_model_name_or_path": inputs / "vit",
        "max_steps": 2,
        "image_size": 32,
        "dataloader_num_workers": 0,
    }
    arguments = [*words[1:], *(f"--{name}={value}" for name, value in fewer.items())]
    codes = run_script(Path(words[0]).stem, arguments, output_dir, num_processes=1 if program == "python" else 2)
    assert codes in (0, [0, 0]), read_log(output_dir)
    assert ReSTRForImageSegmentation.from_pretrained(output_dir / "model")


def test_a_new_model_has_its_parts(inputs, tmp_path):
    code = NEW_MODEL.replace("image_size=480", "image_size=32") + "model.save_pretrained(folder)\n"
    assert run_page(code, inputs, tmp_path) == 0, read_log(tmp_path)
    model = ReSTRForImageSegmentation.from_pretrained(tmp_path)
    embeddings = model.get_input_embeddings().weight.detach().numpy()
    assert model.config.vision_config.hidden_size == 36
    for word in ("red", "left", "dog"):
        assert np.abs(embeddings - read_vectors(inputs)[word]).max(1).min() < 1e-6


@pytest.fixture(scope="module")
def metrics(inputs):
    """Metrics of the validation data, from one sentence at a time."""
    model = ReSTRForImageSegmentation.from_pretrained(inputs / "plain").eval()
    collate, counts = ReferringCollator(ReSTRProcessor.from_pretrained(inputs / "plain")), []
    for item in ReferringDataset(make_validation_data(), 1, shuffle=False):
        batch, _ = split_ids(collate([item]))
        with torch.no_grad():
            counts.append(count_pixels(model(**batch).logits, batch["labels"]))
    return compute_metrics(torch.cat(counts))


@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize(
    ("code", "old", "new"),
    [
        (OF_SENTENCES, "batch_size=16", "batch_size=3"),  # 11 sentences: the last batches are not full
        (OF_SENTENCES + OF_IMAGES, "batch_size=4", "batch_size=2"),  # 5 images of 1, 2, 3, 4 and 1 sentences
    ],
    ids=["of sentences", "of images"],
)
def test_own_loops_count_every_sentence_once(inputs, metrics, tmp_path, num_processes, code, old, new):
    assert code.count(old) == 1
    codes = run_page(code + WRITE_METRICS, inputs, tmp_path, num_processes, **{old: new})
    assert codes in (0, [0, 0]), read_log(tmp_path)
    for rank in range(num_processes):
        found = json.loads((tmp_path / f"metrics-{rank}.json").read_text())
        assert found["num_expressions"] == NUM_EXPRESSIONS and found == pytest.approx(metrics)


def test_a_stream_that_one_process_would_split_by_rows_is_refused(inputs, tmp_path):
    stream = """
class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter([images[position] for position in range(len(images))])
"""
    code = OF_SENTENCES.partition("gathered")[0] + OF_IMAGES.replace("loader =", stream + "loader =")
    replaced = {"DataLoader(images": "DataLoader(Stream()", "batch_size=4": "batch_size=1"}
    assert 0 not in run_page(code, inputs, tmp_path, 2, **replaced)
    assert "Can only concatenate tensors" in read_log(tmp_path)


def test_lora_trains_adapters_that_can_be_loaded_and_merged(inputs, tmp_path):
    check = """
batch, _ = split_ids(collator([data[position] for position in range(4)]))
trained = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
torch.save({name: bool(weight.abs().sum() > 0) for name, weight in trained.items()}, f"{folder}/trained.pt")
merged = ReSTRForImageSegmentation.from_pretrained(f"{folder}/lora/model")
with torch.no_grad():
    torch.save([each.eval()(**batch).logits for each in (trainer.model, loaded, merged)], f"{folder}/logits.pt")
"""
    train = "ReferringTrainer(model, args, collator, data, processor=processor, recipe=recipe)"
    assert f"{train}.train()" in LORA
    replaced = {
        "1000": "4",
        f"{train}.train()": f"trainer = {train}\ntrainer.train()",
        "save_bundle(model": "loaded = copy.deepcopy(model)\nsave_bundle(model",
    }
    code = f"import copy\nfrom modeling_restr.training.batches import split_ids\n{LORA}{check}"
    assert run_page(code, inputs, tmp_path, **replaced) == 0, read_log(tmp_path)
    trained = torch.load(tmp_path / "trained.pt")
    assert all("lora_" in name or "pixel_decoder" in name for name in trained)
    assert all(trained.values())  # including the matrices that start at 0
    in_training, loaded, merged = torch.load(tmp_path / "logits.pt")
    torch.testing.assert_close(loaded, in_training, rtol=0, atol=0)
    torch.testing.assert_close(merged, in_training)
    start, end = (load_file(path / "model.safetensors") for path in (inputs / "plain", tmp_path / "lora" / "model"))
    assert start.keys() == end.keys()
    changed = {name for name in start if not torch.equal(start[name], end[name])}
    assert any("vision_model" in name for name in changed) and any("fusion" in name for name in changed)
    assert not any("layer_norm" in name or "embed" in name for name in changed)
