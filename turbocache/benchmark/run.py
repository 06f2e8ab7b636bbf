"""The benchmark itself: a survey, then every case in turn, and the figures of each contender and context."""

import statistics
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from turbocache.benchmark import processes
from turbocache.benchmark.contenders import Contender, contenders
from turbocache.benchmark.processes import NoAnswer
from turbocache.benchmark.settings import BenchmarkError, Settings

Ask = Callable[[dict[str, Any], float], dict[str, Any]]

MEASURED = (
    "prefill_tokens_per_second",
    "first_prefill_tokens_per_second",
    "time_to_first_token_seconds",
    "decode_tokens_per_second",
    "decode_mean_tokens_per_second",
    "prefill_peak_bytes",
    "peak_bytes",
    "active_bytes",
    "process_peak_bytes",
)
"""Figures that differ from run to run: told as median, least and most."""
_SURVEY_SECONDS = 1800
"""A fresh device compiles for the probe, and a model may have to be downloaded."""
NOT_REACHED = "not measured: the benchmark was interrupted"


class Benchmark:
    """A benchmark on its way: what computes, and what each contender has shown so far at each context."""

    def __init__(self, settings: Settings, ask: Ask | None = None) -> None:
        """Survey the machine and the model; `ask` is for others than a process of its own. Raises BenchmarkError when
        the model can't be had or a context is too long for it.
        """
        self._settings, self._ask = settings, ask or processes.ask
        self._contenders = contenders(settings)
        try:
            request = {"settings": settings.as_json(), "task": "survey"}
            self._survey = self._ask(request, max(settings.timeout, _SURVEY_SECONDS))
        except NoAnswer as reason:
            raise BenchmarkError(str(reason)) from reason
        model, longest = self._survey["model"], max(settings.contexts)
        if longest > model["max_positions"]:
            raise BenchmarkError(
                f"--contexts {longest} is longer than the {model['max_positions']} positions of {model['id']}"
            )
        self._runs: dict[tuple[str, int], list[dict[str, Any]]] = {}
        self._failed: dict[tuple[str, int], str] = {}
        for contender in self._contenders:
            # No process needs to find out once more that a backend does not work here.
            if "unavailable" in (said := self._survey["backends"].get(contender.name, {})):
                self._fails(contender, said["unavailable"], settings.contexts)

    def run(self) -> Iterator[str]:
        """Measure every case; says a line after each."""
        todo = list(_cases(self._contenders, self._settings))
        for i, (contender, context) in enumerate(todo):
            if (contender.name, context) not in self._failed:
                yield f"{i + 1}/{len(todo)}  {contender.label}, prompt of {context:,}: {self._run(contender, context)}"

    def found(self) -> dict[str, Any]:
        """The survey's answer and `cases`, a row for each contender and context; what was not reached says so."""
        rows = [(contender, context) for context in sorted(self._settings.contexts) for contender in self._contenders]
        return self._survey | {"cases": [self._row(contender, context) for contender, context in rows]}

    def _run(self, contender: Contender, context: int) -> str:
        request = {
            "settings": self._settings.as_json(),
            "task": "case",
            "contender": contender.name,
            "context": context,
            "backend": self._survey["backends"].get(contender.name),
        }
        try:
            found = self._ask(request, self._settings.timeout)
        except NoAnswer as reason:
            # What mlx-lm does not have it does not have at any length.
            everywhere = str(reason).startswith(NotImplementedError.__name__)
            self._fails(contender, str(reason), self._settings.contexts if everywhere else [context])
            return str(reason)
        self._runs.setdefault((contender.name, context), []).append(found)
        prefill, decode = found["prefill_tokens_per_second"], found["decode_tokens_per_second"]
        return f"prefill {prefill:,.0f}, decode {decode:,.1f} tokens/s"

    def _fails(self, contender: Contender, reason: str, contexts: Iterable[int]) -> None:
        self._failed |= {(contender.name, context): reason for context in contexts}

    def _row(self, contender: Contender, context: int) -> dict[str, Any]:
        """One contender at one context. What failed once is not told as if it had run."""
        key = contender.name, context
        row: dict[str, Any] = {
            "contender": contender.name,
            "label": contender.label,
            "ours": contender.ours,
            "context": context,
            "held_tokens": contender.held(context),
        }
        runs = self._runs.get(key, [])
        if key in self._failed or not runs:
            return row | {"unavailable": self._failed.get(key, NOT_REACHED)}
        return row | _figures(runs, row["held_tokens"], self._settings.budget)


def _cases(chosen: list[Contender], settings: Settings) -> Iterator[tuple[Contender, int]]:
    """In turn, because a machine's speed changes from minute to minute: every contender once, then all again."""
    for _ in range(settings.repeat):
        for context in sorted(settings.contexts):
            for contender in chosen:
                yield contender, context


def _figures(runs: list[dict[str, Any]], held: int, budget: int) -> dict[str, Any]:
    nbytes, half = (max(found[name] for found in runs) for name in ("cache_bytes", "cache_bytes_half"))
    return {
        "cache_bytes": nbytes,
        "cache_bytes_half": half,
        "bytes_per_token": nbytes / held,
        "bytes_per_token_half": half / held,
        "sessions_in_budget": budget // nbytes,
        "sessions_in_budget_half": budget // half,
        **{name: _spread([found[name] for found in runs]) for name in MEASURED if name in runs[0]},
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}
