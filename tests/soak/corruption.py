"""Sessions whose files are damaged, and what their next turns come to.

A damaged file is refused and counted once, moved aside, and its session is prefilled: the text is that of a server
which has nothing cached. Files are damaged before a server starts, while their sessions wait on disk, or when a server
has forgotten the session and finds it again by its name. One session of each server keeps a whole file, and goes on
from it.
"""

import random
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from server.engine.engine import MlxEngine
from server.metrics import Metrics
from server.settings import MemoryBudget, Settings
from tests.server.engine.answers import Answer, owned_by_nobody
from tests.serving.launch import filler
from tests.soak.damage import Damage, draw
from tests.soak.engines import loaded_once, on_engine, sample, started
from tests.soak.stored import ASIDE, look
from tests.soak.talks import MAX_TOKENS, Talk, told
from turbocache.persistence import SessionFiles

SETTINGS = Settings(keep=16, window=64, kv_memory=MemoryBudget(bytes=256 << 20), prefill_chunk=128)
AT_ONCE = 21
"""Sessions of one server, the whole one included."""

_MOMENTS = ("before the start", "on disk", "forgotten")
_ASKS = (f"My name is Anna and my locker code is 5917. {filler(14, 5)}", "What is my locker code?")


@dataclass(slots=True)
class Corruption:
    """What happened, and `wrong`: sentences, each a failure."""

    damaged: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    moments: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    whole: int = 0
    servers: int = 0
    wrong: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        def counted(what: Counter[str]) -> str:
            return ", ".join(f"{n} {name}" for name, n in sorted(what.items())) or "none"

        return [
            f"files damaged     {self.damaged} ({counted(self.kinds)})",
            f"  when            {counted(self.moments)}",
            f"refused           {self.reasons.total()} ({counted(self.reasons)})",
            f"whole, gone on    {self.whole}",
            f"servers           {self.servers}",
            f"failures          {len(self.wrong)}",
            *(f"  {what}" for what in self.wrong[:20]),
        ]


class Place:
    """A folder that gets the same whole files again for each server."""

    def __init__(self, folder: Path, n_sessions: int) -> None:
        self.settings = SETTINGS.model_copy(update={"session_dir": folder})
        names = [f"session-{i}" for i in range(n_sessions)]
        with started(SETTINGS) as engine:
            self.talk: Talk = told(engine, "reference", _ASKS)
            files = SessionFiles(engine._host.model, engine._host.store)
        with started(SETTINGS) as engine:
            question = self.talk.messages(1)
            self.text, usage = Answer(engine, question, "prefilled", max_tokens=MAX_TOKENS).whole()
            assert not usage.cached_tokens
        with started(self.settings) as engine:
            for name in names:
                Answer(engine, self.talk.messages(0), name, max_tokens=MAX_TOKENS).whole()
        found = look(folder, files).whole
        assert sorted(one.id for one in found) == sorted(names)
        self.paths = {one.id: one.path for one in found}
        self.good = {one.id: one.path.read_bytes() for one in found}
        self.held = {one.id: len(one.tokens) for one in found}
        self.folder = folder

    def renew(self) -> None:
        for path in self.folder.iterdir():
            path.unlink()
        for name, path in self.paths.items():
            path.write_bytes(self.good[name])


def run(times: int, seed: int, at_once: int = AT_ONCE, say: Callable[[str], None] = print) -> Corruption:
    """Damage `times` files."""
    dice, result = random.Random(seed), Corruption()
    with loaded_once(), tempfile.TemporaryDirectory(prefix="corruption-") as folder:
        place = Place(Path(folder), at_once)
        while result.damaged < times:
            _one_server(place, min(times - result.damaged, at_once - 1), dice, result)
            say(f"{result.damaged} of {times}: {result.reasons.total()} refused, {len(result.wrong)} failures")
    return result


def _one_server(place: Place, n_damaged: int, dice: random.Random, result: Corruption) -> None:
    place.renew()
    names = list(place.paths)
    dice.shuffle(names)
    damages: dict[str, tuple[Damage, str] | None] = dict.fromkeys(names[: n_damaged + 1])
    for name in names[1 : n_damaged + 1]:
        damages[name] = damage, moment = draw(dice, place.good[name]), dice.choice(_MOMENTS)
        result.kinds[damage.kind] += 1
        result.moments[moment] += 1
        if moment == _MOMENTS[0]:
            place.paths[name].write_bytes(damage.done_to(place.good[name]))
    metrics = Metrics()
    with started(place.settings, metrics) as engine:
        result.servers += 1
        aside = {name for name, path in place.paths.items() if _aside(path).exists()}
        if sample(metrics, "session_files_refused_total") != len(aside):
            result.wrong.append(f"a start has moved {len(aside)} files aside and counted {_reasons(metrics)}")
        order = list(damages)
        dice.shuffle(order)
        for name in order:
            _one_session(place, engine, metrics, name, damages[name], name in aside, result)
        if not on_engine(engine, lambda: owned_by_nobody(engine)):
            result.wrong.append("pages have been lost")
    result.reasons.update(_reasons(metrics))


def _one_session(
    place: Place,
    engine: MlxEngine,
    metrics: Metrics,
    name: str,
    done: tuple[Damage, str] | None,
    is_aside: bool,
    result: Corruption,
) -> None:
    path, said = place.paths[name], []
    if done is not None:
        damage, moment = done
        if moment != _MOMENTS[0]:
            path.write_bytes(damage.done_to(place.good[name]))
        if moment == "forgotten":
            on_engine(engine, lambda: _forget(engine, name))
    before = sample(metrics, "session_files_refused_total")
    text, usage = Answer(engine, place.talk.messages(1), name, max_tokens=MAX_TOKENS).whole()
    counted = sample(metrics, "session_files_refused_total") - before
    on_engine(engine, lambda: _forget(engine))
    if text != place.text:
        said.append(f"the text is {text!r} instead of {place.text!r}")
    if done is None:
        result.whole += 1
        if (usage.cached_tokens, counted) != (place.held[name], 0):
            said.append(f"{usage.cached_tokens} of {place.held[name]} tokens cached, {counted:g} refused")
    else:
        result.damaged += 1
        if usage.cached_tokens:
            said.append(f"{usage.cached_tokens} tokens cached")
        if counted != (not is_aside):
            said.append(f"{counted:g} refused" + " on top of one at the start" * is_aside)
        if path.exists() or not _aside(path).exists():
            said.append("the file is still there" if path.exists() else "the file is gone")
    if said:
        what = "a whole file" if done is None else f"{done[0]}, {done[1]}"
        result.wrong.append(f"{what}: {'; '.join(said)}")


def _forget(engine: MlxEngine, name: str | None = None) -> None:
    """Take a session out of memory, or all that are there; the disk keeps what it has."""
    registry = engine._registry
    for session in list(registry):
        if session.id == name or (name is None and session.cache is not None):
            registry.forget(session)


def _aside(path: Path) -> Path:
    return path.with_name(f"{path.name}{ASIDE}")


def _reasons(metrics: Metrics) -> Counter[str]:
    return Counter(
        {
            found.labels["reason"]: int(found.value)
            for family in metrics.registry.collect()
            for found in family.samples
            if found.name == "turbocache_session_files_refused_total"
        }
    )
