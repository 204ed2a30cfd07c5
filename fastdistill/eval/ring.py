"""Measure how close a network comes to the flow map of the eight-Gaussian ring, which is known exactly.

Each number is held against what is exact for its own sampler: the exact map, through the same sampler, at the same
times, from the same noise, with the same fresh noise on the way. So the exact map has no error whatever the sampler,
and a sampler that renoises isn't blamed for leaving the trajectory.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor, nn

from fastdistill import samplers
from fastdistill.data import DataSet, generator_at
from fastdistill.data import Ring as RingData
from fastdistill.data.pictures import draw_points
from fastdistill.eval.exact import Ring
from fastdistill.eval.metrics import sliced_wasserstein
from fastdistill.paths import ICFM, LINEAR, OTCFM, Path
from fastdistill.train import TrainConfig, generate, load_run
from fastdistill.train.config import couples
from fastdistill.train.logging import save_picture
from fastdistill.train.sampling import OWN, Sampling, draw

Row = dict[str, float]


class RingJudge:
    """Measures points against where the exact flow map takes the same noise.

    Args:
        folder, data: not needed, for the law is known.
    """

    headline = ("sliced_wasserstein", "map_error")
    training_steps = 3000
    at_once = True
    caption = (
        "Each sample is held against where the exact map goes by the same sampler, from the same noise, with the same "
        "fresh noise on the way. A method whose map isn't the flow's (reflow, moment and score matching) can be good "
        "and far from it in map error."
    )

    def __init__(self, folder: FilePath, data: DataSet) -> None:
        pass

    def evaluate(
        self, net: nn.Module, config: TrainConfig, steps: Sequence[int], *, count: int | None, how: Sampling, seed: int
    ) -> dict[str, Any]:
        """Return rows and references by number of steps, see `fastdistill.eval.judges.Judge`; `coupled` besides."""
        count = count or 4096
        known = references(steps, count=count, path=config.path.build(), seed=seed)
        return {
            "samples": count,
            "set": count,
            "coupled": couples(config),
            "steps": evaluate_network(net, config, steps, count=count, how=how, seed=seed),
            "references": known | exact_rows(config, steps, count=count, how=how, seed=seed),
        }

    def plot(self, run: FilePath) -> FilePath:
        """Draw where the exact flow takes some noise, and where the run's network does, in a few steps."""
        return plot_flow_map(run)


@torch.no_grad()
def evaluate_network(
    net: nn.Module,
    config: TrainConfig,
    steps: Sequence[int],
    *,
    count: int = 4096,
    how: Sampling = OWN,
    seed: int = 0,
) -> dict[str, Row]:
    """Jump or integrate from noise with each number of steps, and compare with the exact map by the same sampler.

    The exact map is that of the run's own path. Where the run couples noise and data, its flow is another, known to
    nobody: then only `sliced_wasserstein` says something.

    Returns, by number of steps: `map_error` (root mean square distance to where the exact map ends, over the root
    mean square of those points), `sliced_wasserstein` (to those points: equal noise, so its floor is 0) and
    `seconds_per_sample`.
    """
    device = next(net.parameters()).device
    x1 = _noise(count, seed)
    draw(net, config, x1[:8].to(device), None, 1, how)  # pays for what a first call sets up
    rows = {}
    for number in steps:
        started = time.perf_counter()
        x = draw(net, config, x1.to(device), None, number, how, seed=seed).cpu()
        seconds = time.perf_counter() - started
        rows[str(number)] = compare(x, exact_samples(config, number, count=count, how=how, seed=seed), seconds)
    return rows


def exact_samples(config: TrainConfig, steps: int, *, count: int = 4096, how: Sampling = OWN, seed: int = 0) -> Tensor:
    """Return where the exact map ends by a run's sampler in so many steps, (count, 2) float64, from a run's noise.

    Samplers of velocities and of the flow map are all held against the exact flow between their first and last time.
    """
    how = how.resolve(config, steps)
    path, times = config.path.build(), config.method.sample_times(steps)
    grid = samplers.intervals(times)
    if not how.adds_noise or len(grid) == 1:
        return _exact_jump(count, seed, path, grid[0][0], grid[-1][1])
    return _exact_by(
        count, seed, path, how.spec.name, tuple(how.parameters.items()), (grid[0][0], *(s for _, s in grid))
    )


def exact_rows(
    config: TrainConfig, steps: Sequence[int], *, count: int = 4096, how: Sampling = OWN, seed: int = 0
) -> dict[str, Row]:
    """Return the exact map's own rows by a run's sampler: scored as a network is, and against the exact flow.

    The first are zero by construction. The second are what a sampler that renoises would be charged with if it were
    held against the trajectory: equal laws, other points. They are there for such a sampler only.
    """
    how = how.resolve(config)
    flow = _exact_jump(count, seed, config.path.build(), 1.0, 0.0)
    rows = {}
    for number in steps:
        exact = exact_samples(config, number, count=count, how=how, seed=seed)
        rows[f"exact map {number}"] = compare(exact, exact, 0.0)
        if how.adds_noise:
            of = " ".join([how.spec.name, *(f"{value:g}" for value in how.parameters.values())])
            rows[f"exact map by {of}, against the flow {number}"] = compare(exact, flow, 0.0)
    return rows


def references(steps: Sequence[int], *, count: int = 4096, path: Path = LINEAR, seed: int = 0) -> dict[str, Row]:
    """Return the same numbers for Euler on the exact velocity, and of the flow's end against fresh data: two floors.

    `euler N` is the best that N steps along instantaneous velocities can do, and `data` is what the sampling noise of
    `count` points alone contributes; its map error is that of pairing points by chance.
    """
    ring = _ring(path)
    x1, exact = _noise(count, seed), _exact_jump(count, seed, path, 1.0, 0.0)
    rows = {}
    for number in steps:
        started = time.perf_counter()
        x = samplers.euler(ring.velocity, path.prior(x1.double()), number)
        rows[f"euler {number}"] = compare(x, exact, time.perf_counter() - started)
    data, _ = ring.sample(count, generator_at(seed, "fresh data"))
    return rows | {"data": compare(data, exact, 0.0)}


def exact_flow(x1: Tensor, path: Path = LINEAR) -> Tensor:
    """Return where the ring's exact flow on a path takes the noise x1 (N, 2), in float64, for independent data."""
    ones = torch.ones(len(x1), dtype=torch.float64)
    return _ring(path).flow_map(path.prior(x1.double()), ones, torch.zeros_like(ones))


def _ring(path: Path) -> Ring:
    """Return the ring on a path, or on its twin without a coupling, as the flow of coupled pairs is known to nobody."""
    return Ring(path=ICFM(path.sigma) if isinstance(path, OTCFM) else path)


def _noise(count: int, seed: int) -> Tensor:
    """Return the noise (count, 2) that is evaluated, the same for every method."""
    return torch.randn(count, 2, generator=generator_at(seed, "evaluate"))


@lru_cache(maxsize=8)
def _exact_jump(count: int, seed: int, path: Path, start: float, end: float) -> Tensor:
    """Return where the exact flow takes the noise from one time to another: seconds of work, alike for all methods."""
    ones = torch.ones(count, dtype=torch.float64)
    return _ring(path).flow_map(path.prior(_noise(count, seed).double()), start * ones, end * ones)


@lru_cache(maxsize=16)
def _exact_by(
    count: int,
    seed: int,
    path: Path,
    sampler: str,
    parameters: tuple[tuple[str, float], ...],
    times: tuple[float, ...],
) -> Tensor:
    """Return where the exact map ends by a sampler that renoises.

    Its state is float32, as a run's is, so that the noise drawn on the way is the same.
    """
    ring = _ring(path)

    def net(x: Tensor, t: Tensor, s: Tensor, y: Tensor | None = None) -> Tensor:
        return ring.average_velocity(x.double(), t.double(), s.double()).to(x.dtype)

    options: dict[str, Any] = dict(parameters)
    x1, generator = _noise(count, seed), generator_at(seed, "renoise")
    return samplers.sample(sampler, net, x1, times, path=path, generator=generator, **options).double()


def compare(x: Tensor, exact: Tensor, seconds: float) -> Row:
    """Return one row: points x (N, 2) that took `seconds` to make, against where the exact map ends."""
    x = x.double()
    return {
        "map_error": float((x - exact).square().mean().sqrt() / exact.square().mean().sqrt()),
        "sliced_wasserstein": sliced_wasserstein(x, exact),
        "seconds_per_sample": seconds / len(x),
    }


def plot_flow_map(run: FilePath) -> FilePath:
    """Draw where the exact flow takes some noise, and where the run's network does, in a few steps."""
    x1 = torch.randn(2000, 2, generator=generator_at(0, "samples"))
    net, config = load_run(run)
    panels = {"exact flow map": exact_flow(x1, config.path.build())}
    for steps in OWN.resolve(config).measured_steps(config):
        title = f"{config.method.name}, {steps} step{'s' * (steps > 1)}"
        panels[title] = generate(net, config, 2000, steps=steps).cpu()
    path = run / "samples" / "flow_map.png"
    save_picture(path, draw_points(panels, RingData.limit))
    return path
