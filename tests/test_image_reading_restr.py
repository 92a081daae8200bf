"""Images in any form, and the errors for those that cannot be read."""

import base64
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from pictures import encode, make_exif
from PIL import EpsImagePlugin, Image, features

from modeling_restr import UnreadableImageError
from modeling_restr.image_processing_restr import ReSTRImageProcessor
from modeling_restr.image_reading_restr import read_image


PIXELS = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)


IMAGE = Image.fromarray(PIXELS)
PNG = encode(IMAGE)


@pytest.fixture
def processor():
    return ReSTRImageProcessor(size=16)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(PNG)
    return path


def at(position: int) -> io.BytesIO:
    file = io.BytesIO(PNG)
    file.seek(position)
    return file


class Stream(io.RawIOBase):
    """A file without seek, such as a response."""

    def __init__(self):
        super().__init__()
        self.content = io.BytesIO(PNG)

    def readable(self):
        return True

    def readinto(self, buffer):
        return self.content.readinto(buffer)


FORMS = {
    "path as text": str,
    "path": lambda path: path,
    "bytes": lambda path: PNG,
    "bytearray": lambda path: bytearray(PNG),
    "memoryview": lambda path: memoryview(PNG),
    "open file": lambda path: path.open("rb"),
    "BytesIO": lambda path: at(0),
    "BytesIO in the middle": lambda path: at(9),
    "BytesIO just written": lambda path: at(len(PNG)),
    "stream": lambda path: Stream(),
    "base64": lambda path: base64.b64encode(PNG).decode(),
    "base64 in lines": lambda path: base64.encodebytes(PNG).decode(),
    "data URI": lambda path: f"data:image/png;base64,{base64.b64encode(PNG).decode()}",
    "data URI in other words": lambda path: f"DATA:;base64,{base64.b64encode(PNG).decode()}",
    "data URI with escapes": lambda path: "data:image/png," + "".join(f"%{byte:02x}" for byte in PNG),
    "PIL image": lambda path: Image.open(path),
    "array": lambda path: PIXELS,
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(processor, path, form):
    expected = processor(PIXELS, return_tensors="pt")
    for images in (FORMS[form](path), [FORMS[form](path)], [[FORMS[form](path)]]):
        inputs = processor(images, return_tensors="pt")
        assert torch.equal(inputs.pixel_values, expected.pixel_values)
        assert torch.equal(inputs.original_sizes, expected.original_sizes)
    assert np.array_equal(processor.process_image(FORMS[form](path)), PIXELS.transpose(2, 0, 1))


def test_a_file_can_be_passed_again(processor):
    file = at(3)
    first, second = (processor(file, return_tensors="pt").pixel_values for _ in range(2))
    assert torch.equal(first, second)


def test_many_paths_are_opened_one_after_the_other(processor, path, monkeypatch):
    opened = []
    original = Image.open

    def open_image(*args, **kwargs):
        assert all(image.fp is None for image in opened)
        opened.append(original(*args, **kwargs))
        return opened[-1]

    monkeypatch.setattr(Image, "open", open_image)
    processor([path] * 3)
    assert len(opened) == 3


def damaged() -> dict[str, bytes]:
    contents = {kind: encode(IMAGE, kind)[:-40] for kind in ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "JPEG2000")}
    if features.check("avif"):
        contents["AVIF"] = encode(IMAGE, "AVIF")[:-40]
    changed = bytearray(PNG)
    changed[PNG.index(b"IDAT") + 9] ^= 255
    header = struct.pack(">IIBBBBB", 12, 20, 7, 2, 0, 0, 0)  # of 7 bits
    chunk = b"IHDR" + header
    odd = PNG[:8] + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + PNG[33:]
    return contents | {
        "a changed byte": bytes(changed),
        "an odd header": odd,
        "nothing": b"",
        "text": b"<html></html>",
    }


def test_photos_in_other_formats_are_told_which_are_known(processor, tmp_path):
    (tmp_path / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64))
    with pytest.raises(UnreadableImageError, match=r"photo\.heic' cannot be read: .* such as JPEG or PNG$"):
        processor(tmp_path / "photo.heic")


@pytest.mark.parametrize("kind", damaged())
def test_damaged_files_are_one_error_that_names_them(processor, tmp_path, kind):
    content = damaged()[kind]
    path = tmp_path / f"damaged_{kind}"
    path.write_bytes(content)
    for source in (str(path), path, path.open("rb")):
        with pytest.raises(UnreadableImageError, match=f"damaged_{kind}.* cannot be read: ."):
            processor([PIXELS, source])
    for source in (content, io.BytesIO(content)):
        with pytest.raises(UnreadableImageError, match=r"^Image 1 of the list cannot be read: ."):
            processor([PIXELS, source])
        with pytest.raises(UnreadableImageError, match=r"^The image cannot be read: ."):
            processor(source)
    try:
        image = Image.open(path)
    except Exception:  # noqa: BLE001  (there is no PIL image of it)
        return
    with pytest.raises(UnreadableImageError, match=f"damaged_{kind}"):
        processor(image)


def test_bombs_are_refused_by_name(processor, path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(UnreadableImageError, match=r"photo\.png.*decompression bomb"):
        processor(path)


def closed_file() -> io.BytesIO:
    file = io.BytesIO(PNG)
    file.close()
    return file


@pytest.mark.parametrize(
    "source, message",
    [
        ("no_such_file.png", "'no_such_file.png' cannot be read: there is no such file"),
        ("data:image/png;base64,AAAA", "data URI"),
        (".", r"'\.' cannot be read"),
        ("a\0b", "cannot be read"),
        (io.StringIO("text"), 'binary mode \\("rb"\\), got one that reads str'),
        (closed_file(), "closed file"),
        (None, "got NoneType"),
        (3, "got int"),
        ({"path": "photo.png"}, "got dict"),
        (np.array([["a", "b"]]), "got one of <U1"),
        (np.array([[None, 1]]), "got one of object"),
        (np.zeros((4, 4), complex), "got one of complex128"),
        (np.full((9, 9, 3), np.nan), "got float64 from nan"),
        (np.full((9, 9, 3), -1.0), "before any normalization; got float64 from -1.0 to -1.0"),
        (np.full((9, 9, 3), 300.0), "from 300.0 to 300.0"),
        (np.full((9, 9, 3), 70000), "from 70000.0"),
        (np.zeros((40, 60, 5), np.uint8), r"got \(40, 60, 5\)"),
        (np.zeros(5), r"got \(5,\)"),
        (np.zeros((0, 60, 3), np.uint8), "at least one pixel"),
        (Image.new("RGB", (0, 3)), "at least one pixel"),
    ],
)
def test_other_values_raise_the_same_error(processor, source, message):
    with pytest.raises(UnreadableImageError, match=message):
        processor(source)
    with pytest.raises(UnreadableImageError, match=message):
        processor([PIXELS, source])


def test_urls_that_cannot_be_read_are_named(processor):
    with pytest.raises(UnreadableImageError, match=r"http://127\.0\.0\.1:9/photo\.png"):
        processor("http://127.0.0.1:9/photo.png")


def test_ghostscript_is_never_started(processor, tmp_path, monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args: pytest.fail("Ghostscript was started"))
    path = tmp_path / "drawing.png"  # under another name
    path.write_bytes(encode(IMAGE, "EPS"))
    for source in (path, path.read_bytes(), Image.open(path)):
        with pytest.raises(UnreadableImageError, match="EPS"):
            processor(source)


def test_empty_lists_and_lists_that_hold_themselves_are_refused(processor):
    with pytest.raises(ValueError, match="at least one image"):
        processor([])
    images: list = [PIXELS]
    images.append(images)
    for read in (processor, processor.fetch_images):
        with pytest.raises(UnreadableImageError, match="at most 3 deep"):
            read(images)


def grey_png_of_16_bits(values: np.ndarray, transparent: int | None) -> bytes:
    options = {} if transparent is None else {"transparency": transparent}
    return encode(Image.fromarray(values.astype(np.uint16)), **options)


def test_a_transparent_value_of_16_bit_images_becomes_white(processor):
    ramp = np.arange(256).reshape(16, 16) * 257
    options = {"rescale_factor": 1.0, "do_normalize": False, "return_tensors": "np"}
    plain, transparent = (
        processor(grey_png_of_16_bits(ramp, value), **options).pixel_values[0] for value in (None, 3 * 257)
    )
    assert np.array_equal(plain[0], np.arange(256).reshape(16, 16))
    plain[:, ramp == 3 * 257] = 255  # on white, as other transparency
    assert np.array_equal(transparent, plain)


def make_photo(size: tuple[int, int], orientation: int, file_format: str = "JPEG") -> bytes:
    coarse = np.random.default_rng(1).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return encode(Image.fromarray(coarse).resize(size), file_format, exif=make_exif(orientation))


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(
    ("size", "drafted"),
    [((800, 600), (100, 75)), ((401, 299), (101, 75)), ((190, 80), (190, 80)), ((30, 700), (8, 175))],
)
def test_a_draft_fills_the_canvas_and_keeps_the_size_of_the_image(size, drafted, orientation):
    content = make_photo(size, orientation)
    decoded, _ = read_image(content, draft_size=(96, 96))
    turned = slice(None, None, -1 if orientation == 6 else 1)
    assert decoded.size == drafted[turned]
    exact, draft = (
        ReSTRImageProcessor(size=96, jpeg_draft=jpeg_draft)(content, return_tensors="np")
        for jpeg_draft in (False, True)
    )
    assert draft["original_sizes"].tolist() == exact["original_sizes"].tolist() == [list(size[turned][::-1])]
    difference = np.abs(draft["pixel_values"] - exact["pixel_values"])
    assert difference.mean() < 0.02 and (difference.max() > 0) == (drafted != size)


def test_a_draft_is_taken_on_request_and_of_unopened_jpeg_files_only():
    processor = ReSTRImageProcessor(size=96)
    assert processor.jpeg_draft is False
    photo, drawing = make_photo((800, 600), 1), make_photo((800, 600), 1, "PNG")
    opened = Image.open(io.BytesIO(photo))
    for source, options in ((opened, {}), (drawing, {}), (photo, {"do_resize": False})):
        exact, draft = (
            processor(source, jpeg_draft=on, return_tensors="np", **options)["pixel_values"] for on in (False, True)
        )
        np.testing.assert_array_equal(draft, exact)
    assert opened.size == (800, 600)
    with pytest.raises(ValueError, match="True or False as jpeg_draft"):
        ReSTRImageProcessor(jpeg_draft=8)(photo)


def test_images_in_memory_are_not_changed(processor):
    image = Image.open(io.BytesIO(encode(IMAGE, exif=make_exif(6))))
    assert processor(image)["original_sizes"] == [(20, 12)]
    assert image.size == (20, 12) and image.getexif()[0x0112] == 6
