"""How close a network comes to the flow of the eight-Gaussian ring, which is known exactly."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from fastdistill import samplers
from fastdistill.eval.exact import Ring
from fastdistill.eval.metrics import sliced_wasserstein
from fastdistill.paths import ICFM, LINEAR, OTCFM, Path
from fastdistill.train import TrainConfig
from fastdistill.train.data import generator_at
from fastdistill.train.sampling import OWN, Sampling, draw

Row = dict[str, float]


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
    """Jump or integrate from noise with each number of steps, and compare with the exact flow from the same noise.

    The exact flow is that of the run's own path. Where the run couples noise and data, its flow is another, known to
    nobody: then only `sliced_wasserstein` says something.

    Returns, by number of steps: `map_error` (root mean square distance to where the exact flow ends, over the root
    mean square of those points), `sliced_wasserstein` (to those points: equal noise, so its floor is 0) and
    `seconds_per_sample`.
    """
    device = next(net.parameters()).device
    x1, exact = _task(count, seed, config.path.build())
    draw(net, config, x1[:8].to(device), None, 1, how)  # pays for what a first call sets up
    rows = {}
    for number in steps:
        started = time.perf_counter()
        x = draw(net, config, x1.to(device), None, number, how, seed=seed).cpu()
        rows[str(number)] = compare(x, exact, time.perf_counter() - started)
    return rows


def references(steps: Sequence[int], *, count: int = 4096, path: Path = LINEAR, seed: int = 0) -> dict[str, Row]:
    """The same numbers for Euler on the exact velocity, and between the flow's end and fresh data: the two floors.

    `euler N` is the best that N steps along instantaneous velocities can do, and `data` is what the sampling noise of
    `count` points alone contributes; its map error is that of pairing points by chance.
    """
    ring = _ring(path)
    x1, exact = _task(count, seed, path)
    rows = {}
    for number in steps:
        started = time.perf_counter()
        x = samplers.euler(ring.velocity, path.prior(x1.double()), number)
        rows[f"euler {number}"] = compare(x, exact, time.perf_counter() - started)
    data, _ = ring.sample(count, generator_at(seed, "fresh data"))
    return rows | {"data": compare(data, exact, 0.0)}


def exact_flow(x1: Tensor, path: Path = LINEAR) -> Tensor:
    """Where the ring's exact flow on a path takes the noise x1 (N, 2), in float64; of independent noise and data."""
    ones = torch.ones(len(x1), dtype=torch.float64)
    return _ring(path).flow_map(path.prior(x1.double()), ones, torch.zeros_like(ones))


def _ring(path: Path) -> Ring:
    """The ring on a path, or on its twin without a coupling, as the flow of coupled pairs is known to nobody."""
    return Ring(path=ICFM(path.sigma) if isinstance(path, OTCFM) else path)


@lru_cache(maxsize=4)
def _task(count: int, seed: int, path: Path) -> tuple[Tensor, Tensor]:
    """The noise that is evaluated, and where the exact flow takes it: seconds of work, the same for every method."""
    x1 = torch.randn(count, 2, generator=generator_at(seed, "evaluate"))
    return x1, exact_flow(x1, path)


def compare(x: Tensor, exact: Tensor, seconds: float) -> Row:
    """One row: points x (N, 2) that took `seconds` to make, against where the exact flow ends."""
    x = x.double()
    return {
        "map_error": float((x - exact).square().mean().sqrt() / exact.square().mean().sqrt()),
        "sliced_wasserstein": sliced_wasserstein(x, exact),
        "seconds_per_sample": seconds / len(x),
    }
