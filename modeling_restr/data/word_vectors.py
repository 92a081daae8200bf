"""Pretrained word vectors (GloVe, Pennington et al., EMNLP 2014) as initial values of the word embedding."""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ..tokenization_restr import (
    PAD_TOKEN,
    SPECIAL_TOKENS,
    build_tokenizer,
    read_vocabulary,
    vocabulary_from_expressions,
)


logger = logging.getLogger(__name__)

_NUMBER = re.compile(rb"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
_NUMBER_CHARACTERS = b"0123456789+-.eE "
_NUM_WORDS_SHOWN = 10


@dataclass(frozen=True)
class WordVectors:
    """
    Word vectors of a vocabulary.

    matrix: (largest id + 1, dim) float32. Row i is the vector of the word with the id i.
    found: The words with a vector in the file, sorted by id.
    missing: The words without one, sorted by id. Special tokens are in neither list.
    """

    matrix: torch.Tensor
    found: list[str]
    missing: list[str]

    @property
    def coverage(self) -> float:
        """Share of the words with a vector in the file, 0 to 1."""
        return len(self.found) / (len(self.found) + len(self.missing))

    def __str__(self) -> str:
        total = len(self.found) + len(self.missing)
        shown = ", ".join(map(repr, self.missing[:_NUM_WORDS_SHOWN]))
        more = ", ..." if len(self.missing) > _NUM_WORDS_SHOWN else ""
        missing = f"; {len(self.missing):,} drawn at random: {shown}{more}" if self.missing else ""
        return f"{len(self.found):,} of {total:,} words have a vector ({self.coverage:.1%}){missing}"


def load_word_vectors(path: str | Path, vocabulary: Mapping[str, int], *, seed: int = 0) -> WordVectors:
    """
    Read the vectors of a vocabulary's words from a file in GloVe's text format: one word per line and its numbers,
    separated by single spaces. The first line determines the dimension.

    A word that the file lacks gets numbers from a normal distribution with the mean and the standard deviation of the
    found vectors in each channel. So do special tokens and ids without a word. Padding is zeros. A word that occurs
    twice gets its first vector. The coverage is logged.

    The file is read as a stream, and only the wanted rows are kept. Words must match exactly; the tokenizer's are in
    lower case.

    Args:
        path: The file, plain text (UTF-8), such as `glove.840B.300d.txt`.
        vocabulary: {word: id}.
        seed: Seed of the random numbers. The same seed gives the same matrix.

    Raises:
        ValueError: A line is malformed or has another dimension (the message names it), or the file is empty or has
            none of the words.
    """
    words = sorted(vocabulary.keys() - SPECIAL_TOKENS.keys(), key=vocabulary.__getitem__)
    if not words:
        raise ValueError("Expected a vocabulary with words, got only special tokens.")
    rows: dict[str, np.ndarray] = {}
    for word, row in _read_rows(Path(path), {word.encode() for word in words}):
        rows.setdefault(word, row)
    if not rows:
        raise ValueError(
            f"None of the {len(words)} words of the vocabulary has a vector in {path}: is it the right file?"
        )

    found = [word for word in words if word in rows]
    vectors = np.stack([rows[word] for word in found])  # (found, dim)
    noise = np.random.default_rng(seed).standard_normal((max(vocabulary.values()) + 1, vectors.shape[1]))
    matrix = (vectors.mean(axis=0) + vectors.std(axis=0) * noise).astype(np.float32)
    matrix[[vocabulary[word] for word in found]] = vectors
    if PAD_TOKEN in vocabulary:
        matrix[vocabulary[PAD_TOKEN]] = 0.0
    result = WordVectors(torch.from_numpy(matrix), found, [word for word in words if word not in rows])
    logger.log(logging.WARNING if result.missing else logging.INFO, "%s: %s.", path, result)
    return result


def tokenizer_and_word_vectors(
    path: str | Path,
    *,
    sentences: Iterable[str] | None = None,
    vocabulary_file: str | Path | None = None,
    min_count: int = 1,
    max_length: int = 20,
    seed: int = 0,
) -> tuple[PreTrainedTokenizerFast, WordVectors]:
    """
    Build the tokenizer of a new model and its word vectors.

    Args:
        path: A file in GloVe's text format, see [`load_word_vectors`].
        sentences: Referring expressions whose words become the vocabulary.
        vocabulary_file: Vocabulary file with one word per line, instead of `sentences`.
        min_count: Number of times that a word must occur in `sentences` to be in the vocabulary.
        max_length: Number of word slots of the model.
        seed: Seed of the vectors of missing words.

    Returns:
        The tokenizer and the vectors. Their model needs `ReSTRTextConfig(vocab_size=rows, hidden_size=dim)` with
        `rows, dim = vectors.matrix.shape`. [`set_word_vectors`] copies the vectors into it.

    Raises:
        ValueError: Not exactly one of `sentences` and `vocabulary_file` is given, or one of the files is malformed.
    """
    if sentences is not None and vocabulary_file is None:
        vocabulary = vocabulary_from_expressions(sentences, min_count)
    elif vocabulary_file is not None and sentences is None:
        vocabulary = read_vocabulary(vocabulary_file)
    else:
        given = "neither" if sentences is None else "both"
        raise ValueError(f"Expected exactly one of `sentences` and `vocabulary_file`, got {given}.")
    return build_tokenizer(vocabulary, max_length), load_word_vectors(path, vocabulary, seed=seed)


def set_word_vectors(model: PreTrainedModel, word_vectors: WordVectors) -> None:
    """Copy the vectors into a model's word embedding, which stays trainable; `ValueError` if the sizes differ."""
    weight: Any = model.get_input_embeddings().weight
    if weight.shape != word_vectors.matrix.shape:
        rows, dim = word_vectors.matrix.shape
        raise ValueError(
            f"The model has {weight.shape[0]} word vectors of dimension {weight.shape[1]}, but {rows} of dimension "
            f"{dim} were read: build the model with `text_config=ReSTRTextConfig(vocab_size={rows}, "
            f"hidden_size={dim}, ...)`."
        )
    with torch.no_grad():
        weight.copy_(word_vectors.matrix)


def _read_rows(path: Path, wanted: set[bytes]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (word, vector) of the wanted words in the file's order, and check the form of all lines."""
    dim = None
    with (
        open(path, "rb") as file,  # bytes: only "\n" ends a line, and unwanted words need no decoding
        tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc=path.name) as progress,
    ):
        for number, line in enumerate(file, start=1):
            progress.update(len(line))
            line = line.rstrip(b" \r\n")
            try:
                if dim is None:
                    dim = _infer_dimension(line)
                word, numbers = _split_line(line, dim)
                if word in wanted:
                    yield word.decode(), _parse_numbers(numbers)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
    if dim is None:
        raise ValueError(f"{path} is empty: expected one word and its numbers per line.")


def _infer_dimension(line: bytes) -> int:
    """The number of numbers at the end of the first line, after the word, which takes at least one field."""
    fields = line.split(b" ")
    dim = 0
    while dim < len(fields) - 1 and _NUMBER.fullmatch(fields[-1 - dim]):
        dim += 1
    if dim == 0:
        raise ValueError(f"expected a word and its numbers, separated by single spaces, got {_shorten(line)}.")
    if len(fields) == 2 and all(field.isdigit() for field in fields):
        raise ValueError(
            f"{_shorten(line)} is the header of the word2vec format, which GloVe's does not have: remove this line."
        )
    return dim


def _split_line(line: bytes, dim: int) -> tuple[bytes, bytes]:
    """The word, which may contain spaces (as some in glove.840B), and its numbers."""
    num_spaces = line.count(b" ")
    if num_spaces < dim:
        raise ValueError(f"expected a word and {dim} numbers, as in the first line, got {_shorten(line)}.")
    word = line.split(b" ", 1)[0] if num_spaces == dim else line.rsplit(b" ", dim)[0]
    numbers = line[len(word) + 1 :]
    single_spaces = bool(word) and not word.endswith(b" ") and b"  " not in b" " + numbers
    if not single_spaces or numbers.translate(None, _NUMBER_CHARACTERS):
        raise ValueError(f"expected a word and {dim} numbers, separated by single spaces, got {_shorten(line)}.")
    if num_spaces > dim and _NUMBER.fullmatch(word.rpartition(b" ")[2]):
        raise ValueError(f"has more than {dim} numbers, those of the first line: {_shorten(line)}.")
    return word, numbers


def _parse_numbers(numbers: bytes) -> np.ndarray:
    with np.errstate(over="ignore"):
        vector = np.array([float(field) for field in numbers.split(b" ")], dtype=np.float32)
    if not np.isfinite(vector).all():
        raise ValueError("has numbers beyond the range of float32.")
    return vector


def _shorten(line: bytes, length: int = 60) -> str:
    text = line.decode(errors="replace")
    return repr(text if len(text) <= length else f"{text[:length]}...")
