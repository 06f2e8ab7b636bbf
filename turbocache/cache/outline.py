"""Where the parts of a conversation begin, as far as rotation needs it. Integers only."""

from bisect import bisect_left
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Outline:
    """The parts of a conversation, as positions of tokens. Empty for plain text."""

    prefix: int = 0
    """The system message and the tools end here."""
    turns: tuple[int, ...] = ()
    """Where turns begin, in order. A turn is a message of the user with all that answers it."""
    steps: tuple[int, ...] = ()
    """Where the model goes on after results of tools, within turns, in order."""

    def next_beginning(self, oldest: int, last: int) -> int:
        """Where the first turn from `oldest` to `last` begins, else the first step, else `oldest`."""
        for beginnings in (self.turns, self.steps):
            at = bisect_left(beginnings, oldest)
            if at < len(beginnings) and beginnings[at] <= last:
                return beginnings[at]
        return oldest

    def turns_dropped(self, start: int, end: int) -> int:
        """Turns of which tokens in `[start, end)` are a part."""
        if start >= end:
            return 0
        return bisect_left(self.turns, end) - max(0, bisect_left(self.turns, start + 1) - 1)

    def before(self, offset: int) -> "Outline":
        """The outline of the first `offset` tokens."""
        turns, steps = (found[: bisect_left(found, offset)] for found in (self.turns, self.steps))
        return Outline(min(self.prefix, offset), turns, steps)


PLAIN = Outline()
