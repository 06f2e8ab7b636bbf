"""Which way attention went, counted once a step: a layer's path depends on its lanes and the number of tokens only."""

from collections import Counter
from collections.abc import Sequence

from kernels.lanes.base import AttentionPath, Lanes

PATHS: tuple[str, ...] = ("fused", "packed", "expanded", "native")
"""Everything that `PathCounts` and `turbocache.mlxlm.seam.native_calls` count; the last is mlx-lm's own attention."""


class PathCounts:
    """Layers that have attended so far, by path, in `totals`."""

    def __init__(self, layers: Sequence[Lanes]) -> None:
        self.totals: Counter[AttentionPath] = Counter()
        self._layers = tuple(layers)
        self._of_step: dict[int | None, Counter[AttentionPath]] = {}

    def add(self, n_tokens: int | None) -> None:
        """One row's chunk of `n_tokens` goes through all layers, or, for None, a decode step of the whole batch."""
        if n_tokens not in self._of_step:
            self._of_step[n_tokens] = Counter(lanes.path(n_tokens) for lanes in self._layers)
        for path, n_layers in self._of_step[n_tokens].items():
            self.totals[path] += n_layers
