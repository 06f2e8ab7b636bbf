"""A backend with a fault, from the start of a real server to what its clients, its log and its metrics are told."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import mlx.core as mx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from kernels.lanes.reference import ReferenceLanes
from server.engine import build_engine
from server.engine.engine import MlxEngine
from server.errors import StartupError
from server.metrics import Metrics
from server.settings import MemoryBudget
from tests.faulty import (
    FakeFused,
    KeyIsMissing,
    compile_error,
    exception,
    faulty,
    nan,
    slow,
    where_odd,
    where_timed,
    with_lanes,
    wrong,
)
from tests.server.conftest import make_settings, running
from turbocache.backend import lanes_for
from turbocache.backends import BACKENDS

pytestmark = pytest.mark.slow

CHAT = {
    "messages": [{"role": "user", "content": "Repeat after me: " + "alpha beta gamma delta " * 30}],
    "max_tokens": 30,
    "temperature": 0,
}
GPU = {"architecture": "sm_90", "device_name": "Pretended GPU"}


class Served:
    def __init__(self, http: httpx.Client) -> None:
        self.http = http

    def backend(self) -> dict[str, Any]:
        answer: dict[str, Any] = self.http.get("/v1/backend").json()
        return answer

    def chat(self) -> httpx.Response:
        return self.http.post("/v1/chat/completions", json={"model": "default", **CHAT})

    def metric(self, name: str) -> dict[tuple[str, ...], float]:
        """The samples of a family that are not 0, by their labels' values in alphabetical order of the labels."""
        families = text_string_to_metric_families(self.http.get("/metrics").text)
        samples = [s for family in families for s in family.samples if s.name == f"turbocache_{name}"]
        return {tuple(v for _, v in sorted(s.labels.items())): s.value for s in samples}


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Any:
    """pretend(lanes, info): this machine has a CUDA device, and these are the lanes of its backend."""

    def install(lanes: Any, info: dict[str, str] | None = None) -> None:
        monkeypatch.setitem(BACKENDS, "cuda", with_lanes("cuda", lanes))
        monkeypatch.setattr(mx, "device_info", lambda: GPU if info is None else info)

    return install


@contextmanager
def served(**settings: Any) -> Iterator[Served]:
    options = make_settings(kv_memory=MemoryBudget(bytes=64 << 20), prefill_chunk=128, **settings)
    with (
        running(build_engine, options) as port,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http,
    ):
        yield Served(http)


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO):
        yield caplog


FAULTS: dict[str, tuple[Any, dict[str, str] | None, str, str, str, dict[str, float]]] = {
    # lanes, device info: backend that runs, reason code, what it falls back to, failed checks
    "healthy": (FakeFused, None, "cuda", "first_choice", "", {}),
    "does not compile": (faulty("encode", compile_error), None, "packed", "does_not_compile", "packed", {"encode": 0}),
    "encodes wrongly": (faulty("encode", wrong), None, "packed", "wrong_result", "packed", {"encode": 0}),
    "expand raises": (faulty("expand", exception), None, "packed", "exception", "packed", {"expand": 0}),
    "step is NaN": (faulty("attend_step", nan), None, "cuda", "wrong_result", "expanded", {"attend_step": 0}),
    "chunk raises": (faulty("attend", exception), None, "cuda", "exception", "expanded", {"attend": 0}),
    "too slow": (faulty("attend_step", where_timed(slow)), None, "packed", "too_slow", "packed", {"speed": 0}),
    "answer raises": (faulty("attend", where_odd(exception)), None, "packed", "exception", "packed", {"answer": 0}),
    "answer is NaN": (faulty("attend", where_odd(nan)), None, "packed", "wrong_result", "packed", {"answer": 0}),
    "lanes miss a key": (KeyIsMissing, None, "packed", "missing_device_key", "packed", {"shape": 0}),
    "profile misses a key": (FakeFused, {"device_name": "Odd"}, "cuda", "missing_device_key", "portable", {}),
}
PARTS = ("encode", "expand", "attend", "attend_step", "speed", "answer")


QUICK = ("healthy", "does not compile", "encodes wrongly")
"""The faults of the quick tests. Each fault starts an engine."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAULTS]
)
def test_each_fault_yields_its_backend_reason_log_line_answer_and_metrics(
    name: str, pretend: Any, log: pytest.LogCaptureFixture
) -> None:
    lanes, info, active, code, target, failed = FAULTS[name]
    pretend(lanes, info)
    with served() as server:
        told = server.backend()
        assert told["name"] == active
        assert told["requested"] == "auto"
        assert told["profile"] == ("none" if active == "packed" else "portable" if info else "cuda")
        assert told["device"] == (info or GPU)["device_name"]
        checks = {check["check"].split(" ", 2)[1]: check for check in told["checks"] if check["check"][:4] == "cuda"}
        for part in failed:
            assert not checks[part]["passed"]
            assert checks[part]["reason"] in told["reason"]

        # The fallback has its reason, its line in the log and its count.
        source = "profile" if target == "portable" else "cuda"
        found = [f for f in told["fallbacks"] if f["from"] != "metal"]
        assert [(f["from"], f["to"], f["code"]) for f in found] == ([(source, target, code)] if target else [])
        lines = [r.getMessage() for r in log.records if f"{source} falls back to {target} ({code})" in r.getMessage()]
        assert len(lines) == len(found)
        counts = {("metal", "no_device", active): 1.0} if active == "packed" else {}  # labels from, reason, to
        assert server.metric("fallbacks_total") == counts | ({(source, code, target): 1.0} if target else {})

        # Labels active, profile, reason, requested.
        assert server.metric("backend_info") == {(active, told["profile"], code, "auto"): 1.0}
        states = server.metric("probe_check")
        assert {(f"cuda_{part}",): 0.0 for part in failed}.items() <= states.items()
        assert {part for part in PARTS if states.get((f"cuda_{part}",)) == 0} == set(failed) & set(PARTS)
        assert (states.get(("packed_attend_step",)) == 1) is (active == "packed")

        # It answers, and attention went the way that was chosen.
        before = server.metric("attention_path_total")
        assert set(before) == {(path,) for path in ("fused", "packed", "expanded", "native")}
        assert server.chat().json()["choices"][0]["message"]["content"]
        after = server.metric("attention_path_total")
        used = {path for (path,), count in after.items() if count > before[(path,)]}
        step = "packed" if active == "packed" else "expanded" if "attend_step" in failed else "fused"
        assert used == {step, "expanded"}  # a prompt's chunks are long, so that their pages are expanded
        assert server.metric("kernel_faults_total") == {(): 0.0}


@pytest.mark.parametrize("name", [name for name, fault in FAULTS.items() if fault[5]])
def test_a_named_backend_with_a_fault_stops_the_start(name: str, pretend: Any) -> None:
    pretend(*FAULTS[name][:2])
    engine = MlxEngine(make_settings(backend="cuda", kv_memory=MemoryBudget(bytes=64 << 20)), Metrics())
    with pytest.raises(StartupError) as caught:
        engine.start()
    assert str(caught.value).startswith("backend 'cuda' does not work here: cuda")
    assert "Set TURBOCACHE_BACKEND=auto" in str(caught.value)
    assert len(str(caught.value)) < 700


def test_a_named_backend_that_works_is_taken(pretend: Any) -> None:
    pretend(FakeFused)
    with served(backend="cuda") as server:
        assert server.backend()["reason"] == "asked for by name; all checks passed"
        assert server.metric("backend_info") == {("cuda", "cuda", "named", "cuda"): 1.0}
        assert server.metric("fallbacks_total") == {}


def test_a_kernel_that_breaks_while_serving_ends_in_an_unhealthy_server(
    pretend: Any, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    """From the fault's first request to the refusal, over HTTP."""
    pretend(FakeFused)
    with served() as server:
        good = server.chat().json()["choices"][0]["message"]["content"]
        with monkeypatch.context() as patch:
            patch.setattr(FakeFused, "attend_step", faulty("attend_step", nan).attend_step)
            for n in (1, 2):
                broken = server.chat()
                assert broken.status_code == 500
                error = broken.json()["error"]
                assert (error["code"], error["type"]) == ("kernel_fault", "server_error")
                assert server.metric("kernel_faults_total") == {(): float(n)}
                assert server.http.get("/health").status_code == 200
        # It works again in between: two faults are not yet too many.
        assert server.chat().json()["choices"][0]["message"]["content"] == good
        with monkeypatch.context() as patch:
            patch.setattr(FakeFused, "attend_step", lambda *arguments: exception(None, arguments))
            assert server.chat().status_code in (500, 503)  # 503 when the health check is first
        refused = server.chat()
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "engine_dead"
        health = server.http.get("/health")
        assert health.status_code == 503
        for words in ("unhealthy", "TURBOCACHE_BACKEND=packed", "RuntimeError", "cuda"):
            assert words in health.json()["detail"]
            assert words in refused.json()["error"]["message"]
        assert server.metric("kernel_faults_total") == {(): 3.0}
        assert any(r.levelno == logging.CRITICAL and "unhealthy" in r.getMessage() for r in log.records)


def test_two_kinds_of_layers_get_lanes_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the probe decided for a dtype is what its layers are made with."""
    from kernels.lanes.base import LaneShape
    from kernels.lanes.expanded import ExpandedAttentionLanes
    from kernels.probe.verdict import Backend, LayerUse, LayerVerdict

    monkeypatch.setitem(BACKENDS, "cuda", with_lanes("cuda", FakeFused))
    shape, other = LaneShape(4, 2, 64, 64, 4, 4), LaneShape(4, 2, 80, 80, 4, 4)
    verdicts = (
        LayerVerdict(LayerUse(shape, mx.float16), "cuda"),
        LayerVerdict(LayerUse(shape, mx.bfloat16), "cuda", ("attend_step",)),
        LayerVerdict(LayerUse(other, mx.float16), "packed"),
    )
    backend = Backend("cuda", "auto", "", "cuda", "", layers=verdicts)
    whole = lanes_for(backend, shape, mx.float16)
    assert type(whole) is FakeFused
    assert whole.path(None) == "fused"
    parted = lanes_for(backend, shape, mx.bfloat16)
    assert isinstance(parted, ExpandedAttentionLanes)
    assert parted.path(None) == "expanded"
    assert lanes_for(backend, other, mx.float16).name == "packed"
    assert type(lanes_for("reference", other, mx.float16)) is ReferenceLanes
    with pytest.raises(KeyError, match="float32 was not probed"):
        lanes_for(backend, other, mx.float32)
