import random
import re
from collections.abc import Callable
from typing import Any

import pytest

from turbocache.evaluation.suites.suite import Material, Task
from turbocache.evaluation.suites.sums import KINDS, N_EACH, SUMS, _records, has_total, is_copy, is_decided


@pytest.fixture(scope="module")
def task(material: Material) -> Task:
    return SUMS.make(material)[0]


@pytest.fixture(scope="module")
def full(material: Material, task: Task) -> Any:
    return task.measure(material.full, None)


@pytest.mark.parametrize("seed", range(5))
def test_the_right_answers_follow_from_the_records(seed: int) -> None:
    sentences, wordings = _records(random.Random(seed))
    prices = {m[1]: int(m[2]) for s in sentences if (m := re.fullmatch(r"The price of the (.+) is (\d+) coins\.", s))}
    assert len(prices) == 6
    assert [kind for kind, _ in wordings] == [kind for kind in KINDS for _ in range(N_EACH)]
    for kind, wording in wordings:
        question = wording.messages("")[0]["content"]
        if kind == "sums":
            names = re.findall(
                r"the (\w+ \w+)(?:,| and| cost)", question[question.index("What do") : question.index("together?")]
            )
            assert len(names) == 3
            *_, last = re.findall(r"(\d+) \+ (\d+) = (\d+)", wording.answer)
            assert int(last[0]) + int(last[1]) == int(last[2]) == sum(prices[name] for name in names)
        else:
            assert [s for s in sentences if wording.opening.strip() in s] == [
                f"{wording.opening.strip()}{wording.answer}."
            ]


@pytest.mark.slow
def test_answers_are_mlx_lm_s(material: Material, task: Any, full: Any, generated: Callable[..., list[int]]) -> None:
    document = task._document
    for i in (5, 9, 13):
        question = document.questions[i]
        theirs = generated(
            [*document.shared, *question.ids], material.full.open(900).layers, len(question.answer_ids) + 2
        )
        assert full[i]["correct"] is is_copy(material.loaded.tokenizer.decode(theirs), question.answer.strip())
    assert any(one["correct"] for one in full)


@pytest.mark.parametrize(
    ("written", "right", "copied"),
    [
        (" 0918-8561-7309", "0918-8561-7309", True),
        ("0918-8561-7309. And", "0918-8561-7309", True),
        ("0918-8561-73091", "0918-8561-7309", False),
        ("0918-8561-7309-1", "0918-8561-7309", False),
        ("0918-8561-730", "0918-8561-7309", False),
        ("load_queue_5804`.", "load_queue_5804", True),
        ("load_queue_5804_b", "load_queue_5804", False),
        ("https://a.example.org/v3/q/8c1cbe.html", "https://a.example.org/v3/q/8c1cbe", False),
        ("https://a.example.org/v3/q/8c1cbe/", "https://a.example.org/v3/q/8c1cbe", False),
    ],
)
def test_copies_are_exact(written: str, right: str, copied: bool) -> None:
    assert is_copy(written, right) is copied
    for end in range(len(written)):
        if is_decided(written[:end], right):
            assert is_copy(written[:end], right) is copied


def test_the_last_sum_counts() -> None:
    right = "11 + 5 = 16; 16 + 4 = 20"
    assert has_total(right, right)
    assert has_total("11 + 5 + 4 = 20 coins.\nSo", right)
    assert not has_total("11 + 5 = 16; 16 + 4 = 21", right)
    assert not has_total("11 + 5 = 16\n16 + 4 = 20", right)
    assert not has_total("20", right)


def test_a_model_is_too_small_for_single_kinds() -> None:
    results = [
        [{"kind": kind, "correct": kind != "sums", "asked": 1, "nats": [-2.0]} for kind in KINDS for _ in range(4)]
    ]
    figures = SUMS.figures(results, results)
    assert SUMS.weakness(figures) == ["sums: full precision answers 0 of 4: the model is too small"]
    assert SUMS.cells(figures)["URLs"] == "4/4"
