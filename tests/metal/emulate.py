"""MLX's custom kernels replaced by the harness: functions that launch them run on a CPU, on real arrays."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import pytest

from tests.metal.arrays import to_mlx, to_numpy
from tests.metal.capture import Kernel, capture
from tests.metal.cuda_text import cuda_kernel
from tests.metal.execute import run

Runner = Callable[[Kernel, Sequence[Any]], list[Any]]


@dataclass
class Launches:
    """What was launched: each kernel with its inputs as numpy arrays (bfloat16 as uint16), in order."""

    kernels: list[tuple[Kernel, list[Any]]] = field(default_factory=list)

    def by_name(self, part: str) -> list[tuple[Kernel, list[Any]]]:
        return [(kernel, inputs) for kernel, inputs in self.kernels if part in kernel.name]

    def texts(self) -> dict[str, Kernel]:
        """One kernel for each different text."""
        return {kernel.source: kernel for kernel, _ in self.kernels}


@contextmanager
def emulate(runner: Runner = run) -> Iterator[Launches]:
    """Inside, mx.fast.metal_kernel and mx.fast.cuda_kernel make kernels that run here, each launch by `runner`.

    Kernels made before keep what they are: clear caches of them first, and again afterwards.
    """
    launches = Launches()
    make_metal: Callable[..., Any] = mx.fast.metal_kernel

    def launch(kernel: Kernel, inputs: Sequence[mx.array]) -> list[mx.array]:
        values = [to_numpy(x) for x in inputs]
        launches.kernels.append((kernel, values))
        outputs = runner(kernel, values)
        return [to_mlx(o, a.dtype) for o, a in zip(outputs, kernel.outputs, strict=True)]

    def metal_kernel(**made: Any) -> Callable[..., list[mx.array]]:
        real = make_metal(**made)

        def call(*, inputs: Sequence[Any], **dispatch: Any) -> list[mx.array]:
            arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
            (kernel,) = capture(lambda *xs: real(inputs=list(xs), **dispatch), *arrays)
            return launch(kernel, arrays)

        return call

    def emulated_cuda_kernel(**made: Any) -> Callable[..., list[mx.array]]:
        def call(*, inputs: Sequence[Any], **dispatch: Any) -> list[mx.array]:
            arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
            return launch(cuda_kernel(**made, inputs=arrays, **dispatch), arrays)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx.fast, "metal_kernel", metal_kernel)
        patch.setattr(mx.fast, "cuda_kernel", emulated_cuda_kernel)
        yield launches
