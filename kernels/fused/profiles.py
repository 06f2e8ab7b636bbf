"""Device profiles: how the fused kernels divide their work, chosen from `mx.device_info()`.

A device reports its architecture (Metal `applegpu_g16s`, CUDA `sm_90`, a CPU `x86_64`) and its memory, but not its
number of cores. So the table is coarse. A wrong row costs speed, never correctness.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

ProfileName = Literal["portable", "wide", "sustained", "mac", "cuda", "none"]
T = TypeVar("T", int, str)

WIDE_BYTES = 40 * 2**30
"""An Apple chip with an `s` is a Pro or a Max. It counts as a Max if Metal's recommended working set has this size.
That is about three quarters of the memory: a Pro with 48 GB is below, a Max with 64 GB above.
"""

OLDEST_CUDA = 80
"""Lowest compute capability (times 10) of the `cuda` row: half-precision matrix units, `cp.async`."""


@dataclass(frozen=True, slots=True)
class Profile:
    """Geometry of the attention over pages."""

    name: ProfileName
    threadgroups: int
    """About this number of threadgroups fills the device."""
    min_pages: int
    """A split reads at least this number of pages."""
    max_splits: int
    """Most splits of one row."""

    def splits(self, n_pages: int, n_groups: int, n_raw: int = 0) -> int:
        """Number of splits, at least 1, for rows of up to `n_pages` pages and `n_raw` blocks of raw tokens.

        `n_groups` is the number of threadgroups without splitting (rows times KV heads). The splits fill the device at
        most once.
        """
        wanted = n_raw + -(-n_pages // max(1, self.min_pages))
        return max(1, min(wanted, self.threadgroups // max(1, n_groups), self.max_splits))


PROFILES: dict[ProfileName, Profile] = {
    # No fused kernels run.
    "none": Profile("none", threadgroups=0, min_pages=0, max_splits=1),
    # For unknown devices: small threadgroups fit everywhere, and splits of 512 tokens merge cheaply.
    "portable": Profile("portable", threadgroups=64, min_pages=8, max_splits=32),
    # Apple's base chips, 7 to 10 cores: a few threadgroups fill them.
    "mac": Profile("mac", threadgroups=80, min_pages=8, max_splits=32),
    # Pro chips, 14 to 20 cores, and the smaller Max ones.
    "sustained": Profile("sustained", threadgroups=160, min_pages=4, max_splits=64),
    # Max and Ultra, 24 to 80 cores.
    "wide": Profile("wide", threadgroups=320, min_pages=4, max_splits=128),
    # Three threadgroups for each of about 132 multiprocessors (measured on one H200: two are slower).
    "cuda": Profile("cuda", threadgroups=396, min_pages=4, max_splits=128),
}
"""The Apple rows are estimates from core counts. None of them was measured on Apple hardware."""


class MissingDeviceKey(LookupError):
    """The device does not report a value that a choice needs. The message names the key."""


def device_value(info: Mapping[str, object], key: str, kind: type[T]) -> T:
    """`info[key]` of this type. Raises MissingDeviceKey if it is absent or has another type."""
    value = info.get(key)
    if not isinstance(value, kind):
        raise MissingDeviceKey(f"the device's info has no {key!r} (it has {', '.join(sorted(info)) or 'nothing'})")
    return value


def choose_profile(info: Mapping[str, object]) -> tuple[Profile, str]:
    """The profile for the device that `mx.device_info()` describes, and the reason.

    A CPU gets `none`. An unknown chip, or a device that does not report what the choice needs, gets `portable`.
    """
    try:
        return _choose(info)
    except MissingDeviceKey as error:
        return PROFILES["portable"], f"{error}: the geometry that suits any"


def missing_key(info: Mapping[str, object]) -> str | None:
    """Why the choice lacks a value that the device does not report, or None."""
    try:
        _choose(info)
    except MissingDeviceKey as error:
        return str(error)
    return None


def _choose(info: Mapping[str, object]) -> tuple[Profile, str]:
    architecture = device_value(info, "architecture", str)
    if apple := re.fullmatch(r"applegpu_g(\d+)([a-z])", architecture.lower()):
        return _apple(architecture, apple[2], info)
    if cuda := re.fullmatch(r"sm_(\d+)[a-z]?", architecture.lower()):
        if int(cuda[1]) >= OLDEST_CUDA:
            return PROFILES["cuda"], f"{architecture} is an NVIDIA GPU of compute capability 8.0 or later"
        return PROFILES["portable"], f"{architecture} is an NVIDIA GPU older than compute capability 8.0"
    if re.fullmatch(r"x86_64|amd64|i\d86|arm64\w*|aarch64\w*|armv\d\w*|riscv\w*|ppc64\w*|s390x", architecture.lower()):
        return PROFILES["none"], f"{architecture} is a CPU, which runs no kernels of our own"
    return PROFILES["portable"], f"unknown chip {architecture!r}: the geometry that suits any"


def _apple(architecture: str, letter: str, info: Mapping[str, object]) -> tuple[Profile, str]:
    """By the last letter of Metal's name: p phone, g base, s Pro and Max, d Ultra."""
    if letter == "g":
        return PROFILES["mac"], f"{architecture} is a base Apple chip"
    if letter == "d":
        return PROFILES["wide"], f"{architecture} is an Ultra"
    if letter == "s":
        working_set = device_value(info, "max_recommended_working_set_size", int)
        size = f"a working set of {working_set / 2**30:.0f} GiB"
        if working_set >= WIDE_BYTES:
            return PROFILES["wide"], f"{architecture} with {size} counts as a Max"
        return PROFILES["sustained"], f"{architecture} with {size} counts as a Pro"
    if letter == "p":
        return PROFILES["portable"], f"{architecture} is a phone's chip"
    return PROFILES["portable"], f"unknown Apple chip {architecture!r}: the geometry that suits any"
