"""The parts of a suite: tasks that every row does, figures from their results, and cells of the table."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from turbocache.evaluation.rows import Row, full_precision
from turbocache.evaluation.settings import Settings
from turbocache.evaluation.suites.answers import Reader
from turbocache.mlxlm.model import LoadedModel

Figures = dict[str, Any]
"""A row's figures of one suite, as in the JSON file."""

LEAST = 0.25
"""The least score of full precision with which a suite tells rows apart. Below it the model is too small for it."""


@dataclass(frozen=True, slots=True)
class Material:
    """What tasks are made from."""

    loaded: LoadedModel
    hay: list[int]
    """Tokens of the text, without special ones."""
    settings: Settings

    @property
    def full(self) -> Row:
        return full_precision(self.loaded.model)

    @property
    def reader(self) -> Reader:
        return Reader(self.loaded.model, self.loaded.tokenizer, self.settings.chunk)


class Task(ABC):
    """One part of a suite that every row does by itself. Tasks with the same key have the same results."""

    key: str
    n_tokens: int
    """Tokens that a row reads and writes, about."""

    @abstractmethod
    def measure(self, row: Row, reference: Any) -> Any:
        """The row's result, as JSON. `reference` is None for full precision itself."""

    def reference(self, full: Any) -> AbstractContextManager[Any]:
        """What rows are compared with, from full precision's result."""
        return nullcontext(full)


@dataclass(frozen=True, slots=True)
class Suite:
    """A named list of tasks, and how their results become figures and cells."""

    name: str
    make: Callable[[Material], Sequence[Task]]
    """Raises EvaluationError if the text is too short."""
    figures: Callable[[Sequence[Any], Sequence[Any]], Figures]
    """From a row's results and full precision's, one of each for a task."""
    cells: Callable[[Figures], dict[str, str]]
    """Texts of the table's cells, by column."""
    weakness: Callable[[Figures], list[str]] = lambda full: []
    """From full precision's figures: why the model is too small for parts of the suite."""
    own_only: bool = False
    """Whether only this project's caches can do it."""


def task_key(name: str, *parts: Any) -> str:
    """A task's name with a digest of everything that its results depend on besides the row and the circumstances."""
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]
    return f"{name}-{digest}"


def share(correct: int, asked: int) -> str:
    """A cell with a score."""
    return f"{correct}/{asked}"


def nats(results: Sequence[Any], full: Sequence[Any]) -> Figures:
    """How the log-probability of a token of the right answers differs from full precision's, of all `nats` of results.

    What is lost can be negative for a model that does not know the answers. What moved shows an error then as well.
    """
    mine, theirs = (np.concatenate([one["nats"] for one in side]) for side in (results, full))
    lost = theirs - mine
    return {"nats_lost": float(lost.mean()), "nats_moved": float(np.abs(lost).mean())}


def nats_cell(figures: Figures) -> str:
    return f"{figures['nats_lost']:.3g} ({figures['nats_moved']:.3g})"


def flat(results: Sequence[Sequence[Any]]) -> list[Any]:
    """The results of all questions, from those of each document."""
    return [one for document in results for one in document]


def score(results: Sequence[Any], full: Sequence[Any]) -> Figures:
    """Correct answers of all asked, and `nats`."""
    return {part: sum(one[part] for one in results) for part in ("correct", "asked")} | nats(results, full)


def too_small(what: str, correct: int, asked: int) -> list[str]:
    """The sentence for a model whose full-precision score is below `LEAST`, else nothing."""
    if correct >= LEAST * asked:
        return []
    return [f"{what}: full precision answers {correct} of {asked}: the model is too small"]
