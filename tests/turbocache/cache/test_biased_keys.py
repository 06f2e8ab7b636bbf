"""What large key biases do to a compressed cache, and that conditioning undoes it: whole models, by KL divergence."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np
import pytest
from mlx.nn.layers.base import Module
from mlx_lm.models import llama
from mlx_lm.models.cache import make_prompt_cache

from turbocache.cache.ring import RingConfig
from turbocache.mlxlm.model import LoadedModel, load_model
from turbocache.mlxlm.plan import plan_layers
from turbocache.presets import preset
from turbocache.store import CacheStore, fork

SHARED = Path(__file__).parents[3].parent / "shared"
KEYBIAS = SHARED / "models" / "tiny-keybias"


def log_probabilities(model: Module, tokens: list[int], cache: list[Any], cut: int = 256) -> np.ndarray:
    out = []
    for start in range(0, len(tokens), cut):
        logits = model(mx.array([tokens[start : start + cut]]), cache=cache)[0].astype(mx.float32)
        out.append(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        mx.eval(out[-1], [layer.state for layer in cache])
    return np.array(mx.concatenate(out))


def divergence(full: np.ndarray, other: np.ndarray) -> float:
    """Mean KL divergence in nats a token."""
    return float((np.exp(full) * (full - other)).sum(axis=-1).mean())


def store_of(
    model: Module, condition: bool, ring: RingConfig | None = None, lanes: Literal["reference", "packed"] = "reference"
) -> CacheStore:
    chosen = replace(preset("k4v4"), condition=condition)
    return CacheStore(model, plan_layers(model), chosen, lanes, ring or RingConfig(), 200)


@pytest.fixture(scope="module")
def biased() -> Module:
    """A llama of random weights whose first layer's keys have a bias on the slowest rotary pairs of one head."""
    mx.random.seed(11)
    model = llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=64,
            num_hidden_layers=2,
            intermediate_size=96,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            rms_norm_eps=1e-5,
            vocab_size=97,
            attention_bias=True,
            rope_theta=1e6,
        )
    )
    for _, module in model.named_modules():
        for name, weight in list(module.items()):
            if isinstance(weight, mx.array) and weight.ndim == 2:
                module[name] = mx.random.normal(weight.shape) * 1.5 / weight.shape[-1] ** 0.5
    bias = np.zeros(128, dtype=np.float32)
    bias[[30, 31, 62, 63]] = 100.0, -100.0, -100.0, 100.0
    model.model.layers[0].self_attn.k_proj.bias = mx.array(bias)
    mx.eval(model.parameters())
    return model


def test_the_damage_of_a_bias_is_undone(biased: Module) -> None:
    tokens = np.random.default_rng(0).integers(0, 97, size=600).tolist()
    full = log_probabilities(biased, tokens, make_prompt_cache(biased))
    cache = store_of(biased, condition=True).new_cache()
    conditioned = divergence(full, log_probabilities(biased, tokens, cache))
    damaged = divergence(full, log_probabilities(biased, tokens, store_of(biased, condition=False).new_cache()))
    assert damaged > 20 * conditioned
    centre = cache[0].batch.rings[0].centre
    assert centre.n_heads == 1
    assert set(centre.means) == {0}
    heads = np.abs(np.array(centre.means[0])).max(axis=(0, 2, 3))
    assert heads[0] > 90
    assert heads[1] == 0


def test_logits_of_a_biased_model_do_not_depend_on_how_tokens_came(biased: Module) -> None:
    """Chunks of any size, single tokens, and a fork that goes on by itself."""
    tokens = np.random.default_rng(1).integers(0, 97, size=330).tolist()
    store = store_of(biased, True, ring=RingConfig(4, 64, 290))
    whole = log_probabilities(biased, tokens, store.new_cache(), 330)
    chunked = log_probabilities(biased, tokens, store.new_cache(), 50)
    trunk = store.new_cache()
    head = log_probabilities(biased, tokens[:200], trunk, 1)
    branch = fork(trunk)
    log_probabilities(biased, tokens[:50], trunk)
    forked = np.concatenate([head, log_probabilities(biased, tokens[200:], branch, 7)])
    spread = np.abs(whole).max()
    for other in (chunked, forked):
        assert np.median(np.abs(other - whole)) < 1e-4 * spread
        assert np.abs(other - whole).max() < 2e-2 * spread


@pytest.mark.slow
@pytest.mark.skipif(not KEYBIAS.exists(), reason="needs ../shared/texts")
def test_a_model_whose_means_turn_away_is_not_harmed(bundled: LoadedModel) -> None:
    """The bundled model's means are those of slow rotary pairs. Few of its heads are centred, and none is worse off."""
    text = (SHARED / "texts" / "wiki.test.raw").read_text(encoding="utf8")[:8000]
    tokens = bundled.tokenizer.encode(text)[:1280]
    full = log_probabilities(bundled.model, tokens, make_prompt_cache(bundled.model))
    with_centre, without = (
        divergence(full, log_probabilities(bundled.model, tokens, store_of(bundled.model, condition).new_cache()))
        for condition in (True, False)
    )
    assert with_centre < 1.1 * without


@pytest.mark.skipif(not KEYBIAS.exists(), reason="needs ../shared/models/tiny-keybias")
def test_tiny_keybias() -> None:
    loaded = load_model(str(KEYBIAS))
    text = (SHARED / "texts" / "wiki.test.raw").read_text(encoding="utf8")[:8000]
    tokens = loaded.tokenizer.encode(text)[:1280]
    full = log_probabilities(loaded.model, tokens, make_prompt_cache(loaded.model))
    found = []
    for lanes in ("reference", "packed"):
        cache = store_of(loaded.model, condition=True, lanes=lanes).new_cache()
        found.append(divergence(full, log_probabilities(loaded.model, tokens, cache)))
        centre = cache[0].batch.rings[0].centre
        assert centre.n_heads >= 4
        assert {0, 5} <= set(centre.means)  # the layers with planted biases
    assert found[0] < 0.002
    assert found[1] < 1.5 * found[0]
    damaged = log_probabilities(loaded.model, tokens, store_of(loaded.model, condition=False).new_cache())
    assert divergence(full, damaged) > 0.2
