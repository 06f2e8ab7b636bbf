"""A few answers held to random schemas, and some that must be refused; long: `python -m tests.soak schemas`."""

from tests.soak.fuzz import schemas


def test_a_few_random_schemas() -> None:
    result = schemas.run(8, seed=5, most_tokens=120)
    assert result.wrong == []
    assert result.ends["stop"] >= 3
