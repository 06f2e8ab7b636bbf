// The list of sessions: the server's, and this browser's conversations that the server does not hold.

import { titleOf } from "./chats.js";
import { byId, count, el, redraw, setText } from "./dom.js";
import { smallRing } from "./ring.js";

const STATES = { running: "answering", resident: "in memory", spilled: "on disk" };

export function stateWords(row, chat) {
  if (row) return STATES[row.state];
  return chat?.messages.length ? "not on the server, its next turn computes everything" : "no messages yet";
}

/** All entries, the latest first. */
export function entries(chats, rows) {
  const found = [...rows.values()].map((row) => ({ id: row.id, row, chat: chats.get(row.id) }));
  for (const chat of chats.values()) if (!rows.has(chat.name)) found.push({ id: chat.name, chat });
  const used = ({ row, chat }) => Math.max(row?.last_used ?? 0, chat?.updated ?? 0);
  return found.sort((a, b) => used(b) - used(a));
}

const list = byId("session-list");
const items = new Map();

/** Draws the list. Entries keep their elements, so that the focus stays in place. */
export function showSessions(found, selected, limit, select) {
  for (const [id, item] of items) {
    if (found.some((entry) => entry.id === id)) continue;
    item.node.remove();
    items.delete(id);
  }
  found.forEach((entry, i) => {
    const item = items.get(entry.id) ?? newItem(entry.id, select);
    items.set(entry.id, item);
    update(item, entry, entry.id === selected, limit);
    // The focused entry is never moved, because it would lose the focus: others are inserted before it.
    if (list.children[i] !== item.node) list.insertBefore(item.node, list.children[i] ?? null);
  });
}

function newItem(id, select) {
  const ring = el("span", { class: "drawn" });
  const title = el("span", { class: "title" });
  const about = el("span", { class: "about" });
  const button = el("button", { type: "button", onclick: () => select(id) }, ring, title, about);
  return { node: el("li", {}, button), button, ring, title, about };
}

function update({ button, ring, title, about }, { id, row, chat }, isSelected, limit) {
  if (isSelected) button.setAttribute("aria-current", "true");
  else button.removeAttribute("aria-current");
  button.dataset.state = row?.state ?? "none";
  setText(title, chat ? titleOf(chat) : id);
  const tokens = row && `${count(row.tokens_held)} tokens`;
  const whose = row && !chat && "another client's";
  setText(about, [tokens, whose, stateWords(row, chat)].filter(Boolean).join(" · "));
  redraw(ring, [row?.ring, limit], () => smallRing(row?.ring, limit));
}
