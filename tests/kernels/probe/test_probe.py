"""The probe over candidates with faults: the right backend, for the right layers, with the right reason."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest

from kernels.attention.page_tables import PageIndex, RowIndex
from kernels.lanes.base import ChunkInputs, LaneShape, Pair, StepInputs, attend_expanded, store_tokens
from kernels.lanes.expanded import ExpandedAttentionLanes
from kernels.lanes.packed import PackedLanes
from kernels.lanes.reference import ReferenceLanes
from kernels.probe.probe import BackendUnavailable, Candidate, probe
from kernels.probe.trials import LIMITS, Trial, decode_microseconds, steps
from kernels.probe.verdict import Backend, LayerUse
from tests.faulty import (
    FakeFused,
    Fault,
    KeyIsMissing,
    candidate,
    compile_error,
    exception,
    faulty,
    in_dtype,
    nan,
    refusing,
    slow,
    where_timed,
    wrong,
)

SHAPE = LaneShape(4, 2, 64, 32, 4, 4)
OTHER = LaneShape(6, 2, 80, 80, 4, 4)
USE = LayerUse(SHAPE, mx.float16)
GPU = {"architecture": "sm_90", "device_name": "NVIDIA H200", "total_memory": 150 * 10**9}
PACKED = candidate("packed", PackedLanes, fused=False, shared=False, baseline=True)
REFERENCE = candidate("reference", ReferenceLanes, fused=False, automatic=False)
NO_METAL = Candidate("metal", REFERENCE.build, REFERENCE.oracle, ("no_device", "no Metal device"))


def run(lanes: Any, *uses: LayerUse, requested: str = "auto", info: dict[str, Any] | None = None) -> Backend:
    candidates = [NO_METAL, candidate("cuda", lanes), PACKED, REFERENCE]
    return probe(requested, candidates, uses or (USE,), GPU if info is None else info)


def codes(backend: Backend) -> list[tuple[str, str, str]]:
    return [(f.source, f.target, f.code) for f in backend.fallbacks if f.source != "metal"]


def test_a_healthy_candidate_is_chosen_and_everything_was_tried() -> None:
    backend = run(FakeFused)
    assert (backend.name, backend.profile, backend.device) == ("cuda", "cuda", "NVIDIA H200")
    assert (backend.fallbacks, backend.code) == ((), "first_choice")
    assert backend.reason == "first choice; all checks passed"
    assert backend.verdict(USE).expanded == ()
    parts = {check.part for check in backend.checks if check.backend == "cuda"}
    assert parts == {"encode", "expand", "attend", "attend_step", "speed"}
    forms = [check.detail.split(",")[0] for check in backend.checks if check.part == "attend_step"]
    assert forms == list(steps())
    assert backend.passed() == {
        "metal_device": False,
        **{f"cuda_{p}": True for p in ("encode", "expand", "attend", "attend_step", "speed")},
    }
    assert not [check for check in backend.checks if check.backend == "packed"]


def test_by_name_it_says_so() -> None:
    backend = run(FakeFused, requested="cuda")
    assert (backend.name, backend.code, backend.fallbacks) == ("cuda", "named", ())
    assert backend.reason == "asked for by name; all checks passed"


WHOLE: list[tuple[Any, str, str]] = [
    (faulty("encode", compile_error), "does_not_compile", "Unable to build metal library"),
    (faulty("encode", wrong), "wrong_result", "encode differs from the reference by 0.02"),
    (faulty("encode", exception), "exception", "RuntimeError: launch failed"),
    (faulty("expand", wrong), "wrong_result", "expand differs"),
    (faulty("expand", exception), "exception", "launch failed"),
    (faulty("attend_step", where_timed(slow)), "too_slow", "a decode step over 4096 tokens takes"),
    (faulty("attend_step", where_timed(exception)), "exception", "launch failed"),
    (KeyIsMissing, "missing_device_key", "'architecture'"),
    (refusing(SHAPE), "unsupported_shape", "no kernel for head dim 64"),
]


@pytest.mark.parametrize(("lanes", "code", "words"), WHOLE, ids=[f"{i}-{w[1]}" for i, w in enumerate(WHOLE)])
def test_what_breaks_the_pages_or_is_too_slow_takes_the_next_backend(
    lanes: Any, code: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        backend = run(lanes)
    assert (backend.name, backend.profile) == ("packed", "none")
    assert codes(backend) == [("cuda", "packed", code)]
    assert words in backend.reason
    assert "no Metal device" in backend.reason
    verdict = backend.verdict(USE)
    assert verdict.lanes == "packed"
    assert words in (verdict.reason or "")
    assert max(len(f.reason) for f in backend.fallbacks) < 400
    said = [r for r in caplog.records if f"cuda falls back to packed ({code})" in r.getMessage()]
    assert [r.levelname for r in said] == ["WARNING"]
    assert words in said[0].getMessage()
    failed = [check for check in backend.checks if check.backend == "cuda" and not check.passed]
    assert len(failed) == 1
    assert words in (failed[0].reason or "")
    assert all(check.passed for check in backend.checks if check.backend == "packed")


@pytest.mark.parametrize("part", ["attend", "attend_step"])
@pytest.mark.parametrize(
    ("fault", "code"),
    [(wrong, "wrong_result"), (nan, "wrong_result"), (exception, "exception"), (compile_error, "does_not_compile")],
)
def test_attention_that_fails_leaves_the_pages_in_use(part: str, fault: Fault, code: str) -> None:
    backend = run(faulty(part, fault))
    assert (backend.name, backend.profile) == ("cuda", "cuda")
    assert codes(backend) == [("cuda", "expanded", code)]
    verdict = backend.verdict(USE)
    assert (verdict.lanes, verdict.expanded) == ("cuda", (part,))
    assert part in (verdict.reason or "")
    assert backend.passed()["cuda_encode"]
    assert not backend.passed()[f"cuda_{part}"]
    assert backend.passed()["cuda_attend" if part == "attend_step" else "cuda_attend_step"]


def test_one_dtype_that_fails_does_not_disable_the_other() -> None:
    fault = in_dtype(mx.bfloat16, wrong)
    bfloat = LayerUse(SHAPE, mx.bfloat16)
    backend = run(faulty("expand", fault), USE, bfloat, USE)
    assert backend.name == "cuda"
    assert (backend.verdict(USE).lanes, backend.verdict(bfloat).lanes) == ("cuda", "packed")
    assert codes(backend) == [("cuda", "packed", "wrong_result")]
    backend = run(faulty("attend_step", fault), USE, bfloat)
    assert (backend.verdict(USE).expanded, backend.verdict(bfloat).expanded) == ((), ("attend_step",))


def test_one_shape_that_is_refused_does_not_disable_the_others() -> None:
    other = LayerUse(OTHER, mx.float16)
    backend = run(refusing(OTHER), other, USE)
    assert backend.name == "cuda"
    assert (backend.verdict(USE).lanes, backend.verdict(other).lanes) == ("cuda", "packed")
    assert codes(backend) == [("cuda", "packed", "unsupported_shape")]
    assert "head dim 80" in (backend.verdict(other).reason or "")
    assert backend.verdict(USE).reason is None


@pytest.mark.parametrize(
    "lanes", [*(lanes for lanes, _, _ in WHOLE), faulty("attend", wrong), faulty("attend_step", nan)]
)
def test_a_backend_asked_for_by_name_must_pass_everything(lanes: Any) -> None:
    with pytest.raises(BackendUnavailable, match=r"(?s)'cuda' does not work here: cuda.*TURBOCACHE_BACKEND=auto"):
        run(lanes, requested="cuda")


def test_missing_devices_and_unknown_names_are_told() -> None:
    with pytest.raises(BackendUnavailable, match=r"no Metal device.*TURBOCACHE_BACKEND=auto"):
        run(FakeFused, requested="metal")
    with pytest.raises(BackendUnavailable, match="auto, metal, cuda, packed, reference"):
        run(FakeFused, requested="vulkan")


def test_when_nothing_works_for_a_layer_every_reason_is_told() -> None:
    seven = LayerUse(replace(SHAPE, key_bits=7), mx.float16)
    with pytest.raises(BackendUnavailable) as caught:
        run(refusing(seven.shape), USE, seven)
    for words in ("metal: no Metal device", "cuda: no kernel", "packed: MLX's quantised", "TURBOCACHE_KV_PRESET"):
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("info", "profile", "code"),
    [
        ({"device_name": "NVIDIA H200"}, "portable", "missing_device_key"),
        ({"architecture": "sm_70", "device_name": "V100"}, "portable", None),
        (GPU, "cuda", None),
    ],
)
def test_a_device_that_does_not_tell_gets_the_portable_profile(
    info: dict[str, Any], profile: str, code: str | None
) -> None:
    backend = run(FakeFused, info=info)
    assert (backend.name, backend.profile) == ("cuda", profile)
    assert codes(backend) == ([("profile", "portable", code)] if code else [])
    if code:
        assert "'architecture'" in backend.reason
    assert backend.profile_reason


def subtle(change: Callable[[RowIndex], RowIndex], sinks: bool = True, own: bool = True) -> type[FakeFused]:
    """`FakeFused` that misreads where a step's tokens are, or forgets the sinks or the step's own tokens."""

    class Subtle(FakeFused):
        def attend_step(self, step: StepInputs) -> tuple[mx.array, Pair]:
            kept = store_tokens(step.tokens, step.raw, step.rows)
            rows = change(step.rows)
            keys, values = (x[:, :, : rows.n_raw] for x in (kept if own else step.raw))
            extra = step.sinks if sinks else None
            chunk = ChunkInputs(step.queries, (keys, values), step.pages, rows.index, rows.mask, step.scale, extra)
            return attend_expanded(self.expand, chunk), kept

    return Subtle


def changed(**how: Callable[[RowIndex], Any]) -> Callable[[RowIndex], RowIndex]:
    fields = ("tables", "offsets", "first", "n_queries", "keep", "window_slots", "max_size", "pinned", "skip")

    def change(rows: RowIndex) -> RowIndex:
        kept = {name: getattr(rows, name) for name in fields}
        return RowIndex(**kept | {name: make(rows) for name, make in how.items()})

    return change


def never_wraps(rows: RowIndex) -> tuple[int, ...]:
    """Offsets cut where the window's slots begin anew."""
    ends = []
    for offset, first, table in zip(rows.offsets, rows.first, rows.tables, strict=True):
        start = 64 * (first + len(table))
        ends.append(min(offset, rows.keep + start + rows.window_slots - start % rows.window_slots - rows.n_queries))
    return tuple(ends)


SUBTLE: dict[str, tuple[type[FakeFused], set[str]]] = {
    "one token less": (subtle(changed(offsets=lambda r: tuple(o - 1 for o in r.offsets))), {"one row", "no sink"}),
    "one page less": (subtle(changed(tables=lambda r: tuple((*t[:-1], 0) for t in r.tables))), {"one row"}),
    "tables sorted": (subtle(changed(tables=lambda r: tuple(tuple(sorted(t)) for t in r.tables))), {"rotated"}),
    "rows swapped": (subtle(changed(tables=lambda r: r.tables[:1] * len(r.tables))), {"ragged", "several queries"}),
    "never rotates": (subtle(changed(max_size=lambda r: None)), {"rotated"}),
    "ring starts at 0": (subtle(changed(max_size=lambda r: r.max_size and r.max_size + 64)), {"rotated"}),
    "nothing hidden": (subtle(changed(skip=lambda r: ())), {"hidden"}),
    "nothing pinned": (subtle(changed(pinned=lambda r: ())), {"hidden"}),
    "never wraps": (subtle(changed(offsets=never_wraps)), {"wrapped"}),
    "no sinks": (subtle(lambda r: r, sinks=False), {"sinks"}),
    "own tokens too late": (subtle(lambda r: r, own=False), {"one row", "ragged", "wrapped", "several queries"}),
}


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("name", SUBTLE)
def test_every_form_of_a_step_finds_its_own_faults(name: str, dtype: mx.Dtype) -> None:
    """Each fault is far above the limit of even the coarsest dtype, and where it does not matter nothing is found."""
    lanes, forms = SUBTLE[name]
    cuda = candidate("cuda", lanes)
    trial = Trial(cuda.build(SHAPE), cuda.oracle(SHAPE), dtype, shared=True)
    results = {form: run() for part, form, run in trial.parts() if part == "attend_step"}
    for form in forms:
        assert results[form].error > 2.5 * results[form].limit, form
    for form, result in results.items():
        assert result.passed or result.error > 2.5 * result.limit, form
    if name in ("never rotates", "ring starts at 0", "no sinks"):
        assert {form for form, result in results.items() if not result.passed} == forms


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize(
    "shape",
    [SHAPE, OTHER, LaneShape(8, 8, 128, 128, 8, 4), LaneShape(4, 1, 256, 96, 2, 2), LaneShape(6, 2, 192, 128, 3, 8)],
    ids=str,
)
@pytest.mark.parametrize("make", [PACKED, candidate("cuda", FakeFused)], ids=["packed", "fused"])
def test_correct_lanes_stay_far_below_the_limits(make: Candidate, shape: LaneShape, dtype: mx.Dtype) -> None:
    trial = Trial(make.build(shape), make.oracle(shape), dtype, shared=make.shared)
    for part, form, run in trial.parts():
        measured = run()
        assert measured.error <= 0.85 * measured.limit, (part, form, measured)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_a_chunk_that_misses_one_token_or_page_is_found(dtype: mx.Dtype) -> None:
    class OneColumnLess(FakeFused):
        def attend(self, chunk: ChunkInputs) -> mx.array:
            if not isinstance(chunk.mask, mx.array):
                keys, values = chunk.raw
                return super().attend(chunk._replace(raw=(mx.roll(keys, 1, axis=2), mx.roll(values, 1, axis=2))))
            n_keys = chunk.mask.shape[-1]
            return super().attend(chunk._replace(mask=chunk.mask & (mx.arange(n_keys) != n_keys - 1)))

    class OtherPage(FakeFused):
        def attend(self, chunk: ChunkInputs) -> mx.array:
            return super().attend(
                chunk._replace(page_index=PageIndex(tuple((*t[:-1], 4) for t in chunk.page_index.tables)))
            )

    for lanes in (OneColumnLess, OtherPage):
        cuda = candidate("cuda", lanes)
        trial = Trial(cuda.build(SHAPE), cuda.oracle(SHAPE), dtype, shared=True)
        for part, form, run in trial.parts():
            if part == "attend":
                assert run().error > 1.5 * run().limit, (lanes, form)


def test_results_of_a_wrong_form_fail() -> None:
    class Forms(FakeFused):
        def encode(self, keys: Any, values: Any) -> Any:
            return tuple(x[:-1] for x in super().encode(keys, values))

        def attend_step(self, *arguments: Any) -> Any:
            out, raw = super().attend_step(*arguments)
            return out.astype(mx.float32), raw

        def expand(self, pages: Any, dtype: Any) -> Any:
            return tuple(x[:, :1] for x in super().expand(pages, dtype))

    cuda = candidate("cuda", Forms)
    trial = Trial(cuda.build(SHAPE), cuda.oracle(SHAPE), mx.float16, shared=True)
    errors = {f"{part} {form}": run().error for part, form, run in trial.parts() if part != "attend"}
    assert set(errors.values()) == {float("inf")}
    check = run(Forms).checks[1]
    assert check.reason
    assert check.as_json()["max_error"] is None


def test_the_fallback_is_timed_like_the_candidate() -> None:
    packed = PACKED.build(SHAPE)
    assert decode_microseconds(candidate("cuda", FakeFused).build(SHAPE), mx.float32) > 0
    assert 0 < decode_microseconds(packed, mx.float32) < 1e6


@pytest.mark.parametrize("expanded", [("attend",), ("attend_step",), ("attend", "attend_step")])
def test_expanded_attention_lanes_attend_correctly_without_the_failed_parts(expanded: tuple[str, ...]) -> None:
    broken = faulty("attend", nan)
    both = type("Both", (broken,), {"attend_step": faulty("attend_step", nan).attend_step})
    kept = {"attend": "attend_step", "attend_step": "attend"}
    lanes = both if len(expanded) == 2 else faulty(expanded[0], nan)
    cuda = candidate("cuda", lanes)
    expanding = ExpandedAttentionLanes(cuda.build(SHAPE), expanded)
    for part, form, run in Trial(expanding, cuda.oracle(SHAPE), mx.float32, shared=True).parts():
        assert run().passed, (part, form)
    assert expanding.path(5 if "attend" in expanded else None) == "expanded"
    if len(expanded) == 1 and kept[expanded[0]] == "attend_step":
        assert expanding.path(None) == "fused"


def test_the_answer_is_plain_json_of_the_agreed_form() -> None:
    summary = run(faulty("attend_step", wrong)).summary()
    assert list(summary) == ["name", "requested", "reason", "profile", "device", "checks"]
    for check in summary["checks"]:
        assert list(check) == ["check", "passed", "max_error", "microseconds", "reason"]
        assert check["passed"] == (check["reason"] is None)
