"""`facts`: several facts of a long context, asked for in one question. The score is how many come back."""

import re
from collections.abc import Sequence
from typing import Any

from turbocache.evaluation.rows import Row
from turbocache.evaluation.suites.answers import answer_nats
from turbocache.evaluation.suites.documents import (
    Document,
    Wording,
    chance_of,
    make_document,
    some_names,
)
from turbocache.evaluation.suites.suite import Material, Suite, Task, flat, nats_cell, score, share, task_key, too_small

N_PLANTED = 12
N_ASKED = 4
"""Facts in one answer. Every planted fact is asked for once."""
_SLACK = 32
"""Tokens of an answer beyond those of the right one."""


class FactsTask(Task):
    """One document, and questions for all its facts."""

    def __init__(self, material: Material, trial: int) -> None:
        name = f"facts-{trial}"
        chance = chance_of(material, name)
        names = some_names(chance, N_PLANTED)
        numbers = [str(number) for number in chance.sample(range(1_000_000, 10_000_000), N_PLANTED)]
        sentences = [_sentence(name, number) for name, number in zip(names, numbers, strict=True)]
        order = chance.sample(range(N_PLANTED), N_PLANTED)
        groups = [order[i : i + N_ASKED] for i in range(0, N_PLANTED, N_ASKED)]
        wordings = [_wording([names[i] for i in group], [numbers[i] for i in group]) for group in groups]
        self._reader = material.reader
        self._asked = [[numbers[i] for i in group] for group in groups]
        self._document: Document = make_document(material, chance, material.settings.suite_context, sentences, wordings)
        self.key = task_key(name, self._document.shared, [q.ids for q in self._document.questions], self._asked)
        self.n_tokens = self._document.n_tokens(passes=2)

    def measure(self, row: Row, reference: Any) -> Any:
        reader, document = self._reader, self._document
        cache = row.open(document.longest + _SLACK, n_forks=1).layers
        reader.read(cache, document.shared)
        results = []
        for i, (question, numbers) in enumerate(zip(document.questions, self._asked, strict=True)):

            def ends(answer: Sequence[int], numbers: list[str] = numbers) -> bool:
                return reader.has_ended(answer) or n_found(reader.text(answer), numbers) == len(numbers)

            right = list(question.answer_ids)
            judged = reader.judge(cache, question.ids, right)
            draft = right if reference is None else reference[i]["answer"]
            known = judged if draft == right else None
            answer = reader.answer(cache, question.ids, len(right) + _SLACK, ends, draft=draft, judged=known)
            results.append(
                {
                    "answer": answer,
                    "correct": n_found(reader.text(answer), numbers),
                    "asked": len(numbers),
                    "nats": answer_nats(judged, right),
                }
            )
        return results


def _sentence(name: str, number: str) -> str:
    return f"The special magic number for {name} is {number}."


def _wording(names: list[str], numbers: list[str]) -> Wording:
    asked = ", ".join(names[:-1]) + f" and {names[-1]}"
    right = " ".join(_sentence(name, number) for name, number in zip(names, numbers, strict=True))
    opening = f" The special magic number for {names[0]} is"

    def messages(text: str) -> list[dict[str, str]]:
        content = (
            "Several special magic numbers are hidden within the following text. Memorize them.\n\n"
            f"{text}\n\nWhat are the special magic numbers for {asked}? Answer with one sentence for each."
        )
        return [{"role": "user", "content": content}]

    return Wording(messages, opening, right.removeprefix(opening.strip()))


def n_found(text: str, numbers: Sequence[str]) -> int:
    """How many of the numbers a text contains."""
    written = set(re.findall(r"\d+", text))
    return sum(number in written for number in numbers)


def _make(material: Material) -> list[Task]:
    return [FactsTask(material, trial) for trial in range(material.settings.suite_trials)]


FACTS = Suite(
    "facts",
    _make,
    lambda results, full: score(flat(results), flat(full)),
    lambda figures: {"facts": share(figures["correct"], figures["asked"]), "facts, nats": nats_cell(figures)},
    lambda full: too_small("facts", full["correct"], full["asked"]),
)
