"""Draw pictures of trained networks for docs/methods.md: the ring by each method, ReFlow's straightening, digits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from torch import Tensor

from fastdistill import samplers
from fastdistill.data import Digits, generator_at
from fastdistill.eval.exact import Ring
from fastdistill.eval.figures import FAINT, INK, tile
from fastdistill.eval.ring import exact_flow, score_points
from fastdistill.train import load_run
from fastdistill.train.sampling import NUMBERS, OWN, draw, generate

# Each mode has a hue, which goes around as the ring does; the first and the fifth are the student's and the teacher's.
MODES = ("#2c6e8f", "#4f9a94", "#8aae6a", "#c9a94a", "#b07d4f", "#a9502f", "#8a5a83", "#5a6aa0")
LIMIT = 3.2


def modes_of(x: Tensor) -> list[str]:
    """Return for each point (N, 2) the colour of its nearest mode."""
    return [MODES[i] for i in torch.cdist(x, Ring().means.to(x)).argmin(1).tolist()]


def plane(figure: Figure, place: tuple[float, float, float, float], limit: float = LIMIT) -> Axes:
    """Return square axes of the plane without frame or ticks."""
    axes = figure.add_axes(place)
    axes.set_xlim(-limit, limit)
    axes.set_ylim(-limit, limit)
    axes.set_aspect("equal")
    axes.set_axis_off()
    return axes


def dots(axes: Axes, x: Tensor, **style: Any) -> None:
    """Draw points (N, 2), with the keywords of `Axes.scatter`."""
    axes.scatter(x[:, 0].numpy(), x[:, 1].numpy(), **style)


@torch.no_grad()
def draw_ring_methods(runs: Mapping[str, Path], count: int = 700) -> Figure:
    """Draw every method at each number of steps, from the same noise, in the colours of where the exact flow ends.

    A point of the wrong colour went to another mode. So the picture shows a method that draws modes together; a sampler
    that renoises mixes colours on purpose. The number in a panel is SW2, the distance of the laws. A blank panel was
    not learnt.
    """
    columns, size, label = 2, 0.92, 1.35
    lines = -(-len(runs) // columns)
    width, height = columns * (label + size * len(NUMBERS)) + 0.1, size * lines + 0.3
    figure = Figure(figsize=(width, height), dpi=110, facecolor="white")
    for place, (name, run) in enumerate(runs.items()):
        net, config = load_run(run, device="cpu")
        x1 = torch.randn(count, 2, generator=generator_at(0, "picture"))
        exact = exact_flow(x1, config.path.build())
        column, line = divmod(place, lines)
        left, bottom = column * (label + size * len(NUMBERS)), height - 0.3 - size * (line + 1)
        middle = (bottom + size / 2) / height
        figure.text((left + label - 0.08) / width, middle, name, ha="right", va="center", fontsize=8, color=INK)
        learnt = OWN.resolve(config).measured_steps(config)
        for index, number in enumerate(NUMBERS):
            corner = (left + label + size * index) / width
            axes = plane(figure, (corner, bottom / height, size / width, size / height), limit=3.0)
            if line == 0:
                axes.set_title(f"{number} step{'s' * (number > 1)}", fontsize=8, color=FAINT, pad=2)
            if number not in learnt:
                continue
            x = draw(net, config, x1, None, number)
            dots(axes, x, s=1.6, c=modes_of(exact), linewidths=0, alpha=0.8)
            distance = f"{score_points(x, exact, 0.0)['sliced_wasserstein']:.2f}"
            box = {"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.8}
            axes.text(0, 0, distance, ha="center", va="center", fontsize=6.5, color=INK, bbox=box)
    return figure


@torch.no_grad()
def draw_reflow(before: Path, after: Path, count: int = 60, parts: int = 64) -> Figure:
    """Draw trajectories of the velocity before and after ReFlow, from the same noise, and where one Euler step ends."""
    figure = Figure(figsize=(7.0, 3.3), dpi=120, facecolor="white")
    x1 = torch.randn(count, 2, generator=generator_at(0, "picture"))
    for place, (run, name) in enumerate(((before, "flow matching"), (after, "ReFlow"))):
        net, _ = load_run(run, device="cpu")
        stops = follow(samplers.guided(net), x1, parts)
        colors = modes_of(stops[-1])
        axes = plane(figure, (0.5 * place + 0.01, 0.06, 0.48, 0.84), limit=2.9)
        lines = list(stops.transpose(0, 1).numpy())
        axes.add_collection(LineCollection(lines, colors=colors, linewidths=0.9, alpha=0.75))
        dots(axes, stops[-1], s=9, c=colors, linewidths=0)
        one = samplers.euler(samplers.guided(net), x1, 1)
        dots(axes, one, s=16, marker="x", c=colors, linewidths=0.9)
        axes.set_title(f"{name}: straightness S = {straightness(stops):.2f}", fontsize=10, color=INK, pad=4)
    words = "lines: trajectories from noise to dots    crosses: one Euler step from the same noise"
    figure.text(0.5, 0.025, words, ha="center", fontsize=8.5, color=FAINT)
    return figure


def follow(velocity: samplers.Velocity, x1: Tensor, parts: int) -> Tensor:
    """Return the points (parts + 1, N, 2) of the Heun solution from t = 1 to 0 at equal times."""
    points, width = [x1], 1 / parts
    for i in range(parts):
        t, s = (x1.new_full((len(x1),), 1 - (i + k) * width) for k in (0, 1))
        v = velocity(points[-1], t)
        points.append(points[-1] - width * 0.5 * (v + velocity(points[-1] - width * v, s)))
    return torch.stack(points)


def straightness(stops: Tensor) -> float:
    """Return S along trajectories (T + 1, N, D) at equal times: the mean square of chord minus velocity."""
    velocities = (stops[:-1] - stops[1:]) * (len(stops) - 1)
    chord = stops[0] - stops[-1]
    return float((velocities - chord).square().sum(-1).mean())


@torch.no_grad()
def draw_digit_methods(runs: Mapping[str, Path]) -> Figure:
    """Draw ten digits of every method at each number of steps, from the same noise, with real digits below.

    A blank panel was not learnt.
    """
    digits, label, size, gap = Digits(), 1.45, 2.1, 0.12
    width, height = label + (size + gap) * len(NUMBERS), 0.235 * (len(runs) + 1) + 0.4
    figure = Figure(figsize=(width, height), dpi=110, facecolor="white")
    real = torch.stack([digits.x[digits.y == k][0] for k in range(digits.num_classes)])
    for line, name in enumerate([*runs, "real digits"]):
        y = (height - 0.3 - 0.235 * (line + 1) - 0.06 * (line == len(runs))) / height
        figure.text((label - 0.08) / width, y + 0.1 / height, name, ha="right", va="center", fontsize=8, color=INK)
        panels = {1: real}
        if name in runs:
            net, config = load_run(runs[name], device="cpu")
            learnt = OWN.resolve(config).measured_steps(config)
            panels = {number: generate(net, config, 80, steps=number).cpu()[: digits.num_classes] for number in learnt}
        for number, images in panels.items():
            column = NUMBERS.index(number)
            place = ((label + (size + gap) * column) / width, y, size / width, 0.21 / height)
            axes = figure.add_axes(place)
            axes.imshow(tile(images, digits.num_classes, 3), cmap="gray", vmin=0, vmax=255)
            axes.set_axis_off()
            if line == 0:
                axes.set_title(f"{number} step{'s' * (number > 1)}", fontsize=8, color=FAINT, pad=3)
    return figure
