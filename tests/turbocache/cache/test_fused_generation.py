"""Models over the fused lanes in the harness, from a prompt's first token on."""

import mlx.core as mx
import pytest

from tests.gpu import generation
from tests.kernels.fused.cases import emulated, need
from turbocache.cache.ring import RingConfig


@pytest.mark.slow
@pytest.mark.parametrize("max_size", [None, 256])
@pytest.mark.parametrize("backend", ["metal", "cuda"])
def test_a_model_says_the_same_as_over_the_reference(backend: str, max_size: int | None) -> None:
    need("plain")
    with emulated():
        model = generation.make_model(mx.float32)
        found = generation.error(model, backend, "k4v4", RingConfig(32, 64, max_size))
    assert found <= generation.LIMITS[mx.float32]
