"""`arguments`: a tool call whose arguments are copied from the context, free and under a grammar.

The prompt explains the call and shows one, so models whose template knows no tools can be judged as well.
"""

import random
from collections.abc import Sequence
from typing import Any

from turbocache.evaluation.rows import Row
from turbocache.evaluation.suites.answers import answer_nats, most_likely
from turbocache.evaluation.suites.calls import TOOL, CallGrammar, n_exact, read_call, written
from turbocache.evaluation.suites.documents import (
    Messages,
    Wording,
    chance_of,
    make_document,
)
from turbocache.evaluation.suites.suite import (
    Figures,
    Material,
    Suite,
    Task,
    flat,
    nats,
    nats_cell,
    share,
    task_key,
    too_small,
)

N_ORDERS = 3
"""Orders in one document. Each is asked for."""
MODES = ("free", "grammar")
_SLACK = 16
"""Tokens of a call beyond those of the right one."""


class ArgumentsTask(Task):
    """One document with orders, and a call for each."""

    def __init__(self, material: Material, trial: int, grammar: CallGrammar) -> None:
        name = f"arguments-{trial}"
        chance = chance_of(material, name)
        self._orders = [_order(chance) for _ in range(N_ORDERS)]
        example = _order(chance)
        wordings = [_wording(order, example) for order in self._orders]
        planted = chance.sample(self._orders, N_ORDERS)
        self._document = make_document(
            material, chance, material.settings.suite_context, [_record(order) for order in planted], wordings
        )
        self._reader, self._grammar = material.reader, grammar
        self.key = task_key(name, self._document.shared, [(q.ids, q.answer) for q in self._document.questions])
        self.n_tokens = self._document.n_tokens(passes=2)

    def measure(self, row: Row, reference: Any) -> Any:
        reader, document = self._reader, self._document
        layers = row.open(document.longest + _SLACK, n_forks=1).layers
        reader.read(layers, document.shared)

        def ends(answer: Sequence[int]) -> bool:
            return reader.has_ended(answer) or read_call(reader.text(answer)) is not None

        results = []
        for i, (order, question) in enumerate(zip(self._orders, document.questions, strict=True)):
            right = question.answer_ids
            judged = {right: reader.judge(layers, question.ids, right)}
            one: dict[str, Any] = {"nats": answer_nats(judged[right], right)}
            for mode in MODES:
                choose = self._grammar.chooser() if mode == "grammar" else most_likely
                draft = right if reference is None else tuple(reference[i][mode]["answer"])
                if draft not in judged:
                    judged[draft] = reader.judge(layers, question.ids, draft)
                answer = reader.answer(
                    layers, question.ids, len(right) + _SLACK, ends, choose, draft=draft, judged=judged[draft]
                )
                one[mode] = {"answer": answer, "correct": n_exact(reader.text(answer), order), "asked": len(order)}
            results.append(one)
        return results


def _order(chance: random.Random) -> dict[str, Any]:
    day = f"{chance.randrange(1, 13):02}-{chance.randrange(1, 29):02}"
    return {
        "order": f"R{chance.randrange(10_000, 100_000)}",
        "account": f"DE{chance.randrange(10_000):04}-{chance.randrange(10_000):04}",
        "receipt": f"https://shop.example.org/{day}/{chance.randrange(1 << 20):05x}.pdf",
        "amount": chance.randrange(101, 10_000),
    }


def _record(order: dict[str, Any]) -> str:
    return (
        f"Order {order['order']} was paid from account {order['account']} with an amount of {order['amount']}; "
        f"its receipt is {order['receipt']}."
    )


def _wording(order: dict[str, Any], example: dict[str, Any]) -> Wording:
    def messages(text: str) -> Messages:
        first = (
            f"Read the following text and remember the orders in it.\n\n{text}\n\n"
            f"You can call the tool {TOOL}. Its arguments are the order, the account, the receipt and the amount, "
            "exactly as they are written. To call it, write one JSON object with name and arguments, nothing else.\n"
            f"{_record(example)} Refund order {example['order']}."
        )
        return [
            {"role": "user", "content": first},
            {"role": "assistant", "content": written(example)},
            {"role": "user", "content": f"Refund order {order['order']}."},
        ]

    return Wording(messages, "\n", written(order))


def _figures(results: Sequence[Any], full: Sequence[Any]) -> Figures:
    mine, theirs = flat(results), flat(full)
    figures = nats(mine, theirs)
    for mode in MODES:
        figures[mode] = {part: sum(one[mode][part] for one in mine) for part in ("correct", "asked")}
    return figures


def _cells(figures: Figures) -> dict[str, str]:
    scores = {f"arguments, {mode}": share(figures[mode]["correct"], figures[mode]["asked"]) for mode in MODES}
    return {**scores, "arguments, nats": nats_cell(figures)}


def _weakness(full: Figures) -> list[str]:
    return [s for mode in MODES for s in too_small(f"arguments, {mode}", full[mode]["correct"], full[mode]["asked"])]


def _make(material: Material) -> list[Task]:
    grammar = CallGrammar(material.loaded.tokenizer)
    return [ArgumentsTask(material, trial, grammar) for trial in range(material.settings.suite_trials)]


ARGUMENTS = Suite("arguments", _make, _figures, _cells, _weakness)
