"""How a request's tokens are drawn: mlx-lm's samplers and logits processors, with OpenAI's meaning."""

import math
from dataclasses import replace

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
"""As a context size: every token there is."""
_LEAST_TEMPERATURE = 1e-3
"""Below it only the likeliest token is ever drawn; float16 can't hold log-probabilities divided by much less."""
_LEAST_TOP_P = 1e-6
"""Less than any likeliest token's probability, so that this one alone is kept, as with still less."""


def bearable(params: SamplingParams, n_tokens: int) -> SamplingParams:
    """The same draws by numbers that the arithmetic bears: mlx-lm divides by the temperature, reads beyond the
    vocabulary where `top_p` is nothing in float32, and raises for a `top_k` that keeps everything.
    """
    temperature = 0.0 if params.temperature < _LEAST_TEMPERATURE else params.temperature
    top_k = params.top_k if params.top_k < n_tokens else 0
    return replace(params, temperature=temperature, top_p=max(params.top_p, _LEAST_TOP_P), top_k=top_k)


def sampler_for(params: SamplingParams) -> Sampler:
    """The sampler of parameters without a seed; it may serve many rows at once."""
    return make_sampler(temp=params.temperature, top_p=params.top_p, min_p=params.min_p, top_k=params.top_k)


def seeded_sampler(params: SamplingParams, seed: int) -> Sampler:
    """A sampler for one row whose random numbers depend on the seed and the token's place alone, whoever else is in the
    batch. mlx-lm's draw from one generator for the whole process.
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
    """Penalties and biases. As OpenAI defines them presence and frequency penalties look at the answer alone, which
    begins behind `n_prompt` tokens; the repetition penalty looks at the prompt as well (https://arxiv.org/abs/1909.05858).
    """
    found: list[LogitsProcessor] = make_logits_processors(dict(params.logit_bias)) if params.logit_bias else []
    if not math.isclose(params.repetition_penalty, 1.0):
        found.append(make_repetition_penalty(params.repetition_penalty, _ALL))
    if params.presence_penalty:
        found.append(_of_answer(make_presence_penalty(params.presence_penalty, _ALL), n_prompt))
    if params.frequency_penalty:
        found.append(_of_answer(make_frequency_penalty(params.frequency_penalty, _ALL), n_prompt))
    return found


def _of_answer(processor: LogitsProcessor, n_prompt: int) -> LogitsProcessor:
    return lambda tokens, logits: processor(tokens[n_prompt:], logits)


def top_tokens(logprobs: mx.array, token: int, n: int) -> tuple[float, list[tuple[int, float]]]:
    """From one row's log-probabilities `[vocab]`: the token's own, and the `n` likeliest tokens with theirs, best
    first.
    """
    values = np.array(logprobs.astype(mx.float32))
    best = np.argpartition(-values, n)[:n]
    best = best[np.argsort(-values[best], kind="stable")]
    return float(values[token]), [(int(i), float(values[i])) for i in best]
