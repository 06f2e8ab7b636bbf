"""Attention steps of the fused lanes, as the text that MLX compiles, against softmax attention in float64."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.attention.page_tables import PageIndex
from kernels.codec.layout import PAGE
from kernels.lanes.base import ChunkInputs
from kernels.probe.trials import random_step
from tests.kernels.fused.cases import (
    BY_NAME,
    LANES,
    SETTINGS,
    WRITABLE,
    Language,
    Setting,
    emulated,
    make_step,
    need,
    random_pages,
    row_lengths,
    tolerance,
)
from tests.metal import (
    DivergedError,
    Kernel,
    MemoryFaultError,
    Mode,
    OrderError,
    RaceError,
    UnwrittenError,
    run,
    run_orders,
)

every_setting = pytest.mark.parametrize("setting", SETTINGS, ids=lambda s: s.name)
both = pytest.mark.parametrize("language", ["metal", "cuda"])

# Rows with nothing before the step, with a wrapped ring, and with pages only.
MIXED = ((0, 0), (3, 100), (5, 0))


def assert_close(got: np.ndarray, want: np.ndarray, setting: Setting, language: Language) -> None:
    assert np.isfinite(got).all()
    assert np.abs(got - want).max() <= tolerance(setting, language) * np.abs(want).max()


@every_setting
@both
@given(data=st.data())
@settings(max_examples=6)
def test_any_rows_are_attended_to(setting: Setting, language: Language, data: st.DataObject) -> None:
    need("plain")
    lengths = data.draw(st.lists(row_lengths(setting), min_size=1, max_size=3))
    step = make_step(setting, lengths, data.draw(st.integers(0, 1 << 16)))
    with emulated():
        got = step.attend(setting.lanes(language))
    assert_close(got, step.expected(), setting, language)


@every_setting
@both
@given(data=st.data())
@settings(max_examples=4)
def test_pinned_pages_are_seen_and_hidden_tokens_are_not(
    setting: Setting, language: Language, data: st.DataObject
) -> None:
    need("plain")
    n_rows, skips = data.draw(st.integers(1, 3)), st.one_of(st.sampled_from([0, 1, 63]), st.integers(0, 63))
    lengths = [data.draw(row_lengths(setting)) for _ in range(n_rows)]
    hidden = [(data.draw(st.integers(0, 5)), data.draw(skips)) for _ in range(n_rows)]
    step = make_step(setting, lengths, data.draw(st.integers(0, 1 << 16)), hidden)
    with emulated():
        got = step.attend(setting.lanes(language))
    assert_close(got, step.expected(), setting, language)


@every_setting
@both
def test_the_order_of_threads_does_not_matter(setting: Setting, language: Language) -> None:
    need("plain")
    step = make_step(setting, MIXED, seed=1)
    with emulated(partial(run_orders, writable=WRITABLE)):
        got = step.attend(setting.lanes(language))
    assert_close(got, step.expected(), setting, language)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("language", "mode", "name"),
    [
        *(("metal", "asan", setting.name) for setting in SETTINGS if setting.name != "k5v6"),
        *(("cuda", "asan", name) for name in ("k8v4", "k2v3", "k3.5v3.5")),
        *(("metal", "tsan", name) for name in ("k4v4", "k2v3", "k3.5v3.5")),
        *(("cuda", "tsan", name) for name in ("k4v4", "k2.5v2.5")),
    ],
)
def test_no_sanitizer_objects(language: Language, mode: Mode, name: str) -> None:
    need(mode)
    setting = BY_NAME[name]
    step = make_step(setting, [*MIXED, (1, setting.window_slots - setting.n_queries)], seed=2)
    with emulated(mode):
        got = step.attend(setting.lanes(language))
    assert_close(got, step.expected(), setting, language)


@both
@pytest.mark.parametrize("name", ["k4v4", "k2.5v2.5"])
@pytest.mark.parametrize("strange", [np.nan, np.inf])
def test_strange_keys_and_values_stay_in_their_row(language: Language, name: str, strange: float) -> None:
    need("plain")
    setting = BY_NAME[name]
    step = make_step(setting, MIXED, seed=3)
    with emulated():
        lanes = setting.lanes(language)
        want = step.attend(lanes)
        step.raw_keys[1] = step.raw_values[1] = strange
        for scales in step.pages[2:]:
            scales[list(step.rows.tables[1])] = strange
        got = step.attend(lanes)
    assert not np.isfinite(got[1]).all()
    np.testing.assert_array_equal(got[[0, 2]], want[[0, 2]])


# --- bugs that tests here must notice ---


HIDDEN = ((0, 0), (1, 40), (2, 63))


def attend_with(
    old: str,
    new: str,
    *,
    name: str = "k4v4",
    mode: Mode = "plain",
    orders: bool = False,
    full: bool = False,
    hidden: Sequence[tuple[int, int]] = (),
) -> None:
    """A step whose attention kernel has one place changed."""
    need(mode)
    setting = BY_NAME[name]
    lengths = [(1, setting.window_slots - setting.n_queries)] if full else MIXED
    step = make_step(setting, lengths, seed=4, hidden=hidden)

    def launch(kernel: Kernel, inputs: Sequence[Any]) -> list[Any]:
        if "attend" not in kernel.name:
            return run(kernel, inputs, mode=mode)
        broken = kernel.patched(old, new)
        return run_orders(broken, inputs) if orders else run(broken, inputs, mode=mode)

    with emulated(launch):
        got = step.attend(setting.lanes("metal"))
    assert_close(got, step.expected(), setting, "metal")


def test_the_unchanged_kernel_passes() -> None:
    attend_with("KEEP + (start - KEEP) % SLOTS", "KEEP + (start - KEEP) % SLOTS")


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("KEEP + (start - KEEP) % SLOTS", "KEEP + start % SLOTS", "k4v4"),
        ("t <= position &&", "t < position &&", "k4v4"),
        ("t > position - SPAN)", "t >= position - SPAN)", "k2v3"),
        ("% L - SPAN) s[n]", "% L - SPAN + 1) s[n]", "k2v3"),
        ("page_start = KEEP + 64 * rows[4 * row + 1]", "page_start = KEEP", "k2v3"),
        ("for (int t = 0; t < mine; t++)", "for (int t = 0; t < mine - 1; t++)", "k4v4"),
        ("first + t < offset ?", "first + t <= offset ?", "k4v4"),
        ("later < 0 ? raw_values", "later < 1 ? raw_values", "k4v4"),
        ("clamp_int(first + t - offset, 0, L - 1)", "0", "k2.5v2.5"),
        ("j >= 0 && j < N * UNITS", "j >= 0 && j < (N - 1) * UNITS", "k2.5v2.5"),
        ("raw_keys + block_at * DK, own_keys, offset", "raw_keys + block_at * DK, own_keys, 1 + offset", "k4v4"),
    ],
)
def test_a_wrong_index_gives_a_wrong_answer(old: str, new: str, name: str) -> None:
    with pytest.raises((AssertionError, MemoryFaultError)):
        attend_with(old, new, name=name)


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("< hidden_end) value_log", "<= hidden_end) value_log", "k4v4"),
        ("if (b == skip_page)", "if (false)", "k4v4"),
        ("? n_pinned : -1", "? 0 : -1", "k4v4"),
        ("b >= n_pinned &&", "", "k2v3"),
    ],
)
def test_a_wrong_page_or_token_hidden_gives_a_wrong_answer(old: str, new: str, name: str) -> None:
    attend_with(old, old, name=name, hidden=HIDDEN)
    with pytest.raises(AssertionError):
        attend_with(old, new, name=name, hidden=HIDDEN)


def test_a_read_past_the_end_is_caught() -> None:
    with pytest.raises(MemoryFaultError, match="input 'step_values'"):
        attend_with("for (int t = 0; t < mine; t++)", "for (int t = 0; t <= mine; t++)", mode="asan", full=True)


MISSING = ("* 8 + r] = total[r];\n}\nbarrier_group();", "* 8 + r] = total[r];\n}")


def test_a_missing_barrier_is_caught() -> None:
    with pytest.raises((OrderError, AssertionError)):
        attend_with(*MISSING, orders=True)
    with pytest.raises(RaceError):
        attend_with(*MISSING, mode="tsan")


def test_an_unwritten_cell_is_caught() -> None:
    with pytest.raises(UnwrittenError, match="output parts"):
        attend_with("if (r < n_rows) {\nfloat sum", "if (r < n_rows && d != 7) {\nfloat sum")
    with pytest.raises(UnwrittenError, match="output new_keys"):
        attend_with("if (i < n * UNITS) ((device", "if (i < n * UNITS - 1) ((device")


def test_a_simd_operation_in_divergent_code_is_caught() -> None:
    with pytest.raises(DivergedError):
        attend_with("mask <<= 1) total[r] +=", "mask <<= 1) if (c > 0) total[r] +=")


CHECKED = [
    *((language, "plain", setting.name) for language in LANES for setting in SETTINGS),
    *((language, mode, name) for language in LANES for mode in ("asan", "tsan") for name in ("k4v4", "k2v3")),
]


@pytest.mark.parametrize(("language", "mode", "name"), CHECKED)
def test_tokens_go_to_their_slots_and_nothing_else_changes(language: Language, mode: Mode, name: str) -> None:
    """In the sink, over its edge, at a window's end, over a turn of the ring and behind it (`Step.attend` looks)."""
    need(mode)
    setting = BY_NAME[name]
    n, keep, at_once = setting.window_slots, setting.keep, setting.n_queries
    lengths = [(0, -keep), (0, -min(1, keep)), (0, 0), (0, n - at_once), (n // PAGE - 1, PAGE - 1), (5 * n // PAGE, 3)]
    step = make_step(setting, lengths, seed=5)
    with emulated(mode):
        got = step.attend(setting.lanes(language))
    assert_close(got, step.expected(), setting, language)


@pytest.mark.parametrize(("language", "mode", "name"), CHECKED)
def test_raw_tokens_follow_expanded_pages(language: Language, mode: Mode, name: str) -> None:
    """A number of them that no slice of 16 fits, behind two rows' pages, as a concatenation has them."""
    need(mode)
    setting, rng = BY_NAME[name], np.random.default_rng(0)
    pages = tuple(mx.array(x[:3]) for x in random_pages(setting, 4, rng))
    table = mx.array([[2, 0], [1, 2]], dtype=mx.int32)
    raw = [
        mx.array(rng.normal(size=(2, setting.n_kv_heads, 21, dim))).astype(setting.dtype)
        for dim in (setting.key_dim, setting.value_dim)
    ]
    lanes = setting.lanes(language)
    with emulated(mode):
        got = lanes.expand_rows(pages, table, setting.dtype, raw)
        alone = lanes.expand_rows(pages, table, setting.dtype)
    for mine, expanded, tokens in zip(got, alone, raw, strict=True):
        assert mx.array_equal(mine, mx.concatenate([expanded, tokens], axis=2))


@pytest.mark.parametrize("language", LANES)
@pytest.mark.parametrize("n_tokens", [3, 5, 70])
def test_a_chunk_s_mask_may_be_for_more_queries_and_keys(language: Language, n_tokens: int) -> None:
    """Any mask gives the same answer in the form that the lanes like best as in the plain one."""
    need("plain")
    setting, rng = BY_NAME["k4v4"], np.random.default_rng(n_tokens)
    pages = tuple(mx.array(x[:3]) for x in random_pages(setting, 4, rng))
    index, n_raw = PageIndex(((2, 0, 1),)), n_tokens + 21
    queries, keys, values = random_step(setting.shape, setting.dtype, 1, 1, n_tokens, n_raw)
    n_keys = 3 * PAGE + n_raw
    some = mx.array(rng.random((1, 1, n_tokens, n_keys)) < 0.5)
    lanes = setting.lanes(language)
    for mask in (some, "causal", None):
        form = lanes.masks.of(mask, n_tokens, n_keys, setting.dtype)
        with emulated("plain"):
            chunks = [ChunkInputs(queries, (keys, values), pages, index, m, 0.1, None) for m in (form, mask)]
            got, want = (lanes.attend(chunk).astype(mx.float32) for chunk in chunks)
            assert got.shape == want.shape
            assert mx.allclose(got, want, rtol=0, atol=2e-3)
