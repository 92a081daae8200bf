// The page: connects the photo, the sentences, the model and the picture.

import { encodeMask, nameMask, pack, save } from "./downloads.js";
import { makeMask, measureMask } from "./mask.js";
import { Model } from "./model.js";
import { startServiceWorker } from "./offline.js";
import { SentenceList, describeLostWords, describeMask, makeElement, makeWords } from "./sentences.js";
import { connectSources, showExamples } from "./sources.js";
import { Stage } from "./stage.js";
import * as status from "./status.js";
import { Tokenizer } from "./tokenizer.js";

const MAX_CHARACTERS = 200; // per sentence; the model reads about the first 20 words
const MAX_SCORED_PIXELS = 1_000_000; // larger photos' scores and shares are computed on a smaller copy
const TYPING_PAUSE = 600; // milliseconds after which the last word counts as finished
const UNREADABLE = "This file cannot be read as an image: try a JPEG, PNG or WebP file.";

const $ = (id) => document.getElementById(id);

let settings, tokenizer, model, stage, list, exampleButtons;
let photo = null; // {blob, width, height, isEncoded}
let sentences = []; // see `Sentence` in sentences.js
let alone = null; // the sentence whose mask is shown alone, by a click
let pointedAt = null; // the one that the pointer is on
let isReady = false; // whether the model is loaded
let isRunning = false; // whether `runModel` is at work
let lastChoice = 0; // of a photo
let typingTimer;

async function start() {
  document.documentElement.dataset.started = "yes";
  const serviceWorker = startServiceWorker();
  [settings, tokenizer] = await loadSettings();
  stage = new Stage($("canvas"), settings.opacity);
  list = new SentenceList($("sentences"), { look, toggle, remove, save: saveMask });
  $("threshold").value = settings.threshold;
  exampleButtons = showExamples(settings.examples, chooseExample);
  describeModel();
  connectForm();
  connectControls();
  connectSources((blob) => choosePhoto(blob), showError);
  if (settings.examples.length) chooseExample(settings.examples[0]);
  await serviceWorker; // which keeps the model's files
  model = new Model(status.showProgress);
  if (navigator.connection?.saveData) status.askToDownload(settings.files, loadModel);
  else loadModel();
}

async function loadSettings() {
  const [readSettings, tokenizerJson] = await Promise.all(
    ["settings.json", "tokenizer.json"].map(async (file) => (await fetch(file)).json()),
  );
  return [readSettings, new Tokenizer(tokenizerJson, readSettings.tokenizer)];
}

/* The model */

async function loadModel() {
  hideError();
  status.showStart();
  try {
    status.showReady(await model.load(), settings.version);
    isReady = true;
    runModel();
  } catch (error) {
    status.offerToTryAgain(loadModel);
    showError(`The model could not be loaded: ${error.message}`);
  }
}

/** Runs the model until the photo is encoded and every sentence has a result. */
async function runModel() {
  if (isRunning || !isReady) return;
  isRunning = true;
  while (photo && (!photo.isEncoded || sentences.some(isWaiting))) {
    const current = photo;
    update();
    try {
      if (!photo.isEncoded) {
        await model.encode(photo.blob);
        current.isEncoded = true;
      } else {
        await answer(sentences.filter(isWaiting), current);
      }
    } catch (error) {
      if (current === photo) giveUp(error);
    }
  }
  isRunning = false;
  update();
}

async function answer(waiting, current) {
  const { results } = await model.segment(waiting.map(({ text }) => text));
  if (current !== photo) return;
  waiting.forEach((sentence, index) => {
    sentence.result = results[index];
  });
  measureMasks();
  const measured = waiting.filter(({ mask }) => mask); // the others were removed meanwhile
  $("answer").textContent = measured.map(({ text, mask }) => `${text}: ${describeMask(mask)}`).join(". ");
}

/** After an error of the model: removes what it could not answer, so that it is not asked again and again. */
function giveUp(error) {
  if (!photo.isEncoded) {
    photo = null;
    removeAll();
    stage.clear();
    showError(error.message);
  } else {
    for (const sentence of sentences.filter(isWaiting)) remove(sentence);
    showError(`${error.message} Reload the page if it happens again.`);
  }
}

function isWaiting({ result }) {
  return !result;
}

/* Photos */

/**
 * Shows a photo and encodes it. The sentences about the one before are removed.
 * @param {Blob | Promise<Blob>} source
 * @param {?{texts: string[], credit: string}} example What an example photo comes with.
 */
async function choosePhoto(source, example = null) {
  const choice = (lastChoice += 1);
  let blob, bitmap;
  try {
    blob = await source;
    bitmap = await createImageBitmap(blob, { imageOrientation: "from-image" });
  } catch {
    return showError(example ? "The example photo could not be loaded. Check the connection." : UNREADABLE);
  }
  if (choice !== lastChoice) return; // another photo was chosen meanwhile
  hideError();
  removeAll();
  photo = { blob, width: bitmap.width, height: bitmap.height, isEncoded: false };
  stage.setPhoto(bitmap);
  bitmap.close();
  $("stage").style.setProperty("--ratio", photo.width / photo.height);
  for (const [shown, button] of exampleButtons) button.setAttribute("aria-pressed", shown === example);
  $("credit").replaceChildren(...(example ? ["Photo: ", ...linkAddresses(example.credit)] : []));
  for (const text of example?.texts ?? []) add(text);
  focusSentence();
  update();
  runModel();
}

function chooseExample(example) {
  return choosePhoto(fetch(example.file).then((response) => response.blob()), example);
}

/* Sentences */

function connectForm() {
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = $("sentence").value.normalize("NFC").split(/\s+/).filter(Boolean).join(" ");
    const problem = findProblem(text);
    $("sentence").value = problem ? text : "";
    showMarks();
    if (problem) return showError(problem);
    hideError();
    add(text);
    if (matchMedia("(pointer: coarse)").matches) $("sentence").blur(); // the keyboard would cover the masks
    update();
    runModel();
  });
  $("sentence").addEventListener("input", () => {
    clearTimeout(typingTimer);
    typingTimer = setTimeout(showMarks, TYPING_PAUSE, true);
    showMarks();
  });
  $("sentence").addEventListener("scroll", () => {
    $("marks").scrollLeft = $("sentence").scrollLeft;
  });
  $("dismiss").addEventListener("click", hideError);
  showMarks(); // the browser may have kept a text
}

function findProblem(text) {
  if (!text) return "There is no sentence yet: write what to look for.";
  if (text.length > MAX_CHARACTERS) {
    return `The sentence has ${text.length} characters. The limit is ${MAX_CHARACTERS}.`;
  }
  if (!/[\p{L}\p{N}_]/u.test(text)) return "The sentence has no words: say what to look for.";
  if (!photo) return "There is no photo yet: upload one, take one, paste one, or choose an example.";
  const same = sentences.find((sentence) => sentence.text === text);
  if (same) return `This is already sentence ${same.number}.`;
  if (sentences.length === settings.colors.length) {
    return `At most ${settings.colors.length} sentences at a time, please. Remove one first.`;
  }
  return "";
}

/** Marks the words that the model does not read. The last one counts when it is finished. */
function showMarks(isFinished = false) {
  const text = $("sentence").value;
  const last = tokenizer.encode(text).words.at(-1);
  const isBeingTyped = !isFinished && last?.end === text.length;
  const encoded = tokenizer.encode(isBeingTyped ? text.slice(0, last.start) : text);
  $("marks").replaceChildren(makeWords(encoded, text));
  $("marks").scrollLeft = $("sentence").scrollLeft;
  const hint = describeLostWords(encoded);
  if ($("hint").textContent !== hint) $("hint").textContent = hint; // read aloud once
}

function add(text) {
  const number = settings.colors.findIndex((color) => !sentences.some((sentence) => sentence.color === color));
  const sentence = { text, words: tokenizer.encode(text), color: settings.colors[number], number: number + 1 };
  sentences.push(sentence);
  list.add(sentence);
  const problem = describeLostWords(sentence.words);
  if (problem) showError(problem);
}

function remove(sentence) {
  sentences = sentences.filter((other) => other !== sentence);
  if (alone === sentence) alone = null;
  if (pointedAt === sentence) pointedAt = null;
  list.remove(sentence);
  focusSentence();
  update();
}

/** Lets the user type at once. On phones the keyboard would cover the photo. */
function focusSentence() {
  if (matchMedia("(pointer: fine)").matches) $("sentence").focus({ preventScroll: true });
}

function removeAll() {
  for (const sentence of sentences) list.remove(sentence);
  sentences = [];
  alone = pointedAt = null;
}

function look(sentence) {
  pointedAt = sentence;
  draw();
}

function toggle(sentence) {
  alone = alone === sentence ? null : sentence;
  update();
}

/* The picture and its controls */

function connectControls() {
  $("threshold").addEventListener("input", () => {
    measureMasks();
    update();
  });
  $("patches").addEventListener("change", update);
  $("save-masks").addEventListener("click", saveMasks);
  $("save-picture").addEventListener("click", () => {
    $("canvas").toBlob((blob) => save(blob, "picture.png", "image/png"));
  });
}

function getThreshold() {
  return Number($("threshold").value);
}

/** Computes the score and share of every mask at the threshold. The model does not run. */
function measureMasks() {
  const scale = Math.min(1, Math.sqrt(MAX_SCORED_PIXELS / (photo.width * photo.height)));
  const [width, height] = [photo.width, photo.height].map((side) => Math.max(1, Math.round(side * scale)));
  for (const sentence of sentences.filter(({ result }) => result)) {
    sentence.mask = measureMask(sentence.result, width, height, getThreshold());
  }
}

/** Shows the state: list, picture, controls and what is being waited for. */
function update() {
  const hasResults = sentences.some(({ result }) => result);
  const waiting = isReady ? "looking …" : "waiting for the model …";
  for (const sentence of sentences) list.update(sentence, sentence === alone, waiting);
  $("controls").disabled = !hasResults;
  $("save-masks").textContent = sentences.length > 1 ? "Download masks" : "Download mask";
  $("threshold-value").textContent = getThreshold().toFixed(2);
  const isBusy = isReady && photo && (!photo.isEncoded || sentences.some(isWaiting));
  $("busy").hidden = !isBusy;
  $("busy").textContent = photo?.isEncoded ? "Looking …" : "Reading the photo …";
  $("stage").setAttribute("aria-busy", Boolean(isBusy));
  draw();
}

function draw() {
  $("empty").hidden = Boolean(photo);
  if (!photo) return;
  const focus = pointedAt ?? alone;
  const shown = sentences.filter(({ result }) => result);
  const layers = shown.map((sentence) => ({ ...sentence, isDimmed: focus !== null && focus !== sentence }));
  if ($("patches").checked && layers.length) stage.drawPatches(layers);
  else stage.drawMasks(layers, getThreshold());
  $("canvas").setAttribute("aria-label", describePicture(shown));
}

function describePicture(shown) {
  if (!shown.length) return "The photo, without masks yet";
  const kind = $("patches").checked ? "coarse patch maps" : "masks";
  return `The photo with ${kind}: ${shown.map(({ text, mask }) => `${text}, ${describeMask(mask)}`).join("; ")}`;
}

/* Downloads */

async function encode(sentence) {
  const { width, height } = photo;
  const mask = makeMask(sentence.result, width, height, getThreshold());
  return { name: nameMask(sentence.number, sentence.text), content: await encodeMask(mask, width, height) };
}

async function saveMask(sentence) {
  const { name, content } = await encode(sentence);
  save(content, name, "image/png");
}

async function saveMasks() {
  const shown = sentences.filter(({ result }) => result);
  if (shown.length === 1) return saveMask(shown[0]);
  save(pack(await Promise.all(shown.map(encode))), "masks.zip", "application/zip");
}

/* Words on the page */

function describeModel() {
  const { name, links, parameters, imageSize } = settings;
  const [height, width] = imageSize;
  document.title = `${name}: say what you mean, get its mask`;
  const model = links.model ? makeLink(name, links.model) : name;
  const facts = `, ${(parameters / 1e6).toFixed(1)} million parameters, sees photos at ${width} × ${height} pixels. `;
  const paper = makeLink("ReSTR, CVPR 2022", links.paper);
  $("about").replaceChildren("Model: ", model, facts, "Architecture: ", paper, ".");
}

/** A text as nodes, with its web addresses as links. */
function linkAddresses(text) {
  return text.split(/(https?:\/\/[^\s,)]+)/).map((part) => {
    return part.startsWith("http") ? makeLink(new URL(part).hostname, part) : part;
  });
}

function makeLink(text, address) {
  const link = makeElement("a", "", text);
  link.href = address;
  return link;
}

function showError(message) {
  $("notice-text").textContent = message;
  $("notice").hidden = false;
}

function hideError() {
  $("notice").hidden = true;
}

start().catch((error) => {
  console.error(error);
  status.showFailure("The page could not be loaded.");
  showError("The page could not be loaded completely. Check the connection, and reload it.");
});
