"""The time and the random names that the engine's decisions use.

The ranks of a group make the same decisions only if they see the same time and draw the same names. So rank 0 reads the
time once for each step, and all ranks draw names from a generator with the same seed.
"""

import random
import time

_APART = 1e-6


class StepClock:
    """The time of the current step, in seconds as `time.time` gives them. Each reading is 1 us later than the one
    before, so that last uses within a step keep their order.
    """

    def __init__(self, seed: int | None = None) -> None:
        self._random = random.Random(seed)
        self._now = time.time()

    def set(self, now: float) -> None:
        """Set the time at the beginning of a step. It never goes back."""
        self._now = max(now, self._now)

    def seed(self, seed: int) -> None:
        """Draw names from this seed."""
        self._random.seed(seed)

    def __call__(self) -> float:
        self._now += _APART
        return self._now

    def name(self) -> str:
        """Twelve random hexadecimal digits."""
        return f"{self._random.getrandbits(48):012x}"
