"""Provide the tests of samplers with paths, exact ends, exact networks, and a velocity that counts its calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill.eval.exact import Gaussian
from fastdistill.paths import EDM, FM, ICFM, LINEAR, VE, Cosine, Path, TrigFlow
from fastdistill.samplers import SPECS

PATHS = [LINEAR, Cosine(), FM(0.1), ICFM(0.2), TrigFlow(0.5), EDM(0.05, 20.0), VE(0.05, 20.0)]
EVERY_PATH = pytest.mark.parametrize("path", [pytest.param(path, id=type(path).__name__) for path in PATHS])


def exact_samples(law: Gaussian, noise: Tensor) -> Tensor:
    return law.flow_map(noise, torch.ones(len(noise)).double(), torch.zeros(len(noise)).double())


def on(path: Path) -> Gaussian:
    """Return a law on a path."""
    return Gaussian(torch.tensor([0.7, -0.4]).double(), torch.tensor([[0.6, 0.2], [0.2, 0.3]]).double(), path)


def exact_net(law: Gaussian) -> Callable[..., Tensor]:
    """Return the flow map of a law as a network."""
    return lambda x, t, s, y=None: law.average_velocity(x, t, s)


class LabelField:
    """Give v(x, t, y) = (1 + y) x + t, and count the calls."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, x: Tensor, t: Tensor, s: Tensor, y: Tensor | None = None) -> Tensor:
        assert torch.equal(t, s)
        self.rows.append(len(x))
        slope = torch.full((len(x),), 4.0) if y is None else 1.0 + y
        return slope[:, None] * x + t[:, None]


def defaults(name: str) -> dict[str, Any]:
    """Return the parameters of a sampler at their defaults."""
    return {parameter: of.default for parameter, of in SPECS[name].parameters.items()}
