"""server.metrics: the names dashboards rely on, and one registry per app."""

from prometheus_client.parser import text_string_to_metric_families

from server.metrics import Metrics

NAMES = {
    "pages_used",
    "pages_free",
    "pages_capacity",
    "cache_bytes",
    "raw_shadow_bytes",
    "sessions",
    "requests_running",
    "requests_waiting",
    "rotations",
    "evictions",
    "rotated_tokens",
    "prompt_tokens",
    "generated_tokens",
    "requests_finished",
    "fallbacks",
    "admission_refusals",
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "request_duration_seconds",
    "backend_info",
    "probe_check",
    "kernel_faults",
    "attention_path",
    "http_requests",
    "deadlines_exceeded",
    "event_loop_lag_seconds",
    "event_loop_longest_lag_seconds",
    "event_loop_longest_own_lag_seconds",
}


def test_names_and_text_format() -> None:
    metrics = Metrics()
    metrics.fallbacks.labels(**{"from": "metal", "to": "packed", "reason": "no GPU"}).inc()
    metrics.backend_info.labels(requested="auto", active="packed", reason="no GPU", profile="portable").set(1)
    metrics.rotations.inc(2)
    text = metrics.render().decode()
    families = {family.name for family in text_string_to_metric_families(text)}
    assert {f"turbocache_{name}" for name in NAMES} <= families
    assert "turbocache_rotations_total 2.0" in text
    assert 'turbocache_fallbacks_total{from="metal",reason="no GPU",to="packed"} 1.0' in text
    assert metrics.content_type.startswith("text/plain; version=")


def test_buckets_reach_half_an_hour() -> None:
    assert 'turbocache_time_to_first_token_seconds_bucket{le="1800.0"}' in Metrics().render().decode()


def test_registries_are_apart() -> None:
    one, other = Metrics(), Metrics()
    one.rotations.inc()
    assert "turbocache_rotations_total 0.0" in other.render().decode()
