"""Draw the pictures of a benchmark report, as SVG that reads well on a light and on a dark page, also in a README.

Text stays text, in the reader's own font. It is laid out with DejaVu Sans, which is wider than most fonts. Ink, grid
and paper change with the reader's color scheme by a style sheet inside the file; the colors of the curves suit both
schemes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

from fastdistill.benchmarks.ops.timed_op import FLOOR, OURS, PEER
from fastdistill.benchmarks.report.records import Record
from fastdistill.benchmarks.report.series import LENGTHS, MODE_NAMES, Curve, Series, Throughput, arithmetic

INK, FAINT, GRID, PAPER = "#2a2a27", "#6f6f69", "#dddcd6", "#ffffff"
DARK = {INK: "#eceae4", FAINT: "#a3a29b", GRID: "#3a3a37", PAPER: "#1b1b19"}
# Each has a contrast of at least 3:1 with both papers.
COLORS = {
    OURS: ("#2e86c1", "#1a9a82", "#6f78d6"),
    PEER: ("#c4762b", "#c2566a", "#8f8a1f", "#9a6bc4", "#a5704f", "#5f9140"),
    FLOOR: ("#85857f", "#6d8a9c", "#9c7f8a", "#7f8f6d"),
}
MARKERS = {OURS: "oDs", PEER: "^vPX<>", FLOOR: ".+|_"}
MARKED = {"oom": ("x", "out of memory"), "failed parity": ("d", "failed parity"), "error": ("1", "error")}
SIZE = 9
WIDTH = 3.1  # The width of a panel in inches.


class Look(NamedTuple):
    """Describe how a provider is drawn, the same in all pictures."""

    color: str
    marker: str
    dashed: bool
    width: float


def looks(records: Iterable[Record]) -> dict[str, Look]:
    """Return a look for each provider; the providers of a kind take its colors in the order in which they come."""
    found: dict[str, Look] = {}
    count = dict.fromkeys(COLORS, 0)
    for record in records:
        if record.key.provider not in found:
            i, kind = count[record.kind], record.kind
            color, marker = COLORS[kind][i % len(COLORS[kind])], MARKERS[kind][i % len(MARKERS[kind])]
            found[record.key.provider] = Look(color, marker, kind == FLOOR, 2.2 if kind == OURS else 1.3)
            count[kind] += 1
    return found


def draw_series(series: Series, look: Mapping[str, Look]) -> str:
    """Draw throughput above and memory below, against the length, both logarithmic, with a column for each mode.

    If a provider ran out of memory, failed parity or ended in an error, a mark under that length says so, on a line of
    its own for each provider. So a curve that ends says why.
    """
    modes = list(series.panels)
    lost = _lost(series)
    memory = any(_memory(record) for _, record in _records(series))
    shown = [name for name in look if name in _drawn(series)]
    heights = [2.0, *([2.0] if memory else []), *([0.17 * len(lost) + 0.06] if lost else [])]
    legend_rows = math.ceil((len(shown) + len(MARKED)) / _legend_columns(shown, len(modes)))
    figure = _figure(WIDTH * len(modes) + 0.75, sum(heights) + 0.25 * len(heights) + 0.75 + 0.2 * legend_rows)
    grid = figure.add_gridspec(len(heights), len(modes), height_ratios=heights)
    ticks = sorted({n for curves in series.panels.values() for curve in curves for n in curve.records})
    panel_rows: list[list[Axes]] = [[] for _ in heights]
    for column, mode in enumerate(modes):
        top = None
        for i in range(len(heights)):
            share = {"sharex": top, "sharey": panel_rows[i][0] if panel_rows[i] else None}
            axes = figure.add_subplot(grid[i, column], **share)
            top = top or axes
            panel_rows[i].append(axes)
            _tidy(axes)
            if column:
                axes.tick_params(labelleft=False)
        curves = series.panels[mode]
        panel_rows[0][-1].set_title(MODE_NAMES.get(mode, mode), color=INK, fontsize=SIZE + 1, loc="left")
        _plot(panel_rows[0][-1], curves, look, series.throughput.of)
        if memory:
            _plot(panel_rows[1][-1], curves, look, _memory)
        if lost:
            _mark(panel_rows[-1][-1], curves, look, lost, named=column == 0)
        _length_ticks(panel_rows[0][-1], ticks)
        for axes in (panels[-1] for panels in panel_rows[:-1]):
            axes.tick_params(labelbottom=False)
        panel_rows[-1][-1].set_xlabel(LENGTHS[series.length], color=INK, fontsize=SIZE)
    panel_rows[0][0].set_ylabel(series.throughput.unit, color=INK, fontsize=SIZE)
    if memory:
        panel_rows[1][0].set_ylabel("peak memory, MiB", color=INK, fontsize=SIZE)
    for panels in panel_rows[: 1 + memory]:
        _value_ticks(panels)
    statuses = {record.status for _, record in _records(series)}
    _legend(figure, shown, look, len(modes), [mark for status, mark in MARKED.items() if status in statuses])
    return _svg(figure, f"{series.title}: {series.throughput.unit} and memory against {LENGTHS[series.length]}")


def draw_roofline(records: Sequence[Record], ceilings: Mapping[str, float], look: Mapping[str, Look]) -> str | None:
    """Draw the attained operations a second against operations a byte, under the ceilings; None without records.

    Args:
        ceilings: "tflops" of a large matmul, "gbs" of a copy. An absent one is not drawn, and the picture says so.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    throughput = arithmetic(records)
    for record in records:
        flops, moved = record.number("flops"), record.number("bytes")
        if record.median is not None and flops and moved:
            attained = flops / record.median * 1e-12 * throughput.factor
            points.setdefault(record.key.provider, []).append((flops / moved, attained))
    if not points:
        return None
    shown = [name for name in look if name in points]
    figure = _figure(7.2, 4.1 + 0.2 * math.ceil(len(shown) / _legend_columns(shown, 2)))
    axes = figure.add_subplot(xscale="log", yscale="log")
    _tidy(axes)
    for name in shown:
        axes.plot(*zip(*points[name]), look[name].marker, color=look[name].color, markersize=5.5, alpha=0.85)
    xs = [x for group in points.values() for x, _ in group]
    ys = [y for group in points.values() for _, y in group]
    low, high = min(xs) / 3, max(xs) * 3
    tops = _roof(axes, ceilings, throughput, low, high)
    axes.set_xlim(low, high)
    axes.set_ylim(min(ys) / 3, max([*ys, *tops]) * 3)
    axes.set_xlabel("flops a byte that has to be moved", color=INK, fontsize=SIZE)
    axes.set_ylabel(throughput.unit, color=INK, fontsize=SIZE)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(numticks=8))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter("{x:,.12g}")
    _legend(figure, shown, look, 2)
    return _svg(figure, f"Roofline: attained {throughput.unit} against flops a byte")


def _roof(axes: Axes, ceilings: Mapping[str, float], throughput: Throughput, low: float, high: float) -> list[float]:
    """Draw the ceilings that were measured, name those that were not, and return their heights."""
    flat, gbs = ceilings.get("tflops"), ceilings.get("gbs")
    # The slope of the line that the copy bandwidth allows.
    slope = None if gbs is None else gbs * 1e-3 * throughput.factor
    flat = None if flat is None else flat * throughput.factor
    ridge = high if flat is None or slope is None else min(max(flat / slope, low), high)
    style: dict[str, Any] = {"color": FAINT, "linewidth": 1.2, "linestyle": (0, (5, 3)), "zorder": 0}
    said, tops = [], []
    if slope is not None:
        axes.plot([low, ridge], [low * slope, ridge * slope], **style)
        said.append(f"copy {gbs:,.4g} GB/s, measured")
        tops.append(ridge * slope)
    if flat is not None:
        axes.plot([low if slope is None else ridge, high], [flat] * 2, **style)
        said.append(f"matmul {flat:,.4g} {throughput.unit}, measured")
        tops.append(flat)
    absent = [name for name, value in (("copy bandwidth", slope), ("matmul throughput", flat)) if value is None]
    said += [f"{name} not measured, so not drawn" for name in absent]
    axes.set_title("Ceilings: " + "; ".join(said), color=FAINT, fontsize=SIZE - 0.5, loc="left")
    return tops


def _records(series: Series) -> Iterator[tuple[str, Record]]:
    """Yield every record of a series, with its provider."""
    for curves in series.panels.values():
        for curve in curves:
            yield from ((curve.provider, record) for record in curve.records.values())


def _lost(series: Series) -> list[str]:
    """Return the providers that have a failure to mark."""
    return list(dict.fromkeys(provider for provider, record in _records(series) if record.status in MARKED))


def _drawn(series: Series) -> set[str]:
    """Return the providers that have a time or a failure to show."""
    return {provider for provider, record in _records(series) if record.median is not None or record.status in MARKED}


def _memory(record: Record) -> float | None:
    peak = record.number("peak_memory_bytes")
    return None if not peak else peak / 2**20


def _plot(axes: Axes, curves: Sequence[Curve], look: Mapping[str, Look], value: Any) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for curve in reversed(curves):  # Reversed, so that ours is drawn on top.
        points = [(n, y) for n, record in curve.records.items() if (y := value(record))]
        if points:
            style = look[curve.provider]
            axes.plot(
                *zip(*points), marker=style.marker, color=style.color, linewidth=style.width, markersize=5,
                linestyle=_dashes(style),
            )  # fmt: skip


def _dashes(look: Look) -> Any:
    return (0, (4, 2)) if look.dashed else "-"


def _mark(axes: Axes, curves: Sequence[Curve], look: Mapping[str, Look], lost: Sequence[str], named: bool) -> None:
    for curve in curves:
        for n, record in curve.records.items():
            if record.status in MARKED:
                axes.plot(
                    n, lost.index(curve.provider), marker=MARKED[record.status][0], color=look[curve.provider].color,
                    markersize=5.5, markeredgewidth=1.6, linestyle="",
                )  # fmt: skip
    axes.set_ylim(len(lost) - 0.4, -0.6)
    axes.yaxis.set_major_locator(FixedLocator([]))
    if named:
        axes.set_ylabel("lost", color=INK, fontsize=SIZE, rotation=0, ha="right", va="center")


def _length_ticks(axes: Axes, lengths: Sequence[int]) -> None:
    """Choose at most six of the lengths, spread evenly over the logarithmic axis."""
    low, high = math.log2(lengths[0]), math.log2(lengths[-1])
    chosen: list[int] = []
    for n in lengths:
        if not chosen or math.log2(n / chosen[-1]) >= (high - low) / 5.5:
            chosen.append(n)
    axes.set_xticks(chosen, [f"{n // 1024}k" if n % 1024 == 0 else str(n) for n in chosen])
    axes.xaxis.set_minor_locator(NullLocator())
    margin = 2 ** ((high - low) * 0.06 + 0.1)
    axes.set_xlim(lengths[0] / margin, lengths[-1] * margin)


def _value_ticks(panels: Sequence[Axes]) -> None:
    """Choose few ticks, but at least two, for the logarithmic axis that a line of panels shares."""
    axes = panels[0]
    low, high = axes.get_ylim()
    decades = math.log10(high / low)
    subs = (1,) if decades > 2.5 else (1, 3) if decades > 1.2 else (1, 2, 5) if decades > 0.6 else (1, 1.5, 2, 3, 5, 7)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:,.12g}")


def _figure(width: float, height: float) -> Figure:
    layout = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.04, hspace=0.03)
    return Figure(figsize=(width, height), layout=layout, facecolor=PAPER)


def _tidy(axes: Axes) -> None:
    axes.set_facecolor(PAPER)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=FAINT, labelsize=SIZE - 1, color=GRID, which="both")


def _legend_columns(names: Sequence[str], panels: int) -> int:
    """Return how many names fit beside each other, by the longest name."""
    return max(1, int(WIDTH * panels / (0.55 + 0.075 * max(map(len, names)))))


def _legend(
    figure: Figure,
    names: Sequence[str],
    look: Mapping[str, Look],
    panels: int,
    marks: Sequence[tuple[str, str]] = (),
) -> None:
    handles = []
    for name in names:
        style: dict[str, Any] = {"color": look[name].color, "marker": look[name].marker, "linewidth": look[name].width}
        handles.append(Line2D([], [], linestyle=_dashes(look[name]), label=name, **style))
    handles += [Line2D([], [], color=FAINT, marker=mark, linestyle="", label=label) for mark, label in marks]
    figure.legend(
        handles=handles, loc="outside lower left", ncols=_legend_columns(names, panels), frameon=False,
        fontsize=SIZE - 0.5, labelcolor=INK,
    )  # fmt: skip


def _svg(figure: Figure, title: str) -> str:
    """Write the figure as SVG; the same picture gives the same bytes, because dates and random names are left out."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastdistill"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Title": title})
    return _two_schemes(buffer.getvalue())


def _two_schemes(svg: str) -> str:
    """Add a style sheet to a picture drawn for light paper, so that it turns dark with its reader."""
    rules = "".join(
        f'[style*="{name}: {light}"] {{ {name}: {dark} !important; }}\n'
        for light, dark in DARK.items()
        for name in ("fill", "stroke")
    )
    fonts = "text { font-family: ui-sans-serif, system-ui, 'Segoe UI', Helvetica, Arial, sans-serif !important; }"
    sheet = f"<style>\n{fonts}\n@media (prefers-color-scheme: dark) {{\n{rules}}}\n</style>\n"
    start = svg.index("<defs>")
    return svg[:start] + sheet + svg[start:]
