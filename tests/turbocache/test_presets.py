import pytest

from turbocache.presets import DEFAULT_PRESET, PRESETS, preset


def test_presets() -> None:
    assert DEFAULT_PRESET in PRESETS
    assert not PRESETS["off"].compressed
    for name, known in PRESETS.items():
        assert preset(name) is known
        if name != "off":
            assert name == f"k{known.key_bits}v{known.value_bits}"
    with pytest.raises(ValueError, match="unknown cache preset 'k9v9'; there are off, k8v8"):
        preset("k9v9")
