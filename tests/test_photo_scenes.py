import json

import numpy as np
import pytest
from photographs import write_photographs
from PIL import ExifTags, Image
from pycocotools import mask as coco_mask

from modeling_restr import ReSTRImageProcessor
from modeling_restr.data import photo_scenes
from modeling_restr.data.photo_scenes import Photographs, PhotoScenes, is_held_out, letterbox


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos") / "data"
    write_photographs(folder)
    return folder


@pytest.fixture(scope="module")
def photographs(folder):
    return Photographs.load(folder / "instances.json", folder / "images", held_out=False, progress=False)


def test_held_out_photographs_are_never_loaded_for_training(folder, photographs):
    held_out = Photographs.load(folder / "instances.json", folder / "images", held_out=True, progress=False)
    assert held_out.image_ids == [10] and is_held_out(10)
    assert photographs.image_ids == [image_id for image_id in range(1, 13) if image_id != 10]


def test_scenes_depend_on_their_number_alone(photographs):
    first = PhotoScenes(photographs, 20, 96, seed=3, paste=1.0)
    second = PhotoScenes(photographs, 9, 96, seed=3, paste=1.0)
    for index in (8, 2):
        for name in ("image", "masks"):
            assert np.array_equal(getattr(first[index], name), getattr(second[index], name))
    assert not np.array_equal(first[8].image, PhotoScenes(photographs, 9, 96, seed=4, paste=1.0)[8].image)
    with pytest.raises(IndexError):
        second[9]


def test_windows_say_which_pixel_of_which_photograph_shows_where(photographs, monkeypatch):
    """Each pixel of these photographs says where it is, also when it was cropped, mirrored, scaled or pasted."""
    monkeypatch.setattr(photo_scenes, "_change_colors", lambda rng, image: image)
    scenes = PhotoScenes(photographs, 60, 96, seed=0, paste=0.7)
    num_pasted = num_mirrored = 0
    for index in range(len(scenes)):
        scene = scenes[index]
        height, width = scene.image.shape[:2]
        assert max(height, width) == 96
        rows, columns = np.mgrid[:height, :width]
        expected = np.zeros((height, width, 3))
        for window, where in scene.windows:
            shown = np.ones((height, width), bool) if where is None else where
            expected[..., 0][shown] = (window.left + (columns + 0.5) * window.step_x - 0.5)[shown]
            expected[..., 1][shown] = (window.top + (rows + 0.5) * window.step_y - 0.5)[shown]
            expected[..., 2][shown] = 10 * (photographs.image_ids[window.photo] - 1)
            num_pasted += where is not None
            num_mirrored += window.step_x < 0
        difference = np.abs(scene.image - expected)
        assert np.quantile(difference, 0.97) <= 2  # pixels: scaling mixes neighbours, most at the edges
        assert (difference[..., 2] == 0).all()
    assert num_pasted > 20 and num_mirrored > 20


def test_masks_are_what_is_still_visible(photographs):
    """The boxes of these photographs do not overlap: where two would, the later one was pasted over."""
    scenes = PhotoScenes(photographs, 60, 96, seed=1, paste=1.0)
    for scene in (scenes[index] for index in range(len(scenes))):
        assert len(scene.masks) == len(scene.categories) == len(scene.is_clear)
        assert all(mask.any() for mask in scene.masks) and scene.masks.sum(0).max(initial=0) <= 1
        assert scene.masks.shape[1:] == scene.image.shape[:2]


def test_what_is_cut_off_or_hidden_is_not_clear(photographs):
    whole = [photograph.masks.sum((1, 2)) for photograph in photographs]
    scenes = PhotoScenes(photographs, 80, 96, seed=2, paste=0.0)
    unclear = 0
    for scene in (scenes[index] for index in range(len(scenes))):
        ((window, _),) = scene.windows
        areas = scene.masks.sum((1, 2)) * abs(window.step_x * window.step_y)  # in pixels of the photograph
        for area, is_clear in zip(areas, scene.is_clear):
            shares = area / whole[window.photo]
            assert not is_clear or shares.max() > 0.55
            unclear += not is_clear
    assert unclear > 10


def test_not_augmented_scenes_are_the_photographs_in_their_order(photographs, folder):
    scenes = PhotoScenes(photographs, len(photographs), 128, augment=False)
    for index in (0, 5):
        name = f"photo{photographs.image_ids[index] - 1}.png"
        assert np.array_equal(scenes[index].image, np.asarray(Image.open(folder / "images" / name)))
        assert np.array_equal(scenes[index].masks, photographs[index].masks)


def test_letterbox_is_the_image_processors(photographs):
    processor = ReSTRImageProcessor(size={"height": 96, "width": 96})
    scenes = PhotoScenes(photographs, 12, 96, seed=5)
    for scene in (scenes[index] for index in range(len(scenes))):
        pixels = processor(Image.fromarray(scene.image), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        assert np.abs(letterbox(scene.image, 96) / 127.5 - 1 - pixels).max() < 1e-6
        inside = letterbox(np.ones((2, *scene.image.shape[:2]), bool), 96)
        assert np.array_equal(inside[0], inside[1]) and (pixels[~inside[0]] == -1).all()


def test_partly_annotated_photographs_know_what_they_do_not_know(tmp_path):
    path = write_photographs(tmp_path / "data")
    content = json.loads(path.read_text())
    for image in content["images"]:
        image["source"] = "coco2017-persons-only"
    content["annotations"][0]["iscrowd"] = 1
    path.write_text(json.dumps(content))
    photographs = Photographs.load(path, path.parent / "images", held_out=False, progress=False)
    assert {photograph.known for photograph in photographs} == {frozenset({"person"})}
    assert photographs[0].crowds == {"person"}
    scenes = PhotoScenes(photographs, 60, 96, seed=3, paste=1.0)
    pasted = [name for index in range(60) for name in scenes[index].categories[len(scenes[index].categories) - 1 :]]
    assert "dog" in pasted and "person" in pasted and "skirt" not in pasted
    for index in range(60):  # what is not annotated may be there twice
        scene = scenes[index]
        if len(scene.windows) > 1:
            assert scene.categories[-1] in {"person", *scene.unclear_categories}


def test_photographs_are_upright_and_empty_masks_are_not_forgotten(tmp_path):
    path = write_photographs(tmp_path / "data")
    content = json.loads(path.read_text())
    mask = coco_mask.encode(np.zeros((96, 128), np.uint8, order="F"))
    category = content["annotations"][0]["category_id"]
    content["annotations"][0]["segmentation"] = {"size": [96, 128], "counts": mask["counts"].decode()}
    path.write_text(json.dumps(content))
    file = path.parent / "images" / content["images"][1]["file_name"]
    upright = np.asarray(Image.open(file))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # lies on its left side
    Image.fromarray(np.rot90(upright)).save(file, exif=exif)
    photographs = Photographs.load(path, path.parent / "images", held_out=False, progress=False)
    name = next(kind["name"] for kind in content["categories"] if kind["id"] == category)
    assert photographs[0].crowds == {name}
    np.testing.assert_array_equal(photographs[1].image, upright)


def test_photographs_outside_of_their_folder_are_not_opened(tmp_path):
    path = write_photographs(tmp_path)
    content = json.loads(path.read_text())
    (tmp_path / "images" / content["images"][0]["file_name"]).rename(tmp_path / "up.png")
    content["images"][0]["file_name"] = "../up.png"
    path.write_text(json.dumps(content))
    with pytest.raises(FileNotFoundError, match=r"images/up\.png"):
        Photographs.load(path, tmp_path / "images", held_out=False, progress=False)


def test_no_photographs_is_an_error(tmp_path):
    path = write_photographs(tmp_path / "data", number=3)
    with pytest.raises(ValueError, match="no image that is held out"):
        Photographs.load(path, path.parent / "images", held_out=True)
