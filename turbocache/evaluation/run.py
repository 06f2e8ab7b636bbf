"""Runs every row over every window and needle, and records each result at once."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from kernels.probe.verdict import dtype_name
from turbocache.documents import versions
from turbocache.evaluation.divergence import TokenScores, summary
from turbocache.evaluation.journal import Journal, Progress
from turbocache.evaluation.needles import ANSWER_TOKENS, Needle, ask, load_needles, make_needles, recall
from turbocache.evaluation.rows import FULL, OpenCache, Row, RowMaker, expand_names, full_precision, result_or_reason
from turbocache.evaluation.settings import EvaluationError, Settings
from turbocache.evaluation.storage import n_values
from turbocache.evaluation.suites.registry import SuiteRun, suites_of
from turbocache.evaluation.suites.suite import Material
from turbocache.evaluation.text import Reading, ReferenceLogits, cut_windows, read_text
from turbocache.mlxlm.model import LoadedModel, parameter_nbytes
from turbocache.store import checked_plans

DEFAULT_LENGTHS = (512, 1024, 2048, 4096)
DEFAULT_TRIALS = 5


@dataclass(frozen=True, slots=True)
class Work:
    """The work of an evaluation of one model."""

    loaded: LoadedModel
    settings: Settings
    text: str
    rows: list[Row]
    windows: list[list[int]]
    needles: list[Needle]
    suites: list[SuiteRun]

    @property
    def full(self) -> Row:
        return full_precision(self.loaded.model)

    @property
    def others(self) -> list[Row]:
        return [row for row in self.rows if row.name != FULL]

    @property
    def reading(self) -> Reading:
        return Reading(self.settings.chunk, self.settings.score_from)

    def circumstances(self) -> dict[str, Any]:
        """The values that all results depend on. Runs with the same values can share a journal."""
        return {
            "model": self.loaded.id,
            "parameter_bytes": parameter_nbytes(self.loaded.model),
            "dtype": dtype_name(self.loaded.dtype),
            "text_sha256": hashlib.sha256(self.text.encode()).hexdigest(),
            **{name: getattr(self.settings, name) for name in ("context", "score_from", "chunk", "seed")},
            **versions(),
        }

    def todo(self, done: Iterable[str]) -> int:
        """Tokens to read for the results that are missing."""
        have = set(done)
        tokens = 0
        for i, window in enumerate(self.windows):
            left = sum(_text_key(i, row.key) not in have for row in self.others)
            tokens += len(window) * (left + 1) if left or _text_key(i, FULL) not in have else 0
        tokens += sum(suite.todo(self.others, self.full, have) for suite in self.suites)
        return tokens + sum(
            len(needle.ids) for needle in self.needles for row in self.rows if _needle_key(needle, row) not in have
        )


def prepare(loaded: LoadedModel, settings: Settings) -> Work:
    """Check all inputs before the long work. Raises EvaluationError."""
    names = expand_names(settings)
    text = read_text(settings.text)
    if settings.context > loaded.max_positions:
        raise EvaluationError(
            f"--context {settings.context} is longer than the {loaded.max_positions} positions of {loaded.id}"
        )
    windows = cut_windows(loaded.tokenizer, text, settings.context, settings.windows)
    needles = _needles(loaded, settings, text)
    maker = RowMaker(loaded.model, checked_plans(loaded.model), settings)
    rows = [maker.row(name) for name in names]
    return Work(loaded, settings, text, rows, windows, needles, _suites(loaded, settings, text))


def _suites(loaded: LoadedModel, settings: Settings, text: str) -> list[SuiteRun]:
    if not settings.suites:
        return []
    if settings.suite_context > loaded.max_positions:
        raise EvaluationError(
            f"--suite-context {settings.suite_context} is longer than the {loaded.max_positions} positions of the model"
        )
    hay = list(loaded.tokenizer.encode(text, add_special_tokens=False, verbose=False))
    material = Material(loaded, hay, settings)
    return [SuiteRun(suite, suite.make(material)) for suite in suites_of(settings)]


def _needles(loaded: LoadedModel, settings: Settings, text: str) -> list[Needle]:
    if settings.needles is None:
        return []
    too_long = [length for length in settings.lengths or () if length > loaded.max_positions]
    if too_long:
        raise EvaluationError(
            f"--lengths {too_long[0]} is longer than the {loaded.max_positions} positions of the model"
        )
    if not settings.needles:
        lengths = settings.lengths or [n for n in DEFAULT_LENGTHS if n <= loaded.max_positions]
        trials = {length: settings.trials_of(str(length)) or DEFAULT_TRIALS for length in lengths}
        return make_needles(loaded.tokenizer, text, trials, settings.depths, settings.seed)
    needles = [needle for path in settings.needles for needle in load_needles(path, loaded.tokenizer)]
    if settings.lengths is not None:
        needles = [needle for needle in needles if needle.context in {str(length) for length in settings.lengths}]
        if not needles:
            raise EvaluationError("none of the needles in the files has one of the --lengths")
    longest = max(len(needle.ids) for needle in needles)
    if longest > loaded.max_positions:
        raise EvaluationError(
            f"a needle's prompt has {longest} tokens, more than the {loaded.max_positions} positions of {loaded.id}: "
            "choose --lengths"
        )
    return _first_of_each_cell(needles, settings)


def _first_of_each_cell(needles: Sequence[Needle], settings: Settings) -> list[Needle]:
    seen: dict[tuple[str, float | None], int] = {}
    kept = []
    for needle in needles:
        cell = needle.context, needle.depth
        seen[cell] = seen.get(cell, 0) + 1
        limit = settings.trials_of(needle.context)
        if limit is None or seen[cell] <= limit:
            kept.append(needle)
    return kept


def run(work: Work, journal: Journal, progress: Progress) -> list[dict[str, Any]]:
    """Measure what the journal lacks. Returns the table's rows, `FULL` first."""
    mx.random.seed(work.settings.seed)
    for i in range(len(work.windows)):
        _read_window(work, i, journal, progress)
    for needle in work.needles:
        for row in work.rows:
            _ask(work, needle, row, journal, progress)
    for suite in work.suites:
        suite.run(work.others, work.full, journal, progress)
    has_full = work.windows or work.suites or len(work.others) < len(work.rows)
    return [table_row(work, row, journal.results) for row in [*([work.full] if has_full else []), *work.others]]


def _read_window(work: Work, i: int, journal: Journal, progress: Progress) -> None:
    """Read one window in full precision, then with every row, so that one window's logits are kept at a time."""
    rows = [row for row in work.others if _text_key(i, row.key) not in journal.results]
    if not rows and _text_key(i, FULL) in journal.results:
        return
    window, model = work.windows[i], work.loaded.model
    progress.set_description(f"window {i + 1}/{len(work.windows)} {FULL}", refresh=False)
    opened = work.full.open(len(window))
    with ReferenceLogits(model, opened.layers, window, work.reading) as reference:
        values = n_values(opened.layers)
        if _text_key(i, FULL) not in journal.results:
            journal.record(_text_key(i, FULL), _text_result(reference.judge_itself(), opened, values))
        del opened
        progress.update(len(window))
        for row in rows:
            progress.set_description(f"window {i + 1}/{len(work.windows)} {row.name}", refresh=False)
            journal.record(_text_key(i, row.key), _text_of(work, row, window, reference, values))
            progress.update(len(window))


def _text_of(work: Work, row: Row, window: list[int], reference: ReferenceLogits, values: int) -> Any:
    def measure() -> dict[str, Any]:
        opened = row.open(len(window))
        scores = reference.judge_cache(work.loaded.model, opened.layers, window, work.reading)
        return _text_result(scores, opened, values)

    return result_or_reason(row, measure)


def _text_result(scores: TokenScores, opened: OpenCache, values: int) -> dict[str, Any]:
    stored = opened.stored()
    return {
        "kld": scores.kld.tolist(),
        "nll": scores.nll.tolist(),
        "agree": scores.agree.astype(int).tolist(),
        "nbytes": stored.nbytes,
        "half_nbytes": stored.half_nbytes,
        "values": values,
    }


def _ask(work: Work, needle: Needle, row: Row, journal: Journal, progress: Progress) -> None:
    key = _needle_key(needle, row)
    if key in journal.results:
        return
    progress.set_description(f"{needle.id} {row.name}", refresh=False)

    def measure() -> bool:
        opened = row.open(len(needle.ids) + ANSWER_TOKENS)
        return ask(work.loaded.model, work.loaded.tokenizer, opened.layers, needle, work.settings.chunk)

    journal.record(key, result_or_reason(row, measure))
    progress.update(len(needle.ids))


def table_row(work: Work, row: Row, results: dict[str, Any]) -> dict[str, Any]:
    """One line of the table from the journal's results. Figures that are not finite are None."""
    windows = [results[_text_key(i, row.key)] for i in range(len(work.windows)) if _text_key(i, row.key) in results]
    asked = [
        (needle, results[_needle_key(needle, row)]) for needle in work.needles if _needle_key(needle, row) in results
    ]
    reasons = [
        r["unavailable"]
        for r in [*windows, *(result for _, result in asked)]
        if isinstance(r, dict) and "unavailable" in r
    ]
    suites = {run.suite.name: run.figures(row, work.full, results) for run in work.suites}
    reasons += [figures["unavailable"] for figures in suites.values() if "unavailable" in figures]
    line: dict[str, Any] = {"preset": row.name, "note": row.note}
    if reasons:
        return line | {"unavailable": reasons[0]}
    if windows:
        last = windows[-1]
        line["stored_bits"] = 8 * last["nbytes"] / last["values"]
        line["stored_bits_half"] = 8 * last["half_nbytes"] / last["values"]
        line |= summary([_scores(result) for result in windows])
    outcomes: dict[tuple[str, float | None], list[bool]] = {}
    for needle, correct in asked:
        outcomes.setdefault((needle.context, needle.depth), []).append(bool(correct))
    if outcomes:
        line["needle"], line["needle_cells"] = recall(outcomes)
    if suites:
        sizes = ("stored_bits", "stored_bits_half")
        line |= {name: suites["drift"][name] for name in sizes if "drift" in suites and not windows}
        line["suites"] = suites
    return {
        name: None if isinstance(value, float) and not np.isfinite(value) else value for name, value in line.items()
    }


def _scores(result: dict[str, Any]) -> TokenScores:
    return TokenScores(*(np.array(result[part], dtype=np.float64) for part in ("kld", "nll", "agree")))


def _text_key(i: int, row_key: str) -> str:
    return f"window {i} {row_key}"


def _needle_key(needle: Needle, row: Row) -> str:
    return f"{needle.key} {row.key}"


def journal_path(json_path: Path) -> Path:
    """The journal of the run that writes `json_path`."""
    return json_path.with_name(json_path.name + ".journal")
