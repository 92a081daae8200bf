// Where photos come from: a file, the clipboard, a camera or an example.

const NO_CAMERA = "The camera cannot be used. Allow it for this page, or choose a photo instead.";
const NO_PHOTO =
  "There is no photo in what you dropped. If it is from another page, save it first, and then drop the file.";

/**
 * Connects everything that photos come from.
 * @param {(photo: Blob) => void} onPhoto
 * @param {(message: string) => void} onError
 */
export function connectSources(onPhoto, onError) {
  connectFiles(onPhoto);
  connectDrop(onPhoto, onError);
  connectPaste(onPhoto);
  connectCamera(onPhoto, onError);
}

function connectFiles(onPhoto) {
  const [file, capture] = ["file", "capture"].map((id) => document.getElementById(id));
  document.getElementById("upload").addEventListener("click", () => file.click());
  for (const input of [file, capture]) {
    input.addEventListener("change", () => {
      if (input.files.length) onPhoto(input.files[0]);
      input.value = ""; // so that the same file can be chosen again
    });
  }
}

function connectDrop(onPhoto, onError) {
  const veil = document.getElementById("drop");
  const hasContent = ({ dataTransfer }) => ["Files", "text/uri-list"].some((type) => dataTransfer.types.includes(type));
  document.addEventListener("dragenter", (event) => {
    veil.hidden = !hasContent(event);
  });
  document.addEventListener("dragover", (event) => {
    if (hasContent(event)) event.preventDefault(); // otherwise the browser would open the file
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) veil.hidden = true; // left the window
  });
  document.addEventListener("drop", (event) => {
    veil.hidden = true;
    if (!hasContent(event)) return; // text, into the sentence
    event.preventDefault();
    const [photo] = event.dataTransfer.files;
    if (photo) onPhoto(photo);
    else onError(NO_PHOTO);
  });
}

function connectPaste(onPhoto) {
  document.addEventListener("paste", (event) => {
    const photo = [...event.clipboardData.files].find(({ type }) => type.startsWith("image/"));
    if (!photo) return; // text, into the sentence
    event.preventDefault();
    onPhoto(photo);
  });
}

function connectCamera(onPhoto, onError) {
  const dialog = document.getElementById("camera-dialog");
  const video = document.getElementById("video");
  const take = document.getElementById("take");
  document.getElementById("camera").addEventListener("click", async () => {
    if (matchMedia("(pointer: coarse)").matches) {
      document.getElementById("capture").click(); // the phone's own camera app
      return;
    }
    try {
      const size = { width: { ideal: 1920 }, height: { ideal: 1080 } };
      video.srcObject = await navigator.mediaDevices.getUserMedia({ video: size });
    } catch {
      onError(NO_CAMERA);
      return;
    }
    take.disabled = true; // until there is a picture
    dialog.returnValue = "";
    dialog.showModal();
  });
  video.addEventListener("loadeddata", () => {
    take.disabled = false;
    take.focus();
  });
  dialog.addEventListener("close", async () => {
    if (dialog.returnValue === "take") onPhoto(await grabFrame(video));
    for (const track of video.srcObject.getTracks()) track.stop();
    video.srcObject = null;
  });
}

function grabFrame(video) {
  const canvas = document.createElement("canvas");
  canvas.width = video.videoWidth;
  canvas.height = video.videoHeight;
  canvas.getContext("2d").drawImage(video, 0, 0);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.95));
}

/**
 * Shows the example photos as buttons.
 * @param {{file: string, texts: string[]}[]} examples
 * @param {(example: object) => void} onExample
 * @returns {Map<object, HTMLButtonElement>} The buttons, by example.
 */
export function showExamples(examples, onExample) {
  const buttons = new Map();
  for (const example of examples) {
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("aria-label", `Example photo: ${example.texts.join(", ")}`);
    const image = new Image();
    image.src = example.file;
    image.alt = "";
    button.append(image);
    button.addEventListener("click", () => onExample(example));
    const item = document.createElement("li");
    item.append(button);
    document.getElementById("examples").append(item);
    buttons.set(example, button);
  }
  return buttons;
}
