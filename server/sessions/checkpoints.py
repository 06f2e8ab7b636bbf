"""Checkpoints: states of a session's cache to which a later turn can go back.

A chat template drops earlier reasoning, a client edits its last message: the new prompt then leaves the cached tokens
somewhere, and what was cached behind that place can't be used. Pages that rotated out and recurrent states can't be had
back by going back. A checkpoint is a cache of its own that shares its pages; a turn that starts from one is as exact as
if nothing had ever followed.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from server.protocol import Prompt
from turbocache import store
from turbocache.store import CacheStore

Kind = Literal["system", "prompt", "tool", "answer"]
"""Where a checkpoint lies: at the end of the system message, of a user's prompt, of one that ends with a tool's result,
or of an answer.
"""

LEAST_SHARED = 64
"""Tokens that sessions must have in common for one to start from the other's state."""

MOST = 4
"""Checkpoints of one session: each holds a raw sink and window of its own."""

_NEAR = 64
"""So many tokens are prefilled again where a state a little further on would only be nearly the same."""


@dataclass(slots=True, eq=False)
class Checkpoint:
    """A cache that holds exactly `tokens`, int32. Its cache is never changed: turns get a fork."""

    kind: Kind
    tokens: np.ndarray
    cache: list[Any]
    last_used: float = 0.0


@dataclass(frozen=True, slots=True)
class Start:
    """A state from which a prompt can go on: a cache of `length` tokens, the first `cached` of which are the prompt's.
    `exact` if going back there gives what a session of these tokens alone would hold.
    """

    kind: str
    cache: list[Any]
    length: int
    cached: int
    exact: bool

    def forked(self) -> list[Any]:
        """A cache of the first `cached` tokens; the state stays as it is."""
        return self.taken(store.fork(self.cache))

    def taken(self, cache: list[Any] | None = None) -> list[Any]:
        """The state itself (or its fork `cache`), gone back to the first `cached` tokens."""
        cache = self.cache if cache is None else cache
        if self.cached < self.length:
            store.trim(cache, self.length - self.cached)
        return cache


def common_prefix(tokens: np.ndarray, prompt: np.ndarray) -> int:
    """Number of leading tokens that both share."""
    n = min(len(tokens), len(prompt))
    for end in (min(n, _NEAR), n):  # most conversations differ at once
        differs = np.nonzero(tokens[:end] != prompt[:end])[0]
        if differs.size:
            return int(differs[0])
    return n


def start_at(kind: str, tokens: np.ndarray, cache: list[Any] | None, prompt: np.ndarray) -> Start | None:
    """How a prompt can go on from a cache of `tokens`, or None. One token at least is left for the model."""
    cached = min(common_prefix(tokens, prompt), len(prompt) - 1)
    if cache is None or not cached or not store.can_trim_to(cache, cached, len(tokens)):
        return None
    exact = cached == len(tokens) or store.is_same_after(cache, cached)
    return Start(kind, cache, len(tokens), cached, exact)


def deepest(starts: Iterable[Start | None]) -> Start | None:
    """The start with most cached tokens; an exact one if it is near enough."""
    found = [start for start in starts if start is not None]
    furthest = max((start.cached for start in found), default=0)
    near = [start for start in found if start.exact and start.cached > furthest - _NEAR]
    return max(near or found, key=lambda start: start.cached, default=None)


def prompt_kind(prompt: Prompt) -> Kind:
    """Of the checkpoint at a prompt's end."""
    return "tool" if prompt.after_tool_result else "prompt"


def prompt_stops(prompt: Prompt, cached: int, cache_store: CacheStore) -> dict[int, Kind]:
    """After how many of a prompt's tokens to take checkpoints while it is read. Of a state that can't go back by the
    few tokens that open an answer one is taken before them.
    """
    stops = dict[int, Kind]()
    if not cache_store.can_checkpoint:
        return stops
    if prompt.system_end >= cached + LEAST_SHARED:
        stops[prompt.system_end] = "system"
    if prompt.messages_end > cached and not cache_store.can_go_back:
        stops[prompt.messages_end] = prompt_kind(prompt)
    return stops


def added(checkpoints: list[Checkpoint], new: Checkpoint) -> list[Checkpoint]:
    """With a new one, in the place of one of the same tokens. When there are too many the longest unused go, but last
    the one at the end of a system message, and before that `turn_start`.
    """
    others = [old for old in checkpoints if not np.array_equal(old.tokens, new.tokens)]
    start = turn_start(others)
    others.sort(key=lambda checkpoint: (checkpoint.kind == "system", checkpoint is start, checkpoint.last_used))
    return sorted([*others[-(MOST - 1) :], new], key=lambda checkpoint: checkpoint.last_used)


def turn_start(checkpoints: Iterable[Checkpoint]) -> Checkpoint | None:
    """Where the last user's prompt ended. Templates keep the reasoning of a turn while its tools run and drop it with
    the next message of the user: the conversation then leaves what is cached here, many tool results ago.
    """
    prompts = [checkpoint for checkpoint in checkpoints if checkpoint.kind == "prompt"]
    return max(prompts, key=lambda checkpoint: len(checkpoint.tokens), default=None)
