"""Readers of damaged annotation files: a file is refused with its name, or everything in it is read or counted."""

import csv
import io
import json
import pickle
import tempfile
from dataclasses import replace
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import test_hub_copies as copies
from annotated_images import TWO_BOXES, write_photo
from coco_annotations import compress, run_lengths
from data_layouts import SIZE, write_coco, write_grefcoco, write_refer, write_referit
from hypothesis import assume, given, strategies as st
from hypothesis.extra import numpy as np_st
from PIL import Image
from properties import PYTHON_VALUES, WHOLE_TEXT, attempt, cases, damaged, damaged_bytes

from modeling_restr.data import (
    build_dataset,
    decode_mask,
    hub_copies,
    load_sentences,
    read_coco,
    read_grefcoco,
    read_hub_copy,
    read_refer,
    read_referit,
    read_sentences,
)
from modeling_restr.data.canonical import (
    FEATURES,
    NO_TARGET,
    AnnotatedImage,
    AnnotatedReference,
    BadImage,
    build_row,
    build_row_or_error,
)
from modeling_restr.data.combination import _read_row, read_prepared_images
from modeling_restr.data.dataset_card import Source
from modeling_restr.data.loading import load_prepared
from modeling_restr.data.parquet_rows import open_source
from modeling_restr.data.preparation import list_shards, prepare, read_settings, read_source
from modeling_restr.data.records import Problems
from modeling_restr.data.word_vectors import load_word_vectors
from modeling_restr.tokenization_restr import SPECIAL_TOKENS


MASK = np.zeros(SIZE, dtype=bool)
MASK[3:20, 5:25] = True
SEGMENTATIONS = (TWO_BOXES, TWO_BOXES[0], [[2, 1], [12, 1], [12, 9]], compress(MASK), run_lengths(MASK))


def check_rows(images, size=SIZE):
    """Every image becomes a row with masks of its size, or a bad image with a reason."""
    problems = Problems()
    results = [build_row_or_error(image, problems, embed=False) for image in images]
    rows = [row for row in results if not isinstance(row, BadImage)]
    assert all(image.file_name[:200] in str(error) for image, error in zip(images, results) if error not in rows)
    for image, row in zip(images, results):
        if isinstance(row, BadImage):
            continue
        assert len(row["references"]) == len(image.references)
        for reference, annotated in zip(row["references"], image.references):
            assert len(reference["expressions"]) == len(annotated.expressions)
            mask = decode_mask(reference["mask"])
            assert size in (None, mask.shape) and (mask.any() or annotated.refers_to_nothing)
            assert len(reference["bbox"]) == 4 and np.isfinite(reference["bbox"]).all()
    assert len(build_dataset(images, skip_bad=True, progress=False)) == len(rows)
    return rows


def check_names(error, *names):
    assert any(name in str(error) for name in names), error


@pytest.fixture(scope="module")
def refer(tmp_path_factory):
    """A folder in REFER's layout and the content of its files."""
    folder = tmp_path_factory.mktemp("refer")
    splits = {"train": [1], "val": [2, 3]}
    refs = write_refer(folder / "refcoco", folder / "images", splits)
    write_grefcoco(folder / "grefcoco", folder / "images")
    instances = json.loads((folder / "refcoco" / "instances.json").read_text())
    for annotation, segmentation in zip(instances["annotations"], SEGMENTATIONS):
        annotation |= {"segmentation": segmentation, "bbox": [2, 1, 28, 19]}
    grefs = [{**ref, "ann_id": [ref["ann_id"], 101], "category_id": [18]} for ref in refs[:1]]
    grefs += [{**ref, "ann_id": [ref["ann_id"]], "category_id": [18], "no_target": False} for ref in refs[1:]]
    grefs += [{**refs[1], "ref_id": 900, "ann_id": [-1], "category_id": [-1], "no_target": True}]
    return SimpleNamespace(folder=folder, refs=refs, grefs=grefs, instances=instances)


def count_references(images):
    return sum(len(image.references) for image in images)


@cases(150)
@given(st.data())
def test_refer_reads_every_reference_of_a_split_or_refuses_its_files(refer, data):
    refs = data.draw(damaged(refer.refs, PYTHON_VALUES))
    instances = data.draw(damaged(refer.instances))
    folder = refer.folder / "refcoco"
    content = attempt(pickle.dumps, refs, data.draw(st.integers(0, 5)))
    (folder / "refs(unc).p").write_bytes(content if isinstance(content, bytes) else b"")
    (folder / "instances.json").write_text(json.dumps(instances))
    images = attempt(read_refer, folder, refer.folder / "images", split="val")
    if isinstance(images, Exception):
        check_names(images, str(folder), "ref_id")
    else:
        assert count_references(images) == sum(ref["split"] == "val" for ref in refs)
        check_rows(images)


@cases(150)
@given(st.data())
def test_grefcoco_reads_every_reference_of_a_split_or_refuses_its_files(refer, data):
    grefs, instances = data.draw(damaged(refer.grefs)), data.draw(damaged(refer.instances))
    folder = refer.folder / "grefcoco"
    (folder / "grefs(unc).json").write_text(json.dumps(grefs))
    (folder / "instances.json").write_text(json.dumps(instances))
    images = attempt(read_grefcoco, folder, refer.folder / "images", split="val")
    if isinstance(images, Exception):
        check_names(images, str(folder), "ref_id")
    else:
        assert count_references(images) == sum(ref["split"] == "val" for ref in grefs)
        check_rows(images)


@cases(100)
@given(st.data())
def test_damaged_pickles_are_read_or_refused(refer, data):
    content = pickle.dumps(refer.refs, data.draw(st.integers(0, 5)))
    folder = refer.folder / "refcoco"
    (folder / "refs(unc).p").write_bytes(data.draw(damaged_bytes(content)))
    (folder / "instances.json").write_text(json.dumps(refer.instances))
    images = attempt(read_refer, folder, refer.folder / "images", split="val")
    check_names(images, str(folder), "ref_id") if isinstance(images, Exception) else check_rows(images)


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco")
    content = write_coco(folder / "instances.json", folder, num_images=4)
    for annotation, segmentation in zip(content["annotations"], SEGMENTATIONS):
        annotation |= {"segmentation": segmentation, "caption": ["the dog", "a dog"]}
    content["annotations"].append({**content["annotations"][0], "id": 9, "iscrowd": 1, "category_id": 2})
    content["images"].append({"id": 5, "file_name": "missing.png", "height": SIZE[0], "width": SIZE[1]})
    content["categories"].append({"id": 2, "name": "hot_dog"})
    return SimpleNamespace(folder=folder, content=content)


def check_coco(folder, content, captions, crowds_as_instances):
    """Every image and annotation of a COCO file is read or counted by reason, or the file is refused."""
    path = folder / "instances.json"
    path.write_text(json.dumps(content))
    problems = Problems()
    options = {"captions": captions, "crowds_as_instances": crowds_as_instances, "progress": False}
    images = attempt(read_coco, path, folder, problems=problems, **options)
    if isinstance(images, Exception):
        return check_names(images, str(path))
    check_rows(images)
    names = {name.partition(" (")[0] for found in problems.values() for name in found}
    ids = {image.image_id for image in images}
    ids |= {int(name.removeprefix("image ")) for name in names if name.startswith("image ")}
    assert ids == {record["id"] for record in content["images"]}
    referred = {reference.ann_id for image in images for reference in image.references}
    unusable = {image.image_id for image in images if not image.references}
    for annotation in content["annotations"]:
        is_read = annotation["id"] in referred or annotation["image_id"] in unusable
        assert is_read or f"annotation {annotation['id']}" in names


@cases(300)
@given(st.data())
def test_coco_reads_or_counts_every_annotation_or_refuses_its_file(coco, data):
    check_coco(coco.folder, data.draw(damaged(coco.content)), data.draw(st.booleans()), data.draw(st.booleans()))


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Photos and masks of own sentences, and lines in every form."""
    folder = tmp_path_factory.mktemp("own")
    for name in ("a.jpg", "b.jpg", "mask.jpg"):
        write_photo(folder / name, len(name), SIZE)
    Image.fromarray(MASK).save(folder / "mask.png")
    lines = [
        {"image": "a.jpg", "sentence": "the dog", "mask": "mask.png"},
        {"image": "a.jpg", "sentence": "the dog", "mask": "mask.png"},
        {"image": "a.jpg", "sentence": "the cup", "polygon": TWO_BOXES[0]},
        {"image": "b.jpg", "sentence": "a cup", "rle": compress(MASK)},
        {"image": "b.jpg", "sentence": "a box", "box": [1, 2, 10, 12]},
    ]
    return SimpleNamespace(folder=folder, lines=lines)


def _as_csv(lines):
    names = sorted({name for line in lines for name in line})
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, names)
    writer.writeheader()
    for line in lines:
        writer.writerow({name: v if isinstance(v, str) else json.dumps(v) for name, v in line.items()})
    return buffer.getvalue()


def _check_sentences(path, folder, num_lines=None):
    problems = Problems()
    splits = attempt(read_sentences, path, folder, boxes_as_masks=True, problems=problems)
    rows = attempt(load_sentences, path, folder)
    if isinstance(splits, Exception):
        return check_names(splits, str(path))
    images = [image for found in splits.values() for image in found]
    check_rows(images)
    num_read = sum(len(reference.expressions) for image in images for reference in image.references)
    num_repeated = sum(map(len, problems.values()))
    assert num_lines in (None, num_read + num_repeated)
    assert num_read + num_repeated == sum(map(len, rows["texts"]))


@cases(200)
@given(st.data())
def test_own_sentences_are_read_or_counted_or_their_lines_named(own, data):
    lines = data.draw(damaged(own.lines))
    if data.draw(st.booleans()):
        path, text = own.folder / "own.jsonl", "".join(json.dumps(line) + "\n" for line in lines)
    else:
        lines = [line for line in lines if isinstance(line, dict) and line]  # others are no lines in CSV
        path, text = own.folder / "own.csv", _as_csv(lines)
    path.write_text(text, encoding="utf-8", errors="surrogatepass", newline="")
    _check_sentences(path, own.folder, len(lines))


@cases(200)
@given(st.data())
def test_damaged_files_of_own_sentences_are_read_or_refused(own, data):
    name = data.draw(st.sampled_from(("own.jsonl", "own.csv")))
    text = _as_csv(own.lines) if name == "own.csv" else "".join(json.dumps(line) + "\n" for line in own.lines)
    (own.folder / name).write_bytes(data.draw(damaged_bytes(text.encode())))
    _check_sentences(own.folder / name, own.folder)


@pytest.fixture(scope="module")
def referit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("referit")
    write_referit(folder)
    return folder


@cases(100)
@given(damaged({"1_1": ["sky", "the sky"], "2_1": ["tree"], "3_1": []}), st.data())
def test_referit_reads_every_sentence_or_refuses_its_file(referit, queries, data):
    path = referit / "referit_query_val.json"
    path.write_text(json.dumps(queries))
    images = attempt(read_referit, referit, referit / "mask", referit / "images", "val")
    if isinstance(images, Exception):
        return check_names(images, str(path))
    check_rows(images)
    assert count_references(images) == len(queries)


@cases(60)
@given(st.data())
def test_damaged_matlab_masks_are_read_or_make_bad_images(referit, data):
    path = referit / "referit_query_val.json"
    path.write_text(json.dumps({"1_1": ["sky"], "2_1": ["tree"]}))
    content = (referit / "mask" / "2_1.mat").read_bytes()
    (referit / "mask" / "1_1.mat").write_bytes(data.draw(damaged_bytes(content)))
    images = read_referit(referit, referit / "mask", referit / "images", "val")
    assert len(check_rows(images)) in (1, 2)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos") / "train2014"
    copies.write_photos(folder)
    return folder


def _parse_raw_columns(row):
    return {name: json.loads(value) if name.startswith("raw_") else value for name, value in row.items()}


_COPY_ROWS = (
    [_parse_raw_columns(copies.reference_row(ref_id)) for ref_id in copies.REFERENCES],
    [copies.benchmark_row(image_id) for image_id in copies.SIZES],
    [copies.question_row(ref_id) for ref_id in copies.REFERENCES],
    [copies.mask_row(image_id) for image_id in copies.SIZES],
)


@pytest.mark.slow
@cases(200)
@given(st.sampled_from(_COPY_ROWS).flatmap(lambda rows: damaged(rows, max_changes=1)), st.booleans())
def test_copies_on_the_hub_are_read_or_refused(photos, rows, as_json):
    for row in rows:
        if as_json and isinstance(row, dict):  # some mirrors hold objects instead
            row.update({name: json.dumps(value) for name, value in row.items() if name.startswith("raw_")})
    try:
        dataset = datasets.Dataset.from_list(rows)
    except Exception:  # noqa: BLE001  (Arrow holds no such rows)
        assume(False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub_copies, "_load_split", lambda *args: ("val", dataset))
        images = attempt(read_hub_copy, "someone/copy", "val", photos)
    if isinstance(images, Exception):
        return check_names(images, "someone/copy", str(photos))
    check_rows(images, size=None)


VECTORS = b"dog 0.1 -0.2 3e-1\nleft 1 2 3\n. . . 1 2 3\nother 4 5 6\n"


@cases(200)
@given(damaged_bytes(VECTORS), st.lists(WHOLE_TEXT, max_size=3))
def test_word_vectors_are_read_or_their_line_named(tmp_path_factory, content, words):
    path = tmp_path_factory.getbasetemp() / "vectors.txt"
    path.write_bytes(content)
    vocabulary = {**SPECIAL_TOKENS, **{word: 10 + number for number, word in enumerate(["dog", "left", *words])}}
    vectors = attempt(load_word_vectors, path, vocabulary)
    if isinstance(vectors, Exception):
        return check_names(vectors, str(path))
    assert vectors.matrix.shape[0] == max(vocabulary.values()) + 1 and vectors.matrix.isfinite().all()
    assert {*vectors.found, *vectors.missing} == vocabulary.keys() - SPECIAL_TOKENS.keys()
    assert not vectors.matrix[0].any()


IDS = st.integers(-(2**63), 2**63 - 1)


@st.composite
def annotated_images(draw, folder):
    """Images in the canonical form, with files in the folder."""
    images = []
    for number in range(draw(st.integers(1, 3))):
        references = draw(st.lists(_REFERENCES, max_size=3))
        name = f"{number}.png"
        images.append(AnnotatedImage(draw(IDS), name, folder / name, tuple(references), SIZE, folder))
    return images


_REFERENCES = st.builds(
    AnnotatedReference,
    ref_id=IDS,
    ann_id=IDS,
    category=WHOLE_TEXT,
    segmentation=st.sampled_from(SEGMENTATIONS) | np_st.arrays(bool, SIZE, fill=st.booleans()).filter(np.any),
    expressions=st.lists(st.tuples(IDS, WHOLE_TEXT), max_size=3).map(tuple),
    bbox=st.none() | st.lists(st.floats(-(2**30), 2**30, width=32), min_size=4, max_size=4),
) | st.just(AnnotatedReference(7, NO_TARGET, "", [], ((9, "nothing"),)))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(3):
        write_photo(folder / f"{number}.png", number, SIZE)
    return folder


@cases(60)
@given(st.data())
def test_the_canonical_form_survives_parquet(pictures, data):
    images = data.draw(annotated_images(pictures))
    rows = [build_row(image) for image in images]
    path = pictures / "rows.parquet"
    datasets.Dataset.from_list(rows, features=FEATURES).to_parquet(path)
    table = pq.read_table(path)
    assert datasets.Features.from_arrow_schema(table.schema) == FEATURES
    assert table.to_pylist() == rows
    for row, image in zip(table.to_pylist(), images):
        again = _read_row(row, image.image)
        assert {**build_row(replace(again, image_dir=pictures)), "image": row["image"]} == row


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, pictures):
    folder = tmp_path_factory.mktemp("prepared")
    reference = AnnotatedReference(1, 1, "dog", TWO_BOXES, ((1, "the dog"),))
    image = AnnotatedImage(1, "0.png", pictures / "0.png", (reference,), SIZE, pictures)
    prepare(Source("a", "A", "Read so.", ("refcoco",)), {"val": [image]}, folder)
    return folder


@cases(60)
@given(st.data())
def test_damaged_settings_of_prepared_folders_are_read_or_refused(prepared, data):
    path = prepared / "preparation.json"
    content = path.read_bytes()
    try:
        path.write_text(json.dumps(data.draw(damaged(json.loads(content)))))
        for read in (read_settings, read_source, list_shards):
            result = attempt(read, prepared)
            assert not isinstance(result, Exception) or str(prepared) in str(result)
    finally:
        path.write_bytes(content)


@pytest.mark.slow
@cases(20)
@given(st.data())
def test_damaged_shards_are_read_or_refused(prepared, data):
    (path,) = (prepared / "data").glob("*.parquet")
    content = path.read_bytes()
    try:
        path.write_bytes(data.draw(damaged_bytes(content)))
        with tempfile.TemporaryDirectory() as cache:
            images = attempt(read_prepared_images, prepared, cache)
            rows = attempt(load_prepared, prepared, "val")
            source = attempt(open_source, str(prepared), "val")
        for result in (images, rows, source):
            assert not isinstance(result, Exception) or str(prepared) in str(result)
    finally:
        path.write_bytes(content)
