"""The same server without metrics: `uvicorn tests.bench.unmetered:app`. Whatever is written into one goes nowhere."""

from typing import Any

from prometheus_client import Counter, Gauge, Histogram


def _nothing(self: Any, *_: Any, **__: Any) -> None: ...


def _itself(self: Any, *_: Any, **__: Any) -> Any:
    return self


for kind, writes in {Counter: ("inc",), Gauge: ("inc", "dec", "set"), Histogram: ("observe",)}.items():
    for name, instead in {**dict.fromkeys(writes, _nothing), "labels": _itself}.items():
        setattr(kind, name, instead)

from server.app import app  # noqa: E402

__all__ = ["app"]
