"""A short day of twelve conversations with memory for four: little is computed again. Real server, real client."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.bench.day_ledger import Encoder, Record, share, table, worst
from tests.bench.day_play import bytes_of_session, counters_of, last_prompts, play
from tests.bench.day_script import KINDS, QUICK
from tests.serving.launch import running
from turbocache.models import BUNDLED

TARGET = 0.05
SEED = 0

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Record]]:
    """Every request of the day, on a server whose memory holds four of its sessions and whose disk holds all."""
    folder: Path = tmp_path_factory.mktemp("day")
    encoder = Encoder(BUNDLED)
    longest = sorted(last_prompts(QUICK, SEED, encoder))
    with running(folder) as server:
        one = bytes_of_session(server.client(), "default", encoder, longest[len(longest) // 2])
    with running(folder, KV_MEMORY=str(4 * one), SESSION_DIR=str(folder / "sessions")) as server:
        client = server.client()
        yield play(QUICK, SEED, client, "default", encoder, counters_of(client))


def explained(records: list[Record]) -> str:
    return f"{share(records):.2%} recomputed\n{table(records)}\n{worst(records)}"


def test_the_day_is_what_it_says(records: list[Record]) -> None:
    assert {record.kind for record in records} == set(KINDS)
    assert len({record.conversation for record in records}) == 12
    assert all(record.counted == record.prompt for record in records)
    assert max(record.resident or 0 for record in records) < 12
    assert sum(record.events.get("restores", 0) for record in records) > 0


def test_later_turns_and_titles_compute_less_than_5_percent_again(records: list[Record]) -> None:
    later = [record for record in records if record.kind != "first"]
    assert share(later) < TARGET, explained(later)


def test_the_whole_day_computes_less_than_5_percent_again(records: list[Record]) -> None:
    assert share(records) < TARGET, explained(records)
