// The words of a sentence as `modeling_restr/tokenization_restr.py` reads them, which explains the rule.

const WORD = String.raw`\p{L}\p{N}_`;
const SPACE = String.raw`\p{White_Space}\x1c-\x1f`;
const CASED = String.raw`[\p{Cased}&&\P{Case_Ignorable}]`;
const FINAL_SIGMA = new RegExp(
  String.raw`(?<=${CASED}\p{Case_Ignorable}*)\u03a3(?!\p{Case_Ignorable}*${CASED})`, "gv",
);
const PUNCTUATION = String.raw`[[\p{P}\p{Sk}\p{Cc}\p{Cf}\p{White_Space}$+<=>^\`\|~]--[_]]`;
const OUTER_SPACE = new RegExp(`^[${SPACE}]+|[${SPACE}]+$`, "gv");
const LAST_DOT = new RegExp(`(?<=^|[${WORD}])\\.$`, "v");
const PIECES = new RegExp(`[${WORD}]+|[^${WORD}]+`, "gv");
const ASCII_EDGES = /^[\t-\r -\/:-@\[-`\{-~]+|[\t-\r -\/:-@\[-`\{-~]+$/g;

/** The tokenizer of `build_tokenizer`, with the padding of the processor. */
export class Tokenizer {
  /**
   * @param {object} tokenizerJson - The parsed tokenizer.json.
   * @param {object} settings - `tokenizer` of settings.json: maxLength, padId, unknownId, dropUnknownPunctuation.
   */
  constructor(tokenizerJson, settings) {
    this.settings = settings;
    this.vocabulary = new Map(Object.entries(tokenizerJson.model.vocab));
    this.droppedPunctuation = settings.dropUnknownPunctuation ? findDropped(this.vocabulary.keys()) : null;
  }

  /**
   * Look up the words of a sentence.
   *
   * @param {string} text - The sentence. It has no words if `words` comes back empty.
   * @returns {{inputIds: BigInt64Array, unknownWords: string[], cutWords: string[],
   *   words: {text: string, start: number, end: number, known: boolean}[]}}
   *   The ids, padded on the left to maxLength; the distinct words that the model does not know, among those that it
   *   reads; those beyond maxLength; and all pieces, with their places in `text`.
   */
  encode(text) {
    const { maxLength, padId, unknownId } = this.settings;
    const composed = text.toWellFormed().normalize("NFC");
    const origins = text === composed ? null : findOrigins(text);
    const pieces = this.#split(composed).map(([piece, start, end]) => ({
      id: this.vocabulary.get(piece) ?? unknownId,
      word: stripPunctuation(composed.slice(start, end)),
      start: origins?.starts[start] ?? start,
      end: origins?.ends[end - 1] ?? end,
    }));
    const read = pieces.slice(0, maxLength);
    const inputIds = new BigInt64Array(maxLength).fill(BigInt(padId));
    inputIds.set(read.map(({ id }) => BigInt(id)), maxLength - read.length);
    return {
      inputIds,
      unknownWords: listWords(read.filter(({ id }) => id === unknownId)),
      cutWords: listWords(pieces.slice(maxLength)),
      words: pieces.map(({ id, word, start, end }) => ({ text: word, start, end, known: id !== unknownId })),
    };
  }

  /** [piece, start, end] of the pieces that are looked up, with their places in the composed text. */
  #split(composed) {
    let characters = Array.from(composed, (text, index) => ({ text, start: 0, end: 0 }));
    let place = 0;
    for (const character of characters) {
      character.start = place;
      character.end = place += character.text.length;
    }
    characters = replace(characters, OUTER_SPACE, "");
    characters = replace(characters, FINAL_SIGMA, "\u03c2");
    characters = characters.flatMap(({ text, start, end }) => // character by character, as in Python's tokenizers
      Array.from(text.toLowerCase(), (lower) => ({ text: lower, start, end })));
    characters = replace(characters, LAST_DOT, "");
    if (this.droppedPunctuation) characters = replace(characters, this.droppedPunctuation, " ");
    return findPieces(characters);
  }
}

/** An expression for runs of punctuation that the vocabulary lacks, next to words. */
function findDropped(vocabulary) {
  const hasWord = new RegExp(`[${WORD}]`, "v");
  const known = [...vocabulary].filter((piece) => !hasWord.test(piece)).sort().map(escape).join("|");
  const run = known ? `(?!(?:${known})(?:[${WORD}]|$))${PUNCTUATION}+` : `${PUNCTUATION}+`;
  return new RegExp(`(?<=[${WORD}])${run}(?=[${WORD}]|$)|^${run}(?=[${WORD}])`, "gv");
}

function escape(text) {
  return Array.from(text, (character) => `\\u{${character.codePointAt(0).toString(16)}}`).join("");
}

/** Replace the matches of an expression in a list of characters, whose places in the text stay. */
function replace(characters, expression, replacement) {
  const { text, indices } = join(characters);
  const kept = [];
  let next = 0;
  for (const match of text.matchAll(new RegExp(expression, expression.flags.replace("g", "") + "g"))) {
    const [first, last] = [indices[match.index], indices[match.index + match[0].length - 1]];
    kept.push(...characters.slice(next, first));
    const { start } = characters[first];
    if (replacement) kept.push({ text: replacement, start, end: characters[last].end });
    next = last + 1;
  }
  return [...kept, ...characters.slice(next)];
}

/** The text of a list of characters, and for each of its code units the character that it is of. */
function join(characters) {
  const indices = characters.flatMap(({ text }, index) => Array(text.length).fill(index));
  return { text: characters.map(({ text }) => text).join(""), indices };
}

function findPieces(characters) {
  const { text, indices } = join(characters);
  const isSpace = new RegExp(`^[${SPACE}]+$`, "v");
  return Array.from(text.matchAll(PIECES))
    .filter(([piece]) => !isSpace.test(piece))
    .map(({ 0: piece, index }) => {
      const last = characters[indices[index + piece.length - 1]];
      return [piece, characters[indices[index]].start, last.end];
    });
}

/** Where each code unit of the composed text starts and ends in the text, grapheme by grapheme. */
function findOrigins(text) {
  const [starts, ends] = [[], []];
  for (const { segment, index } of new Intl.Segmenter().segment(text)) {
    for (let unit = segment.normalize("NFC").length; unit > 0; unit--) {
      starts.push(index);
      ends.push(index + segment.length);
    }
  }
  return { starts, ends };
}

function listWords(pieces) {
  return [...new Set(pieces.map(({ word }) => word))];
}

/** The piece without ASCII punctuation at its ends, or without white space if it is punctuation alone. */
function stripPunctuation(piece) {
  return piece.replace(ASCII_EDGES, "") || piece.replace(OUTER_SPACE, "");
}
