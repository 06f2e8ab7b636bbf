"""Compiles CUDA texts with NVIDIA's runtime compiler, which needs no GPU. Its wheels are development dependencies."""

import ctypes
import functools
import importlib.util
from pathlib import Path

from tests.metal.capture import Kernel
from tests.metal.errors import CompileError

ARCHITECTURES = ("sm_80", "sm_90a")
"""What MLX asks for on an A100 and an H100."""

# What kernels may use of the header that MLX puts in front of them, and a short form of it: the whole takes most of a
# compilation's two seconds.
_UTILS = """
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda/std/array>
#include <cuda/std/limits>
#include <cuda/std/tuple>
namespace mlx::core::cu {
using Shape = cuda::std::array<int, 10>;
using Strides = cuda::std::array<int64_t, 10>;
}
"""
_SHORT = """
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long int64_t;
typedef unsigned long uint64_t;
namespace mlx::core::cu {
template <class T>
struct Numbers {
  T elements[10];
  const T& operator[](int i) const { return elements[i]; }
};
using Shape = Numbers<int>;
using Strides = Numbers<int64_t>;
}
"""
_HEADERS = {
    True: {b"mlx/backend/cuda/device/utils.cuh": _UTILS.encode()},
    False: {
        b"mlx/backend/cuda/device/utils.cuh": _SHORT.encode(),
        b"cooperative_groups.h": b"namespace cooperative_groups {}",
    },
}


@functools.cache
def _library() -> tuple[ctypes.CDLL | None, Path]:
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations or () if spec else ():
        found = sorted(Path(root).glob("cu*/lib/libnvrtc.so*"))
        if found:
            return ctypes.CDLL(str(found[0])), found[0].parent.parent / "include"
    return None, Path()


def has_nvrtc() -> bool:
    return _library()[0] is not None


def compile_cuda(kernel: Kernel, architecture: str, *, whole: bool = False) -> bytes:
    """The kernel's machine code for an architecture. Raises CompileError with the compiler's log, warnings too.

    With `whole` all headers that MLX includes are read, which is slower and matters only for clashes of names.
    """
    library, include = _library()
    if library is None:
        raise CompileError("no libnvrtc: install nvidia-cuda-nvrtc")
    given_headers = _HEADERS[whole]
    names = (ctypes.c_char_p * len(given_headers))(*given_headers)
    headers = (ctypes.c_char_p * len(given_headers))(*given_headers.values())
    program = ctypes.c_void_p()
    source, label = kernel.source.encode(), b"kernel.cu"
    status = library.nvrtcCreateProgram(ctypes.byref(program), source, label, len(names), headers, names)
    if status:
        raise CompileError(f"{kernel.name}: nvrtcCreateProgram: {status}")
    try:
        library.nvrtcAddNameExpression(program, f"mlx::core::cu::{kernel.name}".encode())
        options = ["--device-as-default-execution-space", "--diag-suppress=177", f"--gpu-architecture={architecture}"]
        options += [f"--include-path={include}", f"--include-path={include / 'cccl'}"]
        given = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
        status = library.nvrtcCompileProgram(program, len(options), given)
        log = _text(library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog, program).decode().strip("\0\n ")
        if status or log:
            raise CompileError(f"{kernel.name}: {architecture}\n{log}")
        return _text(library.nvrtcGetCUBINSize, library.nvrtcGetCUBIN, program)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _text(size_of: object, get: object, program: ctypes.c_void_p) -> bytes:
    assert callable(size_of)
    assert callable(get)
    size = ctypes.c_size_t()
    size_of(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    get(program, buffer)
    return buffer.raw
