"""The memory that caches may use."""

import ctypes
import os
import sys
from pathlib import Path

import mlx.core as mx

from kernels.attention.device import on_cpu

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_MEMINFO = Path("/proc/meminfo")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h
_KEPT = 1 << 28


def device_memory() -> int:
    """Bytes of the default device: Metal's recommended working set, the GPU's memory, or physical memory (at most the
    container's limit) on a CPU.
    """
    info = mx.device_info()
    for key in ("max_recommended_working_set_size", "total_memory"):
        if not on_cpu() and key in info:
            return int(info[key])
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = int(_CGROUP_LIMIT.read_text())
    except (OSError, ValueError):  # no cgroup, or "max"
        return physical
    return min(physical, limit)


def available_memory() -> int:
    """Bytes of `device_memory` that are free now, as the system reports it."""
    if on_cpu() and _MEMINFO.exists():
        fields = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        return min(device_memory(), int(fields["MemAvailable"].split()[0]) * 1024)
    info = mx.device_info()
    if "free_memory" in info:
        return int(info["free_memory"])
    return device_memory() - mx.get_active_memory()


def memory_in_use() -> dict[str, int]:
    """Bytes that MLX holds: `active` in arrays, `cached` for later arrays, and the `peak` of the active ones."""
    return {"active": mx.get_active_memory(), "cached": mx.get_cache_memory(), "peak": mx.get_peak_memory()}


def keep_freed_memory() -> bool:
    """Make the C library keep up to `_KEPT` freed bytes for the next step. Returns whether it does.

    On the CPU every step allocates and frees the same few megabytes, and glibc returns them to the system each time.
    The page faults took a quarter of a decode step over 4,000 tokens (43 ms with them, 33 ms without). Call it before
    the computing thread starts. Does nothing except on Linux's CPU backend.
    """
    if not (on_cpu() and sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt")):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(_M_ARENA_MAX, 1), mallopt(_M_MMAP_THRESHOLD, _KEPT), mallopt(_M_TRIM_THRESHOLD, _KEPT)])
