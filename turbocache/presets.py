"""Presets: how many bits keys and values get. `off` stores them as they are."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Preset:
    """A named pair of code widths; both are None for `off`."""

    name: str
    key_bits: int | None
    value_bits: int | None

    @property
    def compressed(self) -> bool:
        return self.key_bits is not None


_PAIRS = ((8, 8), (8, 4), (8, 3), (4, 4), (4, 3), (4, 2), (3, 3), (2, 2))
PRESETS = {"off": Preset("off", None, None)} | {
    f"k{keys}v{values}": Preset(f"k{keys}v{values}", keys, values) for keys, values in _PAIRS
}
DEFAULT_PRESET = "k4v4"


def preset(name: str) -> Preset:
    """The preset of that name. Raises ValueError with the known names."""
    try:
        return PRESETS[name]
    except KeyError:
        raise ValueError(f"unknown cache preset {name!r}; there are {', '.join(PRESETS)}") from None
