// Each turn's prompt as a bar of cached and computed tokens.

import { count, el, percent } from "./dom.js";

export const turnWords = ({ prompt, cached, generated }) =>
  `${count(cached)} cached, ${count(prompt - cached)} computed, ${count(generated)} generated`;

/** A bar for the prompt's share of `most` tokens. The text beside it says the same. */
export function turnBar({ prompt, cached }, most) {
  const parts = [
    ["cached", cached],
    ["computed", prompt - cached],
    ["rest", most - prompt],
  ].map(([kind, tokens]) => {
    const part = el("span", { class: kind });
    part.style.flexGrow = tokens;
    return part;
  });
  return el("span", { class: "bar-of-tokens", "aria-hidden": "true" }, ...parts);
}

/** All turns of a conversation that have counts. */
export function turnsPanel(chat) {
  const turns = (chat?.messages ?? []).map(({ turn }) => turn).filter(Boolean);
  if (!turns.length) return el("p", { class: "hint" }, "This browser has no counts of this session.");
  const most = Math.max(...turns.map(({ prompt }) => prompt));
  const prompts = turns.reduce((sum, { prompt }) => sum + prompt, 0);
  const cached = turns.reduce((sum, turn) => sum + turn.cached, 0);
  return [
    el("p", {}, `${percent(cached / prompts)} of all prompt tokens came from the cache.`),
    el(
      "p",
      { class: "key", "aria-hidden": "true" },
      el("span", { class: "swatch cached" }),
      "cached",
      el("span", { class: "swatch computed" }),
      "computed",
    ),
    el(
      "ol",
      { class: "turns" },
      ...turns.map((turn, i) =>
        el(
          "li",
          {},
          el("span", { class: "number" }, `Turn ${i + 1}`),
          turnBar(turn, most),
          el("span", { class: "words" }, turnWords(turn)),
        ),
      ),
    ),
  ];
}
