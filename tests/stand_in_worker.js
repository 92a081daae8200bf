// Stands in for worker.js in quick tests of the page: discs instead of the model's masks. "left" and "right" say where a
// disc is, an "absent" thing has none, "slow" takes a second, and "broken" is an error.

import { getLetterbox } from "./image.js";

const SIZE = 64; // of the canvas, in pixels
const PATCH = 8;
let box;

const HANDLERS = {
  async load() {
    const { files, version } = await (await fetch("settings.json")).json();
    for (const [file, total] of Object.entries(files)) {
      const { byteLength } = await (await fetch(`${file}?v=${version}`)).arrayBuffer();
      self.postMessage({ type: "progress", file, loaded: byteLength, total });
    }
    return { type: "ready", backend: "wasm", threads: self.crossOriginIsolated ? 2 : 1 };
  },

  async encode({ blob }) {
    const { width, height } = await createImageBitmap(blob);
    box = getLetterbox([height, width], [SIZE, SIZE]);
    return { type: "encoded", width, height };
  },

  async segment({ texts }) {
    if (texts.some((text) => text.includes("broken"))) throw new Error("The model could not run: it is broken.");
    if (texts.some((text) => text.includes("slow"))) await new Promise((resolve) => setTimeout(resolve, 1000));
    return { type: "masks", results: texts.map(draw) };
  },
};

function draw(text) {
  const center = text.includes("left") ? 0.3 : text.includes("right") ? 0.7 : 0.5;
  const sizes = { logitsSize: [SIZE, SIZE], patchSize: [SIZE / PATCH, SIZE / PATCH], canvasSize: [SIZE, SIZE] };
  const [logits, patchLogits] = [SIZE, SIZE / PATCH].map((size) => makeDisc(size, center));
  if (text.includes("absent")) logits.fill(-9);
  return { text, logits, patchLogits, box, ...sizes };
}

/** Logits that fall from the centre outwards. They are 0 at a distance of a fifth of the size. */
function makeDisc(size, center) {
  return Float32Array.from({ length: size * size }, (_, place) => {
    const [x, y] = [(place % size) + 0.5, Math.floor(place / size) + 0.5];
    return 40 * (0.2 - Math.hypot(x / size - center, y / size - 0.5));
  });
}

self.onmessage = async ({ data }) => {
  try {
    self.postMessage({ ...(await HANDLERS[data.type](data)), id: data.id, seconds: 0 });
  } catch (error) {
    self.postMessage({ type: "error", id: data.id, message: error.message });
  }
};
