"""Dataset cards as the Hub's own classes read them."""

import pytest
from huggingface_hub import DatasetCard

from modeling_restr.data.dataset_card import NUM_LEFT_OUT_SHOWN, ORIGINS, OTHER, Source, build_card
from modeling_restr.data.published_counts import Counts
from modeling_restr.data.shards import PreparedSplit


SPLITS = {
    "train": PreparedSplit(Counts(16994, 42404, 120624)),
    "val": PreparedSplit(Counts(1499, 3807, 10830), ("a.jpg: missing",)),
}


def build_source(**changes) -> Source:
    published = {split: ("refcoco", "unc", split) for split in ("train", "val")}
    values = {"name": "refcoco", "title": "RefCOCO (unc)", "description": "Read so.", "origins": ("refcoco",)}
    return Source(**{**values, "published": published, **changes})


def test_metadata_name_every_split_and_its_files():
    data = DatasetCard(str(build_card(build_source(), SPLITS))).data.to_dict()
    assert data["configs"] == [
        {
            "config_name": "default",
            "data_files": [
                {"split": "train", "path": "data/train-*.parquet"},
                {"split": "val", "path": "data/val-*.parquet"},
            ],
        }
    ]
    assert data["pretty_name"] == "RefCOCO (unc)"
    assert data["license"] == "other" and data["license_name"]
    assert data["task_categories"] == ["image-segmentation"]
    assert data["size_categories"] == "10K<n<100K"


def test_text_has_counts_omissions_and_notes():
    text = build_card(build_source(), SPLITS, ["Seven were dropped."]).text
    assert "| train | 16,994 | 42,404 | 120,624 | as published |" in text
    assert "references: 3,807, published 3,811 (4 fewer)" in text
    assert "1 image of the split val" in text and "- a.jpg: missing" in text
    assert "Seven were dropped." in text and "Read so." in text


def test_long_lists_of_left_out_images_are_cut():
    left_out = tuple(f"{index}.jpg: missing" for index in range(NUM_LEFT_OUT_SHOWN + 3))
    text = build_card(build_source(), {"val": PreparedSplit(Counts(1, 1, 1), left_out)}).text
    assert f"- {NUM_LEFT_OUT_SHOWN - 1}.jpg: missing\n- and 3 more" in text
    assert f"{NUM_LEFT_OUT_SHOWN}.jpg" not in text


@pytest.mark.parametrize("origin", ORIGINS)
def test_licences_and_citations_are_those_of_the_origin(origin):
    text = build_card(build_source(origins=(origin,)), SPLITS).text
    assert ORIGINS[origin].licence in text
    assert all(citation in text for citation in ORIGINS[origin].citations)
    of_coco = ORIGINS[origin].images == "coco"
    assert ("Flickr Terms of Use" in text) == of_coco
    assert ("Common Objects in Context" in text) == of_coco


def test_shared_terms_are_stated_once():
    text = build_card(build_source(origins=("refcoco", "refcoco+")), SPLITS).text
    assert text.count(ORIGINS["refcoco"].licence) == 1
    assert text.count("Modeling Context in Referring Expressions") == 1
    assert f"RefCOCO, RefCOCO+: {ORIGINS['refcoco'].licence}" in text


def test_own_data_claims_no_licence():
    source = Source("own", "Own", "Read so.")
    card = build_card(source, SPLITS)
    assert "license" not in card.data.to_dict()
    assert "which this card does not know" in card.text and "Flickr" not in card.text
    assert "Whom to cite" not in card.text


def test_own_data_next_to_other_is_named():
    card = build_card(build_source(origins=("refcoco", OTHER)), SPLITS)
    assert card.data.to_dict()["license"] == "other"
    assert "which this card does not know" in card.text and "Flickr Terms of Use" in card.text


def test_unknown_origin_is_an_error():
    with pytest.raises(ValueError, match=r"got \['refcoco2'\]"):
        build_source(origins=("refcoco2",))
