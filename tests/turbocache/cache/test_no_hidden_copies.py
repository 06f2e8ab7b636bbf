"""The pool is written in place, prefill never holds a raw cache, and nothing is kept beside what `nbytes` says.

An array update in MLX copies the whole array if anybody else, a step in flight included, still refers to its buffer.
"""

import gc
import time
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.nn.layers.base import Module
from mlx_lm.models.cache import make_prompt_cache

from kernels.codec.layout import PAGE
from tests.oracles import Heads, make_spec
from turbocache.cache.pool import PagePool
from turbocache.cache.ring import RingConfig
from turbocache.cache.spec import CacheSpec
from turbocache.cache.view import PagedKVCache
from turbocache.mlxlm import seam
from turbocache.mlxlm.plan import plan_layers
from turbocache.presets import preset
from turbocache.store import CacheStore

MIB = 1 << 20
HEADS = Heads(4, 4, 128, 128)
PAGE_BYTES = 2 * 4 * PAGE * 128 * 4  # 256 KiB, uncompressed

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(mx.default_device().type != mx.cpu, reason="bounds were set for the CPU backend"),
]


@pytest.fixture(autouse=True)
def _clean_memory() -> Iterator[None]:
    gc.collect()
    mx.clear_cache()
    yield
    mx.synchronize()
    mx.clear_cache()


def allocated(pool_mib: int) -> CacheSpec:
    """A spec of one layer whose pool has all its memory already."""
    n_pages = pool_mib * MIB // PAGE_BYTES
    spec = make_spec(RingConfig(0, 0, 128), [HEADS], n_pages, initial=n_pages)
    spec.pool.release(spec.pool.take(1))
    assert spec.pool.allocated_nbytes == pool_mib * MIB
    mx.eval(spec.pool.pages(0))
    return spec


def decode_loop(spec: CacheSpec, n_steps: int, hold: Callable[[], object] | None = None) -> list[float]:
    """Decode as mlx-lm does it: a step is built while the one before is running. 64 rows, one token apart from each
    other, so that every step writes a page. Returns seconds for each step. `hold` may keep something from each step.
    """
    rng = np.random.default_rng(0)
    rows = [PagedKVCache.layers(spec)[0] for _ in range(64)]

    def tokens(n_rows: int, n: int) -> tuple[mx.array, mx.array, mx.array]:
        q, k, v = (mx.array(rng.normal(size=(n_rows, 4, n, 128)).astype(np.float32)) for _ in range(3))
        return q, k, v

    for i, row in enumerate(rows):
        _, k, v = tokens(1, 1 + i)
        row.update_and_fetch(k, v)
        mx.eval(row.state)
    view = rows[0].merge(rows)
    del rows
    q, k, v = tokens(64, 1)
    mx.eval(q, k, v, view.state)
    mx.reset_peak_memory()
    times, held = [], None
    previous = mx.zeros((64, 4, 1, 128))
    for _ in range(n_steps):
        start = time.perf_counter()
        used = spec.pool.n_used + view.batch.spec.rotated_pages
        pending = view.update_and_fetch(k + 0 * previous, v)
        out = seam.attention(q, *pending, view, scale=0.1, mask=None)
        mx.async_eval(out)
        assert spec.pool.n_used + view.batch.spec.rotated_pages == used + 1
        mx.eval(previous)
        previous = out
        times.append(time.perf_counter() - start)
        held = None if hold is None else hold()
    mx.synchronize()
    del held
    return times


def test_decoding_does_not_copy_the_pool() -> None:
    """Neither time nor peak memory follows the size of the pool. A copy of the large one would take 256 MiB and (at
    10 GB/s) 50 ms a step.
    """
    medians, extra = {}, {}
    for pool_mib in (32, 256):
        others = mx.get_active_memory()
        spec = allocated(pool_mib)
        times = decode_loop(spec, 24)
        medians[pool_mib] = float(np.median(times[4:]))
        extra[pool_mib] = mx.get_peak_memory() - others - spec.pool.allocated_nbytes
        del spec
        gc.collect()
        mx.clear_cache()
    assert extra[256] < 128 * MIB
    assert extra[256] - extra[32] < 16 * MIB
    assert medians[256] < 2 * medians[32] + 0.01


def test_the_measurement_finds_a_reader() -> None:
    """The control: an array that still has to read the pool makes the next write copy it, and memory shows it."""
    others = mx.get_active_memory()
    spec = allocated(256)
    decode_loop(spec, 3, hold=lambda: [array[0, 0, 0, 0] for array in spec.pool.pages(0)])
    assert mx.get_peak_memory() - others - spec.pool.allocated_nbytes > 120 * MIB


def three_steps(spec: CacheSpec) -> int:
    """A prompt, a slow decode step that nobody waits for, and a chunk. Each writes a page. Returns the extra peak."""
    view = PagedKVCache.layers(spec)[0]
    k = mx.random.normal((1, 4, 2 * PAGE, 128))

    def step(keys: mx.array) -> mx.array:
        pending = view.update_and_fetch(keys, keys)
        return seam.attention(keys, *pending, view, scale=0.1, mask=None)

    mx.eval(step(k), view.state)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    slow = mx.random.normal((900, 900))
    for _ in range(12):
        slow = slow @ slow / 900
    mx.async_eval(step(k[:, :, :1] + 0 * slow[0, 0]))
    mx.eval(step(k[:, :, :PAGE]), view.state)
    return mx.get_peak_memory() - before


def test_pages_are_written_when_nothing_is_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the start of an evaluation and the next write of pages lies a wait for the device."""
    calls = []

    def record(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def recorded(*args: Any) -> Any:
            calls.append(name)
            return original(*args)

        monkeypatch.setattr(owner, name, recorded)

    spec = allocated(256)
    for name in ("synchronize", "eval", "async_eval"):
        record(mx, name)
    record(PagePool, "write")
    extra = three_steps(spec)
    written = ["synchronize", "write"]
    assert calls == [*written, "eval", *written, "async_eval", *written, "eval"]
    assert extra < 64 * MIB  # a copy of the pool takes 256


def test_growing_peaks_at_the_pool_and_one_layer() -> None:
    heads = [Heads(2, 2, 64, 64)] * 8
    n_pages = 256
    spec = make_spec(RingConfig(0, 0, None), heads, 2 * n_pages, initial=n_pages)
    taken = spec.pool.take(n_pages)
    pool = spec.pool.allocated_nbytes
    assert pool == n_pages * 8 * 2 * 2 * PAGE * 64 * 4
    mx.reset_peak_memory()
    before = mx.get_active_memory() - pool
    spec.pool.take(1)
    assert spec.pool.allocated_nbytes == 2 * pool
    assert mx.get_peak_memory() - before < 2 * pool + 2 * pool // len(heads) + 4 * MIB
    spec.pool.release(taken)


@pytest.mark.parametrize("backend", ["packed", "reference"])
def test_a_session_holds_what_nbytes_says(backend: str, tiny_llama: Module) -> None:
    """MLX's own count of live bytes before and after: pages, sink and window, nothing else."""
    store = CacheStore(tiny_llama, plan_layers(tiny_llama), preset("k4v4"), backend, RingConfig(4, 64), 64)
    store.spec.pool.release(store.spec.pool.take(64))
    cache = store.new_cache()
    mx.eval(tiny_llama(mx.array([[1, 2]]), cache=cache), [layer.state for layer in cache])  # constants, masks
    del cache
    gc.collect()
    before = mx.get_active_memory()
    cache = store.new_cache()
    rng = np.random.default_rng(0)
    for n in (700, 1, 1, 90, *[1] * 70):
        tokens = mx.array(rng.integers(0, 97, size=(1, n)))
        mx.eval(tiny_llama(tokens, cache=cache), [layer.state for layer in cache])
    del tokens
    gc.collect()
    live = mx.get_active_memory() - before
    batch = cache[0].batch
    n_pages = len(batch.rings[0].pages)
    assert n_pages == (862 - 4 - 1) // PAGE - 1
    said = sum(layer.nbytes for layer in cache)
    assert said == batch.raw_nbytes + n_pages * store.spec.pool.page_nbytes == store.held_nbytes(cache)
    assert batch.raw_nbytes == 2 * 2 * 2 * (4 + 64 + PAGE) * 64 * 4
    # The pool's memory was there before, so only the raw tokens are new, and some KiB of page table and constants.
    # A raw copy of what the pages hold would take more than a MiB.
    assert batch.raw_nbytes <= live < batch.raw_nbytes + 65_536
    per_page = 2 * 2 * 2 * PAGE * (64 * 4 // 8 + 2)  # layers, heads, keys and values
    assert store.spec.pool.page_nbytes == per_page


def test_prefill_peaks_at_the_compressed_cache_and_one_layers_scratch(llama_of: Callable[..., Module]) -> None:
    """16 layers, 2,048 tokens: far below the raw cache that mlx-lm would hold."""
    n_layers, n, chunk = 16, 2048, 128
    model = llama_of(n_layers=n_layers, n_heads=2, n_kv_heads=2, head_dim=64)
    plans = plan_layers(model)
    tokens = mx.array(np.random.default_rng(0).integers(0, 97, size=(1, n)))

    def peak_of(make: Callable[[], list[object]]) -> int:
        gc.collect()
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        cache = make()
        for start in range(0, n, chunk):
            model(tokens[:, start : start + chunk], cache=cache)
            mx.eval([layer.state for layer in cache])  # type: ignore[attr-defined]
            mx.clear_cache()
        return mx.get_peak_memory() - before

    stores = [CacheStore(model, plans, preset("k4v4"), "packed", RingConfig(64, 128), n // PAGE)]
    ours = peak_of(stores[0].new_cache)
    spec = stores[0].spec
    raw_cache = n_layers * 2 * 2 * n * 64 * 4
    # One layer's keys and values as expanded pages, next to body and sink in one array, and the scores with their
    # softmax, which MLX's CPU attention holds three times over.
    scratch = 3 * (raw_cache // n_layers) + 3 * 2 * chunk * n * 4
    assert ours < spec.pool.allocated_nbytes + 2 * spec.raw_nbytes + scratch + 4 * MIB
    assert ours < 0.8 * raw_cache
    assert peak_of(lambda: make_prompt_cache(model)) > raw_cache
