"""Times mlx-lm's own generation loops: `generate_step` for one row, BatchGenerator for several."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx_lm.generate import BatchGenerator, generate_step, maybe_quantize_kv_cache

from turbocache.mlxlm.prompt_cache import PromptCache

AtFirst = Callable[[PromptCache], None]
"""Called with a row's cache after the first tokens. Its time counts as the second token's."""


@dataclass(slots=True)
class Times:
    """Seconds since the start of the prompts."""

    prefilled: float = 0.0
    """When the prompts were read, except their last token."""
    tokens: list[float] = field(default_factory=list)
    """When each token was out for all rows."""

    def steps(self, skipped: int) -> list[float]:
        """Seconds of each decode step after the first `skipped` tokens."""
        times = self.tokens[skipped:]
        return [after - before for before, after in pairwise(times)]


@dataclass(frozen=True, slots=True)
class Loop:
    """One generation: reads the prompts in chunks and draws `n_tokens` greedily for each."""

    model: Module
    caches: list[PromptCache]
    prompts: Sequence[Sequence[int]]
    n_tokens: int
    chunk: int
    options: dict[str, Any]
    """Options of `generate_step`, such as `kv_bits`."""

    def run(self, at_first: AtFirst) -> Times:
        """Raises mlx-lm's error for caches that it can't use in this way."""
        return self._one(at_first) if len(self.prompts) == 1 else self._batch(at_first)

    def _one(self, at_first: AtFirst) -> Times:
        times, start = Times(), time.perf_counter()

        def progress(done: int, total: int) -> None:
            # mlx-lm calls this again after the first token. Only calls during the prompt count.
            if done < total:
                times.prefilled = time.perf_counter() - start

        tokens = generate_step(
            mx.array(list(self.prompts[0])),
            self.model,
            max_tokens=self.n_tokens,
            prompt_cache=self.caches[0],
            prefill_step_size=self.chunk,
            prompt_progress_callback=progress,
            **self.options,
        )
        for _ in tokens:
            times.tokens.append(time.perf_counter() - start)
            if len(times.tokens) == 1:
                at_first(self.caches[0])
        return times

    def _batch(self, at_first: AtFirst) -> Times:
        if self.options:  # BatchGenerator has no such options
            for cache in self.caches:
                maybe_quantize_kv_cache(cache, **self.options)
        rows, n, chunk = len(self.prompts), self.n_tokens, self.chunk
        generator = BatchGenerator(
            self.model, completion_batch_size=rows, prefill_batch_size=rows, prefill_step_size=chunk, max_tokens=n
        )
        BatchGenerator.close(generator)  # undoes its wired limit, as the server does
        times, start = Times(), time.perf_counter()
        uids = generator.insert([list(prompt) for prompt in self.prompts], caches=self.caches)
        running = rows
        while running:
            progress, tokens = generator.next()
            if progress and not times.tokens and not any(response.end_of_prompt for response in progress):
                times.prefilled = time.perf_counter() - start
            if tokens:
                times.tokens.append(time.perf_counter() - start)
                if len(times.tokens) == 1:
                    at_first(generator.extract_cache(uids[:1])[uids[0]][0])
            running -= sum(token.finish_reason is not None for token in tokens)
        return times
