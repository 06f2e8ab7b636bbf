"""A conversation and its cache."""

from dataclasses import dataclass, field

import numpy as np

from server.sessions.checkpoints import Checkpoint, turn_start
from server.sessions.starts import State
from turbocache.mlxlm.prompt_cache import PromptCache
from turbocache.storage.whole_file import FileState
from turbocache.store import ring_of

NOTHING = np.zeros(0, dtype=np.int32)


@dataclass(slots=True, eq=False)
class Session:
    """One history of a conversation: in memory, on disk, or running."""

    id: str
    """Unique among the sessions of its owner. The first session of a name has the name as its id."""
    name: str | None = None
    """The client's name for the conversation, None if it gives none."""
    owner: str = ""
    """The owner of the API key, or ""."""
    keep: bool = False
    """Evicted after sessions without this mark."""
    tokens: np.ndarray = field(default_factory=lambda: NOTHING)
    """int32, exactly the tokens in `cache`. While the session runs, the tokens of its prompt."""
    asked: int = 0
    """How many of `tokens` are the messages of its last prompt."""
    cache: PromptCache | None = None
    """None while the session runs (the generator has the cache) or is only on disk."""
    running: bool = False
    passing: bool = False
    """Removed when its turn ends."""
    turns: int = 0
    last_used: float = 0.0
    checkpoints: list[Checkpoint] = field(default_factory=list)
    """They stay with the session while it runs, too."""
    stored: bool = False
    """A file holds the cache of exactly these tokens."""
    unsavable: bool = False
    """Writing a file of exactly these tokens has failed."""
    file: FileState | None = None
    """Its file when this session last read or wrote it. A different state means that another server wrote it."""

    @property
    def key(self) -> tuple[str, str]:
        return self.owner, self.id

    @property
    def spilled(self) -> bool:
        """Whether its cache is only on disk."""
        return self.stored and self.cache is None and not self.running

    def states(self, own: bool = True) -> list[State]:
        """What a prompt can start from: the end of its last turn, and its checkpoints."""
        last = [] if self.cache is None else [State("session", self.tokens, self.cache, own)]
        return last + [State(c.kind, c.tokens, c.cache, own) for c in self.checkpoints]

    @property
    def rotated(self) -> bool:
        """Whether tokens have rotated out of its caches in memory."""
        caches = [*([] if self.cache is None else [self.cache]), *(c.cache for c in self.checkpoints)]
        return any((ring := ring_of(cache)) is not None and ring.gone > 0 for cache in caches)

    def needed(self, can_go_back: bool) -> list[Checkpoint]:
        """The checkpoints to keep if the cache can't be trimmed (`can_go_back` is False, or tokens have rotated out):
        the end of the user's last prompt, and the checkpoint before it. Without the first, a changed answer costs a
        whole prefill; without the second, a changed prompt does.
        """
        if can_go_back and not self.rotated:
            return []
        by_depth = sorted(self.checkpoints, key=lambda checkpoint: len(checkpoint.tokens))
        last = turn_start(by_depth) or (by_depth[-1] if by_depth else None)
        return [] if last is None else by_depth[max(0, by_depth.index(last) - 1) : by_depth.index(last) + 1]

    def empty(self) -> None:
        """Drop everything that it holds."""
        self.cache, self.tokens, self.asked, self.checkpoints, self.stored = None, NOTHING, 0, [], False
