"""Rows of the canonical format, compared with Pillow and NumPy."""

import io
import logging
import re
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
from pictures import encode, make_exif
from PIL import EpsImagePlugin, ExifTags, Image

from modeling_restr.data.canonical import (
    FEATURES,
    AnnotatedImage,
    AnnotatedReference,
    BadImage,
    ImageInDataset,
    build_dataset,
    build_row,
    build_row_or_error,
    check_distinct_files,
    check_images,
)
from modeling_restr.data.records import Problems
from modeling_restr.data.segmentation import SeveralObjects, decode_mask, encode_mask


HEIGHT, WIDTH = 24, 32


def random_mask(seed=0, size=(HEIGHT, WIDTH)):
    return np.random.default_rng(seed).random(size) < 0.4


def random_pixels(seed=0, size=(HEIGHT, WIDTH)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def write_image(path, pixels=None, orientation=None, mode="RGB", **kwargs):
    image = Image.fromarray(random_pixels() if pixels is None else pixels).convert(mode)
    image.save(path, exif=make_exif(orientation), **kwargs)
    return path


def annotate(path, mask=None, size=(HEIGHT, WIDTH), image_id=7, bbox=None):
    segmentation = random_mask(size=size) if mask is None else mask
    reference = AnnotatedReference(11, 22, "dog", segmentation, ((33, "the dog"), (34, "left dog")), bbox)
    return AnnotatedImage(image_id, Path(path).name, path, (reference,), size)


def decoded(row):
    """The image of a row as a user of `datasets` gets it."""
    return FEATURES["image"].decode_example(row["image"])


@pytest.mark.parametrize("embed", [True, False])
def test_row_of_a_good_image(tmp_path, embed):
    path = write_image(tmp_path / "a.jpg")
    mask = random_mask()
    row = build_row(annotate(path, mask, bbox=[1, 2, 3.3, 2**24 + 1]), embed=embed)
    assert row["image"] == (
        {"bytes": path.read_bytes(), "path": "a.jpg"} if embed else {"bytes": None, "path": str(path)}
    )
    assert (row["image_id"], row["file_name"]) == (7, "a.jpg")
    assert row["references"] == [
        {
            "ref_id": 11,
            "ann_id": 22,
            "category": "dog",
            "bbox": np.float32([1, 2, 3.3, 2**24 + 1]).tolist(),  # as `FEATURES` stores them
            "mask": encode_mask(mask),
            "expressions": [{"sent_id": 33, "text": "the dog"}, {"sent_id": 34, "text": "left dog"}],
        }
    ]


def test_a_missing_box_is_that_of_the_mask(tmp_path):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[4:10, 7:20] = True
    row = build_row(annotate(write_image(tmp_path / "a.png"), mask))
    assert row["references"][0]["bbox"] == [7, 4, 13, 6]
    row = build_row(annotate(write_image(tmp_path / "a.png"), []))
    assert row["references"][0]["bbox"] == [0, 0, 0, 0]
    for bbox in ([1, 2, 3], [1, 2, 3, float("nan")], [1, 2, 3, None], 5, [1, 2, 3, 10**400], [[1], 2, 3, 4], "1234"):
        with pytest.raises(BadImage, match=r"a\.png: ref_id 11: A bbox must be \[x, y, width, height\]"):
            build_row(annotate(write_image(tmp_path / "a.png"), mask, bbox=bbox))


@pytest.mark.parametrize(
    ("name", "mode"), [("a.png", "L"), ("a.png", "P"), ("a.png", "1"), ("a.png", "RGBA"), ("a.jpg", "CMYK")]
)
def test_grey_palette_and_other_images_are_kept(tmp_path, name, mode):
    path = write_image(tmp_path / name, mode=mode)
    image = decoded(build_row(annotate(path)))
    assert image.mode == mode
    assert np.array_equal(np.asarray(image), np.asarray(Image.open(path)))


@pytest.mark.parametrize(
    ("name", "mode", "orientation"),
    [("a.jpg", "RGB", 5), ("a.jpg", "L", 6), ("a.jpg", "CMYK", 7), ("a.png", "P", 8), ("a.webp", "RGB", 6)],
)
def test_annotations_of_a_rotated_photo_as_stored(tmp_path, name, mode, orientation):
    """The annotation program ignored EXIF, so users get exactly the stored image."""
    path = write_image(tmp_path / name, mode=mode, orientation=orientation)
    mask = random_mask()
    for embed in (True, False):
        row = build_row(annotate(path, mask), embed=embed)
        image = decoded(row)
        assert image.size == (WIDTH, HEIGHT)
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(path)))
        assert np.array_equal(decode_mask(row["references"][0]["mask"]), mask)


def test_orientation_in_xmp_counts_as_in_exif(tmp_path):
    packet = '<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="6"></x:xmpmeta>'
    path = write_image(tmp_path / "a.jpg", xmp=packet.encode())
    assert Image.open(path).getexif()[ExifTags.Base.Orientation] == 6
    image = decoded(build_row(annotate(path)))
    assert np.array_equal(np.asarray(image), np.asarray(Image.open(path)))


def test_a_photo_that_is_written_again_keeps_its_other_exif_data(tmp_path):
    exif = make_exif(6)
    exif[ExifTags.Base.Make] = "Camera"
    Image.fromarray(random_pixels()).save(tmp_path / "a.jpg", exif=exif)
    written = build_row(annotate(tmp_path / "a.jpg"))["image"]["bytes"]
    assert dict(Image.open(io.BytesIO(written)).getexif()) == {ExifTags.Base.Make: "Camera"}


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
@pytest.mark.parametrize("stated", [True, False])
def test_annotations_of_a_rotated_photo_as_shown(tmp_path, orientation, stated):
    path = write_image(tmp_path / "a.jpg", orientation=orientation)
    mask = random_mask(size=(WIDTH, HEIGHT))
    annotated = annotate(path, mask, size=(WIDTH, HEIGHT))
    if not stated:
        annotated = AnnotatedImage(7, "a.jpg", path, annotated.references)
    row = build_row(annotated)
    assert row["image"]["bytes"] == path.read_bytes()
    stored = Image.open(path)
    transforms = {5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270}
    transforms |= {7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90}
    shown = stored.transpose(transforms[orientation])
    assert shown.size == (HEIGHT, WIDTH)
    assert np.array_equal(np.asarray(decoded(row)), np.asarray(shown))
    assert np.array_equal(decode_mask(row["references"][0]["mask"]), mask)


def test_wrong_size_is_explained(tmp_path):
    path = write_image(tmp_path / "a.jpg")
    message = r"a\.jpg: decodes to \(24, 32\) \(height, width\), its annotations are for \(24, 33\)"
    with pytest.raises(BadImage, match=message):
        build_row(annotate(path, size=(HEIGHT, WIDTH + 1)))
    with pytest.raises(BadImage, match=r"\(32, 24\)"):
        build_row(annotate(path, size=(WIDTH, HEIGHT)))
    rotated = write_image(tmp_path / "b.jpg", orientation=6)
    with pytest.raises(BadImage, match=r"b\.jpg: decodes to \(32, 24\)"):
        build_row(annotate(rotated, size=(HEIGHT, WIDTH + 1)))
    unstated = AnnotatedImage(7, "a.jpg", path, annotate(path, size=(HEIGHT, WIDTH + 1)).references)
    with pytest.raises(BadImage, match=r"a\.jpg: ref_id 11: The mask is of size \(24, 33\)"):
        build_row(unstated)


@pytest.mark.parametrize("extension", ["jpg", "png", "gif", "webp", "bmp"])
def test_truncated_images_never_pass(tmp_path, extension):
    whole = encode(Image.fromarray(random_pixels()), {"jpg": "JPEG"}.get(extension, extension))
    path = tmp_path / f"a.{extension}"
    for share in np.linspace(0, 0.9, 10):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(BadImage, match=rf"^a\.{extension}: cannot be decoded \("):
            build_row(annotate(path))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_images_are_bad_or_decode_to_their_size(tmp_path):
    """No error of Pillow on a damaged file stops a run over many images."""
    rng = np.random.default_rng(0)
    path = tmp_path / "a.tiff"
    num_bad = 0
    for image_format in ("TIFF", "PNG", "JPEG", "AVIF"):
        whole = encode(Image.fromarray(random_pixels()), image_format)
        for _ in range(60):
            damaged = np.frombuffer(whole, np.uint8).copy()
            damaged[rng.integers(0, min(400, damaged.size), 8)] = rng.integers(0, 256, 8)
            path.write_bytes(damaged.tobytes())
            try:
                assert decoded(build_row(annotate(path))).size == (WIDTH, HEIGHT)
            except BadImage:
                num_bad += 1
    assert num_bad > 100


def test_missing_and_unreadable_images_are_bad(tmp_path):
    with pytest.raises(BadImage, match=r"^a\.jpg: missing \(.*a\.jpg\)$"):
        build_row(annotate(tmp_path / "a.jpg"))
    (tmp_path / "b.jpg").write_text("<html>Not found</html>")
    with pytest.raises(BadImage, match=r"^b\.jpg: cannot be decoded \(not of a known format, such as JPEG or PNG\)$"):
        build_row(annotate(tmp_path / "b.jpg"))
    (tmp_path / "c.jpg").mkdir()
    with pytest.raises(BadImage, match=r"^c\.jpg: cannot be read \(it is not a regular file\)$"):
        build_row(annotate(tmp_path / "c.jpg"))


def test_objects_need_a_pixel_but_sentences_about_nothing_have_an_empty_mask(tmp_path):
    path = write_image(tmp_path / "a.png")
    for segmentation in (
        np.zeros((HEIGHT, WIDTH)),
        [[-9, -9, -3, -9, -3, -1]],
        [[]],
        {"size": [24, 32], "counts": [768]},
    ):
        with pytest.raises(BadImage, match=r"^a\.png: ref_id 11: ") as error:
            build_row(annotate(path, segmentation))
        assert error.value.problem == "images with an object without a usable mask or box"
    assert not decode_mask(build_row(annotate(path, []))["references"][0]["mask"]).any()
    box = [[3, 5, 13, 5, 13, 17, 3, 17]]
    with pytest.raises(BadImage, match=r"a\.png: ref_id 11: The object covers no pixel"):
        build_row(annotate(path, SeveralObjects((box, [[3, 3, 9, 3, 9, 3]]))))


def test_segmentations_of_any_type_make_bad_images(tmp_path):
    path = write_image(tmp_path / "a.png")
    for segmentation in ({}, 5, "x", [5], [[None]], [["1", "2"] * 4], {"size": 1, "counts": {}}):
        with pytest.raises(BadImage, match=r"^a\.png: ref_id 11: "):
            build_row(annotate(path, segmentation))


def test_eps_programs_are_not_run(tmp_path, monkeypatch):
    Image.fromarray(random_pixels()).save(tmp_path / "a.jpg", format="EPS")
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args: pytest.fail("it was run"))
    with pytest.raises(BadImage, match=r"^a\.jpg: cannot be decoded \(EPS files are programs, which are not run\)$"):
        build_row(annotate(tmp_path / "a.jpg"))


def test_images_outside_of_their_folder_are_bad(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    annotated = annotate(write_image(tmp_path / "a.png"))
    assert build_row(replace(annotated, image_dir=tmp_path)) == build_row(annotated)
    for path in (annotated.image, inside / "../a.png"):
        with pytest.raises(
            BadImage, match=r"^a\.png: cannot be read \(it leads out of the folder of the images, .*inside"
        ):
            build_row(replace(annotated, image=path, image_dir=inside))


def test_images_that_share_a_file_are_refused_wherever_they_are(tmp_path):
    first = annotate(write_image(tmp_path / "a.png"))
    held = replace(first, image=ImageInDataset(datasets.Dataset.from_dict({"image": [None]}), 0))
    check_distinct_files([held, first, first, held])
    with pytest.raises(ValueError, match=r"one file per image, found .*a\.png for image 7 .* and for image 8"):
        check_distinct_files([held, first, replace(first, image_id=8)])


def test_images_in_a_dataset(tmp_path):
    paths = [write_image(tmp_path / f"{index}.png", random_pixels(index)) for index in range(2)]
    features = datasets.Features({"photo": datasets.Image(decode=False)})
    rows = [{"bytes": None, "path": str(paths[0])}, {"bytes": paths[1].read_bytes(), "path": None}]
    source = datasets.Dataset.from_dict({"photo": rows}, features=features)
    for index, path in enumerate(paths):
        row = build_row(annotate(path))
        held = AnnotatedImage(7, path.name, ImageInDataset(source, index, "photo"), annotate(path).references)
        assert build_row(held) == build_row(held, embed=False) == row
    paths[0].unlink()
    with pytest.raises(BadImage, match=r"0\.png: missing"):
        build_row(AnnotatedImage(7, "0.png", ImageInDataset(source, 0, "photo"), ()))
    source = datasets.Dataset.from_dict({"photo": [None]}, features=features)
    with pytest.raises(BadImage, match=r"0\.png: cannot be read \(its row holds no image\)"):
        build_row(AnnotatedImage(7, "0.png", ImageInDataset(source, 0, "photo"), ()))


def test_an_error_is_returned_in_place_of_its_row(tmp_path):
    good, problems = annotate(write_image(tmp_path / "a.png"), [[1, 2], [3, 5, 13, 5, 13, 17, 3, 17]]), Problems()
    missing = annotate(tmp_path / "b.png")
    assert build_row_or_error(good, problems) == build_row(good)  # with the bytes of its file
    assert build_row_or_error(good, problems, embed=False) == build_row(good, embed=False) != build_row(good)
    assert str(build_row_or_error(missing, problems)).startswith("b.png: missing")
    stray = "polygons of one or two points, dropped"
    assert problems == {stray: ["a.png: ref_id 11"] * 2, "missing images": ["b.png"]}


def test_progress_is_shown_unless_it_is_turned_off(tmp_path, monkeypatch, capsys):
    images = [annotate(write_image(tmp_path / "a.png"))]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    build_dataset(images, progress=False)
    assert capsys.readouterr().err == ""
    build_dataset(images)
    assert re.search(r"Images: 100%.* 1/1 .*image", capsys.readouterr().err)


@pytest.fixture
def warnings(caplog):
    """Records the warnings of `datasets`, whose logger does not propagate."""
    logger = logging.getLogger("datasets")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def test_repeated_ids_are_named_up_to_ten(tmp_path, warnings):
    first = annotate(tmp_path / "0.png")
    check_images([first, replace(first, references=())], "toys.json")  # one image in two entries
    assert not warnings.records
    check_images([first, annotate(tmp_path / "1.png")], "toys.json")
    images, references = (record.message for record in warnings.records)
    assert images == "toys.json: 1 ids of images occur more than once, and each occurrence is counted (7)."
    assert references == "toys.json: 1 ids of references occur more than once, and each occurrence is counted (11)."
    many = [annotate(tmp_path / f"{number}.png", image_id=number // 2) for number in range(22)]
    check_images([replace(image, references=()) for image in many], "toys.json")
    assert "11 ids of images" in warnings.messages[-1]
    assert "(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ...)" in warnings.messages[-1]


def test_bad_images_stop_the_build_or_are_left_out_with_a_warning(tmp_path, warnings):
    images = [
        annotate(write_image(tmp_path / f"{letter}.png", random_pixels(index)), random_mask(index), image_id=index)
        for index, letter in enumerate("abcde")
    ]
    (tmp_path / "b.png").unlink()
    (tmp_path / "c.png").write_bytes((tmp_path / "a.png").read_bytes()[:500])
    write_image(tmp_path / "e.png", random_pixels(0, (8, 8)))
    with pytest.raises(BadImage, match=r"(?s)^3 images .* skip_bad=True .*\n  b\.png: mis.*\n  c\.png: c.*\n  e\.png"):
        build_dataset(images, progress=False)
    dataset = build_dataset(images, skip_bad=True, progress=False)
    assert dataset["image_id"][:] == [0, 3]
    assert [record.levelname for record in warnings.records] == ["WARNING"]
    assert all(text in warnings.text for text in ("Left out 3 images", "b.png: missing", "c.png", "e.png"))
    summary = "missing images: 1 (b.png)\nimages that cannot be decoded: 1 (c.png)\nimages of another size"
    assert summary in warnings.text
    none_left = build_dataset(images[1:3], skip_bad=True, progress=False)
    assert len(none_left) == 0 and none_left.features == FEATURES


def test_doubtful_parts_of_good_images_are_reported(tmp_path, warnings):
    stray = annotate(write_image(tmp_path / "a.png"), [[1, 2], [3, 5, 13, 5, 13, 17, 3, 17], [1, 2, 3, 4]])
    rotated = annotate(write_image(tmp_path / "b.jpg", orientation=6))
    assert len(build_dataset([stray, rotated, stray], progress=False)) == 3
    for line in (
        f"polygons of one or two points, dropped: 4 ({', '.join(['a.png: ref_id 11'] * 4)})",
        "images with an EXIF rotation that the annotations ignore (look at some): 1 (b.jpg)",
    ):
        assert line in warnings.text
    assert "Left out" not in warnings.text


def test_dataset_reads_images_from_their_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = [
        annotate(write_image(Path(f"{index}.png"), random_pixels(index)), random_mask(index), image_id=index)
        for index in range(3)
    ]
    dataset = build_dataset(images, progress=False)
    assert dataset.features == FEATURES
    monkeypatch.chdir("/")
    for index, row in enumerate(dataset):
        assert np.array_equal(np.asarray(row["image"]), random_pixels(index))
        assert (row["image_id"], row["file_name"]) == (index, f"{index}.png")
        assert np.array_equal(decode_mask(row["references"][0]["mask"]), random_mask(index))
        assert row["references"][0]["expressions"][1] == {"sent_id": 34, "text": "left dog"}
    undecoded = dataset.cast_column("image", datasets.Image(decode=False))
    assert undecoded[1]["image"] == {"bytes": None, "path": str(tmp_path / "1.png")}
