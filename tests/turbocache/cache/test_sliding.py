"""Layers with a sliding window in pages: a model says what it says over mlx-lm's own caches, whatever happens."""

import copy
import gc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.nn.layers.base import Module
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models.cache import make_prompt_cache

from kernels.codec.layout import PAGE
from tests.conftest import build_gemma
from tests.models.tiny import build
from turbocache.cache.ring import RingConfig
from turbocache.cache.view import PagedKVCache
from turbocache.mlxlm.plan import plan_layers
from turbocache.presets import preset
from turbocache.store import CacheStore, batches_of, can_trim_to, is_same_after, ring_of, trim

TOLERANCE = 1e-4
"""Of a logit, relative to the largest one."""


def store_of(model: Module, ring: RingConfig, name: str = "off", backend: str = "reference") -> CacheStore:
    return CacheStore(model, plan_layers(model), preset(name), backend, ring, n_pages=500)


@dataclass
class Row:
    """One session's tokens, and mlx-lm's own cache of them."""

    tokens: list[int]
    own: list[Any]

    def copy(self) -> "Row":
        return Row(list(self.tokens), copy.deepcopy(self.own))


class Batch:
    """Rows in one paged cache. Every step compares the logits with those over each row's own cache."""

    def __init__(self, model: Module, store: CacheStore, rng: np.random.Generator, cache: list[Any], rows: list[Row]):
        self.model, self.store, self.rng, self.cache, self.rows = model, store, rng, cache, rows

    @classmethod
    def session(cls, model: Module, store: CacheStore, rng: np.random.Generator, n: int) -> "Batch":
        made = cls(model, store, rng, store.new_cache(), [Row([], make_prompt_cache(model))])
        if n:
            made.append([n])
        return made

    def append(self, lengths: Sequence[int]) -> None:
        """`lengths[i]` tokens for row i, right-padded if they differ."""
        columns = max(lengths)
        texts = [self.rng.integers(1, 97, n).tolist() for n in lengths]
        padding = [columns - n for n in lengths]
        if any(padding):
            for layer in self.cache:
                layer.prepare(lengths=list(lengths), right_padding=padding)
        got = self.model(mx.array([text + [0] * n for text, n in zip(texts, padding, strict=True)]), cache=self.cache)
        if any(padding):
            for layer in self.cache:
                layer.finalize()
        mx.eval(got, [layer.state for layer in self.cache])
        for i, (row, text) in enumerate(zip(self.rows, texts, strict=True)):
            row.tokens += text
            if text:
                want = self.model(mx.array([text]), cache=row.own)
                error = mx.abs(got[i : i + 1, : len(text)] - want).max() / mx.abs(want).max()
                assert float(error) < TOLERANCE

    def derived(self, cache: list[Any], rows: list[Row]) -> "Batch":
        return Batch(self.model, self.store, self.rng, cache, rows)

    def fork(self) -> "Batch":
        return self.derived(copy.deepcopy(self.cache), [row.copy() for row in self.rows])

    def extracted(self, row: int) -> "Batch":
        return self.derived([layer.extract(row) for layer in self.cache], [self.rows[row].copy()])

    def merged(self, other: "Batch") -> "Batch":
        layers = zip(self.cache, other.cache, strict=True)
        return self.derived([a.merge([a, b]) for a, b in layers], [row.copy() for row in self.rows + other.rows])

    def extend(self, other: "Batch") -> None:
        for mine, theirs in zip(self.cache, other.cache, strict=True):
            mine.extend(theirs)
        self.rows += other.rows

    def filter(self, rows: list[int]) -> None:
        for layer in self.cache:
            layer.filter(rows)
        self.rows = [self.rows[row] for row in rows]

    def trim(self, n: int) -> None:
        """As a session of one row that goes back. The oracle reads what is left anew."""
        (row,) = self.rows
        kept = len(row.tokens) - n
        if not can_trim_to(self.cache, kept, len(row.tokens)):
            return
        assert is_same_after(self.cache, kept) or n > 0
        trim(self.cache, n)
        row.tokens, row.own = row.tokens[:kept], make_prompt_cache(self.model)
        if kept:
            mx.eval(self.model(mx.array([row.tokens]), cache=row.own))

    def check(self) -> None:
        for spec in self.store.specs:
            spec.check_integrity()
            assert all(batch.shadow_nbytes == 0 for batch in spec.live)


operations = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.one_of(st.just(1), st.integers(1, 330))),
        st.tuples(st.just("decode"), st.sampled_from([3, 70])),
        st.tuples(st.just("padded"), st.integers(0, 2**16)),
        st.tuples(st.just("trim"), st.integers(0, 2**16)),
        st.tuples(st.just("fork"), st.integers(1, 100)),
        st.tuples(st.just("extract"), st.integers(0, 2**16)),
        st.tuples(st.just("filter"), st.integers(0, 2**16)),
        st.tuples(st.just("extend"), st.integers(0, 300)),
        st.tuples(st.just("merge"), st.integers(0, 300)),
    ),
    min_size=2,
    max_size=6,
)


def apply(batch: Batch, name: str, n: int) -> Batch:
    dice, rows = np.random.default_rng(n), len(batch.rows)
    if name == "append":
        batch.append([n] * rows)
    elif name == "decode":
        for _ in range(n):
            batch.append([1] * rows)
    elif name == "padded":
        batch.append([int(m) for m in dice.integers(1, 250, rows)])
    elif name == "fork":
        other = batch.fork()
        other.append([n] * rows)
        batch.check()
    elif name == "extract":
        alone = batch.extracted(n % rows)
        alone.append([1])
        alone.trim(int(dice.integers(0, min(len(alone.rows[0].tokens), 90) + 1)))
        alone.append([PAGE + 3])
    elif name == "trim" and rows == 1:
        batch.trim(int(dice.integers(0, min(len(batch.rows[0].tokens), 200) + 1)))
    elif name == "filter":
        batch.filter(sorted(dice.choice(rows, size=int(dice.integers(1, rows + 1)), replace=False).tolist()))
    elif name == "extend" and rows < 3:
        fresh = Batch.session(batch.model, batch.store, batch.rng, n)
        batch.extend(fresh.merged(fresh.extracted(0)) if n % 2 and n else fresh.fork())
    elif name == "merge" and rows < 3:
        batch = batch.merged(Batch.session(batch.model, batch.store, batch.rng, n))
    batch.check()
    return batch


@pytest.mark.parametrize("ring", [RingConfig(0, 0), RingConfig(5, 64), RingConfig(64, 128)], ids=str)
@given(steps=operations, seed=st.integers(0, 2**16))
@settings(max_examples=8)
def test_any_schedule_says_what_mlx_lms_own_caches_say(
    ring: RingConfig, steps: list[tuple[str, int]], seed: int
) -> None:
    """A window that is no multiple of a page, shorter and longer prompts than it, rows apart and together."""
    model = build_gemma(window=260)
    store = store_of(model, ring)
    assert all(plan.compressed for plan in store.plans)
    batch = Batch.session(model, store, np.random.default_rng(seed), seed % 400)
    for name, n in steps:
        batch = apply(batch, name, n)
    batch.append([1] * len(batch.rows))
    del batch
    gc.collect()
    assert [spec.pool.n_used for spec in store.specs] == [0, 0]


def test_attention_sinks_and_a_window_of_three_pages() -> None:
    model = build("gpt_oss")
    store = store_of(model, RingConfig(8, 64))
    assert [spec.sliding for spec in store.specs] == [False, True]
    batch = Batch.session(model, store, np.random.default_rng(0), 500)
    batch = batch.merged(Batch.session(model, store, batch.rng, 90))
    for lengths in ([1, 1], [130, 7], [1, 1], [1, 1]):
        batch.append(lengths)


def test_mlx_lms_generators_run_on_it() -> None:
    """`generate_step`, and a BatchGenerator whose rows end at different times and go on in a second turn."""
    model = build_gemma(window=200)
    store = store_of(model, RingConfig(16, 64))
    prompts = [np.random.default_rng(i).integers(1, 97, n).tolist() for i, n in enumerate((300, 40, 190))]
    found = []
    for new_cache in (store.new_cache, lambda: make_prompt_cache(model)):
        alone = [int(t) for t, _ in generate_step(mx.array(prompts[0]), model, max_tokens=9, prompt_cache=new_cache())]
        generator = BatchGenerator(model, prefill_step_size=64)
        uids = generator.insert(prompts, max_tokens=[9, 70, 5], caches=[new_cache() for _ in prompts])
        texts, caches = _drain(generator, uids)
        again = BatchGenerator(model)
        second = again.insert([[5, 6, 7]] * 3, max_tokens=[6] * 3, caches=caches)
        found.append((alone, texts, _drain(again, second)[0]))
    assert found[0] == found[1]


def _drain(generator: BatchGenerator, uids: list[int]) -> tuple[list[list[int]], list[list[Any]]]:
    tokens: dict[int, list[int]] = {uid: [] for uid in uids}
    caches: dict[int, list[Any]] = {}
    while len(caches) < len(uids):
        for response in generator.next_generated():
            tokens[response.uid].append(response.token)
            if response.finish_reason is not None:
                caches[response.uid] = response.prompt_cache
    generator.close()
    return [tokens[uid] for uid in uids], [caches[uid] for uid in uids]


def test_a_session_s_pages_are_bounded_by_the_window() -> None:
    model = build_gemma(window=512)
    store = store_of(model, RingConfig(64, 128), "k4v4")
    cache, most = store.new_cache(), 0
    sliding = next(batch for batch in batches_of(cache) if batch.spec.sliding)
    for n in (700, *[1] * 130, 64, 900):
        mx.eval(model(mx.array([[1] * n]), cache=cache))
        most = max(most, len(sliding.rings[0].pages))
        assert sliding.spec.pool.n_used == len(sliding.rings[0].pages)
    assert most <= sliding.spec.ring.pages_needed(10_000) == 7
    main = ring_of(cache)
    assert main is not None
    assert len(main.pages) == 25
    pages = sum(len(b.rings[0].pages) * b.spec.pool.page_nbytes for b in batches_of(cache))
    raw = sum(spec.raw_nbytes for spec in store.specs)
    centres = sum(ring.centre.nbytes for batch in batches_of(cache) for ring in batch.rings if ring.centre is not None)
    assert store.held_nbytes(cache) == pages + raw + centres
    assert store.resting_nbytes([cache, copy.deepcopy(cache)]) == pages + 2 * (raw + centres)
    assert store.held_nbytes(cache) == sum(layer.nbytes for layer in cache)
    assert store.session_nbytes(main.offset, 900) >= store.held_nbytes(cache) + raw


@pytest.mark.parametrize(
    ("window", "name", "compressed"),
    [(512, "k4v4", True), (256, "k4v4", True), (128, "k4v4", False), (256, "off", True)],
)
def test_a_window_is_compressed_where_it_pays(window: int, name: str, compressed: bool) -> None:
    model = build_gemma(window=window)
    model.set_dtype(mx.float16)
    store = store_of(model, RingConfig(64, 128), name)
    assert [plan.compressed for plan in store.plans] == [compressed, compressed, True]
    assert [isinstance(layer, PagedKVCache) for layer in store.new_cache()] == [compressed, compressed, True]
    said = "sliding window of 256 tokens" if compressed else "a sliding window of 128 tokens is too small for pages"
    assert store.reason(0).startswith(said.replace("256", str(window)))
    token = 2 * 2 * 64 * 2
    sizes = store.layer_sizes(0)
    if compressed and name == "k4v4":
        raw = RingConfig(64, 128).of_sliding(window)
        assert raw is not None
        want = {"fixed_bytes": raw.raw_slots * token, "token_bytes": 2 * (64 + 4), "max_tokens": window}
    elif compressed:
        want = {"fixed_bytes": 128 * token, "token_bytes": token, "max_tokens": window}
    else:
        want = {"fixed_bytes": 0, "token_bytes": token, "max_tokens": window}
    assert sizes == want


def test_only_the_window_s_own_mask_is_made() -> None:
    store = store_of(build_gemma(window=200), RingConfig(0, 0))
    sliding, _, plain = store.new_cache()
    assert sliding.make_mask(5, window_size=200) == sliding.make_mask(5) == plain.make_mask(5) == "causal"
    assert sliding.make_mask(1, window_size=200) is None
    for view, window in ((sliding, 199), (plain, 200)):
        with pytest.raises(ValueError, match="the window that it is made for"):
            view.make_mask(5, window_size=window)
