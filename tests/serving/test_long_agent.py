"""An agent in a session that rotates, as `python -m tests.bench.long_agent` measures it."""

from pathlib import Path

import pytest

from tests.bench.long_agent import Agent, Score
from tests.serving.launch import running


@pytest.mark.slow
@pytest.mark.parametrize("share", ["0.6", "0"])
def test_an_agent_knows_its_system_message_if_it_is_pinned(tmp_path: Path, share: str) -> None:
    with running(tmp_path, MAX_SIZE="1536", PIN_SHARE=share) as server:
        agent = Agent(server, seed=0)
        agent.play(24)
        seen = server.sessions()["agent-0"]
    scores = {kind: agent.scores.get((kind, True), Score()) for kind in ("tool", "fact")}
    assert min(score.n for score in scores.values()) >= 5
    assert agent.dropped > 400
    wrong = {kind: score.n - score.right for kind, score in scores.items()}
    if share == "0":
        assert seen["pinned_tokens"] == 64
        assert scores["fact"].right <= scores["fact"].n // 2
    else:
        assert int(str(seen["pinned_tokens"])) > 700
        assert wrong["fact"] <= 1
        assert wrong["tool"] <= 2
