from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from turbocache.evaluation.rows import Row
from turbocache.evaluation.settings import EvaluationError
from turbocache.evaluation.suites.drift import DRIFT, first_difference, loops
from turbocache.evaluation.suites.suite import Material, Task


@pytest.fixture(scope="module")
def task(material: Material) -> Task:
    return DRIFT.make(material)[0]


@pytest.fixture(scope="module")
def full(material: Material, task: Task) -> Any:
    return task.measure(material.full, None)


@pytest.mark.slow
def test_answers_are_those_of_mlx_lm_s_own_loop(
    material: Material,
    task: Any,
    full: Any,
    row_of: Callable[[str], Row],
    generated: Callable[..., list[int]],
) -> None:
    """Full precision's, and a row's, which has departed from it."""
    banned = list(material.loaded.tokenizer.eos_token_ids)
    assert full["answer"] == generated(task._prompt, material.full.open(500).layers, 24, banned)
    row = row_of("k2v2")
    with task.reference(full) as reference:
        told = task.measure(row, reference)
    assert told["answer"] == generated(task._prompt, row.open(600).layers, 24, banned)
    assert told["answer"] != full["answer"]
    assert told["kld"] > 0.01
    assert told["top1"] < 1
    figures = DRIFT.figures([told], [full])
    first = figures["first_difference"][0]
    assert first is not None
    assert told["answer"][:first] == full["answer"][:first]
    assert figures["equal"]["24"] < 1


@pytest.mark.slow
def test_without_a_codec_nothing_drifts(task: Task, full: Any, row_of: Callable[[str], Row]) -> None:
    with task.reference(full) as reference:
        told = task.measure(row_of("off"), reference)
    figures = DRIFT.figures([told], [full])
    assert figures["first_difference"] == [None]
    assert figures["equal"] == {"12": 1.0, "24": 1.0}
    assert figures["kld_mean"] < 1e-9
    assert figures["top1"] == 1
    assert figures["stored_bits"] >= 32


def result(answer: Sequence[int], **more: Any) -> dict[str, Any]:
    given = {"kld": 0.0, "top1": 1.0, "values": 100, "lengths": [200, 400], "nbytes": 50, "half_nbytes": 25}
    return {"answer": list(answer), **given, **more}


def test_figures_are_over_all_answers() -> None:
    full = [result(range(400)), result(range(400)), result(range(400))]
    mine = [
        result([*range(100), *range(1000, 1300)], kld=0.3),
        result(range(400)),
        result([*range(300), 7, *range(301, 400)]),
    ]
    figures = DRIFT.figures(mine, full)
    assert figures["first_difference"] == [100, None, 300]
    assert figures["first_difference_median"] == 300
    assert figures["equal"]["200"] == pytest.approx((0.5 + 1 + 1) / 3)
    assert figures["equal"]["400"] == pytest.approx((100 + 400 + 399) / 1200)
    assert figures["kld_mean"] == pytest.approx(0.1)
    assert (figures["stored_bits"], figures["stored_bits_half"]) == (4.0, 2.0)
    itself = DRIFT.figures(full, full)
    assert itself["first_difference"] == [None] * 3
    assert set(itself["equal"].values()) == {1.0}
    assert DRIFT.cells(itself)["drift: first"] == "none"
    assert DRIFT.cells(figures)["equal 400"] == "74.9%"


def test_loops_are_seen() -> None:
    chance = np.random.default_rng(0)
    prose = [int(n) for n in chance.integers(0, 5000, 400)]
    assert not loops(prose, 400)
    looping = prose[:200] + prose[:20] * 10
    assert loops(looping, 400)
    assert not loops(looping, 200)
    assert loops([1] * 40, 40)
    # Some repetition is no loop: half of the last n-grams must be there before.
    assert not loops(prose[:340] + prose[:60], 400)
    assert loops(prose[:300] + prose[:100], 400)


def test_a_model_that_loops_in_full_precision_is_too_small() -> None:
    full = [result([3] * 400), result([4] * 400), result(range(400))]
    (line_200, line_400) = DRIFT.weakness(DRIFT.figures(full, full))
    assert "full precision loops in 2 of 3 answers at 200 tokens" in line_200
    assert "too small" in line_400
    assert DRIFT.weakness(DRIFT.figures(full[1:], full[1:])) == []


def test_the_first_difference() -> None:
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 5, 3]) == 1


def test_answers_beyond_the_positions_are_refused(material_of: Callable[..., Material]) -> None:
    with pytest.raises(
        EvaluationError, match=r"--answer-lengths 8000 and a prompt of \d+ tokens are more than the 8192"
    ):
        DRIFT.make(material_of(answer_lengths=(100, 8000)))
