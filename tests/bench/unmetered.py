"""The same server without metrics: `uvicorn tests.bench.unmetered:app`. Whatever is written into one goes nowhere."""

from typing import Any

from prometheus_client import Counter, Gauge, Histogram


def _nothing(self: Any, *_: Any, **__: Any) -> None: ...


for kind, writes in {Counter: ("inc",), Gauge: ("inc", "dec", "set"), Histogram: ("observe",)}.items():
    for write in writes:
        setattr(kind, write, _nothing)
    kind.labels = lambda self, *_, **__: self  # type: ignore[method-assign]

from server.app import app  # noqa: E402

__all__ = ["app"]
