"""ReSTR's tokenizer: a word-level vocabulary in a plain [`~transformers.PreTrainedTokenizerFast`].

`AutoTokenizer` loads a saved folder without any code of this package.
"""

from .requirements_restr import TRANSFORMERS  # noqa: F401  (first: checks the version of transformers)


# isort: split
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from numbers import Integral
from pathlib import Path

from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import NFC, Lowercase, Normalizer, Replace, Sequence as NormalizerSequence
from tokenizers.pre_tokenizers import PreTokenizer, Sequence as PreTokenizerSequence, Split
from transformers import PreTrainedTokenizerFast


PAD_TOKEN, GO_TOKEN, EOS_TOKEN, UNK_TOKEN = "<pad>", "<go>", "<eos>", "<unk>"
SPECIAL_TOKENS = {PAD_TOKEN: 0, GO_TOKEN: 1, EOS_TOKEN: 2, UNK_TOKEN: 3}

# Python's `\w` and white space, spelled out: the regex engine of tokenizers counts marks as word characters, and the
# four separators not as white space.
_WORD = r"[\p{L}\p{N}_]"
_SPACES = r"[\s\x1c-\x1f]+"
# Python lower-cases a capital sigma by its place in the word, `Lowercase` character by character. Python ignores
# characters that are both cased and ignorable, such as U+0345.
_CASED = r"[\p{Cased}&&\P{Case_Ignorable}]"
_FINAL_SIGMA = rf"(?<={_CASED}\p{{Case_Ignorable}}*)\u03a3(?!\p{{Case_Ignorable}}*{_CASED})"
# Characters that may be dropped as punctuation, which includes ASCII's symbols, single accents, control and invisible
# characters. Other symbols, such as emoji, and marks have a meaning.
_PUNCTUATION = r"[\p{P}\p{Sk}\p{Cc}\p{Cf}$+<=>^`|~\s&&[^_]]"


def split_expression(text: str) -> list[str]:
    r"""Split a referring expression into the pieces that are looked up, as the original does.

    The text is composed (NFC, which the original does not do), stripped, lower-cased and split by `(\W+)` with the
    separators kept. Pieces of white space alone and a last piece `"."` are dropped. Other pieces keep their spaces:
    `"man, left"` has the piece `", "`. The tokenizer of [`build_tokenizer`] reproduces this function.
    """
    composed = unicodedata.normalize("NFC", text)
    pieces = [piece for piece in re.split(r"(\W+)", composed.strip().lower()) if piece.strip()]
    return pieces[:-1] if pieces and pieces[-1] == "." else pieces


def read_vocabulary(path: str | Path) -> dict[str, int]:
    """Read a vocabulary file (UTF-8) with one word per line. A word's id is its line number, from 0.

    Words are composed (NFC). A word on several lines gets the id of the last one, as in the original. The ids then
    have gaps: the original's RefCOCO file has 12,112 lines and 12,107 distinct words. An embedding needs as many rows
    as the largest id + 1.

    Raises:
        ValueError: The file is not in UTF-8, or `<pad>`, `<go>`, `<eos>` and `<unk>` do not have the ids 0 to 3.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"Expected {path} in UTF-8, got something else: {error}. Save it as UTF-8.") from None
    lines = unicodedata.normalize("NFC", text).split("\n")
    vocabulary = {line.strip(): index for index, line in enumerate(lines) if line.strip()}
    _check_special_tokens(vocabulary, source=f"vocabulary file {path}")
    return vocabulary


def vocabulary_from_expressions(sentences: Iterable[str], min_count: int = 1) -> dict[str, int]:
    """Build a vocabulary from sentences: special tokens first, then words by decreasing count, ties alphabetically.

    Words seen fewer than `min_count` times are left out. So are separators with white space, such as `", "`, which a
    vocabulary file cannot hold and which are `<unk>` in the original.
    """
    _refuse_string(sentences)
    counts = Counter(piece for sentence in sentences for piece in split_expression(sentence))
    words = [word for word, count in counts.items() if count >= min_count and not re.search(r"\s", word)]
    words.sort(key=lambda word: (-counts[word], word))
    return SPECIAL_TOKENS | {word: len(SPECIAL_TOKENS) + index for index, word in enumerate(words)}


def build_tokenizer(
    vocabulary: Mapping[str, int], max_length: int = 20, drop_unknown_punctuation: bool = False
) -> PreTrainedTokenizerFast:
    """Build the tokenizer that splits as [`split_expression`] does and looks the pieces up in `vocabulary`.

    Unknown pieces become `<unk>`. With `padding="max_length", truncation=True` (the processor's defaults) ids are
    padded on the left to exactly `max_length`, and the first `max_length` words are kept. No token is added to a
    sentence, and the text `"<pad>"` in a sentence is text, not padding.

    Args:
        vocabulary: Word -> id, with `<pad>` 0, `<go>` 1, `<eos>` 2 and `<unk>` 3. The ids may have gaps, which
            survive saving and reloading.
        max_length: Number of word slots of the model, 20 in the original.
        drop_unknown_punctuation: Whether punctuation that the vocabulary lacks is dropped next to words.
            `"guy's t-shirt!"` is then `guy s t shirt`, without the three `<unk>` that the original gives. A sentence
            of punctuation alone stays one `<unk>`. tokenizer.json stores this setting.

    Raises:
        ValueError: A special token is missing or has another id, a word is not text, an id is not a whole number from
            0 to 2**32 - 1 or shared by two words, or `max_length` is not a positive whole number.
    """
    _check_special_tokens(vocabulary, source="vocabulary")
    for word, number in vocabulary.items():
        if not (_is_unicode(word) and isinstance(number, Integral) and 0 <= number < 2**32):
            raise ValueError(f"Expected words with ids >= 0 and below 2**32, got {word!r} with the id {number!r}.")
    if len(set(vocabulary.values())) < len(vocabulary):
        raise ValueError("Expected ids for one word each, got a vocabulary with shared ids.")
    if not (isinstance(max_length, Integral) and max_length >= 1):
        raise ValueError(f"Expected max_length >= 1, got {max_length!r}.")

    backend = Tokenizer(WordLevel(dict(vocabulary), unk_token=UNK_TOKEN))
    backend.normalizer = _build_normalizer(vocabulary if drop_unknown_punctuation else None)
    backend.pre_tokenizer = _build_pre_tokenizer()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        unk_token=UNK_TOKEN,
        additional_special_tokens=[GO_TOKEN],
        padding_side="left",
        truncation_side="right",
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
        split_special_tokens=True,
    )


def add_words(tokenizer: PreTrainedTokenizerFast, words: Iterable[str]) -> list[str]:
    """Add words to a tokenizer of [`build_tokenizer`], with the ids after its largest. Known words are skipped.

    In a vocabulary with gaps, `tokenizer.add_tokens` would assign ids that other words already have.

    Returns:
        The added words, lower-cased. The model needs a vector for each:
        `model.resize_token_embeddings(max(tokenizer.get_vocab().values()) + 1)`.

    Raises:
        ValueError: The tokenizer splits a word, or it has no letters or digits.
    """
    _refuse_string(words)
    vocabulary = tokenizer.get_vocab()
    first_id = max(vocabulary.values()) + 1
    added: dict[str, int] = {}
    for word in words:
        pieces = split_expression(word)
        if len(pieces) != 1 or not re.search(r"\w", pieces[0]):
            raise ValueError(f"Expected words of letters and digits, got {word!r}, which is split into {pieces}.")
        if pieces[0] not in vocabulary:
            added.setdefault(pieces[0], first_id + len(added))
    tokenizer.backend_tokenizer.model = WordLevel(vocabulary | added, unk_token=UNK_TOKEN)
    return list(added)


def _build_normalizer(known_punctuation: Iterable[str] | None) -> Normalizer:
    """Normalise as [`split_expression`] does. Unless `known_punctuation` is None, replace all other by white space."""
    steps = [
        NFC(),
        Replace(Regex(rf"\A{_SPACES}|{_SPACES}\z"), ""),
        Replace(Regex(_FINAL_SIGMA), "\u03c2"),
        Lowercase(),
        # A last piece "." comes alone or after a word.
        Replace(Regex(rf"(?:\A|(?<={_WORD}))\.\z"), ""),
    ]
    if known_punctuation is not None:
        known = "|".join(re.escape(piece) for piece in sorted(known_punctuation) if not re.search(r"\w", piece))
        piece = rf"(?!(?:{known})(?:{_WORD}|\z)){_PUNCTUATION}+" if known else rf"{_PUNCTUATION}+"
        steps.append(Replace(Regex(rf"(?<={_WORD}){piece}(?={_WORD}|\z)|\A{piece}(?={_WORD})"), " "))
    return NormalizerSequence(steps)


def _build_pre_tokenizer() -> PreTokenizer:
    return PreTokenizerSequence(
        [
            Split(Regex(rf"[^{_WORD[1:]}+"), behavior="isolated"),
            Split(Regex(rf"\A{_SPACES}\z"), behavior="removed"),
        ]
    )


def _refuse_string(texts: Iterable[str]) -> None:
    if isinstance(texts, str):
        raise ValueError(f"Expected a list of strings, got one string: {texts!r}.")


def _is_unicode(word: object) -> bool:
    """Whether a word is text without halves of surrogate pairs."""
    return isinstance(word, str) and not re.search(r"[\ud800-\udfff]", word)


def _check_special_tokens(vocabulary: Mapping[str, int], source: str) -> None:
    if not isinstance(vocabulary, Mapping):
        raise ValueError(f"Expected the {source} as words with their ids, got {type(vocabulary).__name__}.")
    found = {token: vocabulary.get(token) for token in SPECIAL_TOKENS}
    if found != SPECIAL_TOKENS:
        raise ValueError(f"Expected the special tokens {SPECIAL_TOKENS} in the {source}, got {found}.")
