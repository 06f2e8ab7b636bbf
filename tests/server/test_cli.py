"""`turbocache probe`: the agreed JSON, a table for a person, and a sentence where nothing works."""

import json

import mlx.core as mx
import pytest

from server import cli
from tests.faulty import FakeFused, faulty, with_lanes, wrong
from turbocache.backend import choose_backend
from turbocache.backends import BACKENDS
from turbocache.mlxlm import model
from turbocache.mlxlm.model import LoadedModel


@pytest.fixture(autouse=True)
def _loaded(bundled: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "load_model", lambda source: bundled)
    for name in ("BACKEND", "MODEL", "KV_PRESET", "KV_PROTECT"):
        monkeypatch.delenv(f"TURBOCACHE_{name}", raising=False)


def test_json_has_the_agreed_form(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["probe", "--json", "--preset", "k8v4"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert list(answer) == ["name", "requested", "reason", "profile", "device", "checks"]
    assert (answer["name"], answer["requested"]) == ("packed", "auto")
    for check in answer["checks"]:
        assert list(check) == ["check", "passed", "max_error", "microseconds", "reason"]
    assert any(check["check"].startswith("packed attend_step ragged") for check in answer["checks"])
    assert all("k8v4" in check["check"] for check in answer["checks"] if check["check"].startswith("packed"))


def test_the_table_tells_device_profile_checks_choice_and_why(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BACKENDS, "cuda", with_lanes("cuda", faulty("attend_step", wrong)))
    monkeypatch.setattr(mx, "device_info", lambda: {"architecture": "sm_90", "device_name": "Pretended GPU"})
    assert cli.main(["probe"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "device   Pretended GPU"
    assert lines[1].startswith("profile  cuda (sm_90 is an NVIDIA GPU")
    encode = next(line for line in lines if "cuda encode" in line)
    assert encode.startswith("ok ")
    assert "error 0.0e+00" in encode
    assert encode.endswith(" us")
    failed = next(line for line in lines if "cuda attend_step one row" in line)
    assert failed.startswith("no ")
    assert "error 2.0e-02" in failed
    assert "differs from the reference by 0.02 (allowed 0.002)" in failed
    layers = next(line for line in lines if line.startswith("layers "))
    assert "float32: cuda, attend_step over expanded pages: cuda attend_step:" in layers
    assert "backend  cuda (asked for: auto)" in lines
    assert lines[-1].startswith("reason   cuda: attend_step differs")


def test_protected_layers_are_checked_as_well(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TURBOCACHE_KV_PROTECT", "2")
    assert cli.main(["probe", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    for width in ("k6v4", "k8v8"):
        assert any(width in check["check"] for check in answer["checks"])
    assert "the first and last 2 of 8 layers are stored at 8 bits" in answer["reason"]
    assert cli.main(["probe", "--protect", "-1"]) == 1
    assert "turbocache probe: protect must be 0 or more layers, not -1" in capsys.readouterr().err


def test_what_the_environment_asks_for_is_the_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TURBOCACHE_BACKEND", "metal")
    assert cli.main(["probe", "--json"]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert "backend 'metal' does not work here: metal: no Metal device." in told.err
    assert "Set TURBOCACHE_BACKEND=auto" in told.err
    assert cli.main(["probe", "--json", "--backend", "reference"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "reference"


def test_with_nothing_to_compress_nothing_is_probed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["probe", "--preset", "off"]) == 0
    out = capsys.readouterr().out
    assert "reason   preset off" in out
    assert "encode" not in out


def test_unknown_names_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["probe", "--preset", "k5v1"]) == 1
    assert "k4v4" in capsys.readouterr().err
    assert cli.main(["probe", "--backend", "vulkan"]) == 1
    assert "auto, metal, cuda, packed, reference" in capsys.readouterr().err


def test_fused_lanes_serve_a_session(monkeypatch: pytest.MonkeyPatch, bundled: LoadedModel) -> None:
    """A verdict goes all the way into a session's layers, and each step is counted on its path."""
    from turbocache.cache.ring import RingConfig
    from turbocache.presets import PRESETS
    from turbocache.store import CacheStore, checked_plans

    monkeypatch.setitem(BACKENDS, "cuda", with_lanes("cuda", FakeFused))
    plans = checked_plans(bundled.model)
    chosen = choose_backend("auto", plans, PRESETS["k4v4"])
    assert chosen.name == "cuda"
    store = CacheStore(bundled.model, plans, PRESETS["k4v4"], chosen, RingConfig(64, 128), n_pages=8)
    cache = store.new_cache()
    mx.eval(bundled.model(mx.array([list(range(1, 301))]), cache=cache))
    mx.eval(bundled.model(mx.array([[5]]), cache=cache))
    n_layers = len(store.spec.layers)
    assert store.spec.paths.totals == {"expanded": n_layers, "fused": n_layers}
