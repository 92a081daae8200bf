"""Prepared data from changed folders, and from any version on a Hub."""

import io
import shutil

import datasets
import pytest
from hub_server import Repository, serve
from tiny_training import make_dataset, write_prepared

from modeling_restr.data import load_prepared
from modeling_restr.data.loading import find_data_files, name_rows
from modeling_restr.data.parquet_rows import open_source


CARD = "---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: val, path: data/val-*}\n---\n"


pytestmark = pytest.mark.usefixtures("own_cache")


def write_data(folder, num_images, seed):
    """Two files, and a card that does not depend on their rows."""
    rows = make_dataset(num_images, seed=seed)
    write_prepared(folder, {"val": rows}, num_files=2)
    return list(rows)


def masks(rows):
    return [reference["mask"] for row in rows for reference in row["references"]]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_is_never_mistaken_for_another_or_an_earlier_version(tmp_path, streaming):
    folders = [tmp_path / "one" / "photos", tmp_path / "two" / "photos"]
    for seed, folder in enumerate((*folders, folders[0])):
        shutil.rmtree(folder, ignore_errors=True)
        written = write_data(folder, 5, seed)
        loaded = list(load_prepared(folder, "val", streaming=streaming))
        assert masks(loaded) == masks(written) and [row["image"] for row in loaded] == [
            row["image"] for row in written
        ]


def test_the_first_images(tmp_path):
    written = write_data(tmp_path / "photos", 5, 0)
    for streaming in (False, True):
        for max_images, number in ((2, 2), (4, 4), (9, 5)):
            loaded = load_prepared(tmp_path / "photos", "val", max_images=max_images, streaming=streaming)
            assert masks(loaded) == masks(written[:number])


def test_an_unknown_split_is_explained(tmp_path):
    write_data(tmp_path / "photos", 2, 0)
    with pytest.raises(ValueError, match=r"among val in .*photos, got test\."):
        load_prepared(tmp_path / "photos", "test")


def test_folders_of_other_formats_are_loaded_as_datasets_does(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "val.jsonl").write_text('{"image": "a.png", "text": "red thing"}\n')
    assert find_data_files(folder).keys() == {"validation"}
    assert load_prepared(folder, "validation").to_list() == [{"image": "a.png", "text": "red thing"}]


@pytest.mark.parametrize("streaming", [False, True])
def test_damaged_files_are_named(tmp_path, streaming):
    write_data(tmp_path / "data", 5, seed=0)
    path = min((tmp_path / "data").rglob("*.parquet"))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=rf"{tmp_path}.* cannot be read"):
        list(load_prepared(tmp_path / "data", "val", streaming=streaming))
    with pytest.raises(ValueError, match=rf"{path} cannot be read"):
        open_source(str(tmp_path / "data"), "val")


def test_versions_on_the_hub(tmp_path, monkeypatch):
    with serve() as hub:
        hub.connect(tmp_path / "home", monkeypatch)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
        repository = hub.repositories["dataset", "tester/squares"] = Repository("dataset", "tester/squares")
        for number, name in ((2, "v1"), (3, "v2")):
            buffer = io.BytesIO()
            make_dataset(number, seed=number).to_parquet(buffer)
            files = {"README.md": CARD.encode(), "data/val-00000-of-00001.parquet": buffer.getvalue()}
            repository.tags[name] = repository.commit("main", name, files).sha
        for streaming in (False, True):
            for revision, number in (("v1", 2), ("v2", 3), (None, 3)):
                loaded = list(load_prepared("tester/squares", "val", revision=revision, streaming=streaming))
                assert masks(loaded) == masks(make_dataset(number, seed=number))


@pytest.mark.parametrize("max_images", [None, 2, 9])
def test_rows_have_the_name_that_datasets_gives_them(tmp_path, max_images):
    write_data(tmp_path / "data", 5, seed=0)
    rows = load_prepared(tmp_path / "data", "val", max_images=max_images)
    name = name_rows("val", max_images, len(rows))
    named = datasets.load_dataset(str(tmp_path / "data"), split=name)
    assert rows["image_id"] == named["image_id"] and (name == "val") == (max_images != 2)
