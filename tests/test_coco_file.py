"""COCO files of any tool: the rows, counts of what is left out, and errors that name the record."""

import json
import logging
import re

import numpy as np
import pytest
from coco_annotations import (
    CATEGORIES,
    HEIGHT,
    LEFT,
    LEFT_OUTLINE,
    RIGHT,
    TINY,
    WIDTH,
    annotate,
    compress,
    draw,
    ids_of,
    run_lengths,
    save_image,
    texts_of,
)

from modeling_restr.data import build_dataset, decode_mask, read_coco
from modeling_restr.data.canonical import BadImage
from modeling_restr.data.records import Problems


DOG = annotate(3, 7, draw("rectangle", [60, 30, 80, 60]), category_id=4)


@pytest.fixture
def write(tmp_path):
    """Writes a file of these annotations, of one image unless `images` has others, and reads it."""

    def write_and_read(annotations, image=None, categories=None, images=None, **options):
        image = {"id": 7, "file_name": "7.png", "height": HEIGHT, "width": WIDTH} | (image or {})
        image = {name: value for name, value in image.items() if value is not None}
        names = CATEGORIES if categories is None else categories
        content = {
            "images": [image] if images is None else images,
            "annotations": annotations,
            "categories": [{"id": number, "name": name} for number, name in names.items()],
        }
        (tmp_path / "instances.json").write_text(json.dumps(content))
        return read_coco(tmp_path / "instances.json", tmp_path, progress=False, **options)

    return write_and_read


def outline(number, polygons, category_id=1, image_id=7):
    return annotate(number, image_id, LEFT, category_id) | {"segmentation": polygons}


def find_problems(write, *args, **options):
    """{kind of problem: names} of reading these annotations."""
    problems = Problems()
    images = write(*args, problems=problems, **options)
    return images, dict(problems)


def test_polygons_and_rles_give_the_same_rows(write, tmp_path):
    save_image(tmp_path / "7.png")
    points = np.reshape(LEFT_OUTLINE, (-1, 2)).tolist()
    stray = [[LEFT_OUTLINE, [5, 5], [5, 5, 9, 9]], [[1.0, 2.0, 3.0, 4.0], LEFT_OUTLINE]]
    rows = []
    for segmentation in ([LEFT_OUTLINE], LEFT_OUTLINE, points, [points], *stray, run_lengths(LEFT), compress(LEFT)):
        left = annotate(1, 7, LEFT) | {"segmentation": segmentation}
        rows.append(build_dataset(write([left, annotate(2, 7, RIGHT)]), progress=False)[0])
    for row in rows:
        assert row["references"] == rows[0]["references"]
        first, second = row["references"]
        np.testing.assert_array_equal(decode_mask(first["mask"]), LEFT)
        np.testing.assert_array_equal(decode_mask(second["mask"]), RIGHT)
        assert first["bbox"] == [10, 30, 31, 31]
        assert (first["category"], first["ann_id"], first["ref_id"]) == ("chair", 1, 1)
        assert all("left" in expression["text"] for expression in first["expressions"])


def test_a_crowd_excludes_its_category_in_its_image(write):
    assert ids_of(write([annotate(1, 7, LEFT), annotate(2, 7, RIGHT), DOG])) == [1, 2, 3]
    crowd = annotate(2, 7, RIGHT, iscrowd=1)
    images, problems = find_problems(write, [annotate(1, 7, LEFT), crowd, DOG])
    assert ids_of(images) == [3]
    (crowds, names), (silenced, others) = problems.items()
    assert "crowds (iscrowd 1)" in crowds and "crowds_as_instances" in crowds and names == ["annotation 2"]
    assert "without a mask" in silenced and others == ["annotation 1"]
    lvis = {"not_exhaustive_category_ids": [1], "file_name": None, "coco_url": "http://images/val2017/7.png"}
    (image,) = write([annotate(1, 7, LEFT), DOG], image=lvis)
    assert (ids_of([image]), image.file_name) == ([3], "val2017/7.png")


def test_brush_masks_marked_as_crowds_are_read_on_request(write):
    """As CVAT exports them."""
    brushed = [annotate(1, 7, LEFT, iscrowd=1), annotate(2, 7, RIGHT, iscrowd=1)]
    with pytest.raises(
        ValueError, match=r"annotations marked as crowds \(iscrowd 1\).*: 2 \(annotation 1, annotation 2\)"
    ):
        write(brushed)
    images, problems = find_problems(write, brushed, crowds_as_instances=True)
    assert (ids_of(images), problems) == ([1, 2], {})
    np.testing.assert_array_equal(decode_mask(images[0].references[0].segmentation), LEFT)


@pytest.mark.parametrize(
    ("value", "is_crowd"),
    [(value, False) for value in (0, "0", False, None, 0.0, "", "false")]
    + [(value, True) for value in (1, "1", True, 1.0, "True")],
)
def test_values_that_tools_write_for_iscrowd(write, value, is_crowd):
    chair = annotate(1, 7, LEFT) | {"iscrowd": value}
    assert ids_of(write([chair, DOG])) == ([3] if is_crowd else [1, 3])


def test_tiny_instances_count_without_being_referred_to(write):
    images, problems = find_problems(write, [annotate(1, 7, LEFT), annotate(2, 7, TINY)], expressions_per_instance=50)
    assert ids_of(images) == [1]
    assert problems == {"objects below 0.50% of their image (min_area_share)": ["annotation 2"]}
    assert not {"chair", "the chair"} & set(texts_of(images))
    assert ids_of(write([annotate(1, 7, LEFT), annotate(2, 7, TINY)], min_area_share=0.0)) == [1, 2]


NO_MASK = "annotations without a mask"
NO_PIXEL = "annotations whose mask has no pixel in their image"
DAMAGED = "annotations with a mask that is damaged or of another size than their image"


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        (None, NO_MASK),
        ([], NO_MASK),
        ({}, NO_MASK),
        ([[1, 2, 3, 4]], DAMAGED),
        ([[5, 5, 9, 5, None, 9]], DAMAGED),
        ("mask", DAMAGED),
        ({"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH + 5, -5]}, DAMAGED),
        ({"size": [2, 3], "counts": [1, 5]}, DAMAGED),
        ({"size": [10**6, 10**6], "counts": [0, 10**12]}, DAMAGED),
        ({"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}, NO_PIXEL),
        ([[-50, 5, -20, 5, -20, 9]], NO_PIXEL),
        ([[5, 5, 5, 5, 5, 5]], NO_PIXEL),
    ],
    ids=str,
)
def test_objects_without_a_usable_mask_are_counted_and_exclude_their_category(write, segmentation, reason):
    bad = annotate(2, 7, TINY) | {"segmentation": segmentation}
    images, problems = find_problems(write, [annotate(1, 7, LEFT), bad, DOG])
    assert ids_of(images) == [3]
    (name,) = problems.pop(reason)
    assert re.match(r"annotation 2\b", name) and (reason != DAMAGED or re.search(r"\(.+\)$", name))
    assert list(problems.values()) == [["annotation 1"]]


def test_one_summary_counts_what_was_left_out(write, caplog):
    other = {"id": 8, "file_name": "8.png", "height": HEIGHT, "width": WIDTH}
    images = [
        {"id": 7, "file_name": "7.png", "height": HEIGHT, "width": WIDTH},
        other,
        other | {"id": 9, "file_name": "9.png"},
    ]
    unusable = [annotate(number, 8, LEFT) | {"segmentation": []} for number in range(10, 23)]
    with caplog.at_level(logging.WARNING):
        write([annotate(1, 7, LEFT), annotate(2, 6, RIGHT), annotate(4, 7, RIGHT, 4, 1), *unusable], images=images)
    (record,) = caplog.records
    for line in (
        "annotations of images that are not in the file: 1 (annotation 2)",
        "images without annotations: 1 (image 9)",
        "annotations without a mask: 13 (annotation 10, annotation 11, ",
        "images in which nothing is referred to: 1 (image 8)",
        "annotations marked as crowds",
    ):
        assert line in record.getMessage()
    caplog.clear()
    write([annotate(1, 7, LEFT)])
    assert not caplog.records


def test_two_splits_report_a_problem_of_the_file_once(write):
    images = [{"id": n, "file_name": f"{n}.png", "height": HEIGHT, "width": WIDTH} for n in range(20)]
    annotations = [annotate(n, n, LEFT) for n in range(20)] + [annotate(99, 99, LEFT)]
    problems = Problems()
    for split in ("train", "val"):
        write(annotations, images=images, split=split, val_share=0.5, problems=problems)
    assert problems == {"annotations of images that are not in the file": ["annotation 99"]}


def test_captions_on_request(write, tmp_path):
    save_image(tmp_path / "7.png")
    annotations = [
        annotate(1, 7, LEFT) | {"caption": "the old chair"},
        annotate(2, 7, RIGHT, iscrowd=1) | {"caption": ["the pile of chairs", "?!", "all of them"]},
        annotate(4, 7, TINY, category_id=4) | {"caption": "a dog far away"},
        DOG,
        annotate(5, 7, LEFT) | {"caption": "..."},
        annotate(6, 7, LEFT) | {"caption": "no outline", "segmentation": []},
    ]
    images, problems = find_problems(write, annotations, captions=True)
    row = build_dataset(images, progress=False)[0]
    assert [[e["text"] for e in reference["expressions"]] for reference in row["references"]] == [
        ["the old chair"],
        ["the pile of chairs", "all of them"],
        ["a dog far away"],
    ]
    np.testing.assert_array_equal(decode_mask(row["references"][1]["mask"]), RIGHT)
    assert problems == {
        "captions without words": ["annotation 2", "annotation 5"],
        "annotations without a caption": ["annotation 3"],
        NO_MASK: ["annotation 6"],
    }


def test_captions_need_no_categories(write):
    captioned = {name: value for name, value in annotate(1, 7, LEFT).items() if name != "category_id"}
    (image,) = write([captioned | {"caption": "the left one"}], categories={}, captions=True)
    assert image.references[0].category == ""
    with pytest.raises(ValueError, match=r"annotations without a caption: 1 \(annotation 1\)"):
        write([captioned], captions=True)
    with pytest.raises(ValueError, match=r"instances.json: annotation 1: expected caption to be text .*, got 5"):
        write([captioned | {"caption": 5}], captions=True)


@pytest.mark.parametrize("orientation", [None, 3, 6])
def test_sizes_that_are_not_stated_are_those_of_the_images(write, tmp_path, orientation):
    size = (HEIGHT, WIDTH) if orientation == 6 else (WIDTH, HEIGHT)  # rotated by 90 degrees when shown
    save_image(tmp_path / "7.png", size, orientation)
    images = write([outline(1, [LEFT_OUTLINE])], image={"height": None, "width": None})
    assert images[0].size == (HEIGHT, WIDTH)
    row = build_dataset(images, progress=False)[0]
    assert row["image"].size == (WIDTH, HEIGHT)
    np.testing.assert_array_equal(decode_mask(row["references"][0]["mask"]), LEFT)


def test_sizes_that_are_not_stated_are_those_of_the_rles(write):
    (image,) = write([annotate(1, 7, LEFT)], image={"height": None, "width": None})
    assert image.size == (HEIGHT, WIDTH)
    assert len(image.references) == 1


def test_an_rle_of_another_size_does_not_affect_others(write, tmp_path):
    save_image(tmp_path / "7.png")
    wrong = annotate(1, 7, LEFT) | {"segmentation": {"size": [2, 3], "counts": [1, 5]}}
    images, problems = find_problems(write, [wrong, DOG], image={"height": None, "width": None})
    assert (images[0].size, ids_of(images)) == ((HEIGHT, WIDTH), [3])
    assert problems == {
        DAMAGED: [f"annotation 1 (The mask is of size (2, 3) (height, width), its image of {(96, 128)}.)"]
    }


@pytest.mark.parametrize("stated", [None, (WIDTH, HEIGHT)], ids=["rle", "record"])
def test_annotations_of_the_stored_image_stay_on_it_with_a_warning(write, tmp_path, caplog, stated):
    save_image(tmp_path / "7.jpg", (WIDTH, HEIGHT), orientation=6)  # shown upright: 128 high, 96 wide
    width, height = stated or (None, None)
    images = write([annotate(1, 7, LEFT)], image={"file_name": "7.jpg", "height": height, "width": width})
    with caplog.at_level(logging.WARNING):
        row = build_dataset(images, progress=False)[0]
    np.testing.assert_array_equal(decode_mask(row["references"][0]["mask"]), LEFT)
    assert row["image"].size == (WIDTH, HEIGHT)
    assert re.search(r"images with an EXIF rotation that the annotations ignore.*: 1 \(7\.jpg\)", caplog.text)


@pytest.mark.parametrize("side", [10**6, 2**32, WIDTH])
def test_a_stated_size_is_compared_with_the_file_before_a_mask_is_decoded(write, tmp_path, side):
    """Decoding masks of 10**12 pixels ends the process."""
    save_image(tmp_path / "7.png")
    save_image(tmp_path / "8.png")
    images = [
        {"id": 7, "file_name": "7.png", "height": side, "width": side},
        {"id": 8, "file_name": "8.png", "height": HEIGHT, "width": WIDTH},
    ]
    images = write([outline(1, [LEFT_OUTLINE]), annotate(2, 8, LEFT)], images=images)
    with pytest.raises(
        BadImage, match=rf"7\.png: decodes to \(96, 128\) .*, its annotations are for \({side}, {side}\)"
    ):
        build_dataset(images, progress=False)
    assert build_dataset(images, skip_bad=True, progress=False)["image_id"] == [8]


def test_a_huge_size_without_a_file_is_not_decoded(write):
    images = write([outline(1, [LEFT_OUTLINE])], image={"height": 10**6, "width": 10**6})
    with pytest.raises(BadImage, match=r"7\.png: missing"):
        build_dataset(images, progress=False)


@pytest.mark.parametrize(
    "names",
    [["frame.png", "frame.png"], [".\\frame.png", "frame.png"]],
    ids=str,
)
def test_two_images_of_one_file_are_refused(write, tmp_path, names):
    """Exports of several videos have such names. The masks of one video would be drawn on a frame of another."""
    save_image(tmp_path / "frame.png")
    images = [{"id": n, "file_name": name, "height": HEIGHT, "width": WIDTH} for n, name in enumerate(names)]
    with pytest.raises(ValueError, match=r"found .*frame\.png for image 0 \(.*\) and for image 1 \(.*frame\.png\)"):
        write([annotate(1, 1, LEFT)], images=images)


def test_bad_images_are_named_when_the_dataset_is_built(write, tmp_path):
    other = {"id": 8, "file_name": "8.png", "height": HEIGHT, "width": WIDTH}
    images = write([outline(1, [LEFT_OUTLINE]), annotate(2, 8, LEFT)], images=[{"id": 7, "file_name": "7.png"}, other])
    save_image(tmp_path / "8.png")
    with pytest.raises(BadImage, match=r"7\.png: missing"):
        build_dataset(images, progress=False)
    assert build_dataset(images, skip_bad=True, progress=False)["image_id"] == [8]


def test_categories_are_said_in_lower_case_and_equal_ones_together(write):
    names = {1: "Traffic_Light", 2: "bow_(weapon)", 3: "Bow (ribbon)"}
    (image,) = write([annotate(1, 7, LEFT, category_id=1)], categories=names)
    assert image.references[0].category == "Traffic_Light"
    assert all("traffic light" in text for text in texts_of([image]))
    (image,) = write([annotate(1, 7, LEFT, category_id=2), annotate(2, 7, RIGHT, category_id=3)], categories=names)
    assert all(re.search(r"left|right", text) for text in texts_of([image]))


CHAIR = annotate(1, 7, LEFT)


@pytest.mark.parametrize(
    ("annotations", "options", "message"),
    [
        ([CHAIR, CHAIR], {}, "ids of annotations must be unique, got 1 twice"),
        ([CHAIR | {"id": [1]}], {}, r"record 0 of the annotations: expected id to be a whole number .*, got \[1\]"),
        ([CHAIR | {"id": -1}], {}, "ids of annotations must be from 0 to 92233720368547757, got -1"),
        ([CHAIR | {"id": 10**17}], {}, f"ids of annotations must be from 0 to 92233720368547757, got {10**17}"),
        ([CHAIR | {"category_id": 99}], {}, "annotation 1 is of category 99"),
        ([CHAIR | {"category_id": [1]}], {}, r"annotations, id 1: expected category_id to be a whole .*, got \[1\]"),
        ([CHAIR | {"image_id": "7"}], {}, "annotations, id 1: expected image_id to be a whole .*, got '7'"),
        ([CHAIR | {"iscrowd": "maybe"}], {}, "annotation 1: expected iscrowd to be 0 or 1, got 'maybe'"),
        ([CHAIR], {"categories": {1: "??"}}, r"expected a category's name to have words, got '\?\?' for 1"),
        ([CHAIR], {"categories": {1: None}}, "categories, id 1: expected name to be text, got None"),
        ([CHAIR], {"image": {"id": "a"}}, "of the images: expected id to be a whole number of 64 bits, got 'a'"),
        ([CHAIR], {"image": {"file_name": None}}, r"image 7: expected the fields \['file_name'\]"),
        ([CHAIR], {"image": {"file_name": 5}}, "image 7: expected file_name to be text, got 5"),
        (
            [CHAIR],
            {"image": {"not_exhaustive_category_ids": "all"}},
            "image 7: expected not_exhaustive_category_ids to be .*, got 'all'",
        ),
        ([annotate(1, 7, TINY)], {}, r"can be referred to, found none:\nobjects below 0.50% .*: 1 \(annotation 1\)"),
        ([], {}, r"found none:\nimages without annotations: 1 \(image 7\)"),
    ],
)
def test_unusable_files_are_errors_that_name_the_place(write, annotations, options, message):
    with pytest.raises(ValueError, match=message):
        write(annotations, **options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "not in COCO's format"),
        ('{"images": []}', "not in COCO's"),
        (None, "a file"),
    ],
)
def test_files_in_other_formats_are_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "instances.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_coco(tmp_path / "instances.json", tmp_path)
