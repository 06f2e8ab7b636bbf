// One turn of a conversation: the request and its answer.

import * as api from "./api.js";

/** The messages to send: all texts, without thoughts and without empty answers. */
const sent = (chat) =>
  chat.messages.filter(({ text }) => text).map(({ role, text }) => ({ role, content: text }));

/**
 * Requests an answer to the last message of `chat` and calls `changed` at each change. The answer becomes the last
 * message at once. It gets its text and then a `turn`, an `error` or `stopped`. Never throws.
 */
export async function answer(chat, model, options, signal, changed) {
  const messages = sent(chat);
  const message = { role: "assistant", text: "", thought: "" };
  chat.messages.push(message);
  chat.updated = Date.now() / 1000;
  changed();
  const body = { model, messages, ...options };
  let usage = null;
  let finish = null;
  try {
    const rotated = await api.chat(chat.name, body, signal, (chunk) => {
      const [choice] = chunk.choices;
      message.text += choice?.delta.content ?? "";
      message.thought += choice?.delta.reasoning_content ?? "";
      finish = choice?.finish_reason ?? finish;
      usage = chunk.usage ?? usage;
      changed();
    });
    message.turn = {
      prompt: usage.prompt_tokens,
      cached: usage.prompt_tokens_details.cached_tokens,
      generated: usage.completion_tokens,
      finish,
      rotated,
    };
  } catch (error) {
    if (error.name === "AbortError") message.stopped = true;
    else message.error = error instanceof api.Refusal ? error.message : "The server can't be reached.";
  }
  chat.updated = Date.now() / 1000;
  changed();
}
