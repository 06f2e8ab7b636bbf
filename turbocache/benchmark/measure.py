"""Measures one case, a contender at a context length, in this process."""

import contextlib
import gc
import re
import resource
import statistics
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from kernels.attention.device import on_cpu
from turbocache.backend import Backend
from turbocache.benchmark.contenders import Contender, open_contender
from turbocache.benchmark.loops import Loop, Times
from turbocache.benchmark.settings import Settings
from turbocache.benchmark.subject import Subject
from turbocache.evaluation.storage import Stored
from turbocache.mlxlm.prompt_cache import PromptCache

SKIPPED = 4
"""Decode steps that are not timed, because the first ones of a process are slow."""
_WARM_ON_CPU = 64


def measure(
    subject: Subject, contender: Contender, context: int, settings: Settings, backend: Backend | None
) -> dict[str, Any]:
    """Figures of one run, in base units. `cache_bytes` is one row's. Raises the contender's errors."""
    first = _warm_up(subject, contender, context, settings, backend)
    n_tokens = 1 + SKIPPED + settings.generate
    opened = open_contender(contender, subject.model, subject.plans, settings, backend, context + n_tokens)
    base = _settled_memory()
    _forget_peaks()
    seen: list[tuple[Stored, int]] = []

    def at_first(cache: PromptCache) -> None:
        seen.append((opened.stored(cache), mx.get_peak_memory()))

    prompts = _prompts(subject, context, settings.batch)
    times = Loop(subject.model, opened.caches, prompts, n_tokens, settings.chunk, opened.options).run(at_first)
    peak = mx.get_peak_memory()
    figures = _speed(times, context, settings.batch)
    if first is not None:
        figures["first_prefill_tokens_per_second"] = settings.batch * (context - 1) / first.prefilled
    stored, peak_of_prefill = seen[0]
    if settings.batch == 1:  # BatchGenerator drops the caches of finished rows
        figures["active_bytes"] = _settled_memory() - base
    return figures | {
        "cache_bytes": stored.nbytes,
        "cache_bytes_half": stored.half_nbytes,
        "prefill_peak_bytes": peak_of_prefill - base,
        "peak_bytes": peak - base,
        "process_peak_bytes": _process_peak(),
    }


def _warm_up(
    subject: Subject, contender: Contender, context: int, settings: Settings, backend: Backend | None
) -> Times | None:
    """Run the case once. Returns the times of a whole prompt on a GPU, which include the compilation of kernels."""
    length = min(context, settings.warm_up or (_WARM_ON_CPU if on_cpu() else context))
    n_tokens = 1 + SKIPPED
    opened = open_contender(contender, subject.model, subject.plans, settings, backend, length + n_tokens)
    prompts = _prompts(subject, length, settings.batch)
    times = Loop(subject.model, opened.caches, prompts, n_tokens, settings.chunk, opened.options).run(lambda _: None)
    return times if length == context and not on_cpu() else None


def _prompts(subject: Subject, context: int, rows: int) -> list[list[int]]:
    """Random tokens, different in each row, and the same for every contender."""
    drawn: list[list[int]] = np.random.default_rng(0).integers(0, subject.vocabulary, (rows, context)).tolist()
    return drawn


def _speed(times: Times, context: int, rows: int) -> dict[str, Any]:
    steps = times.steps(SKIPPED)
    return {
        "prefill_tokens_per_second": rows * (context - 1) / times.prefilled,
        "time_to_first_token_seconds": times.tokens[0],
        "decode_tokens_per_second": rows / statistics.median(steps),
        "decode_mean_tokens_per_second": rows * len(steps) / sum(steps),
    }


def _settled_memory() -> int:
    """Bytes that MLX holds without running work and without its buffer cache."""
    gc.collect()
    mx.synchronize()
    mx.clear_cache()
    return int(mx.get_active_memory())


def _forget_peaks() -> None:
    mx.reset_peak_memory()
    if sys.platform == "linux":
        # If that is not allowed, the peak includes the loading of the model.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def _process_peak() -> int:
    """The peak of the process's resident bytes, with Python and weights."""
    status = Path("/proc/self/status")
    # On Linux, `ru_maxrss` starts at the parent's value.
    if status.exists() and (match := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(match[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
