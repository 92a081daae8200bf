// Answers the page's requests: keeps every file for offline use, and isolates the page from other origins, which WASM
// threads need.

const CACHE = `restr ${self.registration.scope}`;
const SHELL = [
  "./", "style.css", "icon.svg", "icons.svg", "page.js", "model.js", "stage.js", "sentences.js", "sources.js",
  "status.js", "downloads.js", "offline.js", "worker.js", "image.js", "mask.js", "tokenizer.js", "settings.json",
  "tokenizer.json",
];
const ISOLATION = {
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Embedder-Policy": "require-corp",
  "Cross-Origin-Resource-Policy": "same-origin",
};

self.addEventListener("install", (event) => {
  event.waitUntil(keepShell());
  self.skipWaiting();
});
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));
self.addEventListener("fetch", (event) => {
  const { method, url } = event.request;
  if (method === "GET" && url.startsWith(self.registration.scope)) event.respondWith(answer(event));
});

/** Keeps what the page loads before this service worker answers its requests, and the example photos. */
async function keepShell() {
  const cache = await caches.open(CACHE);
  const settings = await (await fetch("settings.json", { cache: "no-cache" })).json();
  const photos = settings.examples.map(({ file }) => file);
  await cache.addAll([...SHELL, ...photos].map((address) => new Request(address, { cache: "no-cache" })));
}

/** Files with a version (?v=...) never change and are downloaded once. Others come from the network if it is up. */
async function answer(event) {
  const { request } = event;
  const hasVersion = new URL(request.url).searchParams.has("v");
  const cache = await caches.open(CACHE);
  const kept = await cache.match(request);
  if (kept && hasVersion) return isolate(kept);
  try {
    const response = await fetch(request, hasVersion ? {} : { cache: "no-cache" });
    if (response.status === 200) event.waitUntil(keep(cache, request, response.clone()));
    return isolate(response);
  } catch (error) {
    if (kept) return isolate(kept);
    throw error;
  }
}

/** Replaces other versions of the file. A full disk only costs the offline use. */
async function keep(cache, request, response) {
  try {
    await cache.put(request, response);
    const versions = await cache.keys(request, { ignoreSearch: true });
    await Promise.all(versions.filter(({ url }) => url !== request.url).map((old) => cache.delete(old)));
  } catch (error) {
    console.warn(`${request.url} is not kept for offline use:`, error);
  }
}

function isolate(response) {
  if (response.type === "opaqueredirect" || response.type === "error") return response;
  const headers = new Headers(response.headers);
  for (const [name, value] of Object.entries(ISOLATION)) headers.set(name, value);
  return new Response(response.body, { status: response.status, statusText: response.statusText, headers });
}
