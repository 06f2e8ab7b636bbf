// Two questions: for an API key, and whether a session is really to go.

import { byId } from "./dom.js";

/** An API key, once there is one: without it the page has nothing to show, so the question can't be dismissed. */
export function wantKey(reason) {
  const dialog = byId("key-dialog");
  const field = byId("key");
  byId("key-reason").textContent = reason;
  field.value = "";
  return new Promise((resolve) => {
    const closed = () => {
      const key = field.value.trim();
      if (!key) {
        dialog.showModal();
        return;
      }
      dialog.removeEventListener("close", closed);
      field.value = "";
      resolve(key);
    };
    dialog.addEventListener("close", closed);
    dialog.showModal();
  });
}

export function wantsDeleted(title, row) {
  const dialog = byId("delete-dialog");
  byId("delete-what").textContent = row
    ? `“${title}”: its cache goes from the server, and its texts from this browser.`
    : `“${title}”: its texts go from this browser.`;
  dialog.returnValue = "keep";
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "delete"), { once: true });
    dialog.showModal();
  });
}
