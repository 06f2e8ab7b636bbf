"""Prometheus metrics of one app: a registry of its own and one typed attribute per metric family.

Who writes what, so that nothing is counted twice:

- the HTTP rooms: what whole requests do and the event loop does (`http_requests`, `requests_finished`,
  `admission_refusals` (the engine its reason `later_sessions`), a request's times and sizes, `deadlines_exceeded`,
  `event_loop_*`), and `engine_up` whenever somebody looks;
- the engine: everything else.

Units are seconds, bytes and tokens. Labels come from closed sets, from the routes or from what the start has found;
text from users never becomes a label. What is of a closed set is there from the start, at 0, so that a rate sees its
first event. docs/metrics.md is made of this module: `python -m server.metrics_table`.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.exposition import choose_encoder

PREFIX = "turbocache_"
Unit = Literal["", "bytes", "seconds", "tokens", "pages", "sessions", "requests", "rows", "layers", "ratio"]
Labels = Mapping[str, tuple[str, ...]]
"""A label's values that are known before anything happens. Others may come where `Family.open` has the label."""

# A cold prefill of a long context on a small machine takes many minutes, so the buckets go on to half an hour.
_SLOW_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0, 1800.0)
_QUEUE_BUCKETS = (0.001, 0.005, 0.01, *_SLOW_BUCKETS)
_LAG_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 5.0)
_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_LENGTH_BUCKETS = tuple(float(2**power) for power in range(4, 18))
_ROW_BUCKETS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)

_RANK: Labels = {"rank": ("0",)}
_DISK_ERRORS = ("OSError", "PermissionError", "FileNotFoundError")

M = TypeVar("M", Gauge, Counter)

# `_created` series tell when a counter began, which a rate does not ask for, and double what is scraped. (The library
# gives this function no types.)
_without_created: Callable[[], None] = disable_created_metrics
_without_created()


@dataclass(frozen=True, slots=True)
class Family:
    """What a family is. `name` is what a query says, without a histogram's suffixes. `labels` has the values that are
    there from the start; those of the labels in `open` come when they happen, still from few.
    """

    name: str
    type: Literal["gauge", "counter", "histogram"]
    labels: Labels
    open: frozenset[str]
    unit: Unit
    meaning: str


class Metrics:
    """All families, prefix `turbocache_`. Safe to write from any thread. Counters appear with the suffix `_total`.

    `exemplars`: whether latency histograms name a request for each bucket, where a scraper asks for OpenMetrics.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.families: list[Family] = []
        self.exemplars = False

        self.engine_up = self._gauge("engine_up", "1 while the engine's thread works, 0 when it is dead or stuck.")
        self.model_info = self._gauge(
            "model_info",
            "Always 1; the labels say what is served: the model, the cache preset, its version and MLX's.",
            open=("model_name", "preset", "version", "mlx_version"),
        )
        self.backend_info = self._gauge(
            "backend_info",
            "Always 1; the labels say which backend runs and why.",
            open=("requested", "active", "reason", "profile"),
        )
        self.probe_check = self._gauge(
            "probe_check", "Checks of the start-up probe by backend and part: 1 passed, 0 failed.", open=("check",)
        )
        self.fallbacks = self._counter(
            "fallbacks", "Times a backend was passed over for another.", open=("from", "to", "reason")
        )
        self.kernel_faults = self._counter("kernel_faults", "Steps that failed or whose result was not a number.")
        self.layers = self._gauge(
            "layers",
            "Layers of the model by the way their keys and values are stored: compressed, or native (mlx-lm's cache).",
            "layers",
            {"storage": ("compressed", "native")},
        )
        self.attention_path = self._counter(
            "attention_path",
            "Layers that attended, by path: fused, packed, expanded (pages are expanded first), native (mlx-lm's own).",
            "layers",
            {"path": ("fused", "packed", "expanded", "native")},
        )

        self.group_ranks = self._gauge("group_ranks", "Processes that serve the model together; 1: one by itself.")
        self.rank_silent = self._gauge(
            "rank_silent_seconds",
            "Since a rank's engine came to a new step, as of a moment ago; 0 for the rank that tells.",
            "seconds",
            _RANK,
            open=("rank",),
        )

        self.pages_used = self._gauge("pages_used", "Pages of the pool that sessions own.", "pages")
        self.pages_free = self._gauge("pages_free", "Pages of the pool that nobody owns.", "pages")
        self.pages_capacity = self._gauge("pages_capacity", "Pages the pool holds: used plus free.", "pages")
        self.cache_bytes = self._gauge(
            "cache_bytes",
            "What the cache holds, by kind: compressed pages, the raw window and sink, recurrent states.",
            "bytes",
            {"kind": ("pages", "window", "sink", "recurrent"), **_RANK},
            open=("rank",),
        )
        self.cache_fp16_bytes = self._gauge(
            "cache_fp16_bytes",
            "What a float16 cache would need for the tokens in pages, windows and sinks.",
            "bytes",
            _RANK,
            open=("rank",),
        )
        self.compression_ratio = self._gauge(
            "compression_ratio",
            "Bytes in float16 over bytes as stored: of a page, and of all that is held now with its raw parts (0: "
            "nothing is held).",
            "ratio",
            {"of": ("page", "held")},
        )
        self.raw_shadow_bytes = self._gauge(
            "raw_shadow_bytes", "Uncompressed copies of what pages hold; must stay 0.", "bytes"
        )
        self.budget_bytes = self._gauge(
            "budget_bytes",
            "Memory for the cache: total, promised (to requests), resting (sessions and checkpoints at rest).",
            "bytes",
            {"kind": ("total", "promised", "resting"), **_RANK},
            open=("rank",),
        )
        self.pressure = self._gauge(
            "pressure_ratio", "What runs was promised and what rests by the budget; above 1 sessions must go.", "ratio"
        )
        self.device_memory = self._gauge(
            "device_memory_bytes",
            "MLX's memory: active (arrays), cached (freed and kept for the next arrays), peak (most that was active "
            "at once), and the device's total.",
            "bytes",
            {"kind": ("active", "cached", "peak", "total"), **_RANK},
            open=("rank",),
        )
        self.sessions = self._gauge(
            "sessions",
            "Sessions by state: resident (at rest in memory), running, spilled (on disk only).",
            "sessions",
            {"state": ("resident", "running", "spilled")},
        )
        self.rotations = self._counter("rotations", "Pages dropped from the old end of a full session.", "pages")
        self.rotated_tokens = self._counter("rotated_tokens", "Tokens forgotten by rotation.", "tokens")
        self.evictions = self._counter(
            "evictions",
            "Sessions forgotten that are on no disk: to make room (memory), or unused for too long (ttl).",
            "sessions",
            {"reason": ("memory", "ttl")},
        )
        self.checkpoint_drops = self._counter(
            "checkpoint_drops", "Checkpoints forgotten to make room.", labels={"reason": ("memory",)}
        )
        self.checkpoint_hits = self._counter(
            "checkpoint_hits",
            "Turns by what they went on from: session (its last turn's end), none, or a checkpoint's kind.",
            labels={"kind": ("none", "session", "system", "prompt", "tool", "answer")},
        )
        self.prompt_tokens = self._counter(
            "prompt_tokens",
            "Prompt tokens by source: cached (found in the cache) or prefilled.",
            "tokens",
            {"source": ("cached", "prefilled")},
        )
        self.prefilled_tokens = self._counter(
            "prefilled_tokens",
            "Prefilled prompt tokens by reason: new, edited (others stood there), rotated (no state to go back to), or "
            "as their session was lost: evicted, refused_file, failed.",
            "tokens",
            {"reason": ("new", "edited", "rotated", "evicted", "refused_file", "failed")},
        )

        self.spills = self._counter("spills", "Sessions written to disk.", "sessions")
        self.spilled_bytes = self._counter("spilled_bytes", "Sessions written to disk.", "bytes")
        self.spill_seconds = self._counter("spill_seconds", "Time spent writing sessions to disk.", "seconds")
        self.spill_failures = self._counter(
            "spill_failures",
            "Sessions that could not be written, by error.",
            "sessions",
            {"reason": _DISK_ERRORS},
            open=("reason",),
        )
        self.restores = self._counter("restores", "Sessions read back from disk.", "sessions")
        self.restored_bytes = self._counter("restored_bytes", "Sessions read back from disk.", "bytes")
        self.restore_seconds = self._counter(
            "restore_seconds", "Time spent reading sessions back from disk.", "seconds"
        )
        self.restore_failures = self._counter(
            "restore_failures",
            "Sessions that could not be read back though their files may be right, by error.",
            "sessions",
            {"reason": _DISK_ERRORS},
            open=("reason",),
        )
        self.session_files_refused = self._counter(
            "session_files_refused",
            "Session files that can't be used and were moved aside; those of other groups (other_group) stay.",
            labels={
                "reason": (
                    "corrupt",
                    "missing",
                    "other_group",
                    "other_layout",
                    "other_model",
                    "other_version",
                    "truncated",
                    "unreadable",
                )
            },
        )
        self.session_files_dropped = self._counter(
            "session_files_dropped", "Session files deleted because TURBOCACHE_SESSION_DISK was full."
        )
        self.session_handovers = self._counter(
            "session_handovers",
            "What several servers on one TURBOCACHE_SESSION_DIR do: found (another's session, new here), taken_up (one "
            "known here that another took further), leased (not written: another was at the file), superseded (not "
            "written: another's turn was later).",
            "sessions",
            {"event": ("found", "taken_up", "leased", "superseded")},
        )
        self.session_disk_bytes = self._gauge("session_disk_bytes", "Files of sessions.", "bytes")
        self.session_disk_limit = self._gauge(
            "session_disk_limit_bytes", "What files of sessions may take; 0 without TURBOCACHE_SESSION_DIR.", "bytes"
        )
        self.session_disk_free = self._gauge(
            "session_disk_free_bytes",
            "What is free where they are, as of the last file; 0 without TURBOCACHE_SESSION_DIR.",
            "bytes",
        )

        self.requests_running = self._gauge("requests_running", "Requests in the batch.", "requests")
        self.requests_running_limit = self._gauge(
            "requests_running_limit", "Most requests in the batch: TURBOCACHE_MAX_BATCH.", "requests"
        )
        self.requests_waiting = self._gauge(
            "requests_waiting", "Requests accepted and not yet in the batch.", "requests"
        )
        self.requests_waiting_limit = self._gauge(
            "requests_waiting_limit", "Most requests that wait: TURBOCACHE_QUEUE_LIMIT.", "requests"
        )
        self.batch_rows = self._histogram("batch_rows", "Rows that got a token in a step.", _ROW_BUCKETS, "rows")
        self.generated_tokens = self._counter("generated_tokens", "Tokens generated.", "tokens")
        self.requests_finished = self._counter(
            "requests_finished",
            "Accepted requests by outcome.",
            "requests",
            {"reason": ("stop", "length", "tool_calls", "cancelled", "error")},
        )
        self.admission_refusals = self._counter(
            "admission_refusals",
            "Requests refused before they ran, by error code, or later_sessions: named ones were used since.",
            "requests",
            {
                "reason": (
                    "rate_limit_exceeded", "out_of_memory", "later_sessions", "context_length_exceeded", "engine_dead",
                )
            },
            open=("reason",),
        )  # fmt: skip
        self.deadlines_exceeded = self._counter(
            "deadlines_exceeded",
            "Requests ended by TURBOCACHE_DEADLINE, by how far they had come.",
            "requests",
            {"phase": ("arriving", "waiting", "prefill", "answer")},
        )
        self.http_requests = self._counter(
            "http_requests", "HTTP responses by route template and status.", "requests", open=("path", "status")
        )
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "From the request's arrival to its first text.", _SLOW_BUCKETS
        )
        self.inter_token_latency = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of one request.", _TOKEN_BUCKETS
        )
        self.request_duration = self._histogram(
            "request_duration_seconds", "From an accepted request's arrival to its outcome.", _SLOW_BUCKETS
        )
        self.queue_seconds = self._histogram(
            "request_queue_seconds", "From a request's acceptance to its start.", _QUEUE_BUCKETS
        )
        self.prefill_seconds = self._histogram(
            "request_prefill_seconds", "From its start until its prompt was read.", _QUEUE_BUCKETS
        )
        self.decode_seconds = self._histogram("request_decode_seconds", "From there to its outcome.", _QUEUE_BUCKETS)
        self.request_prompt_tokens = self._histogram(
            "request_prompt_tokens", "Prompt of a finished request.", _LENGTH_BUCKETS, "tokens"
        )
        self.request_generated_tokens = self._histogram(
            "request_generated_tokens", "Answer of a finished request.", _LENGTH_BUCKETS, "tokens"
        )
        self.event_loop_lag = self._histogram(
            "event_loop_lag_seconds", "By how much the event loop comes late, fifty times a second.", _LAG_BUCKETS
        )
        self.event_loop_longest_lag = self._gauge(
            "event_loop_longest_lag_seconds",
            "The most by which the event loop has come late since the start.",
            "seconds",
        )
        self.event_loop_longest_own_lag = self._gauge(
            "event_loop_longest_own_lag_seconds",
            "The same without the time for which its thread waited for a processor (told by Linux only).",
            "seconds",
        )
        # Of the process, where the system has /proc: memory, processor time, open files.
        ProcessCollector(registry=self.registry)

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """All families in the format that a scraper's Accept header asks for, else Prometheus' text, and its type."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type

    def exemplar(self, request_id: str) -> dict[str, str] | None:
        """For `Histogram.observe`."""
        return {"request_id": request_id} if self.exemplars else None

    def _gauge(
        self, name: str, meaning: str, unit: Unit = "", labels: Labels | None = None, open: tuple[str, ...] = ()
    ) -> Gauge:
        family = self._family(name, "gauge", meaning, unit, labels or {}, open)
        return _begun(Gauge(PREFIX + name, meaning, list(family.labels), registry=self.registry), family)

    def _counter(
        self, name: str, meaning: str, unit: Unit = "", labels: Labels | None = None, open: tuple[str, ...] = ()
    ) -> Counter:
        family = self._family(f"{name}_total", "counter", meaning, unit, labels or {}, open)
        return _begun(Counter(PREFIX + name, meaning, list(family.labels), registry=self.registry), family)

    def _histogram(self, name: str, meaning: str, buckets: tuple[float, ...], unit: Unit = "seconds") -> Histogram:
        self._family(name, "histogram", meaning, unit, {}, ())
        return Histogram(PREFIX + name, meaning, (), buckets=buckets, registry=self.registry)

    def _family(
        self,
        name: str,
        type: Literal["gauge", "counter", "histogram"],
        meaning: str,
        unit: Unit,
        labels: Labels,
        open: tuple[str, ...],
    ) -> Family:
        known = {**labels, **{label: () for label in open if label not in labels}}
        self.families.append(family := Family(PREFIX + name, type, known, frozenset(open), unit, meaning))
        return family


def _begun(metric: M, family: Family) -> M:
    """With the children that are known from the start."""
    if family.labels:
        for values in itertools.product(*family.labels.values()):
            metric.labels(*values)
    return metric
