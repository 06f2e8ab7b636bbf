"""`sums`: arithmetic in several steps over numbers of the context, and copies that must be right to the last character.

A question's answer is opened for the model. An item is right if the greedy answer is. How likely the right answer is
shows a difference where both are wrong or both are right.
"""

import random
import re
from collections.abc import Sequence
from typing import Any

from turbocache.evaluation.rows import Row
from turbocache.evaluation.suites.answers import answer_nats
from turbocache.evaluation.suites.documents import (
    Messages,
    Question,
    Wording,
    chance_of,
    make_document,
    some_names,
)
from turbocache.evaluation.suites.suite import (
    Figures,
    Material,
    Suite,
    Task,
    flat,
    nats_cell,
    score,
    share,
    task_key,
    too_small,
)

N_EACH = 4
"""Questions of each kind about one document."""
N_PRICES = 6
N_TERMS = 3
_SLACK = 8
"""Tokens of an answer beyond those of the right one."""

KINDS = ("sums", "numbers", "identifiers", "URLs")
_VERBS = ("load", "parse", "merge", "flush", "resolve", "encode", "verify", "split")
_NOUNS = ("shard", "index", "buffer", "token", "header", "queue", "record", "socket")


class SumsTask(Task):
    """One document with records, and questions of every kind."""

    def __init__(self, material: Material, trial: int) -> None:
        name = f"sums-{trial}"
        chance = chance_of(material, name)
        sentences, wordings = _records(chance)
        self._kinds = [kind for kind, _ in wordings]
        self._document = make_document(
            material, chance, material.settings.suite_context, sentences, [wording for _, wording in wordings]
        )
        self._reader = material.reader
        questions = self._document.questions
        self.key = task_key(name, self._document.shared, [(q.ids, q.answer) for q in questions])
        self.n_tokens = self._document.n_tokens(passes=1)

    def measure(self, row: Row, reference: Any) -> Any:
        document = self._document
        cache = row.open(document.longest + _SLACK, n_forks=1).layers
        self._reader.read(cache, document.shared)
        return [self._ask(cache, kind, q) for kind, q in zip(self._kinds, document.questions, strict=True)]

    def _ask(self, cache: Any, kind: str, question: Question) -> dict[str, Any]:
        reader, right = self._reader, question.answer.strip()

        def ends(answer: Sequence[int]) -> bool:
            text = reader.text(answer)
            return reader.has_ended(answer) or "\n" in text.strip() or (kind != "sums" and is_decided(text, right))

        ids = question.answer_ids
        judged = reader.judge(cache, question.ids, ids)
        answer = reader.answer(cache, question.ids, len(ids) + _SLACK, ends, draft=ids, judged=judged)
        is_right = has_total if kind == "sums" else is_copy
        return {
            "kind": kind,
            "correct": is_right(reader.text(answer), right),
            "asked": 1,
            "nats": answer_nats(judged, ids),
        }


def is_copy(text: str, right: str) -> bool:
    """Whether a text is an exact copy, up to what can't be part of a number, an identifier or a URL."""
    rest = text.strip().removeprefix(right)
    return text.strip().startswith(right) and not re.match(r"[\w/?=&:#-]|\.\w", rest)


def is_decided(text: str, right: str) -> bool:
    """Whether what follows a text can't change `is_copy`."""
    text = text.strip()
    return len(text) > len(right) + 1 or not (text.startswith(right) or right.startswith(text))


def has_total(text: str, right: str) -> bool:
    """Whether the last sum of a text's first line is that of the right answer."""
    written, expected = (re.findall(r"= *(\d+)", answer.strip().split("\n")[0]) for answer in (text, right))
    return written[-1:] == expected[-1:]


def _records(chance: random.Random) -> tuple[list[str], list[tuple[str, Wording]]]:
    """Sentences to plant, and questions about them with their kinds."""
    names = iter(some_names(chance, N_PRICES + 3 * N_EACH))
    prices = {next(names): chance.randrange(11, 80) for _ in range(N_PRICES)}
    sentences = [f"The price of the {name} is {price} coins." for name, price in prices.items()]
    wordings = [("sums", _sum(chance.sample(sorted(prices), N_TERMS), prices)) for _ in range(N_EACH)]
    for kind, question, statement, make in (
        ("numbers", "What is the serial number of the {}?", "The serial number of the {} is", _number),
        ("identifiers", "Which function handles the {}?", "The {} is handled by the function", _identifier),
        ("URLs", "Where is the {} described?", "The {} is described at", _url),
    ):
        for _ in range(N_EACH):
            name, value = next(names), make(chance)
            sentences.append(f"{statement.format(name)} {value}.")
            wordings.append((kind, _wording(question.format(name), statement.format(name), f" {value}")))
    chance.shuffle(sentences)
    return sentences, wordings


def _sum(names: list[str], prices: dict[str, int]) -> Wording:
    first, *others = (prices[name] for name in names)
    steps, total = [], first
    for price in others:
        steps.append(f"{total} + {price} = {total + price}")
        total += price
    asked = ", the ".join(names[:-1]) + f" and the {names[-1]}"
    question = (
        f"What do the {asked} cost together? Add the prices in this order, one after the other, in one line. "
        "For prices of 11, 5 and 4 coins the line is: 11 + 5 = 16; 16 + 4 = 20"
    )
    return _wording(question, "The line is:", f" {'; '.join(steps)}")


def _wording(question: str, opening: str, answer: str) -> Wording:
    def messages(text: str) -> Messages:
        content = f"Read the following text and remember its records.\n\n{text}\n\n{question}"
        return [{"role": "user", "content": content}]

    return Wording(messages, f" {opening}", answer)


def _number(chance: random.Random) -> str:
    return "-".join(f"{chance.randrange(10_000):04}" for _ in range(3))


def _identifier(chance: random.Random) -> str:
    return f"{chance.choice(_VERBS)}_{chance.choice(_NOUNS)}_{chance.choice(_NOUNS)}_{chance.randrange(1 << 16):04x}"


def _url(chance: random.Random) -> str:
    place, page = chance.choice(_NOUNS), chance.choice(_NOUNS)
    return f"https://{place}.example.org/v{chance.randrange(1, 10)}/{page}/{chance.randrange(1 << 24):06x}"


def _figures(results: Sequence[Any], full: Sequence[Any]) -> Figures:
    mine, theirs = flat(results), flat(full)

    def of(kinds: Sequence[str]) -> Figures:
        return score(*([one for one in side if one["kind"] in kinds] for side in (mine, theirs)))

    return {**{kind: of([kind]) for kind in KINDS}, "copies": of(KINDS[1:])}


def _cells(figures: Figures) -> dict[str, str]:
    return {
        **{kind: share(figures[kind]["correct"], figures[kind]["asked"]) for kind in KINDS},
        **{f"{what}, nats": nats_cell(figures[what]) for what in ("sums", "copies")},
    }


def _weakness(full: Figures) -> list[str]:
    return [line for kind in KINDS for line in too_small(kind, full[kind]["correct"], full[kind]["asked"])]


SUMS = Suite(
    "sums",
    lambda material: [SumsTask(material, trial) for trial in range(material.settings.suite_trials)],
    _figures,
    _cells,
    _weakness,
)
