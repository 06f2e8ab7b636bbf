import mlx.core as mx
import pytest

from kernels.lanes import LaneShape
from kernels.layout import PAGE
from kernels.reference import ReferenceLanes
from turbocache.backend import choose_backend, fitted, make_lanes
from turbocache.plan import LayerGeometry, LayerPlan
from turbocache.presets import PRESETS, preset
from turbocache.store import compressed_layer


def plan(key_dim: int = 64) -> LayerPlan:
    return LayerPlan("KVCache", LayerGeometry(4, 2, key_dim, 64, mx.float32), "tested")


@pytest.mark.parametrize(
    ("asked", "stored"), [((3.5, 3.5), (4, 3)), ((2.5, 2.5), (3, 2)), ((4, 2.5), (4, 2)), ((3.5, 2.5), (4, 2))]
)
def test_packed_lanes_store_half_bits_as_more_for_keys_and_fewer_for_values(
    asked: tuple[float, float], stored: tuple[int, int]
) -> None:
    shape = LaneShape(4, 2, 64, 64, *asked)
    assert fitted("packed", shape) == LaneShape(4, 2, 64, 64, *stored)
    assert make_lanes("packed", shape).shape == LaneShape(4, 2, 64, 64, *stored)
    assert fitted("reference", shape) == shape


def test_whole_bits_stay_and_impossible_ones_are_not_mended() -> None:
    for bits in ((4, 4), (8, 3), (7, 4)):
        shape = LaneShape(4, 2, 64, 64, *bits)
        assert fitted("packed", shape) == shape
    with pytest.raises(ValueError, match="no 7-bit lanes"):
        make_lanes("packed", LaneShape(4, 2, 64, 64, 7, 4))


def test_an_odd_key_dim_gets_whole_bits_and_levels() -> None:
    shape = LaneShape(4, 2, 33, 33, 3.5, 3.5)
    assert fitted("reference", shape) == LaneShape(4, 2, 33, 33, 4, 3)
    for codebook in ("lloyd_max", "pair"):
        lanes = make_lanes("reference", shape, codebook)  # type: ignore[arg-type]
        tokens = mx.random.normal((1, 2, PAGE, 33))
        keys, _ = lanes.expand(lanes.encode(tokens, tokens), mx.float32)
        assert float(mx.square(keys - tokens).mean()) < 0.02


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "off"])
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
