"""What must hold of an engine at any time, and what when nobody asks it anything."""

import gc
import os
import subprocess
import time
from pathlib import Path

from server.engine.engine import MlxEngine
from tests.server.engine.answers import on_engine
from tests.soak.engines import after_each_step, is_busy
from turbocache.store import ring_of

_REST_SECONDS = 60.0
_MOST_KEPT = 20
_STATM = Path("/proc/self/statm")


class Watch:
    """Checks an engine after each of its steps, and whenever it is told to. `wrong` are sentences."""

    def __init__(self, engine: MlxEngine) -> None:
        self.steps = 0
        self.checks = 0
        self.rests = 0
        self.most_pages = 0
        self.wrong: list[str] = []
        self._engine = engine
        after_each_step(engine, self._after_step)

    def check(self) -> None:
        """What holds at any time."""
        on_engine(self._engine, self._check)

    def rest(self) -> None:
        """Wait until nothing runs or waits; then also: every page belongs to a session at rest or to a checkpoint."""
        deadline = time.monotonic() + _REST_SECONDS
        while on_engine(self._engine, lambda: is_busy(self._engine)):
            if time.monotonic() > deadline:
                self._note("requests still run or wait long after their clients have gone")
                return
            time.sleep(0.01)
        on_engine(self._engine, self._check_rest)
        self.rests += 1

    def _after_step(self) -> None:
        self.steps += 1
        self._check()

    def _check(self) -> None:
        """On the engine's thread, which must not die of what is found."""
        self.checks += 1
        engine, spec = self._engine, self._engine.services.runtime.store.spec
        self.most_pages = max(self.most_pages, spec.pool.n_used)
        try:
            spec.check_integrity()
        except AssertionError as error:
            self._note(str(error))
        owned = {page for batch in spec.live for ring in batch.rings for page in ring.pages}
        if spec.pool.n_used != len(owned):
            self._note(f"{spec.pool.n_used} pages are in use, {len(owned)} are in rings")
        # In this order: whoever is promised memory waits or runs, but may have come a moment ago.
        promised = engine.services.budget.promised
        if not is_busy(engine):
            resting = engine.services.runtime.store.resting_nbytes(engine.services.registry.caches())
            if promised or resting > engine.services.budget.total:
                self._note(f"nothing runs, but {promised} bytes are promised and {resting} rest")

    def _check_rest(self) -> None:
        gc.collect()  # pages in a cycle of references are late, not lost
        pool = self._engine.services.runtime.store.spec.pool
        rings = [ring for cache in self._engine.services.registry.caches() if (ring := ring_of(cache)) is not None]
        resting = {page for ring in rings for page in ring.pages}
        if pool.n_used != len(resting):
            self._note(f"{pool.n_used} pages are in use, but sessions at rest have {len(resting)}")
        self._check()

    def _note(self, what: str) -> None:
        if len(self.wrong) < _MOST_KEPT:
            self.wrong.append(what)


def resident_mib() -> float:
    """Resident memory of this process, from Linux itself, elsewhere from `ps`."""
    if _STATM.exists():
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    said = subprocess.run(["ps", "-o", "rss=", "-p", str(os.getpid())], capture_output=True, check=True, text=True)
    return int(said.stdout) / 1024
