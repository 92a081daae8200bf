"""The code of docs/training.md, run on tiny data, and what it ends in."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import make_dataset
from training_runs import make_inputs, read_log, run_code

from modeling_restr import ReSTRForImageSegmentation, ReSTRProcessor
from modeling_restr.metrics import ReferringIoU
from modeling_restr.training.batches import ReferringCollator, ReferringDataset, split_ids
from modeling_restr.training.trainer import count_pixels


DOCS = (Path(__file__).resolve().parents[1] / "docs" / "training.md").read_text()
OF_SENTENCES, OF_IMAGES, LORA = re.findall(r"```python\n(.*?)```", DOCS, flags=re.DOTALL)
WRITE_METRICS = """
import json, os
open(f"{folder}/metrics-{os.environ.get('RANK', 0)}.json", "w").write(json.dumps(metrics))
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def adapt(code, inputs, folder, **replaced):
    """Code of the page, on tiny data and with the given other changes."""
    names = {"data/refcoco": str(inputs), "runs/refcoco/model": str(inputs / "plain"), "runs/lora": f"{folder}/lora"}
    for old, new in {**names, **replaced}.items():
        code = code.replace(old, new)
    return f"folder = {str(folder)!r}\n{code}"


@pytest.fixture(scope="module")
def metrics(inputs):
    """Of the validation data, one sentence at a time."""
    model = ReSTRForImageSegmentation.from_pretrained(inputs / "plain").eval()
    collate, predictions = ReferringCollator(ReSTRProcessor.from_pretrained(inputs / "plain")), []
    for item in ReferringDataset(make_dataset(5, seed=3), 1, shuffle=False):
        batch, _ = split_ids(collate([item]))
        with torch.no_grad():
            ((intersection, union),) = count_pixels(model(**batch).logits, batch["labels"]).tolist()
        predictions.append({"intersection": intersection, "union": union})
    return ReferringIoU(keep_in_memory=True).compute(predictions=predictions)


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
    code = adapt(code, inputs, tmp_path, **{old: new}) + WRITE_METRICS
    codes = run_code(code, tmp_path, num_processes)
    assert codes in (0, [0, 0]), read_log(tmp_path)
    for rank in range(num_processes):
        found = json.loads((tmp_path / f"metrics-{rank}.json").read_text())
        assert found["num_expressions"] == 11 and found == pytest.approx(metrics)


def test_a_stream_that_one_process_would_cut_into_shares_is_refused(inputs, tmp_path):
    stream = """
class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter([images[position] for position in range(len(images))])
"""
    code = OF_SENTENCES.partition("gathered")[0] + OF_IMAGES.replace("loader =", stream + "loader =").replace(
        "DataLoader(images", "DataLoader(Stream()"
    )
    code = adapt(code, inputs, tmp_path, **{"batch_size=4": "batch_size=1"})
    assert 0 not in run_code(code, tmp_path, 2)
    assert "Can only concatenate tensors" in read_log(tmp_path)


def test_lora_trains_adapters_that_can_be_loaded_and_merged(inputs, tmp_path):
    check = """
from modeling_restr.training.batches import split_ids

batch, _ = split_ids(collator([data[position] for position in range(4)]))
trained = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
torch.save({name: bool(weight.abs().sum() > 0) for name, weight in trained.items()}, f"{folder}/trained.pt")
with torch.no_grad():
    logits = [m.eval()(**batch).logits for m in (trainer.model, loaded, ReSTRForImageSegmentation.from_pretrained(f"{folder}/lora/model"))]
torch.save(logits, f"{folder}/logits.pt")
"""
    options = {
        "1000": "4",
        "ReferringTrainer(model, args, collator, data, processor=processor, recipe=recipe).train()": (
            "trainer = ReferringTrainer(model, args, collator, data, processor=processor, recipe=recipe)\ntrainer.train()"
        ),
        "save_bundle(model": "import copy; loaded = copy.deepcopy(model)\nsave_bundle(model",
    }
    code = adapt(LORA, inputs, tmp_path, **options) + check
    assert run_code(code, tmp_path) == 0, read_log(tmp_path)
    trained = torch.load(tmp_path / "trained.pt")
    assert all("lora_" in name or "pixel_decoder" in name for name in trained)
    assert all(trained.values())  # also the matrices that start at 0
    in_training, loaded, merged = torch.load(tmp_path / "logits.pt")
    torch.testing.assert_close(loaded, in_training, rtol=0, atol=0)
    torch.testing.assert_close(merged, in_training)
    start, end = (
        load_file(folder / "model.safetensors") for folder in (inputs / "plain", tmp_path / "lora" / "model")
    )
    assert start.keys() == end.keys()
    changed = {name for name in start if not torch.equal(start[name], end[name])}
    assert any("vision_model" in name for name in changed) and any("fusion" in name for name in changed)
    assert not any("layer_norm" in name or "embed" in name for name in changed)
