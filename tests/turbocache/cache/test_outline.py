"""Conversations in a rotating cache: the prefix stays, and the oldest turns go whole."""

import gc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.codec.layout import PAGE
from tests.oracles import Array, Heads, Paged, make_spec, visible_of
from tests.turbocache.cache.test_batch import LAYERS, apply, codecs_of, operations
from tests.turbocache.cache.test_ring import advance, pool_of
from turbocache.cache.outline import PLAIN, Outline
from turbocache.cache.ring import PageRing, RingConfig

configs = st.builds(
    lambda keep, window, extra, share: RingConfig(keep, window, keep + window + PAGE + extra, share),
    st.sampled_from([0, 3, 64, 70]),
    st.sampled_from([0, 64, 128]),
    st.sampled_from([0, 1, 37, 200, 500]),
    st.sampled_from([0.0, 0.3, 0.5, 0.9]),
)


def beginnings(lengths: list[int]) -> tuple[int, ...]:
    return tuple(int(n) for n in np.cumsum(lengths))


@st.composite
def outlines(draw: st.DrawFn) -> Outline:
    """A prefix, then turns of up to 400 tokens, some with steps."""
    prefix = draw(st.integers(0, 400))
    turns = beginnings([prefix, *draw(st.lists(st.integers(2, 400), max_size=12))])
    steps = set(draw(st.lists(st.integers(prefix + 1, prefix + 2000), max_size=12))) - set(turns)
    return Outline(prefix, turns, tuple(sorted(steps)))


@settings(max_examples=300)
@given(config=configs, outline=outlines(), chunks=st.lists(st.one_of(st.just(1), st.integers(1, 300)), max_size=20))
def test_a_ring_holds_what_a_conversation_keeps(config: RingConfig, outline: Outline, chunks: list[int]) -> None:
    ring, last = PageRing(config, pool_of(1 << 10)), np.zeros(0, dtype=int)
    ring.describe(outline)
    for n in chunks:
        advance(ring, n)
        seen = visible_of(outline, ring.offset - 1, config)
        assert config.max_size is not None
        assert len(seen) <= config.max_size
        assert ring.size() == len(seen) == ring.offset - ring.dropped
        if outline.prefix + PAGE <= min(config.pin_share * config.max_size, config.max_size - config.window - PAGE):
            assert np.isin(np.arange(min(outline.prefix, ring.offset)), seen).all()
        # Nothing comes back, and what the next query sees is held.
        assert np.isin(seen[seen < len(last)], last).all() or not len(last)
        held = np.concatenate([np.arange(config.keep), held_in_pages(ring), np.arange(ring.window_start, ring.offset)])
        following = visible_of(outline, ring.offset, config)[:-1]
        assert np.isin(following, held).all()
        rotating = held_in_pages(ring)[PAGE * ring.pinned :]
        assert np.isin(rotating, following).sum() > len(rotating) - PAGE  # at most one page is partly visible
        last = seen
    assert len(ring.pages) <= config.pages_needed(sum(chunks), max(chunks, default=0))


def held_in_pages(ring: PageRing) -> Array:
    """Positions of the tokens in pages."""
    blocks = np.arange(ring.flushed)
    kept = blocks[(blocks < ring.pinned) | (blocks >= ring.pinned + ring.gone)]
    assert len(kept) == len(ring.pages)
    return np.asarray(ring.config.keep + (PAGE * kept[:, None] + np.arange(PAGE)).ravel())


@settings(max_examples=100)
@given(config=configs, outline=outlines(), n=st.integers(1, 2500), data=st.data())
def test_what_is_held_does_not_depend_on_when_the_outline_comes(
    config: RingConfig, outline: Outline, n: int, data: st.DataObject
) -> None:
    """A conversation read at once, and one whose turns came one by one."""
    whole, grown = (PageRing(config, pool_of(1 << 10)) for _ in range(2))
    whole.describe(outline)
    advance(whole, n)
    stops = sorted({*data.draw(st.lists(st.integers(1, n), max_size=5)), n})
    for start, stop in zip([0, *stops], stops, strict=False):
        # All turns that begin before `stop` are known when its tokens come, and the prefix from the beginning.
        grown.describe(replace(outline.before(stop), prefix=outline.prefix))
        advance(grown, stop - start)
    state = (whole.offset, whole.pinned, whole.gone, whole.flushed, whole.dropped)
    assert state == (grown.offset, grown.pinned, grown.gone, grown.flushed, grown.dropped)


@pytest.mark.parametrize("turn", [90, 300])
def test_turns_go_whole_if_they_are_short(turn: int) -> None:
    config = RingConfig(keep=64, window=128, max_size=1024)
    outline = Outline(200, beginnings([200] + [turn] * 30))
    ring = PageRing(config, pool_of(64))
    ring.describe(outline)
    assert ring.pinned == 3
    for _ in range(3000):
        advance(ring, 1)
        if ring.dropped:
            assert ring.rotation_start + ring.dropped in outline.turns
            assert ring.size() > 1024 - turn


def test_a_turn_of_many_steps_goes_step_by_step() -> None:
    outline = Outline(70, (70,), beginnings([70] + [100] * 20))
    ring = PageRing(RingConfig(0, 64, 640), pool_of(64))
    ring.describe(outline)
    advance(ring, 1500)
    assert ring.rotation_start + ring.dropped == 1070  # 988 would fit
    assert ring.size() <= 640


@pytest.mark.parametrize(
    ("share", "prefix", "pinned"),
    [(0.0, 500, 0), (0.5, 64, 0), (0.5, 65, 1), (0.5, 512, 7), (0.5, 5000, 7), (0.9, 5000, 12), (1.0, 5000, 12)],
)
def test_pages_are_pinned_up_to_a_share(share: float, prefix: int, pinned: int) -> None:
    config = RingConfig(64, 128, 1024, share)
    assert config.pinned(Outline(prefix)) == pinned
    assert config.pinned(PLAIN) == RingConfig(64, 128, None, share).pinned(Outline(prefix)) == 0


def test_dropped_turns_are_counted() -> None:
    outline = Outline(100, (100, 200, 300))
    assert [outline.turns_dropped(128, end) for end in (128, 129, 200, 201, 300, 301)] == [0, 1, 1, 2, 2, 3]
    assert [outline.turns_dropped(64, end) for end in (64, 100, 101, 201)] == [0, 0, 1, 2]
    assert outline.before(200) == Outline(100, (100,))


# --- attention ---

RINGS = (
    RingConfig(0, 0, 256),
    RingConfig(3, 64, 331),
    RingConfig(64, 128, 500),
    RingConfig(64, 64, 300, 0.9),
    RingConfig(0, 64, 400, 0.0),
)


def describe(batch: Paged, outline: Outline) -> None:
    """Tell each row its outline, as far as its tokens allow: they have an outline already."""
    for ring, history in zip(batch.views[0].batch.rings, batch.rows, strict=True):
        known = history.outline.before(ring.offset)
        turns, steps = (tuple(n for n in part if n >= ring.offset) for part in (outline.turns, outline.steps))
        prefix = history.outline.prefix if ring.gone else outline.prefix
        history.outline = Outline(prefix, known.turns + turns, known.steps + steps)
        ring.describe(history.outline)


@settings(max_examples=60)
@given(
    ring=st.sampled_from(RINGS),
    steps=st.tuples(operations, operations),
    told=st.tuples(outlines(), outlines()),
    seed=st.integers(0, 2**16),
)
def test_attention_sees_the_prefix_and_the_latest_turns(
    ring: RingConfig,
    steps: tuple[list[tuple[str, object]], ...],
    told: tuple[Outline, ...],
    seed: int,
) -> None:
    spec = make_spec(ring, LAYERS, n_pages=500, initial=3)
    batch = Paged.session(LAYERS, spec, np.random.default_rng(seed))
    for outline, script in zip(told, steps, strict=True):
        describe(batch, outline)
        for name, argument in script:
            batch = apply(batch, name, argument)
    batch.append(1)
    del batch
    gc.collect()
    assert spec.pool.n_used == 0


@pytest.mark.parametrize(("backend", "name", "kind"), [("reference", "k2v2", "pair"), ("packed", "k2v2", "uniform")])
def test_pinned_tokens_are_read_in_the_form_of_their_page(backend: str, name: str, kind: str) -> None:
    """Also in a batch with a row that has no pages, and one that has not rotated."""
    layers, ring = (Heads(4, 2, 64, 32),), RingConfig(3, 64, 400)
    spec = make_spec(ring, layers, n_pages=200, preset_name=name, backend=backend)
    codecs = codecs_of(layers, kind, 2, 2)  # type: ignore[arg-type]
    batch = Paged.session(layers, spec, np.random.default_rng(0), codecs=codecs, tolerance=5e-4)
    describe(batch, Outline(150, beginnings([150] + [60] * 12)))
    batch.append(330)
    for name_, argument in (("decode", 66), ("append", 200), ("merge", 10), ("decode", 9), ("merge", 300)):
        batch = apply(batch, name_, argument)
    batch.append_padded([70, 3, 129], 64)
    batch = apply(batch, "decode", 66)
    assert [ring.pinned for ring in batch.views[0].batch.rings] == [3, 0, 0]
    assert batch.views[0].batch.rings[0].gone > 3
