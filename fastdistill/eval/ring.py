"""Measure how close a network comes to the flow map of the eight-Gaussian ring, which is known exactly.

Samples are compared with those of the exact map by the same sampler, at the same times, from the same noise, and with
the same fresh noise on the way. So the exact map has no error under any sampler, and a sampler that renoises isn't
blamed for leaving the trajectory.
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
    """Judge points by their distance to where the exact flow map takes the same noise.

    Args:
        folder, data: unused, because the law is known and nothing has to be kept.
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
        """Return rows and references as every judge does (`fastdistill.eval.judges.Judge`), and also `coupled`."""
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
        """Draw where the exact flow and the run's network take the same noise, and return the path of the picture."""
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

    The exact map is that of the run's own path. If the run couples noise and data, its flow is another one that has no
    known form; then only `sliced_wasserstein` has a meaning.

    Returns, by number of steps:
        `map_error`: the root mean square distance to the ends of the exact map, divided by their root mean square.
        `sliced_wasserstein`: the distance to the same ends; its floor is 0, because the noise is equal.
        `seconds_per_sample`: the time of sampling.
    """
    device = next(net.parameters()).device
    x1 = _noise(count, seed)
    draw(net, config, x1[:8].to(device), None, 1, how)  # The first call sets things up, which must not be timed.
    rows = {}
    for number in steps:
        started = time.perf_counter()
        x = draw(net, config, x1.to(device), None, number, how, seed=seed).cpu()
        seconds = time.perf_counter() - started
        rows[str(number)] = score_points(x, exact_samples(config, number, count=count, how=how, seed=seed), seconds)
    return rows


def exact_samples(config: TrainConfig, steps: int, *, count: int = 4096, how: Sampling = OWN, seed: int = 0) -> Tensor:
    """Return the points (count, 2) float64 where the exact map ends by a run's sampler, from the noise of a run.

    A sampler without fresh noise is compared with the exact flow between its first and its last time, however many
    steps it takes.
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
    """Return the exact map's own rows by a run's sampler, scored like a network and against the exact flow.

    The rows scored like a network are zero by construction. The rows against the flow exist only for a sampler that
    renoises. They show its error if it were compared with the trajectory: its points differ although its law is right.
    """
    how = how.resolve(config)
    flow = _exact_jump(count, seed, config.path.build(), 1.0, 0.0)
    rows = {}
    for number in steps:
        exact = exact_samples(config, number, count=count, how=how, seed=seed)
        rows[f"exact map {number}"] = score_points(exact, exact, 0.0)
        if how.adds_noise:
            of = " ".join([how.spec.name, *(f"{value:g}" for value in how.parameters.values())])
            rows[f"exact map by {of}, against the flow {number}"] = score_points(exact, flow, 0.0)
    return rows


def references(steps: Sequence[int], *, count: int = 4096, path: Path = LINEAR, seed: int = 0) -> dict[str, Row]:
    """Return two floors in the same numbers: Euler steps along the exact velocity, and fresh data.

    `euler N` is the error of N Euler steps along the exact velocity. `data` compares the end of the flow with fresh
    data: its `sliced_wasserstein` is the sampling noise of `count` points, and its `map_error` pairs points by chance.
    """
    ring = _ring(path)
    x1, exact = _noise(count, seed), _exact_jump(count, seed, path, 1.0, 0.0)
    rows = {}
    for number in steps:
        started = time.perf_counter()
        x = samplers.euler(ring.velocity, path.prior(x1.double()), number)
        rows[f"euler {number}"] = score_points(x, exact, time.perf_counter() - started)
    data, _ = ring.sample(count, generator_at(seed, "fresh data"))
    return rows | {"data": score_points(data, exact, 0.0)}


def exact_flow(x1: Tensor, path: Path = LINEAR) -> Tensor:
    """Return where the exact flow of independent pairs on a path takes the noise x1 (N, 2), in float64."""
    ones = torch.ones(len(x1), dtype=torch.float64)
    return _ring(path).flow_map(path.prior(x1.double()), ones, torch.zeros_like(ones))


def _ring(path: Path) -> Ring:
    """Return the ring on a path; a path with a coupling is replaced by its twin without one.

    The flow of coupled pairs has no known form.
    """
    return Ring(path=ICFM(path.sigma) if isinstance(path, OTCFM) else path)


def _noise(count: int, seed: int) -> Tensor:
    """Return the noise (count, 2) from which every method is evaluated."""
    return torch.randn(count, 2, generator=generator_at(seed, "evaluate"))


@lru_cache(maxsize=8)
def _exact_jump(count: int, seed: int, path: Path, start: float, end: float) -> Tensor:
    """Return where the exact flow takes the noise between two times.

    This takes seconds and is the same for all methods, so it is cached.
    """
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

    The state is float32, as in a run, so that the sampler draws the same noise on the way.
    """
    ring = _ring(path)

    def net(x: Tensor, t: Tensor, s: Tensor, y: Tensor | None = None) -> Tensor:
        return ring.average_velocity(x.double(), t.double(), s.double()).to(x.dtype)

    options: dict[str, Any] = dict(parameters)
    x1, generator = _noise(count, seed), generator_at(seed, "renoise")
    return samplers.sample(sampler, net, x1, times, path=path, generator=generator, **options).double()


def score_points(x: Tensor, exact: Tensor, seconds: float) -> Row:
    """Return the row of points x (N, 2) that took `seconds` to make, compared with the exact ends (N, 2)."""
    x = x.double()
    return {
        "map_error": float((x - exact).square().mean().sqrt() / exact.square().mean().sqrt()),
        "sliced_wasserstein": sliced_wasserstein(x, exact),
        "seconds_per_sample": seconds / len(x),
    }


def plot_flow_map(run: FilePath) -> FilePath:
    """Draw where the exact flow and the run's network take the same noise, and return the path of the picture."""
    x1 = torch.randn(2000, 2, generator=generator_at(0, "samples"))
    net, config = load_run(run)
    panels = {"exact flow map": exact_flow(x1, config.path.build())}
    for steps in OWN.resolve(config).measured_steps(config):
        title = f"{config.method.name}, {steps} step{'s' * (steps > 1)}"
        panels[title] = generate(net, config, 2000, steps=steps).cpu()
    path = run / "samples" / "flow_map.png"
    save_picture(path, draw_points(panels, RingData.limit))
    return path
