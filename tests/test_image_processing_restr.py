import http.server
import json
import math
import threading
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pictures import make_exif
from PIL import Image

from modeling_restr import image_processing_restr
from modeling_restr.image_processing_restr import ReSTRImageProcessor, get_letterbox


# (height, width): wide, tall, tiny, odd, a single row or column, and the canvas itself.
SIZES = [(60, 240), (331, 77), (3, 5), (101, 99), (1, 90), (90, 1), (96, 96), (700, 500)]


@pytest.fixture
def processor():
    return ReSTRImageProcessor(size=96)


def outputs_of(logits):
    return SimpleNamespace(logits=logits)


def pixels_of(processor, image, **kwargs):
    """The pixel values in 0..255, without normalization."""
    return processor(image, rescale_factor=1.0, do_normalize=False, return_tensors="pt", **kwargs).pixel_values[0]


def gradient(height=40, width=60, seed=0):
    """A smooth colour picture: its corners differ, so that flipped or swapped axes are noticed."""
    rows, columns = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    return np.stack([255 * rows, 255 * columns, 255 * (1 - rows) * columns], axis=-1).round().astype(np.uint8)


# Letterbox


@pytest.mark.parametrize("size", SIZES)
def test_letterbox_fits_and_is_centred(size):
    top, left, height, width = get_letterbox(size, (96, 128))
    assert height == 96 or width == 128
    assert 0 <= 96 - height - 2 * top <= 1 and 0 <= 128 - width - 2 * left <= 1
    exact = min(96 / size[0], 128 / size[1])
    assert abs(height - max(size[0] * exact, 1)) <= 0.5 and abs(width - max(size[1] * exact, 1)) <= 0.5


def test_letterbox_of_known_sizes():
    assert get_letterbox((480, 640), (480, 480)) == (60, 0, 360, 480)
    assert get_letterbox((640, 427), (480, 480)) == (0, 80, 480, 320)
    assert get_letterbox((2, 1000), (480, 480)) == (239, 0, 1, 480)
    with pytest.raises(ValueError, match="longer"):
        get_letterbox((480, 640, 3), (480, 480))


def test_pixels_are_those_of_pillow_on_a_black_canvas(processor):
    image = Image.fromarray(gradient(40, 60))
    pixels = pixels_of(processor, image)
    expected = np.zeros((96, 96, 3), dtype=np.float32)
    expected[16:80] = np.asarray(image.resize((96, 64), Image.Resampling.BILINEAR))
    assert pixels.dtype == torch.float32
    np.testing.assert_array_equal(pixels.permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("resample", [0, 1, 2, 3])
def test_images_and_arrays_are_resized_alike(processor, size, resample):
    colour = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    for array in (colour, colour[..., 0]):
        from_image, from_array = (pixels_of(processor, x, resample=resample) for x in (Image.fromarray(array), array))
        assert torch.equal(from_image, from_array)


def peak_memory(function):
    """Bytes that NumPy and Python held at once, without those of Pillow and PyTorch."""
    tracemalloc.start()
    function()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def test_photos_are_resized_before_they_become_arrays(processor):
    photos = [Image.new(mode, (2000, 1500)) for mode in ("RGB", "L", "CMYK")]
    processor(photos)  # so that imports are not counted
    assert peak_memory(lambda: processor(photos)) < 2_000_000


def test_masks_are_letterboxed_inside_their_box(processor):
    mask = np.zeros((1500, 2000), dtype=bool)
    mask[700:800, 900:1100] = True
    photo = Image.new("L", (2000, 1500))
    processor(photo, segmentation_maps=mask)
    assert peak_memory(lambda: processor(photo, segmentation_maps=mask)) < 2 * mask.nbytes + 1_000_000


def test_normalization_and_both_paddings(processor):
    image = Image.new("RGB", (60, 40), (255, 0, 51))
    black = processor(image, return_tensors="pt").pixel_values[0]
    grey = processor(image, pad_after_normalization=True, return_tensors="pt").pixel_values[0]
    inside = torch.tensor([1.0, -1.0, -0.6])
    for pixels, canvas in ((black, -1.0), (grey, 0.0)):
        torch.testing.assert_close(pixels[:, 16:80], inside[:, None, None].expand(3, 64, 96))
        assert (pixels[:, :16] == canvas).all() and (pixels[:, 80:] == canvas).all()


def test_batch_equals_single_images(processor):
    images = [Image.fromarray(gradient(*size)) for size in SIZES]
    batch = processor(images, return_tensors="pt")
    assert batch.pixel_values.shape == (len(SIZES), 3, 96, 96)
    assert batch.original_sizes.tolist() == [list(size) for size in SIZES]
    for image, pixels in zip(images, batch.pixel_values, strict=True):
        assert torch.equal(processor(image, return_tensors="pt").pixel_values[0], pixels)


def test_size_can_be_a_rectangle_and_be_passed_in_the_call(processor):
    assert processor(Image.new("RGB", (9, 9)), size=(32, 64), return_tensors="pt").pixel_values.shape == (1, 3, 32, 64)


def test_saves_and_reloads(processor, tmp_path):
    processor.pad_after_normalization = True
    processor.save_pretrained(tmp_path)
    reloaded = ReSTRImageProcessor.from_pretrained(tmp_path)
    assert reloaded.to_dict() == processor.to_dict()
    image = Image.fromarray(gradient())
    assert torch.equal(*(p(image, return_tensors="pt").pixel_values for p in (processor, reloaded)))


# Kinds of images


def test_exif_orientation_is_applied(processor, tmp_path):
    upright = Image.fromarray(gradient(40, 60)[..., :1].repeat(3, -1))
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=make_exif(6))
    expected = pixels_of(processor, upright)
    for image in (Image.open(tmp_path / "turned.png"), str(tmp_path / "turned.png"), tmp_path / "turned.png"):
        inputs = processor(image, return_tensors="pt")
        assert inputs.original_sizes.tolist() == [[40, 60]]
        assert torch.equal(pixels_of(processor, image), expected)


def in_mode(mode: str) -> Image.Image:
    """A picture of two colours (left dark, right light) in a mode of Pillow."""
    image = Image.new("RGB", (96, 96), (40, 40, 40))
    image.paste((200, 200, 200), (48, 0, 96, 96))
    if mode.startswith("I;16") or mode in ("I", "F"):
        wide = np.asarray(image)[..., 0].astype(np.uint16) * 257
        if mode in ("I", "F"):
            wide = wide.astype(np.int32) if mode == "I" else wide.astype(np.float32) / 65535
        return Image.fromarray(wide.astype(">u2") if mode == "I;16B" else wide)
    return image.quantize(4) if mode == "P" else image.convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "YCbCr", "HSV", "I", "I;16", "I;16B", "F"])
def test_modes_become_rgb(processor, mode):
    image = in_mode(mode)
    assert image.mode == mode
    pixels = pixels_of(processor, image)
    for region, value in ((pixels[..., :48], 40), (pixels[..., 48:], 200)):
        assert (region - value).abs().max() <= (2 if mode == "YCbCr" else 0)


def test_dark_16_bit_images_stay_dark_in_either_byte_order(processor):
    dark = np.full((96, 96), 200, np.uint16)  # of 65,535
    for array in (dark, dark.astype(">u2")):
        assert pixels_of(processor, Image.fromarray(array)).max() <= 1


def test_bilevel_images_become_black_and_white(processor):
    pixels = pixels_of(processor, Image.fromarray(np.eye(96, dtype=bool)))
    assert torch.equal(pixels, 255 * torch.eye(96).expand(3, 96, 96))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_transparency_is_composited_onto_white(processor, mode):
    grey = np.full((96, 96), 100, dtype=np.uint8)
    alpha = np.repeat(np.array([0, 255], dtype=np.uint8), 48)[None].repeat(96, 0)
    image = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)])
    if mode == "P":
        image = Image.fromarray((alpha > 0).astype(np.uint8))
        image.putpalette([10, 20, 30, 100, 100, 100])
        image.info["transparency"] = 0
    elif mode != "LA":
        image = image.convert("RGBA").convert(mode)
    assert image.mode == mode
    pixels = pixels_of(processor, image)
    assert (pixels[..., :48] == 255).all() and (pixels[..., 48:] == 100).all()


def test_half_transparent_pixels_blend_with_white(processor):
    array = np.full((96, 96, 4), (0, 100, 200, 51), dtype=np.uint8)  # a fifth of the colour
    expected = torch.tensor([204, 224, 244.0])[:, None, None].expand(3, 96, 96)
    for image in (Image.fromarray(array), array, torch.from_numpy(array).permute(2, 0, 1), array / 255):
        assert torch.equal(pixels_of(processor, image), expected)


def array_forms() -> dict:
    array = gradient(40, 60)
    floats = array.astype(np.float32) / 255
    channels_first = array.transpose(2, 0, 1)
    return {
        "uint8 channels last": array,
        "uint8 channels first": channels_first,
        "float 0..1": floats,
        "float16 0..1": floats.astype(np.float16),
        "float 0..255": array.astype(np.float64),
        "float with an overshoot": floats * (1 + 5e-4),
        "uint16": array.astype(np.uint16) * 257,
        "int64": array.astype(np.int64),
        "int32 of 16 bits": array.astype(np.int32) * 257,
        "tensor channels first": torch.from_numpy(channels_first.copy()),
        "tensor channels last": torch.from_numpy(array),
        "bfloat16 tensor": torch.full((3, 40, 60), 0.5, dtype=torch.bfloat16),
        "float tensor": torch.from_numpy(floats).permute(2, 0, 1).requires_grad_(),
    }


@pytest.mark.parametrize("form", array_forms())
def test_arrays_and_tensors(processor, form):
    picture = np.full((40, 60, 3), 128, np.uint8) if form == "bfloat16 tensor" else gradient(40, 60)
    expected = pixels_of(processor, Image.fromarray(picture))
    image = array_forms()[form]
    assert processor(image, return_tensors="pt").original_sizes.tolist() == [[40, 60]]
    assert (pixels_of(processor, image) - expected).abs().max() <= (1 if "overshoot" in form else 0)


def test_grey_arrays_and_bools(processor):
    grey = gradient(40, 60)[..., 0]
    expected = pixels_of(processor, Image.fromarray(grey))
    for image in (grey, grey[..., None], grey[None], torch.from_numpy(grey), torch.from_numpy(grey)[None]):
        inputs = processor(image, return_tensors="pt")
        assert inputs.original_sizes.tolist() == [[40, 60]]
        assert torch.equal(pixels_of(processor, image), expected)
    assert torch.equal(
        pixels_of(processor, grey > 99), pixels_of(processor, Image.fromarray((grey > 99).astype(np.uint8) * 255))
    )


def test_ambiguous_channels_follow_the_library_of_the_array(processor):
    image = gradient(3, 5).transpose(0, 1, 2)[:, :3]  # 3 x 3 pixels of 3 channels
    expected = pixels_of(processor, Image.fromarray(image))
    assert torch.equal(pixels_of(processor, image), expected)
    assert torch.equal(pixels_of(processor, torch.from_numpy(image).permute(2, 0, 1)), expected)
    channels_first = image.transpose(2, 0, 1)
    assert torch.equal(pixels_of(processor, channels_first, input_data_format="channels_first"), expected)


def test_floats_keep_their_values_without_rescaling(processor):
    image = np.full((96, 96, 3), 0.25, dtype=np.float32)
    assert (processor(image, do_rescale=False, return_tensors="pt").pixel_values == -0.5).all()


def test_urls_are_opened_like_files(processor, tmp_path, monkeypatch):
    Image.fromarray(np.full((96, 96), 200 * 257, dtype=np.uint16)).save(tmp_path / "wide.png")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/wide.png"
        assert (pixels_of(processor, url) == 200).all()
        server.shutdown()


@pytest.mark.parametrize("size", [0, -1, {"height": 96, "width": 0}, {"shortest_edge": 96}])
def test_bad_sizes_are_explained(size):
    with pytest.raises(ValueError, match="positive 'height' and 'width'"):
        ReSTRImageProcessor(size=size)


NAN, INF = float("nan"), float("inf")
BAD_OPTIONS = [
    *[
        {name: value}
        for name in ("rescale_factor", "image_mean", "image_std")
        for value in (NAN, INF, -INF, "x", True)
    ],
    *[{name: [0.5, value, 0.5]} for name in ("image_mean", "image_std") for value in (NAN, INF, "0.5", None, [1])],
    *[{"rescale_factor": [1]}, {"image_std": [1, 0, 1]}, {"image_mean": []}, {"image_mean": {}}],
    *[{"size": {"height": 96, "width": value}} for value in (NAN, INF, "96", 96.5, None, True)],
    *[{"size": value} for value in ("96", [96], [96, 96, 96], True, NAN, {})],
    *[{"resample": value} for value in (NAN, 99, -1, "bilinear", True)],
    *[{name: "false"} for name in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")],
    {"pad_after_normalization": 1},
]


@pytest.mark.parametrize("options", BAD_OPTIONS, ids=str)
def test_bad_options_are_refused_at_construction_and_when_loaded(options, tmp_path):
    (name,) = options
    with pytest.raises(ValueError, match=name):
        ReSTRImageProcessor(**options)
    saved = ReSTRImageProcessor(size=96).to_dict() | options
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(saved))  # NaN and Infinity are written as such
    with pytest.raises(ValueError, match=name):
        ReSTRImageProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize("options", [{"size": None}, {"rescale_factor": NAN}, {"image_std": [1.0, 0.0, 1.0]}])
def test_bad_options_of_a_call_are_refused(processor, options):
    (name,) = options
    with pytest.raises(ValueError, match=name):
        processor(Image.new("RGB", (9, 9)), **options)


def test_numbers_of_numpy_are_numbers():
    processor = ReSTRImageProcessor(
        size=np.int64(96), rescale_factor=np.float32(0.5), image_mean=np.ones(3), image_std=2
    )
    assert dict(processor.size) == {"height": 96, "width": 96}


@pytest.mark.parametrize("option", [{"do_center_crop": True, "crop_size": 9}, {"do_pad": False}, {"pad_size": 9}])
def test_options_without_effect_are_refused(processor, option):
    with pytest.raises(ValueError, match="not supported"):
        processor(Image.new("RGB", (9, 9)), **option)


# Labels


def area_reference(mask, height, width):
    """Covered share of each target pixel, by repeating pixels to the common multiple of both sizes."""
    fine = mask.repeat(height, 0).repeat(width, 1).astype(np.float64)
    return fine.reshape(height, mask.shape[0], width, mask.shape[1]).mean((1, 3))


def box_mask(top, bottom, left, right):
    """A box without its first corner in a mask of 30 x 48."""
    mask = np.zeros((30, 48), dtype=bool)
    mask[top:bottom, left:right] = True
    mask[top, left] = False
    return mask


BOXES = [(0, 0, 0, 0), (3, 4, 5, 6), (0, 1, 0, 48), (29, 30, 47, 48), (0, 30, 0, 48), (10, 20, 7, 33)]
NOISE = [np.random.default_rng(0).random(size) > 0.4 for size in [(30, 48), (7, 5), (64, 63), (50, 33)]]


@pytest.mark.parametrize("canvas", [24, 100, (30, 48)])
@pytest.mark.parametrize("mask", [*NOISE, *(box_mask(*box) for box in BOXES)])
def test_labels_are_set_where_more_than_half_is_covered(mask, canvas):
    processor = ReSTRImageProcessor(size=canvas)
    canvas_size = processor.size["height"], processor.size["width"]
    top, left, height, width = get_letterbox(mask.shape, canvas_size)
    expected = torch.zeros(canvas_size, dtype=torch.int64)
    covered = area_reference(mask, height, width) > 0.5 + 1e-9
    expected[top : top + height, left : left + width] = torch.from_numpy(covered)
    image = Image.new("RGB", mask.shape[::-1])
    assert torch.equal(processor(image, segmentation_maps=mask, return_tensors="pt").labels[0], expected)


def test_a_mask_of_several_sentences_is_letterboxed_once(processor, monkeypatch):
    letterboxed = []
    original = image_processing_restr._letterbox_mask
    monkeypatch.setattr(
        image_processing_restr, "_letterbox_mask", lambda *args: letterboxed.append(args) or original(*args)
    )
    masks = [np.arange(600).reshape(20, 30) % number == 0 for number in (2, 3)]
    given = [masks[0], masks[1], masks[0], masks[0], masks[1]]
    labels = processor(Image.new("RGB", (30, 20)), segmentation_maps=given, return_tensors="np").labels
    assert len(letterboxed) == 2
    for label, mask in zip(labels, given, strict=True):
        alone = processor(Image.new("RGB", (30, 20)), segmentation_maps=mask.copy(), return_tensors="np").labels
        np.testing.assert_array_equal(label, alone[0])


def test_labels_lie_on_the_letterboxed_object(processor):
    array = np.zeros((40, 60, 3), dtype=np.uint8)
    array[10:20, 30:50] = 255
    inputs = processor(Image.fromarray(array), segmentation_maps=array[..., 0] > 0, return_tensors="pt")
    bright = inputs.pixel_values[0, 0] > 0
    assert inputs.labels.unique().tolist() == [0, 1]
    assert torch.equal(inputs.labels[0].bool(), bright)
    assert inputs.labels.sum() == 16 * 32


def test_half_covered_pixels_are_not_set():
    mask = np.zeros((8, 8), dtype=bool)
    mask[1:7, 1:7] = True  # at half the size, a ring of half-covered pixels
    labels = ReSTRImageProcessor(size=4)(Image.new("RGB", (8, 8)), segmentation_maps=mask, return_tensors="np").labels
    assert labels[0].tolist() == [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]


def test_forms_of_segmentation_maps(processor):
    images = [Image.new("RGB", (30, 20)), Image.new("RGB", (10, 25))]
    masks = [np.random.default_rng(i).random((h, w)) > 0.5 for i, (h, w) in enumerate([(20, 30), (25, 10)])]
    expected = processor(images, segmentation_maps=masks, return_tensors="pt").labels
    grey = [Image.fromarray(mask.astype(np.uint8) * 255) for mask in masks]
    forms = [
        [Image.fromarray(mask) for mask in masks],
        grey,
        [[mask] for mask in masks],
        [torch.from_numpy(mask) for mask in masks],
        [torch.from_numpy(mask).bfloat16() for mask in masks],
        [mask.astype(np.float32) for mask in masks],
        [mask[..., None] for mask in masks],
        [torch.from_numpy(mask)[..., None] for mask in masks],
        [mask[None, ..., None] for mask in masks],
    ]
    for form in forms:
        assert torch.equal(processor(images, segmentation_maps=form, return_tensors="pt").labels, expected)
    stacked = processor(images[0], segmentation_maps=np.stack([masks[0]] * 3), return_tensors="pt").labels
    assert torch.equal(stacked, expected[:1].expand(3, -1, -1))
    single = processor(images[0], segmentation_maps=masks[0][..., None], return_tensors="pt").labels
    assert torch.equal(single, expected[:1])
    narrow = processor(Image.new("RGB", (1, 9)), segmentation_maps=np.ones((2, 9, 1)), return_tensors="pt").labels
    assert len(narrow) == 2  # a stack of maps that are one pixel wide
    chosen = processor(images, segmentation_maps=masks[::-1], image_indices=[1, 0], return_tensors="pt").labels
    assert torch.equal(chosen, expected.flip(0))


@pytest.mark.parametrize(
    "maps, indices, message",
    [
        ([np.zeros((20, 30))] * 3, None, "3 segmentation maps, 2 images"),
        ([np.zeros((20, 30))] * 2, [0, 2], r"image_indices \[0, 2\]"),
        ([np.zeros((20, 30))] * 2, None, r"map 1 at its image's own size, \(height, width\) \(25, 10\), got \(20, 30"),
        ([np.arange(600).reshape(20, 30), np.zeros((25, 10))], None, "map 0 to be binary .* from 0 to 599"),
        ("mask.png", None, "got str"),
        ([np.zeros((20, 30, 1)), np.zeros((20, 30, 1))], None, r"\(25, 10\), got \(20, 30\)"),
        (np.zeros((2, 20, 30, 3)), None, r"got \(2, 20, 30, 3\)"),
    ],
)
def test_bad_segmentation_maps_are_explained(processor, maps, indices, message):
    images = [Image.new("RGB", (30, 20)), Image.new("RGB", (10, 25))]
    with pytest.raises(ValueError, match=message):
        processor(images, segmentation_maps=maps, image_indices=indices)


# Masks back at the images' sizes


def rectangle_of(mask):
    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    return np.array([rows[0], rows[-1] + 1, columns[0], columns[-1] + 1])


def box_picture(size, box):
    """A black image with a white box, given as (top, bottom, left, right)."""
    picture = np.zeros((*size, 3), dtype=np.uint8)
    picture[box[0] : box[1], box[2] : box[3]] = 255
    return Image.fromarray(picture)


@pytest.mark.parametrize("patch_size", [1, 8])
@pytest.mark.parametrize("size", [(60, 240), (331, 97), (101, 99), (21, 33), (96, 96), (700, 500), (997, 1501)])
def test_known_rectangle_returns_from_logits_of_pixels_or_patches(processor, size, patch_size):
    """Pixel values stand in for logits: white is inside, black outside, and a grey edge keeps parts of pixels."""
    box = np.array([size[0] // 5, size[0] - size[0] // 4, size[1] // 5, size[1] - size[1] // 4])
    pixels = processor(box_picture(size, box), return_tensors="pt").pixel_values[:, :1]
    logits = torch.nn.functional.avg_pool2d(pixels, patch_size)[:, 0] * 10
    (result,) = processor.post_process_referring_segmentation(outputs_of(logits), [size])
    mask = result["mask"].numpy()
    assert mask.shape == size and mask.dtype == bool
    quarter_of_a_patch = 0 if patch_size == 1 else 2 * max(size) / 96
    assert np.abs(rectangle_of(mask) - box).max() <= quarter_of_a_patch + 1


@pytest.mark.parametrize("size", SIZES)
def test_post_processing_inverts_the_letterbox_of_labels(processor, size):
    mask = np.zeros(size, dtype=bool)
    mask[size[0] // 3 :, : size[1] // 2 + 1] = True
    labels = processor(Image.new("RGB", size[::-1]), segmentation_maps=mask, return_tensors="pt").labels
    (result,) = processor.post_process_referring_segmentation(outputs_of(labels * 20.0 - 10), [size])
    off = np.abs(rectangle_of(result["mask"].numpy()) - rectangle_of(mask))
    assert off.max() <= max(1, np.ceil(0.5 * max(size) / 96))  # half a pixel of the canvas where that is coarser


def test_padding_does_not_reach_the_mask(processor):
    top, left, height, width = get_letterbox((30, 80), (96, 96))
    logits = torch.full((1, 96, 96), 10.0)
    logits[:, top : top + height, left : left + width] = -10
    (result,) = processor.post_process_referring_segmentation(outputs_of(logits), [(30, 80)])
    assert not result["mask"].any() and result["score"] == 0.0
    torch.testing.assert_close(result["probabilities"], torch.full((30, 80), -10.0).sigmoid())


def test_values_against_a_plain_bilinear_reference(processor):
    logits = torch.randn(1, 96, 96, generator=torch.Generator().manual_seed(0))
    (result,) = processor.post_process_referring_segmentation(outputs_of(logits), [(50, 120)])
    crop = logits[0, 28:68].double().numpy()  # 50 x 120 fits at 40 x 96
    rows = np.clip((np.arange(50) + 0.5) * 40 / 50 - 0.5, 0, 39)
    columns = np.clip((np.arange(120) + 0.5) * 96 / 120 - 0.5, 0, 95)
    by_rows = np.stack([np.interp(rows, np.arange(40), crop[:, j]) for j in range(96)], axis=1)
    values = np.stack([np.interp(columns, np.arange(96), by_rows[i]) for i in range(50)])
    probabilities = 1 / (1 + np.exp(-values))
    np.testing.assert_allclose(result["probabilities"].numpy(), probabilities, atol=1e-5)
    assert (result["mask"].numpy() == (values > 0)).mean() > 0.999
    assert result["score"] == pytest.approx(probabilities[values > 0].mean(), abs=1e-5)


def test_threshold_and_sizes_as_list_or_tensor(processor):
    logits = torch.randn(3, 96, 96, generator=torch.Generator().manual_seed(0))
    sizes = [(20, 30), (40, 9), (96, 96)]
    before = logits.clone()
    results = processor.post_process_referring_segmentation(outputs_of(logits), torch.tensor(sizes), threshold=0.7)
    assert torch.equal(logits, before)
    same = processor.post_process_referring_segmentation(outputs_of(logits), sizes, threshold=0.7)
    for result, other, size in zip(results, same, sizes, strict=True):
        assert result["mask"].shape == size and torch.equal(result["mask"], other["mask"])
        assert torch.equal(result["mask"], result["probabilities"] > 0.7)
        assert 0.7 < result["score"] < 1
    everything, nothing = (
        processor.post_process_referring_segmentation(outputs_of(logits), sizes, threshold=t)[0]["mask"]
        for t in (0, 1)
    )
    assert everything.all() and not nothing.any()


def test_a_threshold_close_to_one_is_not_rounded(processor):
    threshold = 1 - 1e-9  # 1 in float32
    limit = math.log(threshold / (1 - threshold))
    logits = torch.full((1, 96, 96), limit - 0.1)
    logits[:, :48] = limit + 0.1
    (result,) = processor.post_process_referring_segmentation(outputs_of(logits), [(96, 96)], threshold)
    assert torch.equal(result["mask"], logits[0] > limit) and result["mask"].sum() == 48 * 96


def test_bfloat16_logits_are_resized_in_float32(processor):
    logits = torch.randn(1, 96, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    low, high = (
        processor.post_process_referring_segmentation(outputs_of(x), [(300, 200)])[0] for x in (logits, logits.float())
    )
    assert low["probabilities"].dtype == torch.float32
    assert torch.equal(low["probabilities"], high["probabilities"])


def test_coarse_logits_cover_the_same_canvas(processor):
    coarse = torch.randn(1, 12, 12, generator=torch.Generator().manual_seed(0))
    fine = torch.nn.functional.interpolate(coarse[None], (96, 96), mode="bilinear")[0]
    of_model = SimpleNamespace(logits=coarse, patch_logits=coarse)
    results = [
        processor.post_process_referring_segmentation(outputs, [(33, 70)])[0]
        for outputs in (outputs_of(fine), outputs_of(coarse), of_model)
    ]
    assert all(torch.equal(results[0]["probabilities"], result["probabilities"]) for result in results[1:])


def test_logits_of_a_size_passed_in_the_call(processor):
    logits = torch.full((1, 32, 64), -10.0)
    logits[:, :, :32] = 10  # the left half of a 10 x 20 image that fills this canvas
    (result,) = processor.post_process_referring_segmentation(outputs_of(logits), [(10, 20)])
    assert result["mask"][:, :10].all() and not result["mask"][:, 10:].any()


@pytest.mark.parametrize("size", [(32, 64), (64, 64), (40, 40)])
def test_logits_that_do_not_divide_the_canvas_are_a_canvas_of_their_own(processor, size):
    own = ReSTRImageProcessor(size={"height": size[0], "width": size[1]})
    outputs = outputs_of(torch.randn(1, *size, generator=torch.Generator().manual_seed(0)))
    result, expected = (each.post_process_referring_segmentation(outputs, [(50, 33)])[0] for each in (processor, own))
    assert torch.equal(result["probabilities"], expected["probabilities"])


@pytest.mark.parametrize("size", [48, 32])
@pytest.mark.parametrize("image_size", [(50, 33), (7, 90), (61, 60)])
def test_images_prepared_at_another_size_are_post_processed_with_it(processor, size, image_size):
    own = ReSTRImageProcessor(size=size)
    logits = torch.randn(1, size, size, generator=torch.Generator().manual_seed(0))
    patch_logits = torch.nn.functional.avg_pool2d(logits, 8)
    of_model = SimpleNamespace(logits=logits, patch_logits=patch_logits)
    coarse = SimpleNamespace(logits=patch_logits, patch_logits=patch_logits)
    cases = [(of_model, {}), (of_model, {"size": size}), (coarse, {"size": {"height": size, "width": size}})]
    for outputs, options in cases:
        (result,) = processor.post_process_referring_segmentation(outputs, [image_size], **options)
        (expected,) = own.post_process_referring_segmentation(outputs_of(outputs.logits), [image_size])
        assert torch.equal(result["probabilities"], expected["probabilities"])


def test_probabilities_on_request(processor):
    logits = torch.randn(2, 96, 96, generator=torch.Generator().manual_seed(0))
    sizes = [(20, 30), (40, 9)]
    full = processor.post_process_referring_segmentation(outputs_of(logits), sizes)
    short = processor.post_process_referring_segmentation(outputs_of(logits), sizes, return_probabilities=False)
    for result, expected in zip(short, full, strict=True):
        assert set(result) == {"mask", "score"} and set(expected) == {"mask", "score", "probabilities"}
        assert torch.equal(result["mask"], expected["mask"]) and result["score"] == expected["score"]


@pytest.mark.parametrize(
    "sizes", [[(50, 33)], torch.tensor([[50, 33]]), np.array([[50.0, 33.0]]), [torch.tensor([50, 33])]]
)
def test_forms_of_target_sizes(processor, sizes):
    (result,) = processor.post_process_referring_segmentation(outputs_of(torch.zeros(1, 96, 96)), sizes)
    assert result["mask"].shape == (50, 33) and not result["mask"].any()  # 0.5 is not above 0.5


BAD_TARGET_SIZES = [(INF, 9), (NAN, 9), (9.5, 9), (10**7, 10**7), (2**64, 1), ("9", "9"), (None, 9), "99", 9, None]


@pytest.mark.parametrize(
    "logits, sizes, threshold, message",
    [
        (torch.zeros(2, 96, 96), [(9, 9)], 0.5, "one target size per expression, 2, got 1.*image_indices"),
        (torch.zeros(1, 96, 96), [(0, 9)], 0.5, r"\(height, width\) in pixels, got \[\(0, 9\)\]"),
        (torch.zeros(1, 96, 96), [(9, 9, 3)], 0.5, r"got \[\(9, 9, 3\)\]"),
        *((torch.zeros(1, 96, 96), [size], 0.5, "in pixels, got") for size in BAD_TARGET_SIZES),
        (torch.zeros(1, 96, 96), None, 0.5, "one target size per expression, 1, got 0"),
        (torch.zeros(1, 96, 96), [(9, 9)], 1.5, "from 0 to 1, got 1.5"),
        (torch.zeros(1, 96, 96), [(9, 9)], NAN, "from 0 to 1, got nan"),
        (torch.zeros(1, 96, 96), [(9, 9)], "0.5", "from 0 to 1, got '0.5'"),
        (None, [(9, 9)], 0.5, "as a tensor .* got NoneType"),
        ([[[0.0]]], [(9, 9)], 0.5, "got list"),
        (np.zeros((1, 96, 96)), [(9, 9)], 0.5, "got ndarray"),
        (torch.zeros(1, 1, 96, 96), [(9, 9)], 0.5, r"\(expressions, height, width\), got \(1, 1, 96, 96\)"),
        (torch.full((1, 96, 96), float("nan")), [(9, 9)], 0.5, "finite logits"),
    ],
)
def test_bad_post_processing_input_is_explained(processor, logits, sizes, threshold, message):
    with pytest.raises(ValueError, match=message):
        processor.post_process_referring_segmentation(outputs_of(logits), sizes, threshold)
