"""Three servers behind nginx: sessions stay where they are, go on elsewhere when they must, and are written by one."""

from functools import partial
from pathlib import Path

import httpx
import pytest

from tests.fleet.losing_servers import Size, fleet, lose_servers
from tests.fleet.proxy import NGINX
from tests.fleet.talking import Talk, at_once
from tests.processes import patient
from turbocache.storage.session_file import SUFFIX, open_checked
from turbocache.storage.whole_file import PARTIAL

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(NGINX is None, reason="nginx (Debian's package) is not installed"),
]


def test_a_killed_server_and_a_stopped_one_cost_their_sessions_little_and_nobody_an_answer(tmp_path: Path) -> None:
    size = Size(before=2, during=2, sentences=6, max_tokens=6, save_after=0.2, pause=0)
    found = lose_servers(tmp_path, size)
    assert found.wrong == []
    assert len(found.sessions_of) == 3
    assert found.moved
    assert found.stopped
    assert found.bystanders > size.bystanders
    (moves,) = (phase for phase in found.phases if phase.endswith("its sessions"))
    assert found.broken[moves]
    (stays,) = (phase for phase in found.phases if phase.endswith("the others"))
    assert sum(turn.recomputed for turn in found.phases[stays]) == 0


def test_one_session_at_two_servers_at_once_is_never_written_by_both(tmp_path: Path) -> None:
    """Behind nginx's back."""
    folder = tmp_path / "sessions"
    with fleet(tmp_path, 2, Size(save_after=0)) as (_, servers):
        talks = [Talk(0, 8) for _ in servers]
        for _ in range(4):
            at_once([partial(talk.turn, server.url, 12) for talk, server in zip(talks, servers, strict=True)])
            at_once([partial(_save, server.url) for server in servers])
            (path,) = folder.glob(f"*{SUFFIX}")
            open_checked(path)
        assert not list(folder.glob(f"*{PARTIAL}"))
        assert sum(server.metric("session_files_refused_total") for server in servers) == 0
        assert sum(server.metric("spill_failures_total") for server in servers) == 0
        assert sum(server.metric("spills_total") for server in servers) >= 4


def _save(url: str) -> None:
    """Either writes it, or another one is at it, or has written a later turn."""
    answer = httpx.post(f"{url}/v1/sessions/talk-0/save", timeout=patient(60))
    assert answer.status_code in (200, 503), answer.text
    assert answer.is_success or answer.json()["error"]["code"] == "session_not_saved", answer.text
