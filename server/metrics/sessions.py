"""Sessions: where they are, what they forget, what a turn reuses, and their files."""

from server.metrics.families import counter, gauge

_DISK_ERRORS = ("OSError", "PermissionError", "FileNotFoundError")
_REFUSALS = (
    "corrupt", "missing", "other_codebook", "other_group", "other_layout", "other_model", "other_rotation",
    "other_version", "truncated", "unreadable",
)  # fmt: skip


class SessionMetrics:
    sessions = gauge(
        "Sessions by state: resident (idle in memory), running, spilled (on disk only).",
        "sessions",
        {"state": ("resident", "running", "spilled")},
    )
    rotations = counter("Pages that full sessions dropped at their old end.", "pages")
    rotated_tokens = counter("Tokens that full sessions dropped by rotation.", "tokens")
    evictions = counter(
        "Sessions forgotten that are not on disk, by reason: memory (to make room), ttl (unused for too long).",
        "sessions",
        {"reason": ("memory", "ttl")},
    )
    checkpoint_drops = counter("Checkpoints forgotten to make room.", labels={"reason": ("memory",)})
    checkpoint_hits = counter(
        "Turns by the state that they continued: session (the end of its last turn), a kind of checkpoint, or none.",
        labels={"kind": ("none", "session", "system", "prompt", "tool", "answer")},
    )
    prompt_tokens = counter(
        "Prompt tokens by source: cached (found in the cache) or prefilled.",
        "tokens",
        {"source": ("cached", "prefilled")},
    )
    prefilled_tokens = counter(
        "Prefilled prompt tokens by reason: new, edited (the session had other tokens there), rotated (no state to go "
        "back to), or lost with their session: evicted, refused_file, failed.",
        "tokens",
        {"reason": ("new", "edited", "rotated", "evicted", "refused_file", "failed")},
    )


class DiskMetrics:
    spills = counter("Sessions written to disk.", "sessions")
    spilled_bytes = counter("Bytes of sessions written to disk.", "bytes")
    spill_seconds = counter("Time spent writing sessions to disk.", "seconds")
    spill_failures = counter(
        "Sessions that could not be written, by error.", "sessions", {"reason": _DISK_ERRORS}, open=("reason",)
    )
    restores = counter("Sessions read back from disk.", "sessions")
    restored_bytes = counter("Bytes of sessions read back from disk.", "bytes")
    restore_seconds = counter("Time spent reading sessions back from disk.", "seconds")
    restore_failures = counter(
        "Sessions that could not be read back though their files may be right, by error.",
        "sessions",
        {"reason": _DISK_ERRORS},
        open=("reason",),
    )
    session_files_refused = counter(
        "Session files that can't be used, by reason. They are moved aside, except other_group (another group's).",
        labels={"reason": _REFUSALS},
    )
    session_files_dropped = counter("Session files deleted because TURBOCACHE_SESSION_DISK was full.")
    session_handovers = counter(
        "Sessions shared by servers on one TURBOCACHE_SESSION_DIR: found (another server's, new here), taken_up (known "
        "here and continued by another), leased (not written: another server had the file), superseded (not written: "
        "another server's turn was later).",
        "sessions",
        {"event": ("found", "taken_up", "leased", "superseded")},
    )
    session_disk_bytes = gauge("Bytes of session files.", "bytes")
    session_disk_limit_bytes = gauge("Limit for session files. 0 without TURBOCACHE_SESSION_DIR.", "bytes")
    session_disk_free_bytes = gauge(
        "Free space on the disk of session files when the last file was written. 0 without TURBOCACHE_SESSION_DIR.",
        "bytes",
    )
