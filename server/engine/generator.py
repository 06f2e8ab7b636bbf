"""mlx-lm's BatchGenerator as the engine uses it, with an eye on what each row's tokens were drawn from."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.generate import BatchGenerator, GenerationBatch, PromptProcessingBatch
from mlx_lm.sample_utils import Sampler

from server.engine.sampling import processors_for, sampler_for, seeded_sampler
from server.protocol import SamplingParams
from server.text.grammar import CompiledGrammar, Guide
from turbocache.cache.ring import PageRing
from turbocache.mlxlm.model import LoadedModel
from turbocache.mlxlm.short_prompts import ShortPromptGenerator
from turbocache.store import rings_of, start_evaluation

_MAX_SAMPLERS = 64
"""Parameters come from users, so their samplers are not kept for ever."""

_Drawn = dict[int, tuple[mx.array, int]]
"""For each row's uid the flags of the call that drew its token, and the row's place among them."""


class _Row:
    """A row, for what is made before it has its uid."""

    def __init__(self, generator: "Generator") -> None:
        self.uid: int | None = None
        self._generator = generator

    def latest(self) -> int | None:
        return None if self.uid is None else self._generator.latest(self.uid)


class Generator:
    """Continuous batching over prompt caches. Used by one thread.

    Logits that are not finite mean that a kernel failed, and the token drawn from them means nothing. Every sampler
    therefore also says whether its tokens' log-probabilities are finite. These flags are part of the step's own graph,
    so that reading them waits for nothing that the step has not waited for (a few small operations a step, none a
    layer).
    """

    def __init__(self, model: LoadedModel, max_batch: int, prefill_chunk: int) -> None:
        batch: BatchGenerator = ShortPromptGenerator(
            model.model,
            stop_tokens=[[token] for token in model.tokenizer.eos_token_ids],
            completion_batch_size=max_batch,
            prefill_batch_size=max_batch,
            prefill_step_size=prefill_chunk,
        )
        # Undoes the wired limit that the generator has just set: users' machines ran out of memory under it.
        BatchGenerator.close(batch)
        self._batch = batch
        self._samplers: dict[tuple[float, ...], Sampler] = {}
        self._flags: list[mx.array] = []
        self._handed: _Drawn = {}
        self._ahead: _Drawn = {}
        self._guides: dict[int, Guide] = {}

    def insert(
        self,
        prompt: Sequence[int],
        cached: int,
        cache: list[Any],
        limit: int,
        sampling: SamplingParams,
        stops: Iterable[int] = (),
        grammar: CompiledGrammar | None = None,
    ) -> int:
        """Queue a prompt of which `cache` holds the first `cached` tokens, for `limit` more at most; its uid. `next`
        returns with the cache at each of `stops`, numbers of the prompt's tokens, for which `end_of_segment` is set.
        What follows the prompt is held to `grammar`.
        """
        processors, row = processors_for(sampling, len(prompt)), _Row(self)
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
        """One decode step of the batch and one prefill chunk: the prompts' progress and one token for each row."""
        self._flags.clear()
        decoding = list(self._batch._generation_batch.uids)
        prompts, tokens = self._batch.next()
        # Samplers have been called for the rows that were decoding (no call has been made for them where short prompts
        # went through instead), then for those whose prompt has just ended.
        ended = [progress.uid for progress in prompts if progress.end_of_prompt]
        drawn = [*(decoding if tokens else ()), *ended]
        places = [(flags, i) for flags in self._flags for i in range(flags.size)]
        fresh = dict(zip(drawn, places, strict=True))
        if tokens or not decoding:
            self._handed, self._ahead = self._ahead, fresh
        else:
            self._ahead |= fresh
        return prompts, tokens

    def grammar_error(self, uid: int, ended: bool = False) -> str | None:
        """Why a row could not be held to its grammar, if so. One that has `ended` is not asked for again."""
        guide = self._guides.pop(uid, None) if ended else self._guides.get(uid)
        return None if guide is None else guide.error

    def latest(self, uid: int) -> int | None:
        """The token that a row goes into its running step with; None while it has none."""
        batch = self._batch._generation_batch
        if uid not in batch.uids:
            return None
        return int(np.array(batch._current_tokens)[batch.uids.index(uid)])

    def finite(self, uid: int) -> bool:
        """Whether the token that `next` has just handed out for this row was drawn from finite logits."""
        return _finite(self._handed, uid)

    def first_tokens(self, uids: Iterable[int]) -> dict[int, int | None]:
        """The first token of rows whose prompt has just ended, one decode step before `next` hands it out; None where
        its logits are not finite.

        BatchGenerator starts the following step before it returns a token. For the first token that step is time that
        the user waits, so it is read where the generator keeps it (pinned to mlx-lm 0.32.2; a test watches it).
        """
        wanted, batch = set(uids), self._batch._generation_batch
        return {
            uid: int(batch._next_tokens[row].item()) if _finite(self._ahead, uid) else None
            for row, uid in enumerate(batch.uids)
            if uid in wanted
        }

    def first_logprobs(self, uid: int) -> mx.array:
        """The log-probabilities `[vocab]` from which the first token of `first_tokens` was drawn."""
        batch = self._batch._generation_batch
        logprobs: mx.array = batch._next_logprobs[batch.uids.index(uid)]
        return logprobs

    def rings(self) -> dict[int, PageRing]:
        """The rows' rings as they are between two steps, by uid; none where no layer is compressed. To look at only."""
        batch = self._batch
        parts: list[Any] = [([sequence[0]], sequence[3]) for sequence in batch._unprocessed_sequences]
        parts += [(part.uids, part.prompt_cache) for part in (batch._prompt_batch, batch._generation_batch)]
        return {uid: ring for uids, cache in parts for uid, ring in zip(uids, rings_of(cache), strict=False)}

    def snapshot(self, uid: int) -> list[Any]:
        """A copy of a row's cache as it is now; pages are shared."""
        cache, _ = self._batch.extract_cache([uid])[uid]
        start_evaluation(cache)
        return list(cache)

    def remove(self, uid: int) -> tuple[Any, Any]:
        """Take a row out; returns its cache and the tokens that it holds."""
        self._guides.pop(uid, None)
        cache, tokens = self._batch.remove([uid], return_prompt_caches=True)[uid]
        return cache, tokens

    def drop(self, uid: int) -> None:
        """Take a row out without its cache. A row that has ended by itself is out already."""
        self._guides.pop(uid, None)
        self._batch.remove([uid])

    def _sampler(self, params: SamplingParams) -> Sampler:
        """One sampler object for equal parameters, so that a batch which shares them samples in one call."""
        if params.seed is not None:
            return self._watched(seeded_sampler(params, params.seed))
        key = (params.temperature, params.top_p, params.top_k, params.min_p)
        if key not in self._samplers:
            if len(self._samplers) >= _MAX_SAMPLERS:
                self._samplers.clear()
            self._samplers[key] = self._watched(sampler_for(params))
        return self._samplers[key]

    def _watched(self, sampler: Sampler) -> Sampler:
        def draw(logprobs: mx.array) -> mx.array:
            tokens = sampler(logprobs)
            # Normalised, so one logit that is NaN or +inf makes them all NaN or -inf.
            finite = mx.isfinite(mx.take_along_axis(logprobs, tokens[:, None], axis=-1)).squeeze(-1)
            self._flags.append(finite)
            watched: mx.array = mx.depends([tokens], [finite])[0]
            return watched

        return draw


def _finite(drawn: _Drawn, uid: int) -> bool:
    flags, place = drawn[uid]
    return bool(np.array(flags)[place])
