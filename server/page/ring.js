// A session's ring as a drawing and in words and numbers.

import { count, el, plural, svg } from "./dom.js";
import { shapeOf } from "./ring-shape.js";

const GAP = 0.0035; // part of a circle, between two arcs

const at = (turn, radius) => {
  const angle = (turn - 0.25) * 2 * Math.PI;
  return `${(radius * Math.cos(angle)).toFixed(2)} ${(radius * Math.sin(angle)).toFixed(2)}`;
};

function arc({ kind, from, to, age }, radius, width) {
  const gap = Math.min(GAP, (to - from) / 6);
  const large = to - from > 0.5 ? 1 : 0;
  const d = `M ${at(from + gap / 2, radius)} A ${radius} ${radius} 0 ${large} 1 ${at(to - gap / 2, radius)}`;
  const path = svg("path", { class: kind, d, "stroke-width": width });
  if (kind === "page") path.style.setProperty("--age", `${Math.round(age * 100)}%`);
  return path;
}

/** The parts of a ring around the centre. `marker` adds the rotation point. */
function drawing(shape, { radius, width, marker }) {
  const parts = [svg("circle", { class: "track", r: radius, "stroke-width": width })];
  parts.push(...shape.arcs.map((part) => arc(part, radius, width)));
  if (marker && shape.point !== null) {
    const [tip, base] = [radius + width / 2 + 2, radius + width / 2 + 16];
    const spread = 0.0095;
    const d = `M ${at(shape.point, tip)} L ${at(shape.point - spread, base)} L ${at(shape.point + spread, base)} Z`;
    parts.push(svg("path", { class: "point", d }));
  }
  return parts;
}

/** For lists: only the ring. The text beside it says the same. */
export function smallRing(ring, limit) {
  const options = { class: "ring small", viewBox: "-50 -50 100 100", "aria-hidden": "true", focusable: "false" };
  if (!ring) return svg("svg", options, svg("circle", { class: "track", r: 38, "stroke-width": 18 }));
  return svg("svg", options, ...drawing(shapeOf(ring, limit, 24), { radius: 38, width: 18 }));
}

export function ringPanel(row, limit) {
  if (!row?.ring) return el("p", { class: "hint" }, withoutRing(row));
  const { ring } = row;
  const shape = shapeOf(ring, limit);
  const held = row.tokens_held;
  const size = ring.max_size ?? limit;
  return [
    svg(
      "svg",
      { class: "ring large", viewBox: "-120 -120 240 240", role: "img", "aria-label": words(row, held, size) },
      ...drawing(shape, { radius: 88, width: 24, marker: true }),
      svg("text", { class: "figure", y: 2 }, count(held)),
      svg("text", { class: "unit", y: 22 }, `of ${count(size)} tokens`),
    ),
    legend(row, shape, size),
  ];
}

function withoutRing(row) {
  if (!row) return "The server has no session yet. It begins with the first turn.";
  const { state } = row;
  if (state === "spilled") return "This session is on disk. Its next turn restores it.";
  if (state === "running") return "This session waits for its first tokens.";
  return "This session has no ring: this model's cache is not compressed, or the session is empty.";
}

function words({ ring }, held, size) {
  const parts = [
    `${count(held)} of ${count(size)} tokens held`,
    `${count(ring.sink_tokens)} in the sink`,
    plural(ring.pages, "page"),
    ...(ring.pinned_pages ? [`${count(ring.pinned_pages)} of them pinned`] : []),
    `${count(ring.window_tokens)} in the window`,
    `${plural(ring.first_page, "page")} rotated out`,
  ];
  return `Ring: ${parts.join(", ")}`;
}

function legend({ ring, dropped_turns }, shape, size) {
  const gone = ring.first_page * ring.page_tokens;
  const left = ring.max_size === null ? null : ring.max_size - ring.offset;
  const full = left > 0 ? `reached in ${plural(left, "token")}` : "new tokens replace the oldest ones here";
  const rotation = left === null ? "none: the model's limit comes first" : full;
  const grouped = shape.perSegment > 1 ? ` (a segment is ${shape.perSegment})` : "";
  const rotating = ring.pages - ring.pinned_pages;
  const pages = `${count(rotating)} of ${ring.page_tokens} tokens, compressed, the newer the stronger${grouped}`;
  const pinned = `${plural(ring.pinned_pages, "page")}: the system message and the tools, never rotated out`;
  const turns = dropped_turns ? ` of ${plural(dropped_turns, "turn")}` : "";
  const entries = [
    ["sink", "Sink", `${plural(ring.sink_tokens, "token")}, raw, never rotated out`],
    ...(ring.pinned_pages ? [["pinned", "Pinned", pinned]] : []),
    ["page", "Pages", rotating ? pages : "none yet"],
    ["window", "Window", `${plural(ring.window_tokens, "token")}, raw, the newest`],
    ["point", "Rotation point", rotation],
    ["gone", "Rotated out", `${plural(ring.first_page, "page")}, ${plural(gone, "token")}${turns}`],
    ["seen", "Seen in all", plural(ring.offset, "token")],
  ];
  return el(
    "dl",
    { class: "legend" },
    ...entries.map(([kind, name, value]) => {
      const term = el("dt", {}, el("span", { class: `swatch ${kind}` }), name);
      return el("div", { "data-part": kind }, term, el("dd", {}, value));
    }),
  );
}
