// The page's state, the actions of its buttons, and when it polls the server.

import * as api from "./api.js";
import { backendPanel } from "./backend.js";
import * as chats from "./chats.js";
import { showConversation } from "./conversation.js";
import { wantKey, wantsDeleted } from "./dialogs.js";
import { byId, bytes, count, percent, redraw, setText } from "./dom.js";
import { memoryPanel } from "./memory.js";
import { ringPanel } from "./ring.js";
import { entries, showSessions, stateWords } from "./sessions.js";
import { answer } from "./answer.js";
import { turnsPanel } from "./turns.js";

const BUSY = 1000; // milliseconds between two polls while any client's request runs
const IDLE = 3000;
const OFFLINE = 5000; // while the server can't be reached

const state = {
  chats: chats.load(),
  rows: new Map(),
  status: null,
  backend: null,
  model: null,
  limit: 1,
  selected: chats.selected(),
  answering: new Map(), // session -> AbortController of its answer
  errors: { connection: null, action: null },
};

const message = byId("message");
const field = { temperature: byId("temperature"), max_tokens: byId("most-tokens") };

// Drawing.

let due = false;

function render() {
  if (due) return;
  due = true;
  requestAnimationFrame(() => {
    due = false;
    draw();
  });
}

function draw() {
  const { selected, limit, status } = state;
  const chat = state.chats.get(selected);
  const row = state.rows.get(selected);
  const answering = state.answering.has(selected);
  showSessions(entries(state.chats, state.rows), selected, limit, select);
  showConversation({ chat, row, stateWords: stateWords(row, chat), answering, retry });
  setText(byId("whose"), chat ? chats.titleOf(chat) : (row?.id ?? ""));
  redraw(byId("ring"), [row?.ring, row?.state, limit], () => ringPanel(row, limit));
  redraw(byId("turns"), [selected, chat?.messages.map(({ turn }) => turn)], () => turnsPanel(chat));
  redraw(byId("memory"), [status?.memory, status?.pages, row?.bytes, !row], () => memoryPanel({ status, row }));
  redraw(byId("backend"), [state.backend, state.model], () => backendPanel(state.backend, state.model));
  setText(byId("model"), [state.model?.id, state.model?.license].filter(Boolean).join(" · "));
  if (status) {
    const { memory, requests } = status;
    const waiting = requests.waiting ? `, ${count(requests.waiting)} waiting` : "";
    const share = `${percent(memory.pressure_ratio)} of ${bytes(memory.budget_bytes)}`;
    setText(byId("load"), `${count(requests.running)} running${waiting} · ${share}`);
  }
}

/** Shows an error of the `connection`, until it works again, or of the last `action`. */
function notice(about, text) {
  state.errors[about] = text;
  const error = state.errors.connection ?? state.errors.action;
  byId("notice").hidden = !error;
  setText(byId("notice"), error ?? "");
}

const messageOf = (error) => (error instanceof api.Refusal ? error.message : "The server can't be reached.");

// Polling.

let timer = 0;
let polling = false;

async function poll() {
  if (polling || document.visibilityState === "hidden") return;
  polling = true;
  clearTimeout(timer);
  let wait = OFFLINE;
  try {
    if (!state.backend) await connect();
    const [rows, status] = await Promise.all([api.sessions(), api.status()]);
    state.rows = new Map(rows.map((row) => [row.id, row]));
    state.status = status;
    notice("connection", null);
    wait = status.requests.running || status.requests.waiting || state.answering.size ? BUSY : IDLE;
  } catch (error) {
    state.backend = null; // it may be a different server when it comes back
    notice("connection", messageOf(error));
  }
  polling = false;
  timer = setTimeout(poll, wait);
  render();
}

async function connect() {
  const [[model], backend] = await Promise.all([api.models(), api.backend()]);
  state.model = model;
  state.limit = model.max_model_len;
  state.backend = backend;
}

// Actions.

function showView(name) {
  document.body.dataset.view = name;
  for (const button of document.querySelectorAll(".views button")) {
    if (button.dataset.to === name) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
  }
}

function select(id) {
  notice("action", null);
  state.selected = id;
  chats.select(id);
  showView("chat");
  render();
}

function open(chat) {
  state.chats.set(chat.name, chat);
  select(chat.name);
  draw();
  message.focus();
}

function save(chat) {
  try {
    chats.save(chat);
  } catch {
    const words = "This browser has no more space for conversations. Delete some, or this one is lost when the page closes.";
    notice("action", words);
  }
}

function options() {
  const values = {};
  for (const [name, input] of Object.entries(field)) if (input.value !== "") values[name] = input.valueAsNumber;
  return values;
}

async function run(chat) {
  const stop = new AbortController();
  state.answering.set(chat.name, stop);
  save(chat);
  setTimeout(poll, BUSY / 4); // its session runs by then
  await answer(chat, state.model?.id ?? "default", options(), stop.signal, render);
  state.answering.delete(chat.name);
  if (state.chats.has(chat.name)) save(chat);
  if (document.activeElement === byId("stop")) message.focus();
  draw();
  poll();
}

function send() {
  const chat = state.chats.get(state.selected);
  const text = message.value.trim();
  if (!text || !chat || state.answering.has(chat.name)) return;
  chat.messages.push({ role: "user", text });
  message.value = "";
  run(chat);
}

function retry() {
  const chat = state.chats.get(state.selected);
  if (chat.messages.at(-1).role === "assistant") chat.messages.pop();
  message.focus();
  run(chat);
}

async function fork() {
  const { chat, row } = { chat: state.chats.get(state.selected), row: state.rows.get(state.selected) };
  const name = chats.newName();
  try {
    if (row) await api.fork(row.id, name);
  } catch (error) {
    notice("action", messageOf(error));
    return;
  }
  poll();
  if (!chat) {
    select(name);
    return;
  }
  const copy = chats.newChat(name, structuredClone(chat.messages));
  save(copy);
  open(copy);
}

async function remove() {
  const { selected } = state;
  const [chat, row] = [state.chats.get(selected), state.rows.get(selected)];
  if ((row || chat?.messages.length) && !(await wantsDeleted(chat ? chats.titleOf(chat) : selected, row))) return;
  try {
    if (row) await api.remove(selected);
  } catch (error) {
    if (error.code !== "session_not_found") {
      notice("action", messageOf(error));
      return;
    }
  }
  chats.forget(selected);
  state.chats.delete(selected);
  state.rows.delete(selected);
  const next = entries(state.chats, state.rows).find(({ chat }) => chat);
  if (next) open(next.chat);
  else open(chats.newChat());
  poll();
}

// Event listeners.

api.onKeyWanted(wantKey);
byId("new").addEventListener("click", () => {
  const empty = [...state.chats.values()].find((chat) => !chat.messages.length && !state.rows.has(chat.name));
  open(empty ?? chats.newChat());
});
byId("fork").addEventListener("click", fork);
byId("delete").addEventListener("click", remove);
byId("stop").addEventListener("click", () => state.answering.get(state.selected)?.abort());
byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
message.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
  if (event.key === "Escape") state.answering.get(state.selected)?.abort();
});
for (const button of document.querySelectorAll(".views button")) {
  button.addEventListener("click", () => showView(button.dataset.to));
}
for (const [name, input] of Object.entries(field)) {
  input.value = chats.options()[name] ?? "";
  input.addEventListener("change", () => chats.saveOptions(options()));
}
matchMedia("(min-width: 760px)").addEventListener("change", ({ matches }) => {
  if (matches && document.body.dataset.view === "sessions") showView("chat"); // a wide page always shows the list
});
document.addEventListener("visibilitychange", poll);
for (const change of ["online", "offline"]) addEventListener(change, poll);
addEventListener("pagehide", () => {
  for (const name of state.answering.keys()) save(state.chats.get(name));
});

if (!state.chats.has(state.selected)) open(chats.newChat());
draw();
poll();
