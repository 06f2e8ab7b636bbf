"""What the runtime and the sanitizers said, cut down to what a person needs, with the kernel's lines quoted."""

import re
from pathlib import Path

from tests.metal.capture import Kernel
from tests.metal.toolchain import line_of

_NOISE = re.compile(
    r"harness_entry|harness_call|harness::thread_main|harness::run_threadgroup|harness_meet|BuildId: \w+\)$|^=+$"
    r"|tid=\d+, running\) created by|HINT: if your stack|^\s*\(longjmp|^$"
)
_FRAME = re.compile(r"(#\d+ (?:0x[0-9a-f]+ in )?).*?[\w./]*\b(kernel\.(?:metal|cuda):\d+).*")
_MAX_QUOTED = 12


def readable(said: str, kernel: Kernel, program: Path) -> str:
    """The report for `kernel`; `said` is what its program wrote on stderr."""
    said = re.sub(r" <([0-9a-f]+)>", lambda m: f" ({line_of(program, m[1])})", said)
    said = re.split(r"^Shadow bytes around|^SUMMARY: ", said, maxsplit=1, flags=re.MULTILINE)[0]
    lines = []
    for line in said.splitlines():
        frame = _FRAME.search(line)
        if frame:
            lines.append(f"    {frame[1]}{frame[2]}")
        elif not _NOISE.search(line):
            lines.append(line[:300])
    return "\n".join([*lines[:60], *_quoted("\n".join(lines), kernel)])


def _quoted(said: str, kernel: Kernel) -> list[str]:
    """The kernel's lines that a report names."""
    text = kernel.source.splitlines()
    numbers = [int(n) for n in re.findall(r"(?:kernel\.\w+:|at line )(\d+)", said)]
    found = list(dict.fromkeys(n for n in numbers if 0 < n <= len(text)))[:_MAX_QUOTED]
    return [f"  line {n}: {text[n - 1].strip()}" for n in found]
