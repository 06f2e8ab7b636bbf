"""The adapter to mlx-lm's BatchGenerator. No other module uses mlx-lm's private attributes.

The private attributes are those of one version of mlx-lm, so importing this module with another one raises
`UnsupportedVersion`.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from mlx_lm.generate import BatchGenerator, GenerationBatch, PromptProcessingBatch
from mlx_lm.sample_utils import Sampler

from turbocache.mlxlm import check_version
from turbocache.mlxlm.head import LastLogits
from turbocache.mlxlm.prompt_cache import PromptCache

check_version()

NOT_FINITE = -1
"""Replaces a token drawn from logits that are not finite."""
_SHORT = 64
"""A prompt of at most this many new tokens goes through the model in one pass."""
_SHORT_TOGETHER = 256
"""Maximum tokens, with padding, of short prompts that share one pass: each token gets logits."""
_UNCUT = 2
"""Segments of a prompt without stops: the generator splits off the last token."""


def mark_not_finite(sampler: Sampler) -> Sampler:
    """The sampler, with NOT_FINITE (int32) in place of a token whose log-probability is not finite.

    Such a token means that a kernel failed. The mark travels in the row's own token, so it needs no bookkeeping of
    which sampler call served which row. It is part of the step's graph: reading it waits for nothing else. Log-
    probabilities are normalised, so one logit that is NaN or +inf makes all of them NaN or -inf. The next forward
    pass takes -1 as an index from the end, so a marked row stays within the embedding until it is removed.
    """

    def draw(logprobs: mx.array) -> mx.array:
        tokens = sampler(logprobs)
        finite = mx.isfinite(mx.take_along_axis(logprobs, tokens[:, None], axis=-1)).squeeze(-1)
        return mx.where(finite, tokens.astype(mx.int32), NOT_FINITE)

    return draw


class ShortPromptGenerator(BatchGenerator):
    """BatchGenerator with one forward pass to the first token of a short prompt, and with public access to its rows.

    The original needs three passes over the weights: it feeds all tokens but the last to the model, makes a decode
    step of the other rows, and then feeds the last token. mlx-lm has no types here, hence the ignored ones.
    """

    def __init__(self, model: Module, **options: Any) -> None:
        super().__init__(model, **options)
        # Undoes the wired limit that BatchGenerator has just set: users' machines ran out of memory under it.
        self.close()
        self._last_logits = LastLogits(model)

    def current_token(self, uid: int) -> int | None:
        """The token that a row feeds into the running decode step. None if the row has none."""
        batch = self._generation_batch
        if uid not in batch.uids:
            return None
        token = int(np.array(batch._current_tokens)[batch.uids.index(uid)])
        return None if token == NOT_FINITE else token

    def next_tokens(self, uids: Iterable[int]) -> dict[int, int]:
        """The tokens that the following `next` returns for these rows, if they decode. Waits for the step.

        `next` itself starts another decode step first, which would delay an answer's first token.
        """
        wanted, batch = set(uids), self._generation_batch
        return {uid: int(batch._next_tokens[row].item()) for row, uid in enumerate(batch.uids) if uid in wanted}

    def next_logprobs(self, uid: int) -> mx.array:
        """The log-probabilities `[vocab]` from which a row's token in `next_tokens` was drawn."""
        batch = self._generation_batch
        logprobs: mx.array = batch._next_logprobs[batch.uids.index(uid)]
        return logprobs

    def prompt_caches(self) -> Iterator[tuple[list[int], PromptCache]]:
        """All prompt caches between two steps, each with the uids of its rows. Read only."""
        for sequence in self._unprocessed_sequences:
            yield [sequence[0]], sequence[3]
        for batch in (self._prompt_batch, self._generation_batch):
            yield batch.uids, batch.prompt_cache

    def _next(self) -> Any:
        if opened := self._open_short():
            return opened, []
        return super()._next()  # type: ignore[no-untyped-call]

    def _open_short(self) -> list[PromptProcessingBatch.Response]:
        """Run waiting short prompts through the model and move them into the decoding batch, if there is room."""
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
        self._generation_batch.extend(_open(batch, [prompt for _, prompt in chosen], self._last_logits))
        return [
            PromptProcessingBatch.Response(sequence[0], (len(prompt), len(prompt)), True, True)
            for sequence, prompt in chosen
        ]


class _FixedLogits(Module):
    """Replaces the model in a forward pass that is already computed."""

    def __init__(self, logits: mx.array) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._logits = logits

    def __call__(self, tokens: mx.array, cache: PromptCache) -> mx.array:
        return self._logits


def _open(batch: PromptProcessingBatch, prompts: list[list[int]], last_logits: LastLogits) -> GenerationBatch:
    """Run all tokens of the prompts through the model in one pass and sample the first token of each row."""
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
    for cached, prompt in zip(batch.tokens, prompts, strict=True):
        cached += prompt[:-1]
    opened = GenerationBatch(
        _FixedLogits(logits[:, None]),
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
