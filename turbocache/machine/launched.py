"""What a launcher of several processes has told this one. Loads nothing of MLX."""

import os

_RANKS = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
"""Of mlx.launch, and of MPI's launchers."""


def is_launched() -> bool:
    """Whether this process was started as one rank of several."""
    return any(name in os.environ for name in _RANKS)


def launched_rank() -> int:
    """The rank that the launcher has given to this process, 0 without one."""
    return next((int(value) for name in _RANKS if (value := os.environ.get(name, "")).isdigit()), 0)
