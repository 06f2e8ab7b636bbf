"""One row for each device that has been measured, made from the JSON files of its runs, and these runs' pages."""

import json
import re
from pathlib import Path
from typing import Any

from turbocache.benchmark.report import SCHEMA, markdown, size
from turbocache.benchmark.settings import BenchmarkError
from turbocache.documents import write_text
from turbocache.presets import DEFAULT_PRESET

FILE = "bench.json"
PAGE = "README.md"
_COMPARED = ("kv", "quantized-4", DEFAULT_PRESET)
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
    """The table of all runs below `folder`, each in a folder of its own with a `bench.json`, by the folders' names.

    Raises BenchmarkError where there is none, or one is no result of this version.
    """
    files = sorted(folder.glob(f"*/{FILE}"))
    if not files:
        raise BenchmarkError(f"no */{FILE} in {str(folder)!r}")
    rows = [_row(_read(path), path.parent.name) for path in files]
    lines = ["| " + " | ".join(_HEADS) + " |", "|" + "---|" * len(_HEADS)]
    return "\n".join([*lines, *rows])


def page_of(path: Path) -> str:
    """The Markdown page of a run from its JSON file, with the figures beside it. Raises BenchmarkError."""
    return markdown(_read(path), sorted(image.name for image in path.parent.glob("*.png")))


def update(folder: Path) -> str:
    """Make the pages of all runs below `folder` anew, and put the table into its README.md, between the marks; returns
    the table. Raises BenchmarkError.
    """
    made, page = matrix(folder), folder / PAGE
    for path in folder.glob(f"*/{FILE}"):
        write_text(path.with_suffix(".md"), page_of(path))
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    between = re.compile(f"{re.escape(_BEGIN)}\n.*?{re.escape(_END)}", re.DOTALL)
    if not between.search(text):
        raise BenchmarkError(f"{str(page)!r} has no lines {_BEGIN!r} and {_END!r} for the table")
    write_text(page, between.sub(lambda _: f"{_BEGIN}\n\n{made}\n\n{_END}", text))
    return made


def _read(path: Path) -> dict[str, Any]:
    try:
        told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BenchmarkError(f"can't read {str(path)!r}: {error}") from error
    if not isinstance(told, dict) or told.get("schema") != SCHEMA:
        raise BenchmarkError(f"{str(path)!r} is no result of this version of turbocache bench")
    return told


def _row(told: dict[str, Any], folder: str) -> str:
    """The longest context at which full precision and the default preset ran."""
    machine, model = told["machine"], told["model"]
    ran = {(case["contender"], case["context"]): case for case in told["cases"] if "unavailable" not in case}
    both = [n for name, n in ran if name == DEFAULT_PRESET and ("kv", n) in ran]
    device = f"{machine['device']}, {machine['cores']} cores, {machine['system']}"
    backend = told["backends"].get(DEFAULT_PRESET, {}).get("name", "none")
    cells = [device, f"{model['id']}, {model['dtype']}"]
    if not both:
        cells += [f"{DEFAULT_PRESET} or KVCache did not run", *[""] * 4]
    else:
        context = max(both)
        cases = [ran.get((name, context)) for name in _COMPARED]
        cells += [
            f"{context:,}",
            _each([case and case["bytes_per_token"] for case in cases], ",.0f"),
            f"{_each([case and case['sessions_in_budget'] for case in cases], ',.0f')} "
            f"({size(told['settings']['budget'])})",
            *(
                _each([case and case[name]["median"] for case in cases], form)
                for name, form in (("prefill_tokens_per_second", ",.0f"), ("decode_tokens_per_second", ",.1f"))
            ),
        ]
    return "| " + " | ".join([*cells, backend, f"[{told['date']}]({folder}/bench.md)"]) + " |"


def _each(values: list[float | None], form: str) -> str:
    return " / ".join("-" if value is None else format(value, form) for value in values)
