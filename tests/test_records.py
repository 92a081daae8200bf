"""Fields of records, and the summary of problems."""

import re
from pathlib import Path

import pytest

from modeling_restr.data.records import ID, LIST, TEXT, Problems, check_fields, index_records


PATH = Path("instances.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": "a"}, "expected id to be a whole number of 64 bits, got 'a'"),
        ({"id": 2**63}, "expected id to be a whole number of 64 bits, got 9223372036854775808"),
        ({"id": True}, "expected id to be a whole number of 64 bits, got True"),
        ({"id": [1]}, r"expected id to be a whole number of 64 bits, got \[1\]"),
        ({"id": 1.0}, "expected id to be a whole number of 64 bits, got 1.0"),
        ({"sent": None}, "expected sent to be text, got None"),
        ({"sent": 5}, "expected sent to be text, got 5"),
        ({"sent": b"dog"}, "expected sent to be text, got b'dog'"),
        ({"sent": "\ud800"}, r"expected sent to be text, got '\\ud800'"),
        ({"sentences": 5}, "expected sentences to be a list, got 5"),
    ],
)
def test_fields_of_wrong_types_are_named_with_their_place(changes, message):
    kinds = {"id": ID, "sent": TEXT, "sentences": LIST}
    record = {"id": -(2**63), "sent": "the 犬", "sentences": [], "other": None}
    check_fields(record, kinds, "refs.p, reference 3")
    with pytest.raises(ValueError, match=f"^refs.p, reference 3: {message}"):
        check_fields(record | changes, kinds, "refs.p, reference 3")


def test_long_values_are_shortened():
    deep = []
    for _ in range(5000):
        deep = [deep]
    for record in ({"sent": "dog"}, None, [1], deep, {"sent": deep}):
        with pytest.raises(ValueError, match=r"^a: expected the fields \['id', 'sent'\], got ") as error:
            check_fields(record, {"sent": TEXT, "id": ID}, "a")
        assert len(str(error.value)) < 200


def test_records_by_their_ids():
    content = {"images": [{"id": 5}, {"id": 3, "file_name": "a.jpg"}]}
    assert index_records(content, "images", PATH) == {5: {"id": 5}, 3: {"id": 3, "file_name": "a.jpg"}}
    for images, message in (
        ([{"id": 5}, {"id": 3}, {"id": 5}], "instances.json: the ids of images must be unique, got 5 twice"),
        (
            [{"id": 5}, {"id": 2**64}],
            rf"record 1 of the images: expected id to be a whole number of 64 bits, got {2**64}",
        ),
        (
            [{"id": "a"}],
            "instances.json, record 0 of the images: expected id to be a whole number of 64 bits, got 'a'",
        ),
        ([{"id": [1]}], r"record 0 of the images: expected id to be a whole number of 64 bits, got \[1\]"),
        ([{}], r"record 0 of the images: expected the fields \['id'\], got {}"),
        ([5], r"record 0 of the images: expected the fields \['id'\], got 5"),
        ({}, "instances.json is not in COCO's format: expected a list of images"),
    ):
        with pytest.raises(ValueError, match=message):
            index_records({"images": images}, "images", PATH)
    for content in ([], None, {}):
        with pytest.raises(ValueError, match=re.escape("instances.json is not in COCO's format")):
            index_records(content, "images", PATH)


def test_summary_counts_by_problem_and_names_the_first():
    problems = Problems()
    assert not problems and problems.summary() == ""
    problems.add("missing images", "a.jpg")
    problems.add("damaged masks")
    problems.extend({"missing images": ["b.jpg"], "stray points": [f"ref_id {number}" for number in range(1200)]})
    assert (
        problems.summary(num_names=2)
        == "missing images: 2 (a.jpg, b.jpg)\nstray points: 1,200 (ref_id 0, ref_id 1, ...)"
    )
