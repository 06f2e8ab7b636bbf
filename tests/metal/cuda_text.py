"""The CUDA text that MLX would generate for a custom kernel, put together here: MLX has no CUDA on this machine."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from tests.metal.capture import Array, Kernel

_TYPES = {
    "bool": "bool",
    "float16": "__half",
    "bfloat16": "__nv_bfloat16",
    "float32": "float",
    **{f"{sign}int{bits}": f"{sign}int{bits}_t" for sign in ("", "u") for bits in (8, 16, 32, 64)},
}
_FRONT = '\n#include "mlx/backend/cuda/device/utils.cuh"\n\n#include <cooperative_groups.h>\n\n'


def cuda_kernel(
    *,
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
    inputs: Sequence[mx.array],
    output_shapes: Sequence[Sequence[int]],
    output_dtypes: Sequence[mx.Dtype],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    template: Sequence[tuple[str, Any]] = (),
    **_: Any,
) -> Kernel:
    """The kernel and launch that mx.fast.cuda_kernel would make of the same arguments (mlx 0.32.4)."""
    full_name = f"custom_kernel_{name}" + "".join(f"_{_in_name(value)}" for _, value in template)
    infos = tuple(tuple(f"{n}_{kind}" in source for kind in ("shape", "strides", "ndim")) for n in input_names)
    described = [_array(n, x.shape, x.dtype) for n, x in zip(input_names, inputs, strict=True)]
    outputs = [_array(n, s, d) for n, s, d in zip(output_names, output_shapes, output_dtypes, strict=True)]

    parameters = []
    for array, (shape, strides, ndim) in zip(described, infos, strict=True):
        parameters.append(f"    const {_TYPES[array.dtype]}* {array.name}")
        if array.shape:
            parameters += [f"    const __grid_constant__ Shape {array.name}_shape"] * shape
            parameters += [f"    const __grid_constant__ Strides {array.name}_strides"] * strides
            parameters += [f"    const __grid_constant__ int {array.name}_ndim"] * ndim
    parameters += [f"    {_TYPES[array.dtype]}* {array.name}" for array in outputs]
    constants = "".join(_constant(n, value) for n, value in template) + ("\n" if template else "")
    signature = ",\n".join(parameters)
    text = (
        f"{_FRONT}{header}namespace mlx::core::cu {{\n\nnamespace cg = cooperative_groups;\n\n"
        f"__global__ void {full_name}(\n{signature}) {{\n"
        f"{constants}{source}\n}}\n\n}} // namespace mlx::core::cu\n"
    )
    return Kernel(
        name=full_name,
        source=text,
        grid=grid,
        threadgroup=threadgroup,
        inputs=tuple(described),
        outputs=tuple(outputs),
        template=tuple((n, _in_name(value)) for n, value in template),
        shape_infos=tuple((a, b, c) for a, b, c in infos),
        contiguous=ensure_row_contiguous,
        language="cuda",
    )


def _array(name: str, shape: Sequence[int], dtype: mx.Dtype) -> Array:
    return Array(name, tuple(shape), str(dtype).removeprefix("mlx.core."))


def _dtype(value: mx.Dtype) -> str:
    return str(value).removeprefix("mlx.core.")


def _in_name(value: Any) -> str:
    """How MLX puts a template argument into the kernel's name."""
    if isinstance(value, bool):
        return "t" if value else "f"
    if isinstance(value, int):
        return str(value)
    dtype = _dtype(value)
    return dtype + "_t" if dtype in ("float16", "bfloat16") or "int" in dtype else dtype


def _constant(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return f"  constexpr bool {name} = {str(value).lower()};\n"
    if isinstance(value, int):
        return f"  constexpr int {name} = {value};\n"
    return f"  using {name} = {_TYPES[_dtype(value)]};\n"
