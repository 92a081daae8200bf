// The model's worker, as functions that return promises. The page stays alive while it runs.

/** Runs one request at a time: wait for the answer before the next one. */
export class Model {
  #worker;
  #onProgress;
  #request = null; // the promise's functions while a request runs
  #photoId = 0;

  /** @param {(progress: {file: string, loaded: number, total: number}) => void} onProgress */
  constructor(onProgress) {
    this.#onProgress = onProgress;
  }

  /** Downloads the model and starts it, again after an error. Returns how it runs: {backend, threads}. */
  load() {
    this.#worker?.terminate();
    this.#worker = new Worker("worker.js", { type: "module" });
    this.#worker.onmessage = ({ data }) => this.#receive(data);
    this.#worker.onerror = (event) => this.#fail(event.message || "The worker could not be started.");
    return this.#ask({ type: "load" });
  }

  /** Encodes a photo, which the next sentences are about. Returns {width, height, seconds}. */
  encode(blob) {
    this.#photoId += 1;
    return this.#ask({ type: "encode", id: this.#photoId, blob });
  }

  /** Returns {seconds, results}, one result per text. */
  segment(texts) {
    return this.#ask({ type: "segment", id: this.#photoId, texts });
  }

  #ask(message) {
    return new Promise((resolve, reject) => {
      this.#request = { resolve, reject };
      this.#worker.postMessage(message);
    });
  }

  #receive(message) {
    if (message.type === "progress") this.#onProgress(message);
    else if (message.type === "error") this.#fail(message.message);
    else this.#request?.resolve(message);
  }

  #fail(reason) {
    this.#request?.reject(new Error(reason));
  }
}
