"""Makes the table of all measured devices and the runs' pages from the runs' JSON files."""

import json
import re
from pathlib import Path
from typing import Any

from turbocache.benchmark.report import SCHEMA, markdown, size
from turbocache.benchmark.settings import BenchmarkError
from turbocache.documents import write_text

FILE = "bench.json"
PAGE = "README.md"
_PRESET = "k4v4"
"""The preset that every run has."""
_COMPARED = ("kv", "quantized-4", _PRESET)
_BEGIN, _END = "<!-- matrix: made by turbocache bench --matrix -->", "<!-- end of matrix -->"
_HEADS = (
    "device",
    "model",
    "context",
    "bytes a token",
    "sessions in the budget",
    "prefill, tokens/s",
    "decode, tokens/s",
    "backend",
    "run",
)


def matrix(folder: Path) -> str:
    """The table of all runs `folder`/*/bench.json. Raises BenchmarkError without runs or for another version's."""
    files = sorted(folder.glob(f"*/{FILE}"))
    if not files:
        raise BenchmarkError(f"no */{FILE} in {str(folder)!r}")
    rows = [_row(_read(path), path.parent.name) for path in files]
    lines = ["| " + " | ".join(_HEADS) + " |", "|" + "---|" * len(_HEADS)]
    return "\n".join([*lines, *rows])


def page_of(path: Path) -> str:
    """The Markdown page of a run's JSON file, with the figures in its folder. Raises BenchmarkError."""
    return markdown(_read(path), sorted(image.name for image in path.parent.glob("*.png")))


def update(folder: Path) -> str:
    """Rewrite the pages of all runs and the table in `folder`/README.md. Returns the table. Raises BenchmarkError."""
    table, page = matrix(folder), folder / PAGE
    for path in folder.glob(f"*/{FILE}"):
        write_text(path.with_suffix(".md"), page_of(path))
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    between = re.compile(f"{re.escape(_BEGIN)}\n.*?{re.escape(_END)}", re.DOTALL)
    if not between.search(text):
        raise BenchmarkError(f"{str(page)!r} has no lines {_BEGIN!r} and {_END!r} for the table")
    write_text(page, between.sub(lambda _: f"{_BEGIN}\n\n{table}\n\n{_END}", text))
    return table


def _read(path: Path) -> dict[str, Any]:
    try:
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BenchmarkError(f"can't read {str(path)!r}: {error}") from error
    if not isinstance(results, dict) or results.get("schema") != SCHEMA:
        raise BenchmarkError(f"{str(path)!r} is no result of this version of turbocache bench")
    return results


def _row(results: dict[str, Any], folder: str) -> str:
    """A run's row, at the longest context at which full precision and the default preset ran."""
    machine, model = results["machine"], results["model"]
    ran = {(case["contender"], case["context"]): case for case in results["cases"] if "unavailable" not in case}
    both = [n for name, n in ran if name == _PRESET and ("kv", n) in ran]
    device = f"{machine['device']}, {machine['cores']} cores, {machine['system']}"
    backend = results["backends"].get(_PRESET, {}).get("name", "none")
    cells = [device, f"{model['id']}, {model['dtype']}"]
    if not both:
        cells += [f"{_PRESET} or KVCache did not run", *[""] * 4]
    else:
        context = max(both)
        cases = [ran.get((name, context)) for name in _COMPARED]
        cells += [
            f"{context:,}",
            _each([case and case["bytes_per_token"] for case in cases], ",.0f"),
            f"{_each([case and case['sessions_in_budget'] for case in cases], ',.0f')} "
            f"({size(results['settings']['budget'])})",
            *(
                _each([case and case[name]["median"] for case in cases], form)
                for name, form in (("prefill_tokens_per_second", ",.0f"), ("decode_tokens_per_second", ",.1f"))
            ),
        ]
    return "| " + " | ".join([*cells, backend, f"[{results['date']}]({folder}/bench.md)"]) + " |"


def _each(values: list[float | None], form: str) -> str:
    return " / ".join("-" if value is None else format(value, form) for value in values)
