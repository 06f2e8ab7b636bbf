"""The time and the random names that the engine's decisions use.

The ranks of a group decide alike only if they see the same time and draw the same names. So both belong to the step:
rank 0 reads the time once for each, and all ranks draw from a generator of the same seed.
"""

import random
import time

_APART = 1e-6


class StepClock:
    """Seconds as `time.time` has them, as of the running step. Each reading is a little later than the one before, so
    that what is used later in a step counts as used later.
    """

    def __init__(self, seed: int | None = None) -> None:
        self._random = random.Random(seed)
        self._now = time.time()

    def set(self, now: float) -> None:
        """A step begins. Time does not go back."""
        self._now = max(now, self._now)

    def seed(self, seed: int) -> None:
        """From now on names are those of this seed."""
        self._random.seed(seed)

    def __call__(self) -> float:
        self._now += _APART
        return self._now

    def name(self) -> str:
        """Twelve hexadecimal digits that no other name of the process has."""
        return f"{self._random.getrandbits(48):012x}"
