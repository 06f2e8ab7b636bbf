"""The same body as CUDA: MLX's text put together here, run through the CUDA shim, and compiled by NVRTC."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from tests.metal import (
    CompileError,
    DivergedError,
    Kernel,
    MemoryFaultError,
    Mode,
    OrderError,
    RaceError,
    run,
    run_orders,
    why_not,
)
from tests.metal.cuda_text import cuda_kernel
from tests.metal.nvrtc import ARCHITECTURES, compile_cuda, has_nvrtc

N, BLOCK = 200, 64

HEADER = """
#define threadgroup __shared__
template <typename T>
__device__ float half_of(T x) { return float(x) * 0.5f; }
#if defined(__CUDA_ARCH__)
__device__ unsigned low_byte(unsigned x) {
  unsigned out;
  asm("and.b32 %0, %1, 255;" : "=r"(out) : "r"(x));
  return out;
}
#else
__device__ unsigned low_byte(unsigned x) { return x & 255u; }
#endif
"""

# The block's elements in reverse, halved, and their sum over each warp. CUDA runs whole blocks, so the edge is guarded.
SOURCE = """
threadgroup float kept[BLOCK];
const unsigned t = threadIdx.x, i = blockIdx.x * blockDim.x + t;
const unsigned n = x_shape[0];
kept[t] = i < n ? half_of(x[i]) : 0.0f;
__syncthreads();
float sum = kept[BLOCK - 1 - t];
if (i < n) out[i] = T(sum);
for (int mask = 16; mask > 0; mask >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
if (t % 32 == 0) sums[low_byte(i / 32)] = sum;
"""


def make_input(dtype: mx.Dtype = mx.float16) -> mx.array:
    mx.random.seed(5)
    return mx.random.normal((N,)).astype(dtype)


def make_kernel(dtype: mx.Dtype = mx.float16) -> Kernel:
    return cuda_kernel(
        name="reverse",
        input_names=["x"],
        output_names=["out", "sums"],
        source=SOURCE,
        header=HEADER,
        inputs=[make_input(dtype)],
        template=[("T", dtype), ("BLOCK", BLOCK), ("SPARE", True)],
        grid=(N, 1, 1),
        threadgroup=(BLOCK, 1, 1),
        output_shapes=[(N,), (8,)],
        output_dtypes=[dtype, mx.float32],
    )


@pytest.fixture
def kernel() -> Kernel:
    return make_kernel()


def need(mode: Mode) -> None:
    if reason := why_not(mode):
        pytest.skip(reason)


def assert_right(outputs: Sequence[Any], x: mx.array) -> None:
    padded = np.zeros(256)
    padded[:N] = np.array(x.astype(mx.float32)) / 2
    reverse = padded.reshape(4, BLOCK)[:, ::-1].reshape(-1)
    np.testing.assert_allclose(outputs[0].astype(np.float64), reverse[:N], rtol=1e-3)
    np.testing.assert_allclose(outputs[1], reverse.reshape(8, 32).sum(axis=1), rtol=1e-5)


def test_the_text_has_mlx_names_and_types(kernel: Kernel) -> None:
    assert kernel.name == "custom_kernel_reverse_float16_t_64_t"
    for part in (
        "__global__ void custom_kernel_reverse_float16_t_64_t(\n    const __half* x,\n",
        "    const __grid_constant__ Shape x_shape,\n    __half* out,\n    float* sums) {\n",
        "  using T = __half;\n  constexpr int BLOCK = 64;\n  constexpr bool SPARE = true;\n",
    ):
        assert part in kernel.source


def test_a_correct_kernel_is_right_in_every_order(kernel: Kernel) -> None:
    need("plain")
    assert_right(run_orders(kernel, [make_input()]), make_input())


@pytest.mark.parametrize("mode", ["asan", "tsan"])
def test_a_correct_kernel_passes_the_sanitizers(mode: Mode, kernel: Kernel) -> None:
    need(mode)
    assert_right(run(kernel, [make_input()], mode=mode), make_input())


def test_a_missing_edge_guard_is_caught(kernel: Kernel) -> None:
    need("asan")
    with pytest.raises(MemoryFaultError, match=f"input 'x' of {N} elements touched at element {N}\n"):
        run(kernel.patched("i < n ? half_of(x[i]) : 0.0f", "half_of(x[i])"), [make_input()], mode="asan")


def test_a_missing_barrier_is_caught(kernel: Kernel) -> None:
    need("plain")
    broken = kernel.patched("__syncthreads();", "__syncwarp();")
    with pytest.raises(OrderError):
        run_orders(broken, [make_input()])
    need("tsan")
    with pytest.raises(RaceError, match="data race"):
        run(broken, [make_input()], mode="tsan")


def test_a_shuffle_in_divergent_code_is_caught(kernel: Kernel) -> None:
    need("plain")
    with pytest.raises(DivergedError, match="__shfl_xor_sync"):
        run(kernel.patched("mask >>= 1) sum", "mask >>= 1) if (i < n) sum"), [make_input()])
    with pytest.raises(DivergedError, match="mask of some lanes"):
        run(kernel.patched("0xffffffffu, sum", "t < 7 ? 0xffu : 0xffffffffu, sum"), [make_input()])


@pytest.mark.skipif(not has_nvrtc(), reason="no libnvrtc: nvidia-cuda-nvrtc is not installed")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nvrtc_takes_the_text(architecture: str) -> None:
    assert compile_cuda(make_kernel(mx.bfloat16), architecture).startswith(b"\x7fELF")


@pytest.mark.skipif(not has_nvrtc(), reason="no libnvrtc: nvidia-cuda-nvrtc is not installed")
def test_nvrtc_says_what_is_wrong(kernel: Kernel) -> None:
    assert compile_cuda(kernel, "sm_80", whole=True).startswith(b"\x7fELF")
    with pytest.raises(CompileError, match=r"\.b33"):
        compile_cuda(kernel.patched("and.b32", "and.b33"), "sm_80")
    with pytest.raises(CompileError, match="undefined_name"):
        compile_cuda(kernel.patched("half_of(x[i])", "undefined_name(x[i])"), "sm_80")
