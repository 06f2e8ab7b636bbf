// What the page knows, what its buttons do, and when it asks the server.

import * as api from "./api.js";
import { backendPanel } from "./backend.js";
import * as chats from "./chats.js";
import { showConversation } from "./conversation.js";
import { wantKey, wantsDeleted } from "./dialogs.js";
import { byId, bytes, count, percent, redraw, say } from "./dom.js";
import { memoryPanel } from "./memory.js";
import { ringPanel } from "./ring.js";
import { entries, showSessions, stateWords } from "./sessions.js";
import { answer } from "./talk.js";
import { turnsPanel } from "./turns.js";

const BUSY = 1000; // milliseconds between two looks while something is answered, by whichever client
const IDLE = 3000;
const AWAY = 5000; // while the server can't be reached

const known = {
  chats: chats.load(),
  rows: new Map(),
  status: null,
  backend: null,
  model: null,
  limit: 1,
  selected: chats.selected(),
  answering: new Map(), // by session, what ends its answer
  trouble: { connection: null, done: null },
};

const message = byId("message");
const field = { temperature: byId("temperature"), max_tokens: byId("most-tokens") };

// Seeing.

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
  const { selected, limit, status } = known;
  const chat = known.chats.get(selected);
  const row = known.rows.get(selected);
  const answering = known.answering.has(selected);
  showSessions(entries(known.chats, known.rows), selected, limit, select);
  showConversation({ chat, row, stateWords: stateWords(row, chat), answering, again });
  say(byId("whose"), chat ? chats.titleOf(chat) : (row?.id ?? ""));
  redraw(byId("ring"), [row?.ring, row?.state, limit], () => ringPanel(row, limit));
  redraw(byId("turns"), [selected, chat?.messages.map(({ turn }) => turn)], () => turnsPanel(chat));
  redraw(byId("memory"), [status?.memory, status?.pages, row?.bytes, !row], () => memoryPanel({ status, row }));
  redraw(byId("backend"), known.backend, () => backendPanel(known.backend));
  say(byId("model"), known.model ?? "");
  if (status) {
    const { memory, requests } = status;
    const waiting = requests.waiting ? `, ${count(requests.waiting)} waiting` : "";
    const share = `${percent(memory.pressure_ratio)} of ${bytes(memory.budget_bytes)}`;
    say(byId("load"), `${count(requests.running)} running${waiting} · ${share}`);
  }
}

/** Says what is wrong: with the `connection`, until it is found again, or with what was `done` last. */
function notice(about, words) {
  known.trouble[about] = words;
  const said = known.trouble.connection ?? known.trouble.done;
  byId("notice").hidden = !said;
  say(byId("notice"), said ?? "");
}

const wordsOf = (error) => (error instanceof api.Refusal ? error.message : "The server can't be reached.");

// Asking.

let timer = 0;
let looking = false;

async function look() {
  if (looking || document.visibilityState === "hidden") return;
  looking = true;
  clearTimeout(timer);
  let wait = AWAY;
  try {
    if (!known.backend) await meet();
    const [rows, status] = await Promise.all([api.sessions(), api.status()]);
    known.rows = new Map(rows.map((row) => [row.id, row]));
    known.status = status;
    notice("connection", null);
    wait = status.requests.running || status.requests.waiting || known.answering.size ? BUSY : IDLE;
  } catch (error) {
    known.backend = null; // it may be another one that comes back
    notice("connection", wordsOf(error));
  }
  looking = false;
  timer = setTimeout(look, wait);
  render();
}

async function meet() {
  const [[model], backend] = await Promise.all([api.models(), api.backend()]);
  known.model = model.id;
  known.limit = model.max_model_len;
  known.backend = backend;
}

// Doing.

function view(name) {
  document.body.dataset.view = name;
  for (const button of document.querySelectorAll(".views button")) {
    if (button.dataset.to === name) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
  }
}

function select(id) {
  notice("done", null);
  known.selected = id;
  chats.select(id);
  view("chat");
  render();
}

function begin(chat) {
  known.chats.set(chat.name, chat);
  select(chat.name);
  draw();
  message.focus();
}

function keep(chat) {
  try {
    chats.keep(chat);
  } catch {
    const words = "This browser has no more space for conversations: delete some, or this one goes with the page.";
    notice("done", words);
  }
}

function options() {
  const values = {};
  for (const [name, input] of Object.entries(field)) if (input.value !== "") values[name] = input.valueAsNumber;
  return values;
}

async function run(chat) {
  const stop = new AbortController();
  known.answering.set(chat.name, stop);
  keep(chat);
  setTimeout(look, BUSY / 4); // by then its session runs
  await answer(chat, known.model ?? "default", options(), stop.signal, render);
  known.answering.delete(chat.name);
  if (known.chats.has(chat.name)) keep(chat);
  if (document.activeElement === byId("stop")) message.focus();
  draw();
  look();
}

function send() {
  const chat = known.chats.get(known.selected);
  const text = message.value.trim();
  if (!text || !chat || known.answering.has(chat.name)) return;
  chat.messages.push({ role: "user", text });
  message.value = "";
  run(chat);
}

function again() {
  const chat = known.chats.get(known.selected);
  if (chat.messages.at(-1).role === "assistant") chat.messages.pop();
  message.focus();
  run(chat);
}

async function fork() {
  const { chat, row } = { chat: known.chats.get(known.selected), row: known.rows.get(known.selected) };
  const name = chats.newName();
  try {
    if (row) await api.fork(row.id, name);
  } catch (error) {
    notice("done", wordsOf(error));
    return;
  }
  look();
  if (!chat) {
    select(name);
    return;
  }
  const copy = chats.newChat(name, structuredClone(chat.messages));
  keep(copy);
  begin(copy);
}

async function remove() {
  const { selected } = known;
  const [chat, row] = [known.chats.get(selected), known.rows.get(selected)];
  if ((row || chat?.messages.length) && !(await wantsDeleted(chat ? chats.titleOf(chat) : selected, row))) return;
  try {
    if (row) await api.remove(selected);
  } catch (error) {
    if (error.code !== "session_not_found") {
      notice("done", wordsOf(error));
      return;
    }
  }
  chats.forget(selected);
  known.chats.delete(selected);
  known.rows.delete(selected);
  const next = entries(known.chats, known.rows).find(({ chat }) => chat);
  if (next) begin(next.chat);
  else begin(chats.newChat());
  look();
}

// Wiring.

api.onKeyWanted(wantKey);
byId("new").addEventListener("click", () => {
  const empty = [...known.chats.values()].find((chat) => !chat.messages.length && !known.rows.has(chat.name));
  begin(empty ?? chats.newChat());
});
byId("fork").addEventListener("click", fork);
byId("delete").addEventListener("click", remove);
byId("stop").addEventListener("click", () => known.answering.get(known.selected)?.abort());
byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
message.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
  if (event.key === "Escape") known.answering.get(known.selected)?.abort();
});
for (const button of document.querySelectorAll(".views button")) {
  button.addEventListener("click", () => view(button.dataset.to));
}
for (const [name, input] of Object.entries(field)) {
  input.value = chats.options()[name] ?? "";
  input.addEventListener("change", () => chats.keepOptions(options()));
}
matchMedia("(min-width: 760px)").addEventListener("change", ({ matches }) => {
  if (matches && document.body.dataset.view === "sessions") view("chat"); // the list has a place of its own there
});
document.addEventListener("visibilitychange", look);
for (const change of ["online", "offline"]) addEventListener(change, look);
addEventListener("pagehide", () => {
  for (const name of known.answering.keys()) keep(known.chats.get(name));
});

if (!known.chats.has(known.selected)) begin(chats.newChat());
draw();
look();
