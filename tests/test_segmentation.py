"""Segmentations of every form compared with pycocotools and NumPy. Invalid ones reach no C code."""

import numpy as np
import pytest
from coco_annotations import run_lengths
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from modeling_restr.data.segmentation import (
    MAX_OUTLINE,
    SeveralObjects,
    count_stray_parts,
    decode_mask,
    encode_mask,
    object_to_rle,
    segmentation_to_rle,
)


HEIGHT, WIDTH = SIZE = 24, 32
BOX = [3.0, 5.0, 13.0, 5.0, 13.0, 17.0, 3.0, 17.0]
TRIANGLE = [18.5, 4.0, 30.0, 20.5, 16.0, 21.0]


def random_mask(seed=0, size=SIZE):
    return np.random.default_rng(seed).random(size) < 0.4


def coco_annotation_mask(segmentation, size=(HEIGHT, WIDTH)):
    """The mask of an annotation as pycocotools' own API makes it."""
    coco = COCO()
    coco.imgs = {1: {"id": 1, "height": size[0], "width": size[1]}}
    return coco.annToMask({"image_id": 1, "segmentation": segmentation}).astype(bool)


@pytest.mark.parametrize("seed", range(3))
def test_masks_come_back(seed):
    mask = random_mask(seed)
    rle = encode_mask(mask)
    assert rle["size"] == [HEIGHT, WIDTH]
    assert isinstance(rle["counts"], str)
    assert np.array_equal(decode_mask(rle), mask)
    assert np.array_equal(coco_mask.decode(rle), mask)
    assert np.array_equal(decode_mask(encode_mask(mask * 255)), mask)
    with pytest.raises(ValueError, match=r"shape \(height, width\), got \(24, 32, 1\)"):
        encode_mask(mask[..., None])


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (2, 2), (70, 41), (0, 5), (5, 0)])
@pytest.mark.parametrize("share", [0, 0.02, 0.5, 1])
def test_masks_are_encoded_as_pycocotools_does(size, share):
    generator = np.random.default_rng(0)
    mask = generator.random(size) < share
    expected = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"].decode()
    numbers = mask * generator.integers(1, 5, size=size)  # non-zero is inside
    for form in (mask, mask * np.uint8(255), numbers, np.asfortranarray(mask), np.repeat(mask, 2, axis=1)[:, ::2]):
        assert encode_mask(form) == {"size": list(size), "counts": expected}


@pytest.mark.parametrize("mask", [random_mask(1), np.ones((HEIGHT, WIDTH), bool), np.zeros((HEIGHT, WIDTH), bool)])
def test_every_form_of_a_mask_is_the_same(mask):
    expected = encode_mask(mask)
    compressed = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    assert isinstance(compressed["counts"], bytes)
    halves = [mask & (np.arange(WIDTH) < 16), mask & (np.arange(WIDTH) >= 12)]
    forms = [mask, lambda: mask, run_lengths(mask), compressed, expected, [expected]]
    forms += [[encode_mask(half) for half in halves], [run_lengths(halves[0]), encode_mask(halves[1])]]
    for form in forms:
        assert segmentation_to_rle(form, (HEIGHT, WIDTH)) == expected


def test_polygons_are_united_as_in_coco():
    shifted = [number + 4 for number in BOX]
    for polygons in ([BOX], [TRIANGLE], [BOX, TRIANGLE], [BOX, shifted]):
        rle = segmentation_to_rle(polygons, (HEIGHT, WIDTH))
        assert np.array_equal(decode_mask(rle), coco_annotation_mask(polygons))
    mask = decode_mask(segmentation_to_rle([BOX, shifted], (HEIGHT, WIDTH)))
    expected = np.zeros((HEIGHT, WIDTH), bool)
    expected[5:17, 3:13] = expected[9:21, 7:17] = True
    assert np.array_equal(mask, expected)  # what both parts cover is inside


def test_polygons_and_rles_are_united():
    mask = random_mask()
    rle = segmentation_to_rle([BOX, run_lengths(mask), TRIANGLE], (HEIGHT, WIDTH))
    assert np.array_equal(decode_mask(rle), mask | coco_annotation_mask([BOX, TRIANGLE]))


def test_no_parts_make_an_empty_mask():
    assert segmentation_to_rle([], (HEIGHT, WIDTH)) == encode_mask(np.zeros((HEIGHT, WIDTH)))


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        (random_mask(size=(WIDTH, HEIGHT)), r"size \(32, 24\) .* its image of \(24, 32\)"),
        (run_lengths(random_mask(size=(WIDTH, HEIGHT))), r"size \(32, 24\) .* its image of \(24, 32\)"),
        ([BOX, encode_mask(random_mask(size=(WIDTH, HEIGHT)))], r"size \(32, 24\) .* its image of \(24, 32\)"),
        ([[1.0, 2.0, 3.0, 4.0]], "at least 3 points"),
        ([BOX[:7]], "at least 3 points"),
        ([[1, 2], [3, 4]], "at least 3 points"),
        (BOX[:4], "at least 3 points"),
        (BOX[:7], "at least 3 points, got 7 numbers"),
        ([[]], r"at least 3 points, got \[\]"),
        ([[*BOX[:7], "17"]], "at least 3 points, got '17'"),
        ([[*BOX[:7], True]], "at least 3 points, got True"),
        ([[*BOX[:7], None]], "at least 3 points, got None"),
        ([BOX, 5], "at least 3 points, got 5"),
        (None, "must be polygons, an RLE or a mask, got None"),
        (5, "must be polygons, an RLE or a mask, got 5"),
        ("mask", "must be polygons, an RLE or a mask, got 'mask'"),
        ([[*BOX[:7], float("nan")]], "stay within one size of its image .* got nan"),
        ([[*BOX[:7], float("inf")]], "stay within one size of its image .* got inf"),
        ([[1e9, *BOX[1:]]], r"stay within one size of its image of \(24, 32\) \(height, width\), got 1000000000"),
        ([BOX, [10**400, *BOX[1:]]], "stay within one size of its image"),
        ([[-33, *BOX[1:]]], "got -33"),
        ([[*BOX[:7], 49]], "got 49"),
        ([[BOX]], "at least 3 points"),
        ({"counts": [768]}, r"must have size and counts, got \['counts'\]"),
        ({"size": [HEIGHT, WIDTH], "counts": [30, 40]}, r"size \[24, 32\] cover 70 pixels"),
        ({"size": [HEIGHT, WIDTH], "counts": [700, 100]}, "cover 800 pixels"),
        ([BOX, {"size": [HEIGHT, WIDTH], "counts": ""}], "cover 0 pixels"),
        ({"size": [HEIGHT, WIDTH], "counts": "a"}, "damaged: 'a'"),
        ({"size": [HEIGHT, WIDTH], "counts": "~~"}, "damaged"),
        ({"size": [HEIGHT, WIDTH], "counts": "O"}, "damaged"),  # a run of -1
        ({"size": [HEIGHT, WIDTH], "counts": 3000 * "o"}, "damaged"),  # a run that does not end
        ({"size": [HEIGHT, WIDTH], "counts": "\ud800"}, r"damaged: '\\ud800'"),
        ({"size": [HEIGHT, WIDTH], "counts": [100, -5, 673]}, "whole numbers from 0 on"),
        ({"size": [HEIGHT, WIDTH], "counts": [2**32, 768 - 2**32]}, "whole numbers from 0 on"),
        ({"size": [HEIGHT, WIDTH], "counts": [2**32, 768]}, "cover 4294968064 pixels"),
        ({"size": [HEIGHT, WIDTH], "counts": [1.5, 766.5]}, "whole numbers from 0 on"),
        ({"size": [HEIGHT, WIDTH], "counts": [True, 767]}, "whole numbers from 0 on"),
        ({"size": [HEIGHT, WIDTH], "counts": [float("nan"), 768]}, "whole numbers from 0 on"),
        ({"size": [HEIGHT, WIDTH], "counts": [[1], 767]}, "whole numbers from 0 on"),
        ({"size": [HEIGHT, WIDTH], "counts": None}, "whole numbers from 0 on, got None"),
        ({"size": [HEIGHT, WIDTH], "counts": 768}, "whole numbers from 0 on, got 768"),
        ({"size": [HEIGHT], "counts": "P"}, r"must be \[height, width\], got \[24\]"),
        ({"size": None, "counts": [768]}, "must be .height, width., got None"),
        ({"size": [HEIGHT, -WIDTH], "counts": [768]}, "must be .height, width."),
        ({"size": [10**6, 10**6], "counts": [10**12]}, r"size \(1000000, 1000000\) .* its image of \(24, 32\)"),
    ],
)
def test_bad_segmentations_are_explained(segmentation, message):
    with pytest.raises(ValueError, match=message):
        segmentation_to_rle(segmentation, (HEIGHT, WIDTH))


def test_compressed_counts_that_are_cut_short_are_noticed():
    counts = encode_mask(random_mask())["counts"]
    for length in range(len(counts)):
        with pytest.raises(ValueError, match=r"pixels|damaged"):
            segmentation_to_rle({"size": [HEIGHT, WIDTH], "counts": counts[:length]}, (HEIGHT, WIDTH))


def zigzag(num_points):
    """Points on the left and on the right edge of the image by turns: an outline of `WIDTH` pixels for each."""
    return [number for index in range(num_points) for number in (WIDTH * (index % 2), index % HEIGHT)]


def test_endless_outlines_are_refused():
    limit = MAX_OUTLINE * (HEIGHT + WIDTH)
    assert segmentation_to_rle([zigzag(100)], SIZE)["size"] == list(SIZE)
    with pytest.raises(ValueError, match=f"of at most {limit} pixels, got {WIDTH * 300}"):
        segmentation_to_rle([zigzag(300)], SIZE)


@pytest.mark.parametrize("offset", [(-WIDTH, -HEIGHT), (WIDTH, HEIGHT), (7, -15)])
def test_outlines_up_to_one_size_outside_are_cut_off(offset):
    polygon = [x + offset[index % 2] for index, x in enumerate([0, 0, WIDTH, 0, WIDTH, HEIGHT, 0, HEIGHT])]
    mask = np.zeros(SIZE, bool)
    top, left = max(offset[1], 0), max(offset[0], 0)
    mask[top : max(offset[1] + HEIGHT, 0), left : max(offset[0] + WIDTH, 0)] = True
    assert np.array_equal(decode_mask(segmentation_to_rle([polygon], SIZE)), mask)


def test_polygons_of_annotation_tools_are_read_as_coco_s():
    expected = segmentation_to_rle([BOX], SIZE)
    points = [[BOX[index], BOX[index + 1]] for index in range(0, len(BOX), 2)]
    forms = [BOX, points, [points], tuple(BOX), np.array(points).tolist(), [np.array(BOX)], [BOX, [1.0, 2.0]]]
    for form in (*forms, [[1, 2, 3, 4], BOX, []], [[5.0, 6.0], [7.0, 8.0], BOX]):
        assert segmentation_to_rle(form, SIZE) == expected
    floats = {"size": [24.0, 32.0], "counts": [30.0, 40.0, 698.0]}
    assert segmentation_to_rle(floats, SIZE) == segmentation_to_rle({"size": SIZE, "counts": [30, 40, 698]}, SIZE)


def test_stray_parts_are_counted():
    points = [[1, 2], [3, 4], [5, 9]]
    for segmentation, number in (([BOX], 0), (BOX, 0), (points, 0), ([BOX, [1, 2], [1, 2, 3, 4]], 2), ([], 0)):
        assert count_stray_parts(segmentation) == number
    assert count_stray_parts(SeveralObjects(([BOX, [1, 2]], [TRIANGLE, []]))) == 2
    assert count_stray_parts(random_mask()) == count_stray_parts(random_mask) == 0
    assert count_stray_parts(encode_mask(random_mask())) == 0


def test_objects_have_pixels():
    box, triangle = (segmentation_to_rle([polygon], SIZE) for polygon in (BOX, TRIANGLE))
    assert object_to_rle([BOX], SIZE) == box
    union = object_to_rle(SeveralObjects(([BOX], [triangle])), SIZE)
    assert np.array_equal(decode_mask(union), decode_mask(box) | decode_mask(triangle))
    outside = [[-20, -9, -3, -9, -3, -1]]
    line, point = [[3, 3, 9, 3, 9, 3]], [[4, 4, 4, 4, 4, 4]]
    nothing = [np.zeros(SIZE), {"size": SIZE, "counts": [768]}, outside, line, point, lambda: np.zeros(SIZE)]
    for segmentation in (*nothing, SeveralObjects(([BOX], outside))):
        with pytest.raises(ValueError, match=r"The object covers no pixel of its image\."):
            object_to_rle(segmentation, SIZE)
    with pytest.raises(ValueError, match="at least 3 points"):
        object_to_rle(SeveralObjects(([BOX], [[]])), SIZE)  # the outline of the second was lost


def test_masks_larger_than_any_image_are_not_decoded(monkeypatch):
    with pytest.raises(ValueError, match=r"at most \d+ pixels, got one of size \(1000000, 1000000\)"):
        decode_mask({"size": [10**6, 10**6], "counts": [10**12]})
    with pytest.raises(ValueError, match="cover 767 pixels"):
        decode_mask({"size": SIZE, "counts": [700, 67]})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)  # Pillow refuses more than twice as many
    assert decode_mask({"size": [5, 8], "counts": [0, 40]}).all()
    with pytest.raises(ValueError, match=r"at most 40 pixels, got one of size \(41, 1\)"):
        decode_mask({"size": [41, 1], "counts": [41]})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert not decode_mask({"size": SIZE, "counts": [768]}).any()
