"""A short piece of what `python -m tests.soak operations` does for five thousand operations."""

import pytest

from tests.soak.load import operations


@pytest.mark.parametrize("model", operations.MODELS)
def test_random_operations_break_nothing(model: str) -> None:
    result = operations.run(model, count=160, clients=8, seed=2)
    assert result.wrong == []
    assert result.done.total() == 160
    assert result.figures["checks"] > 160
    assert result.figures["pauses"] == 3


def test_growth_is_that_of_the_last_quarter() -> None:
    flat = operations.Operations("x", memory=[300, 390, 395, 400, 401, 400, 401, 400])
    assert flat.growth == 0
    steady = operations.Operations("x", memory=[300.0 + 10 * i for i in range(8)])
    assert steady.growth == 20
