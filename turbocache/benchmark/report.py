"""Writes the benchmark's results as one JSON document and as Markdown."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from turbocache.benchmark.run import NOT_REACHED
from turbocache.benchmark.settings import Settings
from turbocache.documents import inline

SCHEMA = 1
"""Increases when a field changes its meaning. The device matrix reads files of this version only."""

_HEADS = (
    "cache",
    "tokens held",
    "prefill, tokens/s",
    "first token, s",
    "decode, tokens/s",
    "cache, MiB",
    "bytes a token",
    "peak, MiB",
    "sessions",
)

_LEGEND = """\
*tokens held*: what the next token sees of the prompt; a rotating cache has forgotten the rest. *prefill*: the prompt
but for its last token. *decode*: from the median step, all rows together. *cache*: bytes of all arrays of one session's
cache when its first token is out, unused slots, raw sink and window counted, and *bytes a token* that by the tokens
held. *peak*: what MLX held at most beyond the weights, from the prompt to the last token. *sessions*: how many such
caches fit into the budget. Where runs were repeated, a figure is their median, with least and most in brackets."""

_HALF = """\
This model computes in float32. In square brackets: the same where a model computes in half precision, so that tokens
kept as they are, or scales, take half of the bytes."""


def document(results: dict[str, Any], settings: Settings, command: str, load: Sequence[float]) -> dict[str, Any]:
    """The JSON file. `load`: load averages before and after. `remarks` are for people to add. The page shows them."""
    return {
        "schema": SCHEMA,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": command,
        **{name: results[name] for name in ("machine", "versions", "blas", "model", "backends")},
        "load": [round(value, 2) for value in load],
        "settings": {**settings.as_json(), "max_size": settings.rotating_ring.max_size},
        "remarks": [],
        "cases": results["cases"],
    }


def table(results: dict[str, Any], context: int) -> str:
    """The contenders at one context as a Markdown table, with reasons for those that did not run."""
    lines = ["| " + " | ".join(_HEADS) + " |", "|---|" + "---:|" * (len(_HEADS) - 1)]
    for case in (case for case in results["cases"] if case["context"] == context):
        if "unavailable" in case:
            reason = inline(case["unavailable"])
            text = reason if reason == NOT_REACHED else f"does not run: {reason}"
            lines.append(f"| {case['label']} | {text} |" + " |" * (len(_HEADS) - 2))
        else:
            lines.append(f"| {case['label']} | " + " | ".join(_cells(case, is_float32(results))) + " |")
    return "\n".join(lines)


def tables(results: dict[str, Any]) -> str:
    """The tables of all contexts with headings."""
    batch, budget = results["settings"]["batch"], size(results["settings"]["budget"])
    rows = "" if batch == 1 else f", {batch} rows"
    contexts = sorted({case["context"] for case in results["cases"]})
    return "\n\n".join(f"## {n:,} tokens{rows}, budget {budget}\n\n{table(results, n)}" for n in contexts)


def markdown(results: dict[str, Any], images: Sequence[str] = ()) -> str:
    """A page of results: machine, model, settings, the tables and their legend, backends and figures."""
    settings, model = results["settings"], results["model"]
    kind = f"{model['n_heads']}/{model['n_kv_heads']} heads of {model['head_dim']}" if model["n_heads"] else "no layer"
    parts = [
        f"# {results['machine']['device']}: {model['id']}, {results['date']}",
        f"    {results['command']}",
        f"{machine_line(results)}.",
        f"{model['id']} ({model['weights']}), {model['dtype']}, {size(model['parameter_bytes'])} of weights, "
        f"{model['compressed_layers']} of {model['layers']} layers compressed ({kind}). "
        f"Prompts in chunks of {settings['chunk']} tokens, {settings['generate']} tokens timed, "
        f"{settings['repeat']} of each run, in turn.",
        *(f"**{inline(remark)}**" for remark in results["remarks"]),
        tables(results),
        _LEGEND,
        *([_HALF] if is_float32(results) else []),
    ]
    notes = [f"- {name}: {inline(_backend(backend))}" for name, backend in results["backends"].items()]
    if notes:
        parts.append("Backends:\n\n" + "\n".join(notes))
    if model["notes"]:
        parts.append("The model: " + "; ".join(model["notes"]) + ".")
    parts += [f"![{name}]({name})" for name in images]
    return "\n\n".join(parts) + "\n"


def machine_line(results: dict[str, Any]) -> str:
    """Device, cores, memory, load and versions, in one line."""
    machine, versions = results["machine"], results["versions"]
    parts = [
        f"{machine['device']} ({machine['architecture']}, {size(machine['memory_bytes'])}), {machine['cores']} cores",
        f"{machine['system']}, Python {machine['python']}",
        f"mlx {versions['mlx']}, mlx-lm {versions['mlx-lm']}, turbocache {versions['turbocache']}",
    ]
    if results["blas"]:
        parts.append(f"BLAS {results['blas']}")
    if results["load"]:
        parts.append("load " + " before and ".join(f"{value:.1f}" for value in results["load"]) + " after")
    return "; ".join(parts)


def is_float32(results: dict[str, Any]) -> bool:
    return bool(results["model"]["dtype"] == "float32")


def size(nbytes: float) -> str:
    """A number of bytes with a unit."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= factor:
            return f"{nbytes / factor:.4g} {unit}"
    return f"{nbytes:g} bytes"


def _cells(case: dict[str, Any], half: bool) -> list[str]:
    def both(name: str, form: str, divisor: int = 1) -> str:
        other = f" [{case[f'{name}_half'] / divisor:{form}}]" if half else ""
        return f"{case[name] / divisor:{form}}{other}"

    return [
        f"{case['held_tokens']:,}",
        _spread(case["prefill_tokens_per_second"], ",.0f"),
        _spread(case["time_to_first_token_seconds"], ".3g"),
        _spread(case["decode_tokens_per_second"], ",.1f"),
        both("cache_bytes", ",.1f", 2**20),
        both("bytes_per_token", ",.0f"),
        _spread({name: value / 2**20 for name, value in case["peak_bytes"].items()}, ",.0f"),
        both("sessions_in_budget", ",.0f"),
    ]


def _spread(figures: dict[str, float], form: str) -> str:
    median, least, most = (format(figures[name], form) for name in ("median", "least", "most"))
    return median if least == most else f"{median} ({least}–{most})"


def _backend(backend: dict[str, Any]) -> str:
    return backend["unavailable"] if "unavailable" in backend else f"{backend['name']}: {backend['reason']}"
