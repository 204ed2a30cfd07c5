"""Discrete consistency: distances, distillation and training, and the continuous limit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastdistill.objectives import consistency, scm
from fastdistill.objectives.solvers import solver_step
from fastdistill.paths import EDM, LINEAR, Cosine, convert
from tests.objectives.cases import WIDTH, SmallNet, gradients, random_batch
from tests.objectives.descent import Case

TAUGHT = {"consistency": {}}
FROM_DATA = {"consistency": {}}
DESCENT = {
    # f is off by -theta t^3 e, and its target by -theta r^3 e.
    "consistency": Case("consistency", lambda g, d: 2 * WIDTH * d**3 * (d**3 - g.times["r"] ** 3)),
    "consistency from data": Case(
        "consistency", lambda g, d: 2 * WIDTH * d**3 * (d**3 - g.times["r"] ** 3), taught=False
    ),
}


def jump(net: SmallNet, x: Tensor, t: Tensor) -> Tensor:
    return x - t[:, None] * net(x, t, 0 * t)


@pytest.mark.parametrize("distance", ["l2", "huber", "lpips"])
@pytest.mark.parametrize("taught", [False, True], ids=["training", "distillation"])
def test_loss_is_the_distance_of_two_jumps_to_the_data(taught: bool, distance: str) -> None:
    net, teacher, (x0, x1, times) = SmallNet(), SmallNet(), random_batch()
    t, r = times["t"], times["r"]
    x, step = LINEAR.interpolate(x0, x1, t), (t - r)[:, None]
    if taught:
        v = teacher(x, t, t)
        x_r = x - 0.5 * step * (v + teacher(x - step * v, r, r))
    else:
        x_r = LINEAR.interpolate(x0, x1, r)
    perceptual = lambda a, b: (a - b).abs().amax(1)  # noqa: E731
    loss, metrics = consistency(
        net, x0, x1, t, r, teacher=teacher if taught else None, distance=distance, c=0.2, perceptual=perceptual
    )
    delta = jump(net, x, t) - jump(net, x_r, r)
    square = delta.square().sum(1)
    expected = {"l2": square, "huber": (square + 0.04).sqrt() - 0.2, "lpips": delta.abs().amax(1)}[distance]
    torch.testing.assert_close(loss, expected.mean())
    torch.testing.assert_close(metrics["raw_error"], (delta / step).square().mean().detach())


def test_weight_is_a_function_of_both_times() -> None:
    """Check one over their gap."""
    net, (x0, x1, times) = SmallNet(), random_batch()
    t, r = times["t"], times["r"]
    loss, metrics = consistency(net, x0, x1, t, r, weight=lambda t, r: 1 / (t - r))
    squares = metrics["rows"]["raw_error"] * 3 * (t - r)  # over (t - r)^2, and means over three elements
    torch.testing.assert_close(loss.detach(), squares.mean())


def test_its_gradient_over_twice_the_gap_tends_to_continuous_consistencys() -> None:
    """Check d/dtheta f [D_w f] by l2, with f = x - t u: sCM's form for the average velocity with the weight t."""
    net, (x0, x1, times) = SmallNet(), random_batch()
    t = torch.full_like(times["t"], 0.6)
    limit, _ = scm(net, x0, x1, t, path=Cosine(), parameterization="average", c=None)
    truth = gradients(limit, net)
    errors = []
    for gap in (2e-3, 1e-3):
        loss, _ = consistency(net, x0, x1, t, t - gap, path=Cosine())
        # l2 sums over three elements and scm averages; its residual is D_w f, and f moves by t u; both have a factor 2.
        ours = gradients(loss, net) / gap / 3 / 0.6
        errors.append(((ours - truth).norm() / truth.norm()).item())
    assert errors[1] < 0.02
    assert 1.8 < errors[0] / errors[1] < 2.2


def test_a_step_that_ends_without_noise_has_no_correction() -> None:
    """Check EDM's algorithm 1: the slope there would divide by the noise. It is exact for data in one point."""
    path, x0, x1 = EDM(0.0, 20.0, 3.0), torch.full((4, 2), 0.3).double(), torch.randn(4, 2).double()
    t, zero = torch.linspace(0.2, 1, 4).double(), torch.zeros(4).double()

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return convert(path, x, t, x0, "x0", "v")

    for name in ("heun", "euler"):
        torch.testing.assert_close(solver_step(name, velocity, path.interpolate(x0, x1, t), t, zero, path), x0)
