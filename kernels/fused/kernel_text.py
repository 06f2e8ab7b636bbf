"""Assembles the text of the fused kernels for one language and passes it to MLX.

A kernel is a body (`sources/NAME.metal`; a long one has several files), written once, in Metal's syntax. In front of it
go the language's prelude, the shared parts (`sources/shapes.h`, `sources/common.h`) and the kernel's own functions
(`sources/NAME.h`), if there are any.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx

Language = Literal["metal", "cuda"]

_SOURCES = Path(__file__).parent / "sources"


@dataclass(frozen=True, slots=True)
class Signature:
    """A kernel's source files, and the names of its inputs and outputs in order."""

    sources: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


_PAGES = ("key_words", "value_words", "key_scales", "value_scales")
_ATTEND = ("attend_1_setup", "attend_2_raw", "attend_3_pages")
_STEP = ("queries", "step_keys", "step_values", "raw_keys", "raw_values", "table", "rows", *_PAGES, "constants")
_STORED = ("new_keys", "new_values")

# Each array of a launch costs host time. So all constant inputs are one array (sources/shapes.h), and only models with
# attention sinks pass them.
KERNELS = {
    "encode": Signature(("encode",), ("keys", "values", "constants"), _PAGES),
    "expand": Signature(("expand",), (*_PAGES, "table", "constants"), ("keys", "values")),
    "expand_raw": Signature(("expand",), (*_PAGES, "table", "constants", "raw_keys", "raw_values"), ("keys", "values")),
    "attend": Signature(_ATTEND, _STEP, ("parts", *_STORED)),
    "merge": Signature(("merge",), ("parts", "constants"), ("out",)),
    "merge_sinks": Signature(("merge",), ("parts", "constants", "sinks"), ("out",)),
    # attend and merge in one launch. Threadgroups must see each other's memory, which Metal does not guarantee. The
    # kernel writes to its input `workspace`: counters, then parts.
    "attend_merged": Signature(_ATTEND, (*_STEP, "workspace"), ("out", *_STORED)),
    "attend_merged_sinks": Signature(_ATTEND, (*_STEP, "workspace", "sinks"), ("out", *_STORED)),
}

Constant = int | bool | mx.Dtype
Constants = tuple[tuple[str, Constant], ...]

_TYPES = {
    "metal": {mx.float16: "half", mx.bfloat16: "bfloat16_t", mx.float32: "float"},
    "cuda": {mx.float16: "__half", mx.bfloat16: "__nv_bfloat16", mx.float32: "float"},
}


def body(name: str, language: Language, constants: Constants) -> str:
    """The body of a kernel's function, with its constants and types in front.

    They are part of the text, because MLX would parse template arguments at every launch.
    """
    lines = [_constant(key, value, language) for key, value in constants]
    lines += [f"#define {option.upper()}\n" for option in ("raw", "merged", "sinks") if f"_{option}" in name]
    if language == "cuda":
        lines.insert(0, f"#undef {_symbol(name)}\n")
    parts = (_text(_SOURCES / f"{source}.metal", language) for source in KERNELS[name].sources)
    return "".join([*lines, *parts])


def header(name: str, language: Language, bounds: tuple[int, int] | None = None) -> str:
    """The text in front of the kernel's function.

    `bounds`, on CUDA only: threads per threadgroup, and threadgroups that must fit one multiprocessor, which limits a
    thread's registers.
    """
    own = _SOURCES / f"{name.partition('_')[0]}.h"
    shared = [_SOURCES / file for file in ("shapes.h", f"prelude_{language}.h", "common.h")]
    parts = [*shared, *([own] if own.exists() else [])]
    text = "".join(_text(part, language) for part in parts)
    if bounds is None or language != "cuda":
        return text
    # MLX writes the signature, so a macro adds the attribute to the function's name. The body undefines it.
    return f"{text}#define {_symbol(name)} __launch_bounds__({bounds[0]}, {bounds[1]}) {_symbol(name)}\n"


@cache
def kernel(
    name: str, language: Language, constants: Constants, bounds: tuple[int, int] | None = None
) -> Callable[..., list[mx.array]]:
    """The kernel as a function of MLX, compiled at its first launch.

    Raises RuntimeError or ValueError if this build of MLX lacks the language.
    """
    build: Any = mx.fast.metal_kernel if language == "metal" else mx.fast.cuda_kernel
    signature = KERNELS[name]
    made: Callable[..., list[mx.array]] = build(
        name=f"turbocache_{name}",
        input_names=list(signature.inputs),
        output_names=list(signature.outputs),
        source=body(name, language, constants),
        header=header(name, language, bounds),
    )
    return made


def _symbol(name: str) -> str:
    """The function's name in MLX's text."""
    return f"custom_kernel_turbocache_{name}"


def _constant(key: str, value: Constant, language: Language) -> str:
    if isinstance(value, mx.Dtype):
        return f"using {key} = {_TYPES[language][value]};\n"
    return f"constexpr {'bool' if isinstance(value, bool) else 'int'} {key} = {str(value).lower()};\n"


def _text(path: Path, language: Language) -> str:
    """A source file in the form for a kernel's text, which is short because MLX copies and hashes it at every launch.

    For CUDA it is an #include, behind the names of the input shapes that the file reads: MLX passes those that it finds
    in the text. Metal can't include our files, so it gets the file without comments and indentation.
    """
    lines = [re.sub(r"//.*", "", line).strip() for line in path.read_text().splitlines()]
    if language == "metal":
        return "".join(f"{line}\n" for line in lines if line)
    shapes = sorted(set(re.findall(r"\b\w+_shape\b", "\n".join(lines))))
    return f'// {" ".join(shapes)}\n#include "{path}"\n' if shapes else f'#include "{path}"\n'
