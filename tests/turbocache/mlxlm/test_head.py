from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from mlx_lm.models.cache import make_prompt_cache

from turbocache.mlxlm.head import LastLogits


def tied(tie: bool) -> Module:
    mx.random.seed(3)
    return llama.Model(
        llama.ModelArgs(
            model_type="llama", hidden_size=32, num_hidden_layers=1, intermediate_size=64, num_attention_heads=2,
            rms_norm_eps=1e-5, vocab_size=61, tie_word_embeddings=tie,
        )
    )  # fmt: skip


class _Headless(Module):
    """A model with a head of its own making."""

    def __init__(self) -> None:
        super().__init__()
        self.table = mx.random.normal((97, 97))

    def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        return self.table[tokens]


@pytest.mark.parametrize("kind", ["tied", "untied", "quantised", "gemma", "own head"])
@pytest.mark.parametrize("length", [1, 7])
def test_logits_are_those_of_the_whole_model(kind: str, length: int, gemma: Module) -> None:
    models = {"tied": lambda: tied(True), "untied": lambda: tied(False), "own head": _Headless, "gemma": lambda: gemma}
    model = models.get(kind, models["tied"])()
    if kind == "quantised":
        nn.quantize(model, group_size=32, bits=8)
    tokens = mx.array(np.random.default_rng(0).integers(0, 61, size=(3, length)))
    columns = mx.array([0, length - 1, length // 2])

    def cache() -> Any:
        return [] if kind == "own head" else make_prompt_cache(model)

    before = dict(tree_flatten(model.parameters()))
    want = model(tokens, cache=cache())[mx.arange(3), columns]
    got = LastLogits(model)(tokens, cache(), columns)
    np.testing.assert_allclose(np.array(got), np.array(want), atol=1e-4)
    # The model is as it was.
    after = dict(tree_flatten(model.parameters()))
    assert list(before) == list(after)
    assert all(before[name] is after[name] for name in before)
    assert model(tokens, cache=cache()).shape[1] == length


@pytest.mark.parametrize("tie", [False, True])
def test_the_head_sees_one_position_a_row_and_is_given_back_after_an_error(
    tie: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = tied(tie), []
    head = nn.Embedding if tie else nn.Linear
    name = "as_linear" if tie else "__call__"
    original = getattr(head, name)

    def note(self: Any, x: mx.array) -> mx.array:
        if self.weight.shape[0] == 61:
            seen.append(x.shape)
        return original(self, x)

    monkeypatch.setattr(head, name, note)
    last = LastLogits(model)
    assert last(mx.zeros((2, 9), mx.int32), make_prompt_cache(model), mx.array([3, 8])).shape == (2, 61)
    assert seen == [(2, 1, 32)]
    with pytest.raises(AttributeError):
        last(mx.zeros((2, 9), mx.int32), [object()], mx.array([3, 8]))
    model(mx.zeros((2, 9), mx.int32))
    assert seen[-1] == (2, 9, 32)
