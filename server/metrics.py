"""Prometheus metrics of one app: a registry of its own and one typed attribute per metric family.

Who writes what, so that nothing is counted twice:

- the HTTP rooms: `http_requests`, `requests_finished`, `admission_refusals` (the engine its reason `later_sessions`),
  `time_to_first_token`, `request_duration`, `deadlines_exceeded`, `event_loop_lag`;
- the engine: everything else (pages, bytes, sessions, queue, tokens, inter-token latency, rotations, evictions,
  checkpoints, fallbacks, backend, checks of the probe, attention paths, kernel faults).

Units are seconds, bytes and tokens. Labels come from closed sets or from the start-up probe; text from users never
becomes a label.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

# A cold prefill of a long context on a small machine takes many minutes, so the buckets go on to half an hour.
_SLOW_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0, 1800.0)
_LAG_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 5.0)
_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metrics:
    """All families, prefix `turbocache_`. Safe to write from any thread. Counters appear with the suffix `_total`."""

    content_type = CONTENT_TYPE_PLAIN_0_0_4

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.pages_used = self._gauge("pages_used", "Pages of the pool that sessions own.")
        self.pages_free = self._gauge("pages_free", "Pages of the pool that nobody owns.")
        self.pages_capacity = self._gauge("pages_capacity", "Pages the pool holds: used plus free.")
        self.cache_bytes = self._gauge(
            "cache_bytes", "Bytes of cache by kind: pages, window, sink, recurrent.", ("kind",)
        )
        self.budget_bytes = self._gauge(
            "budget_bytes",
            "Memory for the cache by kind: total, promised (to requests), resting (sessions and checkpoints at rest).",
            ("kind",),
        )
        self.pressure = self._gauge(
            "pressure_ratio", "What runs was promised and what rests by the budget; above 1 sessions must go."
        )
        self.raw_shadow_bytes = self._gauge(
            "raw_shadow_bytes", "Bytes of uncompressed copies of what pages hold; must stay 0."
        )
        self.sessions = self._gauge("sessions", "Sessions in memory by state.", ("state",))
        self.requests_running = self._gauge("requests_running", "Requests in the batch.")
        self.requests_waiting = self._gauge("requests_waiting", "Requests accepted and not yet in the batch.")

        self.rotations = self._counter("rotations", "Pages dropped from the old end of a full session.")
        self.rotated_tokens = self._counter("rotated_tokens", "Tokens forgotten by rotation.")
        self.evictions = self._counter("evictions", "Sessions forgotten to make room.", ("reason",))
        self.checkpoint_drops = self._counter("checkpoint_drops", "Checkpoints forgotten to make room.", ("reason",))
        self.checkpoint_hits = self._counter(
            "checkpoint_hits",
            "Turns by what they went on from: session (its last turn's end), none, or a checkpoint's kind.",
            ("kind",),
        )
        self.spills = self._counter("spills", "Sessions written to disk.")
        self.spilled_bytes = self._counter("spilled_bytes", "Bytes of sessions written to disk.")
        self.spill_seconds = self._counter("spill_seconds", "Time spent writing sessions to disk.")
        self.spill_failures = self._counter("spill_failures", "Sessions that could not be written.", ("reason",))
        self.restores = self._counter("restores", "Sessions read back from disk.")
        self.restored_bytes = self._counter("restored_bytes", "Bytes of sessions read back from disk.")
        self.restore_seconds = self._counter("restore_seconds", "Time spent reading sessions back from disk.")
        self.restore_failures = self._counter(
            "restore_failures", "Sessions that could not be read back though their files may be right.", ("reason",)
        )
        self.session_files_refused = self._counter(
            "session_files_refused", "Session files that can't be used and were moved aside, by reason.", ("reason",)
        )
        self.session_disk_bytes = self._gauge("session_disk_bytes", "Bytes of session files.")
        self.prompt_tokens = self._counter(
            "prompt_tokens", "Prompt tokens by source: cached (found in the cache) or prefilled.", ("source",)
        )
        self.prefilled_tokens = self._counter(
            "prefilled_tokens",
            "Prefilled prompt tokens by reason: new, edited (others stood there), rotated (no state to go back to), or "
            "as their session was lost: evicted, refused_file, failed.",
            ("reason",),
        )
        for reason in ("new", "edited", "rotated", "evicted", "refused_file", "failed"):
            self.prefilled_tokens.labels(reason=reason)
        self.generated_tokens = self._counter("generated_tokens", "Tokens generated.")
        self.requests_finished = self._counter(
            "requests_finished", "Accepted requests by outcome: stop, length, cancelled, error.", ("reason",)
        )
        self.deadlines_exceeded = self._counter(
            "deadlines_exceeded",
            "Requests ended by TURBOCACHE_DEADLINE, by how far they had come: arriving, waiting, prefill, answer.",
            ("phase",),
        )
        self.fallbacks = self._counter(
            "fallbacks", "Times a backend was passed over for another.", ("from", "to", "reason")
        )
        self.kernel_faults = self._counter("kernel_faults", "Steps that failed or whose result was not a number.")
        self.attention_path = self._counter(
            "attention_path",
            "Layers that attended, by path: fused, packed, expanded (pages are expanded first), native (mlx-lm's own).",
            ("path",),
        )
        self.admission_refusals = self._counter(
            "admission_refusals",
            "Requests refused before they ran, by error code, or later_sessions: named ones were used since.",
            ("reason",),
        )
        self.http_requests = self._counter("http_requests", "HTTP responses by route template.", ("path", "status"))

        self.event_loop_lag = self._histogram(
            "event_loop_lag_seconds", "By how much the event loop comes late, fifty times a second.", _LAG_BUCKETS
        )
        self.event_loop_longest_lag = self._gauge(
            "event_loop_longest_lag_seconds", "The most by which the event loop has come late since the start."
        )
        self.event_loop_longest_own_lag = self._gauge(
            "event_loop_longest_own_lag_seconds",
            "The same without the time for which its thread waited for a processor (told by Linux only).",
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
        self.backend_info = self._gauge(
            "backend_info",
            "Always 1; the labels say which backend runs and why.",
            ("requested", "active", "reason", "profile"),
        )
        self.probe_check = self._gauge(
            "probe_check", "Checks of the start-up probe by backend and part: 1 passed, 0 failed.", ("check",)
        )

    def render(self) -> bytes:
        """The text exposition of all families; serve it as `content_type`."""
        return generate_latest(self.registry)

    def _gauge(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
        return Gauge(f"turbocache_{name}", text, labels, registry=self.registry)

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(f"turbocache_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"turbocache_{name}", text, (), buckets=buckets, registry=self.registry)
