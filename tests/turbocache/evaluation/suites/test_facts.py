from collections.abc import Callable
from typing import Any

import pytest

from turbocache.evaluation.rows import Row
from turbocache.evaluation.suites.facts import FACTS, n_found
from turbocache.evaluation.suites.suite import Material, Task


@pytest.fixture(scope="module")
def task(material: Material) -> Task:
    return FACTS.make(material)[0]


@pytest.fixture(scope="module")
def full(material: Material, task: Task) -> Any:
    return task.measure(material.full, None)


@pytest.mark.slow
def test_every_planted_fact_is_asked_for_once(material: Material, task: Any) -> None:
    text = material.loaded.tokenizer.decode(list(task._document.shared))
    asked = [number for numbers in task._asked for number in numbers]
    assert len(asked) == len(set(asked)) == 12
    assert all(text.count(f"is {number}.") == 1 for number in asked)


@pytest.mark.slow
def test_answers_are_mlx_lm_s(material: Material, task: Any, full: Any, generated: Callable[..., list[int]]) -> None:
    for question, told in zip(task._document.questions, full, strict=True):
        answer = told["answer"]
        prompt = [*task._document.shared, *question.ids]
        assert answer == generated(prompt, material.full.open(900).layers, len(answer))
        numbers = task._asked[full.index(told)]
        assert told["correct"] == sum(number in material.loaded.tokenizer.decode(answer) for number in numbers)


@pytest.mark.slow
def test_fewer_bits_lose_more(task: Task, full: Any, row_of: Callable[[str], Row]) -> None:
    off, small = (FACTS.figures([task.measure(row_of(name), full)], [full]) for name in ("off", "k2v2"))
    itself = FACTS.figures([full], [full])
    assert itself["nats_lost"] == itself["nats_moved"] == 0
    assert off["correct"] == itself["correct"] >= 3
    assert off["nats_moved"] == pytest.approx(0, abs=1e-4)
    assert small["nats_moved"] > 0.01


def test_numbers_are_found_whole() -> None:
    assert n_found("It is 1234567, and 7654321.", ["1234567", "7654321"]) == 2
    assert n_found("It is 12345678", ["1234567"]) == 0


def test_a_model_that_recalls_little_is_too_small() -> None:
    def figures(correct: int) -> dict[str, Any]:
        one = [[{"correct": correct, "asked": 8, "nats": [-1.0, -2.0]}]]
        return FACTS.figures(one, one)

    assert FACTS.weakness(figures(1)) == ["facts: full precision answers 1 of 8: the model is too small"]
    assert FACTS.weakness(figures(2)) == []
    assert FACTS.cells(figures(2)) == {"facts": "2/8", "facts, nats": "0 (0)"}
