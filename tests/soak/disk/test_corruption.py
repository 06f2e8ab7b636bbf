"""A few damages of what `python -m tests.soak corruption` does five hundred times."""

import random

import pytest

from tests.soak.disk import corruption
from tests.soak.disk.damage import Damage, draw


def test_damaged_files_are_refused_and_counted_and_cost_a_prefill() -> None:
    result = corruption.run(times=12, seed=1, at_once=7)
    assert result.wrong == []
    assert result.damaged == result.reasons.total() == 12
    assert result.whole == 2


@pytest.mark.parametrize("seed", range(3))
def test_a_damage_changes_one_bit_or_takes_an_end(seed: int) -> None:
    header = b'{"x.tokens":{"data_offsets":[4,20]}}'
    data = len(header).to_bytes(8, "little") + header + bytes(64)
    dice = random.Random(seed)
    for _ in range(200):
        damage = draw(dice, data)
        bad = damage.done_to(data)
        if damage.bit is None:
            assert bad == data[: len(bad)] != data
        else:
            changed = [a ^ b for a, b in zip(bad, data, strict=True)]
            assert sum(x.bit_count() for x in changed) == 1
            assert changed[damage.at]


def test_a_cut_keeps_what_lies_before_it() -> None:
    assert Damage("arrays", 2, None).done_to(b"abcd") == b"ab"
