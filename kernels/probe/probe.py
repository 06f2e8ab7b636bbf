"""The start-up probe: compare every candidate backend on this machine with the reference, and choose one.

A kernel that compiles may still be wrong. So each candidate encodes, expands and attends over random data, for every
shape and dtype of the loaded model (`kernels.probe.trials`). Each layer shape and part has its own verdict:

- If a candidate refuses a shape, encodes or expands it wrongly or decodes it too slowly, the next candidate takes it.
- If only attention fails, the candidate keeps its pages, and attention expands them first (`kernels.lanes.expanded`).
- Other shapes and dtypes are not affected.

Only `auto` falls back. A backend that is requested by name must pass every check.
"""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx

from kernels.fused.profiles import PROFILES, MissingDeviceKey, choose_profile, missing_key
from kernels.lanes.base import Lanes, LaneShape
from kernels.probe.trials import SLOWEST, SPEED_TOKENS, Measured, Part, Trial, decode_microseconds
from kernels.probe.verdict import Backend, Check, Fallback, LayerUse, LayerVerdict, ReasonCode

log = logging.getLogger(__name__)

_COMPILER = re.compile(r"compil|build metal library|nvrtc|load kernel", re.IGNORECASE)
_LONGEST_REASON = 300
_EXPECTED = ("no_device",)


class BackendUnavailable(RuntimeError):
    """The requested backend, or every backend, does not work here. The message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A backend that the probe may try."""

    name: str
    build: Callable[[LaneShape], Lanes]
    """Makes its lanes."""
    oracle: Callable[[LaneShape], Lanes]
    """Makes reference lanes on the same codebook."""
    missing: tuple[ReasonCode, str] | None = None
    """Why it can't be tried, or how it failed after its checks."""
    unsupported: Callable[[LaneShape], str | None] = lambda shape: None
    automatic: bool = True
    """`auto` may choose it."""
    baseline: bool = False
    """Fused candidates are timed against it."""
    fused: bool = False
    """It has kernels of its own, so it gets a profile and is timed."""
    shared: bool = False
    """Its pages have the reference's bytes."""


class _Failed(Exception):
    def __init__(self, code: ReasonCode, reason: str) -> None:
        super().__init__(reason)
        self.code: ReasonCode = code


def probe(
    requested: str, candidates: Sequence[Candidate], uses: Sequence[LayerUse], info: Mapping[str, object] | None = None
) -> Backend:
    """Choose a backend for the model's kinds of layers, on the device that `info` describes.

    `requested` is `auto` or a candidate's name. Raises BackendUnavailable if the named candidate fails any check, or if
    nothing works for some layer. The message has every reason.
    """
    chosen = [c for c in candidates if (c.automatic if requested == "auto" else c.name == requested)]
    if not chosen:
        names = ", ".join(c.name for c in candidates)
        raise BackendUnavailable(f"unknown backend {requested!r}; there are auto, {names}")
    run = _Probe(requested, candidates, chosen)
    return run.answer([run.judge(use) for use in dict.fromkeys(uses)], mx.device_info() if info is None else info)


class _Probe:
    """One run of the probe, with the checks and failures so far."""

    def __init__(self, requested: str, known: Sequence[Candidate], chosen: Sequence[Candidate]) -> None:
        self._requested = requested
        self._known = known
        self._checks: list[Check] = []
        self._fallbacks: list[Fallback] = []
        self._missing = [(c.name, c.missing) for c in chosen if c.missing]
        self._able = [c for c in chosen if not c.missing]
        for name, (code, reason) in self._missing:
            part: Part = "device" if code == "no_device" else "answer"
            self._checks.append(Check(name, part, "", False, reason=reason))
        if not self._able:
            raise self._unavailable([f"{name}: {reason}" for name, (_, reason) in self._missing])

    def judge(self, use: LayerUse) -> LayerVerdict:
        """The first candidate that can serve this kind of layer, and which of its attention parts pass."""
        refused: list[tuple[str, _Failed]] = []
        for candidate in self._able:
            try:
                failed = self._try(candidate, use)
            except _Failed as failure:
                refused.append((candidate.name, failure))
                continue
            reasons = [f"{name}: {failure}" for name, failure in refused]
            reasons += [f"{candidate.name} {part}: {failure}" for part, failure in failed.items()]
            if reasons and self._requested != "auto":
                raise self._unavailable(reasons)
            self._fallbacks += [Fallback(name, candidate.name, f.code, str(f)) for name, f in refused]
            self._fallbacks += [Fallback(candidate.name, "expanded", f.code, str(f)) for f in failed.values()]
            return LayerVerdict(use, candidate.name, tuple(failed), "; ".join(reasons) or None)
        reasons = [f"{name}: {reason}" for name, (_, reason) in self._missing]
        raise self._unavailable([*reasons, *(f"{name}: {failure}" for name, failure in refused)])

    def answer(self, verdicts: Sequence[LayerVerdict], info: Mapping[str, object]) -> Backend:
        used = {verdict.lanes for verdict in verdicts}
        backend = next((c for c in self._able if c.name in used), self._able[0])
        fallbacks = [Fallback(name, backend.name, code, reason) for name, (code, reason) in self._missing]
        if backend.fused:  # a machine has one kind of device, so the others are not fallbacks
            fallbacks = [fallback for fallback in fallbacks if fallback.code != "no_device"]
        fallbacks += self._fallbacks
        profile, profile_reason = PROFILES["none"], "no kernels of our own run"
        if backend.fused:
            profile, profile_reason = choose_profile(info)
            if missing_key(info) is not None:
                fallbacks.append(Fallback("profile", profile.name, "missing_device_key", profile_reason))
        for fallback in fallbacks:
            level = logging.INFO if fallback.code in _EXPECTED else logging.WARNING
            words = fallback.source, fallback.target, fallback.code, fallback.reason
            log.log(level, "probe: %s falls back to %s (%s): %s", *words)
        named = self._requested != "auto"
        passed_over = dict.fromkeys(f"{fallback.source}: {fallback.reason}" for fallback in fallbacks)
        reason = "asked for by name" if named else "first choice"
        return Backend(
            name=backend.name,
            requested=self._requested,
            reason="; ".join(passed_over) or f"{reason}; all checks passed",
            profile=profile.name,
            device=str(info.get("device_name") or info.get("architecture") or "unknown device"),
            checks=tuple(self._checks),
            fallbacks=tuple(fallbacks),
            layers=tuple(verdicts),
            profile_reason=profile_reason,
            code="named" if named else self._code(fallbacks),
        )

    @staticmethod
    def _code(fallbacks: Sequence[Fallback]) -> str:
        codes = [fallback.code for fallback in fallbacks]
        return next((code for code in codes if code not in _EXPECTED), codes[0] if codes else "first_choice")

    def _try(self, candidate: Candidate, use: LayerUse) -> dict[Part, _Failed]:
        """Run all checks for one kind of layer. Returns the attention parts that failed. Raises _Failed for others."""
        refusal = candidate.unsupported(use.shape)
        if refusal:
            raise self._note(candidate, "shape", use, _Failed("unsupported_shape", refusal))
        try:
            lanes = candidate.build(use.shape)
            trial = Trial(lanes, candidate.oracle(use.shape), use.dtype, shared=candidate.shared)
        except ValueError as error:
            raise self._note(candidate, "shape", use, _Failed("unsupported_shape", str(error))) from error
        except Exception as error:  # any exception here is the candidate's failure, not the server's
            raise self._note(candidate, "shape", use, _Failed(*reason_of(error))) from error
        failed: dict[Part, _Failed] = {}
        for part, form, run in trial.parts():
            if part in failed:
                continue
            try:
                self._check(candidate, part, f"{form}, {use}" if form else str(use), run)
            except _Failed as failure:
                if part not in ("attend", "attend_step"):
                    raise
                failed[part] = failure
        if candidate.fused and "attend_step" not in failed:
            self._time(candidate, lanes, use)
        return failed

    def _check(self, candidate: Candidate, part: Part, detail: str, run: Callable[[], Measured]) -> None:
        try:
            measured = run()
        except Exception as error:
            failure = _Failed(*reason_of(error))
            self._checks.append(Check(candidate.name, part, detail, False, reason=str(failure)))
            raise failure from error
        reason = None
        if not measured.passed:
            reason = f"{part} differs from the reference by {measured.error:.2g} (allowed {measured.limit:g}): {detail}"
        self._checks.append(
            Check(candidate.name, part, detail, measured.passed, measured.error, measured.microseconds, reason)
        )
        if reason:
            raise _Failed("wrong_result", reason)

    def _time(self, candidate: Candidate, lanes: Lanes, use: LayerUse) -> None:
        """Time the decode step against the baseline's. Raises _Failed if it is too slow."""
        baseline = next((c for c in self._known if c.baseline), None)
        if baseline is None or baseline.missing or baseline.unsupported(use.shape):
            return
        try:
            own = decode_microseconds(lanes, use.dtype)
        except Exception as error:
            raise self._note(candidate, "speed", use, _Failed(*reason_of(error))) from error
        baseline_time = decode_microseconds(baseline.build(use.shape), use.dtype)
        reason = None
        if own > SLOWEST * baseline_time:
            reason = (
                f"a decode step over {SPEED_TOKENS} tokens takes {own:.0f} us, over {SLOWEST:g} times the "
                f"{baseline_time:.0f} us of {baseline.name}: {use}"
            )
        self._checks.append(Check(candidate.name, "speed", str(use), reason is None, None, own, reason))
        if reason:
            raise _Failed("too_slow", reason)

    def _note(self, candidate: Candidate, part: Part, use: LayerUse, failure: _Failed) -> _Failed:
        self._checks.append(Check(candidate.name, part, str(use), False, reason=str(failure)))
        return failure

    def _unavailable(self, reasons: Sequence[str]) -> BackendUnavailable:
        what = f"backend {self._requested!r} does not work here: {'; '.join(dict.fromkeys(reasons))}."
        if self._requested == "auto":
            return BackendUnavailable(f"{what} Set TURBOCACHE_KV_PRESET to another preset, or off.")
        return BackendUnavailable(f"{what} Set TURBOCACHE_BACKEND=auto to let the probe choose.")


def reason_of(error: Exception) -> tuple[ReasonCode, str]:
    """The code and the one-line text of an exception that a backend raised."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    if len(text) > _LONGEST_REASON:  # compilers print whole sources
        text = f"{text[:_LONGEST_REASON]}..."
    if isinstance(error, MissingDeviceKey):
        return "missing_device_key", text
    if isinstance(error, FloatingPointError):
        return "wrong_result", text
    if isinstance(error, RuntimeError) and _COMPILER.search(str(error)):
        return "does_not_compile", text
    return "exception", text
