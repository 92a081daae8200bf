import random
import re
import unicodedata

import pytest
from transformers import AddedToken, AutoTokenizer

from modeling_restr.tokenization_restr import (
    SPECIAL_TOKENS,
    add_words,
    build_tokenizer,
    read_vocabulary,
    split_expression,
    vocabulary_from_expressions,
)


PADDED = {"padding": "max_length", "truncation": True}
# Sentence -> pieces, worked out by hand from the rule.
PIECES = {
    "Man": ["man"],
    "  the   dog  ": ["the", "dog"],
    "man, left.": ["man", ", ", "left"],
    "man,left": ["man", ",", "left"],
    "it's": ["it", "'", "s"],
    "a.b.": ["a", ".", "b"],
    "left. ": ["left"],
    "left .": ["left", " ."],
    "left..": ["left", ".."],
    "left. .": ["left", ". ."],
    ". left": [". ", "left"],
    "...": ["..."],
    ".": [],
    " . ": [],
    "": [],
    " \t\n": [],
    "first\nsecond.\n": ["first", "second"],
    "snake_case 2nd 1.5": ["snake_case", "2nd", "1", ".", "5"],
    "Café É": ["café", "é"],
    "cafe\u0301": ["café"],  # one character, however it was typed
    "x\u0301": ["x", "\u0301"],  # a combining accent is not a word character
    "ΟΔΟΣ ΣΑΣ": ["οδος", "σας"],  # a sigma at the end of a word has its own small letter
    "\u0345Σ aΣ\u0345 aΣ\u0345b": [
        "\u0345",
        "\u03c3",
        "aς",
        "\u0345 ",
        "a\u03c3",
        "\u0345",
        "b",
    ],  # cased, but ignored
    "½ ² Ⅷ": ["½", "²", "ⅷ"],
    "Ⓐ dog": ["ⓐ ", "dog"],
    "a\u00a0b\x1cc": ["a", "b", "c"],
    "<pad> dog": ["<", "pad", "> ", "dog"],
}


def plain_pieces(text: str) -> list[str]:
    """The rule in Python's `re`, without the package."""
    pieces = []
    for piece in re.compile(r"(\W+)").split(unicodedata.normalize("NFC", text).strip().lower()):
        if not piece.isspace() and piece != "":
            pieces.append(piece)
    if pieces[-1:] == ["."]:
        pieces.pop()
    return pieces


def vocabulary_of(pieces: set[str]) -> dict[str, int]:
    """Ids with a gap after every word."""
    return SPECIAL_TOKENS | {piece: 7 + 2 * index for index, piece in enumerate(sorted(pieces))}


@pytest.mark.parametrize(("text", "pieces"), PIECES.items())
def test_known_sentences(text, pieces):
    assert split_expression(text) == pieces == plain_pieces(text)
    vocabulary = vocabulary_of(set(pieces))
    assert build_tokenizer(vocabulary)(text)["input_ids"] == [vocabulary[piece] for piece in pieces]


def test_random_text_is_split_by_the_plain_rule():
    letters = "aAbZ  ..,'-\n\t_17éÉΣ\u03c3\u0391\u0301\u0345İßǅ½²日Ⓐ\x1c\x1f\x85\u00a0\u200b😀"
    generator = random.Random(0)
    texts = ["".join(generator.choices(letters, k=generator.randint(0, 12))) for _ in range(5000)]
    vocabulary = vocabulary_of({piece for text in texts for piece in plain_pieces(text)})
    encoded = build_tokenizer(vocabulary)(texts, truncation=False)["input_ids"]
    expected = [[vocabulary[piece] for piece in plain_pieces(text)] for text in texts]
    assert encoded == expected
    assert [split_expression(text) for text in texts] == [plain_pieces(text) for text in texts]


def test_every_character_is_split_as_python_splits_it():
    # Characters that Python's Unicode tables do not know yet may be known to tokenizers.
    points = [chr(i) for i in range(0x110000) if unicodedata.category(chr(i)) not in ("Cn", "Cs", "Co")]
    texts = ["".join(f"a{char}b " for char in points[start : start + 64]) for start in range(0, len(points), 64)]
    vocabulary = vocabulary_of({piece for text in texts for piece in plain_pieces(text)})
    encoded = build_tokenizer(vocabulary, max_length=10**6)(texts)["input_ids"]
    assert encoded == [[vocabulary[piece] for piece in plain_pieces(text)] for text in texts]


WORDS = vocabulary_from_expressions(["the dog guy s hat t shirt left"])
# Sentence -> its words when unknown punctuation is dropped.
DROPPED = {
    "dog!": "dog",
    "guy's hat": "guy s hat",
    "guy\u2019s hat; guy\u00b4s t-shirt": "guy s hat guy s t shirt",
    "\u201cdog\u201d \u2014 (left) ...": "dog left",
    ". the -- dog .": "the dog",
    "dog\u200b \u200eleft\ufeff": "dog left",  # invisible characters
    "$dog = <hat>|^`~+": "dog hat",
    "the zebra, left": "the <unk> left",
    "the 🐶": "the <unk>",
    "the ← 🐶!": "the <unk>",
    "dog_hat": "<unk>",
    "?!": "<unk>",
    " ... ": "<unk>",
    ".": "",
}


@pytest.mark.parametrize("text", DROPPED)
def test_unknown_punctuation_is_dropped_next_to_words(text, tmp_path):
    tokenizer = build_tokenizer(WORDS, drop_unknown_punctuation=True)
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert each.convert_ids_to_tokens(each(text)["input_ids"]) == DROPPED[text].split()


def test_known_punctuation_is_kept():
    words = WORDS | {"'": 20, " - ": 21, "..": 22, "?": 23, "[": 24}
    tokenizer = build_tokenizer(words, drop_unknown_punctuation=True)
    text = "[guy's - hat.. - dog? left? 't"
    tokens = ["[", "guy", "'", "s", " - ", "hat", "dog", "left", "t"]
    assert tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]) == tokens
    assert tokenizer("guy..")["input_ids"] == [WORDS["guy"], 22]


def keeps(piece: str, known: set[str]) -> bool:
    """The rule for dropping, without the tokenizer's expressions."""
    categories = ("P", "Sk", "Cc", "Cf", "Z")
    drops = [
        char != "_" and (unicodedata.category(char).startswith(categories) or char in "$+<=>^`|~") for char in piece
    ]
    return piece in known or not all(drops)


def test_dropping_agrees_with_the_plain_rule_on_random_text():
    letters = "aAb_1 ..,'-!\"$€←🐶\n\u0301\u200b\u2019\u00b4\x1f"
    generator = random.Random(1)
    texts = ["".join(generator.choices(letters, k=generator.randint(0, 10))) for _ in range(5000)]
    known = {piece for text in texts[:50] for piece in plain_pieces(text)}
    vocabulary = vocabulary_of(known)
    encoded = build_tokenizer(vocabulary, drop_unknown_punctuation=True)(texts)["input_ids"]
    for text, ids in zip(texts, encoded, strict=True):
        pieces = plain_pieces(text)
        kept = [piece for piece in pieces if keeps(piece, known)] if len(pieces) > 1 else pieces
        assert ids == [vocabulary.get(piece, SPECIAL_TOKENS["<unk>"]) for piece in kept], text


def test_composed_and_decomposed_text_are_the_same(tmp_path):
    (tmp_path / "vocabulary.txt").write_text("<pad>\n<go>\n<eos>\n<unk>\ncafe\u0301\n", encoding="utf-8")
    vocabulary = read_vocabulary(tmp_path / "vocabulary.txt")
    assert vocabulary == vocabulary_from_expressions(["cafe\u0301"]) == SPECIAL_TOKENS | {"café": 4}
    for drop in (False, True):
        tokenizer = build_tokenizer(vocabulary, drop_unknown_punctuation=drop)
        assert tokenizer("Cafe\u0301 CAFÉ")["input_ids"] == [4, 4]


def test_pads_on_the_left_and_keeps_the_first_words():
    words = [f"w{index}" for index in range(30)]
    vocabulary = SPECIAL_TOKENS | {word: 4 + index for index, word in enumerate(words)}
    tokenizer = build_tokenizer(vocabulary)
    short = tokenizer("w0 unheard w2.", **PADDED)
    assert short["input_ids"] == [0] * 17 + [4, 3, 6]
    assert short["attention_mask"] == [0] * 17 + [1] * 3
    assert tokenizer(" ".join(words), **PADDED)["input_ids"] == list(range(4, 24))
    assert build_tokenizer(vocabulary, max_length=5)("w0", **PADDED)["input_ids"] == [0, 0, 0, 0, 4]
    assert build_tokenizer(vocabulary, max_length=1)("w1 w2", **PADDED)["input_ids"] == [5]
    assert tokenizer.pad({"input_ids": [[4], [5, 6]]})["input_ids"] == [[0, 4], [5, 6]]


def test_ids_survive_saving_and_reloading_with_gaps(tmp_path):
    vocabulary = SPECIAL_TOKENS | {"dog": 12111, "the": 40, "left": 7, "pad": 9}
    sentences = ["The dog, left.", "<pad> the <unk>", "dog " * 25, "it's"]
    tokenizer = build_tokenizer(vocabulary)
    expected = tokenizer(sentences, **PADDED)
    for generation in range(2):
        folder = tmp_path / str(generation)
        tokenizer.save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.get_vocab() == vocabulary
        assert dict(tokenizer(sentences, **PADDED)) == dict(expected)
    assert expected["input_ids"][0][-4:] == [40, 12111, 3, 7]
    assert expected["input_ids"][1][-7:] == [3, 9, 3, 40, 3, 3, 3]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 2, 3)
    assert (tokenizer.model_max_length, tokenizer.padding_side, tokenizer.truncation_side) == (20, "left", "right")


def test_read_vocabulary_gives_a_repeated_word_its_last_line(tmp_path):
    path = tmp_path / "vocabulary.txt"
    path.write_text("<pad>\n<go>\n<eos>\n<unk>\nthe\nétoile\n\nthe\n", encoding="utf-8")
    assert read_vocabulary(path) == SPECIAL_TOKENS | {"étoile": 5, "the": 7}
    tokenizer = build_tokenizer(read_vocabulary(path))
    assert tokenizer("The étoile")["input_ids"] == [7, 5]


def test_read_vocabulary_refuses_a_file_without_the_special_tokens(tmp_path):
    path = tmp_path / "vocabulary.txt"
    path.write_text("<pad>\n<eos>\n<go>\n<unk>\nthe\n")
    with pytest.raises(ValueError, match=r"vocabulary\.txt, got .*'<go>': 2"):
        read_vocabulary(path)


def test_read_vocabulary_refuses_another_encoding(tmp_path):
    (tmp_path / "vocabulary.txt").write_bytes("<pad>\n<go>\n<eos>\n<unk>\ncafé\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"vocabulary\.txt in UTF-8") as caught:
        read_vocabulary(tmp_path / "vocabulary.txt")
    assert not isinstance(caught.value, UnicodeError)


def test_vocabulary_from_expressions_orders_by_count():
    sentences = ["The dog, left", "the cat's", "dog.", "the"]
    words = ["the", "dog", "'", "cat", "left", "s"]
    assert vocabulary_from_expressions(sentences) == SPECIAL_TOKENS | {word: 4 + i for i, word in enumerate(words)}
    assert vocabulary_from_expressions(iter(sentences), min_count=2) == SPECIAL_TOKENS | {"the": 4, "dog": 5}
    with pytest.raises(ValueError, match="one string"):
        vocabulary_from_expressions("the dog")


@pytest.mark.parametrize(
    "vocabulary, max_length, message",
    [
        ({"<pad>": 0, "dog": 1}, 20, "special tokens"),
        (SPECIAL_TOKENS | {"<unk>": 4}, 20, "'<unk>': 4"),
        (SPECIAL_TOKENS | {"dog": 4, "cat": 4}, 20, "shared ids"),
        (SPECIAL_TOKENS | {"dog": -1}, 20, "'dog' with the id -1"),
        (SPECIAL_TOKENS | {"dog": 2**32}, 20, "below 2.*'dog' with the id 4294967296"),
        (SPECIAL_TOKENS | {"dog": "4"}, 20, "'dog' with the id '4'"),
        (SPECIAL_TOKENS | {"\ud800": 4}, 20, "with the id 4"),
        (SPECIAL_TOKENS | {5: 4}, 20, "got 5 with the id 4"),
        (["<pad>"], 20, "words with their ids, got list"),
        (SPECIAL_TOKENS, 0, "max_length >= 1, got 0"),
        (SPECIAL_TOKENS, "20", "max_length >= 1, got '20'"),
    ],
)
def test_build_tokenizer_refuses_bad_vocabularies(vocabulary, max_length, message):
    with pytest.raises(ValueError, match=message):
        build_tokenizer(vocabulary, max_length=max_length)


@pytest.mark.parametrize("drop", [False, True])
def test_added_words_get_ids_of_their_own(drop, tmp_path):
    vocabulary = SPECIAL_TOKENS | {"dog": 4, "kid": 7, "cat": 9}
    tokenizer = build_tokenizer(vocabulary, drop_unknown_punctuation=drop)
    assert add_words(tokenizer, ["Zebra", "dog", "zebra", "cafe\u0301"]) == ["zebra", "café"]
    assert add_words(tokenizer, ["zebra"]) == []
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert each.get_vocab() == vocabulary | {"zebra": 10, "café": 11}
        assert each("zebra zebras kidney CAFÉ dog")["input_ids"] == [10, 3, 3, 11, 4]


def test_words_of_several_pieces_are_refused():
    tokenizer = build_tokenizer(WORDS)
    refused = {"zebra": "one string", ("t-shirts",): r"\['t', '-', 'shirts'\]", ("!",): "'!'", (" ",): "' '"}
    for words, message in refused.items():
        with pytest.raises(ValueError, match=message):
            add_words(tokenizer, words)
    assert tokenizer.get_vocab() == WORDS


@pytest.mark.parametrize("drop", [False, True])
def test_added_tokens_of_transformers_are_whole_words(drop, tmp_path):
    tokenizer = build_tokenizer(WORDS, drop_unknown_punctuation=drop)
    tokenizer.add_tokens([AddedToken("kid", single_word=True)])
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert each.convert_ids_to_tokens(each("the kidney a Kid.")["input_ids"]) == ["the", "<unk>", "<unk>", "kid"]
