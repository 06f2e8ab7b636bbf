"""Sessions that leave memory, or outlive the process, and come back with their next turn."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server.engine.engine import MlxEngine
from server.errors import StartupError
from server.metrics import Metrics
from server.protocol import Conversation, Failed
from server.settings import MemoryBudget
from tests.server.engine.answers import Answer, owned_by_nobody
from tests.server.engine.conftest import SETTINGS
from turbocache.codebooks.scalar import levels_for
from turbocache.storage.session_file import SUFFIX, open_checked, piece, write
from turbocache.storage.whole_file import PARTIAL

TEXT = "The river runs by the mill, and the miller counts his sacks in the evening. "


def of(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def metric(engine: MlxEngine, name: str, **labels: str) -> float:
    return engine.services.metrics.registry.get_sample_value(f"turbocache_{name}", labels) or 0.0


def files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "kept").glob(f"*{SUFFIX}*"))


def states(engine: MlxEngine) -> dict[str, str]:
    return {row["id"]: row["state"] for row in engine.sessions()}


def test_a_restart_costs_no_prefill(start: Callable[..., MlxEngine], tmp_path: Path) -> None:
    """Named and unnamed; the answers are those of a server that was never stopped."""
    first = [of("user", TEXT * 12)]
    one, never = start(), start(session_dir=None)
    text = Answer(one, first, "a", max_tokens=20).text()
    unnamed = Answer(one, [of("user", "Please repeat: " + TEXT * 10)], None, max_tokens=20).text()
    assert Answer(never, first, "a", max_tokens=20).text() == text
    one.stop()
    assert len(files(tmp_path)) == 2
    assert (tmp_path / "kept").stat().st_mode & 0o777 == 0o700
    assert not any(path.stem == "a" for path in files(tmp_path))

    two = start()
    assert states(two)["a"] == "spilled"
    second = [*first, of("assistant", text), of("user", "And then?")]
    again, usage = Answer(two, second, "a", max_tokens=20).whole()
    assert usage.cached_tokens > 200
    assert usage.prompt_tokens - usage.cached_tokens < 15
    assert again == Answer(never, second, "a", max_tokens=20).text()
    assert metric(two, "restores_total") == 1
    second = [of("user", "Please repeat: " + TEXT * 10), of("assistant", unnamed), of("user", "And then?")]
    _, usage = Answer(two, second, None, max_tokens=20).whole()
    assert usage.prompt_tokens - usage.cached_tokens < 15
    assert metric(two, "restores_total") == 2
    assert owned_by_nobody(two)


def test_a_running_answer_rests_at_an_orderly_stop(start: Callable[..., MlxEngine]) -> None:
    one = start()
    asked = [of("user", "Please continue: " + TEXT * 12)]
    answer = Answer(one, asked, "a", max_tokens=3000)
    while not one.loop.scheduler.batch or next(iter(one.loop.scheduler.batch.values())).generated < 5:
        answer.events.get(timeout=60)
    one.stop()
    two = start()
    _, usage = Answer(two, asked, "a", max_tokens=5).whole()
    assert usage.prompt_tokens - usage.cached_tokens == 1


def test_sessions_that_do_not_fit_wait_on_disk(start: Callable[..., MlxEngine]) -> None:
    engine, names = start(kv_memory=MemoryBudget(bytes=20 << 20)), [f"s{i}" for i in range(6)]
    talks = {name: [of("user", f"I am {name}. " + TEXT * 12)] for name in names}
    for name, messages in talks.items():
        messages += [of("assistant", Answer(engine, messages, name, max_tokens=10).text()), of("user", "And then?")]
    assert set(states(engine).values()) == {"resident", "spilled"}
    assert metric(engine, "evictions_total", reason="memory") == 0
    spilled = [name for name, state in states(engine).items() if state == "spilled"]
    assert spilled[0] == "s0"
    for name in spilled:
        _, usage = Answer(engine, talks[name], name, max_tokens=10).whole()
        assert usage.prompt_tokens - usage.cached_tokens < 15, name
        assert owned_by_nobody(engine)
    assert metric(engine, "restores_total") == len(spilled)
    held = engine.services.runtime.store.resting_nbytes(engine.services.registry.caches())
    assert held + engine.services.budget.promised <= 20 << 20


def test_a_system_message_outlasts_sessions_that_go_to_disk(start: Callable[..., MlxEngine]) -> None:
    engine = start(kv_memory=MemoryBudget(bytes=24 << 20))
    system = of("system", "You are a careful assistant who knows rivers and mills well. " * 12)
    for i in range(6):
        asked = [system, of("user", f"I am {i}. " + TEXT * 12)]
        _, usage = Answer(engine, asked, f"s{i}", max_tokens=5).whole()
        assert usage.cached_tokens >= (engine.tokenize(Conversation(asked)).system_end if i else 0)
    assert list(states(engine).values()).count("spilled") >= 3
    # Restored sessions share it too.
    _, usage = Answer(
        engine, [system, of("user", "I am 0. " + TEXT * 12), of("user", "Well?")], "s0", max_tokens=5
    ).whole()
    assert usage.cached_tokens > 300
    assert sum(kept.kind == "system" for kept in engine.services.registry.checkpoints) == 1
    assert owned_by_nobody(engine)


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty"])
def test_a_damaged_file_costs_a_prefill_and_nothing_else(
    start: Callable[..., MlxEngine], tmp_path: Path, damage: str
) -> None:
    one, asked = start(), [of("user", TEXT * 12)]
    text = Answer(one, asked, "a", max_tokens=20).text()
    one.stop()
    (path,) = files(tmp_path)
    data = bytearray(path.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 4
    path.write_bytes(data if damage == "flipped" else data[: len(data) // 3] if damage == "cut" else b"")
    two = start()
    answer, usage = Answer(two, asked, "a", max_tokens=20).whole()
    assert (answer, usage.cached_tokens) == (text, 0)
    code = "corrupt" if damage == "flipped" else "truncated"
    assert metric(two, "session_files_refused_total", reason=code) == 1
    assert [p.name for p in files(tmp_path)] == [f"{path.name}.refused"]
    two.stop()
    assert path.exists()  # written anew


def test_another_preset_s_files_are_refused_and_another_model_s_left_alone(
    start: Callable[..., MlxEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, asked = start(), [of("user", TEXT * 12)]
    Answer(one, asked, "a", max_tokens=5).text()
    one.stop()
    monkeypatch.setattr("turbocache.storage.session_codec.fingerprint", lambda model: "another")
    other = start()
    assert states(other) == {}
    Answer(other, asked, "a", max_tokens=5).text()
    other.stop()
    monkeypatch.undo()
    assert len(files(tmp_path)) == 2
    two = start(kv_preset="k8v4")
    _, usage = Answer(two, asked, "a", max_tokens=5).whole()
    assert usage.cached_tokens == 0
    assert metric(two, "session_files_refused_total", reason="other_layout") == 1


def _rewritten_without_a_format(path: Path) -> None:
    """As releases before version 4 of session files wrote it."""
    manifest, arrays = open_checked(path)
    manifest = {
        name: value for name, value in manifest.items() if name not in ("layout_version", "rotation", "codebooks")
    }
    write(path, {name: piece(array) for name, array in arrays.items()}, {**manifest, "version": 3})


@pytest.mark.parametrize(
    ("code", "changed"),
    [
        ("other_version", {"turbocache.storage.session_codec.LAYOUT_VERSION": -1}),
        ("other_version", None),
        ("other_rotation", {"turbocache.storage.session_codec.ROTATION_SEED": 7}),
        ("other_codebook", {"turbocache.backend.levels_for": lambda *args: 1.25 * levels_for(*args)}),
    ],
    ids=["layout", "before formats", "seed", "codebooks"],
)
def test_another_format_s_files_are_refused(
    start: Callable[..., MlxEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, changed: Any
) -> None:
    asked = [of("user", TEXT * 12)]
    with monkeypatch.context() as patch:
        for name, value in (changed or {}).items():
            patch.setattr(name, value)
        one = start()
        Answer(one, asked, "a", max_tokens=5).text()
        one.stop()
    (path,) = files(tmp_path)
    if changed is None:
        _rewritten_without_a_format(path)
    two = start()
    _, usage = Answer(two, asked, "a", max_tokens=5).whole()
    assert usage.cached_tokens == 0
    assert metric(two, "session_files_refused_total", reason=code) == 1
    assert metric(two, "restores_total") == 0
    assert [p.name for p in files(tmp_path)] == [f"{path.name}.refused"]


def test_the_disk_s_budget_costs_the_longest_unused(start: Callable[..., MlxEngine], tmp_path: Path) -> None:
    one = start()
    Answer(one, [of("user", TEXT * 12)], "a", max_tokens=5).text()
    one.stop()
    size = files(tmp_path)[0].stat().st_size
    two = start(session_disk=int(2.5 * size))
    for name in ("b", "c"):
        Answer(two, [of("user", name + TEXT * 12)], name, max_tokens=5).text()
    two.stop()
    three = start()
    assert set(states(three)) == {"b", "c"}
    assert metric(three, "session_disk_bytes") <= 2.5 * size


def test_a_full_disk_forgets_and_goes_on(start: Callable[..., MlxEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start(kv_memory=MemoryBudget(bytes=20 << 20))

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for i in range(5):
        Answer(engine, [of("user", f"{i} " + TEXT * 12)], f"s{i}", max_tokens=5).text()
    assert metric(engine, "spill_failures_total", reason="OSError") > 0
    assert metric(engine, "evictions_total", reason="memory") > 0
    assert owned_by_nobody(engine)


def test_a_session_that_fails_goes_on_from_what_the_disk_has(
    start: Callable[..., MlxEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, asked = start(), [of("user", TEXT * 12)]
    text = Answer(one, asked, "a", max_tokens=20).text()
    one.stop()
    two, more = start(), [*asked, of("assistant", text), of("user", "And then?")]
    step = two.loop.scheduler.generator.next
    with monkeypatch.context() as patch:
        patch.setattr(two.loop.scheduler.generator, "next", lambda: step() and 1 / 0)
        assert isinstance(Answer(two, more, "a", max_tokens=20).end(), Failed)
    assert states(two)["a"] == "spilled"
    _, usage = Answer(two, more, "a", max_tokens=20).whole()
    assert usage.prompt_tokens - usage.cached_tokens < 15


def test_what_a_killed_server_left_is_removed(start: Callable[..., MlxEngine], tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / f"x{SUFFIX}{PARTIAL}").write_bytes(b"half")
    start()
    assert files(tmp_path) == []


def test_a_folder_that_can_t_be_one_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    engine = MlxEngine(SETTINGS.model_copy(update={"session_dir": tmp_path / "file"}), Metrics())
    with pytest.raises(StartupError, match="TURBOCACHE_SESSION_DIR"):
        engine.start()
