"""Which cached state a prompt starts from. The choice is pure: nothing here changes a cache."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from turbocache import store
from turbocache.mlxlm.prompt_cache import PromptCache

LEAST_SHARED = 64
"""Tokens that two sessions must share before one starts from a state of the other."""

_EXACT_WITHIN = 64
"""An exact state is preferred to an inexact one that is fewer than this many tokens deeper."""

_FIRST_BLOCK = 64
"""`common_prefix` compares this many tokens first: most conversations differ there."""


def common_prefix(tokens: np.ndarray, prompt: np.ndarray) -> int:
    """Number of leading tokens that both share."""
    n = min(len(tokens), len(prompt))
    for end in (min(n, _FIRST_BLOCK), n):
        differs = np.nonzero(tokens[:end] != prompt[:end])[0]
        if differs.size:
            return int(differs[0])
    return n


@dataclass(frozen=True, slots=True)
class State:
    """A cached state: where a session's last turn ended, or a checkpoint."""

    kind: str
    """`session`, or the kind of a checkpoint."""
    tokens: np.ndarray
    """Exactly the tokens in the cache."""
    cache: PromptCache
    own: bool = True
    """Whether it belongs to the session that the prompt continues."""

    def can_go_back_to(self, n: int) -> bool:
        """Whether the cache can be trimmed to its first `n` tokens."""
        return store.can_trim_to(self.cache, n, len(self.tokens))

    def is_exact_at(self, n: int) -> bool:
        """Whether trimming to `n` tokens gives what a session of these tokens alone would hold."""
        return n == len(self.tokens) or store.is_same_after(self.cache, n)


@dataclass(frozen=True, slots=True)
class Start:
    """Where a prompt starts: after the first `cached` tokens of a state, or with an empty cache."""

    state: State | None = None
    cached: int = 0

    @property
    def kind(self) -> str:
        return "none" if self.state is None else self.state.kind

    def take(self, fork: bool) -> PromptCache:
        """A cache of the first `cached` tokens: a fork of the state's, or the state's own, which is then trimmed."""
        assert self.state is not None
        cache = store.fork(self.state.cache) if fork else self.state.cache
        if self.cached < len(self.state.tokens):
            store.trim(cache, len(self.state.tokens) - self.cached)
        return cache


def choose_start(prompt: np.ndarray, states: Iterable[State]) -> Start:
    """The start with the most cached tokens. An exact one wins if it is nearly as deep; of equals, the first wins.

    At least one token of the prompt is left for the model. A state of another session must share `LEAST_SHARED` tokens.
    """
    starts = list[Start]()
    for state in states:
        cached = min(common_prefix(state.tokens, prompt), len(prompt) - 1)
        if cached >= (1 if state.own else LEAST_SHARED) and state.can_go_back_to(cached):
            starts.append(Start(state, cached))
    deepest = max((start.cached for start in starts), default=0)
    near = [start for start in starts if start.cached > deepest - _EXACT_WITHIN]
    exact = [start for start in near if start.state is not None and start.state.is_exact_at(start.cached)]
    return max(exact or starts, key=lambda start: start.cached, default=Start())
