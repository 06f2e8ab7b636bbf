"""The harness itself: a correct kernel passes every mode, and each kind of bug is caught by the mode that is for it."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from tests.metal import (
    CompileError,
    DivergedError,
    HarnessError,
    Kernel,
    LaunchError,
    MemoryFaultError,
    Mode,
    OrderError,
    RaceError,
    UnwrittenError,
    capture,
    check,
    emulate,
    run,
    run_orders,
    why_not,
)
from tests.metal.arrays import to_float64, to_numpy

N_ROWS, DIM, SLOTS, START = 3, 96, 40, 38

HEADER = """
template <typename T>
static inline float square(T x) { return float(x) * float(x); }
static inline float total(float x) {
  for (ushort mask = 1; mask < 32; mask *= 2) x += simd_shuffle_xor(x, mask);
  return x;
}
static inline void set(threadgroup float* to, float x) { *to = x; }
"""

# Row r of the ring [SLOTS, DIM] is slot (START + r) % SLOTS; its squares are summed by a threadgroup of three
# simdgroups, and every element is divided by the root of the sum.
SOURCE = """
threadgroup float sums[3];
const uint t = thread_position_in_threadgroup.x, row = threadgroup_position_in_grid.y;
const uint slot = (uint(start[0]) + row) % SLOTS;
const device T* x = ring + slot * ring_shape[1];
const float sum = total(square(x[t]));
if (simd_sum(1) == 32 && thread_index_in_simdgroup == 0) set(sums + simdgroup_index_in_threadgroup, sum);
threadgroup_barrier(mem_flags::mem_threadgroup);
const float4 all = float4(sums[0], sums[1], sums[2], 0.0);
out[row * ring_shape[1] + t] = T(float(x[t]) * rsqrt(all.x + all.y + all.z));
if (t == 0) norms[row] = sqrt(all.x + all.y + all.z);
"""


def normalise(ring: mx.array, start: mx.array, source: str = SOURCE) -> list[mx.array]:
    kernel = mx.fast.metal_kernel(
        name="normalise", input_names=["ring", "start"], output_names=["out", "norms"], source=source, header=HEADER
    )
    return kernel(
        inputs=[ring, start],
        template=[("T", ring.dtype), ("SLOTS", SLOTS)],
        grid=(DIM, N_ROWS, 1),
        threadgroup=(DIM, 1, 1),
        output_shapes=[(N_ROWS, DIM), (N_ROWS,)],
        output_dtypes=[ring.dtype, mx.float32],
    )


def make_inputs(dtype: mx.Dtype = mx.float16) -> list[mx.array]:
    mx.random.seed(3)
    return [mx.random.normal((SLOTS, DIM)).astype(dtype), mx.array([START], dtype=mx.int32)]


@pytest.fixture
def kernel() -> Kernel:
    (made,) = capture(normalise, *make_inputs())
    return made


def need(mode: Mode) -> None:
    if reason := why_not(mode):
        pytest.skip(reason)


def expected(ring: Any) -> tuple[Any, Any]:
    rows = to_float64(to_numpy(ring), str(ring.dtype).removeprefix("mlx.core."))
    rows = rows[(START + np.arange(N_ROWS)) % SLOTS]
    norms = np.sqrt((rows**2).sum(axis=1))
    return rows / norms[:, None], norms


def assert_right(outputs: Sequence[Any], ring: Any, kernel: Kernel) -> None:
    rows, norms = expected(ring)
    np.testing.assert_allclose(to_float64(outputs[0], kernel.outputs[0].dtype), rows, rtol=1e-2, atol=1e-4)
    np.testing.assert_allclose(outputs[1], norms, rtol=1e-6)


def test_capture_tells_what_mlx_would_compile(kernel: Kernel) -> None:
    assert kernel.name.startswith("custom_kernel_normalise_float16_t_40") or "normalise" in kernel.name
    assert [(a.name, a.shape, a.dtype) for a in kernel.inputs] == [
        ("ring", (SLOTS, DIM), "float16"),
        ("start", (1,), "int32"),
    ]
    assert [(a.name, a.shape, a.dtype) for a in kernel.outputs] == [
        ("out", (N_ROWS, DIM), "float16"),
        ("norms", (N_ROWS,), "float32"),
    ]
    assert kernel.grid == (DIM, N_ROWS, 1)
    assert kernel.threadgroup == (DIM, 1, 1)
    assert kernel.template == (("T", "float16_t"), ("SLOTS", "40"))
    assert kernel.shape_infos == ((True, False, False), (False, False, False))
    assert SOURCE in kernel.source
    assert "const constant int32_t* start [[buffer(2)]]" in kernel.source


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32])
def test_a_correct_kernel_is_right_in_every_order(dtype: mx.Dtype) -> None:
    need("plain")
    inputs = make_inputs(dtype)
    (kernel,) = capture(normalise, *inputs)
    check(kernel)
    assert_right(run_orders(kernel, inputs, seeds=(1, 2)), inputs[0], kernel)


@pytest.mark.parametrize("mode", ["asan", "tsan"])
def test_a_correct_kernel_passes_the_sanitizers(mode: Mode, kernel: Kernel) -> None:
    need(mode)
    inputs = make_inputs()
    assert_right(run(kernel, inputs, mode=mode), inputs[0], kernel)


def test_functions_run_on_real_arrays_while_emulated() -> None:
    need("plain")
    inputs = make_inputs(mx.bfloat16)
    with emulate() as launches:
        out, _ = normalise(*inputs)
        doubled = out.astype(mx.float32) * 2
    np.testing.assert_allclose(np.array(doubled) / 2, expected(inputs[0])[0], rtol=1e-2, atol=1e-4)
    assert [kernel.outputs[0].dtype for kernel, _ in launches.by_name("normalise")] == ["bfloat16"]
    with pytest.raises(RuntimeError):
        normalise(*inputs)


def test_inputs_may_keep_their_strides() -> None:
    need("plain")
    add = mx.fast.metal_kernel(
        name="strided",
        input_names=["x"],
        output_names=["out"],
        source="const uint2 p = thread_position_in_grid.xy;\n"
        "out[p.y * x_shape[1] + p.x] = x[p.y * x_strides[0] + p.x * x_strides[1]] + x_ndim;",
        ensure_row_contiguous=False,
    )

    def launch(x: mx.array) -> list[mx.array]:
        return add(inputs=[x], grid=(5, 4, 1), threadgroup=(5, 4, 1), output_shapes=[(4, 5)], output_dtypes=[mx.int32])

    x = np.arange(60, dtype=np.int32).reshape(6, 10)[1:5, ::2]
    (kernel,) = capture(launch, mx.array(x))
    np.testing.assert_array_equal(run(kernel, [x])[0], x + 2)


def test_a_launch_without_threads_is_refused_as_by_devices() -> None:
    need("plain")

    def launch(x: mx.array) -> list[mx.array]:
        fill = mx.fast.metal_kernel(name="fill", input_names=["x"], output_names=["out"], source="out[0] = x[0];")
        return fill(inputs=[x], grid=(0, 1, 1), threadgroup=(4, 1, 1), output_shapes=[(0,)], output_dtypes=[mx.int32])

    with emulate(), pytest.raises(LaunchError, match="no threads"):
        launch(mx.zeros((1,), mx.int32))


def test_an_answer_that_looks_like_the_fill_is_not_unwritten() -> None:
    need("plain")
    minus_one = mx.fast.metal_kernel(
        name="minus", input_names=["x"], output_names=["out"], source="out[thread_position_in_grid.x] = x[0];"
    )

    def launch(x: mx.array) -> list[mx.array]:
        return minus_one(
            inputs=[x], grid=(4, 1, 1), threadgroup=(4, 1, 1), output_shapes=[(4,)], output_dtypes=[mx.int32]
        )

    (kernel,) = capture(launch, mx.array([-1]))
    assert run(kernel, [mx.array([-1])])[0].tolist() == [-1] * 4


# --- seeded bugs ---


def test_an_off_by_one_read_is_caught(kernel: Kernel) -> None:
    need("asan")
    # Only the very last row reads beyond the ring, by one element.
    inputs = [make_inputs()[0], mx.array([SLOTS - N_ROWS], dtype=mx.int32)]
    run(kernel, inputs, mode="asan")
    broken = kernel.patched("total(square(x[t]))", "total(square(x[t + 1]))")
    with pytest.raises(
        MemoryFaultError, match=rf"(?s)input 'ring' of {SLOTS * DIM} elements touched at element {SLOTS * DIM}"
    ):
        run(broken, inputs, mode="asan")


def test_a_read_far_outside_needs_no_sanitizer(kernel: Kernel) -> None:
    need("plain")
    with pytest.raises(MemoryFaultError, match="input 'ring'"):
        run(kernel.patched("% SLOTS;", "% (2 * SLOTS);"), make_inputs())


def test_a_read_past_a_threadgroup_array_is_caught(kernel: Kernel) -> None:
    need("asan")
    with pytest.raises(MemoryFaultError, match=r"kernel\.metal:\d+(.*\n)+.*float4 all"):
        run(kernel.patched("sums[2], 0.0)", "sums[2 + (row >> 1)], 0.0)"), make_inputs(), mode="asan")


def test_a_write_to_an_input_is_caught(kernel: Kernel) -> None:
    need("plain")
    with pytest.raises(MemoryFaultError, match="an input may only be read"):
        run(kernel.patched("const float sum =", "((device T*)x)[t] = T(0); const float sum ="), make_inputs())


def test_a_shift_by_the_whole_width_is_caught(kernel: Kernel) -> None:
    need("asan")
    with pytest.raises(MemoryFaultError, match="shift exponent 32"):
        run(kernel.patched("% SLOTS;", "% SLOTS | (1u << (32u * row)) >> 5;"), make_inputs(), mode="asan")


def test_a_missing_barrier_changes_the_result_in_another_order(kernel: Kernel) -> None:
    need("plain")
    with pytest.raises(OrderError, match="a barrier is missing"):
        run_orders(kernel.patched("threadgroup_barrier(mem_flags::mem_threadgroup);", ""), make_inputs())


@pytest.mark.parametrize(
    "instead", ["", "simdgroup_barrier(mem_flags::mem_threadgroup);", "threadgroup_barrier(mem_flags::mem_none);"]
)
def test_a_missing_or_too_weak_barrier_is_a_race(kernel: Kernel, instead: str) -> None:
    need("tsan")
    with pytest.raises(RaceError, match="data race"):
        run(kernel.patched("threadgroup_barrier(mem_flags::mem_threadgroup);", instead), make_inputs(), mode="tsan")


def test_threadgroups_that_write_the_same_cell_race(kernel: Kernel) -> None:
    need("plain")
    with pytest.raises(OrderError, match="elements of norms"):
        run_orders(kernel.patched("norms[row] =", "norms[2 - row] = norms[row] ="), make_inputs())


def test_a_wrong_ring_start_gives_a_wrong_answer(kernel: Kernel) -> None:
    need("plain")
    inputs = make_inputs()
    with pytest.raises(AssertionError):
        assert_right(run(kernel.patched("(uint(start[0]) + row)", "row"), inputs), inputs[0], kernel)


def test_an_unwritten_cell_is_caught(kernel: Kernel) -> None:
    need("plain")
    with pytest.raises(UnwrittenError, match=r"1 of 3 elements of output norms.*\(2,\)"):
        run(kernel.patched("if (t == 0) norms", "if (t == 0 && row < 2) norms"), make_inputs())


def test_uninitialised_threadgroup_memory_shows(kernel: Kernel) -> None:
    need("plain")
    inputs = make_inputs()
    broken = kernel.patched("thread_index_in_simdgroup == 0)", "thread_index_in_simdgroup == 0 && t > 0)")
    assert np.isnan(run(broken, inputs)[1]).all()


def test_a_simd_operation_in_divergent_code_is_caught(kernel: Kernel) -> None:
    need("plain")
    broken = kernel.patched("const float sum = total(", "float sum = 0; if (t % 32 < 31) sum = simd_sum(")
    with pytest.raises(DivergedError, match=r"simd_sum at line \d+"):
        run(broken, make_inputs())


def test_the_same_operation_at_two_places_is_divergent_code(kernel: Kernel) -> None:
    need("plain")
    broken = kernel.patched(
        "const float sum = total(square(x[t]));",
        "float sum = square(x[t]); if (t & 1) sum = total(sum); else sum = total(sum);",
    )
    with pytest.raises(DivergedError, match="divergent code"):
        run(broken, make_inputs())


def test_a_barrier_that_some_threads_skip_is_caught(kernel: Kernel) -> None:
    need("plain")
    with pytest.raises(DivergedError, match="threads wait for others that never come"):
        run(kernel.patched("threadgroup_barrier(", "if (t < 64) threadgroup_barrier("), make_inputs())


def test_too_much_threadgroup_memory_is_refused(kernel: Kernel) -> None:
    need("plain")
    with pytest.raises(CompileError, match="more than 32768"):
        run(kernel.patched("float sums[3];", "float sums[8193];"), make_inputs())
    check(kernel.patched("float sums[3];", "float sums[8000], more[192];"))
    with pytest.raises(CompileError, match="more than 32768"):
        check(kernel.patched("float sums[3];", "float sums[8000], more[193];"))


def test_a_kernel_that_never_ends_is_stopped(kernel: Kernel) -> None:
    need("plain")
    with pytest.raises(HarnessError, match="not done after"):
        run(
            kernel.patched("const float4 all", "while (start[0] > 0) simd_sum(1); const float4 all"),
            make_inputs(),
            timeout=1,
        )


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("const device T* x = ring", "const device T* x = start", "cannot initialize"),
        ("const device T* x = ring", "const threadgroup T* x = ring", "cannot initialize"),
        ("const device T* x = ring", "const T* x = ring", "pointer without address space"),
        ("const device T* x = ring", "const threadgroup T* x = (const threadgroup T*)ring", "reinterpret_cast"),
        ("threadgroup float* to, float x", "thread float* to, float x", "no matching function"),
        ("threadgroup float* to, float x", "float* to, float x", "pointer without address space"),
        ("threadgroup float sums[3];", "float sums[3];", "no matching function"),
        ("const float sum = total", "const double sum = total", "Metal has no double"),
        ("const float sum = total", "const float sum = std::sqrt(2.0f) * total", "Metal has no std"),
        ("out[row * ring_shape[1] + t] = T(", "out[row * ring_shape[1] + t] = (", None),
        ("const float4 all", "float more[simd_sum(1)]; more[0] = 0; const float4 all", "variable length array"),
    ],
)
def test_what_metal_refuses_is_refused(old: str, new: str, why: str | None, kernel: Kernel) -> None:
    need("plain")
    if why is None:
        check(kernel.patched(old, new))  # float to half is implicit, in Metal too
    else:
        with pytest.raises(CompileError, match=why):
            check(kernel.patched(old, new))


def test_bfloat_comes_only_explicitly() -> None:
    need("plain")
    (kernel,) = capture(normalise, *make_inputs(mx.bfloat16))
    check(kernel)
    with pytest.raises(CompileError, match="bfloat"):
        check(kernel.patched("out[row * ring_shape[1] + t] = T(", "out[row * ring_shape[1] + t] = ("))


def test_threadgroup_memory_belongs_into_the_kernel(kernel: Kernel) -> None:
    need("plain")
    with pytest.raises(CompileError, match="belongs into the kernel function"):
        check(kernel.patched("{ *to = x; }", "{ threadgroup float more[4]; more[0] = x; *to = more[0]; }"))
