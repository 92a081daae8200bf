// Masks as `post_process_referring_segmentation` makes them: logits are resized bilinearly, only then come probabilities.
// A result is what the worker answers per sentence: logits, logitsSize, patchLogits, patchSize, canvasSize, box.

/**
 * The mask of a sentence.
 *
 * @param {object} result - The worker's result for the sentence.
 * @param {number} width - Width of the mask in pixels: of the image, or smaller for the screen.
 * @param {number} height - Height of the mask in pixels.
 * @param {number} threshold - Probability above which a pixel is in the mask.
 * @returns {Uint8Array} (height, width) of 0 and 1.
 */
export function makeMask(result, width, height, threshold) {
  const mask = new Uint8Array(width * height);
  const logitThreshold = Math.log(threshold) - Math.log1p(-threshold);
  forEachRow(result, width, height, (logits, offset) => {
    for (let column = 0; column < width; column++) mask[offset + column] = logits[column] > logitThreshold ? 1 : 0;
  });
  return mask;
}

/** The probabilities of a sentence's pixels, (height, width) in float32. */
export function makeProbabilities(result, width, height) {
  const probabilities = new Float32Array(width * height);
  forEachRow(result, width, height, (logits, offset) => {
    for (let column = 0; column < width; column++) probabilities[offset + column] = sigmoid(logits[column]);
  });
  return probabilities;
}

/** The score of a mask, which is the mean probability inside it (0 if it is empty), and its share of the image. */
export function measureMask(result, width, height, threshold) {
  const logitThreshold = Math.log(threshold) - Math.log1p(-threshold);
  let [sum, count] = [0, 0];
  forEachRow(result, width, height, (logits) => {
    for (const logit of logits) {
      if (logit > logitThreshold) {
        sum += sigmoid(logit);
        count++;
      }
    }
  });
  return { score: count ? sum / count : 0, share: count / (width * height) };
}

/** The probabilities of the patches under an image's pixels, (height, width) in float32, with sharp edges. */
export function makePatchMap({ patchLogits, patchSize, canvasSize, box }, width, height) {
  const columns = Array.from({ length: width }, (_, column) => {
    const onCanvas = box.left + ((column + 0.5) * box.width) / width;
    return Math.floor((onCanvas * patchSize[1]) / canvasSize[1]);
  });
  const map = new Float32Array(width * height);
  for (let row = 0; row < height; row++) {
    const onCanvas = box.top + ((row + 0.5) * box.height) / height;
    const offset = Math.floor((onCanvas * patchSize[0]) / canvasSize[0]) * patchSize[1];
    for (let column = 0; column < width; column++) map[row * width + column] = sigmoid(patchLogits[offset + columns[column]]);
  }
  return map;
}

/** Call `visit(logits, offset)` with the logits of each row of pixels and the number of pixels before it. */
function forEachRow(result, width, height, visit) {
  const { logits, size: [boxHeight, boxWidth] } = cutOut(result);
  const [rows, columns] = [interpolate(boxHeight, height), interpolate(boxWidth, width)];
  const [between, row] = [new Float32Array(boxWidth), new Float32Array(width)];
  for (let y = 0; y < height; y++) {
    const [upper, lower, weight] = [rows.lower[y] * boxWidth, rows.upper[y] * boxWidth, rows.weights[y]];
    for (let x = 0; x < boxWidth; x++) between[x] = logits[upper + x] * (1 - weight) + logits[lower + x] * weight;
    for (let x = 0; x < width; x++) {
      const share = columns.weights[x];
      row[x] = between[columns.lower[x]] * (1 - share) + between[columns.upper[x]] * share;
    }
    visit(row, y * width);
  }
}

/** Cut the image out of the logits of the canvas. */
function cutOut({ logits, logitsSize, canvasSize, box }) {
  const canvas = resizeLogits(logits, logitsSize, canvasSize);
  const cut = new Float32Array(box.height * box.width);
  for (let row = 0; row < box.height; row++) {
    const start = (box.top + row) * canvasSize[1] + box.left;
    cut.set(canvas.subarray(start, start + box.width), row * box.width);
  }
  return { logits: cut, size: [box.height, box.width] };
}

/** Bilinear, without antialiasing. Only a coarse-only model's logits differ from the canvas in size. */
function resizeLogits(logits, size, newSize) {
  if (size[0] === newSize[0] && size[1] === newSize[1]) return logits;
  const [rows, columns] = [interpolate(size[0], newSize[0]), interpolate(size[1], newSize[1])];
  const result = new Float32Array(newSize[0] * newSize[1]);
  for (let y = 0; y < newSize[0]; y++) {
    for (let x = 0; x < newSize[1]; x++) {
      const [share, left, right] = [columns.weights[x], columns.lower[x], columns.upper[x]];
      const [upper, lower] = [rows.lower[y], rows.upper[y]].map((row) =>
        logits[row * size[1] + left] * (1 - share) + logits[row * size[1] + right] * share);
      result[y * newSize[1] + x] = upper * (1 - rows.weights[y]) + lower * rows.weights[y];
    }
  }
  return result;
}

/** The two neighbours of each new place, and the weight of the upper one: half-pixel centres, as in PyTorch. */
function interpolate(length, newLength) {
  const [lower, upper] = [new Int32Array(newLength), new Int32Array(newLength)];
  const weights = new Float32Array(newLength);
  for (let place = 0; place < newLength; place++) {
    const position = Math.max((place + 0.5) * (length / newLength) - 0.5, 0);
    lower[place] = Math.floor(position);
    upper[place] = Math.min(lower[place] + 1, length - 1);
    weights[place] = position - lower[place];
  }
  return { lower, upper, weights };
}

function sigmoid(logit) {
  return 1 / (1 + Math.exp(-logit));
}
