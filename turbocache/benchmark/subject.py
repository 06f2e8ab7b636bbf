"""The model of a benchmark: a real one, or random weights in a named geometry."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlx.nn.layers.base import Module

from kernels.attention.device import on_cpu
from kernels.probe.verdict import dtype_name
from turbocache.benchmark.settings import Settings
from turbocache.benchmark.shapes import DTYPES, MAX_POSITIONS, SHAPES, random_model
from turbocache.mlxlm.model import load_model, parameter_nbytes
from turbocache.mlxlm.plan import LayerPlan
from turbocache.models import BUNDLED
from turbocache.store import checked_plans


@dataclass(frozen=True, slots=True)
class Subject:
    """A model that is ready to generate, with the plans of its layers."""

    model: Module
    plans: list[LayerPlan]
    id: str
    weights: str
    dtype: str
    max_positions: int
    vocabulary: int
    """All prompt tokens are below it."""
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        geometries = [plan.geometry for plan in self.plans if plan.geometry is not None]
        first = geometries[0] if geometries else None
        return {
            "id": self.id,
            "weights": self.weights,
            "dtype": self.dtype,
            "parameter_bytes": parameter_nbytes(self.model),
            "layers": len(self.plans),
            "compressed_layers": len(geometries),
            "n_heads": first and first.n_heads,
            "n_kv_heads": first and first.n_kv_heads,
            "head_dim": first and first.key_dim,
            "max_positions": self.max_positions,
            "notes": list(self.notes),
        }


def make_subject(settings: Settings, planner: Callable[[Module], list[LayerPlan]] = checked_plans) -> Subject:
    """Load or make the model and plan its layers. Raises ModelError."""
    if settings.shape is None:
        loaded = load_model(settings.model or BUNDLED)
        model, dtype = loaded.model, dtype_name(loaded.dtype)
        vocabulary = int(loaded.tokenizer.vocab_size)
        plans = planner(model)
        return Subject(model, plans, loaded.id, "as loaded", dtype, loaded.max_positions, vocabulary, loaded.notes)
    shape = SHAPES[settings.shape]
    dtype = settings.dtype or ("float32" if on_cpu() else "bfloat16")
    model = random_model(shape, DTYPES[dtype], settings.weight_bits)
    bits = "" if settings.weight_bits is None else f", {settings.weight_bits} bits"
    weights = f"random{bits}: speed and memory are real, the text is not"
    plans = planner(model)
    return Subject(model, plans, f"{shape.like} geometry", weights, dtype, MAX_POSITIONS, shape.vocabulary, ())
