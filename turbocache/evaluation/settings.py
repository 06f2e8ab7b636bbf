"""The settings of an evaluation and the error for invalid ones."""

from dataclasses import dataclass
from pathlib import Path

from turbocache.cache.ring import RingConfig


class EvaluationError(Exception):
    """The evaluation can't run as asked. The message is one sentence for the user."""


_LEAST = {
    **{"context": 2, "windows": 0, "chunk": 1, "score_from": 0},
    **{"suite_trials": 1, "suite_context": 1, "answer_lengths": 8},
}


@dataclass(frozen=True, slots=True)
class Settings:
    """Sizes are in tokens. Raises EvaluationError for invalid values."""

    text: Path
    rows: tuple[str, ...]
    """Row names and groups as typed (`rows.py: expand_names`)."""
    context: int = 2048
    windows: int = 3
    score_from: int = 0
    chunk: int = 512
    seed: int = 0
    backend: str = "reference"
    keep: tuple[int, ...] = (RingConfig().keep,)
    """Several values of `keep` or `window` are a sweep: each preset gets a row for each pair."""
    window: tuple[int, ...] = (RingConfig().window,)
    needles: tuple[Path, ...] | None = None
    """Files. Empty: made from the text. None: no needles."""
    lengths: tuple[int, ...] | None = None
    """None: all lengths."""
    depths: tuple[float, ...] = (0.1, 0.5, 0.9)
    trials: tuple[int, ...] | None = None
    """Needles for each length and depth: one number, or one for each of `lengths`."""

    suites: tuple[str, ...] = ()
    """Names of suites as typed (`suites/registry.py`)."""
    suite_trials: int = 1
    """Documents of each suite, and long answers."""
    suite_context: int = 768
    """Tokens of a document with a question."""
    answer_lengths: tuple[int, ...] = (150, 300)
    """Lengths at which long answers are compared."""

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            given = getattr(self, name)
            for value in given if isinstance(given, tuple) else (given,):
                if value < least:
                    raise EvaluationError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
        if self.score_from >= self.context:
            raise EvaluationError(
                f"--score-from {self.score_from} leaves nothing to score in a context of {self.context} tokens"
            )
        if self.trials is not None and min(self.trials) < 1:
            raise EvaluationError(f"--trials must be at least 1, not {min(self.trials)}")
        if self.trials is not None and len(self.trials) not in (1, len(self.lengths or ())):
            raise EvaluationError(f"--trials has {len(self.trials)} numbers: give one, or one for each of --lengths")
        if any(not 0 <= depth <= 1 for depth in self.depths):
            raise EvaluationError("--depths are shares of the context, from 0 to 1")
        for keep in self.keep:
            for window in self.window:
                try:
                    RingConfig(keep, window)
                except ValueError as error:
                    raise EvaluationError(f"--keep and --window: {error}") from error

    def trials_of(self, context: str) -> int | None:
        """Needles of each depth at this length. None: all."""
        if self.trials is None or len(self.trials) == 1:
            return self.trials[0] if self.trials else None
        return dict(zip(map(str, self.lengths or ()), self.trials, strict=True))[context]
