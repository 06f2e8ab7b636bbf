"""Writes the evaluation's results as one JSON document and as Markdown."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from kernels.probe.verdict import dtype_name
from turbocache.documents import inline, machine, versions
from turbocache.evaluation.rows import FULL, is_foreign
from turbocache.evaluation.run import Work
from turbocache.evaluation.suites.registry import suite_cells, weaknesses
from turbocache.evaluation.suites.suite import LEAST

_COLUMNS = (
    ("stored_bits", "bits", ".2f"),
    ("stored_bits_half", "bits, half", ".2f"),
    ("perplexity", "perplexity", ".3f"),
    ("kld_mean", "KLD mean", ".3g"),
    ("kld_p99", "KLD p99", ".3g"),
    ("top1", "top-1", ".2%"),
)

_STANDARD = "mlx-lm-4"
"""The row whose divergence is the unit of a column."""

_LEGEND = """\
*bits*: bytes of one session's cache at the end of a window, all counted (pages, scales, raw sink and window, unused
slots of what is allocated), by values of a full-precision cache. *bits, half*: the same for a model that computes in
half precision, whose raw tokens and scales take half of the bytes. *KLD*: KL divergence of the next token's
distribution from the full-precision cache's, over the whole vocabulary, in nats. *top-1*: how often the most likely
token is the same."""

_SUITES_LEGEND = f"""\
Suites, each against full precision. *drift*: long greedy answers that never end by themselves. *first*: tokens before
the first that differs, median of the answers; *equal N*: tokens that are the same in the same place, of the first N;
*loops N*: answers whose last tokens before N are half repetition; *KLD* and *top-1* along full precision's answer.
*facts*: numbers recalled, several in one answer. *sums*, *numbers*, *identifiers*, *URLs*: right to the last character.
*arguments*: of a tool call, copied exactly, free and under a grammar. *nats*: what a token of the right answers loses
in log-probability, and in brackets by how much it moves either way. *cycles*: KLD of the next tokens after ten times of
growing, forking, editing, spilling and restoring, from a fresh prefill of the same tokens over the same cache, with all
tokens kept and while rotating. A model is too small for a suite if full precision has under {LEAST:.0%} of it right."""


def document(work: Work, rows: Sequence[dict[str, Any]], command: str) -> dict[str, Any]:
    """The JSON file."""
    settings = work.settings
    return {
        "rows": list(rows),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": command,
        "model": work.loaded.id,
        "model_notes": list(work.loaded.notes),
        "dtype": dtype_name(work.loaded.dtype),
        "text": settings.text.name,
        "text_sha256": work.circumstances()["text_sha256"],
        "context": settings.context,
        "windows": len(work.windows),
        "score_from": settings.score_from,
        "scored_tokens": len(work.windows) * (settings.context - settings.score_from),
        "chunk": settings.chunk,
        "seed": settings.seed,
        "backend": settings.backend,
        "keep": list(settings.keep),
        "window": list(settings.window),
        "needles": None if settings.needles is None else [path.name for path in settings.needles] or "from the text",
        "suites": [run.suite.name for run in work.suites],
        **{name: getattr(settings, name) for name in ("suite_trials", "suite_context") if work.suites},
        "versions": versions(),
        "machine": machine(),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table. Columns without figures are left out."""
    columns = [column for column in _COLUMNS if any(column[0] in row for row in rows)]
    lengths = sorted({length for row in rows for length in row.get("needle", ())}, key=_length)
    standard = next((row.get("kld_mean") for row in rows if row["preset"] == _STANDARD), None)
    suite_heads, of_suites = suite_cells(rows)
    heads = [
        "preset",
        *(head for _, head, _ in columns),
        *([f"KLD / {_STANDARD}"] if standard else []),
        *(f"needle {length}" for length in lengths),
        *suite_heads,
    ]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row, suites in zip(rows, of_suites, strict=True):
        if "unavailable" in row:
            lines.append(f"| {row['preset']} | does not run: {inline(row['unavailable'])}" + " |" * (len(heads) - 1))
            continue
        cells = [_cell(row.get(name), form) for name, _, form in columns]
        if standard:
            kld = row.get("kld_mean")
            cells.append(_cell(None if kld is None else kld / standard, ".3f"))
        cells += [*(_needle_cell(row, length) for length in lengths), *suites]
        lines.append(f"| {row['preset']} | " + " | ".join(cells) + " |")
    notes = [f"- {line}." for line in weaknesses(rows)]
    return "\n".join([*lines, *(["", *notes] if notes else [])])


def markdown(results: dict[str, Any], images: Sequence[str] = ()) -> str:
    """A page of results: the settings, the table and its legend, comparisons and figures."""
    packages = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    host = results["machine"]
    parts = [f"# {results['model']}, {results['date']}", f"    {results['command']}"]
    if results["windows"]:
        parts.append(
            f"{results['windows']} windows of {results['context']} tokens of {results['text']}, scored from "
            f"{results['score_from']} ({results['scored_tokens']} tokens), in {results['dtype']}."
        )
    parts.append(
        f"{packages}. {host['device']} ({host['architecture']}), {host['cores']} cores, {host['system']}, "
        f"Python {host['python']}. Seed {results['seed']}."
    )
    parts += [table(results["rows"]), _LEGEND]
    if results.get("suites"):
        parts.append(_SUITES_LEGEND)
    compared = comparisons(results["rows"])
    if compared:
        parts.append("At no more bits (half):\n\n" + "\n".join(f"- {line}" for line in compared))
    notes = [f"- {row['preset']}: {inline(row['note'])}" for row in results["rows"] if row["note"]]
    if notes:
        parts.append("How the rows were stored:\n\n" + "\n".join(notes))
    parts += [f"![{name}]({name})" for name in images]
    return "\n\n".join(parts) + "\n"


def comparisons(rows: Sequence[dict[str, Any]]) -> list[str]:
    """For each cache of another project: the least divergence of a preset with at most the same bits."""
    measured = [row for row in rows if row.get("kld_mean") is not None and row["preset"] != FULL]
    lines = []
    for row in measured:
        if is_foreign(row["preset"]):
            bits, kld = row["stored_bits_half"], row["kld_mean"]
            within = [r for r in measured if not is_foreign(r["preset"]) and r["stored_bits_half"] <= bits]
            best = min(within, key=lambda r: r["kld_mean"], default=None)
            comparison = "no preset is as small"
            if best is not None:
                share = f", {best['kld_mean'] / kld:.2g} of it" if kld else ""
                comparison = f"{best['preset']} ({best['stored_bits_half']:.2f} bits) has {best['kld_mean']:.3g}{share}"
            lines.append(f"{row['preset']} ({bits:.2f} bits) has {kld:.3g}; {comparison}")
    return lines


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _needle_cell(row: dict[str, Any], length: str) -> str:
    if length not in row.get("needle", {}):
        return "-"
    cells = row["needle_cells"][length].values()
    return f"{row['needle'][length]:.1%} ({sum(correct for correct, _ in cells)}/{sum(asked for _, asked in cells)})"


def _length(context: str) -> tuple[int, str]:
    return (int(context), "") if context.isdigit() else (1 << 60, context)
