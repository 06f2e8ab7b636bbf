"""The settings of a benchmark and the error for invalid ones."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from turbocache.benchmark.shapes import SHAPES
from turbocache.cache.ring import RingConfig

AGAINST = {
    "kv": ("kv",),
    "rotating": ("rotating",),
    "quantized": ("quantized-8", "quantized-4"),
    "rotating-quantized": ("rotating-quantized-4",),
}
"""The words of `--against` and their contenders (turbocache/benchmark/contenders.py)."""

_UNITS = {"": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


class BenchmarkError(Exception):
    """The benchmark can't run as asked. The message is one sentence for the user."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Sizes are in tokens. Raises BenchmarkError for invalid values."""

    model: str | None = None
    """None: the bundled model, or random weights of `shape`."""
    shape: str | None = None
    weight_bits: int | None = None
    dtype: str | None = None
    contexts: tuple[int, ...] = (512, 2048)
    presets: tuple[str, ...] = ("k4v4", "turbo2_5")
    against: tuple[str, ...] = tuple(AGAINST)
    batch: int = 1
    budget: int = 4 << 30
    """Bytes for all sessions."""
    generate: int = 32
    """Tokens that are timed. A few before them are not."""
    repeat: int = 1
    warm_up: int | None = None
    """Tokens of each prompt that a warm-up reads. None: all on a GPU, which compiles kernels, and few on a CPU."""
    chunk: int = 512
    keep: int = RingConfig().keep
    window: int = RingConfig().window
    max_size: int | None = None
    """Tokens of every rotating cache. None: half of the shortest context."""
    backend: str = "auto"
    timeout: float = 600
    """Seconds for one process."""

    def __post_init__(self) -> None:
        for name in ("batch", "budget", "generate", "repeat", "chunk"):
            if getattr(self, name) < 1:
                raise BenchmarkError(f"--{name} must be at least 1, not {getattr(self, name)}")
        if self.warm_up is not None and self.warm_up < 2:
            raise BenchmarkError(f"--warm-up must be 2 tokens or more, not {self.warm_up}")
        if self.timeout <= 0:
            raise BenchmarkError(f"--timeout must be more than 0 seconds, not {self.timeout:g}")
        if not self.contexts or min(self.contexts) < 2:
            raise BenchmarkError("--contexts must be 2 tokens or more")
        if not self.presets and not self.against:
            raise BenchmarkError("nothing to measure: --presets and --against are both empty")
        self._check_model()
        for name in self.against:
            if name not in AGAINST:
                raise BenchmarkError(f"--against {name!r}: there are {', '.join(AGAINST)} and none")
        try:
            _ = self.ring, self.rotating_ring
        except ValueError as error:
            raise BenchmarkError(f"--keep, --window and --max-size: {error}") from error

    def _check_model(self) -> None:
        if self.shape is None:
            if self.weight_bits or self.dtype:
                raise BenchmarkError("--weight-bits and --dtype go with --shape; a model has its own")
        elif self.model is not None:
            raise BenchmarkError("--model and --shape exclude each other: a shape has random weights")
        elif self.shape not in SHAPES:
            raise BenchmarkError(f"--shape {self.shape!r}: there are {', '.join(SHAPES)}")

    @property
    def ring(self) -> RingConfig:
        """Sizes of this project's caches that do not rotate."""
        return RingConfig(self.keep, self.window)

    @property
    def rotating_ring(self) -> RingConfig:
        """Sizes of this project's rotating cache. mlx-lm's RotatingKVCache has the same `max_size`."""
        least = self.ring.smallest_max_size
        return RingConfig(self.keep, self.window, self.max_size or max(least, min(self.contexts) // 2))

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Settings":
        """The settings from `as_json`. JSON turns tuples into lists."""
        given: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in values.items()}
        return cls(**given)


def parse_bytes(text: str) -> int:
    """A number of bytes such as `4GiB`, `512 MB` or `1000000`. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"{text!r} is no number of bytes: expected one such as 4GiB, 512MiB or 8GB")
    return int(float(match[1]) * _UNITS[match[2]])
