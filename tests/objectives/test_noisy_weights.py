"""Check from data with noise which losses have the marginal solution as their optimum, and which have another one.

A loss that weighs a row by its own error, even detached, is stationary where E[w(D) D | x_t] = 0 for the row's residual
D = u - target. D holds the noise of v_hat. So this is E[D | x_t] = 0 only where w doesn't depend on D, or where the law
of D is symmetric, as a Gaussian's is, which sees nothing. Here the data are a ring of Gaussians, at one point x between
the modes. All rows share x, and differ in (x0, x1) by a quadrature of the posterior: their means are expectations.

With a teacher, or data in one point, the target has no noise and every weight keeps the solution: `test_exact.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdistill import objectives
from fastdistill.eval.exact import Ring
from fastdistill.objectives.metric import LogVariance

RING, T, POINT = Ring(), 0.5, (0.9, 0.25)
STEPS = 24  # of Runge and Kutta, for jumps
# Expected gradients by the output at POINT: the most where the solution is stationary (jumps are as exact as their
# integration; the others come to 1e-14), and the least where it isn't.
ZERO, MOVED = 1e-5, 3e-3


def posterior(nodes: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Return data x0 and noise x1 (N, 2) of x_t = POINT at t = T, and the posterior's weights (N,), by quadrature.

    Given a mode and x_t, x0 is Gaussian. N is 8 nodes^2; polynomials of low degree have exact means.
    """
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    z, w = torch.from_numpy(points), torch.from_numpy(weights / weights.sum())
    grid, mass = torch.cartesian_prod(z, z), torch.cartesian_prod(w, w).prod(1)
    x, alpha, beta = torch.tensor(POINT, dtype=torch.float64), 1 - T, T
    variance = (alpha * RING.std) ** 2 + beta**2
    of_mode = (-(x - alpha * RING.means).square().sum(1) / (2 * variance)).softmax(0)
    means = RING.means + (alpha * RING.std**2 / variance) * (x - alpha * RING.means)
    x0 = (means[:, None] + RING.std * beta / variance**0.5 * grid).flatten(0, 1)
    return x0, (x - alpha * x0) / beta, (of_mode[:, None] * mass).flatten()


@dataclass(frozen=True)
class Case:
    """Case of a method from data, at which end of the jump it is asked, and whether its weight moves the optimum.

    end: "diagonal" (s = t), "jump" (s = 0.4 t) or "data" (s = 0; for discrete consistency r = 0, which is denoising).
    """

    name: str
    options: dict[str, Any]
    end: str
    moved: bool

    def __str__(self) -> str:
        given = (f"{key}={getattr(value, '__name__', value)}" for key, value in self.options.items())
        return "-".join([self.name, *given, self.end])


def weighting(t: Tensor, s: Tensor) -> Tensor:
    """Return a learned log-variance that has learnt something: a function of times alone."""
    torch.manual_seed(1)
    net = LogVariance().double()
    torch.nn.init.normal_(net.linear.weight)
    return net(t, s).detach()


CASES = [
    # A plain square, whatever it is weighed by in t and s: the optimum is the mean.
    Case("flow_matching", {}, "diagonal", False),
    Case("flow_matching", {"weight": "edm"}, "diagonal", False),
    Case("flow_matching", {"weighting": weighting}, "diagonal", False),
    Case("tvm", {}, "diagonal", False),
    Case("esd", {}, "diagonal", False),
    Case("lsd", {}, "diagonal", False),
    Case("psd", {}, "diagonal", False),
    Case("shortcut", {}, "diagonal", False),
    Case("consistency", {"distance": "l2"}, "data", False),
    # A(p, c) of a residual that holds v_hat: only p = 0 keeps the mean.
    *(Case(name, {"p": 0.0}, end, False) for name in ("meanflow", "improved_meanflow") for end in ("diagonal", "jump")),
    *(
        Case(name, {"p": p}, end, True)
        for name in ("meanflow", "improved_meanflow")
        for p in (0.5, 1.0)
        for end in ("diagonal", "jump")
    ),
    Case("alpha_flow", {"alpha": 1.0}, "diagonal", True),
    Case("alpha_flow", {"alpha": 0.5}, "diagonal", True),
    Case("alpha_flow", {"alpha": 0.0}, "jump", True),
    # Unsquared norms.
    Case("consistency", {"distance": "huber"}, "data", True),
    Case("ect", {"c": 0.1}, "data", True),
    # A normalised tangent is one divided by its own size.
    Case("scm", {"c": None}, "data", False),
    Case("scm", {"c": 0.1}, "data", True),
    # FACM's anchor holds an angle to v_hat, and its consistency term a clamp and A(1/2, c).
    Case("facm", {}, "diagonal", True),
    Case("facm", {}, "data", True),
]


def gradient(case: Case, shift: Tensor | float = 0.0) -> Tensor:
    """Return the expected gradient (2,) by the network's output at POINT, the marginal solution moved by `shift`."""
    objective = objectives.get(case.name)
    x0, x1, weights = posterior()
    t = torch.full((len(x0),), T, dtype=torch.float64)
    ends = {"diagonal": t, "jump": 0.4 * t, "data": 0 * t}
    moved = torch.zeros(len(x0), 2, dtype=torch.float64, requires_grad=True)

    def net(x: Tensor, t: Tensor, s: Tensor, y: Tensor | None = None) -> Tensor:
        if case.end == "diagonal" or "r" in objective.times:  # denoising's u is (x - E[x0 | x]) / t: the velocity
            return RING.velocity(x, t) + (moved + shift) * (s == t if case.name == "facm" else t == T)[:, None]
        return RING.average_velocity(x, t, s, STEPS) + (moved + shift) * (s < t)[:, None]

    times = {"t": t, "s": ends[case.end], "r": 0 * t, "delta": 0 * t}
    inputs = [times[name] for name in objective.times]
    loss, _ = objective.function(net, x0, x1, *inputs, **case.options)
    (rows,) = torch.autograd.grad(loss, moved)
    return len(rows) * weights @ rows


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_expected_gradient_at_the_marginal_solution(case: Case) -> None:
    """Check that it vanishes for a plain square, and not where a row's own noise decides the row's weight."""
    found = gradient(case).abs().max().item()
    assert (found > MOVED) if case.moved else (found < ZERO)


def fixed_point(targets: Tensor, masses: Tensor, p: float, c: float, start: Tensor) -> Tensor:
    """Return u (2,) with E[(|u - target|^2 + c)^-p (u - target)] = 0, the one that is reached from `start`."""
    u = start
    for _ in range(5000):
        weights = masses * ((u - targets).square().sum(1) + c) ** -p
        u, before = (weights @ targets) / weights.sum(), u
        if (u - before).abs().max() < 1e-14:
            break
    return u


def jump_targets(end: float, along: str) -> tuple[Tensor, Tensor]:
    """Return the targets v_hat - (t - s) D u (N, 2) at POINT, and the exact u (2,) there.

    The derivative runs along the row's v_hat, or along the marginal v.
    """
    x0, x1, _ = posterior()
    x, t = (1 - T) * x0 + T * x1, torch.full((len(x0),), T, dtype=torch.float64)
    v_hat = x1 - x0
    direction = v_hat if along == "v_hat" else RING.velocity(x, t)
    u, rate = torch.func.jvp(
        lambda x, t: RING.average_velocity(x, t, end + 0 * t, STEPS), (x, t), (direction, torch.ones_like(t))
    )
    return v_hat - (T - end) * rate, u[0]


@pytest.mark.parametrize(("name", "p"), [("meanflow", 0.5), ("improved_meanflow", 1.0)])
def test_the_optimum_of_a_weighed_jump_is_another_velocity(name: str, p: float) -> None:
    """Check that at the root of E[w(D) D] = 0 its gradient vanishes, and that of p = 0 doesn't."""
    targets, u = jump_targets(0.4 * T, "v_hat" if name == "meanflow" else "v")
    best = fixed_point(targets, posterior()[2], p, 0.01, u)
    assert (best - u).norm() > 0.05
    assert gradient(Case(name, {"p": p, "c": 0.01}, "jump", True), best - u).abs().max() < ZERO
    assert gradient(Case(name, {"p": 0.0}, "jump", True), best - u).abs().max() > MOVED


@pytest.mark.parametrize(
    ("case", "p", "c"),
    [
        (Case("meanflow", {"p": 0.5, "c": 0.01}, "diagonal", True), 0.5, 0.01),
        (Case("meanflow", {"p": 1.0, "c": 0.01}, "diagonal", True), 1.0, 0.01),
        (Case("improved_meanflow", {"p": 1.0, "c": 0.01}, "diagonal", True), 1.0, 0.01),
        (Case("alpha_flow", {"alpha": 1.0, "c": 0.01}, "diagonal", True), 1.0, 0.01),
        # Both of these measure T u: a norm of T D, smoothed below c, has the weight of A(1/2, (c / T)^2).
        (Case("ect", {"c": 0.1}, "data", True), 0.5, (0.1 / T) ** 2),
        (Case("consistency", {"distance": "huber", "c": 0.1}, "data", True), 0.5, (0.1 / T) ** 2),
    ],
    ids=str,
)
def test_the_optimum_on_the_diagonal_is_where_the_weighed_mean_vanishes(case: Case, p: float, c: float) -> None:
    """Check it for denoising, too: ECT and Pseudo-Huber training then learn a smoothed median of x0, not its mean."""
    x0, x1, masses = posterior()
    v = masses @ (x1 - x0)
    best = fixed_point(x1 - x0, masses, p, c, v)
    assert (best - v).norm() > 0.05
    assert gradient(case, best - v).abs().max() < 1e-8


def test_the_quadrature_has_the_rings_velocity() -> None:
    x0, x1, masses = posterior()
    x, t = torch.tensor([POINT], dtype=torch.float64), torch.tensor([T], dtype=torch.float64)
    torch.testing.assert_close(masses @ (x1 - x0), RING.velocity(x, t)[0], rtol=0, atol=1e-12)


def relative_bias(p: float, points: int = 96) -> float:
    """Return (E|u* - v|^2 / E|v|^2)^(1/2) over x_t at t = 1/2, for the optimum u* of A(p, 0.01) reached from v.

    The posterior of x0 is a sum over a square lattice of step .04, which resolves c; the points are draws
    of x_t.
    """
    axis = torch.arange(-3, 3, 0.04, dtype=torch.float64)
    lattice = torch.cartesian_prod(axis, axis)
    density = (-(lattice[:, None] - RING.means).square().sum(2) / (2 * RING.std**2)).exp().sum(1)
    lattice, density = lattice[density > 1e-4], density[density > 1e-4]
    generator = torch.Generator().manual_seed(0)
    x0, _ = RING.sample(points, generator)
    x = (1 - T) * x0.double() + T * torch.randn(points, 2, generator=generator, dtype=torch.float64)
    apart = torch.cdist((1 - T) * lattice, x).square().T  # (points, lattice)
    masses = (density.log() - apart / (2 * T**2)).softmax(1)
    v = (x - masses @ lattice) / T
    u = v
    for _ in range(60):
        weights = masses * (torch.cdist(x - T * u, lattice).square() / T**2 + 0.01) ** -p
        u = (x - weights @ lattice / weights.sum(1, keepdim=True)) / T
    return float(((u - v).square().sum() / v.square().sum()).sqrt())


@pytest.mark.parametrize(("p", "bias"), [(0.0, 0.0), (0.5, 0.45), (1.0, 0.83)])
def test_the_articles_numbers_of_the_bias(p: float, bias: float) -> None:
    """Check docs/methods.md, "How a residual becomes a loss"."""
    assert relative_bias(p) == pytest.approx(bias, abs=0.06)
