// Photos as `modeling_restr/image_processing_restr.py` prepares them: resized by Pillow's rule and letterboxed.

const MAX_PIXELS = 100e6; // four bytes each
const STRIP_PIXELS = 4_000_000; // read from a canvas at a time: phones limit the size of a canvas
const PRECISION_BITS = 22; // of Pillow's weights for 8-bit pixels

/** Pillow's filters by number: [support, function]. 0 takes the nearest pixel. */
const FILTERS = {
  4: [0.5, (x) => (x > -0.5 && x <= 0.5 ? 1 : 0)],
  2: [1, (x) => Math.max(1 - Math.abs(x), 0)],
  5: [1, hamming],
  3: [2, bicubic],
  1: [3, (x) => (x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0)],
};

/**
 * Decode an image file to upright pixels on white.
 *
 * @param {Blob} blob - A file of any format that the browser reads.
 * @returns {Promise<{rgba: Uint8ClampedArray, width: number, height: number}>}
 * @throws {RangeError} The image has more than 100 megapixels.
 */
export async function decodeImage(blob) {
  const bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none", imageOrientation: "from-image" });
  const { width, height } = bitmap;
  if (width * height > MAX_PIXELS) {
    bitmap.close();
    throw new RangeError(`The image has ${width} x ${height} pixels.`);
  }
  const rows = Math.max(Math.floor(STRIP_PIXELS / width), 1);
  const canvas = new OffscreenCanvas(width, Math.min(rows, height));
  const context = canvas.getContext("2d", { alpha: false, willReadFrequently: true });
  const rgba = new Uint8ClampedArray(4 * width * height);
  for (let top = 0; top < height; top += rows) {
    const count = Math.min(rows, height - top);
    context.fillStyle = "white";
    context.fillRect(0, 0, width, count);
    context.drawImage(bitmap, 0, -top);
    rgba.set(context.getImageData(0, 0, width, count).data, 4 * width * top);
  }
  bitmap.close();
  return { rgba, width, height };
}

/**
 * Prepare pixels for the image encoder.
 *
 * @param {Uint8ClampedArray} rgba - Opaque pixels (height, width, 4).
 * @param {object} settings - settings.json: imageSize, resample, rescaleFactor, mean, std, padAfterNormalization.
 * @returns {{pixelValues: Float32Array, box: {top: number, left: number, height: number, width: number}}}
 *   Values (3, height, width) of the canvas, and the place of the image on it.
 */
export function prepareImage(rgba, width, height, settings) {
  const [canvasHeight, canvasWidth] = settings.imageSize;
  const box = getLetterbox([height, width], settings.imageSize);
  const resized = resize(rgba, width, height, box.width, box.height, settings.resample);
  const pixelValues = new Float32Array(3 * canvasHeight * canvasWidth);
  for (let channel = 0; channel < 3; channel++) {
    const values = normalize(channel, settings);
    const offset = channel * canvasHeight * canvasWidth;
    pixelValues.fill(settings.padAfterNormalization ? 0 : values[0], offset, offset + canvasHeight * canvasWidth);
    for (let row = 0; row < box.height; row++) {
      const start = offset + (box.top + row) * canvasWidth + box.left;
      for (let column = 0; column < box.width; column++) {
        pixelValues[start + column] = values[resized[4 * (row * box.width + column) + channel]];
      }
    }
  }
  return { pixelValues, box };
}

/** Place an image on its canvas: centred, and as large as fits with the same aspect ratio. Sizes are [height, width]. */
export function getLetterbox(imageSize, canvasSize) {
  const scale = Math.min(canvasSize[0] / imageSize[0], canvasSize[1] / imageSize[1]);
  const [height, width] = imageSize.map((length, axis) =>
    Math.min(Math.max(roundHalfToEven(length * scale), 1), canvasSize[axis]));
  return { top: Math.floor((canvasSize[0] - height) / 2), left: Math.floor((canvasSize[1] - width) / 2), height, width };
}

/** The normalised values of 0 to 255 in a channel, in float32. */
function normalize(channel, { rescaleFactor, mean, std }) {
  const [channelMean, channelStd] = [Math.fround(mean[channel]), Math.fround(std[channel])];
  return Float32Array.from({ length: 256 }, (_, value) =>
    Math.fround(Math.fround(value * rescaleFactor) - channelMean) / channelStd);
}

/** Resize (height, width, 4) to (newHeight, newWidth, 4) as Pillow does. The result's fourth channel has no meaning. */
export function resize(rgba, width, height, newWidth, newHeight, number) {
  if (number === 0) return takeNearest(rgba, width, height, newWidth, newHeight);
  const filter = FILTERS[number];
  if (height > 100 * width && newHeight < height) {
    return resizeRows(resizeColumns(rgba, width, height, newHeight, filter), width, newHeight, newWidth, filter);
  }
  return resizeColumns(resizeRows(rgba, width, height, newWidth, filter), newWidth, height, newHeight, filter);
}

/** Resize to (height, newWidth, 4). */
function resizeRows(rgba, width, height, newWidth, filter) {
  if (newWidth === width) return rgba;
  const result = new Uint8ClampedArray(4 * height * newWidth);
  const weights = computeWeights(width, newWidth, filter);
  let target = 0;
  for (let row = 0; row < height; row++) {
    for (let column = 0; column < newWidth; column++, target += 4) {
      const [first, factors] = weights[column];
      let [red, green, blue] = [0, 0, 0];
      let source = 4 * (row * width + first);
      for (let index = 0; index < factors.length; index++, source += 4) {
        red += rgba[source] * factors[index];
        green += rgba[source + 1] * factors[index];
        blue += rgba[source + 2] * factors[index];
      }
      result[target] = round(red);
      result[target + 1] = round(green);
      result[target + 2] = round(blue);
    }
  }
  return result;
}

/** Resize to (newHeight, width, 4). */
function resizeColumns(rgba, width, height, newHeight, filter) {
  if (newHeight === height) return rgba;
  const stride = 4 * width;
  const result = new Uint8ClampedArray(newHeight * stride);
  const weights = computeWeights(height, newHeight, filter);
  const sums = new Float64Array(stride);
  for (let row = 0; row < newHeight; row++) {
    const [first, factors] = weights[row];
    sums.fill(0);
    for (let index = 0; index < factors.length; index++) {
      const source = (first + index) * stride;
      for (let place = 0; place < stride; place++) sums[place] += rgba[source + place] * factors[index];
    }
    for (let place = 0; place < stride; place++) result[row * stride + place] = round(sums[place]);
  }
  return result;
}

/** Pillow rounds the sum of a pass to 8 bits. */
function round(sum) {
  return Math.floor((sum + 2 ** (PRECISION_BITS - 1)) / 2 ** PRECISION_BITS); // the array clamps it
}

/** For each new pixel, the first old pixel and the weights of it and its neighbours, in whole units of 2^-22. */
function computeWeights(length, newLength, [support, filter]) {
  const scale = length / newLength;
  const filterScale = Math.max(scale, 1);
  return Array.from({ length: newLength }, (_, place) => {
    const center = (place + 0.5) * scale;
    const first = Math.max(Math.trunc(center - support * filterScale + 0.5), 0);
    const end = Math.min(Math.trunc(center + support * filterScale + 0.5), length);
    const values = Array.from({ length: end - first }, (_, index) =>
      filter((index + first - center + 0.5) * (1 / filterScale)));
    const total = values.reduce((sum, value) => sum + value, 0);
    return [first, values.map((value) => quantize(total ? value / total : value))];
  });
}

function quantize(weight) {
  return Math.trunc(weight * 2 ** PRECISION_BITS + (weight < 0 ? -0.5 : 0.5));
}

function takeNearest(rgba, width, height, newWidth, newHeight) {
  const result = new Uint8ClampedArray(4 * newHeight * newWidth);
  const [rows, columns] = [findNearest(height, newHeight), findNearest(width, newWidth)];
  let target = 0;
  for (const row of rows) {
    for (const column of columns) {
      const source = 4 * (row * width + column);
      for (let channel = 0; channel < 4; channel++) result[target++] = rgba[source + channel];
    }
  }
  return result;
}

/** The old pixel of each new one. Pillow sums the steps up. */
function findNearest(length, newLength) {
  const step = length / newLength;
  let position = step * 0.5;
  return Array.from({ length: newLength }, () => {
    const place = Math.trunc(position);
    position += step;
    return place;
  });
}

function hamming(x) {
  const distance = Math.abs(x);
  if (distance === 0) return 1;
  return distance >= 1 ? 0 : sinc(distance) * (0.54 + 0.46 * Math.cos(Math.PI * distance));
}

function bicubic(x) {
  const [a, distance] = [-0.5, Math.abs(x)];
  if (distance < 1) return ((a + 2) * distance - (a + 3)) * distance * distance + 1;
  return distance < 2 ? (((distance - 5) * distance + 8) * distance - 4) * a : 0;
}

function sinc(x) {
  return x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x);
}

function roundHalfToEven(value) {
  const low = Math.floor(value);
  if (value - low !== 0.5) return Math.round(value);
  return low % 2 === 0 ? low : low + 1;
}
