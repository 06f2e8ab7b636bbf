// Where the parts of a session's ring lie on a circle, in turns (0 to 1, clockwise from the top).

// Of a circle: 64 or 192 among 100,000 tokens would not be seen.
const LEAST_SINK = 0.022;
const LEAST_WINDOW = 0.012;
const MOST_SEGMENTS = 96;

/**
 * `ring` as GET /v1/sessions has it. `limit` is how many tokens the model can take at all, where nothing rotates.
 *
 * The sink comes first. The rest of the circle is as many tokens as a session holds behind its sink, and the token at
 * position p lies at (p - sink) modulo that, so the newest token moves round and round. What is out of sight is not
 * drawn, though its page may still be held. Returns `arcs`, { kind, from, to, age } with an age of 0 (oldest) to 1 for
 * pages, and `point`, where the oldest tokens lie that go next: the rotation point.
 */
export function shapeOf(ring, limit, mostSegments = MOST_SEGMENTS) {
  const size = Math.max(ring.max_size ?? limit, ring.sink_tokens + 1);
  const body = size - ring.sink_tokens;
  const sinkEnd = Math.max(ring.sink_tokens / size, ring.sink_tokens ? LEAST_SINK : 0);
  const place = (position) => sinkEnd + ((((position - ring.sink_tokens) % body) / body) * (1 - sinkEnd));

  const arcs = ring.sink_tokens ? [{ kind: "sink", from: 0, to: sinkEnd }] : [];
  const firstHeld = ring.sink_tokens + ring.first_page * ring.page_tokens;
  const oldest = Math.max(firstHeld, ring.offset - body);
  const add = (kind, start, end, age) => {
    const from = Math.max(start, oldest);
    if (from >= end) return;
    const turn = ring.sink_tokens + Math.ceil((from - ring.sink_tokens + 1) / body) * body; // where the circle closes
    if (end <= turn) arcs.push({ kind, from: place(from), to: end === turn ? 1 : place(end), age });
    else {
      arcs.push({ kind, from: place(from), to: 1, age });
      arcs.push({ kind, from: sinkEnd, to: place(end), age });
    }
  };

  const perSegment = Math.ceil(ring.pages / mostSegments) || 1;
  for (let page = 0; page < ring.pages; page += perSegment) {
    const n = Math.min(perSegment, ring.pages - page);
    const start = firstHeld + page * ring.page_tokens;
    add("page", start, start + n * ring.page_tokens, ring.pages > 1 ? (page + (n - 1) / 2) / (ring.pages - 1) : 1);
  }
  if (ring.window_tokens) {
    add("window", ring.offset - ring.window_tokens, ring.offset);
    const last = arcs.at(-1);
    last.from = Math.max(sinkEnd, Math.min(last.from, last.to - LEAST_WINDOW));
  }
  return { arcs, sinkEnd, point: ring.max_size === null ? null : place(oldest), head: place(ring.offset), perSegment };
}
