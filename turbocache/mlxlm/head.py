"""Logits of some positions, without the cost of the others."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.base import Module

from turbocache.mlxlm.prompt_cache import PromptCache


class LastLogits:
    """A model's logits at one position per row. In a short prompt the other positions are much of the head's work.

    While the model runs, its head (a module `lm_head`, or the embedding used as one) gets the selected positions only.
    A model with another kind of head computes all logits, and the selected ones are taken from them.
    """

    def __init__(self, model: Module) -> None:
        modules = model.modules()
        self._model = model
        self._owners = [module for module in modules if isinstance(module.get("lm_head"), Module)]
        self._embeddings = [m for m in modules if isinstance(m, nn.Embedding | nn.QuantizedEmbedding)]

    def __call__(self, tokens: mx.array, cache: PromptCache, columns: mx.array) -> mx.array:
        """Run `tokens` `[B, L]`. Returns row b's logits after token `columns[b]`, `[B, vocabulary]`."""
        rows = mx.arange(tokens.shape[0])

        def select(x: mx.array) -> mx.array:
            return x[rows, columns][:, None] if x.ndim == 3 and x.shape[:2] == tokens.shape else x

        with self._selected(select):
            logits: mx.array = self._model(tokens, cache=cache)
        return logits[:, 0] if logits.shape[1] == 1 else logits[rows, columns]

    @contextmanager
    def _selected(self, select: Any) -> Iterator[None]:
        heads = [owner.lm_head for owner in self._owners]
        try:
            for owner, head in zip(self._owners, heads, strict=True):
                owner.lm_head = _SelectiveHead(select, head)
            for embedding in self._embeddings:
                vars(embedding)["as_linear"] = _SelectiveHead(select, embedding.as_linear)
            yield
        finally:
            for owner, head in zip(self._owners, heads, strict=True):
                owner.lm_head = head
            for embedding in self._embeddings:
                vars(embedding).pop("as_linear", None)


class _SelectiveHead(Module):
    """Gives a head the selected positions only. A Module, because a model's parts must be modules."""

    def __init__(self, select: Any, head: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._select, self._head = select, head

    def __call__(self, x: mx.array) -> mx.array:
        out: mx.array = self._head(self._select(x))
        return out
