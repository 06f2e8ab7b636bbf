"""A llama of 8 layers, 4096 wide, random weights: decode and prefill over our cache and over mlx-lm's fp16 one."""

import statistics
import time
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.models.cache import make_prompt_cache

from kernels.layout import PAGE
from turbocache.backend import choose_backend
from turbocache.plan import plan_layers
from turbocache.presets import preset
from turbocache.ring import RingConfig
from turbocache.store import CacheStore

CHUNK = 2048
VOCABULARY = 32000


def make_model() -> Module:
    """Deterministic bfloat16 weights, scaled so that activations stay finite."""
    arguments = llama.ModelArgs(
        model_type="llama", hidden_size=4096, num_hidden_layers=8, intermediate_size=14336, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, rms_norm_eps=1e-5, vocab_size=VOCABULARY, rope_theta=500000.0,
        max_position_embeddings=1 << 20, tie_word_embeddings=False,
    )
    mx.random.seed(0)
    model = llama.Model(arguments)
    model.set_dtype(mx.bfloat16)
    mx.eval(model.parameters())
    return model


def prefill(model: Module, cache: list[Any], tokens: mx.array) -> float:
    """Seconds to take all tokens in, in chunks."""
    mx.synchronize()
    start = time.perf_counter()
    for at in range(0, tokens.size, CHUNK):
        model(tokens[None, at : at + CHUNK], cache=cache)
        mx.eval([layer.state for layer in cache])
    mx.synchronize()
    return time.perf_counter() - start


def decode(model: Module, cache: list[Any], n: int = 96) -> float:
    """Median milliseconds a token, one step always in flight as mlx-lm's generator does it."""
    y = mx.array([1])

    def step(y: mx.array) -> mx.array:
        return mx.argmax(model(y[None], cache=cache)[:, -1], axis=-1)

    y = step(y)
    mx.async_eval(y)
    times = []
    last = time.perf_counter()
    for _ in range(n):
        following = step(y)
        mx.async_eval(following)
        y.item()
        y = following
        now = time.perf_counter()
        times.append((now - last) * 1e3)
        last = now
    y.item()
    return statistics.median(times[8:])


def measure(model: Module, store: CacheStore | None, n_tokens: int) -> dict[str, float]:
    tokens = mx.random.randint(0, VOCABULARY, (n_tokens,), key=mx.random.key(1))
    mx.eval(tokens)
    cache = make_prompt_cache(model) if store is None else store.new_cache()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    seconds = prefill(model, cache, tokens)
    peak = mx.get_peak_memory() - before
    if store is None:
        held = sum(layer.nbytes for layer in cache)
    else:
        held = sum(layer.nbytes for layer in cache)
    result = {
        "tokens": n_tokens, "prefill_tokens_s": n_tokens / seconds, "prefill_peak_bytes": peak, "cache_bytes": held,
        "decode_ms": decode(model, cache),
    }
    del cache
    mx.clear_cache()
    return result


def run(lengths: tuple[int, ...] = (1024, 32768, 131072), preset_name: str = "k4v4") -> dict[str, Any]:
    model = make_model()
    weights = sum(w.nbytes for _, w in tree_flatten(model.parameters()))
    plans, chosen = plan_layers(model), preset(preset_name)
    backend = choose_backend("auto", plans, chosen)
    rows = []
    for n_tokens in lengths:
        sides = {"fp16": [], "ours": []}  # type: dict[str, list[dict[str, float]]]
        for _ in range(2 if n_tokens <= 32768 else 1):
            for side in sides:
                store = None
                if side == "ours":
                    store = CacheStore(model, plans, chosen, backend, RingConfig(64, 128), n_pages=n_tokens // PAGE + 8)
                sides[side].append(measure(model, store, n_tokens))
                del store
        best = {side: min(taken, key=lambda r: r["decode_ms"]) for side, taken in sides.items()}
        fastest = {side: max(r["prefill_tokens_s"] for r in taken) for side, taken in sides.items()}
        rows.append({
            "tokens": n_tokens,
            "decode_ms": {side: r["decode_ms"] for side, r in best.items()},
            "decode_speed": best["fp16"]["decode_ms"] / best["ours"]["decode_ms"],
            "prefill_tokens_s": fastest,
            "prefill_speed": fastest["ours"] / fastest["fp16"],
            "cache_bytes": {side: r["cache_bytes"] for side, r in best.items()},
            "cache_ratio": best["ours"]["cache_bytes"] / (n_tokens * 8 * 8 * 256 * 2),
            "peak_bytes": {side: r["prefill_peak_bytes"] for side, r in best.items()},
            "peak_ratio": best["ours"]["prefill_peak_bytes"] / best["fp16"]["prefill_peak_bytes"],
        })
    return {"backend": backend.name, "reason": backend.reason, "weights_bytes": weights, "rows": rows}
