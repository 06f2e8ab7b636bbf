// The conversations that this browser keeps. The server has caches and no texts, so what is not here can't be gone on
// with.

const PREFIX = "turbocache.chat.";
const SELECTED = "turbocache.selected";
const OPTIONS = "turbocache.options";

/** A name that no other session has: random, since other clients' names are not ours to know. */
export function newName() {
  const bytes = crypto.getRandomValues(new Uint8Array(4));
  return `chat-${Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("")}`;
}

/**
 * `messages` are { role, text }, an answer's with its `thought`, and with how it ended: `turn` has its counts, `error`
 * says why there is none, `stopped` is true where it was stopped here.
 */
export function newChat(name = newName(), messages = []) {
  return { name, messages, updated: Date.now() / 1000 };
}

export function titleOf(chat) {
  const first = chat.messages.find((message) => message.role === "user");
  if (!first) return "New chat";
  const line = first.text.trim().split("\n", 1)[0];
  return line.length > 60 ? `${line.slice(0, 59).trimEnd()}…` : line;
}

export function load() {
  const chats = new Map();
  for (const key of Object.keys(localStorage).filter((key) => key.startsWith(PREFIX))) {
    try {
      const chat = JSON.parse(localStorage.getItem(key));
      chats.set(chat.name, chat);
    } catch {
      localStorage.removeItem(key); // not ours, or cut off
    }
  }
  return chats;
}

/** Throws where the browser's space is used up. */
export function keep(chat) {
  localStorage.setItem(PREFIX + chat.name, JSON.stringify(chat));
}

export function forget(name) {
  localStorage.removeItem(PREFIX + name);
}

export const selected = () => localStorage.getItem(SELECTED);
export const select = (name) => localStorage.setItem(SELECTED, name);

export function options() {
  try {
    return JSON.parse(localStorage.getItem(OPTIONS)) ?? {};
  } catch {
    return {};
  }
}

export const keepOptions = (values) => localStorage.setItem(OPTIONS, JSON.stringify(values));
