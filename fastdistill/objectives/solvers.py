"""Take one step of a teacher's flow from t to r, for consistency distillation.

A step in the noise level sigma = beta / alpha moves y = x / alpha = x0 + sigma x1 along its slope dy/dsigma, which is
the prediction of the noise x1: Karras's solvers, and on the path "edm" those of the official code. A step in time moves
x along its velocity. On a path that ends in pure noise sigma(1) is infinite, and only the second kind exists.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastdistill.objectives.checks import check_choice
from fastdistill.paths import Path, convert, expand_time

Velocity = Callable[[Tensor, Tensor], Tensor]  # velocity(x, t)
SOLVERS = ("heun", "euler", "heun_in_time", "euler_in_time")


def solver_step(name: str, velocity: Velocity, x: Tensor, t: Tensor, r: Tensor, path: Path) -> Tensor:
    """Return the state at r (B, ...) by one step from x at t; r < t (B,).

    Args:
        name: "heun" (second order) or "euler", in the noise level where the path's is finite at every time (edm, ve),
            else in time; "heun_in_time" and "euler_in_time": in time on every path.

    Source: Karras et al. 2022 (EDM), arXiv:2206.00364, algorithm 1, for "heun"; as there, a row that ends without noise
        takes Euler's step.
    """
    check_choice("solver", name, SOLVERS)
    second = name.startswith("heun")
    if name.endswith("_in_time") or not has_finite_level(path):
        return _step_in_time(velocity, x, t, r, second)
    return _step_in_level(velocity, x, t, r, path, second)


def has_finite_level(path: Path) -> bool:
    """Return whether the path keeps some data at t = 1, so that its noise level is finite at every time."""
    return float(path.alpha(torch.ones((), dtype=torch.float64))) > 1e-12


def _step_in_time(velocity: Velocity, x: Tensor, t: Tensor, r: Tensor, second: bool) -> Tensor:
    step, v = expand_time(t - r, x), velocity(x, t)
    x_r = x - step * v
    return x - step * 0.5 * (v + velocity(x_r, r)) if second else x_r


def _step_in_level(velocity: Velocity, x: Tensor, t: Tensor, r: Tensor, path: Path, second: bool) -> Tensor:
    t_x, r_x = expand_time(t, x), expand_time(r, x)
    step = path.beta(r_x) / path.alpha(r_x) - path.beta(t_x) / path.alpha(t_x)
    slope = convert(path, x, t, velocity(x, t), "v", "x1")
    y, scale = x / path.alpha(t_x), path.alpha(r_x)
    x_r = scale * (y + step * slope)
    if not second:
        return x_r
    end = convert(path, x_r, r, velocity(x_r, r), "v", "x1")
    return torch.where(path.beta(r_x) > 0, scale * (y + step * 0.5 * (slope + end)), x_r)
