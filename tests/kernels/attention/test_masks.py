"""Masks in the form that a backend likes best hide what plain ones hide, and all that they have too much."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.attention.masks import Mask, MaskForm, round_up

FORMS = [MaskForm(), MaskForm(added=True), MaskForm(rounded=True), MaskForm(added=True, rounded=True)]


def seen(mask: Mask, n_queries: int, n_keys: int) -> np.ndarray:
    """By the definition, bool `[n_queries, n_keys]`."""
    if mask is None:
        return np.ones((n_queries, n_keys), dtype=bool)
    if isinstance(mask, str):
        return np.tril(np.ones((n_queries, n_keys), dtype=bool), n_keys - n_queries)
    mask = mask[0, 0]
    return np.array(mask if mask.dtype == mx.bool_ else mask == 0)


@given(st.integers(1, 200), st.integers(0, 3000), st.sampled_from(FORMS), st.integers(0, 2), st.integers(0, 99))
def test_a_form_sees_the_same(n_queries: int, more: int, form: MaskForm, kind: int, seed: int) -> None:
    n_keys = n_queries + more
    some = np.random.default_rng(seed).random((1, 1, n_queries, n_keys)) < 0.5
    mask: Mask = (mx.array(some), "causal", None)[kind]
    got = form.of(mask, n_queries, n_keys, mx.float16)
    if isinstance(got, mx.array):
        assert got.dtype == (mx.float16 if form.added else mx.bool_)
        shown = seen(got, *got.shape[2:])
        assert not shown[n_queries:].any()
        assert not shown[:, n_keys:].any()
        if form.added:
            assert set(np.unique(np.array(got))) <= {0.0, -np.inf}
        got = got[:, :, :n_queries, :n_keys]
    assert (seen(got, n_queries, n_keys) == seen(mask, n_queries, n_keys)).all()


@pytest.mark.parametrize(("least", "n_sizes"), [(64, 1), (256, 4)])
def test_there_are_few_rounded_sizes(least: int, n_sizes: int) -> None:
    """So that a plan is there for the next prompt, whatever its length, and little is computed in vain."""
    sizes = {n: round_up(n, least, n_sizes) for n in range(1, (1 << 17) + 1)}
    assert len(set(sizes.values())) <= n_sizes * (18 - least.bit_length() + 1)
    assert all(n <= size < n + max(least, n / n_sizes) for n, size in sizes.items())
    assert all(sizes[size] == size for size in sizes.values())
