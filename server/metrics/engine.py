"""The engine and its cache: backend, ranks, pages, bytes by kind, and memory against the budget."""

from server.metrics.families import Labels, counter, gauge

_RANK: Labels = {"rank": ("0",)}


class EngineMetrics:
    engine_up = gauge("1 while the engine's thread works, 0 when it is dead or stuck.")
    model_info = gauge(
        "Always 1. The labels name what is served: the model, the cache preset, the versions of turbocache and MLX.",
        open=("model_name", "preset", "version", "mlx_version"),
    )
    backend_info = gauge(
        "Always 1. The labels name the backend that runs and the reason.",
        open=("requested", "active", "reason", "profile"),
    )
    probe_check = gauge("Checks of the start-up probe by backend and part: 1 passed, 0 failed.", open=("check",))
    fallbacks = counter("Times a backend was passed over for another.", open=("from", "to", "reason"))
    kernel_faults = counter("Steps that failed or whose result was not a number.")
    layers = gauge(
        "Layers of the model by cache: compressed, or native (mlx-lm's cache).",
        "layers",
        {"storage": ("compressed", "native")},
    )
    attention_path = counter(
        "Layers that attended, by path: fused, packed, expanded (pages are expanded first), native (mlx-lm's own).",
        "layers",
        {"path": ("fused", "packed", "expanded", "native")},
    )
    group_ranks = gauge("Processes that serve the model together. 1 is a server without a group.")
    rank_silent_seconds = gauge(
        "Time since a rank's engine began its last step. 0 for the rank that reports.", "seconds", _RANK, open=("rank",)
    )


class CacheMetrics:
    pages_used = gauge("Pages of the pool that sessions own.", "pages")
    pages_free = gauge("Pages of the pool that no session owns.", "pages")
    pages_capacity = gauge("Pages in the pool: used plus free.", "pages")
    cache_bytes = gauge(
        "Bytes in the cache by kind: compressed pages, the raw window and sink, recurrent states.",
        "bytes",
        {"kind": ("pages", "window", "sink", "recurrent"), **_RANK},
        open=("rank",),
    )
    cache_fp16_bytes = gauge(
        "Bytes that a float16 cache would need for the tokens in pages, windows and sinks.",
        "bytes",
        _RANK,
        open=("rank",),
    )
    compression_ratio = gauge(
        "Bytes in float16 over stored bytes: of a page, and of all that is held with its raw parts (0 when nothing is "
        "held).",
        "ratio",
        {"of": ("page", "held")},
    )
    raw_shadow_bytes = gauge("Uncompressed copies of tokens that are in pages. Must stay 0.", "bytes")
    budget_bytes = gauge(
        "Memory for the cache: total, promised (to requests), resting (idle sessions and checkpoints).",
        "bytes",
        {"kind": ("total", "promised", "resting"), **_RANK},
        open=("rank",),
    )
    pressure_ratio = gauge(
        "Memory promised to running requests plus resting memory, over the budget. Above 1, sessions are evicted.",
        "ratio",
    )
    device_memory_bytes = gauge(
        "MLX's memory: active (arrays), cached (freed and kept for new arrays), peak (highest active), and the "
        "device's total.",
        "bytes",
        {"kind": ("active", "cached", "peak", "total"), **_RANK},
        open=("rank",),
    )
