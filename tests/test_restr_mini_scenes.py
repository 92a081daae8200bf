import json
from dataclasses import replace

import numpy as np
import pytest
from coco_annotations import compress
from photographs import write_photographs
from pictures import make_exif
from PIL import Image
from scenes import SHOWN, Photographs, PhotoScenes, part_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos") / "data"
    write_photographs(folder, number=22)
    return folder


@pytest.fixture(scope="module")
def photographs(folder):
    return Photographs.load([folder], "train", progress=False)


def test_held_out_photographs_are_never_loaded_for_training(folder, photographs):
    test, validation = (Photographs.load([folder], part, progress=False) for part in ("test", "validation"))
    assert (test.image_ids, validation.image_ids) == ([10], [20])
    assert photographs.image_ids == [image_id for image_id in range(1, 23) if image_id % 10]


def test_each_photograph_has_one_part_and_shown_ones_are_test():
    parts = [part_of(image_id) for image_id in range(10_000)]
    assert [parts.count(part) for part in ("train", "validation", "test")] == [9000, 499, 501]  # 540 is shown
    assert {part_of(image_id) for image_id in SHOWN} == {"test"}


def test_scenes_depend_on_their_number_alone(photographs):
    first = PhotoScenes(photographs, 20, 96, seed=3, paste=1.0)
    second = PhotoScenes(photographs, 9, 96, seed=3, paste=1.0)
    for index in (8, 2):
        for name in ("image", "masks"):
            assert np.array_equal(getattr(first[index], name), getattr(second[index], name))
    assert not np.array_equal(first[8].image, PhotoScenes(photographs, 9, 96, seed=4, paste=1.0)[8].image)
    with pytest.raises(IndexError):
        second[9]


def test_masks_are_the_visible_parts(photographs):
    """No two boxes of a photograph overlap, so a pasted one has to be cut out of the others."""
    scenes = PhotoScenes(photographs, 60, 96, seed=1, paste=1.0)
    for scene in (scenes[index] for index in range(len(scenes))):
        assert len(scene.masks) == len(scene.categories) == len(scene.is_clear)
        assert all(mask.any() for mask in scene.masks) and scene.masks.sum(0).max(initial=0) <= 1
        assert scene.masks.shape[1:] == scene.image.shape[:2]


def test_instances_that_are_cut_off_are_unclear(photographs):
    scenes = PhotoScenes(photographs, 80, 96, seed=2, paste=0.0)
    unclear = 0
    for scene in (scenes[index] for index in range(len(scenes))):
        for mask, is_clear in zip(scene.masks, scene.is_clear):
            rows, columns = mask.nonzero()
            is_inside = min(rows.min(), columns.min()) > 1 and (len(mask) - rows.max() > 2)
            is_inside &= mask.shape[1] - columns.max() > 2
            assert is_clear or not is_inside  # without pasting, only the frame cuts off
            unclear += not is_clear
    assert unclear > 10


def test_scenes_without_augmentation_are_the_photographs_in_order(photographs, folder):
    scenes = PhotoScenes(photographs, len(photographs), 128, augment=False)
    for index in (0, 5):
        name = f"photo{photographs.image_ids[index] - 1}.png"
        assert np.array_equal(scenes[index].image, np.asarray(Image.open(folder / "images" / name)))
        assert np.array_equal(scenes[index].masks, photographs[index].masks)


def test_scenes_without_crop_mirror_and_paste_are_recoloured_photographs(photographs):
    shapes = {photo.image_id: photo.masks for photo in photographs}
    scenes = PhotoScenes(photographs, 20, 128, seed=0, crop=0, mirror=0, paste=0)
    colored = 0
    for index in range(20):
        scene = scenes[index]
        photo = next(id for id, masks in shapes.items() if np.array_equal(masks, scene.masks))
        colored += not np.array_equal(scene.image, next(p.image for p in photographs if p.image_id == photo))
    assert colored > 15


def test_all_scenes_may_be_mirrored(photographs):
    """The same scenes, as the random numbers are the same."""
    plain, mirrored = (PhotoScenes(photographs, 9, 128, crop=0, mirror=share, paste=0) for share in (0, 1))
    for index in range(9):
        assert np.array_equal(plain[index].image[:, ::-1], mirrored[index].image)


def test_categories_that_are_not_annotated_are_unclear(tmp_path):
    path = write_photographs(tmp_path / "data")
    content = json.loads(path.read_text())
    for image in content["images"]:
        image["source"] = "coco2017-persons-only"
    person = next(kind["id"] for kind in content["categories"] if kind["name"] == "person")
    content["annotations"] = [a for a in content["annotations"] if a["category_id"] == person or a["image_id"] > 6]
    for image in content["images"][6:]:
        image["source"] = "coco2017"
    content["annotations"][0]["iscrowd"] = 1
    path.write_text(json.dumps(content))
    photographs = Photographs.load([path.parent], "train", progress=False)
    assert [photograph.known for photograph in photographs][:6] == [frozenset({"person"})] * 6
    assert photographs[-1].known >= {"person", "dog"}
    assert photographs[0].crowds == {"person"}
    photographs = Photographs([replace(photograph, weight=1.0) for photograph in photographs])
    scenes = PhotoScenes(photographs, 60, 96, seed=3, paste=1.0)
    pasted = [name for index in range(60) for name in scenes[index].categories[len(scenes[index].categories) - 1 :]]
    assert "dog" in pasted and "person" in pasted and "skirt" not in pasted
    for index in range(60):  # there may be a second one that is not annotated
        scene = scenes[index]
        assert {name for name in scene.categories if name not in scene.known} <= scene.unclear_categories


def test_photographs_are_upright_and_empty_masks_count_as_crowds(tmp_path):
    path = write_photographs(tmp_path / "data")
    content = json.loads(path.read_text())
    category = content["annotations"][0]["category_id"]
    content["annotations"][0]["segmentation"] = compress(np.zeros((96, 128), bool))
    path.write_text(json.dumps(content))
    file = path.parent / "images" / content["images"][1]["file_name"]
    upright = np.asarray(Image.open(file))
    Image.fromarray(np.rot90(upright)).save(file, exif=make_exif(6))
    photographs = Photographs.load([path.parent], "train", progress=False)
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
        Photographs.load([tmp_path], "train", progress=False)


def test_no_photographs_is_an_error(tmp_path):
    path = write_photographs(tmp_path / "data", number=3)
    with pytest.raises(ValueError, match="part 'test', got none"):
        Photographs.load([path.parent], "test")
