from dataclasses import replace

import pytest

from turbocache.presets import DEFAULT_PRESET, PRESETS, QJL_PRESET, preset


def test_presets() -> None:
    assert DEFAULT_PRESET in PRESETS
    assert not PRESETS["off"].compressed
    for name, known in PRESETS.items():
        assert preset(name) is known
        assert known.name == name
        if name.startswith("k"):
            assert name.removesuffix("_qjl") == f"k{known.key_bits:g}v{known.value_bits:g}".replace(".", "_")
        elif name != "off":
            assert known.key_bits == known.value_bits
            assert name == f"turbo{known.key_bits:g}".replace(".", "_")
    with pytest.raises(ValueError, match="unknown cache preset 'k9v9'; there are off, k8v8"):
        preset("k9v9")


def test_protected_layers_are_stored_at_eight_bits() -> None:
    chosen = replace(preset(QJL_PRESET), protect=2)
    widths = [(p.key_bits, p.value_bits, p.name == QJL_PRESET) for p in (chosen.of_layer(i, 6) for i in range(6))]
    assert widths == [(8, 8, False)] * 2 + [(4, 4, True)] * 2 + [(8, 8, False)] * 2
    assert [chosen.of_layer(i, 3).key_bits for i in range(3)] == [8] * 3
    assert [preset("k4v4").of_layer(i, 3) for i in range(3)] == [preset("k4v4")] * 3
    off = replace(preset("off"), protect=1)
    assert off.of_layer(0, 3) is off
