"""`drift`: long greedy answers. Where does a row leave the answer of full precision, and does it loop?

A row first reads the answer of full precision in one go. That gives its divergence along the answer, and the first
token that it would have chosen otherwise; up to there both answers are the same. Then it goes on by itself from that
token. End tokens are never chosen, so every answer has full length.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median_low
from typing import Any

import numpy as np

from turbocache.evaluation.rows import OpenCache, Row
from turbocache.evaluation.settings import EvaluationError
from turbocache.evaluation.storage import n_values
from turbocache.evaluation.suites.documents import chance_of, some_hay
from turbocache.evaluation.suites.suite import Figures, Material, Suite, Task, share, task_key
from turbocache.evaluation.text import Reading, ReferenceLogits, prompt_tokens, read_logits
from turbocache.mlxlm.prompt_cache import PromptCache
from turbocache.store import fork

PROMPT_TOKENS = 384
"""Tokens of the text in each prompt: more than sink and window, so that pages matter from the first token."""
N_GRAM = 8
LOOP_TOKENS = 128
"""An answer loops at a length if half of the n-grams in its last tokens before that have occurred in it before."""

_REQUESTS = (
    "Continue this text at length, in the same style.",
    "Explain this text at length, one point after the other.",
    "Tell a long story in which this text plays a part.",
    "Write a long letter to a friend about this text.",
)


class DriftTask(Task):
    """One long answer."""

    def __init__(self, material: Material, trial: int) -> None:
        loaded, settings = material.loaded, material.settings
        name = f"drift-{trial}"
        text = loaded.tokenizer.decode(some_hay(material, chance_of(material, name), PROMPT_TOKENS)).strip()
        messages = [{"role": "user", "content": text}]
        if loaded.tokenizer.has_chat_template:
            messages[0]["content"] += f"\n\n{_REQUESTS[trial % len(_REQUESTS)]}"
        self._prompt = prompt_tokens(loaded.tokenizer, messages)
        self._lengths = sorted(settings.answer_lengths)
        self._length = self._lengths[-1]
        self._material = material
        self._ends = sorted(loaded.tokenizer.eos_token_ids)
        self.key = task_key(name, self._prompt, self._lengths)
        self.n_tokens = len(self._prompt) + self._length
        if self.n_tokens > loaded.max_positions:
            raise EvaluationError(
                f"--answer-lengths {self._length} and a prompt of {len(self._prompt)} tokens are more than the "
                f"{loaded.max_positions} positions of {loaded.id}"
            )

    def measure(self, row: Row, reference: Any) -> Any:
        opened = row.open(self.n_tokens, n_forks=1)
        self._material.reader.read(opened.layers, self._prompt[:-1])
        if reference is None:
            answer = self._continued(opened.layers, [])
            self._material.reader.read(opened.layers, [self._prompt[-1], *answer[:-1]])
            result: dict[str, Any] = {"kld": 0.0, "top1": 1.0, "values": n_values(opened.layers)}
            result["lengths"] = self._lengths
        else:
            begun = fork(opened.layers)
            result, agreed = self._follow(opened, *reference)
            answer = agreed if len(agreed) == self._length else self._continued(begun, agreed)
        stored = opened.stored()
        return {**result, "answer": answer, "nbytes": stored.nbytes, "half_nbytes": stored.half_nbytes}

    @contextmanager
    def reference(self, full: Any) -> Iterator[tuple[list[int], ReferenceLogits]]:
        """Full precision's answer, and its logits along it."""
        answer = full["answer"]
        # The window's last token is only a target, and its first logits are those after the prompt.
        window = [*self._prompt, *answer]
        layers = self._material.full.open(len(window)).layers
        reading = Reading(self._material.settings.chunk, len(self._prompt) - 1)
        with ReferenceLogits(self._material.loaded.model, layers, window, reading) as logits:
            yield answer, logits

    def _follow(
        self, opened: OpenCache, answer: list[int], reference: ReferenceLogits
    ) -> tuple[dict[str, Any], list[int]]:
        """Read full precision's answer: the divergence, and the row's own answer up to where it departs."""
        model, reading = self._material.loaded.model, Reading(self._material.settings.chunk, 0)
        scores, chosen = [], []
        for index, logits in read_logits(model, opened.layers, [self._prompt[-1], *answer], reading):
            scores.append(reference.judge(index, logits))
            chosen += [self._choose(one, ()) for one in logits]
        same = next((i for i, (a, b) in enumerate(zip(chosen, answer, strict=True)) if a != b), len(answer) - 1)
        kld, agree = (np.concatenate([getattr(s, part) for s in scores]) for part in ("kld", "agree"))
        return {"kld": float(kld.mean()), "top1": float(agree.mean())}, chosen[: same + 1]

    def _continued(self, layers: PromptCache, begun: list[int]) -> list[int]:
        """The whole answer, from its first tokens. `layers` holds the prompt but for its last token."""
        last, limit = [self._prompt[-1], *begun], self._length - len(begun)
        return [*begun, *self._material.reader.answer(layers, last, limit, lambda _: False, self._choose)]

    def _choose(self, logits: np.ndarray, answer: Sequence[int]) -> int:
        allowed = logits.copy()
        allowed[self._ends] = -np.inf
        return int(allowed.argmax())


def first_difference(answer: Sequence[int], full: Sequence[int]) -> int | None:
    """Tokens before the first that differs. None if none does."""
    return next((i for i, (a, b) in enumerate(zip(answer, full, strict=True)) if a != b), None)


def loops(answer: Sequence[int], length: int) -> bool:
    """Whether an answer's last tokens before `length` repeat what was there before (`LOOP_TOKENS`)."""
    grams = [tuple(answer[i : i + N_GRAM]) for i in range(length - N_GRAM + 1)]
    last = range(max(0, len(grams) - LOOP_TOKENS), len(grams))
    seen, repeated = set(grams[: last.start]), 0
    for i in last:
        repeated += grams[i] in seen
        seen.add(grams[i])
    return 2 * repeated >= len(last)


def _figures(results: Sequence[Any], full: Sequence[Any]) -> Figures:
    pairs = [(mine["answer"], theirs["answer"]) for mine, theirs in zip(results, full, strict=True)]
    differences = [first_difference(mine, theirs) for mine, theirs in pairs]
    last, lengths = results[-1], full[-1]["lengths"]
    longest = lengths[-1]
    return {
        "first_difference": differences,
        "first_difference_median": median_low(longest if d is None else d for d in differences),
        "equal": {
            str(n): float(np.mean([np.equal(mine[:n], theirs[:n]).mean() for mine, theirs in pairs])) for n in lengths
        },
        "loops": {str(n): sum(loops(mine, n) for mine, _ in pairs) for n in lengths},
        "answers": len(pairs),
        "kld_mean": float(np.mean([one["kld"] for one in results])),
        "top1": float(np.mean([one["top1"] for one in results])),
        "stored_bits": 8 * last["nbytes"] / full[-1]["values"],
        "stored_bits_half": 8 * last["half_nbytes"] / full[-1]["values"],
    }


def _cells(figures: Figures) -> dict[str, str]:
    first, longest = figures["first_difference_median"], max(int(n) for n in figures["equal"])
    return {
        "drift: first": f"{first}" if first < longest else "none",
        **{f"equal {n}": f"{equal:.1%}" for n, equal in figures["equal"].items()},
        **{f"loops {n}": share(n_loops, figures["answers"]) for n, n_loops in figures["loops"].items()},
        "drift KLD": f"{figures['kld_mean']:.3g}",
        "drift top-1": f"{figures['top1']:.2%}",
    }


def _weakness(full: Figures) -> list[str]:
    return [
        f"drift: full precision loops in {n_loops} of {full['answers']} answers at {n} tokens: the model is too small "
        "for answers of that length, and equal tokens may be equal loops"
        for n, n_loops in full["loops"].items()
        if 2 * n_loops > full["answers"]
    ]


def _make(material: Material) -> list[Task]:
    return [DriftTask(material, trial) for trial in range(material.settings.suite_trials)]


DRIFT = Suite("drift", _make, _figures, _cells, _weakness)
