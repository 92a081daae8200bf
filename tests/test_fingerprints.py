"""The fingerprint of data: equal for equal rows in any folder, different for any other rows."""

import numpy as np
import pytest
from datasets import Dataset, load_dataset
from tiny_training import make_dataset, make_rows

from modeling_restr.data.canonical import FEATURES, encode_mask
from modeling_restr.training import fingerprints
from modeling_restr.training.fingerprints import fingerprint_data


def save(dataset, folder, num_files=1):
    folder.mkdir(parents=True)
    for index in range(num_files):
        dataset.shard(num_files, index).to_parquet(folder / f"train-{index}.parquet")
    return folder


def load(folder, **kwargs):
    return load_dataset("parquet", data_files=f"{folder}/*.parquet", split="train", **kwargs)


def test_fingerprint_does_not_depend_on_the_folder_or_the_number_of_files(tmp_path):
    expected = fingerprint_data(make_dataset(6))
    assert fingerprint_data(load(save(make_dataset(6), tmp_path / "one"))) == expected
    assert fingerprint_data(load(save(make_dataset(6), tmp_path / "other", num_files=3))) == expected


def test_an_image_in_a_file_counts_by_its_content(tmp_path):
    rows = make_rows(2)
    for number, row in enumerate(rows):
        row["image"].save(tmp_path / f"{number}.png")
        row["image"] = str(tmp_path / f"{number}.png")
    before = fingerprint_data(Dataset.from_list(rows, features=FEATURES))
    assert fingerprint_data(Dataset.from_list(rows, features=FEATURES)) == before
    make_rows(2, seed=1)[0]["image"].save(tmp_path / "0.png")
    assert fingerprint_data(Dataset.from_list(rows, features=FEATURES)) != before


def change_image(rows):
    rows[3]["image"].putpixel((0, 0), (1, 2, 3))


def change_text(rows):
    rows[3]["references"][0]["expressions"][0]["text"] = "the red box"


def change_mask(rows):
    rows[3]["references"][0]["mask"] = encode_mask(np.ones((24, 32), dtype=bool))


def change_id(rows):
    rows[3]["image_id"] = 77


@pytest.mark.parametrize("change", [change_image, change_text, change_mask, change_id, list.reverse, list.pop])
@pytest.mark.parametrize("is_stream", [False, True])
def test_other_rows_have_another_fingerprint(change, is_stream):
    rows = make_rows(4)
    change(rows)
    data = [make_dataset(4), Dataset.from_list(rows, features=FEATURES)]
    data = [dataset.to_iterable_dataset(num_shards=2) if is_stream else dataset for dataset in data]
    assert fingerprint_data(data[0]) != fingerprint_data(data[1])
    assert fingerprint_data(data[0]) == fingerprint_data(data[0])


def test_the_first_rows_of_a_few_shards_represent_a_stream(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprints, "MAX_SHARDS", 2)
    monkeypatch.setattr(fingerprints, "ROWS_PER_SHARD", 1)
    read = []
    monkeypatch.setattr(fingerprints, "fingerprint_rows", lambda data: read.extend(data["image_id"]) or [])
    stream = load(save(make_dataset(8), tmp_path / "data", num_files=4), streaming=True)
    fingerprint_data(stream)
    assert read == [0, 4]  # the files hold two rows each
    first_rows = fingerprint_data(load(tmp_path / "data", streaming=True).take(3))
    assert first_rows == fingerprint_data(load(tmp_path / "data", streaming=True).take(3))
