"""The start-up probe: run every candidate backend on this machine against the reference and choose one.

Building a kernel proves nothing, so each candidate encodes, expands and attends over random data in every shape that
the loaded model needs; a candidate that raises or differs is passed over with its reason. `auto` tries the candidates
in order; a backend asked for by name that fails is an error.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

import mlx.core as mx

from kernels.lanes import Lanes, LaneShape, PageIndex, attend_expanded
from kernels.layout import PAGE

T = TypeVar("T")

log = logging.getLogger(__name__)

MAX_RELATIVE_ERROR = 2e-3
"""Largest |candidate - reference| / max |reference| that a check allows; float32 lanes reach 1e-5, bfloat16 1e-3."""

ReasonCode = Literal["no_device", "not_in_this_version", "unsupported_shape", "exception", "wrong_result"]
"""Why a backend was passed over, from a fixed set, so that metrics can count it."""


class BackendUnavailable(RuntimeError):
    """A backend asked for by name does not work here; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Check:
    """One test of one candidate. `max_error` is relative to the reference's largest value, `microseconds` the median
    time of one evaluation; both None where the check did not get that far.
    """

    check: str
    passed: bool
    max_error: float | None = None
    microseconds: float | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Fallback:
    """A backend that `auto` passed over."""

    source: str
    target: str
    code: ReasonCode
    reason: str


@dataclass(frozen=True, slots=True)
class Backend:
    """The probe's answer: what runs, what was asked for, why, and everything that was tried."""

    name: str
    requested: str
    reason: str
    profile: str
    device: str
    checks: tuple[Check, ...] = ()
    fallbacks: tuple[Fallback, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Plain data for `/v1/backend` and `turbocache probe --json`."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A backend that could run. `missing` says why it can't be tried at all, with its code; `build` and `oracle` make
    its lanes and reference lanes on the same codebook.
    """

    name: str
    build: Callable[[LaneShape], Lanes]
    oracle: Callable[[LaneShape], Lanes]
    missing: tuple[ReasonCode, str] | None = None


class _Failed(Exception):
    def __init__(self, code: ReasonCode, reason: str) -> None:
        super().__init__(reason)
        self.code: ReasonCode = code


def device_name() -> str:
    """The default device as MLX names it."""
    info = mx.device_info()
    return str(info.get("device_name") or info.get("architecture") or "unknown device")


def probe(requested: str, candidates: Sequence[Candidate], shapes: Sequence[LaneShape]) -> Backend:
    """Choose a backend for the shapes that the model needs.

    `requested` is `auto` or a candidate's name; `auto` never takes the reference. Raises BackendUnavailable when the
    named one fails or when nothing works, with every reason in the message.
    """
    chosen = [c for c in candidates if (c.name != "reference" if requested == "auto" else c.name == requested)]
    if not chosen:
        raise BackendUnavailable(
            f"unknown backend {requested!r}; there are auto, {', '.join(c.name for c in candidates)}"
        )
    checks: list[Check] = []
    passed_over: list[tuple[str, ReasonCode, str]] = []
    for candidate in chosen:
        try:
            checks.extend(_try(candidate, shapes))
        except _Failed as failure:
            checks.append(Check(candidate.name, False, reason=str(failure)))
            passed_over.append((candidate.name, failure.code, str(failure)))
            log.info("backend %s passed over: %s", candidate.name, failure)
            continue
        return Backend(
            name=candidate.name,
            requested=requested,
            reason=_reason(requested, passed_over),
            profile="none",
            device=device_name(),
            checks=tuple(checks),
            fallbacks=tuple(Fallback(name, candidate.name, code, why) for name, code, why in passed_over),
        )
    reasons = "; ".join(f"{name}: {why}" for name, _, why in passed_over)
    advice = "" if requested == "auto" else " Set TURBOCACHE_BACKEND=auto to let the probe choose."
    raise BackendUnavailable(f"backend {requested!r} does not work here: {reasons}.{advice}")


def _reason(requested: str, passed_over: Sequence[tuple[str, ReasonCode, str]]) -> str:
    if requested != "auto":
        return "asked for by name; all checks passed"
    if not passed_over:
        return "first choice; all checks passed"
    return "; ".join(f"{name}: {why}" for name, _, why in passed_over)


def _try(candidate: Candidate, shapes: Sequence[LaneShape]) -> list[Check]:
    if candidate.missing:
        raise _Failed(*candidate.missing)
    checks = []
    for shape in dict.fromkeys(shapes):
        try:
            lanes, oracle = candidate.build(shape), candidate.oracle(shape)
        except ValueError as error:
            raise _Failed("unsupported_shape", str(error)) from error
        try:
            checks.extend(_check(candidate.name, lanes, oracle))
        except _Failed:
            raise
        except Exception as error:  # whatever a device throws is this candidate's failure, not the server's
            raise _Failed("exception", f"{type(error).__name__}: {error}") from error
    return checks


def _check(name: str, lanes: Lanes, oracle: Lanes) -> list[Check]:
    """Encode, expand and attend over a ragged batch with a masked tail, against the oracle's plain operations."""
    shape = lanes.shape
    key = mx.random.key(7)
    keys = mx.random.normal((4, shape.n_kv_heads, PAGE, shape.key_dim), key=key)
    values = mx.random.normal((4, shape.n_kv_heads, PAGE, shape.value_dim), key=mx.random.key(8))
    pages, encode_time = _timed(lambda: lanes.encode(keys, values))
    expected = oracle.expand(oracle.encode(keys, values), mx.float32)
    expanded, expand_time = _timed(lambda: lanes.expand(pages, mx.float32))
    error = max(_error(got, want) for got, want in zip(expanded, expected, strict=True))
    label = f"{name} {_describe(shape)}"
    results = [
        _verdict(f"{label} encode", error, encode_time),
        _verdict(f"{label} expand", error, expand_time),
    ]

    index = PageIndex(((0, 2, 1), (3,)))
    n_raw, scale = PAGE, shape.key_dim**-0.5
    queries = mx.random.normal((2, shape.n_heads, 1, shape.key_dim), key=mx.random.key(9))
    raw_keys = mx.random.normal((2, shape.n_kv_heads, n_raw, shape.key_dim), key=mx.random.key(10))
    raw_values = mx.random.normal((2, shape.n_kv_heads, n_raw, shape.value_dim), key=mx.random.key(11))
    columns = mx.arange(3 * PAGE + n_raw)
    visible = mx.stack([columns >= 5, (columns < PAGE) | (columns >= 3 * PAGE)])[:, None, None, :]
    got, attend_time = _timed(lambda: lanes.attend(queries, raw_keys, raw_values, pages, index, visible, scale, None))
    want = attend_expanded(lanes.expand, queries, raw_keys, raw_values, pages, index, visible, scale, None)
    results.append(_verdict(f"{label} attend", _error(got, want), attend_time))
    return results


def _verdict(check: str, error: float, microseconds: float) -> Check:
    if not error <= MAX_RELATIVE_ERROR:  # NaN fails too
        raise _Failed(
            "wrong_result", f"{check} differs from the reference by {error:.2g} (allowed {MAX_RELATIVE_ERROR})"
        )
    return Check(check, True, error, microseconds)


def _error(got: mx.array, want: mx.array) -> float:
    return float(mx.abs(got.astype(mx.float32) - want).max() / mx.abs(want).max())


def _timed(run: Callable[[], T], repeats: int = 3) -> tuple[T, float]:
    mx.eval(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = run()
        mx.eval(result)
        times.append(time.perf_counter() - start)
    return result, sorted(times)[repeats // 2] * 1e6


def _describe(shape: LaneShape) -> str:
    dims = f"{shape.key_dim}" if shape.key_dim == shape.value_dim else f"{shape.key_dim}/{shape.value_dim}"
    return f"{shape.n_heads}/{shape.n_kv_heads} heads x {dims}, k{shape.key_bits:g}v{shape.value_bits:g}"
