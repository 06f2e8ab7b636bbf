"""The benchmark's two figures, memory and speed, as PNG and SVG."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from turbocache.documents import figure_class, save_figures

Panel = tuple[str, str, str, Callable[[dict[str, Any]], float]]
"""Title, unit, scale of the axis, and a case's value."""

_SPEED: Sequence[Panel] = (
    ("prefill", "tokens/s", "linear", lambda case: case["prefill_tokens_per_second"]["median"]),
    ("decode", "tokens/s", "linear", lambda case: case["decode_tokens_per_second"]["median"]),
    ("first token", "s", "log", lambda case: case["time_to_first_token_seconds"]["median"]),
)
_MEMORY: Sequence[Panel] = (
    ("one session's cache", "MiB", "log", lambda case: case["cache_bytes"] / 2**20),
    ("peak beyond the weights", "MiB", "log", lambda case: case["peak_bytes"]["median"] / 2**20),
    ("sessions in the budget", "", "log", lambda case: case["sessions_in_budget"]),
)


def draw(results: dict[str, Any], folder: Path) -> list[str]:
    """Draw into `folder`. Returns the PNG files' names. Raises PlotsUnavailable and DocumentError."""
    new_figure = figure_class("plots")
    return save_figures(
        {"memory": _panels(new_figure, results, _MEMORY), "speed": _panels(new_figure, results, _SPEED)}, folder
    )


def _panels(new_figure: Any, results: dict[str, Any], panels: Sequence[Panel]) -> Any:
    """Panels with a line over contexts for each contender that ran. None if none ran."""
    ran = [case for case in results["cases"] if "unavailable" not in case]
    if not ran:
        return None
    figure = new_figure(figsize=(14, 5), layout="constrained")
    contexts = sorted({case["context"] for case in ran})
    every = figure.subplots(1, len(panels))
    for axes, (title, unit, scale, value) in zip(every, panels, strict=True):
        for i, label in enumerate(dict.fromkeys(case["label"] for case in ran)):
            mine = sorted((case for case in ran if case["label"] == label), key=lambda case: case["context"])
            style = {"marker": "o", "linestyle": "-"} if mine[0]["ours"] else {"marker": "s", "linestyle": "--"}
            values = [max(value(case), 1e-9) for case in mine]
            axes.plot([case["context"] for case in mine], values, color=f"C{i}", label=label, **style)
        axes.set(xscale="log", yscale=scale, xlabel="context (tokens)", ylabel=unit, title=title)
        axes.set_xticks(contexts, [f"{n:,}" for n in contexts])
        axes.set_xticks([], minor=True)
        if scale == "linear":  # from 0, so that a small difference looks small
            axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    every[0].legend(fontsize=8)
    model = results["model"]
    figure.suptitle(
        f"{results['machine']['device']}: {model['id']}, {model['dtype']}, batch {results['settings']['batch']}"
    )
    return figure
