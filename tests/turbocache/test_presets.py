import pytest

from turbocache.presets import DEFAULT_PRESET, PRESETS, preset


def test_presets() -> None:
    assert DEFAULT_PRESET in PRESETS
    assert not PRESETS["off"].compressed
    for name, known in PRESETS.items():
        assert preset(name) is known
        assert known.name == name
        if name.startswith("k"):
            assert name == f"k{known.key_bits:g}v{known.value_bits:g}".replace(".", "_")
        elif name != "off":
            assert known.key_bits == known.value_bits
            assert name == f"turbo{known.key_bits:g}".replace(".", "_")
    with pytest.raises(ValueError, match="unknown cache preset 'k9v9'; there are off, k8v8"):
        preset("k9v9")
