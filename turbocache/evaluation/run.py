"""The evaluation itself: every row over every window and needle, each result kept as soon as it is there."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from turbocache.documents import versions
from turbocache.evaluation.divergence import TokenScores, summary
from turbocache.evaluation.journal import Journal
from turbocache.evaluation.needles import ANSWER_TOKENS, Needle, ask, load_needles, make_needles, recall
from turbocache.evaluation.rows import FULL, OpenCache, Row, RowMaker, RowUnavailable, expand_names, full_precision
from turbocache.evaluation.settings import EvaluationError, Settings
from turbocache.evaluation.storage import n_values
from turbocache.evaluation.text import Reading, ReferenceLogits, cut_windows, read_text
from turbocache.mlxlm.model import LoadedModel
from turbocache.store import checked_plans

DEFAULT_LENGTHS = (512, 1024, 2048, 4096)
DEFAULT_TRIALS = 5


class Progress(Protocol):
    """What a progress bar is told: what happens now, and tokens as they are done."""

    def set_description(self, desc: str, refresh: bool) -> object: ...

    def update(self, n: int, /) -> object: ...


@dataclass(frozen=True, slots=True)
class Work:
    """All that an evaluation of one model has to do."""

    loaded: LoadedModel
    settings: Settings
    text: str
    rows: list[Row]
    windows: list[list[int]]
    needles: list[Needle]

    @property
    def reading(self) -> Reading:
        return Reading(self.settings.chunk, self.settings.score_from)

    def circumstances(self) -> dict[str, Any]:
        """What a result depends on beside its key, for the journal."""
        parameters = cast(list[tuple[str, mx.array]], tree_flatten(self.loaded.model.parameters()))
        return {
            "model": self.loaded.id,
            "parameter_bytes": sum(value.nbytes for _, value in parameters),
            "dtype": str(self.loaded.dtype).removeprefix("mlx.core."),
            "text_sha256": hashlib.sha256(self.text.encode()).hexdigest(),
            **self.settings.fingerprint(),
            **versions(),
        }

    def todo(self, done: Iterable[str]) -> int:
        """Tokens to go through for what is not done yet."""
        have = set(done)
        tokens = 0
        for i, window in enumerate(self.windows):
            left = sum(_text_key(i, row.key) not in have for row in self.rows if row.name != FULL)
            tokens += len(window) * (left + 1) if left or _text_key(i, FULL) not in have else 0
        return tokens + sum(
            len(needle.ids) for needle in self.needles for row in self.rows if _needle_key(needle, row) not in have
        )


def prepare(loaded: LoadedModel, settings: Settings) -> Work:
    """Check everything that can be wrong before anything takes long. Raises EvaluationError."""
    names = expand_names(settings)
    text = read_text(settings.text)
    if settings.context > loaded.max_positions:
        raise EvaluationError(
            f"--context {settings.context} is longer than the {loaded.max_positions} positions of {loaded.id}"
        )
    windows = cut_windows(loaded.tokenizer, text, settings.context, settings.windows)
    needles = _needles(loaded, settings, text)
    maker = RowMaker(loaded.model, checked_plans(loaded.model), settings)
    return Work(loaded, settings, text, [maker.row(name) for name in names], windows, needles)


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
    found = [needle for path in settings.needles for needle in load_needles(path, loaded.tokenizer)]
    if settings.lengths is not None:
        found = [needle for needle in found if needle.context in {str(length) for length in settings.lengths}]
        if not found:
            raise EvaluationError("none of the needles in the files has one of the --lengths")
    longest = max(len(needle.ids) for needle in found)
    if longest > loaded.max_positions:
        raise EvaluationError(
            f"a needle's prompt has {longest} tokens, more than the {loaded.max_positions} positions of {loaded.id}: "
            "choose --lengths"
        )
    return _first_of_each_cell(found, settings)


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
    """Do what the journal does not have yet; returns the table's rows, `FULL` first."""
    mx.random.seed(work.settings.seed)
    for i in range(len(work.windows)):
        _read_window(work, i, journal, progress)
    for needle in work.needles:
        for row in work.rows:
            _ask(work, needle, row, journal, progress)
    full = full_precision(work.loaded.model)
    others = [row for row in work.rows if row.name != FULL]
    first = [full] if work.windows or len(others) < len(work.rows) else []
    return [table_row(work, row, journal.results) for row in [*first, *others]]


def _read_window(work: Work, i: int, journal: Journal, progress: Progress) -> None:
    """One window: full precision first, then every row against it, so that only one window's logits are kept."""
    rows = [row for row in work.rows if row.name != FULL and _text_key(i, row.key) not in journal.results]
    if not rows and _text_key(i, FULL) in journal.results:
        return
    window, model = work.windows[i], work.loaded.model
    progress.set_description(f"window {i + 1}/{len(work.windows)} {FULL}", refresh=False)
    opened = full_precision(model).open(len(window))
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


def _text_of(work: Work, row: Row, window: list[int], reference: ReferenceLogits, values: int) -> dict[str, Any]:
    try:
        opened = row.open(len(window))
        scores = reference.judge_cache(work.loaded.model, opened.layers, window, work.reading)
    except RowUnavailable as reason:
        return {"unavailable": str(reason)}
    except Exception as error:
        if not row.foreign:
            raise
        return {"unavailable": f"{type(error).__name__}: {error}"}
    return _text_result(scores, opened, values)


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
    try:
        opened = row.open(len(needle.ids) + ANSWER_TOKENS)
        result: Any = ask(work.loaded.model, work.loaded.tokenizer, opened.layers, needle, work.settings.chunk)
    except RowUnavailable as reason:
        result = {"unavailable": str(reason)}
    except Exception as error:
        if not row.foreign:
            raise
        result = {"unavailable": f"{type(error).__name__}: {error}"}
    journal.record(key, result)
    progress.update(len(needle.ids))


def table_row(work: Work, row: Row, results: dict[str, Any]) -> dict[str, Any]:
    """One line of the table, from the journal's results. What was not measured, or is no number, is None."""
    windows = [results[_text_key(i, row.key)] for i in range(len(work.windows)) if _text_key(i, row.key) in results]
    asked = [
        (needle, results[_needle_key(needle, row)]) for needle in work.needles if _needle_key(needle, row) in results
    ]
    reasons = [
        r["unavailable"]
        for r in [*windows, *(found for _, found in asked)]
        if isinstance(r, dict) and "unavailable" in r
    ]
    line: dict[str, Any] = {"preset": row.name, "note": row.note}
    if reasons:
        return line | {"unavailable": reasons[0]}
    if windows:
        last = windows[-1]
        line["stored_bits"] = 8 * last["nbytes"] / last["values"]
        line["stored_bits_half"] = 8 * last["half_nbytes"] / last["values"]
        line |= summary([_scores(result) for result in windows])
    outcomes: dict[tuple[str, float | None], list[bool]] = {}
    for needle, found in asked:
        outcomes.setdefault((needle.context, needle.depth), []).append(bool(found))
    if outcomes:
        line["needle"], line["needle_cells"] = recall(outcomes)
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
    """Where results are kept while a run is on its way to `json_path`."""
    return json_path.with_name(json_path.name + ".journal")
