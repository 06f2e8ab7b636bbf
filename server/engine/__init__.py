"""The engine: one thread owns every MLX object and all sessions. Code here runs on that thread unless it says more."""

from __future__ import annotations

from typing import TYPE_CHECKING

from server.errors import StartupError
from server.metrics import Metrics
from server.settings import Settings
from turbocache.mlxlm import UnsupportedVersion, check_version

if TYPE_CHECKING:
    from server.engine.engine import MlxEngine


def build_engine(settings: Settings, metrics: Metrics) -> MlxEngine:
    """An engine that is not yet started. Raises StartupError unless the installed mlx-lm is the tested version."""
    try:
        check_version()
    except UnsupportedVersion as error:
        raise StartupError(str(error)) from error
    # Here and not above: with another mlx-lm this import may fail.
    from server.engine.engine import MlxEngine

    return MlxEngine(settings, metrics)
