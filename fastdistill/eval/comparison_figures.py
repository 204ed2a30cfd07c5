"""Draw the pictures of a comparison, as PNG bytes: quality by steps, quality against cost, samples, and curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from torch import Tensor

from fastdistill.data.pictures import tile_images
from fastdistill.eval.figures import FAINT, INK, png_of_figure, tidy, tile

COLORS = {"1": "#2c6e8f", "2": "#4f9d8f", "4": "#c59a3f", "8": "#b0603f"}
SHOWN = 20  # images in a panel, for one method and one number of steps


def draw_quality(
    rows: Mapping[str, Any], metric: str, name: str, references: Mapping[str, Mapping[str, float]]
) -> bytes:
    """Draw a line for each method with a dot for each number of steps; bars are one standard deviation over seeds."""
    figure = Figure(figsize=(8, 0.34 * len(rows) + 1.3), dpi=160, layout="constrained", facecolor="white")
    axes = figure.add_subplot(xscale="log")
    tidy(axes, f"{name}, lower is better", "")
    for place, row in enumerate(rows.values()):
        for steps, quality in row["quality"].items():
            spread = quality[metric]
            axes.errorbar(spread["mean"], place, xerr=spread["std"] or None, fmt="o", color=COLORS[steps], markersize=6)
    for steps, color in COLORS.items():
        axes.plot([], [], "o", color=color, markersize=6, label=f"{steps} step{'s' * (steps != '1')}")
    for reference, row in references.items():
        if reference in ("data", "held_out"):
            axes.axvline(row[metric], color=FAINT, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
            axes.annotate(reference.replace("_", " "), (row[metric], -0.8), color=FAINT, fontsize=7, ha="center")
    _plain_numbers(axes.xaxis)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(len(rows) - 0.4, -1)
    axes.grid(axis="y", color="#eeede8")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, loc="upper right")
    return png_of_figure(figure)


def draw_cost(rows: Mapping[str, Any], metric: str, name: str) -> bytes:
    """Draw quality in one step against the time of a training step; the lower left corner is the best place."""
    figure = Figure(figsize=(8, 5), dpi=160, layout="constrained", facecolor="white")
    axes = figure.add_subplot(yscale="log")
    tidy(axes, "ms a training step", f"{name} at one step")
    for method, row in rows.items():
        x, y = 1000 * row["cost"]["seconds_per_step"]["mean"], row["quality"]["1"][metric]["mean"]
        follows = row["settings"]["teacher"]
        axes.plot(x, y, "s" if follows else "o", color=COLORS["8" if follows else "1"], markersize=6)
        axes.annotate(method, (x, y), xytext=(5, 3), textcoords="offset points", fontsize=7.5, color=INK)
    _plain_numbers(axes.yaxis)
    axes.plot([], [], "o", color=COLORS["1"], label="from data")
    axes.plot([], [], "s", color=COLORS["8"], label="from a teacher")
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    return png_of_figure(figure)


def draw_samples(grids: Mapping[str, Mapping[str, Tensor]]) -> bytes:
    """Draw samples of every method at every number of steps, all from the same noise: points, or lines of images.

    A number of steps that a method doesn't have is left blank.
    """
    columns = sorted({steps for panels in grids.values() for steps in panels}, key=int)
    is_points = next(iter(next(iter(grids.values())).values())).ndim == 2  # Images fill a flat line, points a square.
    width, height = (1.35, 1.35) if is_points else (2.6, 0.34)
    size = (1.6 + width * len(columns), 0.4 + height * len(grids))
    figure = Figure(figsize=size, dpi=130, facecolor="white")
    for line, (method, panels) in enumerate(grids.items()):
        y = 1 - (0.35 + height * (line + 1)) / size[1]
        figure.text(1.5 / size[0], y + 0.5 * height / size[1], method, ha="right", va="center", fontsize=8, color=INK)
        for column, steps in enumerate(columns):
            x = (1.6 + width * column) / size[0]
            axes = figure.add_axes((x, y, 0.96 * width / size[0], 0.94 * height / size[1]))
            axes.set_axis_off()
            if steps in panels:
                _draw_panel(axes, panels[steps], is_points)
            if line == 0:
                axes.set_title(f"{steps} step{'s' * (steps != '1')}", fontsize=8, color=FAINT)
    return png_of_figure(figure)


def draw_curves(curves: Mapping[str, Sequence[Mapping[str, float]]], columns: int = 5) -> bytes:
    """Draw raw error and tangent norm of each method against the step, a panel each; a loss often hides both."""
    lines = -(-len(curves) // columns)
    figure = Figure(figsize=(2.3 * columns, 1.75 * lines), dpi=130, layout="constrained", facecolor="white")
    shown = {"raw_error": COLORS["1"], "tangent_norm": COLORS["8"]}
    for place, (method, points) in enumerate(curves.items(), start=1):
        axes = figure.add_subplot(lines, columns, place, yscale="log")
        tidy(axes, "", "")
        axes.set_title(method, fontsize=8.5, color=INK, loc="left")
        for metric, color in shown.items():
            seen = [point for point in points if point.get(metric, 0) > 0]
            if seen:
                axes.plot([p["step"] for p in seen], [p[metric] for p in seen], color=color, linewidth=1)
        _plain_numbers(axes.yaxis)
        axes.tick_params(labelsize=6)
    for metric, color in shown.items():  # The legend shows both, even if the first method has only one.
        figure.axes[0].plot([], [], color=color, linewidth=1, label=metric)
    figure.axes[0].legend(frameon=False, fontsize=6, labelcolor=INK)
    return png_of_figure(figure)


def _plain_numbers(axis: Axis) -> None:
    """Label a logarithmic axis with plain numbers instead of powers of ten."""
    axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def _draw_panel(axes: Axes, samples: Tensor, is_points: bool) -> None:
    if is_points and samples.shape[1] == 2:
        limit = max(3.0, 1.3 * samples.abs().quantile(0.9).item())
        axes.scatter(samples[:, 0], samples[:, 1], s=0.6, alpha=0.5, linewidths=0, color=COLORS["1"])
        axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    elif samples.ndim == 4 and samples.shape[1] in (1, 3):
        shown = samples[:SHOWN]
        if samples.shape[1] == 1:
            axes.imshow(tile(shown, len(shown), 3), cmap="gray", vmin=0, vmax=255)
        else:
            axes.imshow(tile_images(shown, len(shown), 1))
    else:
        axes.text(0.5, 0.5, "no picture", ha="center", va="center", fontsize=7, color=FAINT)
