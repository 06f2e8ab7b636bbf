"""Sessions whose files are damaged, and what their next turns come to.

A damaged file is refused and counted once, moved aside, and its session is prefilled: the text is that of a server
which has nothing cached. Files are damaged before a server starts, while their sessions wait on disk, or when a server
has forgotten the session and finds it again by its name. One session of each server keeps a whole file, and goes on
from it.
"""

import queue
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from server.engine.engine import MlxEngine
from server.errors import ServerError
from server.metrics import Metrics
from server.settings import MemoryBudget, Settings
from tests.server.engine.answers import Answer, on_engine, owned_by_nobody
from tests.serving.launch import filler
from tests.soak.disk.damage import Damage, draw
from tests.soak.disk.stored import ASIDE, look
from tests.soak.disk.talks import MAX_TOKENS, QUESTION
from tests.soak.engines import loaded_once, sample, started
from turbocache.models import BUNDLED
from turbocache.storage.session_codec import SessionFiles

SETTINGS = Settings(model=str(BUNDLED), keep=16, window=64, kv_memory=MemoryBudget(bytes=256 << 20), prefill_chunk=128)
AT_ONCE = 21
"""Sessions of one server, the whole one included."""

_MOMENTS = ("before the start", "on disk", "forgotten")
_SENTENCES = 14


@dataclass(frozen=True, slots=True)
class Done:
    """A damage and when it is done."""

    damage: Damage
    moment: str

    def __str__(self) -> str:
        return f"{self.damage}, {self.moment}"


@dataclass(slots=True)
class Corruption:
    """What happened, and `wrong`: sentences, each a failure."""

    damaged: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    moments: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    whole: int = 0
    wrong_texts: int = 0
    servers: int = 0
    wrong: list[str] = field(default_factory=list)

    def count(self, done: Done | None) -> None:
        """One more session that is asked."""
        if done is None:
            self.whole += 1
            return
        self.damaged += 1
        self.kinds[done.damage.kind] += 1
        self.moments[done.moment] += 1

    def lines(self) -> list[str]:
        def counted(what: Counter[str]) -> str:
            return ", ".join(f"{n} {name}" for name, n in sorted(what.items())) or "none"

        return [
            f"files damaged     {self.damaged} ({counted(self.kinds)})",
            f"  when            {counted(self.moments)}",
            f"refused           {self.reasons.total()} ({counted(self.reasons)})",
            f"whole, gone on    {self.whole}",
            f"wrong texts       {self.wrong_texts}",
            f"servers           {self.servers}",
            f"failures          {len(self.wrong)}",
            *(f"  {what}" for what in self.wrong[:20]),
        ]


class Place:
    """A folder that gets the same whole files again for each server. Every session is of a talk of its own, so that
    none can go on from another's state.
    """

    def __init__(self, folder: Path, n_sessions: int) -> None:
        self.folder = folder
        self.settings = SETTINGS.model_copy(update={"session_dir": folder})
        self.asks: dict[str, list[dict[str, str]]] = {}
        self.texts: dict[str, str] = {}
        with started(self.settings) as engine:
            files = SessionFiles(engine.services.runtime.model, engine.services.runtime.store)
            for i in range(n_sessions):
                opening = [{"role": "user", "content": f"My locker code is {1009 + 311 * i}. {filler(_SENTENCES, i)}"}]
                text, _ = Answer(engine, opening, f"session-{i}", max_tokens=MAX_TOKENS).whole()
                answered = [*opening, {"role": "assistant", "content": text}]
                self.asks[f"session-{i}"] = [*answered, {"role": "user", "content": QUESTION}]
        with started(SETTINGS) as engine:
            for name, messages in self.asks.items():
                self.texts[name], usage = Answer(engine, messages, name, max_tokens=MAX_TOKENS).whole()
                assert not usage.cached_tokens
        found = look(folder, files).whole
        assert sorted(one.id for one in found) == sorted(self.asks)
        self.paths = {one.id: one.path for one in found}
        self.good = {one.id: one.path.read_bytes() for one in found}
        self.held = {one.id: len(one.tokens) for one in found}

    def renew(self) -> None:
        """The folder as it was left by a server that nothing happened to."""
        for path in self.folder.iterdir():
            path.unlink()
        for name, path in self.paths.items():
            path.write_bytes(self.good[name])

    def damage(self, name: str, done: Done | None, *moments: str) -> None:
        """Damage a session's file, if now is the moment."""
        if done is not None and done.moment in moments:
            self.paths[name].write_bytes(done.damage.done_to(self.good[name]))


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
    names = dice.sample(list(place.paths), n_damaged + 1)
    done: dict[str, Done | None] = {name: Done(draw(dice, place.good[name]), dice.choice(_MOMENTS)) for name in names}
    done[names[0]] = None
    for name in names:
        place.damage(name, done[name], _MOMENTS[0])
    metrics = Metrics()
    with started(place.settings, metrics) as engine:
        result.servers += 1
        asking = Asking(place, engine, metrics, result)
        for name in dice.sample(names, len(names)):
            asking.go_on(name, done[name])
            if not engine.health().alive:
                return
        if not on_engine(engine, lambda: owned_by_nobody(engine)):
            result.wrong.append("pages have been lost")
    result.reasons.update(_reasons(metrics))


class Asking:
    """The next turns of one server's sessions, and whether they come to what they must."""

    def __init__(self, place: Place, engine: MlxEngine, metrics: Metrics, result: Corruption) -> None:
        self._place = place
        self._engine = engine
        self._metrics = metrics
        self._result = result
        self._aside = {name for name, path in place.paths.items() if _aside(path).exists()}
        if self._refused != len(self._aside):
            result.wrong.append(f"a start has moved {len(self._aside)} files aside and counted {_reasons(metrics)}")

    def go_on(self, name: str, done: Done | None) -> None:
        """Do what is to be done to the session's file, and ask."""
        place, result, before = self._place, self._result, self._refused
        place.damage(name, done, *_MOMENTS[1:])
        if done is not None and done.moment == _MOMENTS[2]:
            on_engine(self._engine, lambda: _forget(self._engine, name))
        result.count(done)
        try:
            text, usage = Answer(self._engine, place.asks[name], name, max_tokens=MAX_TOKENS).whole()
        except (AssertionError, ServerError, queue.Empty) as error:
            result.wrong.append(f"{done or 'a whole file'}: no answer: {type(error).__name__} {error}")
            return
        on_engine(self._engine, lambda: _forget(self._engine))
        said = []
        if text != place.texts[name]:
            result.wrong_texts += 1
            said.append(f"the text is {text!r} instead of {place.texts[name]!r}")
        said += self._about(name, done, usage.cached_tokens, self._refused - before)
        if said:
            result.wrong.append(f"{done or 'a whole file'}: {'; '.join(said)}")

    def _about(self, name: str, done: Done | None, cached: int, refused: float) -> Iterator[str]:
        """What is wrong with how a session came back, or didn't."""
        path = self._place.paths[name]
        if cached != (held := 0 if done is not None else self._place.held[name]):
            yield f"{cached} instead of {held} tokens cached"
        if refused != (due := done is not None and name not in self._aside):
            yield f"{refused:g} refused" + " on top of one at the start" * (name in self._aside)
        if path.exists() != (done is None):
            yield "the file is still there" if path.exists() else "the file is gone"
        if _aside(path).exists() != (done is not None):
            yield "no file was moved aside" if due else "a file was moved aside"

    @property
    def _refused(self) -> float:
        return sample(self._metrics, "session_files_refused_total")


def _forget(engine: MlxEngine, name: str | None = None) -> None:
    """Take a session out of memory, or all that are there; the disk keeps what it has."""
    registry = engine.services.registry
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
