// Two dialogs: the API key, and the confirmation to delete a session.

import { byId } from "./dom.js";

/** Resolves to an API key. The dialog can't be dismissed, because the page shows nothing without a key. */
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
    ? `“${title}”: deletes its cache from the server and its texts from this browser.`
    : `“${title}”: deletes its texts from this browser.`;
  dialog.returnValue = "keep";
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "delete"), { once: true });
    dialog.showModal();
  });
}
