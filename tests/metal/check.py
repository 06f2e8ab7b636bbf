"""The strict pass over a kernel's Metal text: what Metal's compiler refuses and plain C++ would let through."""

import re

from tests.metal.capture import Kernel
from tests.metal.errors import CompileError
from tests.metal.rewrite import body_start, expanded, strict
from tests.metal.toolchain import syntax_errors

_PEDANTIC = ["-Wall", "-Werror", "-Wvla", "-Wno-unused", "-Wno-sign-compare", "-Wno-missing-braces", "-Wno-pass-failed"]
_STRICT = ["-DHARNESS_STRICT", "-include", "prelude.h", *_PEDANTIC]
_SPACES = ("device", "constant", "thread", "threadgroup")
_TYPE = (
    r"(?:(?:u?(?:char|short|int|long)|half|bfloat|float|bool)[234]?|void|auto|u?int(?:8|16|32|64)_t|size_t|b?float16_t"
    r"|vec<[^<>]*>|simdgroup_matrix<[^<>]*>)"
)
# A type of the language, then * or & and what belongs to a declaration or a cast; template parameters are added.
_POINTER = r"((?:\b[a-z]+\s+)*)\b({types})\s+?(?:const\s*)?([*&])"
_BANNED = {
    r"\bdouble\b": "Metal has no double",
    r"\b(?:new|delete|throw|try|catch|typeid|dynamic_cast|virtual|goto|thread_local)\b": "not in Metal",
    r"\bstd::": "Metal has no std",
    r"\bstatic\s+(?!inline|constexpr|constant|const\s+constant|void|METAL_FUNC|__attribute__)\w+\s+\w+\s*[=;\[]": (
        "Metal has no static variables of that kind"
    ),
    r"\[[&=\w\s,]*\]\s*\([^()]*\)\s*(?:->\s*\w+\s*)?\{": "Metal has no lambda expressions before version 4",
    r"\bprintf\b": "Metal has no printf",
}


def check(kernel: Kernel) -> None:
    """Raises CompileError unless the text would pass as Metal, as far as is known here.

    Address spaces are distinct types; no pointer or reference is without one; threadgroup arrays stand in the kernel
    function itself and are as large as fits; bfloat comes from other types only explicitly; nothing that Metal lacks.
    """
    if kernel.language != "metal":
        raise ValueError(f"{kernel.name}: only Metal has address spaces in its types")
    text = expanded(kernel)
    problems = [*_banned(text), *_without_space(text), *_misplaced(text, kernel)]
    if not problems:
        problems = [syntax_errors(strict(kernel), _STRICT)]
    if not any(problems) and re.search(r"\bbfloat", text):
        problems = [syntax_errors(strict(kernel), [*_STRICT, "-DHARNESS_STRUCT_BFLOAT"])]
    if any(problems):
        raise CompileError(f"{kernel.name}: not Metal\n" + "\n".join(problems))


def _line(text: str, at: int) -> int:
    """The line in the kernel's source, from the preprocessor's line marks."""
    marks = list(re.finditer(r'^# (\d+) "[^"]*".*$', text[:at], re.MULTILINE))
    return int(marks[-1][1]) - 1 + text.count("\n", marks[-1].end(), at) if marks else text.count("\n", 0, at) + 1


def _banned(text: str) -> list[str]:
    return [
        f"line {_line(text, match.start())}: {match[0].strip()!r}: {why}"
        for pattern, why in _BANNED.items()
        for match in re.finditer(pattern, text)
    ]


def _without_space(text: str) -> list[str]:
    """Pointers and references whose address space is not written down."""
    named = re.findall(r"\b(?:typename|class|struct|using)\s+(\w+)", text) + re.findall(
        r"\btypedef\s[^;]*?(\w+)\s*;", text
    )
    types = "|".join([_TYPE, *(rf"{re.escape(n)}(?:<[^<>;{{}}()]*>)?" for n in set(named))])
    declaration = re.compile(
        rf"(?P<before>[;{{}}(,<>]\s*|\n\s*)(?P<words>(?:(?:const|volatile|static|inline|constexpr|{'|'.join(_SPACES)})\s+)*)"
        rf"(?P<type>{types})(?P<after>(?:\s+(?:const|{'|'.join(_SPACES)}))*)\s*(?P<mark>[*&]+|\(\s*[*&])"
        r"(?P<rest>\s*(?:const\s+)?\w+\s*(?:[=;,)\[:]|\()|\s*[>),])"
    )
    return [
        f"line {_line(text, match.start('type'))}: {match.group().strip()!r}: pointer without address space"
        for match in declaration.finditer(text)
        if not set(_SPACES) & set((match["words"] + match["after"]).split()) and not match["rest"].strip().endswith("(")
    ]


def _misplaced(text: str, kernel: Kernel) -> list[str]:
    """Threadgroup arrays outside of the kernel function."""
    body = body_start(text, kernel)
    return [
        f"line {_line(text, match.start())}: {match[0].strip()!r}: threadgroup memory belongs into the kernel function"
        for match in re.finditer(r"\bthreadgroup\s+[\w:<>, ]+?\s+\w+\s*(?:\[[^\]]*\]\s*)+[;,]", text[:body])
    ]
