"""Tier 1, of signs: a network a little beside the exact solution is brought back to it by descent.

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

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill import objectives
from fastdistill.eval.exact import Gaussian
from fastdistill.jvp import jvp
from fastdistill.objectives.imm import imm_weight
from fastdistill.objectives.metric import normalise_tangent
from fastdistill.objectives.reflow import coupled_pairs
from fastdistill.paths import LINEAR, OTCFM, Cosine, Path
from fastdistill.samplers import Net
from fastdistill.times import Constant
from tests.objectives.cases import ROWS, WIDTH, Gate, exact_net

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
    """A method with a direction, and what its gradient by theta is.

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
        """The same gate, but for `prepare`, at each call."""
        torch.manual_seed(0)
        gate = Gate(self.name, self.path, self.taught, self.options)
        self.prepare(gate, theta)
        return gate

    def expected(self, theta: float) -> float:
        """The gradient at theta."""
        gate = self.gate(theta)
        d = gate.times["t"] - (gate.times["s"] if {"s", "delta"} & set(gate.objective.times) else 0)
        return (THETA if self.order else 1.0) * (1 if theta > 0 else -1) * self.slope(gate, d).mean().item()

    def loss(self, theta: Tensor, target: float | None = None, **keywords: Any) -> Tensor:
        """The loss at theta; with `target` a network at that theta takes the target's part."""
        gate = self.gate(THETA if theta > 0 else -THETA)
        if target is not None:
            keywords["target"] = moved(gate.net, torch.tensor(target, dtype=torch.float64), self.direction)
        net, times = moved(gate.net, theta, self.direction), [gate.times[name] for name in gate.objective.times]
        return gate.objective.function(net, gate.x0, gate.x1, *times, **(gate.keywords | keywords))[0]

    def gradient(self, theta: float, **keywords: Any) -> float:
        """The gradient that a trainer would follow."""
        leaf = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
        return torch.autograd.grad(self.loss(leaf, **keywords), leaf)[0].item()

    def derivative(self, theta: float, prediction: bool = True, target: bool = True) -> float:
        """Of the loss's value, by differences, while the prediction moves alone, or the target, or both as one."""

        def value(step: float) -> float:
            moving = torch.tensor(theta + step * prediction, dtype=torch.float64)
            return self.loss(moving, None if prediction and target else theta + step * target).item()

        return (value(STEP) - value(-STEP)) / (2 * STEP)


def moved(net: Net, theta: Tensor, direction: Direction) -> Net:
    """u + theta phi."""

    def changed(x: Tensor, t: Tensor, s: Tensor, y: Tensor | None = None) -> Tensor:
        return net(x, t=t, s=s, y=y) + theta * direction(t, s)[:, None] * torch.ones_like(x)

    return changed


def descends(case: Case, gradient: Callable[[float], float]) -> bool:
    """Whether the gradient is the expected one on either side of the exact solution, where it points away from it."""
    expected = {theta: case.expected(theta) for theta in (-THETA, THETA)}
    assert expected[-THETA] < 0 < expected[THETA]
    return all(abs(gradient(theta) - value) < TOLERANCE * abs(value) for theta, value in expected.items())


# What the slopes are made of


def ones(gate: Gate) -> Tensor:
    return torch.ones_like(gate.x1)


def state(gate: Gate) -> Tensor:
    return gate.path.interpolate(gate.x0, gate.x1, gate.times["t"])


def share(gate: Gate) -> Tensor:
    """1 in rows with s = t, and 0 elsewhere."""
    return (gate.times["t"] == gate.times["s"]).to(gate.x1)


def turn(gate: Gate, d: Tensor) -> Tensor:
    """(e, (dv/dx) e) of the exact velocity where the jump ends: how it changes when the end is moved."""
    t, s = gate.times["t"], gate.times["s"]
    end = gate.law.flow_map(state(gate), t, s)
    return (gate.law.velocity(end + 1, s) - gate.law.velocity(end, s)).sum(1)


def halves(gate: Gate, d: Tensor) -> Tensor:
    """Two jumps of d / 2 as the target, a mean over elements, in all rows.

    phi is d^2 e in the prediction and d^2/4 e in both halves of the target; the second starts where the first ends,
    off by -theta d^3/8 e, which adds half of that times du/dx = (1 - J) / (d/2), J = df/dx of the second half. In all
    the residual is theta d^2/8 (7 - J) e.
    """
    t, s = gate.times["t"], gate.times["s"]
    m, x = (t + s) / 2, state(gate)
    through = gate.law.flow_map(x + 1, m, s) - gate.law.flow_map(x, m, s)  # J e, as the map is affine in x
    return 2 * d**2 * d**2 / 8 * (7 - through.mean(1))


def lagrangian(gate: Gate, d: Tensor) -> Tensor:
    """(e, residual) over theta: u - d du/ds is off by 3 theta d^2 e, and the map by -theta d^3 e.

    The velocity where it ends, which is subtracted, is then off by -theta d^3 (dv/dx) e.
    """
    return 3 * WIDTH * d**2 + d**3 * turn(gate, d)


def noise_level(t: Tensor) -> Tensor:
    return t / (1 - t)


def facm_anchor(gate: Gate, d: Tensor) -> Tensor:
    """The mean square's 2, and of 1 - cos(w + theta e, w) the square of e's part across w over that of w."""
    w = gate.law.velocity(state(gate), gate.times["t"])
    length = w.square().sum(1)
    return 2 + (WIDTH - w.sum(1).square() / length) / length


def scm_on_the_circle(gate: Gate, d: Tensor) -> Tensor:
    """F = ((k - 1) x + t u) / beta is off by t^3 / beta, g by -k D_w(t phi) / W = -3 t^2 k / W; k = beta' / W."""
    path, t = gate.path, gate.times["t"]
    beta, rise = path.beta(t), path.d_beta(t)
    turning = path.alpha(t) * rise - beta * path.d_alpha(t)
    return 2 * (t**3 / beta) * (3 * t**2 * rise / turning**2) / 0.1


def in_groups(gate: Gate, theta: float) -> None:
    """IMM's times: equal in groups of four, s < r < t."""
    gate.times = {name: value[::4].repeat_interleave(4) for name, value in gate.times.items()}
    gate.times["s"] = 0.5 * gate.times["r"]


def imm_slope(gate: Gate, d: Tensor) -> Tensor:
    """A row's jumps from t and from r end in one point, and are off by -theta d^3 e and -theta (r - s)^3 e.

    Of -2 k(p_j, q_j) / M^2, k = exp(-|p - q| / (d W)), the derivative by theta through p is 2 d^3 |e| / (d W M^2), with
    theta's sign; the sum over M rows leaves one M. All other pairs add what falls with theta.
    """
    return imm_weight(gate.path, gate.times["t"]) * 2 * d**2 * WIDTH**0.5 / (4 * WIDTH)


def fake_of_shifted_samples(gate: Gate, theta: float) -> None:
    """DMD's second network: exact for samples that are off by -theta e."""
    gate.keywords["fake"] = exact_net(Gaussian(gate.law.mean - theta, gate.law.covariance, gate.path))
    gate.keywords |= {"levels": Constant(0.5), "generator": torch.Generator().manual_seed(1)}


def dmd_slope(gate: Gate, d: Tensor) -> Tensor:
    """Samples are off by -theta t^3 e, and delta is -theta B e over the row's mean |G - x0_teacher|, B = beta^2 C^-1.

    B e = e - alpha S C^-1 alpha e, the second part being how the teacher's data prediction moves with x = G + alpha e.
    """
    tau = torch.full_like(d, 0.5)
    samples = gate.law.flow_map(state(gate), gate.times["t"], 0 * tau)
    noise = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1)).double()
    x = LINEAR.interpolate(samples, noise, tau)

    def data(x: Tensor) -> Tensor:
        return x - 0.5 * gate.law.velocity(x, tau)

    pull = ones(gate) - (data(x + 0.5) - data(x))
    return d**3 * pull.mean(1) / (samples - data(x)).abs().mean(1)


def coupled_by_the_flow(gate: Gate, theta: float) -> None:
    """ReFlow's pairs, and the network that is exact for them: that of the exact transport."""
    gate.x0, gate.x1 = coupled_pairs(gate.net, gate.x1, None, 1, sampler="average_velocity")
    gate.net = exact_net(Gaussian(gate.law.mean, gate.law.covariance, OTCFM()))
    del gate.keywords["teacher"]


def towards_the_map(gate: Gate, theta: float) -> None:
    """rCM's score term, pulled back to where the exact map takes the noise."""
    one = torch.ones(ROWS, dtype=torch.float64)
    exact = gate.law.flow_map(gate.x1, one, 0 * one)
    gate.keywords["score_gradient"] = lambda samples, y: samples - exact


# The loss is a square's mean where nothing else is said; p = 1 and c divide it by c, as theta^2 is far below c, and so
# does the normalisation of a tangent with the constant c. Sums over elements bring a factor W.
CASES = {
    "flow matching": Case("flow_matching", lambda g, d: 2 + 0 * d, diagonal, taught=False),
    "reflow": Case("flow_matching", lambda g, d: 2 + 0 * d, diagonal, prepare=coupled_by_the_flow),
    "meanflow": Case("meanflow", lambda g, d: 2 * WIDTH * d**2 * 3 * d**2 / 1e-2),
    "meanflow from data": Case("meanflow", lambda g, d: 2 * WIDTH * d**2 * 3 * d**2 / 1e-2, taught=False),
    "meanflow, diagonal": Case("meanflow", lambda g, d: 2 * WIDTH * share(g) / 1e-2, diagonal),
    "improved meanflow": Case("improved_meanflow", lambda g, d: 2 * WIDTH * d**2 * 3 * d**2 / 1e-2),
    "improved meanflow, diagonal": Case("improved_meanflow", lambda g, d: 2 * WIDTH * share(g) / 1e-2, diagonal),
    # The second part of the target is off by (1 - a)^2 d^2 e, as it jumps from t - a d; the loss has a factor a.
    "alpha-flow": Case(
        "alpha_flow",
        lambda g, d: 0.5 * 2 * WIDTH * d**2 * (1 - 0.5**3) * d**2 / 1e-3,
        taught=False,
        options={"alpha": 0.5},
    ),
    "alpha-flow at 0": Case("alpha_flow", lambda g, d: 2 * WIDTH * d**2 * 3 * d**2 / 1e-3, options={"alpha": 0.0}),
    # f is off by -theta t^3 e, and its target by -theta r^3 e.
    "consistency": Case("consistency", lambda g, d: 2 * WIDTH * d**3 * (d**3 - g.times["r"] ** 3)),
    "consistency from data": Case(
        "consistency", lambda g, d: 2 * WIDTH * d**3 * (d**3 - g.times["r"] ** 3), taught=False
    ),
    "ect": Case(
        "ect",
        lambda g, d: WIDTH * d**3 * (d**3 - g.times["r"] ** 3) / 0.1 / (noise_level(d) - noise_level(g.times["r"])),
        taught=False,
        options={"c": 0.1},
    ),
    "scm": Case("scm", lambda g, d: 2 * d**2 * 3 * d**2 / 0.1),
    "scm on the circle": Case("scm", scm_on_the_circle, path=Cosine()),
    "scm from data": Case("scm", lambda g, d: 2 * d**2 * 3 * d**2 / 0.1, taught=False),
    "rcm": Case("rcm", lambda g, d: 2 * d**2 * 3 * d**2 / 0.1),
    "rcm, score": Case("rcm", lambda g, d: 0.02 + 0 * d, first, prepare=towards_the_map),
    # Its mean square is (kappa 3 t^2 theta)^2, kappa = 1 - (1 - t)^p, and stands over [c]^(1/2).
    "facm": Case(
        "facm",
        lambda g, d: (0.5 * torch.pi * (1 - d)).cos() * 2 * d**2 * (1 - (1 - d) ** 0.5) * 3 * d**2 / 1e-3**0.5,
    ),
    "facm, anchor": Case("facm", facm_anchor, diagonal),
    "ayf_emd": Case("ayf_emd", lambda g, d: 2 * WIDTH * d**2 * 3 * d**2 / 0.1),
    "ayf_lmd": Case("ayf_lmd", lambda g, d: 2 * d**2 * lagrangian(g, d) / 0.1),
    "shortcut": Case("shortcut", halves),
    "shortcut, diagonal": Case("shortcut", lambda g, d: 2 * share(g), diagonal),
    # The residual is 3 theta d^2 e. What moves with a gradient is d^2 e of u, and 2 d^2 e of d du/dt.
    "esd": Case("esd", lambda g, d: 2 * 3 * d**2 * 3 * d**2),
    "esd, through the tangent": Case("esd", lambda g, d: 2 * 3 * d**2 * 3 * d**2, options={"through": "tangent"}),
    "esd, through nothing": Case("esd", lambda g, d: 2 * d**2 * 3 * d**2, options={"through": "nothing"}),
    "esd, diagonal": Case("esd", lambda g, d: 2 * share(g), diagonal),
    # The gradient flows through the derivative, too: the prediction u - d du/ds is off by 3 theta d^2 e.
    "lsd": Case("lsd", lambda g, d: 2 * 3 * d**2 * lagrangian(g, d) / WIDTH),
    "lsd, diagonal": Case("lsd", lambda g, d: 2 * share(g), diagonal),
    "psd": Case("psd", halves),
    "psd, diagonal": Case("psd", lambda g, d: 2 * share(g), diagonal),
    "tvm": Case("tvm", lambda g, d: 2 * 3 * d**2 * lagrangian(g, d) / WIDTH),
    "tvm, anchor": Case("tvm", lambda g, d: 2 + 0 * d, diagonal),
    "imm": Case("imm", imm_slope, taught=False, prepare=in_groups, order=0),
    "dmd": Case("dmd", dmd_slope, prepare=fake_of_shifted_samples),
}
EACH = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def some(*names: str) -> pytest.MarkDecorator:
    """These cases."""
    return pytest.mark.parametrize("case", [CASES[name] for name in names], ids=names)


@EACH
def test_descent_leads_back_to_the_exact_solution(case: Case) -> None:
    assert descends(case, case.gradient)


def test_every_method_has_a_case() -> None:
    assert {case.name for case in CASES.values()} == set(objectives.OBJECTIVES)


# Planted errors


@EACH
def test_a_negated_loss_is_found(case: Case) -> None:
    assert not descends(case, lambda theta: -case.gradient(theta))


TWO_EVALUATIONS = some("alpha-flow", "consistency", "consistency from data", "ect", "shortcut", "psd", "imm")


@TWO_EVALUATIONS
def test_a_prediction_swapped_with_its_target_is_found(case: Case) -> None:
    """The gradient is that of the loss's value by the prediction while the target is held, and not the other one."""
    assert descends(case, partial(case.derivative, target=False))
    assert not descends(case, partial(case.derivative, prediction=False))


@some("meanflow", "meanflow from data", "improved meanflow", "esd, through nothing")
def test_a_gradient_through_the_bracket_instead_is_found(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """[u] - (w - d D_w u), where u - [w - d D_w u] is meant."""

    def swapped(u: Tensor, du_dt: Tensor, w: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return u.detach() - (w - (t - s)[:, None] * du_dt)

    module = sys.modules[objectives.get(case.name).function.__module__]
    monkeypatch.setattr(module, "eulerian_residual", swapped)
    assert not descends(case, partial(case.gradient, jvp=partial(jvp, tangent_grad=True)))


@some("scm", "scm on the circle", "rcm", "ayf_emd", "ayf_lmd")
def test_a_pull_the_wrong_way_is_found(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """F - [F - g] for F - [F + g], which is also what swapping both sides makes of it."""
    continuous = case.name in ("scm", "rcm")
    function = objectives.continuous.regress if continuous else objectives.get(case.name).function
    module = sys.modules[function.__module__]
    monkeypatch.setattr(module, "normalise_tangent", lambda g, c: -normalise_tangent(g, c))
    assert not descends(case, case.gradient)


def test_scores_in_each_others_place_are_found() -> None:
    """DMD's teacher for its fake."""
    case, (fake, teacher) = CASES["dmd"], ("fake", "teacher")

    def gradient(theta: float) -> float:
        keywords = case.gate(theta).keywords
        return case.gradient(theta, fake=keywords[teacher], teacher=keywords[fake])

    assert not descends(case, gradient)


# What ESD stops, its diagonal and (du/dx) v, doesn't move along phi: test_self_distillation holds its gradient.
STOPS_NOTHING_ALONG_PHI = ("esd", "esd, through the tangent")


@some(*(name for name, case in CASES.items() if case.direction is jump and name not in STOPS_NOTHING_ALONG_PHI))
def test_a_lost_stop_gradient_is_found(case: Case) -> None:
    """The derivative of the loss's value is another number for every other method."""
    assert not descends(case, case.derivative)
