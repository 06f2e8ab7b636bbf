"""The integers of one session's cache: which tokens are sink, in pages, in the window, and which have rotated out.

Positions of one session, oldest first (P = PAGE, start = keep + P*pinned):

    [0, keep)                           sink      raw, never rotates out
    [keep, start)                       pinned    compressed, never rotates out: `pages[:pinned]`
    [start, start + P*gone)             gone      rotated out
    [start + P*gone, keep + P*flushed)  pages     compressed: `pages[pinned:]`
    [keep + P*flushed, offset)          window    raw, at most `window + P` tokens

A token's block is `(position - keep) // P`. Only the position decides what is compressed, never how tokens arrived: a
query in block b reads the blocks up to `b - window/P - 1` from pages and later ones raw. What a query sees depends on
its position and on the conversation's `Outline` before it.
"""

from dataclasses import dataclass

from kernels.codec.layout import PAGE
from turbocache.cache.conditioning import KeyCentre
from turbocache.cache.outline import PLAIN, Outline
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
    pin_share: float = 0.5
    """Largest part of `max_size` that sink and pinned pages take, 0 to 1. 0 pins nothing."""

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

    def of_sliding(self, window: int) -> "RingConfig | None":
        """Sizes for layers whose queries see the last `window` tokens, in a session with these sizes.

        At most a quarter of what is seen stays raw at least. None if the window is less than two pages longer.
        """
        raw = min(self.window, max(PAGE, window // 4 // PAGE * PAGE))
        return None if window < raw + 2 * PAGE else RingConfig(0, raw, window)

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

    def pinned(self, outline: Outline) -> int:
        """Pages behind the sink that never rotate out: those of the outline's prefix, as far as they fit."""
        if self.max_size is None:
            return 0
        room = min(int(self.pin_share * self.max_size), self.max_size - self.window - PAGE) - self.keep
        return max(0, min(-(-(outline.prefix - self.keep) // PAGE), room // PAGE))

    def first_visible(self, position: int, pinned: int = 0, outline: Outline = PLAIN) -> int:
        """Oldest position behind the sink and the pinned pages that a query at `position` sees.

        The newest tokens that fit into `max_size` are visible, from the beginning of a turn on if less than half of
        them are older than it, else of a step, else all of them. Tokens in the window are always visible.
        """
        start = self.keep + PAGE * pinned
        if self.max_size is None:
            return start
        span = self.max_size - start
        oldest = position + 1 - span
        if oldest <= start:
            return start
        in_pages = self.keep + PAGE * ((position - self.keep) // PAGE) - self.window
        return outline.next_beginning(oldest, min(oldest + span // 2, in_pages))

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

    __slots__ = ("centre", "config", "flushed", "gone", "offset", "outline", "pages", "pinned", "pool")

    def __init__(self, config: RingConfig, pool: PagePool) -> None:
        self.config = config
        self.pool = pool
        self.offset = 0
        self.outline = PLAIN
        self.pinned = 0
        """Pages that never rotate out, the first ones. There may be fewer pages yet."""
        self.gone = 0
        """Blocks that have rotated out."""
        self.flushed = 0
        self.pages: tuple[int, ...] = ()
        """In order of position. A new tuple after each change, so that a step compares identities."""
        self.centre: KeyCentre | None = None
        """What is subtracted from the row's keys. Set with the row's first page."""

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Release every page. The ring is empty afterwards."""
        pages, self.pages = self.pages, ()
        self.pool.release(pages)
        self.offset = self.pinned = self.gone = self.flushed = 0
        self.outline, self.centre = PLAIN, None

    def fork(self) -> "PageRing":
        """An independent ring on the same pages, with one more reference to each."""
        other = PageRing(self.config, self.pool)
        other.offset, other.gone, other.flushed = self.offset, self.gone, self.flushed
        other.outline, other.pinned = self.outline, self.pinned
        self.pool.retain(self.pages)
        other.pages = self.pages
        other.centre = self.centre
        return other

    def describe(self, outline: Outline) -> int:
        """Set the outline of the row's tokens and of those to come, unless it is empty. Returns as `rotate` does.

        Pages are pinned by it only while nothing has rotated out.
        """
        if outline == PLAIN:
            return 0
        self._set_outline(outline)
        return self.rotate()

    def _set_outline(self, outline: Outline) -> None:
        self.outline = outline
        if not self.gone:
            self.pinned = self.config.pinned(outline)

    def block(self, position: int) -> int:
        """Block of a position; negative within the sink."""
        return (position - self.config.keep) // PAGE

    @property
    def window_start(self) -> int:
        """First position held raw behind the sink."""
        return self.config.keep + PAGE * self.flushed

    @property
    def rotation_start(self) -> int:
        """First position that can rotate out."""
        return self.config.keep + PAGE * self.pinned

    @property
    def n_raw(self) -> int:
        """Tokens in the raw sink and window."""
        return min(self.offset, self.config.keep) + max(0, self.offset - self.window_start)

    @property
    def evicted(self) -> int:
        """Tokens that have rotated out so far, in whole pages."""
        return PAGE * self.gone

    def first_visible(self, position: int) -> int:
        """Oldest position that can rotate out and that a query at `position` sees."""
        return self.config.first_visible(position, self.pinned, self.outline)

    @property
    def skip(self) -> int:
        """Tokens of the first page that can rotate out that the next query does not see, fewer than PAGE. 0 if a query
        of any row would not see them, because they are further away than `max_size`.
        """
        oldest = self.first_visible(self.offset)
        if oldest == self.config.first_visible(self.offset):
            return 0
        return max(0, oldest - self.rotation_start - self.evicted)

    @property
    def dropped(self) -> int:
        """Tokens that the newest query did not see."""
        return self.first_visible(self.offset - 1) - self.rotation_start if self.offset else 0

    @property
    def dropped_turns(self) -> int:
        """Turns that the dropped tokens belong to."""
        return self.outline.turns_dropped(self.rotation_start, self.rotation_start + self.dropped)

    def size(self) -> int:
        """Tokens that the newest query saw, itself included: at most `max_size`."""
        return self.offset - self.dropped

    def flushed_at(self, position: int) -> int:
        """Blocks that a query at `position` reads from pages."""
        return max(self.flushed, self.block(position) - self.config.window // PAGE)

    def append_pages(self, pages: list[int]) -> None:
        """Take over `pages` and their references as the next blocks."""
        self.pages += tuple(pages)
        self.flushed += len(pages)

    def rotate(self) -> int:
        """Release pages that no later query can see. Returns their number."""
        hidden = self.block(self.first_visible(self.offset)) - self.pinned
        n = min(max(0, hidden - self.gone), max(0, len(self.pages) - self.pinned))
        if n:
            self.pool.release(self.pages[self.pinned : self.pinned + n])
            self.pages = self.pages[: self.pinned] + self.pages[self.pinned + n :]
            self.gone += n
        return n

    def cut(self, offset: int) -> None:
        """Go back to `offset` tokens. Releases the pages of blocks that are not full any more."""
        n = min(self.flushed, max(0, self.block(offset)))
        self.pool.release(self.pages[n - self.gone :])
        self.pages = self.pages[: n - self.gone]
        self.offset, self.flushed = offset, n
        self._set_outline(self.outline.before(offset))
        if not offset:
            self.centre = None

    def is_same_after(self, offset: int) -> bool:
        """Whether going back to `offset` gives the state of a session of just these tokens."""
        return self.flushed <= max(0, self.block(offset - 1) - self.config.window // PAGE)

    def can_trim_to(self, offset: int) -> bool:
        """Whether the ring can go back to `offset` tokens: nothing that these could see has rotated out."""
        if not 0 <= offset <= self.offset:
            return False
        return self.gone == 0 or self.rotation_start + self.evicted <= self.first_visible(offset)
