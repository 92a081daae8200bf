"""Predicted masks as a COCO instances file: exact outlines, and the structure that other tools require."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from modeling_restr.data import build_dataset, encode_mask, read_coco
from modeling_restr.data.coco_export import build_instances, mask_to_polygons


EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
PHOTO = EXAMPLES / "photos" / "held_out" / "000000173350.jpg"


def rasterize(polygons, size):
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, *size))).astype(bool)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.7, 0.95])
def test_polygons_are_exactly_the_mask(share):
    """Noise has holes, parts within holes, pixels that touch at corners, and pixels at the borders."""
    rng = np.random.default_rng(int(100 * share))
    for _ in range(40):
        mask = rng.random(rng.integers(1, 20, size=2)) < share
        polygons = mask_to_polygons(mask)
        assert bool(polygons) == mask.any()
        if polygons:
            np.testing.assert_array_equal(rasterize(polygons, mask.shape), mask)
            assert all(len(polygon) >= 8 and type(number) is int for polygon in polygons for number in polygon)


def test_a_simple_outline_has_its_corners_only():
    mask = np.zeros((6, 8), dtype=bool)
    mask[1:5, 2:7] = mask[3, 1] = True
    (polygon,) = mask_to_polygons(mask)
    assert polygon == [2, 1, 7, 1, 7, 5, 2, 5, 2, 4, 1, 4, 1, 3, 2, 3]
    mask[2:4, 4] = False  # a hole, through whose right side the mask is cut
    assert len(mask_to_polygons(mask)) == 2


@pytest.fixture
def results():
    masks = np.random.default_rng(0).random((3, 12, 16)) < 0.4
    masks[1] = False
    texts = ["the red square", "nothing at all", "blue thing"]
    columns = {"row": 4, "file_name": "photo.jpg", "score": 0.75}
    results = [{**columns, "text": text, "mask": encode_mask(mask)} for text, mask in zip(texts, masks)]
    unreadable = {"row": 5, "file_name": None, "text": "red thing", "score": None, "mask": None}
    return [*results, unreadable, {**results[0], "row": 9, "file_name": None}]


def test_pycocotools_reads_the_masks_and_captions(results, tmp_path, capsys):
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(build_instances(results)))
    coco = COCO(str(path))
    annotations = coco.loadAnns(coco.getAnnIds(imgIds=[5]))
    assert [annotation["caption"] for annotation in annotations] == ["the red square", "blue thing"]
    for annotation, result in zip(annotations, (results[0], results[2])):
        assert coco.annToRLE(annotation)["counts"].decode() == result["mask"]["counts"]


def test_the_structure_is_what_labelling_tools_ask_for(results):
    """
    CVAT (Datumaro), Label Studio's converter and FiftyOne read polygons of objects that are no crowd. Label Studio
    asks each annotation with a box for a score, and CVAT looks for further values in `attributes`.
    """
    instances = build_instances(results)
    assert {"info", "licenses", "images", "annotations", "categories"} == instances.keys()
    size = {"height": 12, "width": 16}
    assert instances["images"] == [
        {"id": 5, "file_name": "photo.jpg", **size},
        {"id": 10, "file_name": "000000000010", **size},
    ]
    assert len({annotation["id"] for annotation in instances["annotations"]}) == 3
    for annotation in instances["annotations"]:
        assert annotation["category_id"] == instances["categories"][0]["id"] and annotation["iscrowd"] == 0
        mask = rasterize(annotation["segmentation"], (12, 16))
        (rows, columns), (left, top, width, height) = np.nonzero(mask), annotation["bbox"]
        assert [left, left + width, top, top + height] == [
            columns.min(),
            columns.max() + 1,
            rows.min(),
            rows.max() + 1,
        ]
        assert annotation["area"] == mask.sum() and annotation["score"] == 0.75
        assert annotation["attributes"] == {"caption": annotation["caption"]}


def test_the_file_can_be_prepared_as_training_data(results, tmp_path):
    Image.new("RGB", (16, 12)).save(tmp_path / "photo.jpg")
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(build_instances(results[:3])))
    (row,) = build_dataset(read_coco(path, tmp_path, captions=True), progress=False)
    masks = {ref["expressions"][0]["text"]: ref["mask"] for ref in row["references"]}
    assert masks == {result["text"]: result["mask"] for result in (results[0], results[2])}


def test_segment_writes_the_file(restr, tmp_path):
    sentences = ["the upper dog", "the lower dog"]
    done = restr("segment", EXAMPLES / "restr_mini", PHOTO, *sentences, "--format", "coco", "--output-dir", tmp_path)
    assert done.code == 0, done.err
    assert {path.name for path in tmp_path.iterdir()} == {f"{PHOTO.stem}_instances.json", f"{PHOTO.stem}_overlay.png"}
    instances = json.loads((tmp_path / f"{PHOTO.stem}_instances.json").read_text())
    (image,) = instances["images"]
    assert image["file_name"] == PHOTO.name and (image["width"], image["height"]) == Image.open(PHOTO).size
    assert [annotation["caption"] for annotation in instances["annotations"]] == sentences
    shares = [annotation["area"] / (image["width"] * image["height"]) for annotation in instances["annotations"]]
    assert all(f"{share:.1%}" in done.out for share in shares)
