import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.codec.layout import PAGE
from kernels.lanes.base import LaneShape
from kernels.lanes.identity import IdentityLanes
from tests.oracles import raw_positions, visible_positions
from turbocache.cache.pool import PagePool, PoolExhausted
from turbocache.cache.ring import PageRing, RingConfig
from turbocache.cache.steps import plan_decode, plan_prefill


def pool_of(n_pages: int) -> PagePool:
    return PagePool([IdentityLanes(LaneShape(1, 1, 1, 1, 16, 16), mx.float16)], n_pages)


configs = st.builds(
    lambda keep, window, extra: RingConfig(keep, window, None if extra is None else keep + window + PAGE + extra),
    st.sampled_from([0, 3, 64, 70]),
    st.sampled_from([0, 64, 128]),
    st.sampled_from([None, 0, 1, 37, 64, 200]),
)


def advance(ring: PageRing, n: int) -> None:
    if n == 1:
        plan_decode([ring], ring.pool, None)
    else:
        plan_prefill([ring], [n], ring.pool)


@settings(max_examples=200)
@given(config=configs, position=st.integers(0, 2000))
def test_first_visible_is_the_oldest_position_behind_the_sink(config: RingConfig, position: int) -> None:
    seen = visible_positions(position, config.keep, config.max_size)
    behind = seen[seen >= config.keep]
    assert config.first_visible(position) == (behind[0] if behind.size else config.keep)


@settings(max_examples=200)
@given(config=configs, chunks=st.lists(st.one_of(st.just(1), st.integers(1, 300)), min_size=1, max_size=40))
def test_what_a_ring_holds(config: RingConfig, chunks: list[int]) -> None:
    """Positions are partitioned into sink, gone, pages and window; everything that the next query sees is held."""
    pool = pool_of(1 << 12)
    ring = PageRing(config, pool)
    largest = 0
    for n in chunks:
        start = ring.offset
        advance(ring, n)
        assert ring.offset == start + n
        assert len(ring.pages) == ring.flushed - ring.gone
        assert pool.n_used == len(ring.pages)
        raw = raw_positions(ring)
        held = raw[raw >= 0]
        assert len(np.unique(held)) == len(held)
        in_pages = np.arange(config.keep + PAGE * ring.gone, config.keep + PAGE * ring.flushed)
        everything = np.concatenate([held, in_pages])
        assert len(np.unique(everything)) == len(everything)
        seen = visible_positions(ring.offset, config.keep, config.max_size)[:-1]
        assert np.isin(seen, everything).all()
        # Nothing is held for long: at most one partly visible page, at most window + PAGE raw tokens.
        behind = seen[seen >= config.keep]
        hidden = in_pages[in_pages < behind[0]] if behind.size else in_pages
        assert len(hidden) < PAGE
        window = held[held >= config.keep]
        assert len(window) <= config.window + PAGE
        # What is in pages depends on the position alone.
        assert ring.flushed == max(0, (ring.offset - 1 - config.keep) // PAGE - config.window // PAGE)
        assert ring.size() == (ring.offset if config.max_size is None else min(ring.offset, config.max_size))
        largest = max(largest, n)
        n_tokens = sum(chunks)
        assert len(ring.pages) <= config.pages_needed(n_tokens, largest)


@settings(max_examples=200)
@given(config=configs, chunk=st.sampled_from([1, 2, 63, 64, 65, 130, 300]), n_chunks=st.integers(1, 12))
def test_pages_needed_is_enough_and_not_much_more(config: RingConfig, chunk: int, n_chunks: int) -> None:
    """A pool of exactly that size never refuses, and a long session uses it but for three pages."""
    n_tokens = chunk * n_chunks
    needed = config.pages_needed(n_tokens, 0 if chunk == 1 else chunk)
    ring = PageRing(config, pool_of(max(1, needed)))
    most = 0
    for _ in range(n_chunks):
        before = ring.flushed - ring.gone
        flushed = ring.flushed
        advance(ring, chunk)
        most = max(most, before + ring.flushed - flushed)
    assert most <= needed
    if n_tokens > 2 * (config.max_size or n_tokens):
        assert needed <= most + 3


@settings(max_examples=200)
@given(config=configs, chunks=st.lists(st.integers(1, 200), min_size=1, max_size=12), data=st.data())
def test_trim_is_refused_exactly_when_something_visible_is_gone(
    config: RingConfig, chunks: list[int], data: st.DataObject
) -> None:
    ring = PageRing(config, pool_of(1 << 10))
    for n in chunks:
        advance(ring, n)
    target = data.draw(st.one_of(st.integers(0, ring.offset), st.integers(max(0, ring.offset - 100), ring.offset)))
    gone = np.arange(config.keep, config.keep + ring.evicted)
    # What the query at `target` sees of the past.
    seen = visible_positions(target, config.keep, config.max_size)[:-1]
    allowed = ring.can_trim_to(target)
    if allowed:
        assert not np.isin(seen, gone).any()
    elif target > config.keep + ring.evicted:
        assert np.isin(seen, gone).any()
    else:
        assert ring.evicted > 0  # the target itself has rotated out
    assert not ring.can_trim_to(ring.offset + 1)
    assert not ring.can_trim_to(-1)
    assert ring.can_trim_to(ring.offset)


def test_fork_and_close_count_references() -> None:
    pool = pool_of(16)
    ring = PageRing(RingConfig(0, 0), pool)
    advance(ring, 5 * PAGE + 1)
    other = ring.fork()
    pool.check_integrity([ring.pages, other.pages])
    assert pool.n_used == 5
    advance(other, PAGE)
    assert (ring.offset, other.offset) == (5 * PAGE + 1, 6 * PAGE + 1)
    assert len(ring.pages) == 5
    assert pool.n_used == 6
    ring.close()
    assert ring.offset == ring.size() == 0
    assert pool.n_used == 6
    ring.close()
    del other
    assert pool.n_used == 0


@pytest.mark.parametrize("chunk", [1, 30])
def test_exhaustion_changes_nothing(chunk: int) -> None:
    """Two rows need a page each and one is free: neither moves, and afterwards one of them can go on."""
    pool = pool_of(3)
    rings = [PageRing(RingConfig(0, 0), pool) for _ in range(2)]
    plan_prefill(rings, [PAGE, 2 * PAGE], pool)
    blocker = pool.take(1)
    before = [(r.offset, r.gone, r.flushed, list(r.pages)) for r in rings]

    def step(some: list[PageRing]) -> None:
        if chunk == 1:
            plan_decode(some, pool, None)
        else:
            plan_prefill(some, [chunk] * len(some), pool)

    with pytest.raises(PoolExhausted, match="2 cache pages needed, 1 of 3 free"):
        step(rings)
    assert [(r.offset, r.gone, r.flushed, list(r.pages)) for r in rings] == before
    pool.check_integrity([*(r.pages for r in rings), blocker])
    step(rings[1:])
    assert rings[1].offset == 2 * PAGE + chunk
    pool.check_integrity([*(r.pages for r in rings), blocker])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"keep": -1}, "keep must be 0 or more tokens, not -1"),
        ({"window": 65}, "window must be a multiple of 64 tokens, not 65"),
        ({"window": -64}, "window must be a multiple of 64"),
        ({"keep": 3, "window": 64, "max_size": 130}, r"at least keep \+ window \+ 64 = 131 tokens, not 130"),
    ],
)
def test_sizes_that_cannot_work_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RingConfig(**sizes)
