"""Prometheus metrics of one app: a registry of its own, and an attribute for each metric family.

The tables of this package declare the families by subject. An attribute has its family's name, without the prefix
`turbocache_` and without a counter's suffix `_total`. Each family has one writer, so that nothing is counted twice:

- The HTTP side writes what whole requests and the event loop do: `http_requests`, `requests_finished`,
  `admission_refusals` (except the reason `later_sessions`), a request's times and sizes, `deadlines_exceeded` and
  `event_loop_*`. It sets `engine_up` at each scrape.
- The engine writes everything else.

Units are seconds, bytes and tokens. Label values come from closed sets, from the routes or from what the server finds
at its start. Text from users never becomes a label. Known label values are there from the start, at 0, so that a rate
sees the first event. docs/metrics.md is generated: `python -m server.metrics > docs/metrics.md`.
"""

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import choose_encoder

from server.metrics.engine import CacheMetrics, EngineMetrics
from server.metrics.families import PREFIX, Family, build_all
from server.metrics.requests import EventLoopMetrics, RequestMetrics
from server.metrics.sessions import DiskMetrics, SessionMetrics

__all__ = ["PREFIX", "Family", "Metrics"]


class Metrics(EngineMetrics, CacheMetrics, SessionMetrics, DiskMetrics, RequestMetrics, EventLoopMetrics):
    """All families. Safe to write from any thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.families = build_all(self, self.registry)
        self.exemplars = False
        """Whether latency histograms name a request for each bucket, for scrapers that ask for OpenMetrics."""
        # Memory, processor time and open files of the process, where the system has /proc.
        ProcessCollector(registry=self.registry)

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """All families and their content type, in the format that a scraper's Accept header asks for.

        The default is Prometheus' text format.
        """
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type

    def exemplar(self, request_id: str) -> dict[str, str] | None:
        """The exemplar for `Histogram.observe`."""
        return {"request_id": request_id} if self.exemplars else None
