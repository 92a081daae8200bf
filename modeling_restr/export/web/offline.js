// The service worker: the page works offline after the first visit, and WASM may use several threads.

const MAX_WAIT = 4000; // milliseconds; without the service worker the page works, too, but only online

/**
 * Registers the service worker and waits until it answers this page's requests. If the page is not isolated from other
 * origins, which threads need, it reloads once to get the headers that the service worker adds. Never rejects.
 */
export async function startServiceWorker() {
  if (!("serviceWorker" in navigator)) return; // http:// on another machine, or a private window
  try {
    await Promise.race([control(), wait(MAX_WAIT)]);
  } catch (error) {
    console.warn("The service worker could not be started:", error);
  }
  const isControlled = navigator.serviceWorker.controller !== null;
  if (isControlled && !window.crossOriginIsolated && window.top === window && !sessionStorage.getItem("reloaded")) {
    sessionStorage.setItem("reloaded", "yes"); // a host may prevent the isolation: try it once
    location.reload();
    await new Promise(() => {});
  }
}

async function control() {
  const controlled = new Promise((resolve) => {
    navigator.serviceWorker.addEventListener("controllerchange", resolve, { once: true });
  });
  const known = await navigator.serviceWorker.getRegistration();
  await navigator.serviceWorker.register("service-worker.js");
  const isBypassed = known?.active && !navigator.serviceWorker.controller; // after a forced reload
  if (!isBypassed && !navigator.serviceWorker.controller) await controlled;
}

/**
 * Whether every file of the model is kept on this machine. The service worker may still be writing the last one.
 * @param {string[]} addresses
 */
export async function areKept(addresses) {
  for (let attempt = 0; attempt < 20 && navigator.serviceWorker?.controller; attempt += 1) {
    const matches = await Promise.all(addresses.map((address) => caches.match(address)));
    if (matches.every(Boolean)) return true;
    await wait(500);
  }
  return false;
}

function wait(milliseconds) {
  return new Promise((resolve) => setTimeout(resolve, milliseconds));
}
