"""The page pool: reference-counted pages of fixed size, shared by all sessions and layers.

A page id names one page in the arrays of every layer. A page is written once, read by any number of owners, and free
again when its last owner releases it.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from math import prod

import mlx.core as mx

from kernels.lanes.base import Lanes, Pages


class PoolExhausted(RuntimeError):
    """No page is free and the pool is at its capacity."""


class PagePool:
    """Pages of all compressed layers. Owned by one thread.

    `capacity` bounds the pages. Memory doubles in steps as pages are first used. Growing copies one layer's arrays at a
    time, so its peak is the pool plus one layer.
    """

    def __init__(self, layers: Sequence[Lanes], capacity: int, initial: int = 64) -> None:
        if capacity < 1:
            raise ValueError(f"a page pool needs at least one page, not {capacity}")
        self.capacity = capacity
        self._layers = tuple(layers)
        self._arrays = [
            [mx.zeros((0, *shape), dtype=dtype) for shape, dtype in lanes.page_arrays()] for lanes in self._layers
        ]
        self._initial = initial
        self._counts: list[int] = []
        self._free: list[int] = []

    @property
    def n_used(self) -> int:
        return len(self._counts) - len(self._free)

    @property
    def n_free(self) -> int:
        """Pages that can still be taken, whether allocated or not."""
        return self.capacity - self.n_used

    @property
    def page_nbytes(self) -> int:
        """Bytes of one page over all layers."""
        return sum(self.layer_nbytes(layer) for layer in range(len(self._layers)))

    def layer_nbytes(self, layer: int) -> int:
        """Bytes of one page in one layer."""
        return sum(prod(shape) * dtype.size for shape, dtype in self._layers[layer].page_arrays())

    @property
    def allocated_nbytes(self) -> int:
        """Bytes allocated on the device so far, free pages included."""
        return sum(array.nbytes for arrays in self._arrays for array in arrays)

    def pages(self, layer: int) -> Pages:
        """The arrays of one layer, each `[n_allocated, ...]`. Don't keep them: a reader makes the next write copy."""
        return tuple(self._arrays[layer])

    def n_owners(self, page: int) -> int:
        return self._counts[page]

    def take(self, n: int) -> list[int]:
        """Take `n` pages with one reference each. Takes none if it raises PoolExhausted."""
        if n > self.n_free:
            raise PoolExhausted(f"{n} cache pages needed, {self.n_free} of {self.capacity} free")
        while len(self._free) < n:
            self._grow()
        taken = [self._free.pop() for _ in range(n)]
        for page in taken:
            self._counts[page] = 1
        return taken

    def retain(self, pages: Iterable[int]) -> None:
        """Add an owner to each page."""
        for page in pages:
            self._counts[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Remove an owner from each page, and free pages without owners. Raises ValueError for a page without one."""
        for page in pages:
            if self._counts[page] <= 0:
                raise ValueError(f"page {page} released more often than taken")
            self._counts[page] -= 1
            if not self._counts[page]:
                self._free.append(page)

    def write(self, layer: int, pages: Sequence[int], content: Pages) -> None:
        """Store `content`, each `[len(pages), ...]`, as one layer's part of `pages`. Lazy.

        The write is in place only if no evaluation in flight reads the layer. So callers synchronize the device first
        (`CacheBatch` does once a step).
        """
        index = mx.array(list(pages), dtype=mx.int32)
        for array, part in zip(self._arrays[layer], content, strict=True):
            array[index] = part

    def check_integrity(self, owners: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless the counts equal the sum of `owners`, one page list each.

        free + owned = allocated; no page is free and owned; no count differs from its number of owners.
        """
        owned = Counter(page for pages in owners for page in pages)
        free = Counter(self._free)
        if any(n > 1 for n in free.values()):
            raise AssertionError("a page is in the free list twice")
        for page, count in enumerate(self._counts):
            if count != owned[page]:
                raise AssertionError(f"page {page} counts {count} owners, has {owned[page]}")
            if (count == 0) != (page in free):
                raise AssertionError(f"page {page} with {count} owners is {'' if page in free else 'not '}free")
        if self.n_used + self.n_free != self.capacity:
            raise AssertionError("used and free pages do not add up to the capacity")

    def _grow(self) -> None:
        have = len(self._counts)
        more = min(max(self._initial, have), self.capacity - have)
        mx.synchronize()
        for arrays, lanes in zip(self._arrays, self._layers, strict=True):
            for i, (shape, dtype) in enumerate(lanes.page_arrays()):
                arrays[i] = mx.concatenate([arrays[i], mx.zeros((more, *shape), dtype=dtype)])
            mx.eval(arrays)
        self._counts.extend([0] * more)
        self._free.extend(range(have + more - 1, have - 1, -1))
