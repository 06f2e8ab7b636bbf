import json
from collections.abc import Sequence
from typing import Any

import jsonschema
import numpy as np
import pytest

from turbocache.evaluation.suites.calls import CallGrammar, n_exact, read_call, written
from turbocache.evaluation.suites.suite import Material

ORDER = {"order": "R12345", "account": "DE0001-0002", "receipt": "https://shop.example.org/a.pdf", "amount": 1284}
SCHEMA = {
    "type": "object",
    "required": ["name", "arguments"],
    "additionalProperties": False,
    "properties": {
        "name": {"enum": ["refund_order"]},
        "arguments": {
            "type": "object",
            "required": list(ORDER),
            "additionalProperties": False,
            "properties": {name: {"type": "integer" if name == "amount" else "string"} for name in ORDER},
        },
    },
}


@pytest.fixture(scope="module")
def grammar(material: Material) -> CallGrammar:
    return CallGrammar(material.loaded.tokenizer)


def led(material: Material, grammar: CallGrammar, text: str) -> list[int]:
    """Tokens chosen by a model that wants to write `text`, as far as the grammar follows."""
    tokenizer = material.loaded.tokenizer
    choose, answer = grammar.chooser(), list[int]()
    for token in tokenizer.encode(text, add_special_tokens=False):
        logits = np.zeros(len(tokenizer.get_vocab()), dtype=np.float32)
        logits[token] = 9
        answer.append(choose(logits, answer))
        if answer[-1] != token:
            break
    return answer


def with_(**changes: Any) -> str:
    return json.dumps({"name": "refund_order", "arguments": {**ORDER, **changes}})


@pytest.mark.parametrize(
    "call",
    [
        written(ORDER),
        with_(account="any text"),
        with_(amount=-1),
        with_(amount="1284"),
        with_(order=5),
        with_(more=1),
        json.dumps({"name": "refund", "arguments": ORDER}),
        json.dumps({"name": "refund_order"}),
        json.dumps({"name": "refund_order", "arguments": {"order": "R1"}}),
        "Sure! " + written(ORDER),
    ],
)
def test_the_grammar_follows_what_the_schema_allows(material: Material, grammar: CallGrammar, call: str) -> None:
    """jsonschema is the judge of which texts are calls."""
    try:
        jsonschema.validate(json.loads(call), SCHEMA)
        allowed = True
    except (ValueError, jsonschema.ValidationError):
        allowed = False
    followed: Sequence[int] = led(material, grammar, call)
    assert (followed == material.loaded.tokenizer.encode(call, add_special_tokens=False)) is allowed


def test_every_answer_starts_anew(material: Material, grammar: CallGrammar) -> None:
    assert led(material, grammar, written(ORDER)) == led(material, grammar, written(ORDER))


def test_calls_are_read_from_among_text() -> None:
    text = written(ORDER)
    assert read_call(f"Sure: {{x}} {text} Done.") == {"name": "refund_order", "arguments": ORDER}
    assert read_call(text[:-1]) is None  # the arguments are whole, the call is not
    assert read_call("none") is None
    assert read_call('{"name": ') is None


def test_arguments_count_one_by_one() -> None:
    assert n_exact(written(ORDER), ORDER) == 4
    assert n_exact(with_(account="DE0001-0003", amount="1284"), ORDER) == 2
    assert n_exact(json.dumps({"name": "other", "arguments": ORDER}), ORDER) == 0
    assert n_exact(json.dumps({"name": "refund_order", "arguments": []}), ORDER) == 0
    assert n_exact("no call", ORDER) == 0
