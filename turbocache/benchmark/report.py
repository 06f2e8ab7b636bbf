"""The benchmark's results as one JSON document and as Markdown."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from turbocache.benchmark.run import NOT_REACHED
from turbocache.benchmark.settings import Settings
from turbocache.documents import inline

SCHEMA = 1
"""Raised when a field changes its meaning; the device matrix reads files of this one only."""

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


def document(found: dict[str, Any], settings: Settings, command: str, load: Sequence[float]) -> dict[str, Any]:
    """All that the JSON file says. `load`: the system's load averages before and after; empty where it has none.
    `remarks` is for people: what a reader of the page must know about this run.
    """
    said = settings.as_json()
    return {
        "schema": SCHEMA,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": command,
        **{name: found[name] for name in ("machine", "versions", "blas", "model", "backends")},
        "load": [round(value, 2) for value in load],
        "settings": {**said, "max_size": settings.rotating_ring.max_size},
        "remarks": [],
        "cases": found["cases"],
    }


def contexts(told: dict[str, Any]) -> list[int]:
    return sorted({case["context"] for case in told["cases"]})


def table(told: dict[str, Any], context: int) -> str:
    """The contenders at one context as a Markdown table; what did not run says why."""
    lines = ["| " + " | ".join(_HEADS) + " |", "|---|" + "---:|" * (len(_HEADS) - 1)]
    for case in (case for case in told["cases"] if case["context"] == context):
        if "unavailable" in case:
            reason = inline(case["unavailable"])
            said = reason if reason == NOT_REACHED else f"does not run: {reason}"
            lines.append(f"| {case['label']} | {said} |" + " |" * (len(_HEADS) - 2))
        else:
            lines.append(f"| {case['label']} | " + " | ".join(_cells(case, is_float32(told))) + " |")
    return "\n".join(lines)


def tables(told: dict[str, Any]) -> str:
    """All contexts, each under its heading."""
    batch, budget = told["settings"]["batch"], size(told["settings"]["budget"])
    rows = "" if batch == 1 else f", {batch} rows"
    parts = [f"## {n:,} tokens{rows}, budget {budget}\n\n{table(told, n)}" for n in contexts(told)]
    return "\n\n".join(parts)


def markdown(told: dict[str, Any], images: Sequence[str] = ()) -> str:
    """A page of results: what was measured and on what, the tables, what their columns mean, and the figures."""
    settings, model = told["settings"], told["model"]
    kind = f"{model['n_heads']}/{model['n_kv_heads']} heads of {model['head_dim']}" if model["n_heads"] else "no layer"
    parts = [
        f"# {told['machine']['device']}: {model['id']}, {told['date']}",
        f"    {told['command']}",
        f"{machine_line(told)}.",
        f"{model['id']} ({model['weights']}), {model['dtype']}, {size(model['parameter_bytes'])} of weights, "
        f"{model['compressed_layers']} of {model['layers']} layers compressed ({kind}). "
        f"Prompts in chunks of {settings['chunk']} tokens, {settings['generate']} tokens timed, "
        f"{settings['repeat']} of each run, in turn.",
        *(f"**{inline(remark)}**" for remark in told["remarks"]),
        tables(told),
        _LEGEND,
        *([_HALF] if is_float32(told) else []),
    ]
    notes = [f"- {name}: {inline(_backend(said))}" for name, said in told["backends"].items()]
    if notes:
        parts.append("Backends:\n\n" + "\n".join(notes))
    if model["notes"]:
        parts.append("The model: " + "; ".join(model["notes"]) + ".")
    parts += [f"![{name}]({name})" for name in images]
    return "\n\n".join(parts) + "\n"


def machine_line(told: dict[str, Any]) -> str:
    """Device, cores, memory, load and versions, in one line."""
    machine, versions = told["machine"], told["versions"]
    said = [
        f"{machine['device']} ({machine['architecture']}, {size(machine['memory_bytes'])}), {machine['cores']} cores",
        f"{machine['system']}, Python {machine['python']}",
        f"mlx {versions['mlx']}, mlx-lm {versions['mlx-lm']}, turbocache {versions['turbocache']}",
    ]
    if told["blas"]:
        said.append(f"BLAS {told['blas']}")
    if told["load"]:
        said.append("load " + " before and ".join(f"{value:.1f}" for value in told["load"]) + " after")
    return "; ".join(said)


def is_float32(told: dict[str, Any]) -> bool:
    return bool(told["model"]["dtype"] == "float32")


def size(nbytes: float) -> str:
    """Bytes for people."""
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


def _spread(found: dict[str, float], form: str) -> str:
    median, least, most = (format(found[name], form) for name in ("median", "least", "most"))
    return median if least == most else f"{median} ({least}–{most})"


def _backend(said: dict[str, Any]) -> str:
    return said["unavailable"] if "unavailable" in said else f"{said['name']}: {said['reason']}"
