"""Why a turn's tokens are prefilled: some are new, others were cached before and are computed again."""

from collections import OrderedDict
from typing import Literal

import numpy as np

from server.sessions.starts import common_prefix

Loss = Literal["evicted", "refused_file", "failed"]
Reason = Literal["new", "edited", "rotated", Loss]
"""`new`: tokens after the session's history. `edited`: tokens that replace others of the history, or that stand between
the place where the prompt differs and the state that the turn starts from. `rotated`: the session has rotated and has
no checkpoint. A `Loss`: the session itself was lost.
"""

_MAX_BYTES = 32 << 20


class Losses:
    """The tokens of sessions whose caches were lost. Bounded to 32 MiB; the earliest losses are forgotten first."""

    def __init__(self) -> None:
        self._lost: OrderedDict[tuple[str, str], tuple[np.ndarray, Loss]] = OrderedDict()
        self._nbytes = 0

    def add(self, key: tuple[str, str], tokens: np.ndarray, reason: Loss) -> None:
        """Record the tokens of a session. Replaces an earlier loss of the same session."""
        self.forget(key)
        self._lost[key] = (tokens, reason)
        self._nbytes += tokens.nbytes
        while self._nbytes > _MAX_BYTES:
            self.forget(next(iter(self._lost)))

    def forget(self, key: tuple[str, str]) -> None:
        if (lost := self._lost.pop(key, None)) is not None:
            self._nbytes -= lost[0].nbytes

    def find(self, owner: str, prompt: np.ndarray) -> tuple[int, Loss]:
        """The longest prefix of a prompt that a lost session of the owner had, in tokens, and why it was lost."""
        losses = [lost for key, lost in self._lost.items() if key[0] == owner]
        shared = [(common_prefix(tokens, prompt), reason) for tokens, reason in losses]
        return max(shared, key=lambda match: match[0], default=(0, "evicted"))


def reasons(n_prompt: int, cached: int, matched: int, history: int, lost_for: Reason) -> dict[Reason, int]:
    """Number of prefilled tokens by reason. They add up to `n_prompt - cached`.

    n_prompt: tokens of the prompt.
    cached: leading tokens that are in the cache.
    matched: leading tokens that match the session's history.
    history: tokens of the session's history.
    lost_for: the reason for matching tokens that are not in the cache.
    """
    lost = max(0, min(matched, n_prompt - 1) - cached)
    rest = n_prompt - cached - lost
    edited = min(rest, max(0, history - max(matched, cached)))
    counts: dict[Reason, int] = {lost_for: lost}
    counts["edited"] = counts.get("edited", 0) + edited
    counts["new"] = rest - edited
    return {reason: n for reason, n in counts.items() if n}
