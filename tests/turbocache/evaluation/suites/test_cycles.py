from collections.abc import Callable
from typing import Any

import pytest

from turbocache.evaluation.rows import OpenCache, Row
from turbocache.evaluation.settings import EvaluationError
from turbocache.evaluation.suites import cycles
from turbocache.evaluation.suites.cycles import CYCLES, KINDS, Session
from turbocache.evaluation.suites.suite import Material, Task
from turbocache.store import ring_of


@pytest.fixture(scope="module")
def tasks(material: Material) -> dict[str, Task]:
    return dict(zip(KINDS, CYCLES.make(material), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_without_a_codec_cycles_change_nothing(
    tasks: dict[str, Task], row_of: Callable[[str], Row], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    states, spilled = [], []
    spill = Session._spill_and_restore

    def watched(session: Session) -> None:
        before = session.layers
        spill(session)
        spilled.append(session.layers is not before)
        ring = ring_of(session.layers)
        assert ring is not None
        states.append((ring.offset, ring.evicted > 0))

    monkeypatch.setattr(Session, "_spill_and_restore", watched)
    told = tasks[kind].measure(row_of("off"), None)
    assert told["kld"] < 1e-9
    assert told["top1"] == 1
    assert spilled == [True] * 10
    assert states[-1] == (told["tokens"], kind == "rotating")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_cycle_gets_wrong_is_seen(
    tasks: dict[str, Task], row_of: Callable[[str], Row], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session that keeps one token of an edited turn too many."""
    cut = cycles.trim
    monkeypatch.setattr(cycles, "trim", lambda layers, n: cut(layers, n - 1))
    monkeypatch.setattr(cycles, "can_trim_to", lambda layers, *_: ring_of(layers).evicted == 0)
    assert tasks[kind].measure(row_of("off"), None)["kld"] > 1e-6


@pytest.mark.slow
def test_a_codec_costs_little_where_tokens_left_the_window_early(
    tasks: dict[str, Task], row_of: Callable[[str], Row]
) -> None:
    told = tasks["kept"].measure(row_of("k4v4:packed"), None)
    assert 1e-9 < told["kld"] < 0.01
    figures = CYCLES.figures([told, told], [None, None])
    assert list(CYCLES.cells(figures)) == ["cycles KLD, kept", "cycles KLD, rotating"]


def test_a_rotating_session_has_room_for_its_sink_and_window(tasks: dict[str, Any], row_of: Callable[..., Row]) -> None:
    opened: OpenCache = tasks["rotating"]._open(row_of("off@64/512"))
    assert opened.store is not None
    assert opened.store.spec.ring.max_size == 64 + 512 + 64
    assert tasks["rotating"]._open(row_of("off")).store.spec.ring.max_size == 512
    assert tasks["kept"]._open(row_of("off")).store.spec.ring.max_size is None


def test_a_text_that_is_too_short_is_told(material: Material) -> None:
    short = Material(material.loaded, material.hay[:500], material.settings)
    with pytest.raises(EvaluationError, match="the text has 500 tokens, and the suites need"):
        CYCLES.make(short)
