// The conversations that this browser stores. The server has caches and no texts, so other conversations can't be
// continued here.

const PREFIX = "turbocache.chat.";
const SELECTED = "turbocache.selected";
const OPTIONS = "turbocache.options";

/** A random name, because the names of other clients' sessions are unknown. */
export function newName() {
  const bytes = crypto.getRandomValues(new Uint8Array(4));
  return `chat-${Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("")}`;
}

/**
 * `messages` are { role, text }. An answer also has `thought`, and after its end one of: `turn` (its counts), `error`
 * (a message), `stopped` (true if the user stopped it).
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
      localStorage.removeItem(key); // not a conversation, or incomplete
    }
  }
  return chats;
}

/** Throws when the browser's storage is full. */
export function save(chat) {
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

export const saveOptions = (values) => localStorage.setItem(OPTIONS, JSON.stringify(values));
