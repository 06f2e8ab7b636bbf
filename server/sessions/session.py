"""A conversation and its cache."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from server.sessions.checkpoints import Checkpoint, Start, start_at, turn_start
from server.sessions.folder_watch import FileState
from turbocache.store import ring_of

NOTHING = np.zeros(0, dtype=np.int32)


@dataclass(slots=True, eq=False)
class Session:
    """One history of a conversation, at rest, on disk or running.

    `id` is unique among the sessions of its `owner` (the API key's, or ""). `name` is what the client calls the
    conversation, None where it doesn't; a name's first session has it for its id, other histories under the same name
    have ids of their own. `keep`: it is evicted after those without. `passing`: nothing of it
    stays when its turn ends.

    `tokens`, int32, are exactly the tokens that went into `cache`, of a running session its prompt's; `asked` of them
    are the messages of its last prompt. A running session's cache is with the generator and None here. Checkpoints stay
    with the session whatever it does. `stored`: a file holds the cache of just these tokens; `unsavable`: writing one
    has failed. `file`: the session's file as it was when this session last wrote or read it, so that one of another
    server is told apart.
    """

    id: str
    name: str | None = None
    owner: str = ""
    keep: bool = False
    tokens: np.ndarray = field(default_factory=lambda: NOTHING)
    asked: int = 0
    cache: list[Any] | None = None
    running: bool = False
    passing: bool = False
    turns: int = 0
    last_used: float = 0.0
    checkpoints: list[Checkpoint] = field(default_factory=list)
    stored: bool = False
    unsavable: bool = False
    file: FileState | None = None

    @property
    def key(self) -> tuple[str, str]:
        return self.owner, self.id

    @property
    def spilled(self) -> bool:
        """Whether only the disk has its cache."""
        return self.stored and self.cache is None and not self.running

    def states(self, prompt: np.ndarray) -> list[Start | None]:
        """From where in it a prompt can go on: where its last turn ended, and its checkpoints."""
        ended = start_at("session", self.tokens, self.cache, prompt)
        return [ended, *(start_at(c.kind, c.tokens, c.cache, prompt) for c in self.checkpoints)]

    @property
    def rotated(self) -> bool:
        """Whether tokens have rotated out of what it has in memory."""
        caches = [*([] if self.cache is None else [self.cache]), *(c.cache for c in self.checkpoints)]
        return any((ring := ring_of(cache)) is not None and ring.first > 0 for cache in caches)

    def needed(self, can_go_back: bool) -> list[Checkpoint]:
        """The checkpoints that it can't do without where going back is not possible (`can_go_back` is False, or tokens
        have rotated out). The end of the user's last prompt: an answer that comes back changed would cost everything.
        And the one before that: so would another wording of that prompt.
        """
        if can_go_back and not self.rotated:
            return []
        by_depth = sorted(self.checkpoints, key=lambda checkpoint: len(checkpoint.tokens))
        last = turn_start(by_depth) or (by_depth[-1] if by_depth else None)
        return [] if last is None else by_depth[max(0, by_depth.index(last) - 1) : by_depth.index(last) + 1]

    def empty(self) -> None:
        """Let go of everything that it holds."""
        self.cache, self.tokens, self.asked, self.checkpoints, self.stored = None, NOTHING, 0, [], False
