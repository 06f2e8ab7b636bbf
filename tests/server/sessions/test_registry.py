"""Sessions and their checkpoints over real caches: where turns go on, and that going back costs no exactness."""

import numpy as np
import pytest
from mlx.nn.layers.base import Module

from server.engine.budget import Budget, make_room
from server.sessions.checkpoints import MOST
from server.sessions.registry import SessionRegistry
from tests.models.tiny import build
from tests.server.engine.talk import Talk, some
from turbocache.cache.ring import RingConfig
from turbocache.mlxlm.plan import all_native
from turbocache.presets import preset
from turbocache.store import CacheStore

PLAIN, ROTATING = RingConfig(8, 64), RingConfig(8, 64, 200)

FIRST, ANSWER, SECOND, EDITED = some(1, 150), some(2, 40), some(3, 130), some(4, 90)
REASONED = some(6, 130)
"""An answer so long that what went before it is in pages afterwards."""


@pytest.mark.parametrize("ring", [PLAIN, ROTATING], ids=["grows", "rotates"])
def test_an_edited_message_gives_what_a_run_that_never_edited_gives(tiny_llama: Module, ring: RingConfig) -> None:
    edited, never = Talk(tiny_llama, ring), Talk(tiny_llama, ring)
    for talk in (edited, never):
        talk.turn("a", FIRST, ANSWER)
    edited.turn("a", FIRST + ANSWER + SECOND, some(5, 60))
    claim, got = edited.turn("a", FIRST + ANSWER + EDITED)
    assert (claim.source, claim.cached) == ("answer", len(FIRST + ANSWER))
    _, want = never.turn("a", FIRST + ANSWER + EDITED)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("ring", [PLAIN, ROTATING], ids=["grows", "rotates"])
def test_an_answer_that_comes_back_changed_goes_back_to_its_prompt(tiny_llama: Module, ring: RingConfig) -> None:
    """As templates do that drop an answer's reasoning."""
    talk, fresh = Talk(tiny_llama, ring), Talk(tiny_llama, ring)
    talk.turn("a", FIRST + SECOND, REASONED)
    claim, got = talk.turn("a", FIRST + SECOND + EDITED)
    assert (claim.source, claim.cached) == ("prompt", len(FIRST + SECOND))
    fresh.turn("a", FIRST + SECOND)
    _, want = fresh.turn("a", FIRST + SECOND + EDITED)
    np.testing.assert_array_equal(got, want)


def test_asking_the_same_again_leaves_one_token_to_compute(tiny_llama: Module) -> None:
    talk = Talk(tiny_llama, PLAIN)
    _, first = talk.turn("a", FIRST, REASONED)
    claim, again = talk.turn("a", FIRST)
    assert (claim.source, claim.cached) == ("prompt", len(FIRST) - 1)
    np.testing.assert_allclose(again, first, atol=1e-3 * np.abs(first).max())


def test_a_rotated_session_without_its_checkpoints_starts_anew(tiny_llama: Module) -> None:
    """The control: without them nothing could be reused."""
    talk = Talk(tiny_llama, ROTATING)
    talk.turn("a", FIRST, ANSWER)
    talk.turn("a", FIRST + ANSWER + SECOND, some(5, 60))
    for checkpoint in talk.registry.checkpoints:
        talk.registry.checkpoints.drop(checkpoint)
    claim, _ = talk.turn("a", FIRST + ANSWER + EDITED)
    assert (claim.source, claim.cached) == ("none", 0)


def test_another_session_starts_from_what_both_have_said(tiny_llama: Module) -> None:
    talk, alone = Talk(tiny_llama, PLAIN), Talk(tiny_llama, PLAIN)
    talk.turn("a", FIRST, ANSWER)
    used = talk.store.spec.pool.n_used
    claim, got = talk.turn("b", FIRST + ANSWER + SECOND)
    assert claim.session.id == "b"
    assert (claim.source, claim.cached) == ("session", len(FIRST + ANSWER))
    assert [len(c.tokens) for c in claim.session.checkpoints] == [len(FIRST), len(FIRST + ANSWER + SECOND)]
    alone.turn("b", FIRST, ANSWER)
    _, want = alone.turn("b", FIRST + ANSWER + SECOND)
    np.testing.assert_array_equal(got, want)
    # Its pages are the other's and those of its own tokens.
    assert talk.store.spec.pool.n_used < 2 * used + len(SECOND) // 64
    claim, _ = talk.turn("a", FIRST + ANSWER + EDITED)
    assert claim.cached == len(FIRST + ANSWER)


def test_an_unnamed_prompt_goes_on_from_a_checkpoint_in_a_session_of_its_own(tiny_llama: Module) -> None:
    talk = Talk(tiny_llama, ROTATING)
    first, _ = talk.turn(None, FIRST, ANSWER)
    same, _ = talk.turn(None, FIRST + ANSWER + SECOND, some(5, 60))
    assert same.session is first.session
    other, _ = talk.turn(None, FIRST + ANSWER + EDITED)
    assert other.session is not first.session
    assert (other.source, other.cached) == ("answer", len(FIRST + ANSWER))


def test_checkpoints_are_bounded_and_pages_go_with_them(tiny_llama: Module) -> None:
    talk = Talk(tiny_llama, PLAIN)
    prompt: list[int] = []
    for i in range(6):
        prompt = prompt + some(10 + i, 70)
        claim, _ = talk.turn("a", prompt, ANSWER)
        prompt = prompt + ANSWER
    assert len(claim.session.checkpoints) == MOST
    pages = {page for batch in talk.store.spec.live for ring in batch.rings for page in ring.pages}
    assert talk.store.spec.pool.n_used == len(pages)
    held = talk.store.resting_nbytes(talk.registry.caches())
    spec = talk.store.spec
    assert held == len(pages) * spec.pool.page_nbytes + (MOST + 1) * (spec.raw_nbytes) + sum(
        ring.centre.nbytes for batch in spec.live for ring in batch.rings if ring.centre is not None
    )
    talk.registry.forget(claim.session)
    del claim
    assert spec.pool.n_used == 0


def test_caches_that_grow_for_ever_are_not_copied(tiny_llama: Module) -> None:
    talk = Talk(tiny_llama, PLAIN)
    assert talk.store.can_checkpoint
    plans = all_native(talk.store.plans, "as a test")
    talk.store = CacheStore(tiny_llama, plans, preset("k4v4"), "reference", PLAIN, n_pages=1)
    talk.registry = SessionRegistry(talk.store)
    assert not talk.store.can_checkpoint
    talk.turn("a", FIRST, ANSWER)
    cache = next(iter(talk.registry)).cache
    claim, _ = talk.turn("a", FIRST + ANSWER + SECOND)
    assert claim.cache is cache
    assert not claim.session.checkpoints


def test_checkpoints_go_before_sessions_and_old_ones_first(tiny_llama: Module) -> None:
    talk = Talk(tiny_llama, PLAIN)
    for name in ("a", "b"):
        for prompt in (FIRST, FIRST + ANSWER + SECOND):
            talk.turn(name, [ord(name), *prompt], ANSWER)
    held = talk.store.resting_nbytes(talk.registry.caches())
    raw = talk.store.spec.raw_nbytes
    sizes = []
    for total in (held, held - 1, held - 4 * raw, 2 * raw + 10 * talk.store.spec.pool.page_nbytes, 1):
        evicted = make_room(Budget(total, lambda n: n), talk.registry, talk.store)
        sizes.append(([len(s.checkpoints) for s in talk.registry], evicted.sessions))
        assert talk.store.resting_nbytes(talk.registry.caches()) <= total
        talk.store.spec.check_integrity()
    assert sizes[0] == ([3, 3], 0)
    assert sizes[1] == ([2, 3], 0)
    assert sizes[2][0] == [1, 1]
    assert sizes[3] == ([0, 0], 0)
    assert sizes[4] == ([], 2)


@pytest.mark.parametrize("name", ["qwen3_next", "falcon_h1"])
def test_a_recurrent_model_s_second_turn_reads_only_what_is_new(name: str) -> None:
    """And after an answer that comes back changed it goes back to its prompt, where a state can't be trimmed to."""
    model = build(name)
    talk, fresh = Talk(model, PLAIN), Talk(model, PLAIN)
    assert not talk.store.can_go_back
    talk.turn("a", FIRST, ANSWER)
    claim, got = talk.turn("a", FIRST + ANSWER + SECOND)
    assert (claim.source, claim.cached) == ("session", len(FIRST + ANSWER))
    assert claim.prefill == {"new": len(SECOND)}
    _, want = fresh.turn("b", FIRST + ANSWER + SECOND)
    np.testing.assert_allclose(got, want, atol=1e-3 * np.abs(want).max())
    claim, got = talk.turn("a", FIRST + ANSWER + EDITED)
    assert (claim.source, claim.cached) == ("answer", len(FIRST + ANSWER))
    _, want = fresh.turn("c", FIRST + ANSWER + EDITED)
    np.testing.assert_allclose(got, want, atol=1e-3 * np.abs(want).max())
    claim, got = talk.turn("a", FIRST + EDITED)
    assert (claim.source, claim.cached) == ("prompt", len(FIRST))
    _, want = fresh.turn("d", FIRST + EDITED)
    np.testing.assert_allclose(got, want, atol=1e-3 * np.abs(want).max())


def test_after_many_tool_results_a_turn_still_goes_back_to_where_it_began(tiny_llama: Module) -> None:
    """Its reasoning is dropped when the user speaks again; the rotated session can't go back without a checkpoint."""
    talk = Talk(tiny_llama, RingConfig(8, 64, 300))
    talk.turn("a", FIRST, ANSWER)
    prompt = asked = FIRST + ANSWER + SECOND
    for i in range(6):
        claim = talk.begin("a", prompt)
        talk.finish(claim, prompt, ANSWER, kind="tool" if i else "prompt")
        prompt = prompt + ANSWER + some(20 + i, 40)
    claim, _ = talk.turn("a", asked + EDITED)
    assert (claim.source, claim.cached) == ("prompt", len(asked))
