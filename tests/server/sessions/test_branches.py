"""Different histories under one name: which session a prompt continues, and which is kept when memory is short."""

from mlx.nn.layers.base import Module

from server.engine.budget import Budget, make_room
from server.protocol import Prompt
from server.sessions.starts import LEAST_SHARED
from tests.server.engine.talk import Talk, some
from turbocache.cache.ring import RingConfig

RING = RingConfig(8, 64)
SYSTEM = some(1, 100)
TALK, ANSWER, MORE = [*SYSTEM, *some(2, 120)], some(3, 40), some(4, 50)
TITLE = some(5, 90)
"""A side request: something else under the same name."""


def ids(talk: Talk) -> list[str]:
    return [session.id for session in talk.registry]


def test_a_side_request_under_the_same_name_leaves_the_conversation_alone(tiny_llama: Module) -> None:
    talk = Talk(tiny_llama, RING)
    talk.turn("a", TALK, ANSWER)
    title, _ = talk.turn("a", TITLE)
    assert title.session.id != "a"
    assert title.session.name == "a"
    assert not title.session.keep
    claim, _ = talk.turn("a", TALK + ANSWER + MORE)
    assert (claim.session.id, claim.source, claim.cached) == ("a", "session", len(TALK + ANSWER))


def test_what_only_shares_the_system_message_is_another_history(tiny_llama: Module) -> None:
    talk = Talk(tiny_llama, RING)
    talk.turn("a", TALK, ANSWER, system_end=len(SYSTEM))
    other, _ = talk.turn("a", [*SYSTEM, *some(6, 70)], ANSWER, system_end=len(SYSTEM))
    assert other.session.id != "a"
    assert other.cached == len(SYSTEM)


def test_an_edit_stays_in_its_session(tiny_llama: Module) -> None:
    talk = Talk(tiny_llama, RING)
    talk.turn("a", TALK, ANSWER, system_end=len(SYSTEM))
    claim, _ = talk.turn("a", [*TALK[:-20], *some(7, 60)], system_end=len(SYSTEM))
    assert ids(talk) == ["a"]
    assert claim.cached == len(TALK) - 20


def test_short_sessions_are_not_worth_keeping(tiny_llama: Module) -> None:
    talk = Talk(tiny_llama, RING)
    talk.turn("a", some(8, LEAST_SHARED - 10))
    talk.turn("a", TITLE)
    assert ids(talk) == ["a"]


def test_two_histories_are_gone_on_with_in_turn(tiny_llama: Module) -> None:
    """As an agent and its helper do that send the same name; from the second turn on the other is kept as well."""
    talk, one, two = Talk(tiny_llama, RING), list(TALK), list(TITLE)
    talk.turn("a", one, ANSWER)
    talk.turn("a", two, ANSWER)
    for i in range(3):
        for history in (one, two):
            history += [*ANSWER, *some(10 + i, 30)]
            claim, _ = talk.turn("a", history, ANSWER)
            assert claim.cached == len(history) - 30
    assert [session.turns for session in talk.registry] == [4, 4]
    assert all(session.keep for session in talk.registry)


def test_the_same_conversation_waits_and_a_different_one_does_not(tiny_llama: Module) -> None:
    talk = Talk(tiny_llama, RING)
    running = talk.begin("a", TALK, len(SYSTEM))
    assert talk.registry.claim("a", Prompt(TALK, len(SYSTEM))) is None
    assert talk.registry.claim("a", Prompt([*TALK, *MORE], len(SYSTEM))) is None
    for prompt in (TITLE, [*TALK[:-10], *MORE], [*SYSTEM, *MORE]):
        other = talk.begin("a", prompt, len(SYSTEM))
        assert other.session is not running.session
        talk.finish(other, prompt, ANSWER)
    talk.finish(running, TALK, ANSWER)
    claim = talk.begin("a", TALK + ANSWER + MORE)
    assert claim.session is running.session
    assert claim.cached == len(TALK + ANSWER)


def test_an_id_is_as_good_as_a_name(tiny_llama: Module) -> None:
    """What the list of sessions shows can be gone on with, also unnamed ones."""
    talk = Talk(tiny_llama, RING)
    first, _ = talk.turn(None, TALK, ANSWER)
    claim, _ = talk.turn(first.session.id, TALK + ANSWER + MORE)
    assert claim.session is first.session
    assert claim.cached == len(TALK + ANSWER)
    assert claim.session.keep


def test_side_requests_go_first_and_conversations_last(tiny_llama: Module) -> None:
    talk = Talk(tiny_llama, RING)
    talk.turn("a", TALK, ANSWER)
    talk.turn("a", TITLE, ANSWER)
    talk.turn(None, some(9, 120))
    assert [session.keep for session in talk.registry.idle()] == [False, False, True]
    for n_left in (2, 1, 0):
        everything = talk.store.resting_nbytes(talk.registry.caches())
        make_room(Budget(everything - 1, lambda n: n), talk.registry, talk.store)
        assert (len(list(talk.registry.checkpoints)), len(ids(talk))) == (n_left, 3)
    room = make_room(
        Budget(talk.store.resting_nbytes(talk.registry.caches()) - 1, lambda n: n), talk.registry, talk.store
    )
    assert (room.sessions, len(ids(talk))) == (1, 2)
    room = make_room(Budget(1, lambda n: n), talk.registry, talk.store, before=0.0)
    assert (ids(talk), room.enough) == (["a"], False)
    assert make_room(Budget(1, lambda n: n), talk.registry, talk.store).enough
    assert ids(talk) == []


def test_a_session_that_can_t_go_back_keeps_the_checkpoints_that_it_needs(tiny_llama: Module) -> None:
    """Rotated, it would begin anew after an answer that comes back changed, or with another wording of the last prompt.
    These checkpoints go with it, not before.
    """
    talk = Talk(tiny_llama, RingConfig(8, 64, 200))
    prompt = TALK + ANSWER + MORE
    talk.turn("a", TALK, ANSWER)
    claim, _ = talk.turn("a", prompt, some(6, 130))
    assert len(claim.session.checkpoints) > 1
    held = talk.store.resting_nbytes(talk.registry.caches())
    make_room(Budget(held - talk.store.spec.raw_nbytes, lambda n: n), talk.registry, talk.store)
    kinds = [(kept.kind, len(kept.tokens)) for kept in claim.session.checkpoints]
    assert sorted(kinds) == [("answer", len(TALK + ANSWER)), ("prompt", len(prompt))]
    claim, _ = talk.turn("a", prompt + some(7, 40))
    assert (claim.source, claim.cached) == ("prompt", len(prompt))
    talk.registry.checkpoints.drop(claim.session.checkpoints[-1])
    claim, _ = talk.turn("a", [*TALK, *ANSWER, *some(8, 50)])
    assert (claim.source, claim.cached) == ("answer", len(TALK + ANSWER))
    del claim
    room = make_room(Budget(1, lambda n: n), talk.registry, talk.store)
    assert (room.sessions, talk.store.spec.pool.n_used) == (1, 0)
