"""What a table of metrics is made of: a class attribute for each family, named as the family."""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

PREFIX = "turbocache_"
Unit = Literal["", "bytes", "seconds", "tokens", "pages", "sessions", "requests", "rows", "layers", "ratio"]
Labels = Mapping[str, tuple[str, ...]]
"""Each label with the values that are known before anything happens."""

M = TypeVar("M", Gauge, Counter, Histogram)

# `_created` series say when a counter began. Rates don't need that, and it doubles what is scraped. (The library gives
# this function no types.)
_without_created: Callable[[], None] = disable_created_metrics
_without_created()


@dataclass(frozen=True, slots=True)
class Family:
    name: str
    """As a query names it: with `turbocache_` and `_total`, without a histogram's suffixes."""
    type: Literal["gauge", "counter", "histogram"]
    labels: Labels
    """The values that are there from the start, at 0."""
    open: frozenset[str]
    """Labels that get more values while the server runs, from a small set too."""
    unit: Unit
    meaning: str


@dataclass(frozen=True, slots=True)
class _Declared:
    metric: Any
    meaning: str
    unit: Unit
    labels: Labels
    open: tuple[str, ...]
    options: dict[str, Any]

    def build(self, name: str, registry: CollectorRegistry) -> tuple[Family, Gauge | Counter | Histogram]:
        """The family, and its metric with the children that are known from the start."""
        name = f"{PREFIX}{name}_total" if self.metric is Counter else PREFIX + name
        known = {**self.labels, **{label: () for label in self.open if label not in self.labels}}
        metric = self.metric(name, self.meaning, list(known), registry=registry, **self.options)
        if known:
            for values in itertools.product(*known.values()):
                metric.labels(*values)
        kind = self.metric.__name__.lower()
        return Family(name, kind, known, frozenset(self.open), self.unit, self.meaning), metric


def gauge(meaning: str, unit: Unit = "", labels: Labels | None = None, open: tuple[str, ...] = ()) -> Gauge:
    return _declare(Gauge, meaning, unit, labels, open)


def counter(meaning: str, unit: Unit = "", labels: Labels | None = None, open: tuple[str, ...] = ()) -> Counter:
    return _declare(Counter, meaning, unit, labels, open)


def histogram(meaning: str, buckets: tuple[float, ...], unit: Unit = "seconds") -> Histogram:
    return _declare(Histogram, meaning, unit, buckets=buckets)


def _declare(
    metric: type[M], meaning: str, unit: Unit, labels: Labels | None = None, open: tuple[str, ...] = (), **options: Any
) -> M:
    """Typed as the metric that `build_all` sets on an instance, like `dataclasses.field`."""
    return cast(M, _Declared(metric, meaning, unit, labels or {}, open, options))


def build_all(tables: object, registry: CollectorRegistry) -> list[Family]:
    """Give an instance its own metric for each family that its bases declare. Returns the families in order."""
    families = []
    for table in type(tables).__bases__:
        for name, declared in vars(table).items():
            if isinstance(declared, _Declared):
                family, metric = declared.build(name, registry)
                families.append(family)
                setattr(tables, name, metric)
    return families
