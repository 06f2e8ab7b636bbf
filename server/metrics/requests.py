"""Requests: the queue, the batch, outcomes, times and sizes, and the event loop that serves them."""

from server.metrics.families import counter, gauge, histogram

# A cold prefill of a long context on a small machine takes many minutes, so the buckets reach half an hour.
_SLOW_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0, 1800.0)
_QUEUE_BUCKETS = (0.001, 0.005, 0.01, *_SLOW_BUCKETS)
_LAG_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 5.0)
_TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_LENGTH_BUCKETS = tuple(float(2**power) for power in range(4, 18))
_ROW_BUCKETS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)

_ADMISSION_REFUSALS = (
    "rate_limit_exceeded", "out_of_memory", "later_sessions", "context_length_exceeded", "engine_dead",
)  # fmt: skip


class RequestMetrics:
    requests_running = gauge("Requests in the batch.", "requests")
    requests_running_limit = gauge("Most requests in the batch: TURBOCACHE_MAX_BATCH.", "requests")
    requests_waiting = gauge("Accepted requests that are not yet in the batch.", "requests")
    requests_waiting_limit = gauge("Most requests that wait: TURBOCACHE_QUEUE_LIMIT.", "requests")
    batch_rows = histogram("Rows that got a token in a step.", _ROW_BUCKETS, "rows")
    generated_tokens = counter("Tokens generated.", "tokens")
    requests_finished = counter(
        "Accepted requests by outcome.",
        "requests",
        {"reason": ("stop", "length", "tool_calls", "cancelled", "error")},
    )
    admission_refusals = counter(
        "Requests refused before they ran, by error code, or later_sessions (room only in named sessions used since).",
        "requests",
        {"reason": _ADMISSION_REFUSALS},
        open=("reason",),
    )
    deadlines_exceeded = counter(
        "Requests ended by TURBOCACHE_DEADLINE, by their phase at that time.",
        "requests",
        {"phase": ("arriving", "waiting", "prefill", "answer")},
    )
    http_requests = counter("HTTP responses by route template and status.", "requests", open=("path", "status"))
    time_to_first_token_seconds = histogram("Time from a request's arrival to its first text.", _SLOW_BUCKETS)
    inter_token_latency_seconds = histogram("Time between two tokens of one request.", _TOKEN_BUCKETS)
    request_duration_seconds = histogram("Time from an accepted request's arrival to its end.", _SLOW_BUCKETS)
    request_queue_seconds = histogram("Time from a request's acceptance to its start.", _QUEUE_BUCKETS)
    request_prefill_seconds = histogram("Time from a request's start to the end of its prefill.", _QUEUE_BUCKETS)
    request_decode_seconds = histogram("Time from the end of a request's prefill to its end.", _QUEUE_BUCKETS)
    request_prompt_tokens = histogram("Prompt tokens of a finished request.", _LENGTH_BUCKETS, "tokens")
    request_generated_tokens = histogram("Generated tokens of a finished request.", _LENGTH_BUCKETS, "tokens")


class EventLoopMetrics:
    event_loop_lag_seconds = histogram("Delay of the event loop, measured fifty times a second.", _LAG_BUCKETS)
    event_loop_longest_lag_seconds = gauge("Longest delay of the event loop since the start.", "seconds")
    event_loop_longest_own_lag_seconds = gauge(
        "The same without the time that its thread waited for a processor (known on Linux only).", "seconds"
    )
