"""The canonical form against pycocotools, Pillow and masks that NumPy draws."""

import io
import logging
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import ExifTags, Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from modeling_restr.data.canonical import (
    FEATURES,
    AnnotatedImage,
    AnnotatedReference,
    BadImage,
    ImageInDataset,
    build_dataset,
    build_row,
    build_rows,
    decode_mask,
    encode_mask,
    segmentation_to_rle,
)


HEIGHT, WIDTH = 24, 32
BOX = [3.0, 5.0, 13.0, 5.0, 13.0, 17.0, 3.0, 17.0]
TRIANGLE = [18.5, 4.0, 30.0, 20.5, 16.0, 21.0]


def random_mask(seed=0, size=(HEIGHT, WIDTH)):
    return np.random.default_rng(seed).random(size) < 0.4


def run_lengths(mask):
    """COCO's uncompressed RLE by its definition: run lengths in column order, the first of them outside."""
    pixels = mask.flatten(order="F")
    starts = np.flatnonzero(np.diff(pixels)) + 1
    counts = np.diff([0, *starts, pixels.size]).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if pixels[0] else counts}


def coco_annotation_mask(segmentation, size=(HEIGHT, WIDTH)):
    """The mask of an annotation as pycocotools' own API makes it."""
    coco = COCO()
    coco.imgs = {1: {"id": 1, "height": size[0], "width": size[1]}}
    return coco.annToMask({"image_id": 1, "segmentation": segmentation}).astype(bool)


def random_pixels(seed=0, size=(HEIGHT, WIDTH)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def write_image(path, pixels=None, orientation=None, mode="RGB", **kwargs):
    exif = Image.Exif()
    if orientation is not None:
        exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(random_pixels() if pixels is None else pixels).convert(mode).save(path, exif=exif, **kwargs)
    return path


def annotate(path, mask=None, size=(HEIGHT, WIDTH), image_id=7, bbox=None):
    segmentation = random_mask(size=size) if mask is None else mask
    reference = AnnotatedReference(11, 22, "dog", segmentation, ((33, "the dog"), (34, "left dog")), bbox)
    return AnnotatedImage(image_id, Path(path).name, path, (reference,), size)


def decoded(row):
    """The image of a row as a user of `datasets` gets it."""
    return FEATURES["image"].decode_example(row["image"])


# Masks


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


def test_no_parts_are_an_empty_mask():
    assert segmentation_to_rle([], (HEIGHT, WIDTH)) == encode_mask(np.zeros((HEIGHT, WIDTH)))


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        (random_mask(size=(WIDTH, HEIGHT)), r"size \(32, 24\) .* its image of \(24, 32\)"),
        (run_lengths(random_mask(size=(WIDTH, HEIGHT))), r"size \(32, 24\) .* its image of \(24, 32\)"),
        ([BOX, encode_mask(random_mask(size=(WIDTH, HEIGHT)))], r"size \(32, 24\) .* its image of \(24, 32\)"),
        ([[1.0, 2.0, 3.0, 4.0]], "at least 3 points"),
        ([BOX[:7]], "at least 3 points"),
        ([[*BOX[:7], float("nan")]], "at least 3 points"),
        (BOX, "at least 3 points"),
        ([[BOX]], "at least 3 points"),
        ({"counts": [768]}, r"must have size and counts, got \['counts'\]"),
        ({"size": [HEIGHT, WIDTH], "counts": [30, 40]}, r"size \[24, 32\] cover 70 pixels"),
        ({"size": [HEIGHT, WIDTH], "counts": [700, 100]}, "cover 800 pixels"),
        ([BOX, {"size": [HEIGHT, WIDTH], "counts": ""}], "cover 0 pixels"),
        ({"size": [HEIGHT, WIDTH], "counts": "a"}, "damaged: 'a'"),
        ({"size": [HEIGHT, WIDTH], "counts": "~~"}, "damaged"),
        ({"size": [HEIGHT, WIDTH], "counts": "O"}, "damaged"),  # a run of -1
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


# Rows


@pytest.mark.parametrize("embed", [True, False])
def test_row_of_a_good_image(tmp_path, embed):
    path = write_image(tmp_path / "a.jpg")
    mask = random_mask()
    row = build_row(annotate(path, mask, bbox=[1, 2, 3.5, 4]), embed=embed)
    assert row["image"] == (
        {"bytes": path.read_bytes(), "path": "a.jpg"} if embed else {"bytes": None, "path": str(path)}
    )
    assert (row["image_id"], row["file_name"]) == (7, "a.jpg")
    assert row["references"] == [
        {
            "ref_id": 11,
            "ann_id": 22,
            "category": "dog",
            "bbox": [1, 2, 3.5, 4],
            "mask": encode_mask(mask),
            "expressions": [{"sent_id": 33, "text": "the dog"}, {"sent_id": 34, "text": "left dog"}],
        }
    ]


def test_box_of_the_mask_stands_in_for_a_missing_one(tmp_path):
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[4:10, 7:20] = True
    row = build_row(annotate(write_image(tmp_path / "a.png"), mask))
    assert row["references"][0]["bbox"] == [7, 4, 13, 6]
    row = build_row(annotate(write_image(tmp_path / "a.png"), []))
    assert row["references"][0]["bbox"] == [0, 0, 0, 0]
    for bbox in ([1, 2, 3], [1, 2, 3, float("nan")], [1, 2, 3, None]):
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
    ("name", "mode"), [("a.jpg", "RGB"), ("a.jpg", "L"), ("a.jpg", "CMYK"), ("a.png", "P"), ("a.webp", "RGB")]
)
@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_annotations_of_a_turned_photo_as_it_is_stored(tmp_path, name, mode, orientation):
    """They were made by a program that ignores EXIF: users have to get the image as it is stored, to the pixel."""
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


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
@pytest.mark.parametrize("stated", [True, False])
def test_annotations_of_a_turned_photo_as_it_is_shown(tmp_path, orientation, stated):
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
    turned = write_image(tmp_path / "b.jpg", orientation=6)
    with pytest.raises(BadImage, match=r"b\.jpg: decodes to \(32, 24\)"):
        build_row(annotate(turned, size=(HEIGHT, WIDTH + 1)))
    unstated = AnnotatedImage(7, "a.jpg", path, annotate(path, size=(HEIGHT, WIDTH + 1)).references)
    with pytest.raises(BadImage, match=r"a\.jpg: ref_id 11: The mask is of size \(24, 33\)"):
        build_row(unstated)


@pytest.mark.parametrize("extension", ["jpg", "png", "gif", "webp", "bmp"])
def test_truncated_images_never_pass(tmp_path, extension):
    buffer = io.BytesIO()
    Image.fromarray(random_pixels()).save(buffer, format={"jpg": "JPEG"}.get(extension, extension))
    whole = buffer.getvalue()
    path = tmp_path / f"a.{extension}"
    for share in np.linspace(0, 0.9, 10):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(BadImage, match=rf"^a\.{extension}: cannot be decoded \("):
            build_row(annotate(path))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_images_are_bad_images_or_decode_to_their_size(tmp_path):
    """Whatever Pillow raises on a damaged file, a run over many images goes on."""
    rng = np.random.default_rng(0)
    path = tmp_path / "a.tiff"
    num_bad = 0
    for image_format in ("TIFF", "PNG", "JPEG", "AVIF"):
        buffer = io.BytesIO()
        Image.fromarray(random_pixels()).save(buffer, format=image_format)
        for _ in range(60):
            damaged = np.frombuffer(buffer.getvalue(), np.uint8).copy()
            damaged[rng.integers(0, min(400, damaged.size), 8)] = rng.integers(0, 256, 8)
            path.write_bytes(damaged.tobytes())
            try:
                assert decoded(build_row(annotate(path))).size == (WIDTH, HEIGHT)
            except BadImage:
                num_bad += 1
    assert num_bad > 100


def test_no_image_at_all(tmp_path):
    with pytest.raises(BadImage, match=r"^a\.jpg: missing \(.*a\.jpg\)$"):
        build_row(annotate(tmp_path / "a.jpg"))
    (tmp_path / "b.jpg").write_text("<html>Not found</html>")
    with pytest.raises(BadImage, match=r"^b\.jpg: cannot be decoded \(not an image\)$"):
        build_row(annotate(tmp_path / "b.jpg"))
    (tmp_path / "c.jpg").mkdir()
    with pytest.raises(BadImage, match=r"^c\.jpg: cannot be decoded"):
        build_row(annotate(tmp_path / "c.jpg"))


def test_images_that_a_dataset_holds(tmp_path):
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


# Datasets


def annotate_many(folder):
    """Five images, of which the second is missing, the third cut short and the fifth of another size."""
    names = [f"{letter}.png" for letter in "abcde"]
    images = [
        annotate(write_image(folder / name, random_pixels(index)), random_mask(index), image_id=index)
        for index, name in enumerate(names)
    ]
    (folder / "b.png").unlink()
    (folder / "c.png").write_bytes((folder / "a.png").read_bytes()[:500])
    write_image(folder / "e.png", random_pixels(0, (8, 8)))
    return images


@pytest.mark.parametrize("num_threads", [1, 3])
def test_bad_images_are_named_in_order(tmp_path, num_threads):
    images = annotate_many(tmp_path)
    rows, bad = build_rows(images, num_threads=num_threads, progress=False)
    assert [row["file_name"] for row in rows] == ["a.png", "d.png"]
    assert [problem[:9] for problem in bad] == ["b.png: mi", "c.png: ca", "e.png: de"]
    with pytest.raises(BadImage, match=r"(?s)3 images cannot be used; skip_bad=True .*b\.png.*c\.png.*e\.png"):
        build_dataset(images, progress=False)


def test_bad_images_are_left_out_with_a_warning(tmp_path, caplog):
    images = annotate_many(tmp_path)
    logger = logging.getLogger("datasets")
    logger.addHandler(caplog.handler)  # `datasets` keeps its records from the root logger
    try:
        dataset = build_dataset(images, skip_bad=True, progress=False)
    finally:
        logger.removeHandler(caplog.handler)
    assert dataset["image_id"][:] == [0, 3]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert all(text in caplog.text for text in ("Left out 3 images", "b.png: missing", "c.png", "e.png"))
    none_left = build_dataset(images[1:3], skip_bad=True, progress=False)
    assert len(none_left) == 0
    assert none_left.features == FEATURES


def make_dataset(folder, num_images=4):
    return build_dataset(
        [
            annotate(write_image(folder / f"{index}.png", random_pixels(index)), random_mask(index), image_id=index)
            for index in range(num_images)
        ],
        progress=False,
    )


def check_row(row, index):
    assert np.array_equal(np.asarray(row["image"]), random_pixels(index))
    assert row["image_id"] == index
    assert row["file_name"] == f"{index}.png"
    assert np.array_equal(decode_mask(row["references"][0]["mask"]), random_mask(index))
    assert row["references"][0]["expressions"][1] == {"sent_id": 34, "text": "left dog"}


def test_dataset_reads_images_from_their_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dataset = make_dataset(Path("."))
    assert dataset.features == FEATURES
    monkeypatch.chdir("/")
    for index, row in enumerate(dataset):
        check_row(row, index)
    undecoded = dataset.cast_column("image", datasets.Image(decode=False))
    assert undecoded[1]["image"] == {"bytes": None, "path": str(tmp_path / "1.png")}


def test_parquet_embeds_streams_and_filters(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    rows, _ = build_rows(
        [
            annotate(write_image(images / f"{index}.png", random_pixels(index)), random_mask(index), image_id=index)
            for index in range(4)
        ],
        progress=False,
    )
    datasets.Dataset.from_list(rows, features=FEATURES).to_parquet(tmp_path / "data.parquet")
    for file in images.iterdir():
        file.unlink()

    arguments = {"data_files": str(tmp_path / "data.parquet"), "split": "train", "cache_dir": str(tmp_path / "cache")}
    loaded = datasets.load_dataset("parquet", **arguments)
    assert loaded.features == FEATURES
    streamed = datasets.load_dataset("parquet", streaming=True, **arguments)
    assert streamed.features == FEATURES
    for dataset in (loaded, streamed):
        for index, row in enumerate(dataset):
            check_row(row, index)
        assert index == 3
        odd = list(dataset.filter(lambda row: row["image_id"] % 2 == 1))
        assert [row["image_id"] for row in odd] == [1, 3]
        check_row(odd[1], 3)
