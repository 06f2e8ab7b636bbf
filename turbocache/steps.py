"""What one forward pass does to the rings of a batch, worked out once and used by every layer.

`plan_decode` and `plan_prefill` are pure integer work on `PageRing`s: they take pages, advance offsets and say which
slots to write, which blocks to compress and which keys each query sees. `CacheBatch` does the array work.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from kernels.lanes import Mask, PageIndex
from kernels.layout import PAGE
from turbocache.pool import PagePool
from turbocache.ring import PageRing


@dataclass(frozen=True, slots=True)
class Flush:
    """Compress the block that starts at raw slot `slot` of `row` into `page`."""

    row: int
    slot: int
    page: int


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """One token per row. `slots` int32 `[B, 1, 1, 1]`; raw slots from `n_raw` on are empty in every row; `mask` is as
    `Lanes.attend` wants it, pages first and then the first `n_raw` raw slots.
    """

    flushes: tuple[Flush, ...]
    slots: mx.array
    n_raw: int
    index: PageIndex
    mask: mx.array | None


@dataclass(frozen=True, slots=True)
class ChunkStep:
    """`n` tokens of one row. Its keys, in order: the pages of `index`, `n_sink` sink tokens, then the body.

    The body is the raw window's old tokens (at slots `old_slots`) followed by the chunk's tokens behind the sink; its
    first `PAGE * len(new_pages)` tokens become pages. `to_slots` says for each window slot which body token it holds
    afterwards. `mask` is as `Lanes.attend` wants it.
    """

    row: int
    n: int
    n_sink: int
    sink_taken: int
    old_slots: mx.array
    new_pages: tuple[int, ...]
    index: PageIndex
    to_slots: mx.array
    mask: Mask


@dataclass(frozen=True, slots=True)
class PrefillStep:
    """One chunk step per row that still has tokens."""

    chunks: tuple[ChunkStep, ...]


def plan_decode(rings: Sequence[PageRing], pool: PagePool, previous: PageIndex | None) -> tuple[DecodeStep, int]:
    """Advance every ring by one token; returns the step and the number of pages that rotated out.

    `previous` is the last step's index, reused while no page table changes. Raises PoolExhausted and then changes
    nothing.
    """
    due = [row for row, ring in enumerate(rings) if ring.flushed_at(ring.offset) > ring.flushed]
    flushes = []
    for row, page in zip(due, pool.take(len(due)) if due else (), strict=True):
        ring = rings[row]
        flushes.append(Flush(row, _window_slot(ring, ring.window_start), page))
        ring.append_pages([page])
    slots = [_slot(ring, ring.offset) for ring in rings]
    for ring in rings:
        ring.offset += 1
    index = PageIndex(tuple(tuple(ring.pages) for ring in rings))
    if previous is not None and previous.tables == index.tables:
        index = previous
    raw = _visible_raw(rings)
    n_raw = int(np.flatnonzero(raw.any(axis=0))[-1]) + 1
    visible = np.concatenate([_visible_in_pages(rings, index.n_pages), raw[:, :n_raw]], axis=1)
    mask = None if visible.all() else mx.array(visible[:, None, None, :])
    rotated = sum(ring.rotate() for ring in rings)
    at = mx.array(slots, dtype=mx.int32)[:, None, None, None]
    return DecodeStep(tuple(flushes), at, n_raw, index, mask), rotated


def plan_prefill(rings: Sequence[PageRing], lengths: Sequence[int], pool: PagePool) -> tuple[PrefillStep, int]:
    """Advance ring i by `lengths[i]` tokens (0 leaves it); returns the step and the number of pages rotated out.

    Raises PoolExhausted and then changes nothing.
    """
    targets = [
        ring.flushed_at(ring.offset + n - 1) if n else ring.flushed for ring, n in zip(rings, lengths, strict=True)
    ]
    fresh = pool.take(sum(target - ring.flushed for target, ring in zip(targets, rings, strict=True)))
    chunks = []
    for row, (ring, n, target) in enumerate(zip(rings, lengths, targets, strict=True)):
        if n:
            pages, fresh = fresh[: target - ring.flushed], fresh[target - ring.flushed :]
            chunks.append(_plan_chunk(row, ring, n, pages))
    rotated = sum(ring.rotate() for ring in rings)
    return PrefillStep(tuple(chunks)), rotated


def _plan_chunk(row: int, ring: PageRing, n: int, new_pages: list[int]) -> ChunkStep:
    keep, slots = ring.config.keep, ring.config.window_slots
    start, end, body_start = ring.offset, ring.offset + n, ring.window_start
    sink_taken = min(max(keep - start, 0), n)
    old = np.arange(body_start, max(start, body_start))
    flushed_before = ring.flushed
    queries = np.arange(start, end)
    flushed_at = np.maximum(flushed_before, (queries - keep) // PAGE - ring.config.window // PAGE)
    ring.append_pages(new_pages)
    ring.offset = end
    held = np.arange(max(ring.window_start, keep), end)
    to_slots = np.zeros(slots, dtype=np.int32)
    to_slots[(held - keep) % slots] = held - body_start
    n_sink = min(keep, end)
    return ChunkStep(
        row=row,
        n=n,
        n_sink=n_sink,
        sink_taken=sink_taken,
        old_slots=mx.array((old - keep) % slots + keep, dtype=mx.int32),
        new_pages=tuple(new_pages),
        index=PageIndex((tuple(ring.pages),)),
        to_slots=mx.array(to_slots),
        mask=_chunk_mask(ring, n_sink, body_start, queries, flushed_at, flushed_before),
    )


def _chunk_mask(
    ring: PageRing, n_sink: int, body_start: int, queries: np.ndarray, flushed_at: np.ndarray, flushed_before: int
) -> Mask:
    """Which keys (pages, sink, body) each query of a chunk sees. Blocks compressed within the chunk are there twice,
    once in pages and once raw, and each query sees the form that its position calls for.
    """
    keep, first_visible = ring.config.keep, ring.config.first_visible(int(queries[-1]))
    paged = np.arange(keep + PAGE * ring.first, keep + PAGE * ring.flushed)
    if ring.flushed == flushed_before and first_visible <= keep + PAGE * ring.first:
        return "causal" if len(queries) > 1 else None
    body = np.arange(body_start, queries[-1] + 1)
    behind = np.array([ring.config.first_visible(int(q)) for q in queries])[:, None]
    boundary = keep + PAGE * flushed_at[:, None]
    at = queries[:, None]
    mask = np.concatenate(
        [
            (paged[None] < boundary) & (paged[None] >= behind),
            np.arange(n_sink)[None] <= at,
            (body[None] >= boundary) & (body[None] >= behind) & (body[None] <= at),
        ],
        axis=1,
    )
    return mx.array(mask[None, None])


def _visible_raw(rings: Sequence[PageRing]) -> np.ndarray:
    """Raw slots that hold a token, the one being written included: bool `[B, keep + window_slots]`."""
    return np.stack([ring.raw_positions() >= 0 for ring in rings])


def _visible_in_pages(rings: Sequence[PageRing], n_pages: int) -> np.ndarray:
    """Tokens of each row's pages that its newest query sees: bool `[B, n_pages * PAGE]`."""
    visible = np.zeros((len(rings), n_pages * PAGE), dtype=bool)
    for row, ring in enumerate(rings):
        hidden = ring.config.first_visible(ring.offset - 1) - (ring.config.keep + PAGE * ring.first)
        visible[row, max(hidden, 0) : PAGE * len(ring.pages)] = True
    return visible


def _window_slot(ring: PageRing, position: int) -> int:
    keep = ring.config.keep
    return keep + (position - keep) % ring.config.window_slots


def _slot(ring: PageRing, position: int) -> int:
    return position if position < ring.config.keep else _window_slot(ring, position)
