"""encode and expand of the fused lanes, as the text that MLX compiles, against the definition in float64."""

from functools import partial

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.codec.layout import PAGE
from kernels.lanes.base import Codebooks
from kernels.lanes.reference import ReferenceLanes
from tests.kernels.fused.cases import (
    BY_NAME,
    SETTINGS,
    Language,
    Setting,
    codebook,
    emulated,
    expanded,
    need,
    pairs_of,
    random_pages,
    read_back,
    rotation_matrix,
    rounded,
)
from tests.metal import Mode, OrderError, RaceError, UnwrittenError, run, run_orders
from tests.oracles import stretch

every_setting = pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.name)
both = pytest.mark.parametrize("language", ["metal", "cuda"])
FLOAT16_MAX = 65504.0


def random_tokens(setting: Setting, n_pages: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values `[n_pages, n_kv_heads, PAGE, dim]` of very different sizes, float32 with the type's values."""
    rng = np.random.default_rng(seed)
    tokens = []
    for dim in (setting.key_dim, setting.value_dim):
        rows = rng.normal(size=(n_pages, setting.n_kv_heads, PAGE, dim))
        rows *= 10.0 ** rng.uniform(-2, 2, size=(*rows.shape[:3], 1))
        rows[0, 0, :3] = 0
        rows[0, 0, 1] = 7.0  # all coordinates alike
        rows[0, 0, 2, -1] = -3.0  # one coordinate only
        tokens.append(rounded(rows, setting.dtype))
    return tokens[0], tokens[1]


def encode(setting: Setting, language: Language, keys: np.ndarray, values: np.ndarray) -> list[np.ndarray]:
    pages = setting.lanes(language).encode(*(mx.array(x).astype(setting.dtype) for x in (keys, values)))
    return [np.array(x) for x in pages]


def errors(x: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Squared distance of coordinates `[n, dim]` to the nearest levels, for each pair."""
    if levels.ndim == 1:
        return np.asarray((np.abs(x[..., None] - levels).min(axis=-1) ** 2).reshape(len(x), -1, 2).sum(axis=-1))
    return np.stack([((row.reshape(-1, 1, 2) - levels) ** 2).sum(axis=-1).min(axis=-1) for row in x])


def assert_encoded(rows: np.ndarray, read: np.ndarray, scales: np.ndarray, levels: np.ndarray, *, keys: bool) -> None:
    """`rows` `[n, dim]` in the rotated basis were given codes no farther than the nearest ones, and the right scale.

    Values come transposed: a value's pairs are of two tokens, [n, 2 * tokens].
    """
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    units = rows * np.sqrt(rows.shape[-1]) / np.maximum(norms, 1e-30)
    along, squared = (units * read).sum(axis=-1), (read**2).sum(axis=-1)
    along[norms[:, 0] == 0] = 1  # a row of zeros has scale 0, whatever its codes
    ratio = rows.shape[-1] / along if keys else along / squared
    want = np.minimum(norms[:, 0] / np.sqrt(rows.shape[-1]) * ratio, FLOAT16_MAX)
    np.testing.assert_allclose(scales, want, rtol=1e-3, atol=6e-8)
    units = units * stretch(units, levels)
    if not keys:  # pairs are of two tokens
        units, read = units.reshape(-1, 2, rows.shape[-1]), read.reshape(-1, 2, rows.shape[-1])
        units, read = (x.swapaxes(1, 2).reshape(len(x), -1) for x in (units, read))
    got = ((units - read) ** 2).reshape(len(units), -1, 2).sum(axis=-1)
    assert (np.sqrt(got) <= np.sqrt(errors(units, levels)) + 2e-5 * np.abs(units).max()).all()


def assert_pages(pages: list[np.ndarray], keys: np.ndarray, values: np.ndarray, setting: Setting) -> None:
    for tokens, read, scales, bits, is_key in zip(
        (keys, values),
        read_back(pages, setting),
        pages[2:],
        (setting.key_bits, setting.value_bits),
        (True, False),
        strict=True,
    ):
        dim = tokens.shape[-1]
        rows = tokens.astype(np.float64).reshape(-1, dim) @ rotation_matrix(dim)
        levels = codebook(bits).astype(np.float64)
        assert_encoded(rows, read.reshape(-1, dim), scales.astype(np.float64).ravel(), levels, keys=is_key)


@every_setting
@both
@given(data=st.data())
@settings(max_examples=3)
def test_tokens_get_the_nearest_codes_and_the_right_scale(
    setting: Setting, language: Language, data: st.DataObject
) -> None:
    need("plain")
    tokens = random_tokens(setting, data.draw(st.integers(1, 3)), data.draw(st.integers(0, 1 << 16)))
    with emulated():
        pages = encode(setting, language, *tokens)
    assert_pages(pages, *tokens, setting)


@both
@pytest.mark.parametrize("name", ["k4v4", "k8v4", "k6v4", "k5v6", "k3v2", "k2.5v2.5", "k3.5v3.5"])
def test_pages_are_the_reference_s(language: Language, name: str) -> None:
    need("plain")
    setting = BY_NAME[name]
    tokens = [mx.array(x).astype(setting.dtype) for x in random_tokens(setting, 2, seed=1)]
    reference = ReferenceLanes(setting.shape, Codebooks(codebook(setting.key_bits), codebook(setting.value_bits)))
    with emulated():
        got = setting.lanes(language).encode(*tokens)
    want = reference.encode(*tokens)
    assert [x.dtype for x in got] == [x.dtype for x in want]
    # A coordinate on a boundary, or a scale half way between two float16, may fall to either side.
    mine, theirs = ([np.array(x) for x in pages] for pages in (got, want))
    for x, y in zip((*read_back(mine, setting), *mine[2:]), (*read_back(theirs, setting), *theirs[2:]), strict=True):
        assert (x[1] == y[1]).mean() > 0.97  # page 0 has rows that are nothing but ties


@every_setting
@both
def test_expand_gives_back_what_pages_hold(setting: Setting, language: Language) -> None:
    need("plain")
    rng = np.random.default_rng(2)
    pages = [x[:-1] for x in random_pages(setting, 4, rng)]
    table = rng.integers(0, 3, (2, 3)).astype(np.int32)
    with emulated():
        got = setting.lanes(language).expand_rows(tuple(map(mx.array, pages)), mx.array(table), setting.dtype)
    for mine, tokens in zip(got, expanded(pages, setting), strict=True):
        assert mine.dtype == setting.dtype
        want = tokens[table].swapaxes(1, 2).reshape(2, setting.n_kv_heads, 3 * PAGE, -1)
        rounding = {mx.float32: 1e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}[setting.dtype]
        error = np.abs(np.array(mine.astype(mx.float32)) - want)
        assert (error <= rounding * np.abs(want) + 2e-6 * np.abs(want).max()).all()


@both
@pytest.mark.parametrize("name", ["k4v4", "k2.5v2.5", "k4v8"])
@pytest.mark.parametrize("strange", [np.nan, np.inf])
def test_strange_tokens_stay_in_their_row(language: Language, name: str, strange: float) -> None:
    need("plain")
    setting = BY_NAME[name]
    keys, values = random_tokens(setting, 1, seed=3)
    with emulated():
        want = encode(setting, language, keys, values)
        keys[0, 0, 5, 3] = values[0, 0, 5, 3] = strange
        got = encode(setting, language, keys, values)
    # In a codebook of pairs, token 4's values share their codes with token 5's.
    shared = len(pairs_of(setting.value_bits)) != len(codebook(setting.value_bits)) ** 2
    other_keys = np.delete(np.arange(PAGE), 5)
    other_values = np.delete(np.arange(PAGE), [4, 5] if shared else [5])
    for which, others in enumerate((other_keys, other_values)):
        mine, theirs = (read_back(pages, setting)[which][0, 0, others] for pages in (got, want))
        np.testing.assert_array_equal(mine, theirs)
        np.testing.assert_array_equal(got[2 + which][0, 0, others], want[2 + which][0, 0, others])
        scale = got[2 + which][0, 0, 5]
        assert not np.isfinite(scale) or scale == FLOAT16_MAX
    assert np.isfinite(got[3][0, 0, 4])


@every_setting
@both
def test_the_order_of_threads_does_not_matter(setting: Setting, language: Language) -> None:
    need("plain")
    tokens = random_tokens(setting, 1, seed=4)
    with emulated(run_orders):
        pages = encode(setting, language, *tokens)
        setting.lanes(language).expand(tuple(map(mx.array, pages)), setting.dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("language", "mode", "name"),
    [
        *(("metal", "asan", setting.name) for setting in SETTINGS if setting.name != "k5v6"),
        *(("cuda", "asan", name) for name in ("k2v3", "k2.5v2.5")),
        *(("metal", "tsan", name) for name in ("k4v4", "k3.5v3.5", "k4v8")),
        ("cuda", "tsan", "k4v4"),
    ],
)
def test_no_sanitizer_objects(language: Language, mode: Mode, name: str) -> None:
    need(mode)
    setting = BY_NAME[name]
    tokens = random_tokens(setting, 2, seed=5)
    with emulated(mode):
        pages = encode(setting, language, *tokens)
        setting.lanes(language).expand(tuple(map(mx.array, pages)), setting.dtype)
    assert_pages(pages, *tokens, setting)


# --- bugs that tests here must notice ---


def broken_encode(old: str, new: str, mode: Mode = "plain", *, orders: bool = False) -> None:
    need(mode)
    setting = BY_NAME["k2v3"]
    tokens = random_tokens(setting, 1, seed=6)
    with emulated(
        lambda kernel, inputs: (run_orders if orders else partial(run, mode=mode))(kernel.patched(old, new), inputs)
    ):
        pages = encode(setting, "metal", *tokens)
    assert_pages(pages, *tokens, setting)


def test_the_unchanged_kernel_passes() -> None:
    broken_encode("barrier_group();\nconstexpr int n =", "barrier_group();\nconstexpr int n =")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("x > boundary ? upper : code", "x > boundary ? code : upper"),
        ("code << shift : code >> -shift", "code << shift : 0u"),
        ("norm[e] * root * zoom[e] / ru", "norm[e] / root * zoom[e]"),
        ("rows[e * D + d] = x * signs[d]", "rows[e * D + d] = x"),
    ],
)
def test_a_wrong_codec_gives_wrong_pages(old: str, new: str) -> None:
    with pytest.raises(AssertionError):
        broken_encode(old, new)


def test_a_missing_barrier_is_caught() -> None:
    missing = ("barrier_group();\nconstexpr int n =", "constexpr int n =")
    with pytest.raises((OrderError, AssertionError)):
        broken_encode(*missing, orders=True)
    with pytest.raises(RaceError):
        broken_encode(*missing, mode="tsan")


def test_an_unwritten_scale_is_caught() -> None:
    with pytest.raises(UnwrittenError, match="output key_scales"):
        broken_encode("if (lane == 0) scales[2 * t + e]", "if (lane == 0 && t < 31) scales[2 * t + e]")
