"""What is asked of an evaluation, and the one error that says why it can't be done."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbocache.cache.ring import RingConfig


class EvaluationError(Exception):
    """The evaluation can't run as asked; the message is one sentence for the person who asked."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Sizes are in tokens. `rows` are row names as typed (`rows.py: expand_names` knows the groups among them).

    `keep` and `window` with several values are a sweep: each preset gets a row for every pair. `needles` is None for no
    needles, and empty for those that are made from the text; `lengths` None takes all that there are. `trials` is how
    many are asked of each length and depth: one number, or one for each of `lengths`.
    """

    text: Path
    rows: tuple[str, ...]
    context: int = 2048
    windows: int = 3
    score_from: int = 0
    chunk: int = 512
    seed: int = 0
    backend: str = "reference"
    keep: tuple[int, ...] = (RingConfig().keep,)
    window: tuple[int, ...] = (RingConfig().window,)
    needles: tuple[Path, ...] | None = None
    lengths: tuple[int, ...] | None = None
    depths: tuple[float, ...] = (0.1, 0.5, 0.9)
    trials: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Raises EvaluationError for sizes that mean nothing."""
        for name, least in (("context", 2), ("windows", 0), ("chunk", 1), ("score_from", 0)):
            if (value := getattr(self, name)) < least:
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

    def fingerprint(self) -> dict[str, Any]:
        """What results depend on, beside a row's key, a window's index and a needle's prompt: runs that agree here can
        go on from each other's results.
        """
        return {name: getattr(self, name) for name in ("context", "score_from", "chunk", "seed")}

    def trials_of(self, context: str) -> int | None:
        """Needles of each depth at this length; None for all that there are."""
        if self.trials is None or len(self.trials) == 1:
            return self.trials[0] if self.trials else None
        return dict(zip(map(str, self.lengths or ()), self.trials, strict=True))[context]

    @property
    def is_sweep(self) -> bool:
        return len(self.keep) * len(self.window) > 1
