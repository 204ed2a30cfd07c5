"""FACM against its algorithm, written out."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdistill.objectives import facm, meanflow
from tests.objectives.cases import WIDTH, Gate, SmallNet, assert_same_gradient, gradients, random_batch
from tests.objectives.descent import Case, diagonal, state


def facm_anchor(gate: Gate, d: Tensor) -> Tensor:
    """Return the mean square's 2, and of 1 - cos(w + theta e, w) the square of e's part across w over that of w."""
    w = gate.law.velocity(state(gate), gate.times["t"])
    length = w.square().sum(1)
    return 2 + (WIDTH - w.sum(1).square() / length) / length


TAUGHT = {"facm": {}}
FROM_DATA = {"facm": {}}
DESCENT = {
    # Its mean square is (kappa 3 t^2 theta)^2, kappa = 1 - (1 - t)^p, and stands over [c]^(1/2).
    "facm": Case(
        "facm",
        lambda g, d: (0.5 * torch.pi * (1 - d)).cos() * 2 * d**2 * (1 - (1 - d) ** 0.5) * 3 * d**2 / 1e-3**0.5,
    ),
    "facm, anchor": Case("facm", facm_anchor, diagonal),
}


def algorithm(net: SmallNet, x0: Tensor, x1: Tensor, t: Tensor, bound: float) -> Tensor:
    """Compute the algorithm: anchor at (t, t), tangent at (t, 0), mean over elements, p = 1/2, offset 1e-3."""
    column, w = t[:, None], x1 - x0
    x = (1 - column) * x0 + column * x1
    anchor = net(x, t, t)
    fm = (anchor - w).square().mean(1) + 1 - (anchor * w).sum(1) / (anchor.norm(dim=1) * w.norm(dim=1))
    f, df = torch.func.jvp(lambda x, t: net(x, t, 0 * t), (x, t), (w, torch.ones_like(t)))[:2]
    g = (f - (w - column * df)).clamp(-bound, bound)
    target = f - (1 - (1 - column).sqrt()) * g
    e = (f - target.detach()).square().mean(1)
    return (fm + torch.cos(0.5 * math.pi * (1 - t)) * e / (e.detach() + 1e-3).sqrt()).mean()


def test_it_is_the_algorithm_with_data_at_0() -> None:
    """Check that the clamp acts within the residuals themselves in this batch for 0.3, and never for 100."""
    net, (x0, x1, times) = SmallNet(), random_batch()
    values = []
    for bound in (0.3, 1.0, 100.0):
        loss, metrics = facm(net, x0, x1, times["t"], clamp=bound)
        expected = algorithm(net, x0, x1, times["t"], bound)
        torch.testing.assert_close(loss, expected)
        assert_same_gradient(loss, expected, net)
        values.append(loss.item())
        assert metrics["anchor_error"] > 0
    assert values[0] < values[1] < values[2]


def test_its_second_term_is_meanflows_residual_at_s_0() -> None:
    """Check that the raw error is the same; MeanFlow's is the unclamped g."""
    net, (x0, x1, times) = SmallNet(), random_batch()
    _, ours = facm(net, x0, x1, times["t"])
    _, theirs = meanflow(net, x0, x1, times["t"], 0 * times["t"], p=0.0)
    torch.testing.assert_close(ours["raw_error"], theirs["raw_error"])
    torch.testing.assert_close(ours["tangent_norm"], theirs["tangent_norm"])


def test_near_the_data_only_the_anchor_pulls() -> None:
    """Check that cos(pi (1 - t) / 2) and 1 - (1 - t)^(1/2) both go to 0 with t."""
    net, (x0, x1, times) = SmallNet(), random_batch()
    t = 0 * times["t"] + 1e-9
    loss, _ = facm(net, x0, x1, t)
    free, _ = facm(net, x0, x1, t, clamp=1e6)
    torch.testing.assert_close(gradients(loss, net), gradients(free, net), rtol=1e-6, atol=1e-8)
