"""A llama of 8 layers, 4096 wide, random weights: decode and prefill over our cache and over mlx-lm's fp16 one."""

import statistics
import time
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx_lm.models import llama
from mlx_lm.models.cache import make_prompt_cache

from kernels.codec.layout import PAGE
from turbocache.cache.ring import RingConfig
from turbocache.mlxlm.plan import plan_layers
from turbocache.presets import preset
from turbocache.store import CacheStore

CHUNK = 2048
VOCABULARY = 32000
ROUNDS = 6
"""Of decoding, each side in turn."""


def make_model() -> Module:
    """Deterministic bfloat16 weights, scaled so that activations stay finite."""
    arguments = llama.ModelArgs(
        model_type="llama",
        hidden_size=4096,
        num_hidden_layers=8,
        intermediate_size=14336,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        rms_norm_eps=1e-5,
        vocab_size=VOCABULARY,
        rope_theta=500000.0,
        max_position_embeddings=1 << 20,
        tie_word_embeddings=False,
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


def decode(model: Module, cache: list[Any], n: int = 48) -> list[float]:
    """Milliseconds of each token, one step always in flight as mlx-lm's generator does it."""
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
    return times[4:]


def new_cache(model: Module, store: CacheStore | None) -> list[Any]:
    return make_prompt_cache(model) if store is None else store.new_cache()


def measure(model: Module, store: CacheStore | None, n_tokens: int) -> tuple[dict[str, float], list[Any]]:
    """What taking in the tokens costs, and the cache."""
    tokens = mx.random.randint(0, VOCABULARY, (n_tokens,), key=mx.random.key(1))
    mx.eval(tokens)
    # Twice: cuDNN plans every length that it has not seen, which takes longer than the work.
    first = prefill(model, new_cache(model, store), tokens)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    cache = new_cache(model, store)
    seconds = prefill(model, cache, tokens)
    result = {
        "tokens": n_tokens,
        "prefill_tokens_s": n_tokens / seconds,
        "first_prefill_tokens_s": n_tokens / first,
        "prefill_peak_bytes": mx.get_peak_memory() - before,
        "cache_bytes": sum(layer.nbytes for layer in cache),
    }
    mx.clear_cache()
    return result, cache


def run(lengths: tuple[int, ...] = (32768, 1024, 131072), preset_name: str = "k4v4") -> Iterator[dict[str, Any]]:
    """A row for each length, both sides in turn; the first use of everything is not counted."""
    model = make_model()
    plans, chosen = plan_layers(model), preset(preset_name)
    backend = "metal" if mx.metal.is_available() else "cuda"

    def store(n_tokens: int) -> CacheStore:
        return CacheStore(model, plans, chosen, backend, RingConfig(64, 128), n_pages=n_tokens // PAGE + 8)

    for warm in (None, store(3 * CHUNK)):
        decode(model, measure(model, warm, 3 * CHUNK)[1])
    for n_tokens in lengths:
        fp16, fp16_cache = measure(model, None, n_tokens)
        ours, our_cache = measure(model, store(n_tokens), n_tokens)
        times: tuple[list[float], list[float]] = [], []
        for _ in range(ROUNDS):  # in turn, because a host's speed changes from second to second
            for found, cache in zip(times, (fp16_cache, our_cache), strict=True):
                found += decode(model, cache)
        del fp16_cache, our_cache, cache
        mx.clear_cache()
        fp16["decode_ms"], ours["decode_ms"] = map(statistics.median, times)
        yield {
            "tokens": n_tokens,
            "fp16": fp16,
            "ours": ours,
            "decode_speed": fp16["decode_ms"] / ours["decode_ms"],
            "prefill_speed": ours["prefill_tokens_s"] / fp16["prefill_tokens_s"],
            "first_prefill_speed": ours["first_prefill_tokens_s"] / fp16["first_prefill_tokens_s"],
            "cache_ratio": ours["cache_bytes"] / (n_tokens * 8 * 8 * 256 * 2),
            "peak_ratio": ours["prefill_peak_bytes"] / fp16["prefill_peak_bytes"],
        }
