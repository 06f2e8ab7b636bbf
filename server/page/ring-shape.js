// The positions of a ring's parts on a circle, in turns (0 to 1, clockwise from the top).

// Smallest parts of a circle: 64 or 192 of 100,000 tokens would be invisible.
const LEAST_SINK = 0.022;
const LEAST_WINDOW = 0.012;
const MOST_SEGMENTS = 96;

/**
 * `ring` is from GET /v1/sessions. `limit` is the model's maximum number of tokens, used where sessions never rotate.
 *
 * The sink comes first, then the pinned pages: they stay where they are. The rest of the circle stands for the tokens
 * that a session holds behind them. The token at position p is at (p - pinnedEnd) modulo that number, so the newest token
 * moves round and round. Tokens that no query sees are not drawn, even if their page is still held. Returns `arcs`, { kind, from, to, age } where pages have an age from
 * 0 (oldest) to 1, and `point`, the rotation point: the oldest tokens, which are dropped next.
 */
export function shapeOf(ring, limit, mostSegments = MOST_SEGMENTS) {
  const kept = ring.sink_tokens + ring.pinned_pages * ring.page_tokens;
  const size = Math.max(ring.max_size ?? limit, kept + 1);
  const body = size - kept;
  const sinkEnd = Math.max(ring.sink_tokens / size, ring.sink_tokens ? LEAST_SINK : 0);
  const keptEnd = sinkEnd + ((kept - ring.sink_tokens) / (size - ring.sink_tokens)) * (1 - sinkEnd);
  const place = (position) => keptEnd + ((((position - kept) % body) / body) * (1 - keptEnd));

  const arcs = ring.sink_tokens ? [{ kind: "sink", from: 0, to: sinkEnd }] : [];
  if (ring.pinned_pages) arcs.push({ kind: "pinned", from: sinkEnd, to: keptEnd });
  const firstHeld = kept + ring.first_page * ring.page_tokens;
  const oldest = Math.max(firstHeld, ring.offset - body);
  const add = (kind, start, end, age) => {
    const from = Math.max(start, oldest);
    if (from >= end) return;
    const turn = kept + Math.ceil((from - kept + 1) / body) * body; // where the circle closes
    if (end <= turn) arcs.push({ kind, from: place(from), to: end === turn ? 1 : place(end), age });
    else {
      arcs.push({ kind, from: place(from), to: 1, age });
      arcs.push({ kind, from: keptEnd, to: place(end), age });
    }
  };

  const pages = ring.pages - ring.pinned_pages;
  const perSegment = Math.ceil(pages / mostSegments) || 1;
  for (let page = 0; page < pages; page += perSegment) {
    const n = Math.min(perSegment, pages - page);
    const start = firstHeld + page * ring.page_tokens;
    add("page", start, start + n * ring.page_tokens, pages > 1 ? (page + (n - 1) / 2) / (pages - 1) : 1);
  }
  if (ring.window_tokens) {
    add("window", ring.offset - ring.window_tokens, ring.offset);
    const last = arcs.at(-1);
    last.from = Math.max(keptEnd, Math.min(last.from, last.to - LEAST_WINDOW));
  }
  return { arcs, sinkEnd, point: ring.max_size === null ? null : place(oldest), head: place(ring.offset), perSegment };
}
