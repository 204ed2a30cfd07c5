"""Integrate a velocity by Heun's method."""

from __future__ import annotations

from torch import Tensor

from fastdistill.samplers.spec import Sampler
from fastdistill.samplers.steps import Steps, Velocity, intervals, times_of


def heun(velocity: Velocity, x: Tensor, steps: Steps) -> Tensor:
    """Integrate dx/dt = velocity(x, t) from t = 1 to 0 for x (B, ...), at second order and two evaluations a step.

    Source: Karras et al. 2022 (EDM), arXiv:2206.00364, algorithm 1. Its last step is Euler's, which isn't needed here,
    because the velocity is finite at t = 0.
    """
    for t, s in intervals(steps):
        v = velocity(x, times_of(x, t))
        v_end = velocity(x - (t - s) * v, times_of(x, s))
        x = x - (t - s) * 0.5 * (v + v_end)
    return x


SPEC = Sampler(heun, needs=("velocity",), evaluations=2)
