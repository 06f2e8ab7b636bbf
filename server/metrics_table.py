"""docs/metrics.md, made of the code: `python -m server.metrics_table > docs/metrics.md`."""

import sys

from server.metrics import Family, Metrics

_HEAD = """\
# Metrics

What `GET /metrics` has, in Prometheus' text format, or OpenMetrics where a scraper asks for it. The address needs no
API key: it names no session and has no text. `TURBOCACHE_METRICS_EXEMPLARS=true` adds a request's id to the buckets of
latency histograms, for scrapers of OpenMetrics; it is off by default.

Counters begin at 0 with the process, and what is known beforehand is there from the start. Histograms have the suffixes
`_bucket`, `_count` and `_sum`. Where the system has /proc, prometheus-client's `process_*` come besides: memory,
processor time and open files of the server's process. Dashboard, alerts and the names that vLLM's dashboards use are in
[monitoring.md](monitoring.md).

| name | type | labels | unit | meaning |
|---|---|---|---|---|
"""


def table() -> str:
    """The whole page."""
    return _HEAD + "".join(_row(family) for family in Metrics().families)


def _row(family: Family) -> str:
    labels = "; ".join(_label(family, name, values) for name, values in family.labels.items())
    return f"| `{family.name}` | {family.type} | {labels} | {family.unit} | {family.meaning} |\n"


def _label(family: Family, name: str, values: tuple[str, ...]) -> str:
    shown = [f"`{value}`" for value in values]
    if name in family.open and values:
        shown.append("…")
    return f"`{name}`" + (f": {', '.join(shown)}" if shown else "")


if __name__ == "__main__":
    sys.stdout.write(table())
