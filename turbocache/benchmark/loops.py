"""mlx-lm's own generation loops with a stop watch: `generate_step` for one row, BatchGenerator for several."""

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
"""Called with a row's cache when the first tokens are out; its time counts as the second token's."""


@dataclass(slots=True)
class Times:
    """Seconds since the prompts were handed over: when they were read but for their last token, and when each token of
    all rows was out.
    """

    prefilled: float = 0.0
    tokens: list[float] = field(default_factory=list)

    def steps(self, skipped: int) -> list[float]:
        """Seconds of each decode step behind the first `skipped`."""
        times = self.tokens[skipped:]
        return [after - before for before, after in pairwise(times)]


def play(
    model: Module,
    caches: list[PromptCache],
    prompts: Sequence[Sequence[int]],
    n_tokens: int,
    chunk: int,
    options: dict[str, Any],
    at_first: AtFirst,
) -> Times:
    """Read the prompts in chunks and draw `n_tokens` greedily for each. `options`: `kv_bits` and its like, as mlx-lm's
    `generate_step` takes them. Raises what mlx-lm raises for caches that it can't use so.
    """
    if len(prompts) == 1:
        return _one(model, caches[0], prompts[0], n_tokens, chunk, options, at_first)
    return _batch(model, caches, prompts, n_tokens, chunk, options, at_first)


def _one(
    model: Module,
    cache: PromptCache,
    prompt: Sequence[int],
    n_tokens: int,
    chunk: int,
    options: dict[str, Any],
    at_first: AtFirst,
) -> Times:
    times, start = Times(), time.perf_counter()

    def progress(done: int, total: int) -> None:
        # Told once more when the first token is out, which is no news of the prompt.
        if done < total:
            times.prefilled = time.perf_counter() - start

    tokens = generate_step(
        mx.array(list(prompt)),
        model,
        max_tokens=n_tokens,
        prompt_cache=cache,
        prefill_step_size=chunk,
        prompt_progress_callback=progress,
        **options,
    )
    for _ in tokens:
        times.tokens.append(time.perf_counter() - start)
        if len(times.tokens) == 1:
            at_first(cache)
    return times


def _batch(
    model: Module,
    caches: list[PromptCache],
    prompts: Sequence[Sequence[int]],
    n_tokens: int,
    chunk: int,
    options: dict[str, Any],
    at_first: AtFirst,
) -> Times:
    if options:  # BatchGenerator has no such options
        for cache in caches:
            maybe_quantize_kv_cache(cache, **options)
    rows = len(prompts)
    generator = BatchGenerator(
        model, completion_batch_size=rows, prefill_batch_size=rows, prefill_step_size=chunk, max_tokens=n_tokens
    )
    BatchGenerator.close(generator)  # undoes the wired limit that it has just set, as the server does
    times, start = Times(), time.perf_counter()
    uids = generator.insert([list(prompt) for prompt in prompts], caches=caches)
    running = rows
    while running:
        progress, tokens = generator.next()
        if progress and not times.tokens and not any(told.end_of_prompt for told in progress):
            times.prefilled = time.perf_counter() - start
        if tokens:
            times.tokens.append(time.perf_counter() - start)
            if len(times.tokens) == 1:
                at_first(generator.extract_cache(uids[:1])[uids[0]][0])
        running -= sum(token.finish_reason is not None for token in tokens)
    return times
