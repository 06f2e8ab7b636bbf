import copy
import gc
import weakref

import mlx.core as mx
import numpy as np
import pytest

from kernels.codec.layout import PAGE
from kernels.lanes.base import LaneShape
from kernels.lanes.identity import IdentityLanes
from tests.oracles import Heads, make_spec
from turbocache.cache.pool import PagePool, PoolExhausted
from turbocache.cache.ring import RingConfig
from turbocache.cache.view import PagedKVCache

TINY = (Heads(1, 1, 1, 1), Heads(2, 1, 1, 2))


def tiny_pool(capacity: int, initial: int = 2) -> PagePool:
    return PagePool([IdentityLanes(LaneShape(1, 1, 1, 1, 16, 16), mx.float16)] * 2, capacity, initial)


def test_take_and_release() -> None:
    pool = tiny_pool(5)
    assert (pool.n_used, pool.n_free, pool.allocated_nbytes) == (0, 5, 0)
    first = pool.take(3)
    assert len(set(first)) == 3
    assert (pool.n_used, pool.n_free) == (3, 2)
    with pytest.raises(PoolExhausted, match="3 cache pages needed, 2 of 5 free"):
        pool.take(3)
    pool.check_integrity([first])
    second = pool.take(2)
    assert set(first) | set(second) == set(range(5))
    with pytest.raises(PoolExhausted):
        pool.take(1)
    pool.retain(first[:1])
    pool.release(first)
    assert pool.n_used == 3
    pool.check_integrity([first[:1], second])
    pool.release(first[:1])
    with pytest.raises(ValueError, match=f"page {first[0]} released more often than taken"):
        pool.release(first[:1])
    pool.release(second)
    assert pool.n_used == 0
    assert pool.take(0) == []


def test_grows_in_steps_and_keeps_what_is_there() -> None:
    pool = tiny_pool(11)
    sizes = set()
    taken = []
    for page in range(11):
        taken += pool.take(1)
        content = tuple(mx.full((1, 1, PAGE, 1), 10 * page + part, dtype=mx.float16) for part in (1, 2))
        for layer in (0, 1):
            pool.write(layer, taken[-1:], content)
        sizes.add(pool.pages(0)[0].shape[0])
    assert sizes == {2, 4, 8, 11}
    assert pool.allocated_nbytes == 11 * pool.page_nbytes == 11 * 2 * 2 * PAGE * 2
    for layer in (0, 1):
        for part in (0, 1):
            array = np.array(pool.pages(layer)[part])
            assert [float(array[page].min()) for page in taken] == [10.0 * i + part + 1 for i in range(11)]


def test_a_pool_without_pages_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one page, not 0"):
        tiny_pool(0)


@pytest.mark.parametrize("broken", ["owner missing", "owner too many", "free and owned", "free twice", "count"])
def test_check_integrity_finds_what_is_wrong(broken: str) -> None:
    pool = tiny_pool(8, initial=8)
    owned = pool.take(3)
    owners = [list(owned)]
    pool.check_integrity(owners)
    if broken == "owner missing":
        owners[0].pop()
    elif broken == "owner too many":
        owners.append([owned[0]])
    elif broken == "free and owned":
        pool._free.append(owned[0])
    elif broken == "free twice":
        pool._free.append(pool._free[0])
    else:
        pool._counts[owned[0]] += 1
    with pytest.raises(AssertionError, match="page"):
        pool.check_integrity(owners)


class Zoo:
    """Sessions and batches under random operations. Rings' numbers are followed by a plain list of token counts."""

    def __init__(self, ring: RingConfig, n_pages: int, seed: int) -> None:
        self.spec = make_spec(ring, TINY, n_pages, initial=4)
        self.rng = np.random.default_rng(seed)
        self.caches: list[list[PagedKVCache]] = []
        self.offsets: list[list[int]] = []
        self.n_refused = 0

    def pick(self) -> int:
        return int(self.rng.integers(len(self.caches)))

    def add(self, views: list[PagedKVCache], offsets: list[int]) -> None:
        self.caches.append(views)
        self.offsets.append(offsets)

    def drop(self, i: int) -> None:
        del self.caches[i], self.offsets[i]

    def forward(self, i: int, lengths: list[int], padded: bool) -> None:
        views, n = self.caches[i], max(lengths)
        before = [(r.offset, r.gone, r.flushed, list(r.pages)) for r in views[0].batch.rings]
        if padded:
            for view in views:
                view.prepare(lengths=lengths, right_padding=[n - m for m in lengths])
        try:
            for heads, view in zip(TINY, views, strict=True):
                k, v = (mx.zeros((len(lengths), 1, n, dim)) for dim in (heads.key_dim, heads.value_dim))
                view.update_and_fetch(k, v)
        except PoolExhausted:
            self.n_refused += 1
            assert [(r.offset, r.gone, r.flushed, list(r.pages)) for r in views[0].batch.rings] == before
        else:
            self.offsets[i] = [have + m for have, m in zip(self.offsets[i], lengths, strict=True)]
            mx.eval([view.state for view in views])
        if padded:
            for view in views:
                view.finalize()

    def one_operation(self) -> None:
        kinds = (
            "append",
            "decode",
            "padded",
            "fork",
            "trim",
            "merge",
            "filter",
            "extend",
            "extract",
            "drop",
            "new",
            "split",
        )
        kind = str(self.rng.choice(kinds, p=[0.2, 0.25, 0.08, 0.05, 0.08, 0.05, 0.05, 0.06, 0.05, 0.05, 0.05, 0.03]))
        if not self.caches or (kind == "new" and len(self.caches) < 8):
            self.add(PagedKVCache.layers(self.spec), [0])
            return
        i = self.pick()
        views, n_rows = self.caches[i], len(self.offsets[i])
        if kind == "append":
            self.forward(i, [int(self.rng.integers(1, 200))] * n_rows, padded=False)
        elif kind == "decode":
            for _ in range(int(self.rng.choice([1, 1, 1, 40]))):
                self.forward(i, [1] * n_rows, padded=False)
        elif kind == "padded":
            lengths = self.rng.integers(0, 120, size=n_rows).tolist()
            lengths[0] += 1
            self.forward(i, lengths, padded=True)
        elif kind == "trim":
            n = int(self.rng.integers(0, min(self.offsets[i]) + 1))
            if all(ring.can_trim_to(ring.offset - n) for ring in views[0].batch.rings):
                assert {view.trim(n) for view in views} == {n}
                self.offsets[i] = [offset - n for offset in self.offsets[i]]
        elif kind == "fork" and len(self.caches) < 8:
            self.add(copy.deepcopy(views), list(self.offsets[i]))
        elif kind == "split" and n_rows > 1:
            half = copy.deepcopy(views)
            cut = int(self.rng.integers(1, n_rows))
            for view in views:
                view.filter(list(range(cut)))
            for view in half:
                view.filter(list(range(cut, n_rows)))
            self.add(half, self.offsets[i][cut:])
            self.offsets[i] = self.offsets[i][:cut]
        elif kind == "merge" and len(self.caches) < 8:
            chosen = [self.pick() for _ in range(int(self.rng.integers(1, 4)))]
            if sum(len(self.offsets[c]) for c in chosen) < 6:
                columns = zip(*(self.caches[c] for c in chosen), strict=True)
                merged = [column[0].merge(list(column)) for column in columns]
                self.add(merged, [offset for c in chosen for offset in self.offsets[c]])
        elif kind == "filter":
            kept = sorted(self.rng.choice(n_rows, size=int(self.rng.integers(1, n_rows + 1)), replace=False).tolist())
            for view in views:
                view.filter(kept)
            self.offsets[i] = [self.offsets[i][row] for row in kept]
        elif kind == "extend" and len(self.caches) > 1:
            other = (i + 1) % len(self.caches)
            if n_rows + len(self.offsets[other]) < 6:
                for mine, theirs in zip(views, self.caches[other], strict=True):
                    mine.extend(theirs)
                self.offsets[i] = self.offsets[i] + self.offsets[other]
                self.drop(other)
        elif kind == "extract" and len(self.caches) < 8:
            row = int(self.rng.integers(n_rows))
            self.add([view.extract(row) for view in views], [self.offsets[i][row]])
        elif kind == "drop":
            self.drop(i)  # without filter or close, as mlx-lm does it

    def check(self) -> None:
        self.spec.pool.check_integrity(ring.pages for views in self.caches for ring in views[0].batch.rings)
        assert len(self.spec.live) == len(self.caches)
        for views, offsets in zip(self.caches, self.offsets, strict=True):
            batch = views[0].batch
            assert all(view.batch is batch for view in views)
            assert batch.offsets == offsets
            assert batch.shadow_nbytes == 0


@pytest.mark.parametrize(
    ("ring", "n_pages"),
    [(RingConfig(3, 0, 150), 12), (RingConfig(0, 64, None), 25), (RingConfig(64, 64, 300), 400)],
    ids=str,
)
def test_thousands_of_operations_neither_leak_nor_share_wrongly(ring: RingConfig, n_pages: int) -> None:
    zoo = Zoo(ring, n_pages, seed=n_pages)
    gc.disable()  # references alone must suffice: mlx-lm's drops are not followed by a collection
    try:
        for _ in range(1200):
            zoo.one_operation()
            zoo.check()
        assert (zoo.n_refused > 0) == (n_pages < 100)
        zoo.caches.clear()
        zoo.offsets.clear()
        assert zoo.spec.pool.n_used == 0
        assert len(zoo.spec.live) == 0
    finally:
        gc.enable()


def test_dropping_a_session_frees_its_pages_and_its_raw_buffers_at_once() -> None:
    spec = make_spec(RingConfig(0, 0, None), TINY, 20)
    views = PagedKVCache.layers(spec)
    for heads, view in zip(TINY, views, strict=True):
        view.update_and_fetch(mx.zeros((1, 1, 200, heads.key_dim)), mx.zeros((1, 1, 200, heads.value_dim)))
    mx.eval([view.state for view in views])
    batch = weakref.ref(views[0].batch)
    assert spec.pool.n_used == 3
    gc.disable()
    try:
        del views, view
        assert batch() is None
        assert spec.pool.n_used == 0
    finally:
        gc.enable()
