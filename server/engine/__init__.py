"""The engine: one thread owns every MLX object and all sessions. Code here runs on that thread unless it says more."""

from server.engine.engine import MlxEngine
from server.metrics import Metrics
from server.settings import Settings


def build_engine(settings: Settings, metrics: Metrics) -> MlxEngine:
    """An engine that is not yet started."""
    return MlxEngine(settings, metrics)
