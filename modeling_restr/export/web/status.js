// The status of the model at the top of the page: its download, and how it runs.

import { areKept } from "./offline.js";

const [status, text, progress, button] = ["status", "status-text", "progress", "start"].map((id) => {
  return document.getElementById(id);
});
const downloads = new Map(); // {loaded, total} in bytes, by file

/** Asks before a download, for browsers that save data. */
export function askToDownload(files, onStart) {
  const graphs = Object.keys(files).filter((file) => file.endsWith(".onnx"));
  const size = formatBytes(sum(graphs.map((file) => files[file])));
  const message = `The model is a download of about ${size}, and your browser is set to save data.`;
  offer(message, "Download the model", onStart);
}

export function offerToTryAgain(onStart) {
  offer("The model is not loaded.", "Try again", onStart);
}

export function showStart() {
  status.classList.remove("ready");
  button.hidden = true;
  progress.hidden = false;
  progress.value = 0;
  text.setAttribute("aria-busy", "true"); // screen readers do not read every step of the progress
  text.textContent = "Loading the model …";
}

/** Shows a message of the worker about one of its files. */
export function showProgress({ file, loaded, total }) {
  downloads.set(file, { loaded, total });
  const files = [...downloads.values()];
  const [done, all] = [sum(files.map((each) => each.loaded)), sum(files.map((each) => each.total))];
  progress.value = done / all;
  text.textContent =
    done < all ? `Loading the model: ${formatBytes(done)} of ${formatBytes(all)}` : "Starting the model …";
}

/** Shows how the model runs, and, once all its files are kept on this machine, that the page works offline. */
export async function showReady({ backend, threads }, version) {
  const processor = backend === "webgpu" ? "WebGPU" : `${threads} ${threads === 1 ? "thread" : "threads"}`;
  progress.hidden = true;
  status.classList.add("ready");
  text.setAttribute("aria-busy", "false");
  text.textContent = `Ready · ${processor}`;
  const addresses = [...downloads.keys()].map((file) => `${file}?v=${version}`);
  if (await areKept(addresses)) text.textContent = `Ready · works offline · ${processor}`;
}

export function showFailure(message) {
  progress.hidden = true;
  text.setAttribute("aria-busy", "false");
  text.textContent = message;
}

function offer(message, label, onClick) {
  showFailure(message);
  button.textContent = label;
  button.onclick = onClick;
  button.hidden = false;
}

function formatBytes(bytes) {
  return `${Math.round(bytes / 1e6)} MB`;
}

function sum(numbers) {
  return numbers.reduce((total, number) => total + number, 0);
}
