"""This process's rank among the processes that a launcher started.

A module of its own, because server/app.py asks for the rank and must not load MLX.
"""

import os

_RANKS = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
"""Variables that mlx.launch and MPI's launchers set."""


def is_launched() -> bool:
    """Whether a launcher started this process as one rank of several."""
    return any(name in os.environ for name in _RANKS)


def launched_rank() -> int:
    """The rank that the launcher gave to this process, 0 without a launcher."""
    return next((int(value) for name in _RANKS if (value := os.environ.get(name, "")).isdigit()), 0)
