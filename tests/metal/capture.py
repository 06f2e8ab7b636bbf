"""What MLX would compile and launch for a traced function: the text of its custom kernels and their launches."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import mlx.core as mx

Language = Literal["metal", "cuda"]
Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Array:
    """An input or output as the kernel knows it. `dtype` is MLX's name without its module: "float32", "bfloat16"."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Kernel:
    """One launch: the whole text as MLX hands it to the compiler, and how it is dispatched.

    `template` holds the template arguments in the text's own words. `shape_infos` says for every input whether the
    kernel gets its shape, strides and number of dimensions.
    """

    name: str
    source: str
    grid: Triple
    threadgroup: Triple
    inputs: tuple[Array, ...]
    outputs: tuple[Array, ...]
    template: tuple[tuple[str, str], ...]
    shape_infos: tuple[tuple[bool, bool, bool], ...]
    contiguous: bool = True
    language: Language = "metal"

    def patched(self, old: str, new: str) -> "Kernel":
        """The kernel with one place of its text changed. Raises ValueError if `old` is not there exactly once."""
        if self.source.count(old) != 1:
            raise ValueError(f"{self.name}: {old!r} is {self.source.count(old)} times in the text")
        return replace(self, source=self.source.replace(old, new))


def capture(fn: Callable[..., Any], *inputs: mx.array) -> list[Kernel]:
    """The custom Metal kernels of `fn(*inputs)` in the order of their launches.

    `fn` is only traced: nothing is computed, and no Metal is needed. MLX tells everything but `init_value`.
    """
    kernels: list[Kernel] = []

    def on_record(record: dict[str, Any]) -> None:
        if record["type"] == "primitive" and record["name"] == "CustomKernel":
            kernels.append(_kernel(record))

    mx.export_function(on_record, fn, *inputs)
    return kernels


def _kernel(record: dict[str, Any]) -> Kernel:
    # mlx 0.32.4: CustomKernel::state() with tuples of numbers laid out flat and std::optional left out.
    name, source, gx, gy, gz, tx, ty, tz, shape_infos, contiguous, _scalars, _precompiled, _shared, _options = record[
        "arguments"
    ]
    inputs, outputs = record["inputs"], record["outputs"]
    names = iter(re.findall(r"[*&] (\w+) \[\[buffer\(\d+\)\]\]", source))
    own = []
    for (_, shape, _), infos in zip(inputs, shape_infos, strict=True):
        own.append(next(names))
        for _ in range(sum(infos) if shape else 0):
            next(names)
    own += names
    return Kernel(
        name=name,
        source=source,
        grid=(gx, gy, gz),
        threadgroup=(tx, ty, tz),
        inputs=tuple(_array(n, a) for n, a in zip(own, inputs, strict=False)),
        outputs=tuple(_array(n, a) for n, a in zip(own[len(inputs) :], outputs, strict=True)),
        template=_template(name, source),
        shape_infos=tuple(shape_infos),
        contiguous=contiguous,
    )


def _array(name: str, described: tuple[str, tuple[int, ...], mx.Dtype]) -> Array:
    _, shape, dtype = described
    return Array(name, tuple(shape), str(dtype).removeprefix("mlx.core."))


def _template(name: str, source: str) -> tuple[tuple[str, str], ...]:
    parameters = re.search(r"^template <(.*)>\n\[\[kernel\]\] void " + re.escape(name) + r"\(", source, re.MULTILINE)
    arguments = re.search(r"^template \[\[host_name.*decltype\(\w+<(.*)>\) \w+<.*>;$", source, re.MULTILINE)
    if parameters is None or arguments is None:
        return ()
    names = [p.split()[-1] for p in parameters[1].split(", ")]
    return tuple(zip(names, arguments[1].split(", "), strict=True))
