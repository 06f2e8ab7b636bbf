"""Logits of some positions only, where the model's head would compute all of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.base import Module


class LastLogits:
    """A model's logits at one position per row. Of a short prompt the head's other rows are a good part of the work.

    While the model runs, its head (a module `lm_head`, or the embedding used as one) is handed the wanted positions
    only. A model whose head is neither computes all logits, from which they are then taken.
    """

    def __init__(self, model: Module) -> None:
        modules = model.modules()
        self._model = model
        self._owners = [module for module in modules if isinstance(module.get("lm_head"), Module)]
        self._embeddings = [m for m in modules if isinstance(m, nn.Embedding | nn.QuantizedEmbedding)]

    def __call__(self, tokens: mx.array, cache: list[Any], columns: mx.array) -> mx.array:
        """`tokens` `[B, L]` through the model; row b's logits after token `columns[b]`, `[B, vocabulary]`."""
        rows = mx.arange(tokens.shape[0])

        def wanted(x: mx.array) -> mx.array:
            return x[rows, columns][:, None] if x.ndim == 3 and x.shape[:2] == tokens.shape else x

        with self._heads_behind(wanted):
            logits: mx.array = self._model(tokens, cache=cache)
        return logits[:, 0] if logits.shape[1] == 1 else logits[rows, columns]

    @contextmanager
    def _heads_behind(self, wanted: Any) -> Iterator[None]:
        heads = [owner.lm_head for owner in self._owners]
        try:
            for owner, head in zip(self._owners, heads, strict=True):
                owner.lm_head = _Behind(wanted, head)
            for embedding in self._embeddings:
                vars(embedding)["as_linear"] = _Behind(wanted, embedding.as_linear)
            yield
        finally:
            for owner, head in zip(self._owners, heads, strict=True):
                owner.lm_head = head
            for embedding in self._embeddings:
                vars(embedding).pop("as_linear", None)


class _Behind(Module):
    """A head that is handed the wanted positions only. A module, because a model's parts have to be."""

    def __init__(self, wanted: Any, head: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._wanted, self._head = wanted, head

    def __call__(self, x: mx.array) -> mx.array:
        out: mx.array = self._head(self._wanted(x))
        return out
