"""A first answer before the first request: a backend's last check, and the time in which a device compiles."""

import time
from collections.abc import Iterable

from server.engine.generator import Generator
from server.protocol import SamplingParams
from turbocache.mlxlm.model import LoadedModel
from turbocache.store import CacheStore

_ANSWER = 4
"""Tokens of an answer."""


def rehearse(model: LoadedModel, store: CacheStore, chunk: int, lengths: Iterable[int]) -> float:
    """Answer a prompt of each of these lengths as requests are answered; returns the seconds it took.

    Raises FloatingPointError when logits are not finite, and whatever the model or its cache raises.
    """
    start = time.perf_counter()
    generator = Generator(model, max_batch=1, prefill_chunk=chunk)
    for length in lengths:
        prompt = [1 + i % 32 for i in range(length)]
        generator.insert(prompt, 0, store.new_cache(), _ANSWER, SamplingParams())
        ended = False
        while not ended:
            _, tokens = generator.next()
            if not all(generator.is_finite(response.token) for response in tokens):
                raise FloatingPointError(f"logits after a prompt of {length} tokens are not finite")
            ended = any(response.finish_reason for response in tokens)
    return time.perf_counter() - start
