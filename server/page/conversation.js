// The conversation: its messages, the result of each turn, and the field for the next message.

import { titleOf } from "./chats.js";
import { byId, count, el, setText } from "./dom.js";
import { turnBar, turnWords } from "./turns.js";

const NEAR = 48; // pixels: the log scrolls with a growing answer if its end is closer

const log = byId("log");
let following = true; // scroll with the answer
let shown = null; // name of the conversation that `parts` show
let parts = [];

/** Draws the selected session. `retry` repeats a failed turn. */
export function showConversation({ chat, row, stateWords, answering, retry }) {
  setText(byId("chat-title"), chat ? titleOf(chat) : row ? row.id : "");
  setText(byId("chat-state"), [chat?.name ?? row?.name, stateWords].filter(Boolean).join(" · "));
  byId("composer").hidden = !chat;
  byId("fork").disabled = answering || !(chat?.messages.length || row);
  byId("delete").disabled = answering;
  byId("send").hidden = answering;
  byId("stop").hidden = !answering;
  log.setAttribute("aria-busy", answering);
  showMessages(chat, row, answering, retry);
}

function showMessages(chat, row, answering, retry) {
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
    parts.push(message.role === "user" ? userPart(message) : answerPart(message, retry));
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
new ResizeObserver(follow).observe(log); // a phone's keyboard changes the height

const opening = () =>
  el(
    "div",
    { class: "empty" },
    el("p", {}, "Write the first message."),
    el("p", {}, "The server keeps this conversation's cache. Its texts stay in this browser."),
  );

const elsewhere = () =>
  el(
    "div",
    { class: "empty" },
    el("p", {}, "This conversation belongs to another client."),
    el("p", {}, "The server has its cache but not its texts, so it can't be continued here."),
  );

function userPart(message) {
  const node = el("article", { class: "message user" }, el("h3", {}, "You"), el("p", { class: "text" }, message.text));
  return { message, node, update() {} };
}

function answerPart(message, retry) {
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
      setText(thought, message.thought);
      setText(text, message.text);
      node.classList.toggle("running", running);
      const key = `${running} ${last}`;
      if (end.key === key) return;
      end.key = key;
      end.replaceChildren(...(running ? [] : ending(message, last, rotatedBefore, retry)));
    },
  };
}

/** The result of a turn. */
function ending({ turn, error, stopped }, last, rotatedBefore, retry) {
  const found = [];
  if (error) {
    found.push(el("p", { class: "error", role: "alert" }, error));
    if (last) found.push(el("button", { type: "button", class: "quiet", onclick: retry }, "Try again"));
  }
  if (stopped) found.push(el("p", { class: "hint" }, "Stopped. The session keeps what was computed."));
  if (!turn) return found;
  const hint = (text) => found.push(el("p", { class: "hint" }, text));
  if (turn.finish === "length") hint(`Cut off after ${count(turn.generated)} tokens.`);
  if (turn.rotated && !rotatedBefore) {
    hint("The conversation is longer than its session: its oldest tokens have rotated out.");
  }
  found.push(el("div", { class: "turn" }, turnBar(turn, turn.prompt), el("span", {}, turnWords(turn))));
  return found;
}
