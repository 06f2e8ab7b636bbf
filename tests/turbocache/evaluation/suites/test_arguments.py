from collections.abc import Callable
from typing import Any

import jsonschema
import pytest

from tests.turbocache.evaluation.suites.test_calls import SCHEMA
from turbocache.evaluation.suites.arguments import ARGUMENTS
from turbocache.evaluation.suites.calls import n_exact, read_call
from turbocache.evaluation.suites.suite import Material, Task


@pytest.fixture(scope="module")
def task(material: Material) -> Task:
    return ARGUMENTS.make(material)[0]


@pytest.fixture(scope="module")
def full(material: Material, task: Task) -> Any:
    return task.measure(material.full, None)


@pytest.mark.slow
def test_every_argument_is_in_the_context(material: Material, task: Any) -> None:
    text = material.loaded.tokenizer.decode(list(task._document.shared))
    for order in task._orders:
        for value in order.values():
            assert str(value) in text
    assert len({order["order"] for order in task._orders}) == 3


@pytest.mark.slow
def test_free_answers_are_mlx_lm_s_and_the_others_are_calls(
    material: Material, task: Any, full: Any, generated: Callable[..., list[int]]
) -> None:
    for order, question, told in zip(task._orders, task._document.questions, full, strict=True):
        answer = told["free"]["answer"]
        prompt = [*task._document.shared, *question.ids]
        assert answer == generated(prompt, material.full.open(900).layers, len(answer))
        call = read_call(material.reader.text(told["grammar"]["answer"]))
        if len(told["grammar"]["answer"]) < len(question.answer_ids) + 16:
            jsonschema.validate(call, SCHEMA)
        assert told["grammar"]["correct"] == n_exact(material.reader.text(told["grammar"]["answer"]), order)


def test_figures_are_over_all_calls() -> None:
    def results(free: int, nats: list[float]) -> Any:
        one = {"nats": nats, "free": {"correct": free, "asked": 4}, "grammar": {"correct": 4, "asked": 4}}
        return [[one, one]]

    figures = ARGUMENTS.figures(results(0, [-3.0, -1.0]), results(4, [-1.0, -2.0]))
    assert ARGUMENTS.cells(figures) == {
        "arguments, free": "0/8",
        "arguments, grammar": "8/8",
        "arguments, nats": "0.5 (1.5)",
    }
    assert ARGUMENTS.weakness(figures) == ["arguments, free: full precision answers 0 of 8: the model is too small"]
