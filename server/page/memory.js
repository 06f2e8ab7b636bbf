// The budget for all caches, its use, and the bytes of the selected session by kind.

import { bytes, count, el, percent } from "./dom.js";

const KINDS = [
  ["pages", "Pages"],
  ["sink", "Sink"],
  ["window", "Window"],
  ["recurrent", "The model's own caches"],
  ["checkpoints", "Checkpoints"],
];

export function memoryPanel({ status, row }) {
  if (!status) return null;
  const { memory, pages } = status;
  const claims = [
    ["resting", "At rest", memory.resting_bytes],
    ["running", "Promised to running requests", memory.running_bytes],
    ["waiting", "Promised to waiting requests", memory.waiting_bytes],
  ];
  const used = memory.resting_bytes + memory.running_bytes;
  const free = Math.max(0, memory.budget_bytes - used - memory.waiting_bytes);
  return [
    el("p", {}, el("strong", {}, bytes(used)), ` of ${bytes(memory.budget_bytes)} (${percent(memory.pressure_ratio)})`),
    meter(claims, free, memory),
    table([
      ...claims.map(([kind, name, n]) => [kind, name, bytes(n)]),
      [null, "Pages in use", `${count(pages.used)} of ${count(pages.capacity)}, ${bytes(pages.nbytes)} each`],
    ]),
    ...ofSession(row),
  ];
}

function meter(claims, free, { pressure_ratio: pressure }) {
  const parts = [...claims.map(([kind, , n]) => [kind, n]), ["free", free]].map(([kind, n]) => {
    const part = el("span", { class: kind });
    part.style.flexGrow = n;
    return part;
  });
  return el(
    "div",
    {
      class: "meter",
      role: "meter",
      "aria-label": "Memory for caches",
      "aria-valuemin": 0,
      "aria-valuemax": 100,
      "aria-valuenow": Math.min(100, Math.round(pressure * 100)),
      "aria-valuetext": percent(pressure),
    },
    ...parts,
  );
}

function ofSession(row) {
  if (!row) return [];
  if (!row.bytes) return [el("p", { class: "hint" }, "This session's bytes are shown when it is idle in memory.")];
  const kinds = KINDS.filter(([kind]) => row.bytes[kind]);
  const sum = kinds.reduce((total, [kind]) => total + row.bytes[kind], 0);
  return [
    el("h3", {}, `This session: ${bytes(sum)}`),
    table(kinds.map(([kind, name]) => [null, name, bytes(row.bytes[kind])])),
  ];
}

const table = (rows) =>
  el(
    "dl",
    { class: "figures" },
    ...rows.map(([kind, name, value]) =>
      el("div", {}, el("dt", {}, kind && el("span", { class: `swatch ${kind}` }), name), el("dd", {}, value)),
    ),
  );
