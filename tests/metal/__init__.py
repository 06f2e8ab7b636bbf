"""Runs MLX's custom kernels on a CPU: the exact Metal or CUDA text, type-checked and executed, each thread a fiber.

kernels = capture(fn, *inputs)          what MLX would compile and launch, without a GPU
check(kernel)                           address spaces and types, as strict as Metal's compiler
outputs = run(kernel, inputs)           executed; mode="asan" or "tsan" under a sanitizer
with emulate() as launches: fn(*inputs) the real thing, with every launch going through here
"""

from tests.metal.capture import Array, Kernel, capture
from tests.metal.check import check
from tests.metal.emulate import Launches, emulate
from tests.metal.errors import (
    CompileError,
    DivergedError,
    HarnessError,
    LaunchError,
    MemoryFaultError,
    OrderError,
    RaceError,
    UnwrittenError,
)
from tests.metal.execute import run, run_orders
from tests.metal.toolchain import Mode, has_mode, why_not

__all__ = [
    "Array",
    "CompileError",
    "DivergedError",
    "HarnessError",
    "Kernel",
    "LaunchError",
    "Launches",
    "MemoryFaultError",
    "Mode",
    "OrderError",
    "RaceError",
    "UnwrittenError",
    "capture",
    "check",
    "emulate",
    "has_mode",
    "run",
    "run_orders",
    "why_not",
]
