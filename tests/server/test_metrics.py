"""server.metrics: closed label sets, both text formats, one registry per app, and the page that is made of it."""

import re
from pathlib import Path
from typing import get_args

from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from server.errors import Phase
from server.metrics import PREFIX, Family, Metrics
from server.metrics.__main__ import page
from server.protocol import FinishReason
from server.sessions.checkpoints import Kind
from server.sessions.prefill_reasons import Loss, Reason
from turbocache.cache.spec import PATHS
from turbocache.storage.session_file import Refusal

OPENMETRICS = "application/openmetrics-text;version=1.0.0"


def family(name: str) -> Family:
    return next(family for family in Metrics().families if family.name == PREFIX + name)


def test_label_values_are_those_that_the_code_writes() -> None:
    reasons = {value for part in get_args(Reason) for value in (get_args(part) or (part,))}
    assert set(get_args(Loss)) < reasons
    assert set(family("prefilled_tokens_total").labels["reason"]) == reasons
    assert set(family("checkpoint_hits_total").labels["kind"]) == {"none", "session", *get_args(Kind)}
    assert set(family("requests_finished_total").labels["reason"]) == {*get_args(FinishReason), "cancelled", "error"}
    assert set(family("deadlines_exceeded_total").labels["phase"]) == set(get_args(Phase))
    assert set(family("attention_path_total").labels["path"]) == set(PATHS)
    assert set(family("session_files_refused_total").labels["reason"]) == set(get_args(Refusal))


def test_all_families_are_there_and_what_is_known_is_at_zero() -> None:
    text, content_type = Metrics().render()
    assert content_type.startswith("text/plain; version=0.0.4")
    found = {family.name: family for family in text_string_to_metric_families(text.decode())}
    for family in Metrics().families:
        samples = found[family.name.removesuffix("_total")].samples
        known = [values for values in family.labels.values() if values]
        if len(known) == len(family.labels) and family.type != "histogram":
            assert len(samples) == max(1, *map(len, known)) if known else len(samples) == 1
            assert {sample.value for sample in samples} == {0.0}
            assert {sample.name for sample in samples} == {family.name}
    assert not [name for name in found if name.endswith("_created")]


def test_names_have_their_unit() -> None:
    for family in Metrics().families:
        if family.unit in ("bytes", "seconds", "ratio"):
            assert re.search(rf"_{family.unit}(_total)?$", family.name), family.name
        assert family.meaning.endswith("."), family.name


def test_buckets_reach_half_an_hour() -> None:
    assert 'turbocache_time_to_first_token_seconds_bucket{le="1800.0"}' in Metrics().render()[0].decode()


def test_registries_are_apart() -> None:
    one, other = Metrics(), Metrics()
    one.rotations.inc(2)
    assert "turbocache_rotations_total 2.0" in one.render()[0].decode()
    assert "turbocache_rotations_total 0.0" in other.render()[0].decode()


def test_openmetrics_where_it_is_asked_for_with_exemplars_where_they_are_on() -> None:
    metrics = Metrics()
    metrics.request_queue_seconds.observe(0.2, metrics.exemplar("chatcmpl-1"))
    text, content_type = metrics.render(OPENMETRICS)
    assert content_type.startswith("application/openmetrics-text")
    assert text.endswith(b"# EOF\n")
    assert b"chatcmpl" not in text
    metrics.exemplars = True
    metrics.request_queue_seconds.observe(0.2, metrics.exemplar("chatcmpl-2"))
    found = parse_openmetrics(metrics.render(OPENMETRICS)[0].decode())
    exemplars = [sample.exemplar for family in found for sample in family.samples if sample.exemplar]
    assert [exemplar.labels for exemplar in exemplars] == [{"request_id": "chatcmpl-2"}]
    assert b"chatcmpl" not in metrics.render()[0]


def test_the_page_is_made_of_the_code() -> None:
    path = Path(__file__).parents[2] / "docs" / "metrics.md"
    assert path.read_text() == page(), "run: python -m server.metrics > docs/metrics.md"
