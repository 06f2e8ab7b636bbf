"""What settings become: the store's preset and what `/v1/backend` says of each layer."""

import pytest

from server.coordinator import Coordinator
from server.engine.startup import load_runtime
from server.errors import StartupError
from server.settings import MemoryBudget
from tests.server.conftest import make_settings

BUDGET = MemoryBudget(bytes=64 << 20)


def test_protection_and_conditioning_reach_the_layers() -> None:
    runtime = load_runtime(
        make_settings(backend="packed", kv_memory=BUDGET, kv_protect=1, kv_condition="off"), Coordinator()
    )
    widths = [layer.lanes.shape.widths for layer in runtime.store.spec.layers]
    assert widths == ["k8v8", *["k6v4"] * (len(widths) - 2), "k8v8"]
    assert {layer.centre_above for layer in runtime.store.spec.layers} == {None}
    said = [layer["reason"] for layer in runtime.report()["layers"]]
    assert [("protected: k8v8 instead of k6v4" in reason) for reason in said] == [w == "k8v8" for w in widths]
    assert all("conditioning of keys is switched off" in reason for reason in said)
    for layer, stored in zip(runtime.report()["layers"], runtime.store.spec.layers, strict=True):
        sizes = layer["fixed_bytes"], layer["token_bytes"] * 64, layer["max_tokens"]
        assert sizes == ((64 + 192) * stored.token_nbytes, stored.page_nbytes, None)
    plain = load_runtime(make_settings(backend="packed", kv_memory=BUDGET), Coordinator())
    assert None not in {layer.centre_above for layer in plain.store.spec.layers}


def test_a_preset_that_no_backend_of_this_machine_reads_says_which_one_does() -> None:
    with pytest.raises(StartupError, match=r"reference lanes only \(TURBOCACHE_BACKEND=reference\)"):
        load_runtime(make_settings(kv_memory=BUDGET, kv_preset="k4v4_qjl"), Coordinator())
