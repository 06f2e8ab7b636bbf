"""Why tokens are prefilled: every one of them has one reason."""

import numpy as np
import pytest
from mlx.nn.layers.base import Module

from server.sessions.prefill_reasons import Losses, Reason, reasons
from tests.server.engine.talk import Talk, some
from turbocache.cache.ring import RingConfig

RING = RingConfig(8, 64)
FIRST, ANSWER, MORE = some(1, 150), some(2, 40), some(3, 60)


@pytest.mark.parametrize(
    ("case", "want"),
    [
        ((100, 0, 0, 0, "evicted"), {"new": 100}),
        ((100, 80, 80, 80, "edited"), {"new": 20}),
        ((100, 60, 60, 90, "edited"), {"edited": 30, "new": 10}),
        ((100, 60, 60, 500, "edited"), {"edited": 40}),
        ((100, 40, 60, 80, "edited"), {"edited": 40, "new": 20}),
        ((100, 0, 60, 80, "rotated"), {"rotated": 60, "edited": 20, "new": 20}),
        ((100, 0, 70, 70, "evicted"), {"evicted": 70, "new": 30}),
        ((100, 99, 100, 150, "edited"), {"edited": 1}),
        ((100, 99, 100, 100, "edited"), {"new": 1}),
    ],
)
def test_each_token_has_one_reason(case: tuple[int, int, int, int, Reason], want: dict[Reason, int]) -> None:
    assert reasons(*case) == want
    assert sum(want.values()) == case[0] - case[1]


def test_turns_say_why(tiny_llama: Module) -> None:
    talk = Talk(tiny_llama, RING)
    claim, _ = talk.turn("a", FIRST, ANSWER)
    assert claim.prefill == {"new": 150}
    claim, _ = talk.turn("a", FIRST + ANSWER + MORE)
    assert claim.prefill == {"new": 60}
    claim, _ = talk.turn("a", FIRST + ANSWER + some(4, 90))
    assert claim.prefill == {"edited": 60, "new": 30}
    talk.registry.forget(claim.session, "evicted")
    claim, _ = talk.turn("a", FIRST + ANSWER + some(4, 90) + MORE)
    assert claim.prefill == {"evicted": 280, "new": 60}
    talk.registry.forget(claim.session)
    claim, _ = talk.turn("a", FIRST)
    assert claim.prefill == {"new": 150}


def test_a_rotated_session_without_a_checkpoint_says_so(tiny_llama: Module) -> None:
    talk = Talk(tiny_llama, RingConfig(8, 64, 200))
    talk.turn("a", FIRST + ANSWER + MORE, some(5, 60))
    for checkpoint in talk.registry.checkpoints:
        talk.registry.checkpoints.drop(checkpoint)
    claim, _ = talk.turn("a", FIRST + ANSWER + MORE + some(6, 70))
    assert claim.prefill == {"rotated": 250, "edited": 60, "new": 10}


def test_losses_are_the_owner_s_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.sessions.prefill_reasons._MAX_BYTES", 1000)
    losses, tokens = Losses(), np.array(FIRST, dtype=np.int32)
    losses.add(("anna", "a"), tokens, "failed")
    assert losses.find("anna", np.array(FIRST + MORE, dtype=np.int32)) == (150, "failed")
    assert losses.find("ben", tokens) == (0, "evicted")
    losses.add(("anna", "a"), tokens[:100], "evicted")
    assert losses.find("anna", tokens) == (100, "evicted")
    losses.add(("anna", "b"), np.array(some(9, 200), dtype=np.int32), "evicted")
    assert losses.find("anna", tokens) == (0, "evicted")


def test_what_was_never_computed_was_not_lost(tiny_llama: Module) -> None:
    """A turn that is refused its place, or whose client leaves before anything is read."""
    talk = Talk(tiny_llama, RING)
    talk.registry.give_back(talk.begin(None, FIRST), FIRST)
    claim = talk.begin("a", FIRST)
    talk.registry.put_back(claim.session, claim.cache, [])
    assert not list(talk.registry)
    claim, _ = talk.turn("a", FIRST, ANSWER)
    assert claim.prefill == {"new": 150}
    failed = talk.begin("a", FIRST + ANSWER + MORE)
    talk.registry.put_back(failed.session, None, [])
    claim, _ = talk.turn("a", FIRST + ANSWER + MORE)
    assert claim.prefill == {"failed": 249, "new": 1}
