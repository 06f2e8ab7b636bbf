// The conversation in the middle: its texts, how each turn went, and the field for the next message.

import { titleOf } from "./chats.js";
import { byId, count, el, say } from "./dom.js";
import { turnBar, turnWords } from "./turns.js";

const NEAR = 48; // pixels from the end within which a growing answer is followed

const log = byId("log");
let following = true; // the end is in sight and stays there
let shown = null; // the name of the conversation whose messages `parts` are
let parts = [];

/** Draws the selected session; `again` has a failed turn tried once more. */
export function showConversation({ chat, row, stateWords, answering, again }) {
  say(byId("chat-title"), chat ? titleOf(chat) : row ? row.id : "");
  say(byId("chat-state"), [chat?.name ?? row?.name, stateWords].filter(Boolean).join(" · "));
  byId("composer").hidden = !chat;
  byId("fork").disabled = answering || !(chat?.messages.length || row);
  byId("delete").disabled = answering;
  byId("send").hidden = answering;
  byId("stop").hidden = !answering;
  log.setAttribute("aria-busy", answering);
  showMessages(chat, row, answering, again);
}

function showMessages(chat, row, answering, again) {
  const name = chat?.name ?? row?.id ?? null;
  const messages = chat?.messages ?? [];
  if (name !== shown) following = true;
  if (name !== shown || parts.length > messages.length || parts.some((part, i) => part.message !== messages[i])) {
    parts = [];
    log.replaceChildren();
    shown = name;
  }
  if (!messages.length) {
    if (!log.firstChild) log.append(chat ? opening() : elsewhere());
    return;
  }
  if (!parts.length) log.replaceChildren();
  for (const message of messages.slice(parts.length)) {
    parts.push(message.role === "user" ? userPart(message) : answerPart(message, again));
    log.append(parts.at(-1).node);
  }
  parts.forEach((part, i) => {
    const last = i === messages.length - 1;
    const rotatedBefore = messages.slice(0, i).some(({ turn }) => turn?.rotated);
    part.update({ running: answering && last, last, rotatedBefore });
  });
  follow();
}

function follow() {
  if (following) log.scrollTop = log.scrollHeight;
}

log.addEventListener("scroll", () => {
  following = log.scrollHeight - log.scrollTop - log.clientHeight < NEAR;
});
new ResizeObserver(follow).observe(log); // a phone's keyboard comes and goes

const opening = () =>
  el(
    "div",
    { class: "empty" },
    el("p", {}, "Write the first message."),
    el("p", {}, "The server keeps this conversation's cache; its texts stay in this browser."),
  );

const elsewhere = () =>
  el(
    "div",
    { class: "empty" },
    el("p", {}, "Another client holds this conversation."),
    el("p", {}, "The server has its cache and none of its texts, so it can't be gone on with here."),
  );

function userPart(message) {
  const node = el("article", { class: "message user" }, el("h3", {}, "You"), el("p", { class: "text" }, message.text));
  return { message, node, update() {} };
}

function answerPart(message, again) {
  const thought = el("p", { class: "text" });
  const thinking = el("details", { class: "thought", hidden: true }, el("summary", {}, "Thoughts"), thought);
  const text = el("p", { class: "text" });
  const end = el("div", { class: "end" });
  const node = el("article", { class: "message answer" }, el("h3", {}, "Model"), thinking, text, end);
  return {
    message,
    node,
    update({ running, last, rotatedBefore }) {
      thinking.hidden = !message.thought;
      say(thought, message.thought);
      say(text, message.text);
      node.classList.toggle("running", running);
      const key = `${running} ${last}`;
      if (end.key === key) return;
      end.key = key;
      end.replaceChildren(...(running ? [] : ending(message, last, rotatedBefore, again)));
    },
  };
}

/** How a turn ended. */
function ending({ turn, error, stopped }, last, rotatedBefore, again) {
  const found = [];
  if (error) {
    found.push(el("p", { class: "error", role: "alert" }, error));
    if (last) found.push(el("button", { type: "button", class: "quiet", onclick: again }, "Try again"));
  }
  if (stopped) found.push(el("p", { class: "hint" }, "Stopped. What was computed by then stays in the session."));
  if (!turn) return found;
  const hint = (text) => found.push(el("p", { class: "hint" }, text));
  if (turn.finish === "length") hint(`Cut off after ${count(turn.generated)} tokens.`);
  if (turn.rotated && !rotatedBefore) {
    hint("The conversation is longer than its session holds: its oldest tokens have rotated out.");
  }
  found.push(el("div", { class: "turn" }, turnBar(turn, turn.prompt), el("span", {}, turnWords(turn))));
  return found;
}
