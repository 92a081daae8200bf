// The picture: the photo with its masks, or with the coarse patch maps.

import { makePatchMap, makeProbabilities } from "./mask.js";

const LONG_SIDE = 1024; // pixels; small photos are enlarged, so that the masks' edges are smooth
const DIMMED = 0.12; // opacity of the masks next to the one that is looked at
const PATCH_OPACITY = 0.9;
const AROUND = [[-1, -1], [0, -1], [1, -1], [-1, 0], [1, 0], [-1, 1], [0, 1], [1, 1]];

/**
 * @typedef {object} Layer A sentence's part of the picture.
 * @property {string} color Such as "#e69f00".
 * @property {object} result The worker's result for the sentence.
 * @property {boolean} isDimmed Whether another sentence is looked at.
 */

export class Stage {
  #canvas;
  #context;
  #opacity;
  #photo;
  #palePhoto;
  #probabilities = new WeakMap(); // by result, at the canvas's size

  /**
   * @param {HTMLCanvasElement} canvas
   * @param {number} opacity Opacity of the masks, from 0 to 1.
   */
  constructor(canvas, opacity) {
    this.#canvas = canvas;
    this.#context = canvas.getContext("2d");
    this.#opacity = opacity;
  }

  /** @param {ImageBitmap} bitmap The photo, upright. */
  setPhoto(bitmap) {
    const scale = LONG_SIDE / Math.max(bitmap.width, bitmap.height);
    this.#canvas.width = Math.max(1, Math.round(bitmap.width * scale));
    this.#canvas.height = Math.max(1, Math.round(bitmap.height * scale));
    this.#photo = this.#makeCanvas();
    const context = this.#photo.getContext("2d");
    context.fillStyle = "white"; // behind transparent pixels, as the model sees them
    context.fillRect(0, 0, this.#canvas.width, this.#canvas.height);
    context.imageSmoothingQuality = "high";
    context.drawImage(bitmap, 0, 0, this.#canvas.width, this.#canvas.height);
    this.#palePhoto = null;
    this.#probabilities = new WeakMap();
    this.drawMasks([], 1);
  }

  clear() {
    this.#context.clearRect(0, 0, this.#canvas.width, this.#canvas.height);
  }

  /** Tints each mask in its colour and outlines it. */
  drawMasks(layers, threshold) {
    this.#context.drawImage(this.#photo, 0, 0);
    for (const layer of layers) {
      const mask = this.#makeMask(layer, threshold);
      this.#context.globalAlpha = layer.isDimmed ? DIMMED : this.#opacity;
      this.#context.drawImage(mask, 0, 0);
      this.#context.globalAlpha = layer.isDimmed ? 2 * DIMMED : 1;
      this.#context.drawImage(this.#makeOutline(mask), 0, 0);
    }
    this.#context.globalAlpha = 1;
  }

  /** Shades the patches of the grey photo by their probabilities. */
  drawPatches(layers) {
    this.#palePhoto ??= this.#makePalePhoto();
    this.#context.drawImage(this.#palePhoto, 0, 0);
    for (const { color, result, isDimmed } of layers) {
      const patches = makePatchMap(result, this.#canvas.width, this.#canvas.height);
      this.#context.globalAlpha = isDimmed ? DIMMED : PATCH_OPACITY;
      this.#context.drawImage(this.#colorPixels(color, patches, (probability) => 255 * probability), 0, 0);
    }
    this.#context.globalAlpha = 1;
  }

  #makeCanvas() {
    const canvas = document.createElement("canvas");
    canvas.width = this.#canvas.width;
    canvas.height = this.#canvas.height;
    return canvas;
  }

  #makeMask({ color, result }, threshold) {
    if (!this.#probabilities.has(result)) {
      this.#probabilities.set(result, makeProbabilities(result, this.#canvas.width, this.#canvas.height));
    }
    const probabilities = this.#probabilities.get(result);
    return this.#colorPixels(color, probabilities, (probability) => (probability > threshold ? 255 : 0));
  }

  /** A canvas in one colour, with an opacity from 0 to 255 for each value. */
  #colorPixels(color, values, toOpacity) {
    const canvas = this.#makeCanvas();
    const image = new ImageData(canvas.width, canvas.height);
    const [red, green, blue] = toRGB(color);
    for (let index = 0; index < values.length; index += 1) {
      image.data[4 * index] = red;
      image.data[4 * index + 1] = green;
      image.data[4 * index + 2] = blue;
      image.data[4 * index + 3] = toOpacity(values[index]);
    }
    canvas.getContext("2d").putImageData(image, 0, 0);
    return canvas;
  }

  #makeOutline(mask) {
    const outline = this.#makeCanvas();
    const context = outline.getContext("2d");
    const lineWidth = Math.round(LONG_SIDE / 300);
    for (const [x, y] of AROUND) context.drawImage(mask, lineWidth * x, lineWidth * y);
    context.globalCompositeOperation = "destination-out";
    context.drawImage(mask, 0, 0);
    return outline;
  }

  #makePalePhoto() {
    const canvas = this.#makeCanvas();
    const { width, height } = canvas;
    const image = this.#photo.getContext("2d").getImageData(0, 0, width, height);
    for (let index = 0; index < image.data.length; index += 4) {
      const [red, green, blue] = image.data.subarray(index, index + 3);
      image.data.fill(120 + 0.4 * (0.299 * red + 0.587 * green + 0.114 * blue), index, index + 3);
    }
    canvas.getContext("2d").putImageData(image, 0, 0);
    return canvas;
  }
}

/** @param {string} color Such as "#e69f00". */
export function toRGB(color) {
  return [1, 3, 5].map((start) => parseInt(color.slice(start, start + 2), 16));
}
