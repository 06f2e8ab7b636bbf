"""Presets: how many bits keys and values get, and what else is done for quality. `off` stores them as they are.

A half bit is a code for a pair of coordinates (turbocache/codebooks/pair.py).
"""

from dataclasses import dataclass, replace

PROTECTED_BITS = 8


@dataclass(frozen=True, slots=True)
class Preset:
    """A named pair of code widths; both are None for `off`.

    `qjl`: keys have the two-stage code of kernels/lanes/qjl.py; its sign is one of their bits. `condition`: keys are
    centred where their mean dominates (turbocache/cache/conditioning.py). `protect`: this number of layers at either
    end of the model is stored at 8 bits. Raises ValueError for fewer than 0.
    """

    name: str
    key_bits: float | None
    value_bits: float | None
    qjl: bool = False
    condition: bool = True
    protect: int = 0

    def __post_init__(self) -> None:
        if self.protect < 0:
            raise ValueError(f"protect must be 0 or more layers, not {self.protect}")

    def of_layer(self, index: int, n_layers: int) -> "Preset":
        """What layer `index` of a model with `n_layers` gets: this preset, or the protected layers' widths."""
        if not self.compressed or self.protect <= index < n_layers - self.protect:
            return self
        return replace(self, key_bits=PROTECTED_BITS, value_bits=PROTECTED_BITS, qjl=False)

    @property
    def compressed(self) -> bool:
        return self.key_bits is not None


PRESETS = {
    known.name: known
    for known in (
        Preset("off", None, None),
        Preset("k8v8", 8, 8),
        Preset("k8v4", 8, 4),
        Preset("k8v3", 8, 3),
        Preset("k4v4", 4, 4),
        Preset("k4v4_qjl", 4, 4, qjl=True),
        Preset("k4v3", 4, 3),
        Preset("turbo3_5", 3.5, 3.5),
        Preset("k4v2_5", 4, 2.5),
        Preset("turbo3", 3, 3),
        Preset("k3v3", 3, 3),
        Preset("k3_5v2_5", 3.5, 2.5),
        Preset("k4v2", 4, 2),
        Preset("turbo2_5", 2.5, 2.5),
        Preset("k2v2", 2, 2),
    )
}
"""By name, from most bits to fewest. `turbo3` is `k3v3` by the name that its neighbours have."""
DEFAULT_PRESET = "k4v4"


def preset(name: str) -> Preset:
    """The preset of that name. Raises ValueError with the known names."""
    try:
        return PRESETS[name]
    except KeyError:
        raise ValueError(f"unknown cache preset {name!r}; there are {', '.join(PRESETS)}") from None
