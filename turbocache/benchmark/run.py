"""Runs a benchmark: a survey, then every case in its own process (turbocache/benchmark/worker.py)."""

import json
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from turbocache.benchmark.contenders import Contender, contenders
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
"""Figures that differ between runs, given as median, least and most."""
_SURVEY_SECONDS = 1800
"""Time for the probe to compile its kernels on a new device, and for a model to download."""
NOT_REACHED = "not measured: the benchmark was interrupted"
WORKER = (sys.executable, "-m", "turbocache.benchmark.worker")


class NoAnswer(Exception):
    """A process failed, ended or took too long. The message is the reason in its row."""


def ask(request: dict[str, Any], timeout: float) -> dict[str, Any]:
    """Run one request in a new process. Raises NoAnswer."""
    try:
        ended = subprocess.run(WORKER, input=json.dumps(request), capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise NoAnswer(f"ended after {timeout:g} seconds (--timeout)") from None
    lines = ended.stdout.splitlines()
    if ended.returncode or not lines:
        raise NoAnswer(_exit_reason(ended))
    answer: dict[str, Any] = json.loads(lines[-1])
    if "failed" in answer:
        raise NoAnswer(" ".join(answer["failed"].split()))
    found: dict[str, Any] = answer["found"]
    return found


def _exit_reason(ended: subprocess.CompletedProcess[str]) -> str:
    if ended.returncode < 0:
        name = signal.Signals(-ended.returncode).name
        return f"the process was ended by {name}" + (", as for want of memory" if name == "SIGKILL" else "")
    lines = ended.stderr.strip().splitlines()
    return f"the process ended with status {ended.returncode}: {lines[-1] if lines else 'without a word'}"


class Benchmark:
    """A benchmark and its results so far."""

    def __init__(self, settings: Settings, ask_worker: Ask | None = None) -> None:
        """Survey the machine and the model. Raises BenchmarkError without a model or for a context that is too long."""
        self._settings, self._ask = settings, ask_worker or ask
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
            # A backend that does not work here is not tried again.
            if "unavailable" in (backend := self._survey["backends"].get(contender.name, {})):
                self._fails(contender, backend["unavailable"], settings.contexts)

    def run(self) -> Iterator[str]:
        """Measure every case. Yields a line after each."""
        todo = list(_cases(self._contenders, self._settings))
        for i, (contender, context) in enumerate(todo):
            if (contender.name, context) not in self._failed:
                yield f"{i + 1}/{len(todo)}  {contender.label}, prompt of {context:,}: {self._run(contender, context)}"

    def results(self) -> dict[str, Any]:
        """The survey and `cases`, a row for each contender and context, also for those that were not reached."""
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
            figures = self._ask(request, self._settings.timeout)
        except NoAnswer as reason:
            # What mlx-lm lacks it lacks at any length.
            everywhere = str(reason).startswith(NotImplementedError.__name__)
            self._fails(contender, str(reason), self._settings.contexts if everywhere else [context])
            return str(reason)
        self._runs.setdefault((contender.name, context), []).append(figures)
        prefill, decode = figures["prefill_tokens_per_second"], figures["decode_tokens_per_second"]
        return f"prefill {prefill:,.0f}, decode {decode:,.1f} tokens/s"

    def _fails(self, contender: Contender, reason: str, contexts: Iterable[int]) -> None:
        self._failed |= {(contender.name, context): reason for context in contexts}

    def _row(self, contender: Contender, context: int) -> dict[str, Any]:
        """One contender at one context. A case that failed once has no figures."""
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
    """Every case once, then all again, because a machine's speed changes with time."""
    for _ in range(settings.repeat):
        for context in sorted(settings.contexts):
            for contender in chosen:
                yield contender, context


def _figures(runs: list[dict[str, Any]], held: int, budget: int) -> dict[str, Any]:
    nbytes, half = (max(run[name] for run in runs) for name in ("cache_bytes", "cache_bytes_half"))
    return {
        "cache_bytes": nbytes,
        "cache_bytes_half": half,
        "bytes_per_token": nbytes / held,
        "bytes_per_token_half": half / held,
        "sessions_in_budget": budget // nbytes,
        "sessions_in_budget_half": budget // half,
        **{name: _spread([run[name] for run in runs]) for name in MEASURED if name in runs[0]},
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}
