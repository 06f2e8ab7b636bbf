"""The integers of one session's cache: which tokens are sink, in pages, in the window, and which have rotated out.

Positions of one session, oldest first (P = PAGE):

    [0, keep)                        sink        raw, never rotates out
    [keep, keep + P*pinned)          pinned      compressed, never rotates out, `pages[i]` holds block `i`
    [.., keep + P*first + skip)      gone        rotated out, or hidden in the oldest page
    [.., keep + P*flushed)           pages       compressed, `pages[pinned + i]` holds block `first + i`
    [keep + P*flushed, offset)       window      raw, at most `window + P` tokens

A token's block is `(position - keep) // P`. Only the position decides what is compressed, never how tokens arrived: a
query in block b reads the blocks up to `b - window/P - 1` from pages and later ones raw.
"""

from dataclasses import dataclass

from kernels.codec.layout import PAGE
from turbocache.cache.conditioning import KeyCentre
from turbocache.cache.pool import PagePool


@dataclass(frozen=True, slots=True)
class RingConfig:
    """Sizes in tokens. Raises ValueError for sizes that can't work."""

    keep: int = 64
    """Sink tokens."""
    window: int = 128
    """Tokens behind the sink that stay raw at least, a multiple of PAGE."""
    max_size: int | None = None
    """Tokens that a query sees. None disables rotation."""

    def __post_init__(self) -> None:
        if self.keep < 0:
            raise ValueError(f"keep must be 0 or more tokens, not {self.keep}")
        if self.window < 0 or self.window % PAGE:
            raise ValueError(f"window must be a multiple of {PAGE} tokens, not {self.window}")
        if self.max_size is not None and self.max_size < self.smallest_max_size:
            raise ValueError(
                f"max_size must be at least keep + window + {PAGE} = {self.smallest_max_size} tokens, "
                f"not {self.max_size}"
            )

    @property
    def smallest_max_size(self) -> int:
        return self.keep + self.window + PAGE

    @property
    def window_slots(self) -> int:
        """Raw slots behind the sink. The token at position p is in slot `(p - keep) % window_slots`."""
        return self.window + PAGE

    @property
    def raw_slots(self) -> int:
        return self.keep + self.window_slots

    def first_visible(self, position: int) -> int:
        """Oldest position behind the sink that a query at `position` sees."""
        if self.max_size is None:
            return self.keep
        return max(self.keep, position + 1 - (self.max_size - self.keep))

    def pages_needed(self, n_tokens: int, chunk: int = 0) -> int:
        """Most pages that a session of `n_tokens` holds at once when its prompts come in chunks of `chunk` tokens."""
        in_pages = max(0, n_tokens - self.keep - self.window)
        if self.max_size is not None:
            # A page lives while any of its tokens is visible to the chunk's first query; +1 for the partial one.
            in_pages = min(in_pages, self.max_size - self.keep - self.window + chunk + PAGE)
        return -(-in_pages // PAGE)


class PageRing:
    """One row's token counts and page list. Owns a reference to each of its pages.

    mlx-lm drops batches without telling their caches, so `__del__` releases the references; `close` does so early.
    """

    __slots__ = ("centre", "config", "first", "flushed", "offset", "pages", "pinned", "pool", "skip")

    def __init__(self, config: RingConfig, pool: PagePool) -> None:
        self.config = config
        self.pool = pool
        self.offset = 0
        self.first = 0
        self.flushed = 0
        self.pinned = 0
        """Pages at the start of `pages` that never rotate out."""
        self.skip = 0
        """Tokens, fewer than PAGE, at the start of the first page behind them that no query sees."""
        self.pages: tuple[int, ...] = ()
        """A new tuple after each change, so that a step compares identities."""
        self.centre: KeyCentre | None = None
        """What is subtracted from the row's keys. Set with the row's first page."""

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Release every page. The ring is empty afterwards."""
        pages, self.pages = self.pages, ()
        self.pool.release(pages)
        self.offset = self.first = self.flushed = self.pinned = self.skip = 0
        self.centre = None

    def fork(self) -> "PageRing":
        """An independent ring on the same pages, with one more reference to each."""
        other = PageRing(self.config, self.pool)
        other.offset, other.first, other.flushed = self.offset, self.first, self.flushed
        other.pinned, other.skip = self.pinned, self.skip
        self.pool.retain(self.pages)
        other.pages = self.pages
        other.centre = self.centre
        return other

    def block(self, position: int) -> int:
        """Block of a position; negative within the sink."""
        return (position - self.config.keep) // PAGE

    @property
    def window_start(self) -> int:
        """First position held raw behind the sink."""
        return self.config.keep + PAGE * self.flushed

    @property
    def n_raw(self) -> int:
        """Tokens in the raw sink and window."""
        return min(self.offset, self.config.keep) + max(0, self.offset - self.window_start)

    @property
    def evicted(self) -> int:
        """Tokens that have rotated out so far, in whole pages."""
        return PAGE * (self.first - self.pinned)

    def size(self) -> int:
        """Tokens that the next query sees without itself, as mlx-lm's RotatingKVCache counts them."""
        limit = self.config.max_size
        return self.offset if limit is None else min(self.offset, limit)

    def flushed_at(self, position: int) -> int:
        """Blocks that a query at `position` reads from pages."""
        return max(self.flushed, self.block(position) - self.config.window // PAGE)

    def append_pages(self, pages: list[int]) -> None:
        """Take over `pages` and their references as the next blocks."""
        self.pages += tuple(pages)
        self.flushed += len(pages)

    def rotate(self) -> int:
        """Release pages that no later query can see. Returns their number."""
        last_hidden = self.block(self.config.first_visible(self.offset))
        gone = min(max(0, last_hidden - self.first), len(self.pages) - self.pinned)
        if gone:
            pinned, end = self.pinned, self.pinned + gone
            self.pool.release(self.pages[pinned:end])
            self.pages = self.pages[:pinned] + self.pages[end:]
            self.first += gone
            self.skip = 0
        return gone

    def is_same_after(self, offset: int) -> bool:
        """Whether going back to `offset` gives the state of a session of just these tokens."""
        return self.flushed <= max(0, self.block(offset - 1) - self.config.window // PAGE)

    def can_trim_to(self, offset: int) -> bool:
        """Whether the ring can go back to `offset` tokens: nothing that these could see has rotated out."""
        if not 0 <= offset <= self.offset:
            return False
        if not self.evicted and not self.skip:
            return True
        return self.config.keep + PAGE * self.first + self.skip <= self.config.first_visible(offset)
