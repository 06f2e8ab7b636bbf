"""mlx-lm's batch generator as the engine uses it: one row for each running request."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import mlx.core as mx
from mlx_lm.generate import GenerationBatch, PromptProcessingBatch
from mlx_lm.sample_utils import Sampler

from server.engine.sampling import processors_for, sampler_for, seeded_sampler
from server.protocol import SamplingParams
from server.text.grammar import CompiledGrammar, Guide
from turbocache.cache.ring import PageRing
from turbocache.mlxlm.batch_generator import NOT_FINITE, ShortPromptGenerator, mark_not_finite
from turbocache.mlxlm.model import LoadedModel
from turbocache.mlxlm.prompt_cache import PromptCache
from turbocache.store import rings_of, start_evaluation

_MAX_SAMPLERS = 64
"""Samplers kept for reuse. Their parameters come from users, so the number has a limit."""


class _RowHandle:
    """A row's uid for its logits processors, which are made before BatchGenerator assigns the uid."""

    def __init__(self, batch: ShortPromptGenerator) -> None:
        self.uid: int | None = None
        self._batch = batch

    def latest(self) -> int | None:
        return None if self.uid is None else self._batch.current_token(self.uid)


class Generator:
    """Continuous batching over prompt caches. Used by one thread."""

    def __init__(self, model: LoadedModel, max_batch: int, prefill_chunk: int) -> None:
        self._batch = ShortPromptGenerator(
            model.model,
            stop_tokens=[[token] for token in model.tokenizer.eos_token_ids],
            completion_batch_size=max_batch,
            prefill_batch_size=max_batch,
            prefill_step_size=prefill_chunk,
        )
        self._samplers: dict[tuple[float, ...], Sampler] = {}
        self._guides: dict[int, Guide] = {}

    def insert(
        self,
        prompt: Sequence[int],
        cached: int,
        cache: PromptCache,
        limit: int,
        sampling: SamplingParams,
        stops: Iterable[int] = (),
        grammar: CompiledGrammar | None = None,
    ) -> int:
        """Queue a prompt and return its uid.

        cached: number of the prompt's tokens that `cache` holds.
        limit: maximum tokens to generate.
        stops: token counts of the prompt at which `next` returns once with `end_of_segment` set.
        grammar: restricts the generated tokens.
        """
        processors, row = processors_for(sampling, len(prompt)), _RowHandle(self._batch)
        guide = None if grammar is None else grammar.guide(row.latest)
        if guide is not None:
            processors.append(guide)
        edges = [cached, *sorted(stop for stop in stops if cached < stop < len(prompt)), len(prompt)]
        (uid,) = self._batch.insert_segments(
            [[list(prompt[start:end]) for start, end in pairwise(edges)]],
            max_tokens=[limit],
            caches=[cache],
            all_tokens=[list(prompt[:cached])],
            samplers=[self._sampler(sampling)],
            logits_processors=[processors],
        )
        row.uid = int(uid)
        if guide is not None:
            self._guides[row.uid] = guide
        return row.uid

    def next(self) -> tuple[list[PromptProcessingBatch.Response], list[GenerationBatch.Response]]:
        """Run one decode step and one prefill chunk. Returns the progress of prompts and one token for each row."""
        prompts, tokens = self._batch.next()
        return prompts, tokens

    @staticmethod
    def is_finite(token: int) -> bool:
        """Whether a token that `next` returned was drawn from finite logits. If not, a kernel has failed."""
        return token != NOT_FINITE

    def grammar_error(self, uid: int, ended: bool = False) -> str | None:
        """Why a row's grammar failed, None if it did not. `ended` rows must not be asked for again."""
        guide = self._guides.pop(uid, None) if ended else self._guides.get(uid)
        return None if guide is None else guide.error

    def first_tokens(self, uids: Iterable[int]) -> dict[int, int | None]:
        """First tokens after a prompt, one decode step before `next` returns them. None: logits are not finite."""
        tokens = self._batch.next_tokens(uids)
        return {uid: token if self.is_finite(token) else None for uid, token in tokens.items()}

    def first_logprobs(self, uid: int) -> mx.array:
        """The log-probabilities `[vocab]` from which the first token of `first_tokens` was drawn."""
        return self._batch.next_logprobs(uid)

    def rings(self) -> dict[int, PageRing]:
        """The rows' page rings between two steps, by uid; empty if no layer is compressed. Read only."""
        caches = self._batch.prompt_caches()
        return {uid: ring for uids, cache in caches for uid, ring in zip(uids, rings_of(cache), strict=False)}

    def snapshot(self, uid: int) -> PromptCache:
        """A copy of a row's cache. Pages are shared."""
        cache, _ = self._batch.extract_cache([uid])[uid]
        start_evaluation(cache)
        return list(cache)

    def remove(self, uid: int) -> tuple[Any, Any]:
        """Remove a row. Returns its cache and the tokens in the cache."""
        self._guides.pop(uid, None)
        cache, tokens = self._batch.remove([uid], return_prompt_caches=True)[uid]
        return cache, tokens

    def drop(self, uid: int) -> None:
        """Remove a row and its cache. No effect on a row that has finished."""
        self._guides.pop(uid, None)
        self._batch.remove([uid])

    def _sampler(self, params: SamplingParams) -> Sampler:
        """One sampler object for equal parameters: rows that share it are sampled in one call."""
        if params.seed is not None:
            return mark_not_finite(seeded_sampler(params, params.seed))
        key = (params.temperature, params.top_p, params.top_k, params.min_p)
        if key not in self._samplers:
            if len(self._samplers) >= _MAX_SAMPLERS:
                self._samplers.clear()
            self._samplers[key] = mark_not_finite(sampler_for(params))
        return self._samplers[key]
