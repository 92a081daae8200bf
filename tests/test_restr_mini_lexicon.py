"""Words that no sentence has move towards the name above them in WordNet. The others stay."""

import json

import lexicon
import pytest
import torch
from transformers import ViTConfig

from modeling_restr import (
    ReSTRConfig,
    ReSTRForImageSegmentation,
    ReSTRImageProcessor,
    ReSTRProcessor,
    ReSTRTextConfig,
    build_tokenizer,
)
from modeling_restr.hub import save_bundle
from modeling_restr.tokenization_restr import vocabulary_from_expressions


# WordNet's format, wndb(5). The first sense of "hood" is a criminal, who is a person; the second one covers a head.
INDEX = """  1 This software and database is being provided to you, the LICENSEE
car n 2 2 @ ~ 2 1 00000002 00000003
sedan n 1 1 @ 1 0 00000004
hatchback n 1 1 @ 1 0 00000005
criminal n 1 1 @ 1 0 00000006
hood n 2 1 @ 2 1 00000006 00000009
person n 1 1 ~ 1 1 00000007
truth n 1 0 1 0 00000008
"""
DATA = """  1 This software and database is being provided to you, the LICENSEE
00000002 06 n 02 car 0 auto 0 001 ~ 00000004 n 0000 | a motor vehicle | or so
00000003 06 n 01 car 1 000 | a part of a train
00000004 06 n 01 sedan 0 002 ~ 00000005 n 0000 @ 00000002 n 0000 | a closed car
00000005 06 n 01 hatchback 0 001 @ 00000004 n 0000 | a car with a door at the back
00000006 18 n 02 criminal 0 hood 0 001 @ 00000007 n 0000 | someone who has committed a crime
00000007 03 n 01 person 0 000 | a human being
00000008 09 n 01 truth 0 000 | a fact
00000009 06 n 01 hood 1 000 | a headdress
"""
WORDS = ["car", "sedan", "hatchbacks", "hood", "person", "truth", "left"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "index.noun").write_text(INDEX)
    (tmp_path / "data.noun").write_text(DATA)
    categories = [{"id": 1, "name": "car"}, {"id": 2, "name": "hood"}]
    (tmp_path / "instances.json").write_text(json.dumps({"categories": categories}))
    return tmp_path


def test_words_move_towards_the_nearest_name_above_them(folder):
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    vectors = torch.randn(len(WORDS), 4)
    before = vectors.clone()
    moved = lexicon.move_words(vectors, vocabulary, {"car", "person", "left"}, lexicon.WordNet.load(folder))
    assert moved == ["sedan", "hatchbacks", "hood"]
    for word, name in {"sedan": "car", "hatchbacks": "car", "hood": "person"}.items():
        expected = 0.3 * before[vocabulary[word]] + 0.7 * before[vocabulary[name]]
        torch.testing.assert_close(vectors[vocabulary[word]], expected)
    for word in ("car", "person", "truth", "left"):
        assert torch.equal(vectors[vocabulary[word]], before[vocabulary[word]])


def test_a_saved_model_gets_the_new_vectors_and_keeps_the_rest(folder):
    processor = ReSTRProcessor(
        ReSTRImageProcessor(size={"height": 32, "width": 32}), build_tokenizer(vocabulary_from_expressions(WORDS))
    )
    vocabulary = processor.tokenizer.get_vocab()
    text = ReSTRTextConfig(vocab_size=len(vocabulary), hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    vision = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16)
    config = ReSTRConfig(vision_config=vision, text_config=text, hidden_size=16, num_attention_heads=2)
    model = ReSTRForImageSegmentation(config)
    save_bundle(model, processor, folder / "model", dtype=torch.float16)
    before = ReSTRForImageSegmentation.from_pretrained(folder / "model").state_dict()
    lexicon.main(model=folder / "model", photos=[folder], wordnet=folder)
    after = ReSTRForImageSegmentation.from_pretrained(folder / "model").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == 1
    (name,) = changed
    rows = (before[name] != after[name]).any(1).nonzero().flatten().tolist()
    assert rows == sorted(vocabulary[word] for word in ("sedan", "hatchbacks"))  # the training said "hood"


def test_kinds_are_names_of_the_training():
    named = {*lexicon.CATEGORIES["synonyms"], *lexicon.CATEGORIES["general_names"]}
    named |= {name for names in lexicon.CATEGORIES["synonyms"].values() for name in names}
    assert len(set(lexicon.KINDS)) == len(lexicon.KINDS) and len(named & set(lexicon.KINDS)) > 60
