"""Draw the figures of docs/methods.md: the exact flow of the ring, and the networks that `make evidence` trained.

    python -m fastdistill.benchmarks.methods.method_figures                          # the figures that need no training
    python -m fastdistill.benchmarks.methods.method_figures --runs runs/evidence     # all of them, from finished runs

Every picture is drawn from samples of an exact law or of a trained network; nothing is sketched.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import torch
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from fastdistill import samplers
from fastdistill.benchmarks.methods import evidence_tables as tables
from fastdistill.benchmarks.methods import run_figures
from fastdistill.benchmarks.methods.run_figures import dots, follow, modes_of, plane
from fastdistill.benchmarks.run.environment import ROOT
from fastdistill.eval.exact import Ring
from fastdistill.eval.figures import FAINT, INK
from fastdistill.train.methods import METHODS

FOLDER = ROOT / "docs" / "figures"
EXACT, EULER, JUMP = "#c9c9c3", "#b07d4f", "#2c6e8f"
COLORS_PER_PNG = 48


def main() -> None:
    """Draw what can be drawn, and print each file with its size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder (default: %(default)s)")
    parser.add_argument("--runs", type=Path, help="finished runs, as `make evidence` leaves them in runs/evidence")
    args = parser.parse_args()
    draw_all(args.out, args.runs)
    if args.out == FOLDER:  # The article shows the figures that exist.
        text = tables.ARTICLE.read_text(encoding="utf-8")
        tables.ARTICLE.write_text(tables.fill_article(text, tables.read_summary()), encoding="utf-8")


def draw_all(out: Path, runs: Path | None = None) -> None:
    """Write into `out` the figures of exact flows and, for finished runs, those of networks."""
    out.mkdir(parents=True, exist_ok=True)
    save(draw_paths(), out / "paths.png")
    save(draw_jumps(), out / "jumps.png")
    if runs is None:
        return
    ring, digits = (find_runs(runs / data / "seed0") for data in ("ring", "digits"))
    if ring:
        save(run_figures.draw_ring_methods(ring), out / "ring_methods.png")
    if {"flow_matching", "reflow"} <= set(ring):
        save(run_figures.draw_reflow(ring["flow_matching"], ring["reflow"]), out / "reflow.png")
    if digits:
        save(run_figures.draw_digit_methods(digits), out / "digits_methods.png")


def find_runs(folder: Path) -> dict[str, Path]:
    """Return the finished runs of a folder by method, in the order of the registry."""
    return {name: folder / name for name in METHODS if (folder / name / "export" / "ema.safetensors").is_file()}


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG, and print its size."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    save_png(buffer.getvalue(), path)
    print(f"{path} {path.stat().st_size / 1024:.0f} KB")


def save_png(png: bytes, path: Path) -> None:
    """Write a PNG with a palette of its own, at about a third of the size."""
    image = Image.open(io.BytesIO(png)).convert("RGB").quantize(COLORS_PER_PNG, dither=Image.Dither.NONE)
    image.save(path, optimize=True)


def noise(count: int, seed: int = 0) -> Tensor:
    """Draw standard normal points (count, 2) in float64."""
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw_paths(count: int = 1600) -> Figure:
    """Draw the exact flow from noise to data at five moments; each point has the colour of its final mode."""
    ring, x1 = Ring(), noise(count)
    path = follow(ring.velocity, x1, 200)
    colors = modes_of(path[-1])
    moments = (1.0, 0.75, 0.5, 0.25, 0.0)
    figure = Figure(figsize=(11, 2.45), dpi=120, facecolor="white")
    for place, t in enumerate(moments):
        axes = plane(figure, (place / 5 + 0.004, 0.0, 0.192, 0.87))
        now = round((1 - t) * (len(path) - 1))
        axes.add_collection(tails(path[max(0, now - 30) : now + 1, :120], colors[:120]))
        dots(axes, path[now], s=2.2, c=colors, linewidths=0, alpha=0.75)
        name = {1.0: "t = 1, noise", 0.0: "t = 0, data"}.get(t, f"t = {t:g}")
        axes.set_title(name, color=INK, fontsize=10, pad=4)
    return figure


def tails(path: Tensor, colors: list[str]) -> LineCollection:
    """Return the last stretch of trajectories (T, N, 2), faint."""
    return LineCollection(list(path.transpose(0, 1).numpy()), colors=colors, linewidths=0.6, alpha=0.35)


def draw_jumps(steps: tuple[int, ...] = (1, 2, 4)) -> Figure:
    """Draw the exact flow map and Euler's method along the exact velocity, from the same noise, in few steps."""
    ring = Ring()
    angles = torch.arange(10, dtype=torch.float64) * (2 * torch.pi / 10) + 0.35
    x1 = 1.15 * torch.stack((angles.cos(), angles.sin()), 1)
    path = follow(ring.velocity, x1, 200)
    data, _ = ring.sample(1500, torch.Generator().manual_seed(1))
    figure = Figure(figsize=(9.6, 3.45), dpi=160, facecolor="white")
    for place, number in enumerate(steps):
        axes = plane(figure, (place / 3 + 0.006, 0.07, 0.32, 0.83), limit=2.75)
        dots(axes, data, s=1.0, c="#e4e3dd", linewidths=0, zorder=0)
        axes.add_collection(LineCollection(list(path.transpose(0, 1).numpy()), colors=EXACT, linewidths=1.4, zorder=1))
        times = torch.linspace(1, 0, number + 1, dtype=torch.float64)
        stops = path[((1 - times) * (len(path) - 1)).round().long()]
        for stops_of, color, width in ((euler_stops(ring, x1, number), EULER, 1.0), (stops, JUMP, 1.3)):
            lines = list(stops_of.transpose(0, 1).numpy())
            axes.add_collection(LineCollection(lines, colors=color, linewidths=width, zorder=2, alpha=0.9))
            dots(axes, stops_of[-1], s=15, c=color, linewidths=0.6, edgecolors="white", zorder=4)
        dots(axes, x1, s=9, c=INK, linewidths=0, zorder=3)
        axes.set_title(f"{number} step{'s' * (number > 1)}", color=INK, fontsize=10, pad=4)
    for x, color, text in ((0.21, EXACT, "trajectory of the flow"), (0.43, EULER, "Euler"), (0.55, JUMP, "flow map")):
        figure.text(x, 0.025, "●  ", color=color, fontsize=8, ha="right")
        figure.text(x, 0.025, text, color=FAINT, fontsize=9, ha="left")
    figure.text(0.70, 0.025, "●  ", color=INK, fontsize=8, ha="right")
    figure.text(0.70, 0.025, "noise, t = 1", color=FAINT, fontsize=9, ha="left")
    return figure


def euler_stops(ring: Ring, x1: Tensor, number: int) -> Tensor:
    """Return the points (number + 1, N, 2) at which Euler's method stops on its way from t = 1 to 0."""
    stops = [x1]

    def recording(x: Tensor, t: Tensor) -> Tensor:
        v = ring.velocity(x, t)
        stops.append(x - v / number)
        return v

    samplers.euler(recording, x1, number)
    return torch.stack(stops)


if __name__ == "__main__":
    main()
