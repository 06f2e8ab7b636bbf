"""A short form of `python -m tests.soak crowd`."""

from tests.soak.load import crowd

# Other tests run on the same two cores, and what they take is not the server's fault.
MOST_LAG_SECONDS = 0.25


def test_a_crowd_that_comes_and_goes_leaves_nothing_behind() -> None:
    result = crowd.run(clients=32, n_requests=1, seed=5, most_lag=MOST_LAG_SECONDS)
    assert result.wrong == [], "\n".join(result.lines())
    assert result.ends.total() == 32
    assert min(result.ends["done"], result.ends["left"], result.ends["refused"]) >= 4
    assert result.outcomes["cancelled"] > 0
    assert result.longest_lag > 0
