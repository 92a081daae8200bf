"""Augmentation: pixels of images and masks against NumPy, sentences that stay true, and randomness from one generator."""

import colorsys
import pickle

import numpy as np
import pytest
from PIL import ExifTags, Image

from modeling_restr.training.augmentation import Augmentation


HEIGHT, WIDTH = 60, 80
TEXTS = ["man in red shirt", "dog"]


def make_image(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))


def make_masks():
    masks = np.zeros((2, HEIGHT, WIDTH), dtype=bool)
    masks[0, 20:30, 10:25] = True
    masks[1, 25:45, 50:52] = True
    return list(masks)


def augment(image=None, masks=None, texts=TEXTS, seed=0, **options):
    image, masks = image or make_image(), make_masks() if masks is None else masks
    return Augmentation(**options)(image, masks, texts, np.random.default_rng(seed))


def find(image, part):
    """(top, left) of the only place of `part` in `image`, both (height, width, 3)."""
    windows = np.lib.stride_tricks.sliding_window_view(image, part.shape)[:, :, 0]
    (place,) = np.argwhere((windows == part).all(axis=(2, 3, 4)))
    return tuple(place)


def test_off_by_default():
    image, masks = make_image(), make_masks()
    for seed in range(20):
        same, same_masks, texts = augment(image, masks, seed=seed)
        assert same is image and texts == TEXTS
        assert all(mask is other for mask, other in zip(masks, same_masks, strict=True))


def test_mirror_flips_image_masks_and_words():
    image, masks = make_image(), make_masks()
    texts = ["man on the left", "right dog"]
    turned, turned_masks, turned_texts = augment(image, masks, texts, mirror=1)
    assert np.array_equal(np.asarray(turned), np.asarray(image)[:, ::-1])
    assert np.array_equal(turned_masks, np.flip(masks, axis=2))
    assert turned_masks[0].nonzero()[1].min() == WIDTH - 25
    assert all(mask.flags["C_CONTIGUOUS"] for mask in turned_masks)
    assert turned_texts == ["man on the right", "left dog"]


def test_texts_that_share_a_mask_share_the_changed_one():
    first, second = make_masks()
    _, masks, _ = augment(None, [first, second, first], ["dog"] * 3, mirror=1, crop=1, scale=1)
    assert masks[0] is masks[2] and masks[0].shape != first.shape and masks[0] is not masks[1]


def test_one_ambiguous_sentence_prevents_mirroring():
    image, masks = make_image(), make_masks()
    same, same_masks, texts = augment(image, masks, ["left dog", "man right in front"], mirror=1)
    assert same is image and texts == ["left dog", "man right in front"]
    assert np.array_equal(same_masks, masks)


def test_crop_keeps_every_mask_whole_and_pixels_aligned():
    image, masks = make_image(), make_masks()
    sizes, places = set(), set()
    for seed in range(40):
        cropped, cropped_masks, texts = augment(image, masks, seed=seed, crop=1, crop_range=(0.3, 0.9))
        top, left = find(np.asarray(image), np.asarray(cropped))
        bottom, right = top + cropped.height, left + cropped.width
        assert np.array_equal(cropped_masks, np.array(masks)[:, top:bottom, left:right])
        assert [mask.sum() for mask in cropped_masks] == [150, 40]
        # The targets span columns 10 to 51 and rows 20 to 44. A margin of a tenth of that is kept.
        assert left <= 6 and right >= 56 and top <= 18 and bottom >= 47
        assert texts == TEXTS
        sizes.add(cropped.size)
        places.add((top, left))
    assert len(sizes) > 20 and len(places) > 20
    widths = [width for width, _ in sizes]
    assert min(widths) == 50 and max(widths) <= 0.9 * WIDTH  # at least the targets' 42 columns and the margins


def test_no_crop_where_a_sentence_needs_the_whole_image():
    image = make_image()
    for text in ("second from the left", "biggest dog", "dog next to the man", "middle one"):
        same, _, _ = augment(image, texts=["man in red shirt", text], crop=1)
        assert same is image


def test_crop_where_a_sentence_refers_to_nothing():
    nothing = [np.zeros((HEIGHT, WIDTH), dtype=bool)]
    cropped, masks, _ = augment(None, nothing, ["purple cow"], crop=1, crop_range=(0.5, 0.5))
    assert cropped.size == (WIDTH // 2, HEIGHT // 2)
    assert masks[0].shape == (HEIGHT // 2, WIDTH // 2) and not masks[0].any()
    cropped, masks, _ = augment(None, [], [], crop=1, crop_range=(0.5, 0.5))
    assert cropped.size == (WIDTH // 2, HEIGHT // 2) and masks == []


def test_crop_keeps_masks_at_the_edges():
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[0, 0] = mask[-1, -1] = True
    cropped, masks, _ = augment(None, [mask], ["dog"], crop=1)
    assert cropped.size == (WIDTH, HEIGHT) and np.array_equal(masks[0], mask)


def test_scale_centres_the_untouched_image_on_black():
    image, masks = make_image(), make_masks()
    texts = ["second from the left", "leftmost dog"]  # scaling keeps words of place true
    sizes = set()
    for seed in range(20):
        scaled, scaled_masks, same_texts = augment(image, masks, texts, seed, scale=1)
        pixels = np.asarray(scaled)
        top, left = (scaled.height - HEIGHT) // 2, (scaled.width - WIDTH) // 2
        inside = (slice(top, top + HEIGHT), slice(left, left + WIDTH))
        assert np.array_equal(pixels[inside], np.asarray(image))
        assert pixels.sum(dtype=int) == np.asarray(image).sum(dtype=int)
        for mask, scaled_mask in zip(masks, scaled_masks, strict=True):
            assert np.array_equal(scaled_mask[inside], mask) and scaled_mask.sum() == mask.sum()
            assert scaled_mask.shape == (scaled.height, scaled.width)
        assert scaled.width / WIDTH == pytest.approx(scaled.height / HEIGHT, rel=0.02)
        assert WIDTH <= scaled.width <= 2 * WIDTH and same_texts == texts
        sizes.add(scaled.size)
    assert len(sizes) > 10


@pytest.mark.parametrize("size, range_, expected", [((7, 3), (0.5, 0.5), (14, 6)), ((1, 1), (1.0, 1.0), (1, 1))])
def test_scale_of_given_factors(size, range_, expected):
    image = Image.new("RGB", size, "red")
    mask = np.ones((size[1], size[0]), dtype=bool)
    scaled, masks, _ = augment(image, [mask], ["dog"], scale=1, scale_range=range_)
    assert scaled.size == expected and masks[0].shape == expected[::-1]


def change_color(pixels, seed=0, texts=("dog",), **strengths):
    strengths = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0} | strengths
    masks = [np.ones(pixels.shape[:2], dtype=bool)] * len(texts)
    image, same_masks, same_texts = augment(Image.fromarray(pixels), masks, texts, seed, color=1, **strengths)
    assert np.array_equal(same_masks, masks) and same_texts == list(texts)
    return np.asarray(image).astype(float)


def test_brightness_and_contrast_are_linear():
    pixels = np.asarray(make_image())
    grey = np.round((pixels @ [0.299, 0.587, 0.114]).mean())
    for seed in range(10):
        for strength, origin in (("brightness", 0), ("contrast", grey)):
            changed = change_color(pixels, seed, **{strength: 0.3})
            inner = (changed > 0) & (changed < 255)
            shift, start = changed[inner] - origin, pixels[inner] - float(origin)
            factor = (shift @ start) / (start @ start)
            assert 0.7 <= factor <= 1.3 and factor != pytest.approx(1, abs=1e-3)
            assert np.abs(shift - factor * start).max() < 1.6  # rounding, also of the mean


def test_saturation_keeps_grey_and_scales_colors():
    pixels = np.full((4, 4, 3), (180, 100, 60), dtype=np.uint8)
    pixels[2:] = 128
    spreads = [np.ptp(change_color(pixels, seed, saturation=0.4)[0, 0]) / 120 for seed in range(10)]
    assert min(spreads) >= 0.58 and max(spreads) <= 1.42 and np.ptp(spreads) > 0.2
    assert (change_color(pixels, 0, saturation=0.4)[2:] == 128).all()


def test_hue_rotates_by_its_share_of_the_wheel():
    pixels = np.full((2, 2, 3), (180, 100, 60), dtype=np.uint8)
    before = colorsys.rgb_to_hsv(180, 100, 60)
    turns = []
    for seed in range(20):
        hue, saturation, value = colorsys.rgb_to_hsv(*change_color(pixels, seed, hue=0.1)[0, 0])
        turns.append((hue - before[0] + 0.5) % 1 - 0.5)
        assert (saturation, value) == (pytest.approx(before[1], abs=0.02), pytest.approx(before[2], abs=2))
    assert max(np.abs(turns)) < 0.11 and min(turns) < -0.03 and max(turns) > 0.03


def test_a_named_color_keeps_hue_and_saturation():
    pixels = np.asarray(make_image())
    for texts in (["dog", "man in a Reddish shirt"], ["grey cat"], ["multicolored kite"]):
        assert np.array_equal(change_color(pixels, 1, texts, saturation=0.9, hue=0.5), pixels)
        assert not np.array_equal(change_color(pixels, 1, texts, brightness=0.5), pixels)
    assert not np.array_equal(change_color(pixels, 1, ["dog"], saturation=0.9), pixels)


def test_everything_at_once_stays_aligned():
    """Only the masks are red, before and after."""
    masks = make_masks()
    pixels = np.full((HEIGHT, WIDTH, 3), 200, dtype=np.uint8)
    pixels[masks[0] | masks[1]] = (200, 0, 0)
    everything = {"scale": 1, "crop": 1, "color": 1, "mirror": 1}
    for seed in range(20):
        image, changed, texts = augment(Image.fromarray(pixels), masks, ["man", "dog"], seed, **everything)
        channels = np.asarray(image).astype(int)
        assert np.array_equal(changed[0] | changed[1], channels[..., 0] - channels[..., 1] > 60)
        assert [mask.sum() for mask in changed] == [150, 40] and texts == ["man", "dog"]


def test_probabilities_are_shares_of_images():
    image, masks = make_image(), make_masks()
    rng = np.random.default_rng(0)
    mirrored = [Augmentation(mirror=0.3)(image, masks, ["left man", "dog"], rng)[2][0] for _ in range(1000)]
    assert mirrored.count("right man") == pytest.approx(300, abs=50)
    assert mirrored.count("left man") == 1000 - mirrored.count("right man")


def test_equal_generators_give_equal_results():
    options = {"scale": 0.5, "crop": 0.5, "color": 0.5, "mirror": 0.5}
    augmentation = Augmentation(**options)
    assert pickle.loads(pickle.dumps(augmentation)) == augmentation  # workers receive a copy

    def fingerprint(seed):
        np.random.seed(np.random.default_rng().integers(2**31))  # has no influence
        image, masks, texts = augment(seed=seed, **options)
        return image.tobytes(), image.size, [mask.tobytes() for mask in masks], texts

    prints = [fingerprint(seed) for seed in range(20)]
    assert [fingerprint(seed) for seed in reversed(range(20))] == prints[::-1]
    assert len({repr(each) for each in prints}) > 12


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_images_are_mirrored_as_a_viewer_shows_them(tmp_path, orientation):
    image = make_image()
    exif = image.getexif()
    exif[ExifTags.Base.Orientation] = orientation
    image.save(tmp_path / "image.png", exif=exif)
    shown = np.rot90(np.asarray(image), {1: 0, 3: 2, 6: -1}[orientation])
    mask = shown[..., 0] > 128
    with Image.open(tmp_path / "image.png") as stored:
        turned, masks, _ = augment(stored, [mask], ["dog"], mirror=1)
    assert np.array_equal(np.asarray(turned), shown[:, ::-1]) and np.array_equal(masks[0], mask[:, ::-1])
    assert turned.getexif().get(ExifTags.Base.Orientation, 1) == 1  # else the processor would rotate it again


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "LA", "CMYK", "I;16"])
def test_any_mode_becomes_rgb(mode):
    image = Image.new("L", (WIDTH, HEIGHT), 255)
    image = Image.fromarray(np.full((HEIGHT, WIDTH), 65535, np.uint16)) if mode == "I;16" else image.convert(mode)
    changed, masks, _ = augment(image, scale=1, crop=1, color=1, mirror=1, brightness=0, scale_range=(0.5, 0.5))
    assert changed.mode == "RGB" and masks[0].shape == (changed.height, changed.width)
    pixels = np.asarray(changed)
    assert (pixels[masks[0]] > 250).all() and (pixels[0] == 0).all()


def test_bad_masks_are_refused():
    with pytest.raises(ValueError, match="one mask per text, got 2 masks and 1 texts"):
        augment(texts=["dog"], mirror=1)
    with pytest.raises(ValueError, match=r"\(60, 80\), got bool of \(80, 60\)"):
        augment(None, [make_masks()[0].T], ["dog"], mirror=1)
    with pytest.raises(ValueError, match="got uint8"):
        augment(None, [make_masks()[0].astype(np.uint8)], ["dog"], mirror=1)


@pytest.mark.parametrize(
    "arguments",
    [{"mirror": 1.5}, {"crop": -0.1}, {"color": float("nan")}, {"hue": 2}, {"scale_range": (0, 1)},
     {"scale_range": (0.9, 0.5)}, {"crop_range": (0.5, 1.2)}],
)  # fmt: skip
def test_settings_out_of_bounds_are_refused(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=f"Expected {name} "):
        Augmentation(**arguments)
