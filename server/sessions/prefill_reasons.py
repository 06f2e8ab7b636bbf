"""Why a turn's tokens are prefilled: what had been cached once and is computed again, and what is new."""

from collections import OrderedDict
from typing import Literal

import numpy as np

from server.sessions.checkpoints import common_prefix

Loss = Literal["evicted", "refused_file", "failed"]
Reason = Literal["new", "edited", "rotated", Loss]
"""`new` tokens lie behind all that the session had. `edited` ones stand in the place of others, or lie before the place
where the prompt leaves the session, to where its state could go back. `rotated`: the session rotates and had no
checkpoint. Of the rest, the session itself was gone.
"""

_MOST_BYTES = 32 << 20


class Losses:
    """Tokens of sessions whose caches were lost, the latest 32 MiB of them."""

    def __init__(self) -> None:
        self._lost: OrderedDict[tuple[str, str], tuple[np.ndarray, Loss]] = OrderedDict()
        self._nbytes = 0

    def add(self, key: tuple[str, str], tokens: np.ndarray, reason: Loss) -> None:
        """Remember what a session had, in the place of what it had lost before."""
        self.forget(key)
        self._lost[key] = (tokens, reason)
        self._nbytes += tokens.nbytes
        while self._nbytes > _MOST_BYTES:
            self.forget(next(iter(self._lost)))

    def forget(self, key: tuple[str, str]) -> None:
        if (found := self._lost.pop(key, None)) is not None:
            self._nbytes -= found[0].nbytes

    def find(self, owner: str, prompt: np.ndarray) -> tuple[int, Loss]:
        """How many of a prompt's first tokens some lost session of its owner had, and why that was lost."""
        shared = [(common_prefix(tokens, prompt), why) for (of, _), (tokens, why) in self._lost.items() if of == owner]
        return max(shared, key=lambda found: found[0], default=(0, "evicted"))


def reasons(prompt: int, cached: int, known: int, had: int, why: Reason) -> dict[Reason, int]:
    """Of a prompt's tokens behind the first `cached`, how many are prefilled for which reason. `known` of them were in
    the session before, which `had` so many; those lost were so for reason `why`.
    """
    lost = max(0, min(known, prompt - 1) - cached)
    rest = prompt - cached - lost
    edited = min(rest, max(0, had - max(known, cached)))
    found: dict[Reason, int] = {why: lost}
    found["edited"] = found.get("edited", 0) + edited
    found["new"] = rest - edited
    return {reason: n for reason, n in found.items() if n}
