"""A returning conversation does not pay its prefill again: the benchmark's measure, on a shorter text."""

import pytest

from tests.bench.comeback import RESTORED, WARM, measure, row


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_warm_turn_and_one_from_disk_take_a_fraction_of_a_cold_one() -> None:
    found = measure(2500, 1)
    for kind, target in (("warm", WARM), ("restored", RESTORED)):
        assert target.met(row(found, kind, target).ratio), found
