"""The two figures of an evaluation, as PNG and SVG."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from turbocache.documents import figure_class, save_figures

_FAMILIES = (
    ("mlx-lm", "s", "tab:red"),
    ("mlx-vlm", "^", "tab:green"),
    ("kvarn", "D", "tab:orange"),
    ("", "o", "tab:blue"),
)


def draw(results: dict[str, Any], folder: Path) -> list[str]:
    """Draw the figures of a document. Returns the PNG files' names. Raises PlotsUnavailable and DocumentError."""
    figure = figure_class("eval")
    return save_figures({"kld": _divergence(figure, results), "needles": _needles(figure, results)}, folder)


def _divergence(new_figure: Any, results: dict[str, Any]) -> Any:
    """Mean KL divergence against stored bits, both on logarithmic axes."""
    rows = [
        row for row in results["rows"] if row.get("kld_mean") and row["kld_mean"] > 1e-9 and row.get("stored_bits_half")
    ]
    if not rows:
        return None
    figure = new_figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    for start, marker, colour in _FAMILIES:
        mine = [row for row in rows if _family(row["preset"]) == start]
        if mine:
            bits, kld = ([row[name] for row in mine] for name in ("stored_bits_half", "kld_mean"))
            axes.plot(bits, kld, marker, color=colour, label=start or "turbocache")
            for row, x, y in zip(mine, bits, kld, strict=True):
                axes.annotate(
                    row["preset"], (x, y), xytext=(5, 4), textcoords="offset points", fontsize=7, color=colour
                )
    axes.set(xscale="log", yscale="log", xlabel="bits a value, everything counted (half precision)")
    axes.set(
        ylabel="mean KL divergence (nats)", title=f"{results['model']}, context {results['context']}, {results['text']}"
    )
    ticks = [2, 3, 4, 5, 6, 8, 10, 12, 16]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _needles(new_figure: Any, results: dict[str, Any]) -> Any:
    """A heat map of recall for each row. Contexts are columns, depths are rows."""
    rows = [row for row in results["rows"] if any(context.isdigit() for context in row.get("needle_cells", ()))]
    if not rows:
        return None
    across = min(3, len(rows))
    down = -(-len(rows) // across)
    figure = new_figure(figsize=(3.4 * across + 1, 2.1 * down + 0.6), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).flatten()
    image = None
    for panel, row in zip(panels, rows, strict=False):
        image = _heat_map(panel, row)
    for panel in panels[len(rows) :]:
        panel.set_axis_off()
    figure.colorbar(image, ax=panels.tolist(), label="recall")
    figure.suptitle(f"Needle recall, {results['model']}: context (tokens) across, depth down")
    return figure


def _heat_map(panel: Any, row: dict[str, Any]) -> Any:
    cells = {context: counts for context, counts in row["needle_cells"].items() if context.isdigit()}
    contexts = sorted(cells, key=int)
    depths = sorted({depth for counts in cells.values() for depth in counts})
    shares = [[_share(cells[context].get(depth)) for context in contexts] for depth in depths]
    image = panel.imshow(shares, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    panel.set_xticks(range(len(contexts)), contexts, fontsize=8)
    panel.set_yticks(range(len(depths)), depths, fontsize=8)
    panel.set_title(row["preset"], fontsize=9)
    for i, depth in enumerate(depths):
        for j, context in enumerate(contexts):
            if depth in cells[context]:
                colour = "black" if 0.2 < shares[i][j] < 0.8 else "white"
                label = "{}/{}".format(*cells[context][depth])
                panel.text(j, i, label, ha="center", va="center", fontsize=7, color=colour)
    return image


def _share(counts: Sequence[int] | None) -> float:
    return counts[0] / counts[1] if counts else float("nan")


def _family(name: str) -> str:
    return next(start for start, _, _ in _FAMILIES if name.startswith(start))
