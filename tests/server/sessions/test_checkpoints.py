"""Checkpoints in a running engine: recurrent models, sliding windows, and what sessions have in common."""

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.engine import startup
from server.engine.engine import MlxEngine
from server.metrics import Metrics
from server.protocol import Conversation
from server.sessions.session import Session
from tests.conftest import build_gemma
from tests.models.configs import OVERRIDES
from tests.models.tiny import build
from tests.server.engine.answers import Answer, owned_by_nobody
from tests.server.engine.conftest import SETTINGS
from tests.server.engine.talk import Talk, some
from turbocache.cache.ring import RingConfig
from turbocache.mlxlm.model import LoadedModel


def of(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def hits(engine: MlxEngine, kind: str) -> float:
    return engine.services.metrics.registry.get_sample_value("turbocache_checkpoint_hits_total", {"kind": kind}) or 0.0


def found(engine: MlxEngine, id: str) -> Session:
    return next(session for session in engine.services.registry if session.id == id)


@pytest.fixture(params=["qwen3_next", "gemma3_text"])
def hybrid(
    bundled: LoadedModel, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Callable[..., MlxEngine]]:
    """Starts engines with a model of random weights: recurrent and attention layers, or sliding windows and others."""
    name: str = request.param
    vocabulary = {**OVERRIDES.get(name, {}), "vocab_size": len(bundled.tokenizer.get_vocab()) + 64}
    monkeypatch.setitem(OVERRIDES, name, vocabulary)
    loaded = replace(bundled, model=build(name), id="tiny-hybrid")
    monkeypatch.setattr(startup, "load_model", lambda source, group: loaded)
    engines: list[MlxEngine] = []
    sliding = [True] if name == "gemma3_text" else []

    def start(**settings: Any) -> MlxEngine:
        engines.append(MlxEngine(SETTINGS.model_copy(update=settings), Metrics()))
        engines[-1].start()
        assert [spec.sliding for spec in engines[-1].services.runtime.store.specs][1:] == sliding
        return engines[-1]

    yield start
    for engine in engines:
        engine.stop()


def test_a_model_that_can_not_drop_tokens_goes_back_to_the_end_of_the_messages(
    hybrid: Callable[..., MlxEngine],
) -> None:
    engine = hybrid()
    assert not engine.services.runtime.store.can_go_back
    first = [of("user", "Tell me about rivers, mills and the weather of the day. " * 24)]
    _, usage = Answer(engine, first, "a", max_tokens=90).whole()
    assert usage.cached_tokens == 0
    # The answer comes back changed, as by a template that drops reasoning, and a sliding window has moved on.
    second = [*first, of("assistant", "Rivers."), of("user", "And lakes?")]
    text, usage = Answer(engine, second, "a", max_tokens=30).whole()
    assert usage.cached_tokens == engine.tokenize(Conversation(first)).messages_end > 100
    assert hits(engine, "prompt") == 1
    # As it was given, it is gone on from its end.
    third = [*second, of("assistant", text), of("user", "Thank you.")]
    whole, usage = Answer(engine, third, "a", max_tokens=30).whole()
    assert usage.cached_tokens >= engine.tokenize(Conversation(second)).messages_end
    fresh = hybrid()
    assert Answer(fresh, second, "b", max_tokens=30).text() == text
    assert Answer(fresh, third, "c", max_tokens=30).text() == whole
    assert owned_by_nobody(engine)


def test_a_model_that_can_not_drop_tokens_goes_back_after_a_restart(
    hybrid: Callable[..., MlxEngine], tmp_path: Path
) -> None:
    """Its checkpoints are on disk with it: without them the changed answer would cost everything."""
    engine = hybrid(session_dir=tmp_path)
    first = [of("user", "Tell me about rivers, mills and the weather of the day. " * 24)]
    Answer(engine, first, "a", max_tokens=90).whole()
    second = [*first, of("assistant", "Rivers."), of("user", "And lakes?")]
    engine.stop()
    again, never = hybrid(session_dir=tmp_path), hybrid()
    text, usage = Answer(again, second, "a", max_tokens=30).whole()
    assert usage.cached_tokens == engine.tokenize(Conversation(first)).messages_end > 100
    assert hits(again, "prompt") == 1
    assert text == Answer(never, second, "a", max_tokens=30).text()


def test_sessions_share_a_system_message(engine: MlxEngine) -> None:
    system = of("system", "You are a careful assistant who knows rivers and mills well. " * 12)
    mine = [
        system,
        of("user", "My name is Anna and my locker code is 5917. " * 25),
    ]  # so long that its end is of no use
    yours = [system, of("user", "Please repeat: alpha beta gamma.")]
    alone = Answer(engine, yours, "alone", max_tokens=12).text()
    engine.services.registry.delete(found(engine, "alone"))
    _, usage = Answer(engine, mine, "mine", max_tokens=12).whole()
    assert usage.cached_tokens == 0
    text, usage = Answer(engine, yours, "yours", max_tokens=12).whole()
    assert usage.cached_tokens == engine.tokenize(Conversation(yours)).system_end > 100
    assert hits(engine, "system") == 1
    assert text == alone
    for name in ("mine", "yours"):  # whoever read it first may be gone
        engine.services.registry.forget(found(engine, name))
    text, usage = Answer(engine, yours, "again", max_tokens=12).whole()
    assert (text, usage.cached_tokens) == (alone, engine.tokenize(Conversation(yours)).system_end)
    engine.services.registry.delete(found(engine, "again"))
    assert engine.services.runtime.store.spec.pool.n_used == 0
    assert owned_by_nobody(engine)


def test_a_model_with_sliding_windows_goes_back_to_its_checkpoints() -> None:
    """Long after the window has moved on; what is read again after it equals what a new session reads."""
    model, ring = build_gemma(window=256), RingConfig(8, 64)
    talk, fresh = Talk(model, ring), Talk(model, ring)
    first, answer = some(1, 400), some(2, 150)
    talk.turn("a", first, answer)
    again = [*first, *some(3, 90)]
    claim, logits = talk.turn("a", again)
    assert (claim.cached, claim.source) == (400, "prompt")
    np.testing.assert_allclose(logits, fresh.turn("b", again)[1], atol=1e-4 * np.abs(logits).max())
    talk.registry.forget(claim.session, "failed")
    del claim
    gc.collect()
    assert [spec.pool.n_used for spec in talk.store.specs] == [0, 0]
