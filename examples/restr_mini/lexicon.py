"""
Move the vectors of words that no sentence of the training has towards the names that WordNet lists them under, so that
a trained model finds the car as "the sedan". The vectors of all words of the sentences stay.

    python examples/restr_mini/lexicon.py runs/restr-mini/model --photos PHOTOS --photos MORE_PHOTOS \\
        --wordnet /usr/share/wordnet

PHOTOS are the folders of the training. The last folder has `index.noun` and `data.noun` of WordNet 3, as Debian's
package wordnet-base installs them.
"""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from scenes import CATEGORIES
from sentences import spoken_words

from modeling_restr import ReSTRForImageSegmentation, ReSTRProcessor
from modeling_restr.data.records import read_json
from modeling_restr.hub import save_bundle
from modeling_restr.options import run


KINDS: list[str] = CATEGORIES["kinds"]  # names whose most frequent sense in WordNet is what the photographs show
NAME_SHARE = 0.7  # of the mean vector of the names in the new one; chosen on the validation photographs
MAX_STEPS = 6  # from a word to the name above it
PLURALS = (("ies", "y"), ("es", ""), ("s", ""), ("men", "man"))


class WordNet(NamedTuple):
    """
    The nouns of WordNet.

    first_synset: {noun: the synset of its most frequent sense}.
    hypernyms: {synset: the synsets above it}.
    """

    first_synset: dict[str, str]
    hypernyms: dict[str, list[str]]

    @classmethod
    def load(cls, folder: Path) -> "WordNet":
        """Load `index.noun` and `data.noun`. Their format is described in WordNet's manual page wndb(5)."""
        first_synset, hypernyms = {}, {}
        for line in _read_lines(folder / "index.noun"):
            fields = line.split()
            first_synset[fields[0]] = fields[-int(fields[2])]  # the synsets come last, the most frequent one first
        for line in _read_lines(folder / "data.noun"):
            synset, _, _, num_words, *fields = line.split(" | ")[0].split()
            pointers = fields[2 * int(num_words, 16) + 1 :]
            hypernyms[synset] = [to for symbol, to in zip(pointers[::4], pointers[1::4]) if symbol in ("@", "@i")]
        return cls(first_synset, hypernyms)

    def find_synset(self, word: str) -> str | None:
        """The synset of a noun or of its singular, or None."""
        singulars = [word.removesuffix(end) + new for end, new in PLURALS if word.endswith(end)]
        return next((self.first_synset[noun] for noun in (word, *singulars) if noun in self.first_synset), None)


def _read_lines(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if not line.startswith("  ")]  # the licence is indented


def find_names(word: str, names_of: Mapping[str, list[str]], wordnet: WordNet) -> list[str]:
    """The nearest of the names above a word, by the synset of each name. Synonyms of a name count as below it."""
    synset = wordnet.find_synset(word)
    level = {synset} if synset else set()
    for _ in range(MAX_STEPS + 1):
        found = sorted({name for synset in level for name in names_of.get(synset, ())})
        if found:
            return found
        level = {above for synset in level for above in wordnet.hypernyms[synset]}
    return []


def move_words(vectors: torch.Tensor, vocabulary: Mapping[str, int], spoken: set[str], wordnet: WordNet) -> list[str]:
    """
    Move vectors (words, dimensions), in place, most of the way to the mean vector of the names above them.

    Returns:
        The words that were moved. None of them is in `spoken`.
    """
    names_of = defaultdict(list)
    for name in KINDS:
        if name in vocabulary and (synset := wordnet.find_synset(name)):
            names_of[synset].append(name)
    moved = []
    for word, number in vocabulary.items():
        if word not in spoken and (names := find_names(word, names_of, wordnet)):
            target = vectors[[vocabulary[name] for name in names]].mean(0)
            vectors[number] = vectors[number].lerp(target, NAME_SHARE)
            moved.append(word)
    return moved


def main(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Folder of a trained restr-mini. It is overwritten.")],
    photos: Annotated[list[Path], typer.Option(help="Folder with the training's instances.json. Repeatable.")],
    wordnet: Annotated[Path, typer.Option(help="Folder with index.noun and data.noun of WordNet 3.")],
) -> None:
    """Move the vectors of words that no training sentence had towards the names that they are kinds of."""
    network = ReSTRForImageSegmentation.from_pretrained(model)
    processor = ReSTRProcessor.from_pretrained(model)
    embedding: Any = network.get_input_embeddings()
    vectors = embedding.weight.detach()
    vocabulary = processor.tokenizer.get_vocab()
    spoken = spoken_words(
        kind["name"] for folder in photos for kind in read_json(folder / "instances.json")["categories"]
    )
    moved = move_words(vectors, vocabulary, spoken, WordNet.load(wordnet))
    save_bundle(network, processor, model, dtype=torch.float16)
    print(f"Moved {len(moved):,} of {len(vocabulary):,} words.")


if __name__ == "__main__":
    run(main)
