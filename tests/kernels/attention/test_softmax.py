"""The CPU's exponential and tiled attention against float64 and MLX's own."""

import mlx.core as mx
import numpy as np
import pytest

from kernels.attention import softmax
from kernels.attention.softmax import attention, exp_below, product, softmax_weights


def test_the_exponential_is_accurate_down_to_its_floor() -> None:
    x = np.concatenate([np.linspace(-60, 0, 20011), [-1e30, -200.0, -0.0]]).astype(np.float32)
    got = np.array(exp_below(mx.array(x), mx.array([0.0]))).astype(np.float64)
    want = np.exp(np.maximum(x.astype(np.float64), -60.0))
    assert (np.abs(got / want - 1) <= 1e-6 + 6e-8 * np.abs(np.maximum(x, -60.0))).all()


def test_masked_keys_weigh_nothing_and_are_no_subnormal_numbers() -> None:
    """A weight times a small value must stay a normal number: subnormal ones take 5 to 10 times as long."""
    scores = np.zeros((1, 1, 1, 1, 5000), dtype=np.float32)
    (weights,), total = softmax_weights([(mx.array(scores), mx.arange(5000) < 1)], None)
    assert float(mx.min(weights)) * 1e-6 > np.finfo(np.float32).tiny
    assert float(total) == pytest.approx(1.0, abs=1e-6)


def test_nan_stays_nan_and_stays_alone() -> None:
    x = np.zeros(5000, dtype=np.float32)
    x[17] = np.nan
    assert np.flatnonzero(np.isnan(np.array(exp_below(mx.array(x), mx.array([0.0]))))).tolist() == [17]


@pytest.mark.parametrize("n_keys", [10, 3000])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_weights_of_parts_are_one_softmax(n_keys: int, with_sinks: bool) -> None:
    rng = np.random.default_rng(n_keys)
    first, second = (rng.normal(size=(1, 2, 2, 3, n)) * 4 for n in (n_keys, 7))
    mask = rng.random((1, 1, 1, 3, n_keys)) < 0.7
    sinks = rng.normal(size=4) if with_sinks else None
    parts = [(mx.array(first.astype(np.float32)), mx.array(mask)), (mx.array(second.astype(np.float32)), None)]
    weights, total = softmax_weights(parts, None if sinks is None else mx.array(sinks.astype(np.float32)))
    raised = np.exp(np.concatenate([np.where(mask, first, -np.inf), second], axis=-1))
    whole = raised.sum(-1, keepdims=True)
    if sinks is not None:
        whole = whole + np.exp(sinks).reshape(1, 2, 2, 1, 1)
    got = np.concatenate([np.array(w / total) for w in weights], axis=-1)
    # float32's own limit here: mx.softmax differs from float64 by 2.1e-6 on such scores.
    np.testing.assert_allclose(got, raised / whole, atol=4e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_tiles_give_what_one_piece_gives(monkeypatch: pytest.MonkeyPatch, causal: bool) -> None:
    monkeypatch.setattr(softmax, "_TILE", 40_000)  # several tiles, the last one short
    rng = np.random.default_rng(3)
    queries, keys, values = (
        mx.array(rng.normal(size=shape).astype(np.float32))
        for shape in ((1, 6, 37, 32), (1, 2, 900, 32), (1, 2, 900, 48))
    )
    mask = "causal" if causal else None
    want = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=0.7, mask=mask)
    np.testing.assert_allclose(np.array(attention(queries, keys, values, 0.7, mask, None)), np.array(want), atol=3e-5)


@pytest.mark.parametrize("rows", [1, 2, 8, 9])
def test_products_of_few_rows_are_those_of_many(rows: int) -> None:
    rng = np.random.default_rng(rows)
    x, y = (rng.normal(size=shape).astype(np.float32) for shape in ((3, 2, rows, 40), (3, 2, 40, 70)))
    got = product(mx.array(x), mx.array(y))
    assert got.shape == (3, 2, rows, 70)
    np.testing.assert_allclose(np.array(got), x.astype(np.float64) @ y, atol=1e-4)
    transposed = product(mx.array(x), mx.array(np.ascontiguousarray(y.swapaxes(-1, -2))).swapaxes(-1, -2))
    np.testing.assert_allclose(np.array(transposed), x.astype(np.float64) @ y, atol=1e-4)
