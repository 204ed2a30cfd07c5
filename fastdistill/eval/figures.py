"""Draw the pictures of the report, as PNG bytes: grids of digits, distances against steps, training curves."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from PIL import Image
from torch import Tensor

CLASSES = 10
COLORS = {"teacher": "#b07d4f", "meanflow": "#2c6e8f", "reference": "#9a9a94"}
INK, FAINT = "#33332f", "#6f6f69"
NAMES = {"teacher": "Teacher", "meanflow": "MeanFlow", "real": "Real digits"}
STYLE: dict[str, Any] = {"color": INK, "fontsize": 9}


def draw_panel(images: Tensor, scale: int = 4) -> bytes:
    """Draw images (rows * 10, 1, 8, 8) in [-1, 1] as a grid with ten in each row, dark on light."""
    return _png_of(tile(images, CLASSES, scale))


def draw_headline(groups: Mapping[str, Mapping[str, Tensor]], frechet: Mapping[str, Mapping[str, float]]) -> bytes:
    """Draw a line of twenty digits, with their distance, for each network and number of steps, from the same noise.

    Args:
        groups: {"teacher": {"1": images, ...}, "meanflow": {...}, "real": {"": images}}; images are as in `draw_panel`.
        frechet: {"teacher": {"1": value, ...}, "meanflow": {...}}.
    """
    lines = [(group, steps, images) for group, rows in groups.items() for steps, images in rows.items()]
    gaps = len(groups) - 1
    width, height = 9.0, 0.36 * len(lines) + 0.16 * gaps + 0.42
    figure = Figure(figsize=(width, height), dpi=200, facecolor="white")
    y = height - 0.34
    figure.text(8.86 / width, y / height, "Fréchet", ha="right", va="bottom", color=FAINT, fontsize=8)
    previous = lines[0][0]
    for group, steps, images in lines:
        y -= 0.36 + (0.16 if group != previous else 0)
        previous = group
        axes = figure.add_axes((1.62 / width, y / height, 6.6 / width, 0.33 / height))
        axes.imshow(tile(images[: 2 * CLASSES], 2 * CLASSES, 4), cmap="gray", vmin=0, vmax=255)
        axes.set_axis_off()
        label = f"{NAMES[group]}, {steps} step{'s' * (steps != '1')}" if steps else NAMES[group]
        middle = (y + 0.165) / height
        color = COLORS.get(group, INK)
        figure.text(1.5 / width, middle, label, ha="right", va="center", color=color, fontsize=9)
        if steps:
            value = f"{frechet[group][steps]:.1f}"
            figure.text(8.86 / width, middle, value, ha="right", va="center", color=color, fontsize=9)
    return png_of_figure(figure)


def draw_distances(frechet: Mapping[str, Mapping[str, float]], references: Mapping[str, float]) -> bytes:
    """Draw the Fréchet distance against the number of steps on logarithmic axes, with the references as lines."""
    figure = Figure(figsize=(6.4, 3.3), dpi=160, layout="constrained", facecolor="white")
    axes = figure.add_subplot(xscale="log", yscale="log")
    tidy(axes, "steps", "Fréchet distance")
    for name, value in references.items():
        axes.axhline(value, color=COLORS["reference"], linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
        axes.annotate(
            name, (1.0, value), xycoords=("axes fraction", "data"), xytext=(4, 0), textcoords="offset points",
            va="center", color=FAINT, fontsize=8, annotation_clip=False,
        )  # fmt: skip
    for group, rows in frechet.items():
        steps = [int(number) for number in rows]
        axes.plot(
            steps, list(rows.values()), "o-", color=COLORS[group], markersize=5, linewidth=1.6, label=NAMES[group]
        )
    ticks = sorted({int(number) for rows in frechet.values() for number in rows})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:g}")
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    return png_of_figure(figure)


def draw_curves(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> bytes:
    """Draw loss, raw error and tangent norm of each run against the step, in a panel each."""
    figure = Figure(figsize=(10, 2.7), dpi=160, layout="constrained", facecolor="white")
    panels = {"loss": "loss", "raw_error": "raw error, a pixel", "tangent_norm": "norm of du/dt, a pixel"}
    for place, (metric, title) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), place, yscale="log")
        tidy(axes, "step", "")
        axes.set_title(title, color=INK, fontsize=10, loc="left")
        for run in [run for run in curves if metric in curves[run][-1]]:
            steps = [point["step"] for point in curves[run]]
            axes.plot(steps, [point[metric] for point in curves[run]], color=COLORS[run], label=NAMES[run])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    return png_of_figure(figure)


def tidy(axes: Axes, x: str, y: str) -> None:
    """Name the axes, and remove lines that no reader needs."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#c9c9c3")
    axes.tick_params(colors=FAINT, labelsize=8, color="#c9c9c3")
    axes.set_xlabel(x, **STYLE)
    axes.set_ylabel(y, **STYLE)


def tile(images: Tensor, columns: int, scale: int) -> Any:
    """Return a grid of images as gray levels (H, W) uint8 in a numpy array, dark on white.

    Each pixel becomes a square of `scale` pixels, and the gap between images is as wide.
    """
    ink = ((1 - images.float().cpu().clamp(-1, 1)) * 127.5).round().byte()
    ink = ink.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    ink = torch.nn.functional.pad(ink, (0, scale, 0, scale), value=255)
    rows = ink.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2).flatten(2, 4).flatten(0, 1)
    return rows[:-scale, :-scale].numpy()


def _png_of(pixels: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def png_of_figure(figure: Figure) -> bytes:
    """Return a figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
