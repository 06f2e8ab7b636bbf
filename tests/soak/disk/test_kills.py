"""A few kills of what `python -m tests.soak kills` does a hundred times."""

import pytest

from tests.soak.disk import kills


@pytest.mark.slow
def test_killed_servers_leave_whole_files_and_go_on_from_them() -> None:
    result = kills.run(times=3, seed=4, n_talks=3, n_turns=4)
    assert result.wrong == []
    assert result.kills.total() == 3
    assert result.restored >= 4
    assert result.files == result.whole > 0
