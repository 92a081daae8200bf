"""Masks, run-length encodings, polygons and letterboxes: properties that hold for all of them."""

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from hypothesis.extra import numpy as np_st
from properties import ANY_TEXT, JSON_VALUES, NUMBERS, attempt, cases, damaged
from pycocotools import mask as coco_mask

from modeling_restr.data import decode_mask, encode_mask
from modeling_restr.data.coco_export import mask_to_polygons
from modeling_restr.data.segmentation import segmentation_to_rle
from modeling_restr.image_processing_restr import get_letterbox
from modeling_restr.metrics import ReferringIoU


SIZES = st.tuples(st.integers(1, 40), st.integers(1, 40))
MASKS = SIZES.flatmap(lambda size: np_st.arrays(bool, size, fill=st.booleans()))


@cases(200)
@given(MASKS, st.sampled_from([bool, np.uint8, np.float32]), st.booleans())
def test_masks_survive_encoding(mask, kind, transpose):
    given_mask = mask.astype(kind)
    rle = encode_mask(np.ascontiguousarray(given_mask.T).T if transpose else given_mask)
    np.testing.assert_array_equal(decode_mask(rle), mask)
    np.testing.assert_array_equal(coco_mask.decode(rle), mask)


@cases(100)
@given(MASKS)
def test_masks_survive_as_polygons(mask):
    polygons = mask_to_polygons(mask)
    if mask.any():
        np.testing.assert_array_equal(decode_mask(segmentation_to_rle(polygons, mask.shape)), mask)
    else:
        assert polygons == []


def _uncompressed(mask):
    changes = np.flatnonzero(np.diff(mask.flatten(order="F"), prepend=False))
    return np.diff([0, *changes, mask.size]).tolist()


@st.composite
def _rles(draw):
    mask = draw(MASKS)
    rle = encode_mask(mask) if draw(st.booleans()) else {"size": list(mask.shape), "counts": _uncompressed(mask)}
    if isinstance(rle["counts"], str) and draw(st.booleans()):
        position = draw(st.integers(0, len(rle["counts"])))
        rle["counts"] = rle["counts"][:position] + draw(ANY_TEXT) + rle["counts"][position + 1 :]
    return draw(damaged(rle))


@cases(300)
@given(_rles())
def test_rles_are_decoded_as_pycocotools_does_or_refused(rle):
    mask = attempt(decode_mask, rle)
    if not isinstance(mask, Exception):
        size = [int(side) for side in rle["size"]]
        assert mask.dtype == bool and list(mask.shape) == size
        if isinstance(rle["counts"], list):
            rle = coco_mask.frPyObjects({"size": size, "counts": [int(count) for count in rle["counts"]]}, *size)
        np.testing.assert_array_equal(coco_mask.decode({**rle, "size": size}), mask)


_COORDINATES = st.one_of(st.integers(-5, 30), st.floats(-10, 40, width=32), NUMBERS)
_POLYGONS = st.one_of(
    st.lists(_COORDINATES, max_size=12),
    st.lists(st.lists(_COORDINATES, min_size=2, max_size=2), max_size=6),
)
_SEGMENTATIONS = st.one_of(_POLYGONS, st.lists(st.one_of(_POLYGONS, _rles()), max_size=3), _rles(), JSON_VALUES)


@cases(400)
@given(_SEGMENTATIONS, SIZES)
def test_segmentations_have_the_size_of_their_image_or_are_refused(segmentation, size):
    rle = attempt(segmentation_to_rle, segmentation, size)
    if not isinstance(rle, Exception):
        assert tuple(rle["size"]) == size
        assert decode_mask(rle).shape == size


@cases(150)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 30)), min_size=3, max_size=8))
def test_polygons_inside_the_image_are_filled_as_pycocotools_does(points):
    polygon = [number for x, y in points for number in (x, y)]
    expected = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects([polygon], 30, 20)))
    np.testing.assert_array_equal(decode_mask(segmentation_to_rle([polygon], (30, 20))), expected)
    np.testing.assert_array_equal(decode_mask(segmentation_to_rle(list(map(list, points)), (30, 20))), expected)


@cases(200)
@given(MASKS.flatmap(lambda mask: st.tuples(st.just(mask), np_st.arrays(bool, mask.shape))), st.booleans())
def test_counts_of_two_masks_add_up(masks, as_tensors):
    predicted, target = masks
    given_masks = map(torch.from_numpy, masks) if as_tensors else masks
    counts = ReferringIoU.counts(*given_masks, areas=True)
    assert counts["intersection"] == np.count_nonzero(predicted * target)
    assert counts["predicted"] + counts["target"] == counts["intersection"] + counts["union"]
    assert counts["target"] == coco_mask.area(encode_mask(target))


@cases(300)
@given(
    st.tuples(st.integers(1, 10_000), st.integers(1, 10_000)), st.tuples(st.integers(1, 2000), st.integers(1, 2000))
)
def test_letterboxes_are_as_large_as_fits_and_centred(image_size, canvas_size):
    top, left, *size = get_letterbox(image_size, canvas_size)
    for start, length, canvas in zip((top, left), size, canvas_size):
        assert 1 <= length <= canvas
        assert 0 <= (canvas - length) - 2 * start <= 1  # the last margin is at most one pixel larger
    assert any(length == canvas for length, canvas in zip(size, canvas_size))
    scale = min(canvas / length for canvas, length in zip(canvas_size, image_size))
    assert all(
        length == 1 or abs(length - scale * image_length) <= 0.5 for length, image_length in zip(size, image_size)
    )


@pytest.mark.parametrize("size", [(5, 4001), (4001, 5)])
def test_masks_with_thousands_of_holes_become_polygons(size):
    mask = np.ones(size, dtype=bool)
    mask[1:-1:2, 1:-1:2] = False
    np.testing.assert_array_equal(decode_mask(segmentation_to_rle(mask_to_polygons(mask), size)), mask)
