"""Greedy answers over any row's cache, and the likelihood of given ones."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from mlx_lm.tokenizer_utils import TokenizerWrapper

from turbocache.evaluation.divergence import log_softmax
from turbocache.mlxlm.prompt_cache import PromptCache
from turbocache.store import evaluate, fork

Choose = Callable[[np.ndarray, Sequence[int]], int]
"""The next token from float32 logits `[vocabulary]` and the answer's tokens so far."""


def most_likely(logits: np.ndarray, answer: Sequence[int]) -> int:
    return int(logits.argmax())


@dataclass(frozen=True, slots=True)
class Reader:
    """A model that reads tokens through caches."""

    model: Module
    tokenizer: TokenizerWrapper
    chunk: int
    """Tokens of a forward pass."""

    def read(self, cache: PromptCache, ids: Sequence[int]) -> None:
        """Read `ids` into `cache`."""
        for start in range(0, len(ids), self.chunk):
            self.model(mx.array([list(ids[start : start + self.chunk])]), cache=cache)
            evaluate(cache)

    def logits(self, cache: PromptCache, ids: Sequence[int], n: int) -> np.ndarray:
        """Read `ids` into `cache`. Returns the logits after each of the last `n` tokens, float32 `[n, vocabulary]`."""
        first = max(0, len(ids) - max(n, self.chunk))
        self.read(cache, ids[:first])
        out = self.model(mx.array([list(ids[first:])]), cache=cache)[0, -n:].astype(mx.float32)
        evaluate(cache)
        return np.array(out)

    def judge(self, cache: PromptCache, prompt: Sequence[int], answer: Sequence[int]) -> np.ndarray:
        """Logits `[n + 1, vocabulary]` for each of an answer's tokens, and those after it. Does not change `cache`."""
        return self.logits(fork(cache), [*prompt, *answer], len(answer) + 1)

    def answer(
        self,
        cache: PromptCache,
        prompt: Sequence[int],
        limit: int,
        ends: Callable[[Sequence[int]], bool],
        choose: Choose = most_likely,
        draft: Sequence[int] = (),
        judged: np.ndarray | None = None,
    ) -> list[int]:
        """The greedy answer after `cache` and `prompt`. Does not change `cache`.

        The answer has at most `limit` tokens; `ends` is asked after each. `draft` is a guess at the answer. It is read
        in one pass, and tokens are made one by one only from where the model departs from it. The answer is the same
        with every draft, because no row's results depend on how tokens are cut into passes. `judged`: what `judge`
        returned for this draft.
        """
        working = None
        if judged is None:
            working, draft = fork(cache), draft[: limit - 1]
            judged = self.logits(working, [*prompt, *draft], len(draft) + 1)
        answer: list[int] = []
        for i in range(len(judged)):
            answer.append(choose(judged[i], answer))
            if len(answer) == limit or ends(answer):
                return answer
            if i < len(draft) and answer[i] != draft[i]:
                working = None
                break
        if working is None:
            working = fork(cache)
            self.read(working, [*prompt, *answer[:-1]])
        while len(answer) < limit and not ends(answer):
            answer.append(choose(self.logits(working, answer[-1:], 1)[0], answer))
        return answer

    def text(self, answer: Sequence[int]) -> str:
        """The text of an answer up to its end token."""
        ends = (i for i, token in enumerate(answer) if token in self.tokenizer.eos_token_ids)
        return str(self.tokenizer.decode(list(answer[: next(ends, len(answer))])))

    def has_ended(self, answer: Sequence[int]) -> bool:
        return bool(answer) and answer[-1] in self.tokenizer.eos_token_ids


def answer_nats(logits: np.ndarray, answer: Sequence[int]) -> list[float]:
    """Log-probability of each token of an answer, from logits `[n, vocabulary]` of at least its positions."""
    likely = log_softmax(logits[: len(answer)])
    return [float(one) for one in likely[np.arange(len(answer)), list(answer)]]
