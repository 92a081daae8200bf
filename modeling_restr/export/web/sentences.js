// The list of sentences with their results, and the marks of words that the model does not read.

import { toRGB } from "./stage.js";

/**
 * @typedef {object} Sentence
 * @property {string} text
 * @property {object} words What `Tokenizer.encode` returned.
 * @property {string} color Such as "#e69f00".
 * @property {number} number Of its colour, from 1.
 * @property {?object} result The worker's result, once there is one.
 * @property {?{score: number, share: number}} mask Its mean probability inside, and its share of the photo.
 */

export class SentenceList {
  #list;
  #actions;
  #items = new Map(); // by sentence

  /**
   * @param {HTMLOListElement} list
   * @param {{look: Function, toggle: Function, save: Function, remove: Function}} actions Called with a sentence, or
   *   `look` with null when none is pointed at.
   */
  constructor(list, actions) {
    this.#list = list;
    this.#actions = actions;
  }

  /** @param {Sentence} sentence */
  add(sentence) {
    const item = document.createElement("li");
    item.style.setProperty("--color", sentence.color);
    item.style.setProperty("--on-color", contrastingColor(sentence.color));
    const mask = `the mask of “${sentence.text}”`;
    const show = makeButton("show", `Look at ${mask} alone`, () => this.#actions.toggle(sentence));
    show.append(makeElement("span", "number", sentence.number), makeWords(sentence.words, sentence.text));
    const result = makeElement("span", "result", "");
    result.id = `result-${sentence.number}`;
    show.setAttribute("aria-describedby", result.id);
    show.append(result);
    const save = makeButton("icon save", `Download ${mask}`, () => this.#actions.save(sentence));
    save.innerHTML = makeIcon("download");
    const remove = makeButton("icon remove", `Remove “${sentence.text}”`, () => this.#actions.remove(sentence));
    remove.innerHTML = makeIcon("close");
    item.append(show, save, remove);
    item.addEventListener("pointerenter", (event) => event.pointerType === "mouse" && this.#actions.look(sentence));
    item.addEventListener("pointerleave", () => this.#actions.look(null));
    this.#list.append(item);
    this.#items.set(sentence, item);
  }

  remove(sentence) {
    this.#items.get(sentence).remove();
    this.#items.delete(sentence);
  }

  /**
   * Shows a sentence's result.
   * @param {Sentence} sentence
   * @param {boolean} isAlone Whether its mask is looked at alone.
   * @param {string} waiting What to show as long as there is no result.
   */
  update(sentence, isAlone, waiting) {
    const item = this.#items.get(sentence);
    item.classList.toggle("waiting", !sentence.result);
    item.querySelector(".show").setAttribute("aria-pressed", isAlone);
    item.querySelector(".save").disabled = !sentence.result;
    item.querySelector(".result").textContent = sentence.mask ? describeMask(sentence.mask) : waiting;
  }
}

/** "score 0.94 · 12.3 % of the photo" */
export function describeMask({ score, share }) {
  if (!share) return "no pixel is above the threshold";
  return `score ${score.toFixed(2)} · ${(100 * share).toFixed(1)} % of the photo`;
}

/** What is wrong with the words of a sentence, or "". */
export function describeLostWords({ unknownWords, cutWords }) {
  const problems = [];
  if (unknownWords.length) problems.push(`The model does not know ${quote(unknownWords)}. Use other words.`);
  if (cutWords.length) {
    problems.push(`The sentence is too long, and ${quote(cutWords)} was not read. Use fewer words.`);
  }
  return problems.join(" ");
}

function quote(words) {
  return words.map((word) => `“${word}”`).join(", ");
}

/** A text with marks on the words that the model does not know, and on those that it does not read. */
export function makeWords({ words, inputIds }, text) {
  const element = makeElement("span", "words", "");
  const numRead = inputIds.length; // or more than there are words
  let end = 0;
  words.forEach((word, index) => {
    if (word.known && index < numRead) return;
    element.append(text.slice(end, word.start));
    element.append(makeElement(index < numRead ? "u" : "s", "", text.slice(word.start, word.end)));
    end = word.end;
  });
  element.append(text.slice(end));
  return element;
}

function makeIcon(name) {
  return `<svg aria-hidden="true"><use href="icons.svg#${name}"/></svg>`;
}

function makeButton(className, label, action) {
  const button = makeElement("button", className, "");
  button.type = "button";
  button.setAttribute("aria-label", label);
  button.addEventListener("click", action);
  return button;
}

export function makeElement(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.textContent = text;
  return element;
}

/** Black or white, whichever is easier to read on a colour. */
function contrastingColor(color) {
  const [red, green, blue] = toRGB(color);
  return 0.299 * red + 0.587 * green + 0.114 * blue > 110 ? "#111" : "#fff";
}
