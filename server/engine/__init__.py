"""The engine: one thread that owns every MLX object, and the sessions whose caches it keeps."""

from server.engine.engine import MlxEngine
from server.metrics import Metrics
from server.settings import Settings


def build_engine(settings: Settings, metrics: Metrics) -> MlxEngine:
    """An engine for the settings; `start` loads the model and begins to serve."""
    return MlxEngine(settings, metrics)
