"""KVarN's codec against its formulas in NumPy's float64, and its cache against attention over the tokens themselves."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.nn.layers.base import Module
from mlx_lm.models.cache import make_prompt_cache
from scipy.linalg import hadamard

from kernels.codec.layout import unpack
from tests.conftest import build_gemma
from turbocache.cache.ring import RingConfig
from turbocache.evaluation.kvarn import RAW_BITS, Kvarn, KvarnLayer, Raw, codec, normalise
from turbocache.evaluation.rows import RowMaker, RowUnavailable, expand_names, is_foreign
from turbocache.evaluation.settings import EvaluationError, Settings
from turbocache.mlxlm.plan import plan_layers

GROUP = 128


def uneven(dim: int, seed: int = 0) -> np.ndarray:
    """Tokens `[1, 2, GROUP, dim]` whose sizes differ by token and by channel, with means far from 0."""
    rng = np.random.default_rng(seed)
    tokens = rng.normal(size=(1, 2, GROUP, dim)) * np.exp(rng.normal(size=(1, 2, GROUP, 1)))
    return (tokens * np.exp(rng.normal(size=(1, 2, 1, dim))) + 2 * rng.normal(size=(1, 2, 1, dim))).astype(np.float32)


def oracle_factors(tile: np.ndarray, rounds: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Factors of one tile's rows and columns, by turns, by default until nothing changes any more."""
    rows, columns = np.ones((tile.shape[0], 1)), np.ones((1, tile.shape[1]))
    for _ in range(rounds):
        columns = columns * (tile / rows / columns).std(axis=0, ddof=1, keepdims=True)
        rows = rows * (tile / rows / columns).std(axis=1, ddof=1, keepdims=True)
    return rows, columns


def oracle_codes(tile: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes of one tile, what they are read as, and the size of a step of each number, in the rotated basis."""
    rows, columns = oracle_factors(tile)
    balanced = tile / rows / columns
    low, high = balanced.min(axis=1, keepdims=True), balanced.max(axis=1, keepdims=True)
    step = (high - low) / (2**bits - 1)
    codes = np.rint((balanced - low) / step)
    return codes, (codes * step + low) * rows * columns, step * rows * columns


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_deviations_of_both_axes_become_the_same(scale: float) -> None:
    tile = uneven(64)[0, 0] * scale
    quotient, rows, columns = (np.array(x, dtype=np.float64) for x in normalise(mx.array(tile)))
    np.testing.assert_allclose(quotient * rows * columns, tile, rtol=1e-4, atol=1e-4 * scale)
    before = [tile.std(axis=axis, ddof=1) for axis in (0, 1)]
    assert all(deviation.max() > 5 * deviation.min() for deviation in before)
    for axis in (0, 1):
        deviation = quotient.std(axis=axis, ddof=1)
        np.testing.assert_allclose(deviation, deviation[0], rtol=2e-3)
    np.testing.assert_allclose(np.log(columns).mean(), 0, atol=1e-4)  # nothing drifts
    want_rows, want_columns = oracle_factors(tile.astype(np.float64))
    np.testing.assert_allclose(rows * columns, want_rows * want_columns, rtol=5e-3)


def test_the_round_with_the_least_imbalance_counts() -> None:
    """A tile of three channels, whose last round is worse than those before."""
    tile = np.random.default_rng(5).normal(size=(GROUP, 3))
    exact = [imbalance(tile / np.multiply(*oracle_factors(tile, n))) for n in range(17)]
    assert exact[16] > 1.2 * min(exact)
    got = np.array(normalise(mx.array(tile.astype(np.float32)))[0])
    assert imbalance(got) < 1.01 * min(exact)


def imbalance(tile: np.ndarray) -> float:
    with np.errstate(divide="ignore"):
        return sum(float(d.max() / d.min()) for d in (tile.std(axis=axis, ddof=1) for axis in (0, 1)))


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("by_channel", [True, False], ids=["keys", "values"])
def test_codes_are_those_of_the_formulas(dim: int, bits: int, by_channel: bool) -> None:
    tokens = uneven(dim)
    tiles = Kvarn(bits, by_channel).encode(mx.array(tokens))
    n_columns = GROUP if by_channel else dim
    codes, read = np.array(unpack(tiles[0], n_columns, bits)), np.array(Kvarn(bits, by_channel).decode(tiles))
    basis = hadamard(dim) / np.sqrt(dim)
    for head in range(2):
        rotated = tokens[0, head].astype(np.float64) @ basis
        tile = rotated.T if by_channel else rotated
        want, want_read, step = oracle_codes(tile, bits)
        off = np.abs(codes[0, head].astype(int) - want)
        assert off.max() <= 1
        assert off.mean() < 0.005 * 2 ** max(0, bits - 4)
        error = (read[0, head].astype(np.float64) @ basis).T if by_channel else read[0, head].astype(np.float64) @ basis
        # Half a step, and what float16 factors add: 3 roundings of the row's range.
        span = step * (2**bits - 1)
        assert np.all(np.abs(error - tile) <= 0.51 * step + 3 * 2**-11 * (span + np.abs(tile)))
        np.testing.assert_allclose(
            np.abs(error - tile).mean(), np.abs(want_read - tile).mean(), rtol=0.02 if bits < 8 else 0.2
        )


def test_dead_channels_tokens_and_tiles_are_read_as_they_are() -> None:
    for by_channel in (True, False):
        c = codec(4, by_channel)
        assert not np.array(c.decode(c.encode(mx.zeros((1, 2, GROUP, 64))))).any()
        tokens = uneven(64)
        tokens[:, :, 5] = 0
        assert np.abs(np.array(c.decode(c.encode(mx.array(tokens))))[:, :, 5]).max() < 1e-3
        constant = mx.full((1, 2, GROUP, 64), 3.0)
        np.testing.assert_allclose(np.array(c.decode(c.encode(constant))), 3.0, atol=0.01)


def test_the_rotation_needs_a_power_of_two() -> None:
    with pytest.raises(ValueError, match="power of two as head dim, not 80"):
        codec(4, True).encode(mx.zeros((1, 1, GROUP, 80)))


Chunks = Callable[[KvarnLayer], np.ndarray]
RING = RingConfig(keep=5, window=64)


def attended(layer: KvarnLayer, lengths: Sequence[int], n_heads: int = 4, dim: int = 64) -> np.ndarray:
    """Outputs `[n, n_heads, dim]` of tokens that come in chunks."""
    rng = np.random.default_rng(3)
    n = sum(lengths)
    queries, keys, values = (mx.array(rng.normal(size=(1, h, n, dim)).astype(np.float32)) for h in (n_heads, 2, 2))
    outs = []
    ends = np.cumsum([0, *lengths]).tolist()
    for start, end in pairwise(ends):
        pending, _ = layer.update_and_fetch(keys[:, :, start:end], values[:, :, start:end])
        outs.append(pending.attend(queries[:, :, start:end], dim**-0.5, None))
        mx.eval(outs[-1], layer.state)
    assert layer.offset == n
    return np.array(mx.concatenate(outs, axis=2))[0].swapaxes(0, 1)


def plain(n: int, n_heads: int = 4, dim: int = 64, max_size: int = 1 << 30) -> np.ndarray:
    """The same with all tokens raw: causal attention to the newest `max_size` tokens, in float64."""
    rng = np.random.default_rng(3)
    queries, keys, values = (rng.normal(size=(h, n, dim)).astype(np.float32).astype(float) for h in (n_heads, 2, 2))
    keys, values = (np.repeat(x, n_heads // 2, axis=0) for x in (keys, values))
    scores = queries @ keys.swapaxes(-1, -2) / np.sqrt(dim)
    age = np.arange(n)[:, None] - np.arange(n)
    scores[:, (age < 0) | (age >= max_size)] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return ((weights / weights.sum(axis=-1, keepdims=True)) @ values).swapaxes(0, 1)


@pytest.mark.parametrize("lengths", [[400], [3, 1, 60, 200, 1, 1, 134]], ids=str)
@pytest.mark.parametrize("ring", [RING, RingConfig(keep=0, window=0), RingConfig(keep=64, window=128)], ids=str)
def test_the_cache_attends_to_every_token_once(ring: RingConfig, lengths: list[int]) -> None:
    layer = KvarnLayer(ring, Raw(), Raw())
    np.testing.assert_allclose(attended(layer, lengths), plain(400), atol=2e-5)
    n_tiles = (400 - 1 - ring.keep - ring.window) // GROUP
    assert layer._tiles[0][0].shape[:3] == (2, n_tiles, GROUP)
    assert layer._raw[0].shape[2] == 400 - GROUP * n_tiles


@pytest.mark.parametrize("lengths", [[700], [100, 1, 300, 1, 1, 297]], ids=str)
@pytest.mark.parametrize("max_size", [256, 300])
def test_a_sliding_window_sees_its_newest_tokens(max_size: int, lengths: list[int]) -> None:
    ring = RingConfig(keep=64, window=128).of_sliding(max_size)
    assert ring is not None
    layer = KvarnLayer(ring, Raw(), Raw())
    np.testing.assert_allclose(attended(layer, lengths), plain(700, max_size=max_size), atol=2e-5)
    held = sum(arrays[0].shape[1] * GROUP for arrays in layer._tiles[:1]) + layer._raw[0].shape[2]
    assert max_size - 1 <= held < max_size + GROUP
    assert layer.make_mask(5, window_size=max_size) == "causal"
    with pytest.raises(ValueError, match="causal"):
        layer.make_mask(5, window_size=max_size - 1)


def test_chunks_do_not_change_what_a_query_reads() -> None:
    """A query reads tiles from its own position on, also within a chunk. Its newest tokens and the sink stay raw."""
    whole = attended(KvarnLayer(RING, Kvarn(2, True), Kvarn(2, False)), [500])
    parts = attended(KvarnLayer(RING, Kvarn(2, True), Kvarn(2, False)), [7, 250, 1, 1, 241])
    np.testing.assert_allclose(parts, whole, atol=2e-5)
    exact = plain(500)
    first = RING.keep + RING.window + GROUP  # the first query that reads a tile
    np.testing.assert_allclose(whole[:first], exact[:first], atol=2e-5)
    assert (np.abs(whole[first:] - exact[first:]).max(axis=(1, 2)) > 1e-3).all()


def opened(model: Module, name: str, n: int, keep: int = 5, window: int = 64) -> Any:
    settings = Settings(Path("text"), (name,), keep=(keep,), window=(window,))
    cache = RowMaker(model, plan_layers(model), settings).row(name).open(n)
    mx.eval(model(mx.array([[1 + i % 90 for i in range(n)]]), cache=cache.layers))
    return cache


@pytest.mark.parametrize(
    ("name", "key_bits", "value_bits", "group"),
    [("kvarn-4", 4, 4, 128), ("kvarn-4/2", 4, 2, 128), ("kvarn-3-g64", 3, 3, 64)],
)
def test_stored_bits_are_codes_and_factors(
    tiny_llama: Module, name: str, key_bits: int, value_bits: int, group: int
) -> None:
    """Of 2 layers with 2 KV heads of 64 dims."""
    n, dim = 400, 64
    n_tiles = (n - 1 - 5 - 64) // group
    in_tiles = n_tiles * group
    key = key_bits + (2 * 16 * dim + 16 * group) / (dim * group)
    value = value_bits + (2 * 16 * group + 16 * dim) / (dim * group)
    coded = 2 * 2 * dim * in_tiles * (key + value) / 8
    raw = 2 * 2 * dim * 2 * (n - in_tiles)
    stored = opened(tiny_llama, name, n).stored()
    assert stored.nbytes == coded + 4 * raw
    assert stored.half_nbytes == coded + 2 * raw


@pytest.mark.slow
def test_16_bits_are_full_precision(measured: Callable[..., Any]) -> None:
    """And 8 bits are close to it, through a whole model in chunks."""
    _, (_, exact, close, coarse) = measured("kvarn-16", "kvarn-8", "kvarn-2", context=160, chunk=100)
    assert abs(exact["kld_mean"]) < 1e-9
    assert exact["kld_mean"] < close["kld_mean"] < 1e-3
    assert coarse["kld_mean"] > 20 * close["kld_mean"]
    assert (
        "this project's implementation of KVarN, in the layers, and with the sink (4) and window (0)" in coarse["note"]
    )
    assert coarse["stored_bits"] < close["stored_bits"] < exact["stored_bits"]


def test_names_give_widths_and_tiles() -> None:
    names = ("kvarn", "kvarn-8", "kvarn-5/3", "kvarn-4/2-g64", "kvarn-16")
    expanded = expand_names(Settings(Path("text"), names))
    assert expanded == ["kvarn-4", "kvarn-4/2", "kvarn-3", "kvarn-2", *names[1:]]
    assert all(is_foreign(name) for name in expanded)
    for name in ("kvarn-9", "kvarn-0", "kvarn-4/16/2", "kvarn-4-g1", "kvarn-", "kvarn-2.5"):
        with pytest.raises(EvaluationError, match="unknown preset"):
            expand_names(Settings(Path("text"), (name,)))


def test_layers_with_their_own_kind_of_cache_stay_as_they_are(gemma: Module) -> None:
    kinds = [type(layer) for layer in opened(gemma, "kvarn-4", 20).layers]
    assert KvarnLayer in kinds
    assert len(set(kinds)) == 2


def test_sliding_windows_are_compressed() -> None:
    """As in presets: at 16 bits a model's logits are those over mlx-lm's own caches."""
    model, tokens = build_gemma(window=256), mx.array([[1 + i * i % 90 for i in range(600)]])
    settings = Settings(Path("text"), ("kvarn",))
    row = RowMaker(model, plan_layers(model), settings).row("kvarn-16").open(600).layers
    assert [layer._ring.max_size for layer in row] == [256, 256, None]
    native = make_prompt_cache(model)
    for start, end in ((0, 300), (300, 301), (301, 600)):
        got, want = (np.array(model(tokens[:, start:end], cache=cache)) for cache in (row, native))
        np.testing.assert_allclose(got, want, atol=2e-3)


def test_a_model_without_a_power_of_two_says_so(tiny_qwen3: Module) -> None:
    with pytest.raises(RowUnavailable, match=r"powers of two, not \(80, 80\)"):
        opened(tiny_qwen3, "kvarn-4", 5)


def test_raw_bits_have_the_raw_codec() -> None:
    assert isinstance(codec(RAW_BITS, True), Raw)
