"""Where a prompt starts, as a pure choice: without caches, a model or an engine."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from server.sessions.starts import LEAST_SHARED, State, choose_start, common_prefix

PROMPT = np.arange(500, dtype=np.int32)


@dataclass(frozen=True, slots=True)
class Fake(State):
    """A state of given abilities instead of a cache."""

    stuck: bool = False
    """It can't be trimmed."""
    inexact: bool = False
    """Trimming it is not exact."""

    def can_go_back_to(self, n: int) -> bool:
        return n == len(self.tokens) or not self.stuck

    def is_exact_at(self, n: int) -> bool:
        return n == len(self.tokens) or not self.inexact


def state(kind: str, shared: int, more: int = 0, own: bool = True, stuck: bool = False, inexact: bool = False) -> Fake:
    """Holds the first `shared` tokens of the prompt and `more` others."""
    tokens = np.concatenate([PROMPT[:shared], np.full(more, -1, dtype=np.int32)])
    return Fake(kind, tokens, [], own, stuck, inexact)


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ([], ("none", 0)),
        ([state("session", 0, 90)], ("none", 0)),
        ([state("session", 1, 90)], ("session", 1)),
        ([state("session", 300)], ("session", 300)),
        ([state("session", 500)], ("session", 499)),
        ([state("session", 500, stuck=True), state("prompt", 200)], ("prompt", 200)),
        ([state("session", 300, 50, stuck=True)], ("none", 0)),
        ([state("session", 300, 50), state("prompt", 200)], ("session", 300)),
        ([state("session", 300), state("prompt", 300)], ("session", 300)),
        ([state("session", LEAST_SHARED - 1, own=False)], ("none", 0)),
        ([state("session", LEAST_SHARED, own=False)], ("session", LEAST_SHARED)),
        ([state("prompt", 200), state("system", 300, own=False)], ("system", 300)),
        ([state("session", 300, 50, inexact=True), state("prompt", 237)], ("prompt", 237)),
        ([state("session", 300, 50, inexact=True), state("prompt", 236)], ("session", 300)),
        ([state("session", 300, 50, inexact=True)], ("session", 300)),
        ([state("session", 300, inexact=True), state("prompt", 290)], ("session", 300)),
    ],
)
def test_the_deepest_exact_state(states: Sequence[State], expected: tuple[str, int]) -> None:
    start = choose_start(PROMPT, states)
    assert (start.kind, start.cached) == expected


@pytest.mark.parametrize("shared", [0, 1, 63, 64, 65, 200])
def test_a_common_prefix(shared: int) -> None:
    other = PROMPT[:200].copy()
    other[shared:] = -1
    assert common_prefix(other, PROMPT) == common_prefix(PROMPT, other) == shared
