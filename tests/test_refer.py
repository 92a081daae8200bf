"""REFER's layout, in files as Python 2 and 3 write them, compared with pycocotools."""

import json
import pickle
import struct
import tracemalloc

import numpy as np
import pytest
from coco_annotations import compress
from fresh_process import run_python
from PIL import Image
from pycocotools.coco import COCO

from modeling_restr.data import decode_mask, load_refer, read_refer
from modeling_restr.data.canonical import FEATURES, BadImage
from modeling_restr.data.refer import load_plain_pickle


HEIGHT, WIDTH = 24, 32
BOX = [3.0, 5.0, 13.0, 5.0, 13.0, 17.0, 3.0, 17.0]
TRIANGLE = [18.5, 4.0, 30.0, 20.5, 16.0, 21.0]
FILE_NAMES = {581857: "COCO_train2014_000000581857.jpg", 9: "COCO_train2014_000000000009.jpg"}


def compressed_rle(seed):
    return compress(np.random.default_rng(seed).random((HEIGHT, WIDTH)) < 0.3)


def make_annotation(ann_id, image_id, segmentation, category_id=1, iscrowd=0):
    bbox = [ann_id + 0.5, 1.0, 2.0, 3.25]
    fields = {"id": ann_id, "image_id": image_id, "category_id": category_id, "iscrowd": iscrowd, "area": 10.0}
    return fields | {"bbox": bbox, "segmentation": segmentation}


def make_ref(ref_id, ann_id, image_id, split="val", category_id=1, sentences=("the dog",)):
    sentences = [
        {"tokens": text.split(), "raw": f"{text.upper()}!", "sent": text, "sent_id": 10 * ref_id + index}
        for index, text in enumerate(sentences)
    ]
    return {
        "sent_ids": [sentence["sent_id"] for sentence in sentences],
        "file_name": FILE_NAMES.get(image_id, f"{image_id}.jpg").replace(".jpg", f"_{ref_id}.jpg"),
        "ann_id": ann_id,
        "ref_id": ref_id,
        "image_id": image_id,
        "split": split,
        "sentences": sentences,
        "category_id": category_id,
    }


def default_refs():
    return [
        make_ref(4, 40, 581857, category_id=18, sentences=("the dog", "left dog")),
        make_ref(2, 20, 9),
        make_ref(1, 10, 9, split="train"),
        make_ref(3, 30, 581857, sentences=("crowd",)),
        make_ref(5, 50, 9, split="testA"),
    ]


def default_instances():
    crowd = {"size": [HEIGHT, WIDTH], "counts": [30, 40, 100, 8, HEIGHT * WIDTH - 178]}
    return {
        "info": {"description": "made by a test"},
        "images": [
            {"id": key, "file_name": name, "height": HEIGHT, "width": WIDTH} for key, name in FILE_NAMES.items()
        ],
        "annotations": [
            make_annotation(10, 9, [BOX]),
            make_annotation(20, 9, [BOX, TRIANGLE]),
            make_annotation(30, 581857, crowd, iscrowd=1),
            make_annotation(40, 581857, compressed_rle(0), category_id=18),
            make_annotation(50, 9, [compressed_rle(1), compressed_rle(2)]),
        ],
        "categories": [{"id": 1, "name": "person"}, {"id": 18, "name": "dog", "supercategory": "animal"}],
    }


def write_refer(folder, refs=None, instances=None, split_by="unc"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"refs({split_by}).p").write_bytes(pickle.dumps(default_refs() if refs is None else refs, protocol=2))
    (folder / "instances.json").write_text(json.dumps(default_instances() if instances is None else instances))
    return folder


def write_images(folder, names=None):
    folder.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(names or FILE_NAMES.values()):
        pixels = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


@pytest.fixture
def data(tmp_path):
    write_refer(tmp_path / "data" / "refcoco")
    write_images(tmp_path / "train2014")
    return tmp_path


class Python2:
    """Writes the pickle that Python 2's cPickle writes with protocol 2: `bytes` here are its `str`."""

    def __init__(self):
        self.memo_size = 0

    def dumps(self, value):
        return b"\x80\x02" + self.opcodes(value) + b"."

    def opcodes(self, value):
        if isinstance(value, bool):
            return b"\x88" if value else b"\x89"
        if isinstance(value, int):
            return b"J" + struct.pack("<i", value)
        if isinstance(value, float):
            return b"G" + struct.pack(">d", value)
        if isinstance(value, bytes):
            short = b"U" + bytes([len(value)]) if len(value) < 256 else b"T" + struct.pack("<i", len(value))
            return short + value + self.put()
        if isinstance(value, str):
            encoded = value.encode()
            return b"X" + struct.pack("<i", len(encoded)) + encoded + self.put()
        if isinstance(value, list):
            return b"]" + self.put() + b"(" + b"".join(map(self.opcodes, value)) + b"e"
        items = [self.opcodes(part) for item in value.items() for part in item]
        return b"}" + self.put() + b"(" + b"".join(items) + b"u"

    def put(self):
        self.memo_size += 1
        return b"r" + struct.pack("<i", self.memo_size - 1)


def as_python2_str(value):
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, list):
        return [as_python2_str(part) for part in value]
    if isinstance(value, dict):
        return {as_python2_str(key): as_python2_str(part) for key, part in value.items()}
    return value


def test_images_and_references_are_read(data):
    images = read_refer(data / "data", data / "train2014")
    assert [(image.image_id, image.file_name) for image in images] == list(FILE_NAMES.items())  # in the file's order
    assert [[reference.ref_id for reference in image.references] for image in images] == [[4, 3], [2]]
    assert all(image.size == (HEIGHT, WIDTH) for image in images)
    assert images[1].image == data / "train2014" / FILE_NAMES[9]
    dog, crowd = images[0].references
    assert (dog.ann_id, dog.category, dog.bbox) == (40, "dog", [40.5, 1.0, 2.0, 3.25])
    assert dog.expressions == ((40, "the dog"), (41, "left dog"))
    assert (crowd.category, crowd.expressions) == ("person", ((30, "crowd"),))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_every_protocol_are_the_same(data, protocol):
    expected = read_refer(data / "data", data / "train2014")
    (data / "data/refcoco/refs(unc).p").write_bytes(pickle.dumps(default_refs(), protocol=protocol))
    assert read_refer(data / "data", data / "train2014") == expected


@pytest.mark.parametrize("convert", [as_python2_str, lambda refs: refs], ids=["str", "unicode"])
def test_pickles_of_python_2_are_the_same(data, convert):
    expected = read_refer(data / "data", data / "train2014")
    (data / "data/refcoco/refs(unc).p").write_bytes(Python2().dumps(convert(default_refs())))
    assert read_refer(data / "data", data / "train2014") == expected


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("café, naïve 犬", "café, naïve 犬"),
        ("café, naïve 犬".encode(), "café, naïve 犬"),
        ("café".encode("latin-1"), "café"),
        ("the man\u2019s café".encode("cp1252"), "the man\u2019s café"),
        ("é".encode() + "é".encode("latin-1"), "éé"),
        (300 * "é".encode(), 300 * "é"),
    ],
)
def test_accents_of_python_2_are_not_mangled(tmp_path, written, text):
    path = tmp_path / "text.p"
    path.write_bytes(Python2().dumps([written, {b"raw": written}, b"plain", 3, -1, 2.5, True]))
    assert load_plain_pickle(path) == [text, {"raw": text}, "plain", 3, -1, 2.5, True]


class Malicious:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_malicious_pickles_are_refused(data, protocol):
    path = data / "data/refcoco/refs(unc).p"
    marker = data / "marker"
    refs = default_refs()
    refs[0]["sentences"][0]["sent"] = Malicious(open, str(marker), "w")
    path.write_bytes(pickle.dumps(refs, protocol=protocol))
    pickle.loads(path.read_bytes())
    assert marker.exists()  # it is malicious
    marker.unlink()
    with pytest.raises(ValueError, match=r"refs\(unc\)\.p was refused: it asks for (io|_io)\.open"):
        read_refer(data / "data", data / "train2014")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"(S'true'\nios\nsystem\n.", r"os\.system"),
        (b"cos\nsystem\n(S'true'\ntR.", r"os\.system"),
        (b"\x80\x02c__builtin__\neval\nU\x03__1\x85R.", r"__builtin__\.eval"),
        (pickle.dumps(np.float64(1)), r"numpy.*scalar.*: write NumPy's numbers as int\(\) and float\(\)"),
        (pickle.dumps([complex(1, 2)]), r"builtins\.complex"),
        (b"\x80\x02U\x01xQ.", "persistent"),
        (b"", "damaged .EOFError"),
        (pickle.dumps(default_refs())[:-20], "exhausted before end of frame|damaged"),
        (b"<html>Not found</html>", "damaged .KeyError: 60"),
    ],
)
def test_pickles_with_other_content_are_refused(tmp_path, content, named):
    path = tmp_path / "refs(unc).p"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"refs\(unc\)\.p was refused: .*{named}"):
        load_plain_pickle(path)


def test_a_bytearray_takes_no_memory(tmp_path):
    path = tmp_path / "refs(unc).p"
    path.write_bytes(b"\x80\x05\x96" + struct.pack("<Q", 2**28) + b".")
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"damaged .KeyError: 150"):
        load_plain_pickle(path)
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()


@pytest.mark.parametrize("store", [b"r\x00\x00\x00\x08", b"p4000000000\n"])
def test_a_far_place_in_the_memo_takes_no_memory(tmp_path, store):
    path = tmp_path / "refs(unc).p"
    path.write_bytes(b"\x80\x02]" + store + b".")
    tracemalloc.start()
    assert load_plain_pickle(path) == []
    assert tracemalloc.get_traced_memory()[1] < 10**6
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("dataset", "split_by"),
    [
        ("refcoco", "google"),
        ("refcoco+", "unc"),
        ("refcocog", "umd"),
        ("refcocog", "google"),
        ("refclef", "unc"),
        ("refclef", "berkeley"),
    ],
)
@pytest.mark.parametrize("own_folder", [True, False])
def test_datasets_and_their_folders(tmp_path, dataset, split_by, own_folder):
    folder = write_refer(tmp_path / dataset, split_by=split_by)
    images = write_images(tmp_path / "images")
    read = read_refer(folder if own_folder else tmp_path, images, dataset, split_by, "train")
    assert [reference.ref_id for image in read for reference in image.references] == [1]


@pytest.mark.parametrize("below", [".", "train2014", "images/train2014", "images/mscoco/images/train2014"])
def test_images_are_found_where_they_usually_are(tmp_path, below):
    folder = write_images(tmp_path / "coco" / below)
    write_refer(tmp_path / "refcoco")
    read = read_refer(tmp_path, tmp_path / "coco")
    assert [image.image for image in read] == [folder / name for name in FILE_NAMES.values()]
    (folder / FILE_NAMES[9]).unlink()
    assert read_refer(tmp_path, tmp_path / "coco")[1].image == folder / FILE_NAMES[9]  # reported as missing later


def test_images_are_found_under_other_names(tmp_path):
    write_refer(tmp_path / "refcoco")
    folder = write_images(tmp_path / "coco" / "train2017", ["000000581857.jpg", "000000000009.jpg"])
    images = read_refer(tmp_path, tmp_path / "coco")
    assert [image.image.relative_to(folder).name for image in images] == ["000000581857.jpg", "000000000009.jpg"]
    assert [image.file_name for image in images] == list(FILE_NAMES.values())

    instances = default_instances()
    instances["images"][0]["file_name"] = "02/images/2043.jpg"
    write_refer(tmp_path / "refclef", instances=instances)
    nested = write_images(tmp_path / "saiapr_tc-12" / "02" / "images", ["2043.jpg"])
    flat = write_images(tmp_path / "flat", ["2043.jpg"])
    assert read_refer(tmp_path, tmp_path, "refclef")[0].image == nested / "2043.jpg"
    assert read_refer(tmp_path, flat, "refclef")[0].image == flat / "2043.jpg"


def read_split(folder, split):
    images = read_refer(folder, folder, "refclef", "unc", split)
    return [reference.ref_id for image in images for reference in image.references]


def test_splits_of_several_test_sets(tmp_path):
    splits = ["train", "val", "testA", "testB", "testAB", "testC", "testBC"]
    refs = [make_ref(index, 10, 9, split) for index, split in enumerate(splits)]
    write_refer(tmp_path / "refclef", refs)
    expected = {"train": [0], "val": [1], "testA": [2, 4], "testB": [3, 4, 6], "testC": [5, 6], "testAB": [4]}
    for split, ref_ids in {**expected, "test": [2, 3, 4, 5, 6]}.items():
        assert read_split(tmp_path, split) == ref_ids
    for split in ("tes", "A", "", "testD", "trainval"):
        with pytest.raises(ValueError, match=rf"no split '{split}'; it has: testA, .*, testC, train, val\."):
            read_split(tmp_path, split)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("refcoko",), r"Expected a dataset of refcoco, refcoco\+, refcocog, refclef, got 'refcoko'"),
        (("refcocog",), "refcocog was split by umd and google, got split_by='unc'"),
        (("refcoco", "google"), r"Expected refs\(google\)\.p in .*refcoco, got refs\(unc\)\.p"),
        (("refcoco", "unc", "test_a"), r"no split 'test_a'; it has: testA, train, val\."),
        (("refcoco+",), r"data to be the folder of refcoco\+, with instances\.json, or to contain it"),
    ],
)
def test_unknown_datasets_and_splits_are_explained(data, arguments, message):
    with pytest.raises(ValueError, match=message):
        read_refer(data / "data", data / "train2014", *arguments)


def test_folders_that_do_not_exist_are_explained(data):
    for folder in (data / "nowhere", data / "train2014"):
        with pytest.raises(ValueError, match=r"Expected .* to be the folder of refcoco"):
            read_refer(folder, data / "train2014")
    with pytest.raises(ValueError, match=r"to be the folder of refcoco\+"):  # another dataset's, with the same files
        read_refer(data / "data" / "refcoco", data / "train2014", "refcoco+")
    with pytest.raises(ValueError, match=r"Expected a folder of images, got .*nowhere"):
        read_refer(data / "data", data / "nowhere")
    (data / "data/refcoco/instances.json").unlink()
    with pytest.raises(ValueError, match=r"Expected a file .*instances\.json, found none"):
        read_refer(data / "data", data / "train2014")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ann_id": 999}, "ref_id 2: 999 is not among the annotations of .*instances.json"),
        ({"image_id": 999}, "ref_id 2: 999 is not among the images of"),
        ({"category_id": 999}, "ref_id 2: 999 is not among the categories of"),
        ({"ann_id": 30}, "ref_id 2 is about image 9, but its annotation 30 in .* is about image 581857"),
        ({"sentences": [{"sent": "the dog"}]}, r"ref_id 2, sentences: expected the fields \['sent', 'sent_id'\], got"),
        ({"sentences": ["the dog"]}, r"ref_id 2, sentences: expected the fields \['sent', 'sent_id'\], got 'the dog'"),
        ({"sentences": 5}, r"refs\(unc\)\.p, reference 1: expected sentences to be a list, got 5"),
        ({"sentences": [{"sent": None, "sent_id": 1}]}, "ref_id 2, sentences: expected sent to be text, got None"),
        ({"image_id": [9]}, r"reference 1: expected image_id to be a whole number of 64 bits, got \[9\]"),
        ({"split": None}, "reference 1: expected split to be text, got None"),
    ],
)
def test_invalid_references_are_named(data, changes, message):
    refs = default_refs()
    refs[1].update(changes)
    write_refer(data / "data/refcoco", refs)
    with pytest.raises(ValueError, match=message):
        read_refer(data / "data", data / "train2014")


def change(table, number, **fields):
    """The default instances with changed fields in one record, or with another record."""
    instances = default_instances()
    records = instances[table]
    if number == len(records):
        records.append({**records[0], "file_name": "other.jpg"})
    records[number] = {name: value for name, value in {**records[number], **fields}.items() if value is not ...}
    return json.dumps(instances)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "cannot be read as JSON"),
        ("[]", "is not in COCO's format"),
        ('{"images": []}', "is not in COCO's format"),
        (100_000 * "[", "cannot be read as JSON: maximum recursion depth"),
        (change("images", 0, height=...), "581857 of the images: expected the fields .*'height'.*, got"),
        (change("images", 2), "the ids of images must be unique, got 581857 twice"),
        (change("annotations", 5), "the ids of annotations must be unique, got 10 twice"),
        (change("categories", 2), "the ids of categories must be unique, got 1 twice"),
        (change("annotations", 0, id=2**70), f"record 0 of the annotations: expected id .* got {2**70}"),
        (change("images", 0, file_name=5), "581857 of the images: expected file_name to be text, got 5"),
        (change("categories", 1, name=5), "18 of the categories: expected name to be text, got 5"),
    ],
    ids=str,
)
def test_instances_in_other_formats_are_explained(data, content, message):
    (data / "data/refcoco/instances.json").write_text(content)
    with pytest.raises(ValueError, match=rf"instances\.json.*{message}"):
        read_refer(data / "data", data / "train2014")


def test_references_in_other_formats_are_explained(data):
    for refs, message in (
        ({"refs": []}, "to hold a list of references, got dict"),
        ([{"ref_id": 1}], r"reference 0: expected the fields \['ann_id', .*\], got \{'ref_id': 1\}"),
    ):
        write_refer(data / "data/refcoco", refs)
        with pytest.raises(ValueError, match=message):
            read_refer(data / "data", data / "train2014")


def test_repeated_references_are_named(data, caplog):
    refs = default_refs()
    write_refer(data / "data/refcoco", [*refs, refs[0]])
    images = read_refer(data / "data", data / "train2014")
    assert [reference.ref_id for image in images for reference in image.references] == [4, 3, 4, 2]
    assert "refcoco: 1 ids of references occur more than once, and each occurrence is counted (4)" in caplog.text


@pytest.mark.parametrize("names", [("a.jpg", "a.jpg"), ("job_1/a.jpg", "job_2/a.jpg"), ("a.jpg", "images\\a.jpg")])
def test_two_images_of_one_file_are_refused(data, names):
    instances = default_instances()
    for image, name in zip(instances["images"], names):
        image["file_name"] = name
    write_refer(data / "data/refcoco", instances=instances)
    read_refer(data / "data", data / "train2014")  # missing images are reported when rows are built
    write_images(data / "job_1", ["a.jpg"])
    message = r"a\.jpg for image 581857 \(.*a\.jpg\) and for image 9 \(.*a\.jpg\): give a folder"
    with pytest.raises(ValueError, match=message):
        read_refer(data / "data", data / "job_1")
    if names[0].startswith("job"):
        write_images(data / "job_2", ["a.jpg"])
        assert len({image.image for image in read_refer(data / "data", data)}) == 2


def expected_mask(segmentation):
    coco = COCO()
    coco.imgs = {1: {"height": HEIGHT, "width": WIDTH}}
    parts = (
        [part if isinstance(part, dict) else [part] for part in segmentation]
        if isinstance(segmentation, list)
        else [segmentation]
    )
    return np.any([coco.annToMask({"image_id": 1, "segmentation": part}) for part in parts], axis=0)


def test_dataset_has_the_masks_that_pycocotools_makes(data):
    annotations = {annotation["id"]: annotation for annotation in default_instances()["annotations"]}
    num_references = 0
    for split in ("train", "val", "testA"):
        dataset = load_refer(data / "data", data / "train2014", split=split)
        assert dataset.features == FEATURES
        for row in dataset:
            stored = Image.open(data / "train2014" / FILE_NAMES[row["image_id"]])
            assert np.array_equal(np.asarray(row["image"]), np.asarray(stored))
            for reference in row["references"]:
                annotation = annotations[reference["ann_id"]]
                mask = decode_mask(reference["mask"])
                assert mask.any()
                assert np.array_equal(mask, expected_mask(annotation["segmentation"]))
                assert reference["bbox"] == annotation["bbox"]
                num_references += 1
    assert num_references == len(default_refs())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("segmentation", [[1e9, 1, 12, 1, 12, 9, 2, 9]]),
        ("segmentation", {"size": [HEIGHT, WIDTH], "counts": [100, -5, 673]}),
        ("segmentation", {"size": [HEIGHT, WIDTH], "counts": None}),
        ("segmentation", {"size": [10**6, 10**6], "counts": [0, 10**12]}),
        ("segmentation", {"size": [HEIGHT], "counts": "PPY1"}),
        ("segmentation", [[-20, -9, -3, -9, -3, -1]]),
        ("segmentation", 5),
        ("segmentation", {}),
        ("segmentation", []),  # which does not mean "nothing in the image"
        ("segmentation", [{"a": 1}]),
        ("segmentation", ["a"]),
        ("bbox", "x"),
        ("bbox", [1, 2, 3, 10**400]),
        ("height", 10**6),
        ("height", None),
        ("width", "32"),
        ("width", [32]),
    ],
)
def test_damaged_annotations_make_bad_images(data, field, value):
    instances = default_instances()
    instances["images" if field in ("height", "width") else "annotations"][1][field] = value
    write_refer(data / "data/refcoco", instances=instances)
    with pytest.raises(BadImage, match=rf"1 images cannot be used.*\n  {FILE_NAMES[9]}: (ref_id 2|decodes)"):
        load_refer(data / "data", data / "train2014")
    assert load_refer(data / "data", data / "train2014", skip_bad=True)["image_id"][:] == [581857]


def test_readers_are_imported_on_first_use(tmp_path):
    code = """
import sys
import modeling_restr.data
from modeling_restr.data import word_vectors
assert "load_refer" in dir(modeling_restr.data)
present = {"datasets", "pycocotools", "pyarrow"} & sys.modules.keys()
assert not present, present

sys.modules["pycocotools"] = None  # as if it were not installed
try:
    from modeling_restr.data import load_refer
except ImportError as error:
    assert 'load_refer cannot be imported' in str(error), error
    assert 'pip install "modeling-restr[train]"' in str(error), error
else:
    raise AssertionError("imported without pycocotools")

del sys.modules["pycocotools"]
from modeling_restr.data import load_refer
assert load_refer is modeling_restr.data.refer.load_refer
"""
    run_python(code, cwd=tmp_path)
    with pytest.raises(ImportError, match="cannot import name 'load_reefer'"):
        from modeling_restr.data import load_reefer  # noqa: F401
