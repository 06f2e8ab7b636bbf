"""The probe's result as plain data: what runs for each kind of layer, why, and what was tried."""

from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal

import mlx.core as mx

from kernels.lanes.base import LaneShape
from kernels.probe.trials import Part

ReasonCode = Literal[
    "no_device",
    "unsupported_shape",
    "does_not_compile",
    "exception",
    "wrong_result",
    "too_slow",
    "missing_device_key",
]
"""Why a candidate or a part of it was rejected. The set is fixed, so that metrics can count it."""


@dataclass(frozen=True, slots=True)
class Check:
    """One check of one candidate."""

    backend: str
    part: Part
    detail: str
    passed: bool
    max_error: float | None = None
    """Relative to the reference's largest value (`encode`: to its norm). None if nothing was computed."""
    microseconds: float | None = None
    """Median time of one evaluation. None if nothing was timed."""
    reason: str | None = None

    @property
    def name(self) -> str:
        return " ".join(word for word in (self.backend, self.part, self.detail) if word)

    @property
    def label(self) -> str:
        """Backend and part, for metrics."""
        return f"{self.backend}_{self.part}"

    def as_json(self) -> dict[str, Any]:
        finite = self.max_error is not None and isfinite(self.max_error)
        return {
            "check": self.name,
            "passed": self.passed,
            "max_error": self.max_error if finite else None,  # JSON has neither NaN nor infinity
            "microseconds": None if self.microseconds is None else round(self.microseconds, 1),
            "reason": self.reason,
        }

    def as_line(self, width: int) -> str:
        """The check for a terminal, its name padded to `width`."""
        error = "" if self.max_error is None else f"error {self.max_error:.1e}"
        time = "" if self.microseconds is None else f"{self.microseconds:,.0f} us"
        passed = "ok" if self.passed else "no"
        return f"{passed}  {self.name:{width}}  {error:13}  {time:>12}  {self.reason or ''}".rstrip()


@dataclass(frozen=True, slots=True)
class Fallback:
    """A candidate or part that `auto` rejected, and what is used instead."""

    source: str
    target: str
    """A backend, `expanded` pages or a profile."""
    code: ReasonCode
    reason: str


@dataclass(frozen=True, slots=True)
class LayerUse:
    """A kind of layer in the model: its shape and the dtype of its keys."""

    shape: LaneShape
    dtype: mx.Dtype

    def __str__(self) -> str:
        s = self.shape
        dims = f"{s.key_dim}" if s.key_dim == s.value_dim else f"{s.key_dim}/{s.value_dim}"
        return f"{s.n_heads}/{s.n_kv_heads} heads x {dims}, {s.widths}, {dtype_name(self.dtype)}"


@dataclass(frozen=True, slots=True)
class LayerVerdict:
    """What layers of one kind use."""

    use: LayerUse
    lanes: str
    """The backend whose lanes they use."""
    expanded: tuple[Part, ...] = ()
    """Attention parts that expand all pages instead."""
    reason: str | None = None
    """Why this is not the first choice in all parts."""

    def as_json(self) -> dict[str, Any]:
        return {"layers": str(self.use), "lanes": self.lanes, "expanded": list(self.expanded), "reason": self.reason}


@dataclass(frozen=True, slots=True)
class Backend:
    """The probe's result: what runs, and why."""

    name: str
    requested: str
    """`auto` or a backend's name."""
    reason: str
    profile: str
    device: str
    checks: tuple[Check, ...] = ()
    fallbacks: tuple[Fallback, ...] = ()
    layers: tuple[LayerVerdict, ...] = ()
    profile_reason: str = ""
    code: str = "first_choice"
    """`named`, `first_choice`, `nothing_to_compress`, or the code of a fallback: a failure's before `no_device`."""

    def verdict(self, use: LayerUse) -> LayerVerdict:
        """What layers of this kind use. Raises KeyError if the kind was not probed."""
        for verdict in self.layers:
            if verdict.use == use:
                return verdict
        raise KeyError(f"{use} was not probed")

    def passed(self) -> dict[str, bool]:
        """By `Check.label`: whether all checks of a backend's part passed."""
        labels = dict.fromkeys(check.label for check in self.checks)
        return {label: all(c.passed for c in self.checks if c.label == label) for label in labels}

    def summary(self) -> dict[str, Any]:
        """What `turbocache probe --json` prints."""
        return {
            "name": self.name,
            "requested": self.requested,
            "reason": self.reason,
            "profile": self.profile,
            "device": self.device,
            "checks": [check.as_json() for check in self.checks],
        }

    def as_text(self) -> str:
        """What `turbocache probe` prints: device, profile, every check, every kind of layer, and the backend."""
        width = max((len(check.name) for check in self.checks), default=0)
        lines = [f"device   {self.device}", f"profile  {self.profile} ({self.profile_reason})", ""]
        lines += [check.as_line(width) for check in self.checks]
        lines += [""] * bool(self.checks)
        for verdict in self.layers:
            parts = f", {' and '.join(verdict.expanded)} over expanded pages" if verdict.expanded else ""
            why = f": {verdict.reason}" if verdict.reason else ""
            lines.append(f"layers   {verdict.use}: {verdict.lanes}{parts}{why}")
        lines += [f"backend  {self.name} (asked for: {self.requested})", f"reason   {self.reason}"]
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """Plain data for `/v1/backend`."""
        return {
            **self.summary(),
            "profile_reason": self.profile_reason,
            "fallbacks": [
                {"from": fallback.source, "to": fallback.target, "code": fallback.code, "reason": fallback.reason}
                for fallback in self.fallbacks
            ],
            "layer_kinds": [verdict.as_json() for verdict in self.layers],
        }


def dtype_name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")
