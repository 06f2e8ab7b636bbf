"""Presets: the bits of keys and values, and other measures for quality. `off` stores them as they are.

A half bit means one code for a pair of coordinates (turbocache/codebooks/pair.py).
"""

import re
from dataclasses import dataclass, replace

PROTECTED_BITS = 8
DEFAULT_PRESET = "k6v4"
QJL_PRESET = "k4v4_qjl"
"""Keys have the two-stage code of kernels/lanes/qjl.py. For comparisons, on the reference backend only."""


@dataclass(frozen=True, slots=True)
class Preset:
    """A named pair of code widths. Raises ValueError for a negative `protect`."""

    name: str
    key_bits: float | None
    """None in the preset `off`."""
    value_bits: float | None
    condition: bool = True
    """Centre keys where their mean dominates (turbocache/cache/conditioning.py)."""
    protect: int = 0
    """This number of layers at each end of the model is stored at 8 bits."""

    def __post_init__(self) -> None:
        if self.protect < 0:
            raise ValueError(f"protect must be 0 or more layers, not {self.protect}")

    def of_layer(self, index: int, n_layers: int) -> "Preset":
        """The preset of layer `index` of `n_layers`: this one, or the protected layers' widths."""
        if not self.compressed or self.protect <= index < n_layers - self.protect:
            return self
        return replace(self, name="protected", key_bits=PROTECTED_BITS, value_bits=PROTECTED_BITS)

    @property
    def compressed(self) -> bool:
        return self.key_bits is not None


def _from_name(name: str) -> Preset:
    """`k4v2_5` has 4 and 2.5 bits, `turbo3_5` has 3.5 bits for both."""
    widths = [float(digits.replace("_", ".")) for digits in re.findall(r"\d(?:_5)?", name)]
    key_bits, value_bits = (int(bits) if bits.is_integer() else bits for bits in (widths[0], widths[-1]))
    return Preset(name, key_bits, value_bits)


_NAMES = (
    *("k8v8", "k8v4", "k8v3", "k6v4", "k5v4", "k4v4", QJL_PRESET, "k4v3", "turbo3_5", "k4v2_5"),
    *("turbo3", "k3v3", "k3_5v2_5", "k4v2", "turbo2_5", "k3v2", "k2v2"),
)
PRESETS = {"off": Preset("off", None, None), **{name: _from_name(name) for name in _NAMES}}
"""By name, from most bits to fewest. `turbo3` and `k3v3` are the same."""


def preset(name: str) -> Preset:
    """The preset of that name. Raises ValueError with the known names."""
    try:
        return PRESETS[name]
    except KeyError:
        raise ValueError(f"unknown cache preset {name!r}; there are {', '.join(PRESETS)}") from None
