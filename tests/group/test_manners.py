"""What a group of ranks does besides answering greedily: sampling, schemas, cancelling, refusing, disagreeing."""

import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.group.launch import (
    LOOPBACK,
    SERVE,
    STOP_SECONDS,
    RunningGroup,
    environment,
    free_ports,
    running_group,
    started_group,
)
from tests.group.models import write
from tests.group.story import GO_ON
from tests.processes import Deadline, alive, child, patient, wait_for_end, wait_until
from tests.serving.launch import ROOT, endless

pytestmark = pytest.mark.timeout(900)  # several processes, which share two cores in CI

SCHEMA = {
    "type": "object",
    "properties": {"place": {"type": "string", "maxLength": 12}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["place", "n"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGroup]:
    """Two ranks, of which the second was given other settings: rank 0's hold."""
    folder = tmp_path_factory.mktemp("group")
    small = "import server.engine.running as r, server.engine.admission as a; r.ANSWER_STEP = a.ANSWER_STEP = 16"
    with running_group(
        folder, 2, patches=[small, small], own={1: {"KEEP": "128", "MAX_BATCH": "1"}}, MAX_BATCH="4"
    ) as two:
        yield two


def ask(group: RunningGroup, **fields: object) -> httpx.Response:
    body = {"model": "default", "messages": [{"role": "user", "content": "Tell me of the mill."}], **fields}
    return httpx.post(f"{group.url}/v1/chat/completions", json=body, timeout=patient(60))


def step_of(group: RunningGroup) -> float:
    return group.server.metric("generated_tokens_total")


def test_sampled_answers_are_the_same_on_all_ranks(group: RunningGroup) -> None:
    """Without a seed, at a high temperature, several at once: ranks that drew differently would end the group."""
    answers = ask(group, n=4, temperature=1.5, max_tokens=24, logprobs=True, top_logprobs=3, presence_penalty=1.0)
    texts = [choice["message"]["content"] for choice in answers.json()["choices"]]
    assert len(set(texts)) > 1
    seeded = [ask(group, seed=7, temperature=1.0, max_tokens=12).json()["choices"][0]["message"] for _ in range(2)]
    assert seeded[0] == seeded[1]
    assert httpx.get(f"{group.url}/health").status_code == 200


def test_a_schema_holds_on_all_ranks(group: RunningGroup) -> None:
    answer = ask(
        group, temperature=1.0, max_tokens=60,
        response_format={"type": "json_schema", "json_schema": {"name": "p", "schema": SCHEMA, "strict": True}},
    )  # fmt: skip
    said = json.loads(answer.json()["choices"][0]["message"]["content"])
    assert set(said) == {"place", "n"}


def test_an_answer_outgrows_its_first_promise(group: RunningGroup) -> None:
    """Without max_tokens the promise grows by steps, which rank 0 decides on; here they are of 16 tokens."""
    url, body = f"{group.url}/v1/chat/completions", endless("g", stream=True)
    with httpx.stream("POST", url, json=body, timeout=patient(60)) as answer:
        lines = [line for line, _ in zip((x for x in answer.iter_lines() if x), range(70), strict=False)]
    assert len(lines) == 70  # and then the client leaves
    group.server.wait_until_idle()
    wait_until(lambda: not group.server.metric("budget_bytes", kind="promised"), 5)  # rank 1 tells it once a second


def test_the_memory_of_all_ranks_is_told(group: RunningGroup) -> None:
    ask(group, prompt_cache_key="told", max_tokens=4)
    held = [functools.partial(group.server.metric, "cache_bytes", rank=rank) for rank in ("0", "1")]
    wait_until(lambda: held[0]() == held[1]() > 0, 10, "the ranks do not agree about their memory")
    assert group.server.metric("group_ranks") == 2
    assert group.server.metric("rank_silent_seconds", rank="1") < 5
    assert httpx.get(f"{group.url}/v1/status").json()["ranks"] == 2
    assert group.server.metric("budget_bytes", kind="total", rank="0") == group.server.metric(
        "budget_bytes", kind="total", rank="1"
    )


def test_a_rank_that_disagrees_ends_the_group(tmp_path: Path) -> None:
    other = "import server.engine.scheduler as t; t.Scheduler.result = lambda self: b'other' if self._tokens else b''"
    with started_group(tmp_path, 2, patches=["", other]) as group:
        group.wait_until_ready()
        deadline = Deadline(10)
        answer = ask(group, max_tokens=400)
        assert not deadline.passed()
        assert answer.status_code == 503
        assert "rank 1 disagrees with rank 0 about what step" in answer.json()["error"]["message"]
        assert group.wait(10) == [1, 1]
        assert "rank 1 disagrees with rank 0" in group.log(1)


def refused(folder: Path, n: int, **settings: str) -> RunningGroup:
    """A group that does not start."""
    with started_group(folder, n, **settings) as group:
        assert 0 not in group.wait(60)
    return group


def test_ranks_that_do_not_divide_the_kv_heads_are_refused(tmp_path: Path) -> None:
    group = refused(tmp_path, 3)
    assert "the model has 2 KV heads, which 3 ranks can't share equally" in group.log(0)
    assert "Traceback" not in group.log(0)


def test_a_model_that_mlx_lm_can_t_shard_is_refused(tmp_path: Path) -> None:
    model = write(tmp_path / "model", kind="starcoder2")
    group = refused(tmp_path, 2, MODEL=str(model))
    assert "mlx-lm can't shard models of the type 'starcoder2'" in group.log(0)


def test_a_rank_that_does_not_start_ends_the_others_start(tmp_path: Path) -> None:
    """Rank 1 finds nothing where rank 0 says that the model is."""
    broken = "import turbocache.mlxlm.model as m; m.load = lambda *a, **k: 1 / 0"
    with started_group(tmp_path, 2, patches=["", broken]) as group:
        assert 0 not in group.wait(60)
    assert "can't load the model" in group.log(1)
    assert "rank 1 did not start: can't load the model" in group.log(0)


def test_mlx_launch_starts_and_ends_a_group(tmp_path: Path) -> None:
    """As a person does it: one command, one chat, Ctrl-C. The launcher goes at once, the ranks when they have saved."""
    kept = tmp_path / "kept"
    http, ring = free_ports(1)[0], free_ports(1)[0]
    launcher = [str(Path(sys.executable).with_name("mlx.launch")), "-n", "2", "--backend", "ring"]
    log = tmp_path / "log"
    command = [*launcher, "--starting-port", str(ring), "--", *SERVE, "--port", str(http)]
    settings = environment({"SESSION_DIR": str(kept)})
    with child(command, log, cwd=ROOT, env=settings, stdin=subprocess.PIPE) as launched:
        group = RunningGroup(f"http://{LOOPBACK}:{http}", [launched], [log])
        group.wait_until_ready()
        assert ask(group, max_tokens=80, logit_bias=GO_ON).status_code == 200
        os.killpg(launched.pid, signal.SIGINT)
        wait_for_end(launched, STOP_SECONDS)
        wait_until(lambda: not alive(launched.pid), STOP_SECONDS, "a rank has not ended")
        for rank in (0, 1):
            assert len(list((kept / f"rank-{rank}-of-2").glob("*.safetensors"))) == 1
