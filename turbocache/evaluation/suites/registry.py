"""All suites by name, and the runs of their tasks."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from turbocache.evaluation.journal import Journal, Progress
from turbocache.evaluation.rows import FULL, Row, result_or_reason
from turbocache.evaluation.settings import EvaluationError, Settings
from turbocache.evaluation.suites.arguments import ARGUMENTS
from turbocache.evaluation.suites.cycles import CYCLES
from turbocache.evaluation.suites.drift import DRIFT
from turbocache.evaluation.suites.facts import FACTS
from turbocache.evaluation.suites.suite import Figures, Suite, Task
from turbocache.evaluation.suites.sums import SUMS

SUITES = {suite.name: suite for suite in (DRIFT, FACTS, SUMS, ARGUMENTS, CYCLES)}


def suites_of(settings: Settings) -> list[Suite]:
    """The suites that the settings name. Raises EvaluationError for unknown names."""
    names = list(SUITES) if "all" in settings.suites else settings.suites
    for name in names:
        if name not in SUITES:
            raise EvaluationError(f"unknown suite {name!r}; there are all, {', '.join(SUITES)}")
    return [suite for name, suite in SUITES.items() if name in names]


@dataclass(frozen=True, slots=True)
class SuiteRun:
    """A suite with its tasks for one model."""

    suite: Suite
    tasks: Sequence[Task]

    def todo(self, rows: Sequence[Row], full: Row, done: Iterable[str]) -> int:
        """Tokens to read for the results that are missing."""
        have = set(done)
        return sum(task.n_tokens for task in self.tasks for row in self._all(rows, full) if _key(task, row) not in have)

    def run(self, rows: Sequence[Row], full: Row, journal: Journal, progress: Progress) -> None:
        """Do what the journal lacks: each task in full precision, then with every row."""
        for task in self.tasks:
            missing = [row for row in self._all(rows, full) if _key(task, row) not in journal.results]
            if missing and missing[0] is full:
                _measure(task, missing.pop(0), None, journal, progress)
            if missing:
                with task.reference(journal.results.get(_key(task, full))) as reference:
                    for row in missing:
                        _measure(task, row, reference, journal, progress)

    def figures(self, row: Row, full: Row, results: dict[str, Any]) -> Figures:
        """A row's figures. `absent` if the suite does not concern it, `unavailable` with the reason if it failed."""
        if not self._does(row):
            return {"absent": "no sessions"}
        mine, theirs = ([results.get(_key(task, one)) for task in self.tasks] for one in (row, full))
        for result in mine:
            if isinstance(result, dict) and "unavailable" in result:
                return {"unavailable": result["unavailable"]}
        return self.suite.figures(mine, theirs)

    def _does(self, row: Row) -> bool:
        return row.rotating is not None or not self.suite.own_only

    def _all(self, rows: Sequence[Row], full: Row) -> Iterator[Row]:
        return filter(self._does, [full, *rows])


def _key(task: Task, row: Row) -> str:
    return f"{task.key} {row.key}"


def _measure(task: Task, row: Row, reference: Any, journal: Journal, progress: Progress) -> None:
    progress.set_description(f"{task.key} {row.name}", refresh=False)
    journal.record(_key(task, row), result_or_reason(row, lambda: task.measure(row, reference)))
    progress.update(task.n_tokens)


def suite_cells(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The columns of all suites in a table's rows, and each row's cells for them."""
    heads: list[tuple[str, str]] = []
    cells: list[dict[tuple[str, str], str]] = []
    for row in rows:
        mine: dict[tuple[str, str], str] = {}
        for name, figures in row.get("suites", {}).items():
            if "absent" not in figures:
                mine |= {(name, head): text for head, text in SUITES[name].cells(figures).items()}
        cells.append(mine)
        heads += [head for head in mine if head not in heads]
    heads.sort(key=lambda head: list(SUITES).index(head[0]))

    def cell(row: dict[str, Any], mine: dict[tuple[str, str], str], head: tuple[str, str]) -> str:
        return mine.get(head) or row.get("suites", {}).get(head[0], {}).get("absent", "-")

    return [head for _, head in heads], [[cell(r, mine, h) for h in heads] for r, mine in zip(rows, cells, strict=True)]


def weaknesses(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Why the model is too small for suites, from the row of full precision."""
    full = next((row for row in rows if row["preset"] == FULL), {})
    return [
        line
        for name, figures in full.get("suites", {}).items()
        if "absent" not in figures
        for line in SUITES[name].weakness(figures)
    ]
