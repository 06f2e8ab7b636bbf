from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest
from mlx.nn.layers.base import Module
from mlx_lm.models import gpt_oss
from mlx_lm.models.cache import make_prompt_cache

from tests.conftest import build_gemma
from turbocache.mlxlm.plan import LayerGeometry, LayerPlan, all_native, plan_layers


def test_plain_attention_is_compressed_with_the_geometry_that_reaches_the_cache(
    tiny_llama: Module, tiny_qwen3: Module
) -> None:
    want = LayerPlan("PagedKVCache", LayerGeometry(4, 2, 64, 64, mx.float32), "plain attention")
    assert plan_layers(tiny_llama) == [want, want]
    assert {plan.geometry for plan in plan_layers(tiny_qwen3)} == {LayerGeometry(6, 2, 80, 80, mx.float32)}


def test_the_dtype_is_the_one_of_the_keys(llama_of: Callable[..., Module]) -> None:
    model = llama_of()
    model.set_dtype(mx.bfloat16)
    assert [plan.geometry.dtype for plan in plan_layers(model) if plan.geometry] == [mx.bfloat16] * 2


def test_layers_with_a_sliding_window_are_compressed() -> None:
    plans = plan_layers(build_gemma(window=512))
    geometry = LayerGeometry(4, 2, 64, 64, mx.float32)
    sliding = LayerPlan("PagedKVCache", geometry, "sliding window of 512 tokens", max_tokens=512)
    assert plans == [sliding, sliding, LayerPlan("PagedKVCache", geometry, "plain attention")]
    assert [plan.window for plan in plans] == [512, 512, None]
    assert [plan.native_nbytes(1000) for plan in plans] == [0, 0, 0]


def test_short_sliding_windows_keep_mlx_lms_cache_and_say_why(gemma: Module) -> None:
    plans = plan_layers(gemma)
    assert [plan.compressed for plan in plans] == [False, True, False, True]
    assert plans[0].kind == "RotatingKVCache"
    assert plans[0].reason == "a sliding window of 32 tokens is too small for pages to pay"
    assert plans[0].max_tokens == 32
    per_token = 2 * 2 * 64 * 4
    assert plans[0].native_nbytes(10) == 10 * per_token
    assert plans[0].native_nbytes(1000) == 32 * per_token
    assert plans[1].native_nbytes(1000) == 0


def test_attention_sinks_are_seen() -> None:
    args = {
        "model_type": "gpt_oss",
        "num_hidden_layers": 2,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 64,
        "head_dim": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": 16,
    }
    plans = plan_layers(gpt_oss.Model(gpt_oss.ModelArgs(**args)))
    assert [plan.compressed for plan in plans] == [False, True]
    assert [plan.geometry.sinks for plan in plans if plan.geometry] == [True]


class _Detour(Module):
    """A model whose attention does not come through mlx-lm's shared function."""

    def __init__(self, inner: Module) -> None:
        super().__init__()
        self.inner = inner
        self.layers = inner.layers

    def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        out = mx.zeros((1, tokens.shape[1], 97))
        for layer in cache:
            keys, values = layer.update_and_fetch(*(mx.ones((1, 2, tokens.shape[1], 64)) for _ in range(2)))
            out = out + mx.fast.scaled_dot_product_attention(keys, keys, values, scale=1.0).sum()
        return out


def test_attention_that_goes_another_way_is_left_alone(tiny_llama: Module) -> None:
    plans = plan_layers(_Detour(tiny_llama))
    assert [plan.compressed for plan in plans] == [False, False]
    assert plans[0].kind == "KVCache"
    assert "does not pass through" in plans[0].reason


def test_all_native_keeps_reasons_of_native_layers(gemma: Module) -> None:
    plans = all_native(plan_layers(gemma), "because")
    assert [plan.kind for plan in plans] == ["RotatingKVCache", "KVCache"] * 2
    assert [plan.reason for plan in plans][:2] == [
        "a sliding window of 32 tokens is too small for pages to pay",
        "because",
    ]
    assert plans[1].native_nbytes(10) == 10 * 2 * 2 * 64 * 4


@pytest.mark.parametrize("window", [32, 512])
def test_native_caches_cost_what_the_plan_says(window: int) -> None:
    gemma = build_gemma(window)
    plans = all_native(plan_layers(gemma), "because")
    cache = make_prompt_cache(gemma)
    assert [plan.kind for plan in plans] == [type(layer).__name__ for layer in cache]
    assert [plan.max_tokens for plan in plans] == [window, window, None]
    gemma(mx.array([[1] * 500]), cache=cache)
    for _ in range(3):
        mx.eval(gemma(mx.array([[1]]), cache=cache))
    for plan, layer in zip(plans, cache, strict=True):
        per_token = layer.nbytes // layer.keys.shape[2]
        assert plan.token_nbytes == per_token
