"""Convert one prediction on a path into another, and carry functions from one path to another.

A network may predict the data x0, the unit noise x1, the velocity v or the score of p_t: given x_t each is a linear
function of any other. And two paths of Gaussian noise are one path up to a change of time and scale: states of equal
noise level (`Path.angle`) differ by a factor.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastdistill.paths.base import Path, expand_time

PREDICTIONS = ("x0", "x1", "v", "score")
Velocity = Callable[[Tensor, Tensor], Tensor]  # velocity(x, t)
AverageVelocity = Callable[[Tensor, Tensor, Tensor], Tensor]  # u(x, t, s)


def convert(path: Path, x: Tensor, t: Tensor, value: Tensor, source: str, target: str) -> Tensor:
    """Convert a prediction at (x, t) into another one: E[x0 | x], E[x1 | x], v(x, t), or the score grad log p_t(x).

    With alpha, beta and their rates at t, and D = alpha d_beta - d_alpha beta:
        x = alpha x0 + beta x1,  v = d_alpha x0 + d_beta x1,  score = -x1 / beta.
    The result is infinite or NaN where that divides by zero: from x0 and score where beta = 0, from x1 where alpha = 0,
    to score where beta = 0, and from v where D = 0.

    Args:
        x, value: (B, ...), alike in shape. t: (B,) or ().
        source, target: names in `PREDICTIONS`.

    Raises:
        ValueError: a name is unknown, or the path has a coupling, so that alpha and beta don't describe x_t given x0.

    Source: Salimans and Ho 2022, arXiv:2202.00512, its v-prediction, for any schedule.
    """
    for name, choice in (("source", source), ("target", target)):
        if choice not in PREDICTIONS:
            raise ValueError(f"{name}: expected one of {', '.join(PREDICTIONS)}, got {choice!r}")
    _refuse_coupling(path)
    if source == target:
        return value
    t = expand_time(t, x)
    alpha, beta, d_alpha, d_beta = path.alpha(t), path.beta(t), path.d_alpha(t), path.d_beta(t)
    if source == "v":
        determinant = alpha * d_beta - d_alpha * beta
        x0, x1 = (d_beta * x - beta * value) / determinant, (alpha * value - d_alpha * x) / determinant
    elif source == "x0":
        x0, x1 = value, (x - alpha * value) / beta
    else:
        x1 = value if source == "x1" else -beta * value
        x0 = (x - beta * x1) / alpha
    if target == "v":
        return d_alpha * x0 + d_beta * x1
    return {"x0": x0, "x1": x1}[target] if target != "score" else -x1 / beta


def carry_time(source: Path, target: Path, t: Tensor) -> Tensor:
    """Return the time on `target` with the same noise level as `source` has at t; differentiable, for any shape."""
    return target.time_at(source.angle(t))


def rescale(source: Path, target: Path, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return the time on `target` that corresponds to t on `source`, and the factor c that turns a state x into c x.

    Both have the shape of t, and both are differentiable.
    """
    _refuse_coupling(source)
    _refuse_coupling(target)
    time = carry_time(source, target, t)
    return time, _radius(target, time) / _radius(source, t)


def carry_velocity(velocity: Velocity, source: Path, target: Path) -> Velocity:
    """Return the velocity field on `target` from that on `source`; velocity(x, t), x (B, ...), t (B,).

    With x = c(t) y and y at time r(t) on the source: v(x, t) = c'(t) y + c(t) r'(t) velocity(y, r).
    """

    def carried(x: Tensor, t: Tensor) -> Tensor:
        (time, factor), (d_time, d_factor) = _back(source, target, t)
        y = x / expand_time(factor, x)
        rate = expand_time(factor * d_time, x)
        return expand_time(d_factor, x) * y + rate * velocity(y, time)

    return carried


def carry_average_velocity(average: AverageVelocity, source: Path, target: Path) -> AverageVelocity:
    """Return the average velocity u(x, t, s) on `target` from that on `source`, by the same flow map; t, s (B,).

    With x = c(t) y, times q = r(t) and p = r(s), and f(y, q, p) = y - (q - p) u:
        u(x, t, s) = ((c(t) - c(s)) / (t - s)) y + c(s) ((q - p) / (t - s)) average(y, q, p),
    and the two quotients are derivatives where s = t. It is accurate to about a rounding error over t - s.
    """

    def carried(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        (q, c_t), (d_q, d_c) = _back(source, target, t)
        p, c_s = _back(source, target, s)[0]
        gap = t - s
        safe = torch.where(gap == 0, 1.0, gap)
        stretch = torch.where(gap == 0, d_c, (c_t - c_s) / safe)
        pace = torch.where(gap == 0, d_q, (q - p) / safe)
        y = x / expand_time(c_t, x)
        return expand_time(stretch, x) * y + expand_time(c_s * pace, x) * average(y, q, p)

    return carried


def _back(source: Path, target: Path, t: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the source's time r(t), the factor c(t) from its state to the target's, and the derivatives of both."""

    def at(t: Tensor) -> tuple[Tensor, Tensor]:
        time, factor = rescale(target, source, t)
        return time, 1 / factor

    values, pull = torch.func.vjp(at, t)  # type: ignore[misc]  # three results only with has_aux
    # All is elementwise in t, so a row of the Jacobian is one number.
    one, zero = torch.ones_like(t), torch.zeros_like(t)
    return values, (pull((one, zero))[0], pull((zero, one))[0])


def _radius(path: Path, t: Tensor) -> Tensor:
    return (path.alpha(t).square() + path.beta(t).square()).sqrt()


def _refuse_coupling(path: Path) -> None:
    if path.coupling != "independent":
        raise ValueError(
            f"path: expected one whose x0 and x1 are independent, got {type(path).__name__}, coupled by {path.coupling}"
        )
