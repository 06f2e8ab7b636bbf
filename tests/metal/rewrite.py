"""A kernel's text as C++: what Metal and CUDA have and C++ has not, rewritten after its macros are expanded."""

import functools
import re
from dataclasses import dataclass

from tests.metal.capture import Kernel
from tests.metal.errors import CompileError
from tests.metal.toolchain import preprocess

ATTRIBUTES = {
    "thread_position_in_grid": "position_in_grid",
    "thread_position_in_threadgroup": "position_in_threadgroup",
    "threadgroup_position_in_grid": "threadgroup_position",
    "threads_per_threadgroup": "threads_per_threadgroup",
    "dispatch_threads_per_threadgroup": "dispatch_threads_per_threadgroup",
    "threads_per_grid": "threads_per_grid",
    "grid_size": "threads_per_grid",
    "threadgroups_per_grid": "threadgroups_per_grid",
    "thread_index_in_threadgroup": "index_in_threadgroup",
    "thread_index_in_simdgroup": "lane",
    "simdgroup_index_in_threadgroup": "simdgroup",
    "simdgroups_per_threadgroup": "simdgroups",
    "dispatch_simdgroups_per_threadgroup": "dispatch_simdgroups",
}
_THREE = {n for n in ATTRIBUTES if not re.search("index|simdgroups", n)}
_WORDS = {"threads_per_simdgroup": "harness::kLanes", "thread_execution_width": "harness::kLanes"}

_INSTANCE = re.compile(r"^template \[\[host_name.*$", re.MULTILINE)
_DECLARATION = re.compile(
    r"\b(?:threadgroup|__shared__)\s+(?!\()([A-Za-z_][\w:]*(?:\s*<[^;{}]*?>)?)\s+(\w+)\s*(?=[\[;,])"
)
_CAST = re.compile(
    r"\(\s*((?:const\s+)?(?:device|threadgroup|thread|constant)\s+(?:const\s+)?[\w:]+(?:\s*<[^<>()]*>)?(?:\s+const)?\s*\*)\s*\)"
    r"(?=\s*[\w(&])"
)
# Unrolling changes nothing but the time that the compiler takes.
_UNROLL = re.compile(r"^#pragma (?:clang loop )?unroll.*$", re.MULTILINE)
_VEC = re.compile(r"\bvec<([^<>()]+)>\(")


@dataclass(frozen=True)
class Text:
    """A kernel as C++ and the arrays that its threadgroups share."""

    text: str
    shared: tuple[str, ...]


@functools.lru_cache(maxsize=512)
def expanded(kernel: Kernel) -> str:
    """The kernel's text with its own macros expanded. Raises CompileError."""
    flags = ["-D__METAL__=1", "-D__METAL_VERSION__=320"] if kernel.language == "metal" else ["-D__CUDACC__=1"]
    # Its lines keep their numbers; the instantiation that MLX puts behind it is for Metal's own linker.
    source = _INSTANCE.sub("", kernel.source)
    try:
        return _UNROLL.sub("", preprocess(f'#line 1 "kernel.{kernel.language}"\n{source}', flags))
    except CompileError as error:
        raise CompileError(f"{kernel.name}: {error}") from error


@functools.lru_cache(maxsize=512)
def executable(kernel: Kernel) -> Text:
    """The kernel as a program for the runtime: threadgroup arrays come from its arena."""
    text, shared = _shared_arrays(expanded(kernel), "auto& {name} = harness::shared<{type}{bounds}>({tag})")
    return Text(f"{_VEC.sub(_make_vec, text)}\n{_entry(kernel)}", shared)


def strict(kernel: Kernel) -> str:
    """The kernel with address spaces as types: threadgroup arrays are statics there, casts may not change the space."""
    text, _ = _shared_arrays(
        expanded(kernel),
        "static threadgroup {type} {name}{bounds}; "
        "constexpr unsigned long harness_bytes_{next} = harness_bytes_{tag} + sizeof({type}{bounds}); "
        'static_assert(harness_bytes_{next} <= 32768, "more than 32768 bytes of threadgroup memory")',
    )
    text = _CAST.sub(lambda m: f"harness_cast<{m[1]}>()->*", text)
    return f"{_VEC.sub(_make_vec, text)}\ntemplate void harness_instantiate<&{instance(kernel)}>();\n"


def instance(kernel: Kernel) -> str:
    arguments = ", ".join(value for _, value in kernel.template)
    if kernel.language == "cuda":
        return f"mlx::core::cu::{kernel.name}"
    return f"{kernel.name}<{arguments}>" if arguments else kernel.name


def body_start(text: str, kernel: Kernel) -> int:
    """Where the kernel function's own body begins."""
    head = re.search(r"\bvoid\s+" + re.escape(kernel.name) + r"\s*\(", text)
    if head is None:
        raise CompileError(f"{kernel.name}: no function of that name in its text")
    return text.index("{", head.end())


def _make_vec(match: re.Match[str]) -> str:
    return f"make_vec<vec<{match[1]}>>("


def _shared_arrays(text: str, form: str) -> tuple[str, tuple[str, ...]]:
    """Replaces `threadgroup T x[n], y;` by one statement for each array, on the same line."""
    out: list[str] = []
    names: list[str] = []
    at = 0
    while match := _DECLARATION.search(text, at):
        end, statements = match.start(2), []
        while True:
            name = re.compile(r"\s*(\w+)\s*").match(text, end)
            if name is None:
                break
            end = name.end()
            start = end
            while text[end] == "[":
                end = _closing(text, end) + 1
                while text[end].isspace():
                    end += 1
            bounds = text[start:end].strip()
            statements.append(
                form.format(type=match[1], name=name[1], bounds=bounds, tag=len(names), next=len(names) + 1)
            )
            names.append(name[1])
            if text[end] != ",":
                break
            end += 1
        out += [text[at : match.start()], "; ".join(statements)]
        at = end
    return "".join(out) + text[at:], tuple(names)


def _closing(text: str, at: int) -> int:
    depth = 0
    for i in range(at, len(text)):
        depth += (text[i] == "[") - (text[i] == "]")
        if depth == 0:
            return i
    raise CompileError("a bracket is never closed")


def _entry(kernel: Kernel) -> str:
    """The function that the runtime calls in every thread."""
    n_buffers = len(buffer_order(kernel))
    words = []
    if kernel.language == "metal":
        head = kernel.source[: kernel.source.index("{", kernel.source.index(f"void {kernel.name}("))]
        for name in re.findall(r"(\w+) \[\[(?!buffer)\w+\]\]", head[head.rindex(f"void {kernel.name}(") :]):
            if name in _WORDS:
                words.append(_WORDS[name])
            elif name in _THREE:
                words.append(f"harness_three(ids.{ATTRIBUTES[name]})")
            elif name in ATTRIBUTES:
                words.append(f"ids.{ATTRIBUTES[name]}")
            else:
                raise CompileError(f"{kernel.name}: the harness does not know {name}")
    arguments = "".join(f", {word}" for word in words)
    buffers = f"__make_integer_seq<harness_indices, size_t, {n_buffers}>()"
    return (
        '\n#line 1 "entry"\nextern "C" void harness_entry(void* const* buffers) {\n'
        "  const harness::Ids& ids = harness::ids();\n  (void)ids;\n"
        f"  harness_call(&{instance(kernel)}, buffers, {buffers}{arguments});\n}}\n"
    )


def buffer_order(kernel: Kernel) -> list[tuple[str, str]]:
    """The kernel's buffer arguments in order: ("input" | "shape" | "strides" | "ndim" | "output", array name)."""
    order: list[tuple[str, str]] = []
    for array, infos in zip(kernel.inputs, kernel.shape_infos, strict=True):
        order.append(("input", array.name))
        if array.shape:
            order += [(k, array.name) for k, wanted in zip(("shape", "strides", "ndim"), infos, strict=True) if wanted]
    return order + [("output", array.name) for array in kernel.outputs]
