"""docs/metrics.md, generated from the tables: `python -m server.metrics > docs/metrics.md`."""

import sys

from server.metrics import Family, Metrics

_HEAD = """\
# Metrics

`GET /metrics` returns these families in Prometheus' text format, or in OpenMetrics where a scraper asks for it. The
address needs no API key, because it shows no session and no text. `TURBOCACHE_METRICS_EXEMPLARS=true` adds a request's
id to the buckets of latency histograms, for scrapers of OpenMetrics. It is off by default.

Counters begin at 0 with the process. Known label values are there from the start; `…` means that more may come.
Histograms have the suffixes `_bucket`, `_count` and `_sum`. Where the system has /proc, prometheus-client adds
`process_*`: memory, processor time and open files of the server's process. [monitoring.md](monitoring.md) describes the
dashboard, the alerts and the names that vLLM's dashboards use.

| name | type | labels | unit | meaning |
|---|---|---|---|---|
"""


def page() -> str:
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
    sys.stdout.write(page())
