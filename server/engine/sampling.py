"""Draws a request's tokens: mlx-lm's samplers and logits processors, with OpenAI's meaning."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.sample_utils import (
    LogitsProcessor,
    Sampler,
    apply_min_p,
    apply_top_k,
    apply_top_p,
    make_frequency_penalty,
    make_logits_processors,
    make_presence_penalty,
    make_repetition_penalty,
    make_sampler,
)

from server.protocol import SamplingParams

_ALL = 1 << 30
"""A context size that includes every token."""
_LEAST_TEMPERATURE = 1e-3
"""Below it every draw is greedy. float16 can't hold log-probabilities divided by much less."""
_LEAST_TOP_P = 1e-6
"""Keeps the likeliest token alone, as any smaller value does."""


_SUGGESTED = {
    "temperature": (0.0, 2.0),
    "top_p": (1e-6, 1.0),
    "top_k": (0, 2**31 - 1),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 10.0),
    "frequency_penalty": (-2.0, 2.0),
    "presence_penalty": (-2.0, 2.0),
}
"""Fields that a model's generation_config.json may set, and their ranges in requests. The last two are OpenAI's; the
other names are those of transformers.
"""


def suggested_sampling(config: Mapping[str, Any]) -> SamplingParams:
    """How the model's makers draw tokens, by its generation_config.json. What the file does not say, or says with a
    value that no request may have, is OpenAI's default. `do_sample: false` is greedy.
    """
    found: dict[str, Any] = {"temperature": 0.0} if config.get("do_sample") is False else {}
    for name, (least, most) in _SUGGESTED.items():
        value = config.get(name)
        kinds = (int,) if isinstance(most, int) else (int, float)
        if name not in found and isinstance(value, kinds) and not isinstance(value, bool) and least <= value <= most:
            found[name] = value
    return SamplingParams(**found)


def clamp_sampling(params: SamplingParams, n_tokens: int) -> SamplingParams:
    """Parameters that draw the same and are safe for mlx-lm, which divides by the temperature, reads beyond the
    vocabulary if `top_p` is 0 in float32, and raises for a `top_k` of the whole vocabulary (`n_tokens`).
    """
    temperature = 0.0 if params.temperature < _LEAST_TEMPERATURE else params.temperature
    top_k = params.top_k if params.top_k < n_tokens else 0
    return replace(params, temperature=temperature, top_p=max(params.top_p, _LEAST_TOP_P), top_k=top_k)


def sampler_for(params: SamplingParams) -> Sampler:
    """A sampler without a seed. It can serve many rows at once."""
    return make_sampler(temp=params.temperature, top_p=params.top_p, min_p=params.min_p, top_k=params.top_k)


def seeded_sampler(params: SamplingParams, seed: int) -> Sampler:
    """A sampler for one row. Its random numbers depend only on the seed and the token's position, not on the batch.

    mlx-lm's own samplers share one random generator per process.
    """
    if params.temperature == 0:
        return sampler_for(params)
    key = mx.random.key(seed % (1 << 64))

    def draw(logprobs: mx.array) -> mx.array:
        nonlocal key
        if params.top_p < 1.0:
            logprobs = apply_top_p(logprobs, params.top_p)
        if params.min_p > 0.0:
            logprobs = apply_min_p(logprobs, params.min_p)
        if params.top_k > 0:
            logprobs = apply_top_k(logprobs, params.top_k)
        key, now = mx.random.split(key)
        return mx.random.categorical(logprobs * (1.0 / params.temperature), key=now)

    return draw


def processors_for(params: SamplingParams, n_prompt: int) -> list[LogitsProcessor]:
    """Penalties and biases. Presence and frequency penalties count the answer's tokens, which follow `n_prompt` tokens,
    as OpenAI defines them. The repetition penalty counts the prompt too (https://arxiv.org/abs/1909.05858).
    """
    processors: list[LogitsProcessor] = make_logits_processors(dict(params.logit_bias)) if params.logit_bias else []
    if not math.isclose(params.repetition_penalty, 1.0):
        processors.append(make_repetition_penalty(params.repetition_penalty, _ALL))
    if params.presence_penalty:
        processors.append(_of_answer(make_presence_penalty(params.presence_penalty, _ALL), n_prompt))
    if params.frequency_penalty:
        processors.append(_of_answer(make_frequency_penalty(params.frequency_penalty, _ALL), n_prompt))
    return processors


def _of_answer(processor: LogitsProcessor, n_prompt: int) -> LogitsProcessor:
    return lambda tokens, logits: processor(tokens[n_prompt:], logits)


def top_tokens(logprobs: mx.array, token: int, n: int) -> tuple[float, list[tuple[int, float]]]:
    """The log-probability of `token`, and the `n` likeliest tokens with theirs, best first. `logprobs` is `[vocab]`."""
    values = np.array(logprobs.astype(mx.float32))
    best = np.argpartition(-values, n)[:n]
    best = best[np.argsort(-values[best], kind="stable")]
    return float(values[token]), [(int(i), float(values[i])) for i in best]
