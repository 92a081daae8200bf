"""Images by the names in annotation files, as other machines wrote them. No file outside of the folder is found."""

import os
import unicodedata

import pytest

from modeling_restr.data.image_files import MAX_BYTES, image_finder, resolve_image


@pytest.fixture
def folder(tmp_path):
    """A folder of images next to files that must not be opened."""
    inside = ("photos/a.jpg", "photos/batch/b c.jpg", "photos/train2017/000000000009.jpg")
    for name in (*inside, "up.jpg", "secret/s.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path / "photos"


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("a.jpg", "a.jpg"),
        ("/home/someone/photos/a.jpg", "a.jpg"),
        ("../../a.jpg", "a.jpg"),
        ("images\\1\\a.jpg", "a.jpg"),
        ("..\\..\\label-studio\\media\\a.jpg", "a.jpg"),
        ("C:\\Users\\me\\photos\\batch\\b c.jpg", "batch/b c.jpg"),
        ("C:a.jpg", None),
        ("batch/b%20c.jpg", "batch/b c.jpg"),
        ("http://localhost/upload/batch%2Fb%20c.jpg", "batch/b c.jpg"),
        ("/data/local-files/?d=a.jpg", "a.jpg"),
        ("/data/local-files/?d=batch/b%20c.jpg", "batch/b c.jpg"),
        ("COCO_train2014_000000000009.jpg", "train2017/000000000009.jpg"),
        ("b c.jpg", None),  # it lies in a folder that is not named
    ],
)
def test_names_from_other_machines(folder, name, found):
    path = image_finder(folder)(name)
    assert path == folder / found if found else not path.exists()


def test_accents_in_either_form(folder):
    for written, named in (("NFC", "NFD"), ("NFD", "NFC")):
        path = folder / unicodedata.normalize(written, f"café {written}.jpg")
        path.touch()
        assert image_finder(folder)(unicodedata.normalize(named, path.name)) == path


def test_names_are_taken_as_they_are_first(folder):
    for name in ("x\\a.jpg", "b%20c.jpg"):
        (folder / name).touch()
        assert image_finder(folder)(name) == folder / name


@pytest.mark.parametrize(
    "name",
    [
        *("../up.jpg", "./../secret/s.jpg", "%2e%2e/up.jpg", "..\\up.jpg", "/dev/zero", "", ".", "..", "/", "\0"),
        *("%00.jpg", "\ud800.jpg", 5000 * "a", 2000 * "a/" + "up.jpg", 5000 * "../"),
    ],
)
def test_nothing_outside_is_found(folder, name):
    path = image_finder(folder)(name)
    assert path.is_relative_to(folder) and ".." not in path.parts
    with pytest.raises((OSError, ValueError)):
        resolve_image(path, folder)


def test_only_files_in_the_folder_are_opened(folder, tmp_path):
    assert resolve_image(folder / "a.jpg", folder) == folder / "a.jpg"
    assert resolve_image(tmp_path / "up.jpg") == tmp_path / "up.jpg"  # of no folder
    (folder / "inside.jpg").symlink_to("a.jpg")
    assert resolve_image(folder / "inside.jpg", folder).read_bytes() == b"photos/a.jpg"
    (folder / "link.jpg").symlink_to("../up.jpg")
    (folder / "train2014").symlink_to("../secret")
    for name in ("link.jpg", "s.jpg"):
        path = image_finder(folder)(name)
        assert path.exists()
        with pytest.raises(ValueError, match=r"leads out of the folder of the images, .*photos, to .*\.jpg"):
            resolve_image(path, folder)
    other = tmp_path / "other"
    other.symlink_to(folder)  # the folder itself may be a link
    assert resolve_image(other / "a.jpg", other) == folder / "a.jpg"


def test_links_of_the_hubs_cache_are_inside(tmp_path):
    repository = tmp_path / "datasets--someone--photos"
    snapshot = repository / "snapshots" / "0123456789abcdef" / "images"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "5eb63b").write_bytes(b"photo")
    (tmp_path / "secret").write_bytes(b"secret")
    (snapshot / "a.jpg").symlink_to("../../../blobs/5eb63b")
    (snapshot / "b.jpg").symlink_to("../../../../secret")
    for image_dir in (snapshot, snapshot.parent):
        assert resolve_image(image_finder(snapshot)("a.jpg"), image_dir).read_bytes() == b"photo"
        with pytest.raises(ValueError, match="leads out of"):
            resolve_image(image_finder(snapshot)("b.jpg"), image_dir)


def test_only_regular_files_are_opened(folder):
    os.mkfifo(folder / "pipe.jpg")
    (folder / "zero.jpg").symlink_to("/dev/zero")
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "folder.jpg").mkdir()
    with open(folder / "large.jpg", "wb") as file:
        file.truncate(MAX_BYTES + 1)
    for name, message in (
        ("pipe.jpg", "not a regular file"),
        ("folder.jpg", "not a regular file"),
        ("zero.jpg", "not a regular file"),
        ("large.jpg", "2,147,483,648 bytes, more than the limit of 2,147,483,647"),
    ):
        with pytest.raises(ValueError, match=message):
            resolve_image(folder / name)
    assert not image_finder(folder)("pipe.jpg").exists()
    with pytest.raises(ValueError, match="leads out of"):
        resolve_image(folder / "zero.jpg", folder)
    with pytest.raises(OSError, match="symbolic links"):
        resolve_image(folder / "loop.jpg", folder)
    with pytest.raises(FileNotFoundError):
        resolve_image(image_finder(folder)("nowhere.jpg"), folder)


def test_a_file_is_no_folder(folder):
    with pytest.raises(ValueError, match=r"Expected a folder of images, got .*a\.jpg"):
        image_finder(folder / "a.jpg")
