"""Whole models over the fused lanes, from a prompt's first token on: their logits against the reference lanes'."""

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from mlx_lm.models import llama

from turbocache.cache.ring import RingConfig
from turbocache.mlxlm.plan import plan_layers
from turbocache.mlxlm.prompt_cache import leaves
from turbocache.presets import preset
from turbocache.store import CacheStore

PROMPTS = (3, 40, 200, 700)
"""Tokens of the rows: without a page, within the window, with the first pages, with many."""
CHUNK, STEPS, VOCABULARY = 256, 6, 96
LIMITS = {mx.float32: 1e-2, mx.float16: 1e-2, mx.bfloat16: 3e-2}
"""Largest difference of logits relative to the largest one. One layer's limits are in kernels/probe/trials.py."""


def make_model(dtype: mx.Dtype, n_layers: int = 2, head_dim: int = 64) -> Module:
    """A small llama with random weights."""
    arguments = llama.ModelArgs(
        model_type="llama",
        hidden_size=64,
        num_hidden_layers=n_layers,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        rms_norm_eps=1e-5,
        vocab_size=VOCABULARY,
    )
    mx.random.seed(3)
    model = llama.Model(arguments)
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    return model


def logits(
    model: Module, backend: str, preset_name: str, ring: RingConfig, prompts: Sequence[int] = PROMPTS
) -> np.ndarray:
    """Last logits of each prompt by itself, then those of `STEPS` steps of all rows together, float32
    `[1 + STEPS, rows, VOCABULARY]`.
    """
    store = CacheStore(model, plan_layers(model), preset(preset_name), backend, ring, n_pages=64)
    caches, found = [], []
    for row, n_tokens in enumerate(prompts):
        tokens = mx.random.randint(0, VOCABULARY, (1, n_tokens), key=mx.random.key(row))
        cache = store.new_cache()
        for at in range(0, n_tokens, CHUNK):
            last = model(tokens[:, at : at + CHUNK], cache=cache)[:, -1]
            mx.eval(last, [layer.state for layer in leaves(cache)])
        caches.append(cache)
        found.append(last)
    steps = [mx.concatenate(found)]
    batch: list[Any] = [type(column[0]).merge(column) for column in zip(*caches, strict=True)]
    for step in range(STEPS):
        tokens = mx.arange(len(prompts))[:, None] * 7 + step
        steps.append(model(tokens, cache=batch)[:, -1])
    return np.array(mx.stack(steps).astype(mx.float32))


def error(model: Module, backend: str, preset_name: str, ring: RingConfig) -> float:
    """Largest difference from the reference lanes, relative to the largest logit; infinite if not all are finite."""
    want = logits(model, "reference", preset_name, ring)
    difference = float(np.abs(logits(model, backend, preset_name, ring) - want).max() / np.abs(want).max())
    return difference if np.isfinite(difference) else float("inf")


def run_all(backend: str) -> Iterator[dict[str, Any]]:
    """A row for each dtype and preset, with and without rotation."""
    for dtype, limit in LIMITS.items():
        for preset_name in ("k4v4", "k8v4", "turbo2_5"):
            for max_size in (None, 512):
                found = error(make_model(dtype, head_dim=128), backend, preset_name, RingConfig(64, 128, max_size))
                yield {
                    "case": f"generation, {preset_name}, {str(dtype).removeprefix('mlx.core.')}, max_size {max_size}",
                    "error": found,
                    "passed": found <= limit,
                }
