// Requests to the server, with an API key where it asks for one. Errors have the server's own message.

const KEY = "turbocache.key";

/** An error response of the server. */
export class Refusal extends Error {
  constructor(message, status, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

let askForKey = null;
let asking = null;

/** `ask(reason)` resolves to a key. All requests that wait for a key share one question. */
export function onKeyWanted(ask) {
  askForKey = ask;
}

async function newKey(refused, reason) {
  if (sessionStorage.getItem(KEY) !== refused) return; // another request already got a new key
  asking ??= askForKey(reason).finally(() => (asking = null));
  sessionStorage.setItem(KEY, await asking);
}

async function send(path, { method = "GET", body, headers = {}, signal } = {}) {
  for (;;) {
    if (asking) await asking;
    const key = sessionStorage.getItem(KEY);
    const sent = { ...headers };
    if (key) sent.Authorization = `Bearer ${utf8(key)}`;
    if (body !== undefined) sent["Content-Type"] = "application/json";
    const answer = await fetch(new URL(path, document.baseURI), {
      method,
      headers: sent,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
      credentials: "omit",
    });
    if (answer.ok) return answer;
    const refusal = await refusalOf(answer);
    if (refusal.status !== 401) throw refusal;
    await newKey(key, refusal.message);
  }
}

/** The UTF-8 bytes of a text, each as one character, because headers allow no others. */
const utf8 = (text) => String.fromCharCode(...new TextEncoder().encode(text));

async function refusalOf(answer) {
  try {
    const { error } = await answer.json();
    return new Refusal(error.message, answer.status, error.code);
  } catch {
    return new Refusal(`The server answered with status ${answer.status}.`, answer.status, null);
  }
}

const at = (id, change = "") => `v1/sessions/${encodeURIComponent(id)}${change}`;

export const models = async () => (await (await send("v1/models")).json()).data;
export const backend = async () => (await send("v1/backend")).json();
export const status = async () => (await send("v1/status")).json();
export const sessions = async () => (await (await send("v1/sessions")).json()).data;
export const remove = (id) => send(at(id), { method: "DELETE" });
export const fork = async (id, name) => (await send(at(id, "/fork"), { method: "POST", body: { id: name } })).json();

/**
 * Streams one answer of a session. `onChunk` gets each chunk. Resolves at the end: true if the conversation is longer
 * than the session holds. Throws a Refusal, also for an error within the stream.
 */
export async function chat(session, body, signal, onChunk) {
  const answer = await send("v1/chat/completions", {
    method: "POST",
    body: { ...body, stream: true, stream_options: { include_usage: true } },
    headers: { "X-Session-ID": session },
    signal,
  });
  for await (const data of events(answer.body)) {
    if (data === "[DONE]") return answer.headers.has("X-Turbocache-Overflow");
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Refusal(chunk.error.message, null, chunk.error.code);
    onChunk(chunk);
  }
  throw new Refusal("The connection ended before the answer did.", null, null);
}

/** The data of server-sent events, without comments. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const lines = part.split("\n").filter((line) => line.startsWith("data:"));
      if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
    }
  }
}
