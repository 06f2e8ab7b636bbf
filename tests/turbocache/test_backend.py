from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest
from mlx.nn.layers.base import Module

from kernels.codec.layout import PAGE
from kernels.lanes.base import LaneShape
from kernels.lanes.qjl import QjlLanes, QjlShape
from kernels.lanes.reference import ReferenceLanes
from turbocache.backend import BackendUnavailable, choose_backend, make_lanes, supported_widths
from turbocache.cache.ring import RingConfig
from turbocache.mlxlm.plan import LayerGeometry, LayerPlan
from turbocache.presets import PRESETS, QJL_PRESET, preset
from turbocache.store import CacheStore, compressed_layer


def plan(key_dim: int = 64) -> LayerPlan:
    return LayerPlan("KVCache", LayerGeometry(4, 2, key_dim, 64, mx.float32), "tested")


@pytest.mark.parametrize(
    ("asked", "stored"), [((3.5, 3.5), (4, 3)), ((2.5, 2.5), (3, 2)), ((4, 2.5), (4, 2)), ((3.5, 2.5), (4, 2))]
)
def test_packed_lanes_store_half_bits_as_more_for_keys_and_fewer_for_values(
    asked: tuple[float, float], stored: tuple[int, int]
) -> None:
    shape = LaneShape(4, 2, 64, 64, *asked)
    assert supported_widths("packed", shape) == LaneShape(4, 2, 64, 64, *stored)
    assert make_lanes("packed", shape).shape == LaneShape(4, 2, 64, 64, *stored)
    assert supported_widths("reference", shape) == shape


def test_whole_bits_stay_and_impossible_ones_are_not_mended() -> None:
    for bits in ((4, 4), (8, 3), (7, 4)):
        shape = LaneShape(4, 2, 64, 64, *bits)
        assert supported_widths("packed", shape) == shape
    with pytest.raises(ValueError, match="no 7-bit lanes"):
        make_lanes("packed", LaneShape(4, 2, 64, 64, 7, 4))


def test_an_odd_key_dim_gets_whole_bits_and_levels() -> None:
    shape = LaneShape(4, 2, 33, 33, 3.5, 3.5)
    assert supported_widths("reference", shape) == LaneShape(4, 2, 33, 33, 4, 3)
    for codebook in ("lloyd_max", "pair"):
        lanes = make_lanes("reference", shape, codebook)  # type: ignore[arg-type]
        tokens = mx.random.normal((1, 2, PAGE, 33))
        keys, _ = lanes.expand(lanes.encode(tokens, tokens), mx.float32)
        assert float(mx.square(keys - tokens).mean()) < 0.02


@pytest.mark.parametrize("name", [name for name, known in PRESETS.items() if known.compressed and name != QJL_PRESET])
def test_every_preset_starts_on_a_machine_without_fused_kernels(name: str) -> None:
    backend = choose_backend("packed", [plan()], preset(name))
    assert all(check.passed for check in backend.checks)
    lanes = compressed_layer(plan().geometry, preset(name), backend.name).lanes  # type: ignore[arg-type]
    halves = [bits for bits in (preset(name).key_bits, preset(name).value_bits) if bits and bits % 1]
    assert ("is stored as" in backend.reason) == bool(halves)
    assert lanes.shape.key_bits % 1 == lanes.shape.value_bits % 1 == 0


def test_the_reason_says_what_a_preset_is_stored_as() -> None:
    backend = choose_backend("packed", [plan(), plan()], preset("turbo3_5"))
    assert backend.reason == (
        "asked for by name; all checks passed; k3.5v3.5 is stored as k4v3: MLX's quantised products have no 3.5-bit "
        "lanes (for keys); there are (2, 3, 4, 5, 6, 8)"
    )
    reference = choose_backend("reference", [plan()], preset("turbo3_5"))
    assert reference.reason == "asked for by name; all checks passed"
    odd = choose_backend("reference", [plan(33)], preset("turbo2_5"))
    assert "k2.5v2.5 is stored as k3v2: a code of 2.5 bits stands for a pair of dims, and keys have 33" in odd.reason
    assert isinstance(make_lanes("reference", LaneShape(4, 2, 64, 64, 3.5, 3.5)), ReferenceLanes)


def test_qjl_codes_are_for_the_reference_only_and_auto_says_so() -> None:
    for name in ("auto", "packed"):
        with pytest.raises(BackendUnavailable, match=r"packed: QJL codes of keys are read by the reference lanes only"):
            choose_backend(name, [plan()], preset("k4v4_qjl"))
    with pytest.raises(ValueError, match="reference lanes only"):
        make_lanes("packed", QjlShape(4, 2, 64, 64, 4, 4))
    backend = choose_backend("reference", [plan()], preset("k4v4_qjl"))
    assert backend.reason == "asked for by name; all checks passed"
    assert str(backend.layers[0].use) == "4/2 heads x 64, k4v4_qjl, float32"
    assert isinstance(compressed_layer(plan().geometry, preset("k4v4_qjl"), backend).lanes, QjlLanes)  # type: ignore[arg-type]


def test_protected_layers_have_lanes_of_their_own() -> None:
    chosen = replace(preset("k4v4"), protect=1)
    native = LayerPlan("RotatingKVCache", None, "not this one")
    plans = [native, plan(), plan(), plan()]
    backend = choose_backend("packed", plans, chosen)
    assert [(v.use.shape.key_bits, v.use.shape.value_bits) for v in backend.layers] == [(4, 4), (8, 8)]
    assert backend.reason.endswith("the first and last 1 of 4 layers are stored at 8 bits")
    assert "bits" not in choose_backend("packed", plans, preset("k4v4")).reason


def test_what_is_said_of_each_layer(tiny_llama: Module) -> None:
    geometry = plan().geometry
    assert geometry is not None
    plans = [plan(), LayerPlan("KVCache", None, "native"), LayerPlan("", replace(geometry, sinks=True), "x"), plan()]

    def said(name: str, **options: Any) -> list[str]:
        chosen = replace(preset(name), **options)
        store = CacheStore(tiny_llama, plans, chosen, "packed", RingConfig(), 1)
        assert len({layer.lanes.shape.key_bits for layer in store.spec.layers}) == 1 + bool(options.get("protect"))
        return [store.reason(i) for i in range(4)]

    assert said("k4v4") == ["tested", "native", "x; keys are not conditioned, because attention has sinks", "tested"]
    assert said("k4v4", condition=False)[0] == "tested; conditioning of keys is switched off"
    assert said("k4v4", protect=1)[3] == "tested; protected: k8v8 instead of k4v4, as one of the first or last 1 layers"
    assert said("off", condition=False) == ["tested", "native", "x", "tested"]
