"""The state of cache and sessions as metrics and JSON rows."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

from server.engine.running import RunningRequest
from server.engine.services import Services
from server.sessions.session import Session
from turbocache.cache import PAGE
from turbocache.cache.ring import PageRing
from turbocache.cache.spec import CacheSpec
from turbocache.machine.memory import device_memory, memory_in_use
from turbocache.mlxlm.seam import native_calls
from turbocache.store import batches_of, beside_pages, native_nbytes, pages_nbytes, pages_of, ring_of

_EVERY_SECONDS = 0.25


class Stats:
    """Writes the state into `Metrics`. Other threads may read the attributes, which are replaced whole.

    `running` returns the requests in the batch, and their rings.
    """

    def __init__(
        self, services: Services, running: Callable[[], Sequence[tuple[RunningRequest, PageRing | None]]]
    ) -> None:
        runtime, metrics = services.runtime, services.metrics
        self.session_rows: dict[tuple[str, str], dict[str, Any]] = {}
        """The rows of GET /v1/sessions, by owner and id."""
        self.status: dict[str, Any] = {}
        """The JSON of GET /v1/status."""
        self.memory: dict[str, Any] = {}
        """This process's memory in bytes, for the other ranks of a group."""
        self._budget = services.budget
        self._counted: dict[tuple[str, str], tuple[Any, dict[str, int]]] = {}
        self._metrics = metrics
        self._runtime = runtime
        self._queue = services.queue
        self._coordinator = services.coordinator
        self._registry = services.registry
        self._running = running
        self._rotated_pages = 0
        self._device_memory = device_memory()
        self._paths = self._attention_paths()
        self._refreshed = 0.0
        backend, specs = runtime.backend, runtime.store.specs
        metrics.backend_info.labels(
            requested=backend.requested, active=backend.name, reason=backend.code, profile=backend.profile
        ).set(1)
        metrics.model_info.labels(
            model_name=runtime.model.id,
            preset=runtime.store.preset.name,
            version=version("turbocache"),
            mlx_version=version("mlx"),
        ).set(1)
        n_compressed = sum(plan.compressed for plan in runtime.store.plans)
        metrics.layers.labels(storage="compressed").set(n_compressed)
        metrics.layers.labels(storage="native").set(len(runtime.store.plans) - n_compressed)
        pages, fp16 = (sum(n) for n in zip(*((s.pool.page_nbytes, s.fp16_page_nbytes) for s in specs), strict=True))
        metrics.compression_ratio.labels(of="page").set(_ratio(fp16, pages))
        metrics.group_ranks.set(self._coordinator.group.size)
        for label, passed in backend.passed().items():
            metrics.probe_check.labels(check=label).set(passed)
        for fallback in backend.fallbacks:
            metrics.fallbacks.labels(**{"from": fallback.source, "to": fallback.target, "reason": fallback.code}).inc()
        self.refresh()

    def refresh_if_due(self) -> None:
        """`refresh`, unless it was done a moment ago."""
        if time.monotonic() - self._refreshed > _EVERY_SECONDS:
            self.refresh()

    def refresh(self) -> None:
        """Read everything again."""
        self._refreshed = time.monotonic()
        running, n_waiting = {row[0].session.key: row for row in self._running()}, len(self._queue)
        m, spec = self._metrics, self._runtime.store.spec
        m.requests_running.set(len(running))
        m.requests_waiting.set(n_waiting)
        m.pages_used.set(spec.pool.n_used)
        m.pages_free.set(spec.pool.n_free)
        m.pages_capacity.set(spec.pool.capacity)
        sessions = list(self._registry)
        m.raw_shadow_bytes.set(sum(batch.shadow_nbytes for s in self._runtime.store.specs for batch in s.live))
        spilled = sum(session.spilled for session in sessions)
        m.sessions.labels(state="resident").set(len(sessions) - len(running) - spilled)
        m.sessions.labels(state="spilled").set(spilled)
        m.sessions.labels(state="running").set(len(running))
        rotated = spec.rotated_pages - self._rotated_pages
        self._rotated_pages = spec.rotated_pages
        m.rotations.inc(rotated)
        m.rotated_tokens.inc(rotated * PAGE)
        paths = self._attention_paths()
        for path, count in paths.items():
            m.attention_path.labels(path=path).inc(count - self._paths.get(path, 0))
        self._paths = paths
        resting = self._runtime.store.resting_nbytes(self._registry.caches())
        self._refresh_memory(sessions, resting)
        m.pressure_ratio.set((self._budget.started + resting) / self._budget.total)
        self._counted = {
            session.key: self._counted[session.key] for session in sessions if session.key in self._counted
        }
        self.session_rows = {
            session.key: self.row(session, *running.get(session.key, (None, None))) for session in sessions
        }
        self.status = self._status(len(running), n_waiting, resting)

    def _refresh_memory(self, sessions: Sequence[Session], resting: int) -> None:
        """The bytes of this rank and the last known ones of the others. Shared pages count once."""
        m, pages, sink, window, fp16 = self._metrics, 0, 0, 0, 0
        for spec in self._runtime.store.specs:
            raw = len(spec.rings) * spec.raw_token_nbytes
            pages, fp16 = pages + spec.pool.n_used * spec.pool.page_nbytes, fp16 + spec.fp16_nbytes()
            sink, window = sink + raw * spec.ring.keep, window + raw * spec.ring.window_slots
        recurrent = sum(native_nbytes(session.cache or ()) for session in sessions)
        promised = self._budget.promised
        self.memory = {
            "cache": {"pages": pages, "sink": sink, "window": window, "recurrent": recurrent},
            "budget": {"total": self._budget.total, "promised": promised, "resting": resting},
            "device": {"total": self._device_memory, **memory_in_use()},
            "fp16": fp16,
        }
        m.compression_ratio.labels(of="held").set(_ratio(fp16, pages + sink + window))
        for rank, (silent, memory) in self._coordinator.memory_by_rank(self.memory).items():
            self._export_rank(rank, silent, memory)

    def _export_rank(self, rank: int, silent: float, memory: Mapping[str, Any]) -> None:
        m = self._metrics
        m.rank_silent_seconds.labels(rank=rank).set(silent)
        m.cache_fp16_bytes.labels(rank=rank).set(memory["fp16"])
        for family, part in ((m.cache_bytes, "cache"), (m.budget_bytes, "budget"), (m.device_memory_bytes, "device")):
            for kind, nbytes in memory[part].items():
                family.labels(kind=kind, rank=rank).set(nbytes)

    def _attention_paths(self) -> dict[str, int]:
        counted = Counter({"native": native_calls()})
        for spec in self._runtime.store.specs:
            for path, n in spec.paths.totals.items():
                counted[path] += n
        return counted

    def _status(self, n_running: int, n_waiting: int, resting: int) -> dict[str, Any]:
        """The JSON of GET /v1/status."""
        budget, pool = self._budget, self._runtime.store.spec.pool
        started, promised = budget.started, budget.promised
        return {
            "object": "status",
            "model": self._runtime.model.id,
            "ranks": self._coordinator.group.size,
            "requests": {"running": n_running, "waiting": n_waiting},
            "memory": {
                "budget_bytes": budget.total,
                "running_bytes": started,
                "waiting_bytes": max(0, promised - started),  # requests come and go between the two readings
                "resting_bytes": resting,
                "pressure_ratio": round((started + resting) / budget.total, 6),
            },
            "pages": {"used": pool.n_used, "capacity": pool.capacity, "tokens": PAGE, "nbytes": pool.page_nbytes},
        }

    def row(
        self, session: Session, running: RunningRequest | None = None, ring: PageRing | None = None
    ) -> dict[str, Any]:
        """A row of GET /v1/sessions. The cache of a running session is in the batch: `ring` is its ring, and its bytes
        are not known by kind.
        """
        if ring is None:
            ring = ring_of(session.cache or ())
        seen = len(session.tokens) if running is None else len(running.request.prompt.tokens) + running.generated
        limit = self._runtime.store.spec.ring.max_size
        return {
            "id": session.id,
            "object": "session",
            "name": session.name,
            "model": self._runtime.model.id,
            "state": "running" if session.running else "spilled" if session.spilled else "resident",
            "tokens_seen": seen,
            # A running session's ring is ahead of what its client has by the step that is being computed.
            "tokens_held": min(seen, ring.size()) if ring is not None else seen if limit is None else min(seen, limit),
            "bytes": None if session.cache is None else self._nbytes(session),
            "saved": session.stored,
            "rotations": 0 if ring is None else ring.gone,
            "pinned_tokens": None if ring is None else min(ring.offset, ring.rotation_start),
            "dropped_tokens": None if ring is None else ring.dropped,
            "dropped_turns": None if ring is None else ring.dropped_turns,
            "ring": None if ring is None else _shape(ring, PAGE),
            "centred_heads": None if ring is None else 0 if ring.centre is None else ring.centre.n_heads,
            "checkpoints": len(session.checkpoints),
            "turns": session.turns,
            "last_used": session.last_used,
        }

    def _nbytes(self, session: Session) -> dict[str, int]:
        """Bytes by kind. Pages of both a checkpoint and the session count for the session. Pages that other sessions
        share count in full. Counted again only when the session has changed: long sessions have thousands of pages.
        """
        version = (session.last_used, len(session.tokens), tuple(id(kept) for kept in session.checkpoints))
        known, nbytes = self._counted.get(session.key, (None, {}))
        if known == version:
            return nbytes
        cache = session.cache or []
        pages, batches = pages_of(cache), batches_of(cache)
        sink = sum(batch.spec.ring.keep * batch.spec.raw_token_nbytes for batch in batches)
        nbytes = {
            "pages": pages_nbytes(pages),
            "sink": sink,
            "window": sum(map(beside_pages, batches)) - sink,  # with what is subtracted from the keys
            "recurrent": native_nbytes(cache),
        }
        others: dict[CacheSpec, set[int]] = {}
        nbytes["checkpoints"] = 0
        for kept in session.checkpoints:
            theirs = pages_of(kept.cache)
            nbytes["checkpoints"] += self._runtime.store.held_nbytes(kept.cache) - pages_nbytes(theirs)
            for spec, owned in theirs.items():
                others.setdefault(spec, set()).update(owned - pages.get(spec, set()))
        nbytes["checkpoints"] += pages_nbytes(others)
        self._counted[session.key] = version, nbytes
        return nbytes


def _ratio(whole: float, part: float) -> float:
    return whole / part if part else 0.0


def _shape(ring: PageRing, page_tokens: int) -> dict[str, Any]:
    """Counts from which a client can draw a ring."""
    return {
        "offset": ring.offset,
        "sink_tokens": min(ring.offset, ring.config.keep),
        "first_page": ring.gone,
        "pages": len(ring.pages),
        "pinned_pages": min(ring.pinned, len(ring.pages)),
        "page_tokens": page_tokens,
        "window_tokens": max(0, ring.offset - ring.window_start),
        "max_size": ring.config.max_size,
    }
