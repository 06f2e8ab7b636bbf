"""What is checked of every architecture: its plan, and that caches made by the plan say what mlx-lm's own say."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

from tests.models.tiny import SEED, VOCABULARY
from turbocache.cache.ring import RingConfig
from turbocache.mlxlm.plan import LayerPlan
from turbocache.presets import preset
from turbocache.store import CacheStore, checked_plans

RING = RingConfig(keep=16, window=64)
CHUNKS = (130, 130, 40)
"""Tokens of a prompt's chunks: every one but the first meets pages that earlier ones made."""
N_DECODED = 10
ROWS = (150, 60)
"""Tokens of a batch's prompts: one row has pages, the other has none."""

SAME = 3e-5
"""Largest difference between two ways of computing the same in float32, by the largest logit. Found: at most 7e-6."""
CLOSE = 0.05
"""Most that codes of 8 bits may cost, in KL divergence, by what it costs to have other tokens in the pages."""
NEEDED = 20 * SAME
"""Least change of the logits, by the largest one, when the tokens in the pages are others. Less would prove nothing."""


@dataclass(frozen=True)
class Outcome:
    """What was found; None where there was nothing to check.

    off: difference to mlx-lm's own caches with preset `off`, by the largest logit, over all tokens.
    kld, needed_kld: mean KL divergence in nats to mlx-lm's own, with 8-bit codes, and with other tokens in the pages.
    needed: difference of the logits with other tokens in the pages, by the largest one.
    padded, joined: difference of a batch's rows to the same rows alone, with a right-padded prompt, and with prompts
    read before they are merged; a text is what mlx-lm's own caches fail with. own_padded is the same with these.
    generated: whether mlx-lm's generation loop gives the same tokens.
    """

    plans: list[LayerPlan]
    off: float | None = None
    kld: float | None = None
    needed_kld: float | None = None
    needed: float | None = None
    padded: float | None = None
    joined: float | None = None
    own_padded: float | str | None = None
    own_joined: float | str | None = None
    generated: bool | None = None

    @property
    def compressed(self) -> bool:
        return any(plan.compressed for plan in self.plans)


def examine(model: Module) -> Outcome:
    """Every check of one model. What mlx-lm's own caches can't do is not held against ours."""
    plans = checked_plans(model)
    if not any(plan.compressed for plan in plans):
        return Outcome(plans)

    def own() -> list[Any]:
        return make_prompt_cache(model)

    off, coded = (CacheStore(model, plans, preset(name), "reference", RING, 64) for name in ("off", "k8v8"))
    want, other = read(model, own()), read(model, own(), seed=SEED + 1)
    behind = slice(-N_DECODED - CHUNKS[-1], None)
    own_padded, own_joined = _attempt(_padded_error, model, own), _attempt(_joined_error, model, own)
    return Outcome(
        plans=plans,
        off=relative_error(read(model, off.new_cache()), want),
        kld=mean_kld(want[behind], read(model, coded.new_cache())[behind]),
        needed_kld=mean_kld(want[-N_DECODED:], other[-N_DECODED:]),
        needed=relative_error(other[-N_DECODED:], want[-N_DECODED:]),
        padded=_padded_error(model, off.new_cache) if _right(own_padded) else None,
        joined=_joined_error(model, off.new_cache) if _right(own_joined) else None,
        own_padded=own_padded,
        own_joined=own_joined,
        generated=_generated(model, off.new_cache()) == _generated(model, own()),
    )


def complaints(outcome: Outcome) -> list[str]:
    """What is wrong with a model's compressed layers, in words; empty when all is well."""
    if not outcome.compressed:
        return []
    numbers = outcome.needed, outcome.off, outcome.kld, outcome.needed_kld
    needed, off, kld, needed_kld = (math.inf if number is None else number for number in numbers)
    found = [
        (needed < NEEDED, f"the logits hardly depend on what is in pages: {needed:.1e}"),
        (off > SAME, f"logits differ by {off:.1e} with preset off"),
        (kld > CLOSE * needed_kld, f"KLD {kld:.1e} with k8v8"),
        ((outcome.padded or 0.0) > SAME, f"rows of a padded batch differ by {outcome.padded}"),
        ((outcome.joined or 0.0) > SAME, f"rows of a merged batch differ by {outcome.joined}"),
        (not outcome.generated, "mlx-lm's generation gives other tokens"),
    ]
    return [words for wrong, words in found if wrong]


def tokens(n: int, seed: int = SEED) -> list[int]:
    """The first `n` tokens of a random text."""
    text: list[int] = np.array(mx.random.randint(0, VOCABULARY, (512,), key=mx.random.key(seed))).tolist()
    return text[:n]


def read(model: Module, cache: list[Any], seed: int = SEED) -> mx.array:
    """Logits after every token of a chunked prompt and of some decode steps, `[tokens, vocabulary]`.

    Another seed changes the tokens that are in pages at the end, and no others.
    """
    text = tokens(sum(CHUNKS) + N_DECODED)
    in_pages = slice(RING.keep, len(text) - RING.window - 64)
    text[in_pages] = tokens(len(text), seed)[in_pages]
    logits, start = [], 0
    for n in (*CHUNKS, *[1] * N_DECODED):
        logits.append(model(mx.array([text[start : start + n]]), cache=cache)[0])
        mx.eval(logits[-1])
        start += n
    return mx.concatenate(logits)


def relative_error(got: mx.array, want: mx.array) -> float:
    """Largest difference by the largest logit; infinite where numbers are not finite."""
    error = float(mx.abs(got - want).max() / mx.abs(want).max())
    return error if math.isfinite(error) else math.inf


def mean_kld(want: mx.array, got: mx.array) -> float:
    """Mean KL divergence of `got` to `want` in nats; both are logits, `[tokens, vocabulary]`."""
    p, q = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (want, got))
    return max(0.0, float(mx.sum(mx.exp(p) * (p - q), axis=-1).mean()))


NewCache = Callable[[], list[Any]]


def _attempt(error: Callable[[Module, NewCache], float], model: Module, own: NewCache) -> float | str:
    try:
        return error(model, own)
    except Exception as problem:  # caches without merge, positions that must be one number, ...
        return f"{type(problem).__name__}: {problem}"


def _right(own: float | str) -> bool:
    return isinstance(own, float) and own <= SAME


def _padded_error(model: Module, new_cache: NewCache) -> float:
    """Rows whose prompts are read together, right-padded, as mlx-lm's generator does it."""
    prompts = [tokens(n, SEED + row) for row, n in enumerate(ROWS)]
    merged = _merged([new_cache() for _ in prompts])
    padding = [max(ROWS) - n for n in ROWS]
    for layer in merged:
        layer.prepare(lengths=list(ROWS), right_padding=padding)
    columns = [prompt + [0] * n for prompt, n in zip(prompts, padding, strict=True)]
    logits = model(mx.array(columns), cache=merged)
    for layer in merged:
        layer.finalize()
    first = mx.stack([logits[row, n - 1] for row, n in enumerate(ROWS)])
    together = mx.concatenate([first[None], _decoded(model, merged, len(ROWS))])
    alone = []
    for prompt in prompts:
        cache = new_cache()
        last = model(mx.array([prompt]), cache=cache)[:, -1]
        alone.append(mx.concatenate([last[None], _decoded(model, cache, 1)]))
    return relative_error(together, mx.concatenate(alone, axis=1))


def _joined_error(model: Module, new_cache: NewCache) -> float:
    """Rows that are merged when their prompts have been read."""
    together, alone = [new_cache() for _ in ROWS], [new_cache() for _ in ROWS]
    for row, n in enumerate(ROWS):
        for caches in (together, alone):
            mx.eval(model(mx.array([tokens(n, SEED + row)]), cache=caches[row]))
    want = mx.concatenate([_decoded(model, cache, 1) for cache in alone], axis=1)
    return relative_error(_decoded(model, _merged(together), len(ROWS)), want)


def _merged(caches: Sequence[list[Any]]) -> list[Any]:
    return [layers[0].merge(list(layers)) for layers in zip(*caches, strict=True)]


def _decoded(model: Module, cache: list[Any], n_rows: int) -> mx.array:
    """Logits of three decode steps, `[3, n_rows, vocabulary]`."""
    return mx.stack([model(mx.array([[step]] * n_rows), cache=cache)[:, -1] for step in range(3)])


def _generated(model: Module, cache: list[Any]) -> list[int]:
    """Greedy tokens of mlx-lm's own generation loop."""
    steps = generate_step(mx.array(tokens(100)), model, max_tokens=6, prompt_cache=cache)
    return [int(token) for token, _ in steps]
