"""Word vectors from small files, compared with how NumPy reads them."""

import logging

import numpy as np
import pytest
import torch

from modeling_restr import ReSTRConfig, ReSTRForImageSegmentation
from modeling_restr.data.word_vectors import (
    WordVectors,
    load_word_vectors,
    set_word_vectors,
    tokenizer_and_word_vectors,
)


SPECIAL_TOKENS = {"<pad>": 0, "<go>": 1, "<eos>": 2, "<unk>": 3}
WORDS = ["the", "dog", "é", "left", ". . .", "at name@domain.com", "1\xa01/2", "7"]
SENTENCES = ["The dog, left!", "the left dog", "unseen dog"]


def write_vectors(path, words=WORDS, dim=5, seed=0):
    """Writes a file in GloVe's format, and returns its vectors as NumPy reads the same decimals."""
    rng = np.random.default_rng(seed)
    rows = {word: [f"{number:.5g}" for number in rng.standard_normal(dim)] for word in words}
    path.write_bytes("".join(f"{word} {' '.join(numbers)}\n" for word, numbers in rows.items()).encode())
    return {word: np.array(numbers, dtype=np.float32) for word, numbers in rows.items()}


@pytest.mark.parametrize("dim", [1, 5, 300])
def test_rows_are_those_of_the_file(tmp_path, dim):
    vectors = write_vectors(tmp_path / "glove.txt", dim=dim)
    vocabulary = SPECIAL_TOKENS | {"left": 4, "the": 7, "é": 9, ". . .": 11, "at name@domain.com": 5, "1\xa01/2": 6}
    result = load_word_vectors(tmp_path / "glove.txt", vocabulary)
    assert result.matrix.shape == (12, dim)
    assert result.matrix.dtype == torch.float32
    for word, index in vocabulary.items() - SPECIAL_TOKENS.items():
        assert np.array_equal(result.matrix[index].numpy(), vectors[word])
    assert not result.matrix[0].any()
    assert result.found == ["left", "at name@domain.com", "1\xa01/2", "the", "é", ". . ."]
    assert result.missing == []
    assert result.coverage == 1.0


def test_missing_words_are_drawn_with_the_statistics_of_the_found(tmp_path):
    path = tmp_path / "glove.txt"
    vectors = np.stack(list(write_vectors(path, words=[f"word{index}" for index in range(50)]).values()))
    words = [f"word{index}" for index in range(50)] + [f"missing{index}" for index in range(5000)]
    vocabulary = SPECIAL_TOKENS | {word: index for index, word in enumerate(words, start=4)}
    result = load_word_vectors(path, vocabulary)
    drawn = result.matrix[54:].numpy()
    assert np.allclose(drawn.mean(axis=0), vectors.mean(axis=0), atol=5 * vectors.std() / 5000**0.5)
    assert np.allclose(drawn.std(axis=0), vectors.std(axis=0), rtol=0.05)
    assert len(np.unique(drawn, axis=0)) == 5000
    assert result.matrix[1:4].std() > 0  # special tokens other than padding are drawn too
    assert result.missing == [f"missing{index}" for index in range(5000)]
    assert result.coverage == 50 / 5050

    assert torch.equal(load_word_vectors(path, vocabulary).matrix, result.matrix)
    other = load_word_vectors(path, vocabulary, seed=1).matrix
    assert torch.equal(other[4:54], result.matrix[4:54])
    assert not torch.isclose(other[54:], result.matrix[54:]).all(dim=1).any()


def test_coverage_is_reported(tmp_path, caplog):
    write_vectors(tmp_path / "glove.txt")
    words = ["dog", *(f"strange{index}" for index in range(12)), "left"]
    vocabulary = SPECIAL_TOKENS | {word: index for index, word in enumerate(words, start=4)}
    result = load_word_vectors(tmp_path / "glove.txt", vocabulary)
    message = "2 of 14 words have a vector (14.3%); 12 drawn at random: 'strange0', 'strange1', "
    assert str(result).startswith(message)
    assert str(result).endswith("'strange9', ...")
    assert caplog.messages == [f"{tmp_path / 'glove.txt'}: {result}."]
    assert caplog.records[0].levelno == logging.WARNING


def test_first_of_two_vectors_counts(tmp_path):
    (tmp_path / "glove.txt").write_text("dog 1 2\ncat 3 4\ndog 5 6\n")
    result = load_word_vectors(tmp_path / "glove.txt", SPECIAL_TOKENS | {"dog": 4})
    assert result.matrix[4].tolist() == [1, 2]


@pytest.mark.parametrize("ending", ["\n", "\r\n", " \n"])
def test_line_endings_do_not_matter(tmp_path, ending):
    lines = ["dog -0.5 1e-3 +2.", "a\rb 1 .25 3E2", "7 4 5 6"]
    (tmp_path / "glove.txt").write_bytes(ending.join(lines).encode())
    matrix = load_word_vectors(tmp_path / "glove.txt", SPECIAL_TOKENS | {"dog": 4, "a\rb": 5, "7": 6}).matrix
    assert torch.equal(matrix[4:], torch.tensor([[-0.5, 1e-3, 2], [1, 0.25, 300], [4, 5, 6]]))


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        ("dog 0.1 0.2\ncat 0.3\n", 2, "expected a word and 2 numbers, as in the first line, got 'cat 0.3'"),
        ("dog 0.1 0.2\ncat 0.3 0.4 0.5\n", 2, "has more than 2 numbers, those of the first line"),
        ("dog 0.1 0.2\nleft 1 2\n\n", 3, "expected a word and 2 numbers, as in the first line, got ''"),
        ("dog 0.1 0.2\ncat 0.3 x\n", 2, "expected a word and 2 numbers, separated by single spaces, got 'cat 0.3 x'"),
        ("dog 0.1 0.2\ncat 0.3 nan\n", 2, "separated by single spaces"),
        ("dog 0.1 0.2\ncat  0.3 0.4\n", 2, "separated by single spaces"),
        ("dog 0.1 0.2\ncat 0.3  0.4\n", 2, "separated by single spaces"),
        ("dog 0.1 0.2\n 0.3 0.4\n", 2, "separated by single spaces"),
        ("cat 0.1 0.2\ndog 1.2.3 0.4\n", 2, "could not convert"),
        ("cat 0.1 0.2\ndog 1e99 0.4\n", 2, "beyond the range of float32"),
        ("dog\tand numbers\n", 1, "expected a word and its numbers, separated by single spaces"),
        ("400000 50\ndog 0.1 0.2\n", 1, "header of the word2vec format"),
        ("dog 0.1 0.2 " + 999 * "x" + "\n", 1, r"x\.\.\.'\.$"),
    ],
)
def test_malformed_lines_are_explained(tmp_path, content, line, message):
    (tmp_path / "glove.txt").write_text(content)
    with pytest.raises(ValueError, match=rf"glove\.txt, line {line}: .*{message}"):
        load_word_vectors(tmp_path / "glove.txt", SPECIAL_TOKENS | {"dog": 4, "left": 5})


def test_useless_files_and_vocabularies_are_explained(tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=r"empty\.txt is empty"):
        load_word_vectors(tmp_path / "empty.txt", SPECIAL_TOKENS | {"dog": 4})
    write_vectors(tmp_path / "glove.txt")
    with pytest.raises(ValueError, match="None of the 2 words"):
        load_word_vectors(tmp_path / "glove.txt", SPECIAL_TOKENS | {"hund": 4, "links": 5})
    with pytest.raises(ValueError, match="vocabulary with words"):
        load_word_vectors(tmp_path / "glove.txt", SPECIAL_TOKENS)


def test_from_sentences_to_tokenizer_and_vectors(tmp_path):
    vectors = write_vectors(tmp_path / "glove.txt")
    tokenizer, result = tokenizer_and_word_vectors(tmp_path / "glove.txt", sentences=SENTENCES)
    ids = tokenizer("The dog left", padding="max_length").input_ids
    assert len(ids) == 20
    embedded = result.matrix[ids].numpy()
    assert np.array_equal(embedded[-3:], np.stack([vectors[word] for word in ("the", "dog", "left")]))
    assert not embedded[:-3].any()
    assert result.missing == ["!", "unseen"]
    assert len(result.matrix) == max(tokenizer.get_vocab().values()) + 1

    tokenizer, result = tokenizer_and_word_vectors(
        tmp_path / "glove.txt", sentences=SENTENCES, min_count=2, max_length=6
    )
    assert result.missing == []
    assert tokenizer("unseen dog", padding="max_length").input_ids == [0, 0, 0, 0, 3, tokenizer.get_vocab()["dog"]]


def test_from_vocabulary_file_to_tokenizer_and_vectors(tmp_path):
    vectors = write_vectors(tmp_path / "glove.txt")
    (tmp_path / "vocabulary.txt").write_text("<pad>\n<go>\n<eos>\n<unk>\ndog\nthe\ndog\nleft\n")  # "dog" is 6, 4 a gap
    tokenizer, result = tokenizer_and_word_vectors(tmp_path / "glove.txt", vocabulary_file=tmp_path / "vocabulary.txt")
    assert tokenizer("the dog").input_ids == [5, 6]
    assert result.matrix.shape == (8, 5)
    assert np.array_equal(result.matrix[5:].numpy(), np.stack([vectors[word] for word in ("the", "dog", "left")]))


def test_words_come_from_exactly_one_source(tmp_path):
    with pytest.raises(ValueError, match="got neither"):
        tokenizer_and_word_vectors(tmp_path / "glove.txt")
    with pytest.raises(ValueError, match="got both"):
        tokenizer_and_word_vectors(tmp_path / "glove.txt", sentences=SENTENCES, vocabulary_file="vocabulary.txt")


def build_model(vocab_size: int, dim: int) -> ReSTRForImageSegmentation:
    encoder = {"num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    vision_config = {**encoder, "hidden_size": 8, "image_size": 16, "patch_size": 8}
    text_config = {**encoder, "vocab_size": vocab_size, "hidden_size": dim, "projection_dim": 8}
    return ReSTRForImageSegmentation(
        ReSTRConfig(vision_config=vision_config, text_config=text_config, num_attention_heads=1)
    )


def test_vectors_become_the_trainable_embedding_of_a_model(tmp_path):
    write_vectors(tmp_path / "glove.txt")
    tokenizer, result = tokenizer_and_word_vectors(tmp_path / "glove.txt", sentences=SENTENCES)
    model = build_model(*result.matrix.shape)
    set_word_vectors(model, result)
    embedding = model.model.text_model.embeddings.embed_tokens
    ids = tokenizer(SENTENCES, padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(embedding(ids), result.matrix[ids])
    assert embedding.weight.requires_grad
    embedding.weight.data.zero_()
    assert result.matrix.any()  # the model has a copy


@pytest.mark.parametrize(("vocab_size", "dim"), [(6, 4), (5, 5)])
def test_model_of_another_size_is_explained(vocab_size, dim):
    vectors = WordVectors(torch.zeros(6, 5), found=["dog"], missing=["cat"])
    message = rf"has {vocab_size} word vectors of dimension {dim}, but 6 of dimension 5.*vocab_size=6, hidden_size=5"
    with pytest.raises(ValueError, match=message):
        set_word_vectors(build_model(vocab_size, dim), vectors)
