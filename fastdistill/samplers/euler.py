"""Integrate a velocity by Euler's method."""

from __future__ import annotations

from torch import Tensor

from fastdistill.samplers.spec import Sampler
from fastdistill.samplers.steps import Steps, Velocity, intervals, times_of


def euler(velocity: Velocity, x: Tensor, steps: Steps) -> Tensor:
    """Integrate dx/dt = velocity(x, t) from t = 1 to 0 for x (B, ...), at first order and one evaluation a step."""
    for t, s in intervals(steps):
        x = x - (t - s) * velocity(x, times_of(x, t))
    return x


SPEC = Sampler(euler, needs=("velocity",), evaluations=1)
