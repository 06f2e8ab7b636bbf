"""mlx-lm's BatchGenerator with a short way to the first token of a warm turn."""

from collections import deque
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx_lm.generate import BatchGenerator, GenerationBatch, PromptProcessingBatch

from turbocache.mlxlm.head import LastLogits

_SHORT = 64
"""Prompts of at most this many new tokens go through the model in one piece."""
_SHORT_TOGETHER = 256
"""Most tokens, padding included, of the short prompts that go together: each of them gets logits."""
_UNCUT = 2
"""Segments of a prompt without stops: the generator cuts off its last token."""


class ShortPromptGenerator(BatchGenerator):
    """BatchGenerator whose short prompts need one forward pass to their first token.

    The original feeds all tokens but the last to the model, then makes a decode step of the other rows, then feeds the
    last token: three passes over the weights. Relies on what the generator keeps to itself (pinned to mlx-lm 0.32.2;
    tests watch it), and mlx-lm gives none of it types: hence the two exceptions below.
    """

    def __init__(self, model: Module, **options: Any) -> None:
        super().__init__(model, **options)
        self._last_logits = LastLogits(model)

    def _next(self) -> Any:
        if opened := self._open_short():
            return opened, []
        return super()._next()  # type: ignore[no-untyped-call]

    def _open_short(self) -> list[PromptProcessingBatch.Response]:
        """Take short prompts that wait, as far as there is room, through the model and into the decoding batch."""
        room = self.completion_batch_size - len(self._generation_batch) - len(self._prompt_batch)
        chosen: list[tuple[Any, list[int]]] = []
        others, longest = [], 0
        for sequence in self._unprocessed_sequences:
            prompt = [token for segment in sequence[1] for token in segment]
            longest_then = max(longest, len(prompt))
            fits = len(chosen) < room and longest_then * (len(chosen) + 1) <= _SHORT_TOGETHER
            if fits and len(prompt) <= _SHORT and len(sequence[1]) <= _UNCUT:
                chosen.append((sequence, prompt))
                longest = longest_then
            else:
                others.append(sequence)
        if not chosen:
            return []
        self._unprocessed_sequences = deque([*(sequence for sequence, _ in chosen), *others])
        batch = self._make_batch(len(chosen))
        del self._currently_processing[-len(chosen) :]
        self._generation_batch.extend(_opened(batch, [prompt for _, prompt in chosen], self._last_logits))
        return [
            PromptProcessingBatch.Response(sequence[0], (len(prompt), len(prompt)), True, True)
            for sequence, prompt in chosen
        ]


class _Known(Module):
    """A forward pass that has been made."""

    def __init__(self, logits: mx.array) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._logits = logits

    def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        return self._logits


def _opened(batch: PromptProcessingBatch, prompts: list[list[int]], last_logits: LastLogits) -> GenerationBatch:
    """All tokens of the rows' prompts through the model in one pass; their first tokens are sampled."""
    lengths = [len(prompt) for prompt in prompts]
    padding = [max(lengths) - n for n in lengths]
    tokens = mx.array([prompt + [0] * n for prompt, n in zip(prompts, padding, strict=True)])
    if any(padding):
        for cache in batch.prompt_cache:
            cache.prepare(lengths=lengths, right_padding=padding)
    logits = last_logits(tokens, batch.prompt_cache, mx.array(lengths) - 1)
    if any(padding):
        for cache in batch.prompt_cache:
            cache.finalize()
    for known, prompt in zip(batch.tokens, prompts, strict=True):
        known += prompt[:-1]
    opened = GenerationBatch(
        _Known(logits[:, None]),
        batch.uids,
        mx.array([prompt[-1] for prompt in prompts]),
        batch.prompt_cache,
        batch.tokens,
        batch.samplers,
        batch.fallback_sampler,
        batch.logits_processors,
        batch.stop_sequences,
        batch.max_tokens,
    )
    mx.async_eval([cache.state for cache in batch.prompt_cache])
    return opened
