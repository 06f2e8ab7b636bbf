"""Shared fixtures. `turbocache` comes first: its import puts the fast BLAS in front of MLX."""

import turbocache  # noqa: F401, I001  (before everything that imports mlx)

from collections.abc import Callable

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, settings
from mlx.nn.layers.base import Module
from mlx_lm.models import gemma3_text, llama, qwen3

from turbocache.mlxlm.model import LoadedModel, load_model
from turbocache.models import BUNDLED

# Official clients run in an environment of their own: make test-clients.
collect_ignore = ["clients"]

# The same examples every time, and no limit of time for a single one: CI machines pause.
settings.register_profile(
    "project",
    deadline=None,
    derandomize=True,
    max_examples=25,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("project")


@pytest.fixture(scope="session")
def bundled() -> LoadedModel:
    """The model that comes with the package; in float32 on a CPU."""
    return load_model(BUNDLED)


def _random_weights(model: Module) -> Module:
    """Weights large enough that the answer depends on every key in sight."""
    mx.random.seed(7)
    model.set_dtype(mx.float32)
    for _, module in model.named_modules():
        for name, weight in list(module.items()):
            if isinstance(weight, mx.array) and weight.ndim == 2:
                module[name] = mx.random.normal(weight.shape) * 1.5 / weight.shape[-1] ** 0.5
    mx.eval(model.parameters())
    return model


def build_llama(n_layers: int = 2, n_heads: int = 4, n_kv_heads: int = 2, head_dim: int = 64) -> Module:
    """A llama of random float32 weights, vocabulary 97."""
    return _random_weights(
        llama.Model(
            llama.ModelArgs(
                model_type="llama",
                hidden_size=64,
                num_hidden_layers=n_layers,
                intermediate_size=96,
                num_attention_heads=n_heads,
                num_key_value_heads=n_kv_heads,
                head_dim=head_dim,
                rms_norm_eps=1e-5,
                vocab_size=97,
            )
        )
    )


@pytest.fixture(scope="session")
def tiny_llama() -> Module:
    """Two layers, GQA 4/2, head dim 64."""
    return build_llama()


@pytest.fixture(scope="session")
def llama_of() -> Callable[..., Module]:
    """`build_llama` for tests that need another shape."""
    return build_llama


@pytest.fixture(scope="session")
def tiny_qwen3() -> Module:
    """Two layers, GQA 6/2, head dim 80 (not a power of two), query and key norms."""
    return _random_weights(
        qwen3.Model(
            qwen3.ModelArgs(
                model_type="qwen3",
                hidden_size=64,
                num_hidden_layers=2,
                intermediate_size=96,
                num_attention_heads=6,
                rms_norm_eps=1e-6,
                vocab_size=97,
                num_key_value_heads=2,
                max_position_embeddings=4096,
                head_dim=80,
                tie_word_embeddings=True,
                rope_theta=10000.0,
            )
        )
    )


def build_gemma(window: int, n_layers: int = 3, pattern: int = 3) -> Module:
    """Every `pattern`-th layer has plain attention, others a sliding window. Random float32 weights, vocabulary 97."""
    return _random_weights(
        gemma3_text.Model(
            gemma3_text.ModelArgs(
                model_type="gemma3_text",
                hidden_size=64,
                num_hidden_layers=n_layers,
                intermediate_size=96,
                num_attention_heads=4,
                head_dim=64,
                rms_norm_eps=1e-6,
                vocab_size=97,
                num_key_value_heads=2,
                sliding_window=window,
                sliding_window_pattern=pattern,
            )
        )
    )


@pytest.fixture(scope="session")
def gemma() -> Module:
    """Short sliding-window layers with a full-attention layer at every second place."""
    return build_gemma(32, n_layers=4, pattern=2)
