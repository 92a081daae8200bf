// Runs the model with onnxruntime-web. The page sends:
//
//     {type: "load", backend?}              once; backend "webgpu" or "wasm" instead of the choice made here
//     {type: "encode", id, blob}            an image file, which replaces the one before
//     {type: "segment", id, texts}          sentences about the image with this id
//
// and gets:
//
//     {type: "progress", file, loaded, total}   in bytes
//     {type: "ready", backend, threads}
//     {type: "encoded", id, width, height, seconds}
//     {type: "masks", id, seconds, results: [{text, logits, logitsSize, patchLogits, patchSize, canvasSize, box,
//                                             unknownWords, cutWords}]}    mask.js makes masks of the results
//     {type: "error", id, message}              in words for the user

import { decodeImage, prepareImage } from "./image.js";
import { Tokenizer } from "./tokenizer.js";

const MAX_THREADS = 4; // phones have about four fast cores
const CHECK_TOLERANCE = 0.05; // logits; float32 differs by less than a hundredth
const GRAPHS = ["image_encoder.onnx", "sentence_query.onnx"];
// The builds of onnxruntime-web. Browsers without JSPI need a larger one for WebGPU.
const BUILDS = {
  wasm: ["ort.wasm.min.mjs", "ort-wasm-simd-threaded.wasm"],
  jspi: ["ort.jspi.min.mjs", "ort-wasm-simd-threaded.jspi.wasm"],
  asyncify: ["ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify.wasm"],
};

/** An error whose message is for the user. */
class UserError extends Error {}

/** A model with its sessions, and the last image that it encoded. */
class Model {
  image = null;

  static async load(requestedBackend) {
    const model = new Model();
    model.settings = await (await fetchFile("settings.json")).json();
    const tokenizerJson = await (await fetchFile("tokenizer.json")).json();
    model.tokenizer = new Tokenizer(tokenizerJson, model.settings.tokenizer);
    const backend = requestedBackend ?? (await chooseBackend());
    for (const file of [...GRAPHS, getRuntime(backend).binary]) reportProgress(file, 0, model.settings);
    const graphs = [];
    for (const name of GRAPHS) graphs.push(await download(name, model.settings));
    if (backend === "webgpu") {
      try {
        await model.#start("webgpu", graphs);
        await model.#checkNumbers();
        return model;
      } catch (error) {
        console.warn("WebGPU does not run this model, which runs in WebAssembly instead.", error);
      }
    }
    await model.#start("wasm", graphs);
    return model;
  }

  async #start(backend, graphs) {
    const { module, binary } = getRuntime(backend);
    const ort = await import(`./${module}`);
    ort.env.wasm.wasmPaths = new URL("runtime/", import.meta.url).href;
    ort.env.wasm.wasmBinary = (await download(binary, this.settings)).buffer;
    ort.env.logLevel = "error";
    ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency, MAX_THREADS) : 1;
    const options = { executionProviders: [backend], logSeverityLevel: 3 };
    [this.encoder, this.query] = [];
    this.encoder = await ort.InferenceSession.create(graphs[0], options);
    this.query = await ort.InferenceSession.create(graphs[1], options);
    Object.assign(this, { ort, backend, threads: ort.env.wasm.numThreads });
  }

  /** Some GPU drivers compute nonsense. The answer to a made-up image and word is known. */
  async #checkNumbers() {
    const [height, width] = this.settings.imageSize;
    const embeds = await this.#encode(Float32Array.from({ length: 3 * height * width }, (_, place) => Math.sin(place)));
    const { padId, unknownId, maxLength } = this.settings.tokenizer;
    const inputIds = new BigInt64Array(maxLength).fill(BigInt(padId)).fill(BigInt(unknownId), -1);
    const { data } = (await this.#ask(embeds, [{ inputIds }])).patch_logits;
    const expected = this.settings.check;
    if (!data.every((logit, place) => Math.abs(logit - expected[place]) < CHECK_TOLERANCE)) {
      throw new Error("The model computes other numbers here than elsewhere.");
    }
  }

  async encodeImage(id, blob) {
    this.image = null;
    const { rgba, width, height } = await readImage(blob);
    const { pixelValues, box } = prepareImage(rgba, width, height, this.settings);
    this.image = { id, box, embeds: await this.#encode(pixelValues) };
    return { width, height };
  }

  async #encode(pixelValues) {
    const tensor = new this.ort.Tensor("float32", pixelValues, [1, 3, ...this.settings.imageSize]);
    return (await this.encoder.run({ pixel_values: tensor })).vision_embeds;
  }

  async segment(id, texts) {
    if (this.image?.id !== id) throw new UserError("There is no photo yet, or it was replaced. Choose one first.");
    const sentences = texts.map((text) => this.tokenizer.encode(text));
    const empty = sentences.findIndex(({ words }) => words.length === 0);
    if (empty >= 0) throw new UserError(`Sentence ${empty + 1} has no words: say what to look for.`);
    const { logits, patch_logits: patchLogits } = await this.#ask(this.image.embeds, sentences);
    return sentences.map(({ unknownWords, cutWords }, index) => ({
      text: texts[index],
      logits: takeMap(logits, index),
      logitsSize: logits.dims.slice(1),
      patchLogits: takeMap(patchLogits, index),
      patchSize: patchLogits.dims.slice(1),
      canvasSize: this.settings.imageSize,
      box: this.image.box,
      unknownWords,
      cutWords,
    }));
  }

  async #ask(embeds, sentences) {
    const { maxLength } = this.settings.tokenizer;
    const ids = new BigInt64Array(sentences.length * maxLength);
    sentences.forEach(({ inputIds }, index) => ids.set(inputIds, index * maxLength));
    return this.query.run({
      vision_embeds: embeds,
      input_ids: new this.ort.Tensor("int64", ids, [sentences.length, maxLength]),
      image_indices: new this.ort.Tensor("int64", new BigInt64Array(sentences.length), [sentences.length]),
    });
  }
}

/** The files of onnxruntime-web that run a backend. */
function getRuntime(backend) {
  const build = backend === "wasm" ? "wasm" : "Suspending" in WebAssembly ? "jspi" : "asyncify";
  const [module, binary] = BUILDS[build].map((file) => `runtime/${file}`);
  return { module, binary };
}

/** WebGPU where a real GPU offers it. */
async function chooseBackend() {
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  return adapter && !adapter.info.isFallbackAdapter ? "webgpu" : "wasm";
}

/** The map (height, width) of one sentence. */
function takeMap({ data, dims: [, height, width] }, index) {
  return data.slice(index * height * width, (index + 1) * height * width);
}

async function readImage(blob) {
  let image;
  try {
    image = await decodeImage(blob);
  } catch (error) {
    console.warn(error);
    throw new UserError("This file is not an image that the browser can read. Use a JPEG, PNG or WebP file.");
  }
  return image;
}

async function fetchFile(path, version) {
  const query = version ? `?v=${version}` : ""; // browsers may keep files with a version
  let response;
  try {
    response = await fetch(new URL(`${path}${query}`, import.meta.url));
  } catch (error) {
    throw new UserError(`${path} could not be downloaded. Check the connection and reload the page.`, { cause: error });
  }
  if (!response.ok) throw new UserError(`${path} could not be downloaded (status ${response.status}). Reload the page.`);
  return response;
}

/** Download one of the large files, which settings.json lists with its size, and report the progress. */
async function download(path, settings) {
  const total = settings.files[path];
  const reader = (await fetchFile(path, settings.version)).body.getReader();
  const bytes = new Uint8Array(total);
  let loaded = 0;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    if (loaded + value.length > total) break;
    bytes.set(value, loaded);
    loaded += value.length;
    reportProgress(path, loaded, settings);
  }
  if (loaded !== total) throw new UserError(`${path} did not arrive whole. Reload the page.`);
  return bytes;
}

function reportProgress(file, loaded, settings) {
  self.postMessage({ type: "progress", file, loaded, total: settings.files[file] });
}

let model;

const HANDLERS = {
  async load({ backend }) {
    model = await Model.load(backend);
    return { type: "ready", backend: model.backend, threads: model.threads };
  },
  async encode({ id, blob }) {
    return { type: "encoded", ...(await model.encodeImage(id, blob)) };
  },
  async segment({ id, texts }) {
    return { type: "masks", results: await model.segment(id, texts) };
  },
};

async function answer({ data }) {
  const start = performance.now();
  try {
    const result = await HANDLERS[data.type](data);
    self.postMessage({ ...result, id: data.id, seconds: (performance.now() - start) / 1000 });
  } catch (error) {
    console.error(error);
    const message = error instanceof UserError ? error.message : `The model could not run: ${error.message ?? error}`;
    self.postMessage({ type: "error", id: data.id, message });
  }
}

// One message at a time, in their order.
let queue = Promise.resolve();
self.onmessage = (event) => {
  queue = queue.then(() => answer(event));
};
