import importlib.util
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.nn.layers.base import Module
from mlx_lm.models.cache import make_prompt_cache

from kernels.codec.layout import PAGE
from turbocache.cache.view import PagedKVCache
from turbocache.evaluation.rows import OpenCache, RowMaker
from turbocache.evaluation.settings import Settings
from turbocache.evaluation.storage import n_values
from turbocache.mlxlm.model import LoadedModel
from turbocache.mlxlm.plan import plan_layers

N = 300


def filled(model: Module, name: str, keep: int = 5, window: int = 64) -> OpenCache:
    settings = Settings(Path("text"), (name,), keep=(keep,), window=(window,))
    opened = RowMaker(model, plan_layers(model), settings).row(name).open(N)
    mx.eval(model(mx.array([[1 + i % 90 for i in range(N)]]), cache=opened.layers))
    return opened


@pytest.mark.slow
@pytest.mark.parametrize("name", ["off", "k8v8", "k4v3", "turbo3_5", "turbo2_5", "k4v4:packed"])
@pytest.mark.parametrize("ring", [(5, 64), (0, 0), (64, 128)], ids=str)
def test_bytes_are_those_of_the_arrays(tiny_llama: Module, name: str, ring: tuple[int, int]) -> None:
    opened = filled(tiny_llama, name, *ring)
    layer = opened.layers[0]
    assert isinstance(layer, PagedKVCache)
    pool, batch = layer.batch.spec.pool, layer.batch
    arrays = [array for i in range(2) for array in pool.pages(i)]
    n_pages = (N - sum(ring)) // PAGE
    paged = [array[:n_pages] for array in arrays]  # pages are alike: any will do
    raw = [array for pair in batch.raw for array in pair]
    stored = opened.stored()
    beside = getattr(batch.spec, "centre_nbytes", 0)  # what conditioned keys are centred by
    assert stored.nbytes == beside + sum(array.nbytes for array in paged + raw)
    # Half precision is what the model's float32 arrays take in float16; codes and scales are what they are.
    assert stored.half_nbytes == beside // 2 + sum(
        array.astype(mx.float16).nbytes if array.dtype == mx.float32 else array.nbytes for array in paged + raw
    )
    assert batch.raw[0][0].shape[2] == sum(ring) + PAGE


@pytest.mark.parametrize(("name", "bits"), [("k4v4", 4.25), ("k8v4", 6.25), ("turbo2_5", 2.75), ("k2v2", 2.25)])
def test_a_page_takes_its_codes_and_a_scale_for_each_token_and_head(tiny_llama: Module, name: str, bits: float) -> None:
    """Of heads of 64 dims: the codes and 16 / 64 bits."""
    values_of_a_token = 2 * 2 * (64 + 64)
    raw = values_of_a_token * 4 * (5 + 64 + PAGE)
    n_pages = (N - 5 - 64) // PAGE
    opened = filled(tiny_llama, name)
    beside = getattr(opened.layers[0].batch.spec, "centre_nbytes", 0)
    assert opened.stored().nbytes - beside - raw == n_pages * PAGE * values_of_a_token * bits / 8


def test_mlx_lm_rows_count_codes_scales_and_biases(tiny_llama: Module) -> None:
    stored = filled(tiny_llama, "mlx-lm-4").stored()
    slots = 512  # mlx-lm takes slots in steps of 256
    values = slots * 2 * 2 * 128
    assert stored.nbytes == values * (4 + 2 * 32 / 64) / 8
    assert stored.half_nbytes == values * (4 + 2 * 16 / 64) / 8


@pytest.mark.skipif(importlib.util.find_spec("mlx_vlm") is None, reason="mlx-vlm is not installed")
def test_mlx_vlm_rows_count_codes_and_norms(tiny_llama: Module) -> None:
    stored = filled(tiny_llama, "mlx-vlm-2.5-all").stored()
    assert stored.nbytes == stored.half_nbytes == N * 2 * 2 * 128 * (2.5 + 16 / 64) / 8


def test_values_are_those_of_a_full_cache_without_its_unused_slots(tiny_llama: Module, bundled: LoadedModel) -> None:
    opened = filled(tiny_llama, "full")
    assert n_values(opened.layers) == N * 2 * 2 * 128
    assert opened.stored().nbytes == 512 * 2 * 2 * 128 * 4
    assert n_values(make_prompt_cache(tiny_llama)) == 0


def test_layers_that_keep_their_own_cache_are_counted(gemma: Module) -> None:
    opened = filled(gemma, "k4v4")
    own = [layer for layer in opened.layers if not isinstance(layer, PagedKVCache)]
    assert own
    own_nbytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in own)
    assert opened.stored().nbytes - own_nbytes == sum(layer.nbytes for layer in opened.layers if layer not in own)
    full = make_prompt_cache(gemma)
    mx.eval(gemma(mx.array([list(range(1, 21))]), cache=full))
    assert n_values(full) == sum(
        np.prod(c.keys[..., :20, :].shape) + np.prod(c.values[..., :20, :].shape) for c in full
    )
