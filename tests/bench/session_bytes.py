"""Bytes of one session's cache in half precision, over mlx-lm's own: `python -m tests.bench.session_bytes MODEL`.

Fills the caches with random keys and values of the model's geometry, as a prompt in chunks and one decode step. No
forward pass is needed, because bytes do not depend on what tokens say.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from turbocache.cache.ring import RingConfig
from turbocache.mlxlm.model import load_model
from turbocache.mlxlm.plan import LayerPlan, plan_layers
from turbocache.mlxlm.prompt_cache import leaves
from turbocache.presets import preset
from turbocache.store import CacheStore


def in_half(plans: Sequence[LayerPlan]) -> list[LayerPlan]:
    """The plans of the same model in float16."""
    return [
        replace(plan, geometry=replace(plan.geometry, dtype=mx.float16)) if plan.geometry is not None else plan
        for plan in plans
    ]


def fill(cache: Sequence[Any], plans: Sequence[LayerPlan], n_tokens: int, chunk: int) -> None:
    """Put `n_tokens` random tokens into the layers that the plans compress."""
    done = 0
    while done < n_tokens:
        n = min(chunk, n_tokens - 1 - done) or 1
        for layer, plan in zip(leaves(cache), plans, strict=True):
            if (g := plan.geometry) is not None:
                keys, values = (mx.random.normal((1, g.n_kv_heads, n, d)) for d in (g.key_dim, g.value_dim))
                layer.update_and_fetch(keys.astype(g.dtype), values.astype(g.dtype))
        mx.eval([layer.state for layer in cache])
        done += n


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.session_bytes")
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--presets", default="k4v4,k8v4")
    parser.add_argument("--backend", default="packed")
    options = parser.parse_args()
    model = load_model(options.model).model
    plans, ring = in_half(plan_layers(model)), RingConfig()
    own = make_prompt_cache(model)
    fill(own, plans, options.tokens, options.chunk)
    theirs = sum(layer.nbytes for layer in own)
    print(f"{options.tokens} tokens in mlx-lm's caches, float16: {theirs} bytes")
    n_pages = ring.pages_needed(options.tokens, options.chunk)
    for name in options.presets.split(","):
        store = CacheStore(model, plans, preset(name), options.backend, ring, n_pages)
        cache = store.new_cache()
        fill(cache, plans, options.tokens, options.chunk)
        held, n = store.held_nbytes(cache), sum(plan.compressed for plan in store.plans)
        print(f"{name}: {held} bytes, {held / theirs:.3f} of mlx-lm's; {n} of {len(plans)} layers compressed")
        for spec in store.specs:
            where = f"window of {spec.ring.max_size}" if spec.sliding else "plain attention"
            nbytes = spec.pool.n_used * spec.pool.page_nbytes + spec.raw_nbytes
            print(f"    {len(spec.layers)} layers with {where}: {spec.pool.n_used} pages, {nbytes} bytes")


if __name__ == "__main__":
    main()
