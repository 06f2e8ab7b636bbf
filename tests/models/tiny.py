"""Tiny models of random weights, of every architecture that mlx-lm has."""

import dataclasses
import importlib
import pkgutil
import sys
import types
from copy import deepcopy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
from mlx.nn.layers.base import Module
from mlx.utils import tree_unflatten
from mlx_lm.models.bitlinear_layers import BitLinear

from tests.models.configs import COMMON, OVERRIDES

SEED = 7
GAIN = 1.5
VOCABULARY: int = COMMON["vocab_size"]


def architectures() -> list[str]:
    """Every module of `mlx_lm.models` that has Model and ModelArgs, by name."""
    names = [module.name for module in pkgutil.iter_modules(mlx_lm.models.__path__)]
    return [name for name in names if all(hasattr(_module(name), part) for part in ("Model", "ModelArgs"))]


def build(name: str) -> Module:
    """A model of this architecture with random float32 weights, the same ones every time."""
    module = _module(name)
    config = {**deepcopy(COMMON), "model_type": name, **deepcopy(OVERRIDES.get(name, {}))}
    if any(field.name == "text_config" for field in dataclasses.fields(module.ModelArgs)):
        config["text_config"] = {**deepcopy(COMMON), "model_type": name, **deepcopy(OVERRIDES.get(name, {}))}
    mx.random.seed(SEED)
    model: Module = module.Model(module.ModelArgs.from_dict(config))
    _replace_metal_only_layers(model)
    model.set_dtype(mx.float32)
    for _, part in model.named_modules():
        _fill(part)
    mx.eval(model.parameters())
    model.eval()
    return model


def _module(name: str) -> Any:
    if name == "olmo":  # it looks for this package when it is imported, and uses nothing of it
        sys.modules.setdefault("hf_olmo", types.ModuleType("hf_olmo"))
    return importlib.import_module(f"mlx_lm.models.{name}")


def _fill(part: Module) -> None:
    """Weights large enough that logits depend on every key in sight, and something wherever a model starts with zeros
    (attention sinks, convolutions, heads).
    """
    for key, value in list(part.items()):
        if not isinstance(value, mx.array) or value.dtype != mx.float32:
            continue
        if key == "weight" and value.ndim in (2, 3):
            part[key] = mx.random.normal(value.shape) * GAIN / value.shape[-1] ** 0.5
        elif value.size > 1 and not mx.any(value).item():
            part[key] = mx.random.normal(value.shape) / value.shape[-1] ** 0.5
    if "_dummy_tokenizer_ids" in vars(part) or "_dummy_tokenizer_ids" in part:
        part._dummy_tokenizer_ids = mx.array([], dtype=mx.int32)  # tokens far beyond the tiny vocabulary


def _replace_metal_only_layers(model: Module) -> None:
    """BitNet's ternary products exist in Metal only; for its cache any linear layer does."""
    replaced = {
        name: nn.Linear(part.in_features, part.out_features, bias=part.bias is not None)
        for name, part in model.named_modules()
        if isinstance(part, BitLinear)
    }
    model.update_modules(tree_unflatten(list(replaced.items())))
