"""The benchmark itself: a survey, then every case in turn, and the figures of each contender and context."""

import statistics
from collections.abc import Callable, Iterator
from typing import Any

from turbocache.benchmark.contenders import Contender, contenders
from turbocache.benchmark.processes import NoAnswer, ask
from turbocache.benchmark.settings import BenchmarkError, Settings

Ask = Callable[[dict[str, Any], float], dict[str, Any]]
Tell = Callable[[str], None]

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


def run(settings: Settings, tell: Tell, ask: Ask = ask) -> dict[str, Any]:
    """Measure; returns the survey's answer and `cases`. `tell` hears of each run. Raises BenchmarkError when the model
    can't be had or a context is too long for it.
    """
    chosen = contenders(settings)
    try:
        survey = ask({"settings": settings.as_json(), "task": "survey"}, settings.timeout)
    except NoAnswer as reason:
        raise BenchmarkError(str(reason)) from reason
    longest, limit = max(settings.contexts), survey["model"]["max_positions"]
    if longest > limit:
        raise BenchmarkError(f"--contexts {longest} is longer than the {limit} positions of {survey['model']['id']}")
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {}
    failed = _unavailable(chosen, survey, settings)
    todo = list(_cases(chosen, settings))
    for i, (contender, context) in enumerate(todo):
        key, name = (contender.name, context), f"{i + 1}/{len(todo)}  {contender.label}, {context} tokens"
        if key in failed:
            continue
        backend = survey["backends"].get(contender.name)
        request = {"settings": settings.as_json(), "task": "case", "contender": contender.name, "context": context}
        try:
            found = ask({**request, "backend": backend}, settings.timeout)
        except NoAnswer as reason:
            failed[key] = str(reason)
            tell(f"{name}: {reason}")
            continue
        runs.setdefault(key, []).append(found)
        tell(
            f"{name}: prefill {found['prefill_tokens_per_second']:.4g}, decode "
            f"{found['decode_tokens_per_second']:.4g} tokens/s"
        )
    rows = [(contender, context) for context in sorted(settings.contexts) for contender in chosen]
    cases = [
        _row(contender, context, settings, runs.get((contender.name, context), []), failed)
        for contender, context in rows
    ]
    return survey | {"cases": cases}


def _cases(chosen: list[Contender], settings: Settings) -> Iterator[tuple[Contender, int]]:
    """In turn, because a machine's speed changes from minute to minute: every contender once, then all again."""
    for _ in range(settings.repeat):
        for context in sorted(settings.contexts):
            for contender in chosen:
                yield contender, context


def _unavailable(chosen: list[Contender], survey: dict[str, Any], settings: Settings) -> dict[tuple[str, int], str]:
    """Contenders whose backend does not work here: no process needs to find that out once more."""
    backends = survey["backends"]
    return {
        (contender.name, context): backends[contender.name]["unavailable"]
        for contender in chosen
        if "unavailable" in backends.get(contender.name, ())
        for context in settings.contexts
    }


def _row(
    contender: Contender,
    context: int,
    settings: Settings,
    runs: list[dict[str, Any]],
    failed: dict[tuple[str, int], str],
) -> dict[str, Any]:
    """One contender at one context. What failed once is not told as if it had run."""
    row: dict[str, Any] = {
        "contender": contender.name,
        "label": contender.label,
        "ours": contender.ours,
        "context": context,
        "held_tokens": contender.held(context),
    }
    if (contender.name, context) in failed:
        return row | {"unavailable": failed[contender.name, context]}
    nbytes, half = (max(found[name] for found in runs) for name in ("cache_bytes", "cache_bytes_half"))
    return row | {
        "cache_bytes": nbytes,
        "cache_bytes_half": half,
        "bytes_per_token": nbytes / row["held_tokens"],
        "bytes_per_token_half": half / row["held_tokens"],
        "sessions_in_budget": settings.budget // nbytes,
        "sessions_in_budget_half": settings.budget // half,
        **{name: _spread([found[name] for found in runs]) for name in MEASURED if runs[0].get(name) is not None},
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}
