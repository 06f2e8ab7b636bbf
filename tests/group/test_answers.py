"""A group of ranks answers as one process does, and each rank holds its share of the cache."""

from pathlib import Path

import httpx
import pytest

from tests.group.launch import RunningGroup, running_group
from tests.group.models import write
from tests.group.story import CHAPTERS, MAX_SIZE, Teller, Told
from tests.serving.launch import SERVE, Server, running

pytestmark = pytest.mark.timeout(900)  # several processes, which share two cores in CI

MEMORY = 40 << 20
SMALL_MEMORY = 20 << 20
"""Of the small model: the same number of sessions."""
MOST_OF_A_SHARE = 1.1


def told_by(server: Server, n: int, tokens: int) -> Told:
    teller = Teller(server, n, tokens)
    for chapter in CHAPTERS.values():
        chapter(teller)
    return teller.told


def one_and_many(
    folder: Path, n: int, memory: int = MEMORY, tokens: int = 8, **settings: str
) -> tuple[Told, Told, RunningGroup]:
    """What one process tells and what `n` ranks tell with the same memory together."""
    settings |= {"MAX_SIZE": str(MAX_SIZE), "SESSION_SAVE_AFTER": "600"}  # what time passes must not matter here
    with running(folder, SERVE, KV_MEMORY=str(memory), SESSION_DIR=str(folder / "one"), **settings) as server:
        one = told_by(server, 1, tokens)
    with running_group(
        folder / "ranks", n, KV_MEMORY=str(memory // n), SESSION_DIR=str(folder / "many"), **settings
    ) as group:
        many = told_by(group.server, n, tokens)
    return one, many, group


def check_story(one: Told, many: Told, n: int) -> None:
    assert many.answers == one.answers
    assert many.counts == one.counts
    assert one.counts["rotated_tokens_total"] >= MAX_SIZE / 2
    assert one.counts["spills_total"] > 3
    assert one.counts["restores_total"] > 2
    assert len(many.peak) == n
    for rank, peak in many.peak.items():
        assert 0 < peak <= MOST_OF_A_SHARE / n * one.peak["0"], rank


def test_two_ranks_answer_as_one_process_does(tmp_path: Path) -> None:
    """Single and batched, through rotation, a checkpoint's rollback, and sessions that go to disk and come back."""
    one, many, group = one_and_many(tmp_path, 2)
    check_story(one, many, 2)
    names = [{path.name for path in (tmp_path / "many" / f"rank-{rank}-of-2").glob("*.safetensors")} for rank in (0, 1)]
    assert names[0] == names[1] != set()
    assert "stopped with rank 0" in group.log(1)


def test_four_ranks_answer_as_one_process_does(tmp_path: Path) -> None:
    model = str(write(tmp_path / "model"))
    one, many, _ = one_and_many(tmp_path, 4, SMALL_MEMORY, tokens=3, MODEL=model)
    check_story(one, many, 4)


def test_sessions_come_back_to_as_many_ranks_and_to_no_other_number(tmp_path: Path) -> None:
    """A group is stopped and started again, and stopped by way of rank 1; then one process is, on the same folder."""
    folder, talk = (
        str(tmp_path / "kept"),
        [{"role": "user", "content": "My locker code is 5917. Remember it well. " * 8}],
    )
    with running_group(tmp_path / "first", 2, SESSION_DIR=folder) as group:
        teller = Teller(group.server, 2)
        talk += [{"role": "assistant", "content": teller.ask("back", talk)}, {"role": "user", "content": "What is it?"}]
        n_read = teller.told.answers[0][1]
    with running_group(tmp_path / "second", 2, stop=1, SESSION_DIR=folder) as group:
        assert group.server.sessions()["back"]["state"] == "spilled"
        teller = Teller(group.server, 2)
        again = teller.ask("back", talk)
        assert teller.told.answers[0][2] >= n_read
    with running(tmp_path, SERVE, SESSION_DIR=folder) as server:
        refused = httpx.post(f"{server.url}/v1/sessions/back/restore")
        assert refused.status_code == 409
        assert refused.json()["error"]["code"] == "session_file_refused"
        assert "written by 2 ranks (other_group), and this server is one process" in refused.json()["error"]["message"]
        assert server.metric("session_files_refused_total", reason="other_group") == 1
        teller = Teller(server)
        assert teller.ask("back", talk) == again
        assert teller.told.answers[0][2] == 0
        assert server.metric("prefilled_tokens_total", reason="refused_file") > n_read
    for rank in (0, 1):  # nothing of theirs was lost
        assert len(list((Path(folder) / f"rank-{rank}-of-2").glob("*.safetensors"))) == 1
