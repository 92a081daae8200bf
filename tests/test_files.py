import pytest

from modeling_restr.files import hold_folder, replace_file


def test_files_are_replaced_atomically(tmp_path):
    path = tmp_path / "results.json"
    with replace_file(path) as temporary, replace_file(path) as another:
        temporary.write_text("one")
        another.write_text("two")
        assert not path.exists() and temporary != another
    assert path.read_text() == "one"  # of the run that ended last
    with pytest.raises(KeyError), replace_file(path) as temporary:
        temporary.write_text("half")
        assert temporary.match(".results.json.*.tmp")
        raise KeyError
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]


def test_one_run_at_a_time_uses_a_folder(tmp_path):
    with hold_folder(tmp_path / "new", "run"):
        with pytest.raises(ValueError, match="Another process is writing to"), hold_folder(tmp_path / "new", "run"):
            pass
        with hold_folder(tmp_path / "new", "other"):
            pass
    with hold_folder(tmp_path / "new", "run"):
        pass
