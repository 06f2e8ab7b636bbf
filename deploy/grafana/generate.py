"""Writes deploy/grafana/dashboards/turbocache.json: `python deploy/grafana/generate.py`. Needs the dev requirements."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from grafana_foundation_sdk.builders import dashboard, prometheus, stat, table, timeseries
from grafana_foundation_sdk.builders.common import (
    ReduceDataOptions,
    StackingConfig,
    VizLegendOptions,
    VizTooltipOptions,
)
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import LegendDisplayMode, LegendPlacement, StackingMode, TooltipDisplayMode
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    DataTransformerConfig,
    Threshold,
    ThresholdsMode,
    VariableRefresh,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

PATH = Path(__file__).parent / "dashboards" / "turbocache.json"

_SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
_INFO = ("Time", "Value", "__name__", "job")
_ONE = '{instance=~"$instance"}'
Panel = stat.Panel | table.Panel | timeseries.Panel


def _of(name: str, labels: str = "") -> str:
    """A family, for the selected servers."""
    return f"turbocache_{name}" + (_ONE if not labels else f"{_ONE[:-1]}, {labels}}}")


def _sum(name: str, labels: str = "", by: str = "") -> str:
    return f"sum{f' by ({by}) ' if by else ''}({_of(name, labels)})"


def _rate(name: str, labels: str = "", by: str = "instance") -> str:
    return f"sum by ({by}) (rate({_of(name, labels)}[$__rate_interval]))"


def _quantiles(name: str) -> list[tuple[str, str]]:
    """Quantiles of a histogram. Without observations there are none."""
    return [
        (f"histogram_quantile({q}, {_rate(f'{name}_bucket', by='le')})", f"{q * 100:g} %") for q in (0.5, 0.9, 0.99)
    ]


@dataclass(frozen=True, slots=True)
class Plot:
    """A panel: lines over time, a number or a table."""

    title: str
    queries: Sequence[tuple[str, str]]
    """Expressions with their legends."""
    unit: str = "short"
    text: str = ""
    span: int = 8
    stacked: bool = False
    kind: Literal["lines", "number", "table"] = "lines"
    thresholds: Sequence[tuple[float, str]] = ()
    hidden: Sequence[str] = ()


ROWS: dict[str, list[Plot]] = {
    "Now": [
        Plot("Engine", [(_of("engine_up"), "{{instance}}")], span=4, kind="number",
             thresholds=[(0, "red"), (1, "green")], text="1: it works. 0: it is dead or stuck; /health says why."),
        Plot("Cache pressure", [(_of("pressure_ratio"), "{{instance}}")], "percentunit", span=4, kind="number",
             thresholds=[(0, "green"), (0.9, "orange"), (1, "red")],
             text="Memory promised to running requests plus resting memory, over the budget."),
        Plot("Compression", [(_of("compression_ratio", 'of="page"'), "{{instance}}")], "x", span=4, kind="number",
             text="Bytes in float16 over bytes of a compressed page."),
        Plot("Sessions in memory", [(_sum("sessions", 'state!="spilled"', by="instance"), "{{instance}}")],
             span=4, kind="number"),
        Plot("Prompt tokens from the cache", [("turbocache:prompt_tokens_cached:ratio_rate5m" + _ONE, "{{instance}}")],
             "percentunit", span=4, kind="number", text="In the last five minutes."),
        Plot("Queue", [(_of("requests_waiting"), "{{instance}}")], span=4, kind="number",
             thresholds=[(0, "green"), (1, "orange")]),
    ],
    "Cache": [
        Plot("Memory against budget", [
            (_sum("budget_bytes", 'kind!="total"', by="kind"), "{{kind}}"),
            (_sum("budget_bytes", 'kind="total"'), "budget"),
        ], "bytes", text="Memory promised to requests, and resting in idle sessions and checkpoints."),
        Plot("Cache by kind", [(_sum("cache_bytes", by="kind"), "{{kind}}"),
                               (_sum("cache_fp16_bytes"), "the same tokens in float16")], "bytes",
             text="Pages are compressed; window and sink are raw."),
        Plot("Compression of what is held", [(_of("compression_ratio", 'of="held"'), "{{instance}}")], "x",
             text="Includes the raw parts. Short sessions are mostly raw."),
        Plot("Pages", [(_sum("pages_used"), "used"), (_sum("pages_free"), "free")], stacked=True),
        Plot("Rotation", [(_rate("rotated_tokens_total"), "tokens"), (_rate("rotations_total"), "pages")],
             text="Per second: tokens and pages that full sessions drop at their old end."),
        Plot("Forgotten", [(_rate("evictions_total", by="reason"), "sessions: {{reason}}"),
                           (_rate("checkpoint_drops_total"), "checkpoints: memory")], "short",
             text="Per second: sessions that are not on disk, and checkpoints."),
        Plot("Why tokens were computed", [(_rate("prefilled_tokens_total", by="reason"), "{{reason}}")], "short",
             stacked=True, text="Per second. All reasons but new and edited: the cache had these tokens before."),
        Plot("Prompt tokens", [(_rate("prompt_tokens_total", by="source"), "{{source}}")], "short", stacked=True,
             text="Per second: found in the cache, or prefilled."),
        Plot("Computed again", [("turbocache:prompt_tokens_recomputed:ratio_rate15m" + _ONE, "{{instance}}")],
             "percentunit", text="Share of all prompt tokens, over 15 minutes."),
    ],
    "Latency": [
        Plot("Time to first token", _quantiles("time_to_first_token_seconds"), "s"),
        Plot("Between two tokens", _quantiles("inter_token_latency_seconds"), "s"),
        Plot("Whole requests", _quantiles("request_duration_seconds"), "s"),
        Plot("In the queue", _quantiles("request_queue_seconds"), "s"),
        Plot("Reading the prompt", _quantiles("request_prefill_seconds"), "s"),
        Plot("Answering", _quantiles("request_decode_seconds"), "s"),
    ],
    "Work": [
        Plot("Tokens a second", [(_rate("generated_tokens_total"), "generated on {{instance}}"),
                                 (_rate("prompt_tokens_total", 'source="prefilled"'), "prefilled on {{instance}}")]),
        Plot("Requests", [(_sum("requests_running"), "running"), (_sum("requests_waiting"), "waiting"),
                          (_sum("requests_running_limit"), "most that run")]),
        Plot("Rows in a step", [(f"{_rate('batch_rows_sum')} / ({_rate('batch_rows_count')} > 0)", "{{instance}}")],
             text="Streams that share a step."),
        Plot("Outcomes", [(_rate("requests_finished_total", by="reason"), "{{reason}}")], "reqps", stacked=True),
        Plot("Refused", [(_rate("admission_refusals_total", by="reason"), "{{reason}}"),
                         (_rate("deadlines_exceeded_total", by="phase"), "deadline: {{phase}}")], "reqps"),
        Plot("HTTP", [(_rate("http_requests_total", by="path, status"), "{{path}} {{status}}")], "reqps"),
        Plot("Prompt length", _quantiles("request_prompt_tokens"), text="Tokens of finished requests."),
        Plot("Answer length", _quantiles("request_generated_tokens"), text="Tokens of finished requests."),
        Plot("Event loop", [
            (f"histogram_quantile(0.99, {_rate('event_loop_lag_seconds_bucket', by='le')})", "99 %"),
            (f"max({_of('event_loop_longest_lag_seconds')})", "longest since the start"),
            (f"max({_of('event_loop_longest_own_lag_seconds')})", "longest without waiting for a core"),
        ], "s", text="Delay of the server's connections."),
    ],
    "Backend and fallbacks": [
        Plot("Servers", [(_of("model_info"), "")], kind="table", span=12, hidden=_INFO),
        Plot("Backends", [(_of("backend_info"), "")], kind="table", span=12, hidden=_INFO),
        Plot("Fallbacks", [(_sum("fallbacks_total", by="instance, from, to, reason"), "")], kind="table",
             hidden=("Time",), text="Backends that failed the probe, their fallbacks, and the reasons."),
        Plot("Checks of the probe", [(f"min by (instance, check) ({_of('probe_check')})", "")], kind="table",
             hidden=("Time",), text="1 passed, 0 failed."),
        Plot("Layers", [(_sum("layers", by="instance, storage"), "")], kind="table", hidden=("Time",)),
        Plot("Attention by path", [(_rate("attention_path_total", by="path"), "{{path}}")], text="Layers per second."),
        Plot("Faults", [(f"increase({_of('kernel_faults_total')}[$__rate_interval])", "{{instance}}"),
                        (_of("raw_shadow_bytes"), "hidden raw copies, bytes")],
             text="Steps that failed or whose results were not numbers. Both must stay 0."),
        Plot("Device memory", [(_sum("device_memory_bytes", 'kind!="total"', by="kind"), "{{kind}}")], "bytes",
             text="MLX's memory: arrays, freed and kept, highest use."),
    ],
    "Sessions and disk": [
        Plot("Sessions", [(_sum("sessions", by="state"), "{{state}}")], stacked=True),
        Plot("Continued states", [(_rate("checkpoint_hits_total", by="kind"), "{{kind}}")], "reqps", stacked=True,
             text="States that turns continued. session: the last turn's end. none: no state. Others: checkpoints."),
        Plot("To disk and back", [(_rate("spilled_bytes_total"), "written"), (_rate("restored_bytes_total"), "read")],
             "Bps"),
        Plot("Sessions written and read", [(_rate("spills_total"), "written"), (_rate("restores_total"), "read"),
                                           (_rate("spill_failures_total"), "not written"),
                                           (_rate("restore_failures_total"), "not read"),
                                           (_rate("session_files_dropped_total"), "deleted: limit"),
                                           (_rate("session_files_refused_total", by="reason"), "refused: {{reason}}")],
             "short", text="Per second."),
        Plot("Sessions between servers", [(_rate("session_handovers_total", by="event"), "{{event}}")], "short",
             text="Per second, in one shared folder."),
        Plot("Time for disk", [(_rate("spill_seconds_total"), "writing"), (_rate("restore_seconds_total"), "reading")],
             "percentunit", text="Share of the engine's time."),
        Plot("Disk", [(_sum("session_disk_bytes"), "sessions"),
                      (_sum("session_disk_limit_bytes"), "limit"),
                      (_sum("session_disk_free_bytes"), "free")], "bytes"),
    ],
    "Ranks": [
        Plot("Processes of a group", [(_of("group_ranks"), "{{instance}}")], span=4, kind="number",
             text="Processes that serve the model together. 1: no group."),
        Plot("Cache by rank", [(_sum("cache_bytes", by="instance, rank"), "{{instance}} {{rank}}")], "bytes", span=6),
        Plot("Device memory by rank", [
            (_sum("device_memory_bytes", 'kind="active"', by="instance, rank"), "{{instance}} {{rank}}"),
        ], "bytes", span=7, text="MLX's arrays: weights and cache."),
        Plot("Since a rank's last step", [(_of("rank_silent_seconds"), "{{instance}} {{rank}}")], "s", span=7),
    ],
}  # fmt: skip


def build() -> str:
    """The dashboard as JSON."""
    board = (
        dashboard.Dashboard("turbocache")
        .uid("turbocache")
        .description("One or more turbocache servers: cache, sessions, latency, fallbacks.")
        .tags(["turbocache", "llm"])
        .refresh("10s")
        .time("now-30m", "now")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .with_variable(dashboard.DatasourceVariable("datasource").label("Source").type("prometheus"))
        .with_variable(_variable("model", "Model", "label_values(turbocache_model_info, model_name)"))
        .with_variable(
            _variable(
                "instance",
                "Server",
                'label_values(turbocache_model_info{model_name=~"$model"}, instance)',
            )
        )
    )
    for title, plots in ROWS.items():
        board.with_row(dashboard.Row(title))
        for plot in plots:
            board.with_panel(_panel(plot))
    return JSONEncoder(sort_keys=True, indent=2).encode(board.build()) + "\n"


def _variable(name: str, label: str, query: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(_SOURCE)
        .query(query)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .include_all(True)
        .all_value(".*")
        .multi(True)
    )


def _panel(plot: Plot) -> Panel:
    panel: Panel
    if plot.kind == "number":
        panel = stat.Panel().reduce_options(ReduceDataOptions().calcs(["lastNotNull"])).height(4)
    elif plot.kind == "table":
        hidden = dict.fromkeys(plot.hidden, True)
        organise = DataTransformerConfig(id_val="organize", options={"excludeByName": hidden})
        panel = table.Panel().with_transformation(organise).height(8)
    else:
        panel = (
            timeseries.Panel()
            .height(8)
            .line_width(1)
            .fill_opacity(25 if plot.stacked else 8)
            .min(0)
            .legend(
                VizLegendOptions()
                .display_mode(LegendDisplayMode.LIST)
                .placement(LegendPlacement.BOTTOM)
                .show_legend(True)
            )
            .tooltip(VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
        )
        if plot.stacked:
            panel = panel.stacking(StackingConfig().mode(StackingMode.NORMAL))
    panel = panel.title(plot.title).description(plot.text).datasource(_SOURCE).unit(plot.unit).span(plot.span)
    if plot.thresholds:
        steps = [
            Threshold(value=None if i == 0 else value, color=color) for i, (value, color) in enumerate(plot.thresholds)
        ]
        panel = panel.thresholds(dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps))
    for i, (expression, legend) in enumerate(plot.queries):
        query = prometheus.Dataquery().expr(expression).legend_format(legend).ref_id(chr(ord("A") + i))
        if plot.kind == "table":
            query = query.instant().format(PromQueryFormat.TABLE)
        panel = panel.with_target(query)
    return panel


if __name__ == "__main__":
    PATH.write_text(build())
