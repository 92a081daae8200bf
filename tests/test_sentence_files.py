"""Photos and sentences in JSONL and CSV files: rows with the right masks, and errors that name the line."""

import json

import numpy as np
import pytest
from annotated_images import write_photo
from coco_annotations import run_lengths
from PIL import Image

from modeling_restr.data import build_dataset, decode_mask, encode_mask, load_sentences, read_sentences
from modeling_restr.data.canonical import BadImage
from modeling_restr.data.records import Problems


SIZE = (40, 50)  # (height, width)
MASK = np.zeros(SIZE, dtype=bool)
MASK[10:20, 5:25] = True
OUTLINE = [5, 10, 25, 10, 25, 20, 5, 20]
POINTS = np.reshape(OUTLINE, (-1, 2)).tolist()


@pytest.fixture
def folder(tmp_path):
    """With photos/a.jpg, photos/b.jpg and masks/a.png."""
    for seed, name in enumerate("ab"):
        write_photo(tmp_path / "photos" / f"{name}.jpg", seed, SIZE)
    save_mask(tmp_path, "masks/a.png")
    return tmp_path


def save_mask(folder, name, mask=None, value=255):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.where(MASK if mask is None else mask, value, 0).astype(np.uint8)).save(path)


def write_lines(folder, *lines, name="own.jsonl"):
    path = folder / name
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def read(path, **options):
    """{split: rows}."""
    splits = read_sentences(path, path.parent / "photos", **options)
    return {split: list(build_dataset(images, progress=False)) for split, images in splits.items()}


def line(**columns):
    return {"image": "a.jpg", "sentence": "the dog", **columns}


def test_masks_in_every_form_are_one_mask(folder):
    forms = [
        {"mask": "masks/a.png"},
        {"polygon": OUTLINE},
        {"polygon": POINTS},
        {"polygon": [OUTLINE, [1, 1]]},
        {"rle": encode_mask(MASK)},
        {"rle": run_lengths(MASK)},
        {"box": [5, 10, 20, 10]},
    ]
    path = write_lines(folder, *(line(sentence=f"dog {number}", **form) for number, form in enumerate(forms)), "")
    (row,) = read(path, val_share=0, boxes_as_masks=True)["train"]
    assert (row["file_name"], row["image"].size) == ("a.jpg", (50, 40))
    assert [reference["expressions"][0]["text"] for reference in row["references"]] == [f"dog {n}" for n in range(7)]
    for reference in row["references"]:
        np.testing.assert_array_equal(decode_mask(reference["mask"]), MASK)


def test_csv_and_jsonl_give_the_same_rows(folder):
    header, *cells = (
        ("image", "sentence", "mask", "polygon", "note"),
        ("a.jpg", "the dog, on the left", "masks/a.png", "", "x"),
        ("b.jpg", 'the "big" dog', "", json.dumps(OUTLINE), ""),
        ("a.jpg", "großer Hund", "masks/a.png", "", ""),
    )
    expected = read(write_lines(folder, *(dict(zip(header, row)) for row in cells)), val_share=0)
    images, (first, second) = [row["file_name"] for row in expected["train"]], expected["train"]
    assert images == ["a.jpg", "b.jpg"]
    assert [e["text"] for e in first["references"][0]["expressions"]] == ["the dog, on the left", "großer Hund"]
    assert [e["sent_id"] for e in first["references"][0]["expressions"]] == [1, 3]
    assert (second["references"][0]["ref_id"], len(first["references"])) == (2, 1)
    for delimiter in ",;\t":
        rows = [delimiter.join('"' + cell.replace('"', '""') + '"' for cell in row) for row in (header, *cells)]
        (folder / "own.csv").write_text("\r\n".join(rows), encoding="utf-8-sig")  # as spreadsheets write it
        got = read(folder / "own.csv", val_share=0)["train"]
        for row, other in zip(got, expected["train"], strict=True):
            assert [[e["text"] for e in r["expressions"]] for r in row["references"]] == [
                [e["text"] for e in r["expressions"]] for r in other["references"]
            ]
            assert [r["mask"] for r in row["references"]] == [r["mask"] for r in other["references"]]


def test_spaces_around_cells_do_not_count(folder):
    path = folder / "own.csv"
    path.write_text('image, sentence, mask\na.jpg, "the dog, on the left", masks/a.png \n')
    ((row,),) = read(path, val_share=0).values()
    assert row["file_name"] == "a.jpg" and row["references"][0]["expressions"][0]["text"] == "the dog, on the left"
    assert decode_mask(row["references"][0]["mask"]).any()


def test_lines_that_repeat_another_are_counted(folder):
    problems = Problems()
    path = write_lines(folder, *[line(polygon=OUTLINE)] * 2, line(polygon=OUTLINE, sentence="it"))
    ((row,),) = read(path, val_share=0, problems=problems).values()
    assert [e["text"] for e in row["references"][0]["expressions"]] == ["the dog", "it"]
    assert problems == {"lines of own.jsonl that repeat another, dropped": ["line 2"]}


def test_splits_by_name_or_by_share(folder):
    two = [line(polygon=OUTLINE), line(polygon=OUTLINE, image="b.jpg")]
    named = read(write_lines(folder, two[0] | {"split": "test"}, two[1] | {"split": "train"}))
    assert {split: [row["file_name"] for row in rows] for split, rows in named.items()} == {
        "test": ["a.jpg"],
        "train": ["b.jpg"],
    }
    drawn = read(write_lines(folder, *two), val_share=1e-9)
    assert {split: len(rows) for split, rows in drawn.items()} == {"train": 1, "val": 1}  # never without any
    assert drawn["val"][0]["file_name"] == read(write_lines(folder, *reversed(two)))["val"][0]["file_name"]
    assert list(read(write_lines(folder, *two), val_share=0)) == ["train"]


def test_a_photo_is_in_one_split(folder):
    path = write_lines(folder, line(polygon=OUTLINE, split="val"), line(polygon=OUTLINE, split="train"))
    with pytest.raises(ValueError, match="line 2: expected split to be val, got train"):
        read_sentences(path, folder / "photos")
    path = write_lines(folder, line(polygon=OUTLINE, split="val"), line(polygon=OUTLINE, image="b.jpg"))
    with pytest.raises(ValueError, match="line 2: expected split to be a name, as other lines have, got None"):
        read_sentences(path, folder / "photos")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("{", "line 2: Expecting property name"),
        ("[" * 100_000, "line 2: .*recursion"),
        ("5", r"line 2: expected the fields \['image', 'sentence'\], got 5"),
        ({"image": "a.jpg"}, r"line 2: expected the fields \['image', 'sentence'\]"),
        (line(sentence=5), "line 2: expected sentence to be text, got 5"),
        (line(image=None), r"line 2: expected the fields"),
        (line(sentence="?!"), r"line 2: expected a sentence with words, got '\?!'"),
        (line(), "line 2: expected one of mask, polygon, rle, got none of them"),
        (line(polygon=OUTLINE, mask="masks/a.png"), "line 2: expected one of .*, got mask and polygon"),
        (line(mask=5), "line 2: expected mask to be text, got 5"),
        (line(split=5), "line 2: expected split to be text, got 5"),
        (line(polygon="here"), "line 2: expected polygon as JSON, got 'here'"),
        (line(polygon={}), r"line 2: expected polygon to be \[x0, y0, x1, y1, ...\], got {}"),
        (line(rle=[1, 2]), r"line 2: expected rle to be {\"size\": .*, got \[1, 2\]"),
        (line(box=[5, 10, 20, 10]), "line 2: expected one of .*, got a box: boxes_as_masks takes its rectangle"),
    ],
    ids=str,
)
def test_unusable_lines_are_named(folder, wrong, message):
    path = write_lines(folder, line(polygon=OUTLINE), wrong)
    with pytest.raises(ValueError, match=rf"own\.jsonl cannot be used(?s:.)*{message}"):
        read_sentences(path, folder / "photos")


def test_many_bad_lines_are_counted(folder):
    with pytest.raises(ValueError, match=r"line 20: (?s:.)*and 5 more$"):
        read_sentences(write_lines(folder, *["{}"] * 25), folder / "photos")


@pytest.mark.parametrize("box", [[5, 10, 20], "5", [1, 2, 3, "4"]], ids=str)
def test_boxes_are_four_numbers(folder, box):
    with pytest.raises(ValueError, match=r"line 1: expected box to be \[left, top, width, height\]"):
        read_sentences(write_lines(folder, line(box=box)), folder / "photos", boxes_as_masks=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,text\na.jpg,the dog\n", r"expected different columns, image and sentence among them, got \['image'"),
        ("image,sentence,image\n", "expected different columns"),
        ("", "expected different columns"),
        ("image,sentence\n", "at least one sentence in .*, found none"),
        ("image,sentence,mask\na.jpg,the dog, on the left,a.png\n", 'line 2: got 4 cells for 3 columns: write "a'),
        ('image,sentence\n"a.jpg"x,the dog\n', "line 2: not in CSV's format"),
        (b"image,sentence\na.jpg,gr\xfcn\n", "is not in UTF-8.*Save it as UTF-8"),
    ],
)
def test_unusable_csv_files(folder, text, message):
    path = folder / "own.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        load_sentences(path, folder / "photos")


def test_other_files_are_refused(folder):
    with pytest.raises(ValueError, match=r"Expected a file \.csv or \.jsonl, got .*own\.json"):
        read_sentences(write_lines(folder, "{}", name="own.json"))
    with pytest.raises(ValueError, match=r"Expected a file .*own\.jsonl, found none"):
        read_sentences(folder / "own.jsonl")
    with pytest.raises(ValueError, match="val_share must be between 0 and 1, got 2"):
        read_sentences(folder / "own.jsonl", val_share=2)


def test_a_long_outline_fits_a_cell_of_csv(folder):
    polygon = json.dumps([*OUTLINE] * 5000)
    (folder / "own.csv").write_text(f'image,sentence,polygon\na.jpg,the dog,"{polygon}"\n')
    assert len(polygon) > 131_072  # the limit of Python's reader
    assert len(read_sentences(folder / "own.csv", folder / "photos", val_share=0)["train"]) == 1


def test_unusable_photos_and_masks_make_bad_images(folder):
    rgb = np.zeros((*SIZE, 3), dtype=np.uint8)
    rgb[0, 0], rgb[0, 1] = (255, 0, 0), (0, 255, 0)
    Image.fromarray(rgb).save(folder / "masks" / "colours.png")
    save_mask(folder, "masks/empty.png", np.zeros(SIZE, dtype=bool))
    save_mask(folder, "masks/other.png", np.ones((41, 50), dtype=bool))
    save_mask(folder, "masks/soft.png", value=np.arange(50)[None] * 5)
    (folder / "masks" / "text.png").write_text("no picture")
    (folder / "masks" / "outside.png").symlink_to(__file__)
    for name, message in (
        ("colours", "must have two values"),
        ("soft", "must have two values"),
        ("empty", "covers no pixel"),
        ("other", r"is of size \(41, 50\)"),
        ("text", "cannot be read"),
        ("outside", "leads out of the folder"),
        ("absent", "is missing"),
    ):
        path = write_lines(folder, line(mask=f"masks/{name}.png"))
        with pytest.raises(BadImage, match=f"a.jpg: ref_id 1: .*{message}"):
            read(path, val_share=0)
    with pytest.raises(BadImage, match=r"c\.jpg: missing"):
        read(write_lines(folder, line(image="c.jpg", polygon=OUTLINE)), val_share=0)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "I;16", "transparent"])
def test_mask_pictures_of_every_mode(folder, mode):
    inside = MASK.astype(np.uint8)
    pictures = {
        "L": Image.fromarray(inside * 255),
        "P": Image.fromarray(inside),  # index 1
        "I;16": Image.fromarray(inside.astype(np.uint16) * 65535),
        "transparent": Image.fromarray(np.stack([inside * 0 + 9] * 3 + [inside * 255], axis=2)),
    }
    pictures["P"].putpalette([255, 255, 255, 128, 0, 0])
    picture = pictures.get(mode) or pictures["L"].convert(mode)
    picture.save(folder / "masks" / "mode.png")
    ((row,),) = read(write_lines(folder, line(mask="masks/mode.png")), val_share=0).values()
    np.testing.assert_array_equal(decode_mask(row["references"][0]["mask"]), MASK)


@pytest.mark.parametrize("column", ["image", "mask"])
def test_names_that_lead_to_one_file_are_refused(folder, column):
    names = ["x/a.jpg", "y/a.jpg"] if column == "image" else ["x/a.png", "y/a.png"]
    path = write_lines(folder, *(line(**{"mask": "masks/a.png", column: name}) for name in names))
    with pytest.raises(ValueError, match=rf"found .* for {names[0]} and {names[1]}"):
        read_sentences(path, folder / "photos", mask_dir=folder / "masks")


def test_one_photo_by_two_spellings_of_its_name(folder):
    path = write_lines(folder, line(polygon=OUTLINE), line(polygon=OUTLINE, image=".\\a.jpg", sentence="it"))
    ((row,),) = read(path, val_share=0).values()
    assert len(row["references"][0]["expressions"]) == 2


def test_sentences_without_masks_for_prediction(folder):
    path = write_lines(folder, line(), line(image="b.jpg", mask="masks/absent.png"), line(sentence="the cat"))
    rows = load_sentences(path, folder / "photos")
    assert rows["texts"] == [["the dog", "the cat"], ["the dog"]]
    assert rows["file_name"] == ["a.jpg", "b.jpg"]
    assert rows[1]["image"] == {"bytes": None, "path": str(folder / "photos" / "b.jpg")}
