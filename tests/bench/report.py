"""Rows of the result: what was measured in pairs, the ratio, the target and whether it was met."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Target:
    """What the ratio ours / theirs must be."""

    sense: Literal["at least", "at most"]
    value: float

    def met(self, ratio: float) -> bool:
        """Whether `ratio` is on the right side, the bound included."""
        return ratio >= self.value if self.sense == "at least" else ratio <= self.value

    def __str__(self) -> str:
        return f"{'≥' if self.sense == 'at least' else '≤'} {self.value:g}×"


@dataclass(frozen=True, slots=True)
class Row:
    """One measure. `pairs` holds (ours, theirs) of each repetition, taken close together in time.

    `more` says whether more is better. The ratio is the median of the pairs' ratios, so that noise that lasts longer
    than a pair cancels. On a busy machine the ratio of the two best samples is steadier, so that stands beside it.
    """

    name: str
    unit: str
    digits: int
    more: bool
    pairs: Sequence[tuple[float, float]]
    target: Target | None
    note: str

    @property
    def ratios(self) -> list[float]:
        """ours / theirs, pair by pair."""
        return [ours / theirs for ours, theirs in self.pairs]

    @property
    def ratio(self) -> float:
        """The median of `ratios`."""
        return statistics.median(self.ratios)

    @property
    def medians(self) -> tuple[float, float]:
        """Median of ours and median of theirs."""
        ours, theirs = zip(*self.pairs, strict=True)
        return statistics.median(ours), statistics.median(theirs)

    @property
    def best_ratio(self) -> float:
        """Our best sample against their best."""
        best = max if self.more else min
        ours, theirs = zip(*self.pairs, strict=True)
        return float(best(ours) / best(theirs))

    @property
    def passed(self) -> bool | None:
        """Whether the target is met; None where there is none."""
        return None if self.target is None else self.target.met(self.ratio)

    def cells(self) -> list[str]:
        """The row of the table."""
        ours, theirs = self.medians
        spread = f" ({min(self.ratios):.2f}–{max(self.ratios):.2f})" if len(self.pairs) > 1 else ""
        verdict = {None: "", True: "pass", False: "**miss**"}[self.passed]
        return [
            f"{self.name}, {self.unit}",
            f"{ours:,.{self.digits}f}",
            f"{theirs:,.{self.digits}f}",
            f"{self.ratio:.2f}×{spread}",
            f"{self.best_ratio:.2f}×",
            str(self.target or ""),
            verdict,
            self.note,
        ]

    def as_json(self) -> dict[str, Any]:
        """The row with every sample."""
        ours, theirs = self.medians
        return {
            "name": self.name,
            "unit": self.unit,
            "ours": ours,
            "theirs": theirs,
            "ratio": self.ratio,
            "best_ratio": self.best_ratio,
            "ratio_min": min(self.ratios),
            "ratio_max": max(self.ratios),
            "target": None if self.target is None else str(self.target),
            "passed": self.passed,
            "pairs": [list(pair) for pair in self.pairs],
            "note": self.note,
        }


def markdown(rows: Sequence[Row], ours: str, theirs: str) -> str:
    """The table of all rows."""
    header = [
        "measure (medians)",
        ours,
        theirs,
        "ratio (least–most)",
        "best by best",
        "target",
        "",
        "what was compared",
    ]
    right = {1, 2, 3, 4}
    lines = ["| " + " | ".join(header) + " |"]
    lines.append("|" + "|".join(" ---: " if index in right else " --- " for index in range(len(header))) + "|")
    lines += ["| " + " | ".join(row.cells()) + " |" for row in rows]
    return "\n".join(lines)
