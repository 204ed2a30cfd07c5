"""Build tier 1, of signs: a network a little beside the exact solution is brought back to it by descent.

At the exact solution residual and gradient vanish whatever the sign of the loss, and whichever side of a difference the
gradient flows through. Here the network is u + theta phi, u exact and phi one direction, and the loss's gradient by
theta is compared with what follows from the method's formula, at theta = 1e-5 and -1e-5. The velocities of a teacher
and of data in one point have no noise, so nothing is left to chance: terms of higher order are below 0.04 %, the
tolerance is 0.1 %, and a negated loss misses by 200 %, a gradient on the wrong side of a difference by a third or more.

Directions, with e the vector of ones (W elements) and d = t - s:
    jump      phi = d^2 e. It leaves the velocity u(x, t, t) exact, which methods take for their own target. As
              D_w phi = 2 d e along (w, 1, 0), the residual u - w + d D_w u is 3 theta d^2 e.
    diagonal  phi = e where s = t, and 0 elsewhere: what the rows with s = t learn.
    first     phi = e where t = 1: what makes the samples of one step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastdistill.paths import LINEAR, Path
from fastdistill.samplers import Net
from tests.objectives.cases import WIDTH, Gate

THETA, STEP, TOLERANCE = 1e-5, 1e-7, 1e-3
Direction = Callable[[Tensor, Tensor], Tensor]  # (t, s) -> (B,), the factor of e


def jump(t: Tensor, s: Tensor) -> Tensor:
    return (t - s) ** 2


def diagonal(t: Tensor, s: Tensor) -> Tensor:
    return (t == s).to(t)


def first(t: Tensor, s: Tensor) -> Tensor:
    return (t == 1).to(t)


@dataclass(frozen=True)
class Case:
    """Case of a method with a direction, and what its gradient by theta is.

    Args:
        name: of the method. slope: the gradient over theta, (B,) by row, whose mean is expected; of the gate and d.
        direction, taught, path, options: of the network, and of the gate.
        prepare: changes the gate for a theta, where the method needs more than a gate has.
        order: of the gradient in theta; 0 where it only has theta's sign.
    """

    name: str
    slope: Callable[[Gate, Tensor], Tensor]
    direction: Direction = jump
    taught: bool = True
    path: Path = LINEAR
    options: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[Gate, float], None] = lambda gate, theta: None
    order: int = 1

    def gate(self, theta: float) -> Gate:
        """Return the same gate, but for `prepare`, at each call."""
        torch.manual_seed(0)
        gate = Gate(self.name, self.path, self.taught, self.options)
        self.prepare(gate, theta)
        return gate

    def expected(self, theta: float) -> float:
        """Return the gradient at theta."""
        gate = self.gate(theta)
        d = gate.times["t"] - (gate.times["s"] if {"s", "delta"} & set(gate.objective.times) else 0)
        return (THETA if self.order else 1.0) * (1 if theta > 0 else -1) * self.slope(gate, d).mean().item()

    def loss(self, theta: Tensor, target: float | None = None, **keywords: Any) -> Tensor:
        """Return the loss at theta; with `target` a network at that theta takes the target's part."""
        gate = self.gate(THETA if theta > 0 else -THETA)
        if target is not None:
            keywords["target"] = moved(gate.net, torch.tensor(target, dtype=torch.float64), self.direction)
        net, times = moved(gate.net, theta, self.direction), [gate.times[name] for name in gate.objective.times]
        return gate.objective.function(net, gate.x0, gate.x1, *times, **(gate.keywords | keywords))[0]

    def gradient(self, theta: float, **keywords: Any) -> float:
        """Return the gradient that a trainer would follow."""
        leaf = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
        return torch.autograd.grad(self.loss(leaf, **keywords), leaf)[0].item()

    def derivative(self, theta: float, prediction: bool = True, target: bool = True) -> float:
        """Return the derivative of the loss's value while the prediction moves alone, or the target, or both as one."""

        def value(step: float) -> float:
            moving = torch.tensor(theta + step * prediction, dtype=torch.float64)
            return self.loss(moving, None if prediction and target else theta + step * target).item()

        return (value(STEP) - value(-STEP)) / (2 * STEP)


def moved(net: Net, theta: Tensor, direction: Direction) -> Net:
    """Return u + theta phi."""

    def changed(x: Tensor, t: Tensor, s: Tensor, y: Tensor | None = None) -> Tensor:
        return net(x, t=t, s=s, y=y) + theta * direction(t, s)[:, None] * torch.ones_like(x)

    return changed


def descends(case: Case, gradient: Callable[[float], float]) -> bool:
    """Return whether the gradient is the expected one on either side of the exact solution, and points away from it."""
    expected = {theta: case.expected(theta) for theta in (-THETA, THETA)}
    assert expected[-THETA] < 0 < expected[THETA]
    return all(abs(gradient(theta) - value) < TOLERANCE * abs(value) for theta, value in expected.items())


# What the slopes are made of


def ones(gate: Gate) -> Tensor:
    return torch.ones_like(gate.x1)


def state(gate: Gate) -> Tensor:
    return gate.path.interpolate(gate.x0, gate.x1, gate.times["t"])


def share(gate: Gate) -> Tensor:
    """Return 1 in rows with s = t, and 0 elsewhere."""
    return (gate.times["t"] == gate.times["s"]).to(gate.x1)


def turn(gate: Gate, d: Tensor) -> Tensor:
    """Return (e, (dv/dx) e) of the exact velocity where the jump ends: how it changes when the end is moved."""
    t, s = gate.times["t"], gate.times["s"]
    end = gate.law.flow_map(state(gate), t, s)
    return (gate.law.velocity(end + 1, s) - gate.law.velocity(end, s)).sum(1)


def halves(gate: Gate, d: Tensor) -> Tensor:
    """Return two jumps of d / 2 as the target, a mean over elements, in all rows.

    phi is d^2 e in the prediction and d^2/4 e in both halves of the target; the second starts where the first ends,
    off by -theta d^3/8 e, which adds half of that times du/dx = (1 - J) / (d/2), J = df/dx of the second half. In all
    the residual is theta d^2/8 (7 - J) e.
    """
    t, s = gate.times["t"], gate.times["s"]
    m, x = (t + s) / 2, state(gate)
    through = gate.law.flow_map(x + 1, m, s) - gate.law.flow_map(x, m, s)  # J e, as the map is affine in x
    return 2 * d**2 * d**2 / 8 * (7 - through.mean(1))


def lagrangian(gate: Gate, d: Tensor) -> Tensor:
    """Return (e, residual) over theta: u - d du/ds is off by 3 theta d^2 e, and the map by -theta d^3 e.

    The velocity where it ends, which is subtracted, is then off by -theta d^3 (dv/dx) e.
    """
    return 3 * WIDTH * d**2 + d**3 * turn(gate, d)
