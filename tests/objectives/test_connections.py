"""Check the connections of docs/methods.md, how the methods become each other, on gradients of a network.

Numbers in the names of sections are those of the article. Everything is float64; each statement has a planted error
that must break it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdistill.eval.exact import Gaussian
from fastdistill.jvp import jvp
from fastdistill.objectives import (
    alpha_flow,
    ayf_emd,
    ayf_lmd,
    consistency,
    facm,
    flow_matching,
    meanflow,
    scm,
    shortcut,
)
from fastdistill.objectives.imm import imm, imm_weight
from fastdistill.paths import LINEAR, Cosine
from fastdistill.samplers import Net

ROWS, WIDTH = 48, 3


class SmallNet(nn.Module):
    """Network of (x, t, s), smooth, whose derivatives in all three are of order one."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(WIDTH + 4, width), nn.Tanh(), nn.Linear(width, WIDTH)).double()

    def forward(self, x: Tensor, t: Tensor, s: Tensor, y: Tensor | None = None) -> Tensor:
        times = torch.stack((t, s), 1)
        return self.body(torch.cat((x, times, (2 * times).sin()), 1))


@pytest.fixture
def net() -> SmallNet:
    torch.manual_seed(0)
    return SmallNet()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw x0, x1 (ROWS, WIDTH), t and s (ROWS,) with gaps of 0.1 to 0.5."""
    generator = torch.Generator().manual_seed(1)
    x0, x1 = torch.randn(2, ROWS, WIDTH, dtype=torch.float64, generator=generator)
    t, gap = torch.rand(2, ROWS, dtype=torch.float64, generator=generator)
    t = 0.6 + 0.35 * t
    return x0, x1, t, t - 0.1 - 0.4 * gap


@pytest.fixture
def law() -> Gaussian:
    generator = torch.Generator().manual_seed(2)
    factor = torch.randn(WIDTH, WIDTH, dtype=torch.float64, generator=generator)
    mean = torch.randn(WIDTH, dtype=torch.float64, generator=generator)
    return Gaussian(mean, factor @ factor.T / WIDTH + 0.2 * torch.eye(WIDTH, dtype=torch.float64))


@pytest.fixture
def teacher(law: Gaussian) -> Net:
    return lambda x, t, s, y=None: law.velocity(x, t)


def gradient(loss: Tensor, net: nn.Module) -> Tensor:
    """Return the gradient of a loss in all weights, as one vector."""
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(net.parameters()))])


def away(a: Tensor, b: Tensor) -> float:
    """Return the distance of two gradients, relative to the second."""
    return float((a - b).norm() / b.norm())


def jump(net: Net, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Return the flow map f = x - (t - s) u."""
    return x - (t - s)[:, None] * net(x, t=t, s=s, y=None)


def along(net: Net, x: Tensor, t: Tensor, s: Tensor, w: Tensor, tangent_grad: bool = False) -> tuple[Tensor, Tensor]:
    """Return f and D_w f, both (ROWS, WIDTH)."""
    return jvp(lambda x, t, s: jump(net, x, t, s), (x, t, s), (w, 1.0, None), tangent_grad=tangent_grad)


def consistency_gradient(net: SmallNet, x: Tensor, t: Tensor, s: Tensor, w: Tensor, weight: Any = 1.0) -> Tensor:
    """Return the mean over rows of weight (df/dtheta)^T [D_w f]: continuous consistency towards s."""
    f, df_dt = along(net, x, t, s, w)
    return gradient((weight * (f * df_dt).sum(1)).mean(), net)


def of(objective: Callable[..., tuple[Tensor, Any]], net: SmallNet, *arguments: Tensor, **options: Any) -> Tensor:
    """Return the gradient of an objective."""
    return gradient(objective(net, *arguments, **options)[0], net)


def falls_in_proportion(error: Callable[[float], float], large: float = 1e-2) -> bool:
    """Return whether an error is of first order in a step: small, and a tenth for a tenth of the step."""
    first, second = error(large), error(0.1 * large)
    return first < 0.2 and 0.08 < second / first < 0.12


# 1. Continuous consistency is the limit of discrete consistency: of grad L / (2 (t - r))


@pytest.mark.parametrize("distilled", [False, True], ids=["training", "distillation"])
def test_discrete_consistency_tends_to_continuous_consistency(
    net: SmallNet, batch: tuple[Tensor, ...], teacher: Net, distilled: bool
) -> None:
    x0, x1, t, s = batch
    x, options = LINEAR.interpolate(x0, x1, t), {"teacher": teacher} if distilled else {}
    w = teacher(x, t=t, s=t, y=None) if distilled else x1 - x0
    limit = consistency_gradient(net, x, t, 0 * s, w)

    def error(gap: float, divisor: float = 2.0) -> float:
        return away(of(consistency, net, x0, x1, t, t - gap, **options) / (divisor * gap), limit)

    assert falls_in_proportion(error)
    assert error(1e-3, divisor=1.0) > 0.9, "grad L / (t - r) has twice the limit"


def test_without_the_stop_gradient_there_is_no_such_limit(net: SmallNet, batch: tuple[Tensor, ...]) -> None:
    """Check that both gradients then cancel to first order, and the quotient goes to zero."""
    x0, x1, t, s = batch
    x, gap = LINEAR.interpolate(x0, x1, t), 1e-3
    difference = jump(net, x, t, 0 * s) - jump(net, LINEAR.interpolate(x0, x1, t - gap), t - gap, 0 * s)
    full = gradient(difference.square().sum(1).mean(), net) / (2 * gap)
    assert full.norm() < 0.05 * consistency_gradient(net, x, t, 0 * s, x1 - x0).norm()


def test_scm_without_its_stabilisers_is_continuous_consistency(
    net: SmallNet, batch: tuple[Tensor, ...], teacher: Net
) -> None:
    """Check it with weight 1 / t, as df/dtheta = -t dF/dtheta; 2 / WIDTH as it averages squares over elements."""
    x0, x1, t, s = batch
    x = LINEAR.interpolate(x0, x1, t)
    limit = consistency_gradient(net, x, t, 0 * s, teacher(x, t=t, s=t, y=None), 1 / t) * 2 / WIDTH
    plain: dict[str, Any] = {"teacher": teacher, "c": None}
    assert away(of(scm, net, x0, x1, t, **plain), limit) < 1e-10
    assert away(of(scm, net, x0, x1, t, **plain, warmup=0.5), limit) > 1e-2
    assert away(of(scm, net, x0, x1, t, teacher=teacher), limit) > 1e-2, "with the normalised tangent"


def test_scm_on_the_trigonometric_path_is_continuous_consistency_there(
    net: SmallNet, batch: tuple[Tensor, ...]
) -> None:
    """Check it with k = cot of the angle: g = cos D_w f, and df/dtheta = -sin dF/dtheta (times as angles)."""
    x0, x1, t, s = batch
    path, angle = Cosine(), 0.5 * math.pi * t
    x, w = path.interpolate(x0, x1, t), path.velocity(x0, x1, t)
    per_angle = 2 / math.pi
    limit = consistency_gradient(net, x, t, 0 * s, w, per_angle * angle.cos() / angle.sin()) * 2 / WIDTH
    assert away(of(scm, net, x0, x1, t, path=path, c=None), limit) < 1e-10
    assert away(of(scm, net, x0, x1, t, path=path, c=None, parameterization="average"), limit) > 1e-2


# 2, 3, 4. AYF-EMD: its own limit, flow matching as s -> t, continuous consistency at s = 0, MeanFlow


def test_ayf_emd_is_the_limit_of_its_discrete_loss(net: SmallNet, batch: tuple[Tensor, ...], teacher: Net) -> None:
    """Check it for w = 1 / d^2, so that w' = w d = 1 / d; the limit is of grad L / (2 epsilon), ayf_emd is twice it."""
    x0, x1, t, s = batch
    x, d = LINEAR.interpolate(x0, x1, t), t - s
    v, limit = teacher(x, t=t, s=t, y=None), 0.5 * of(ayf_emd, net, x0, x1, t, s, teacher=teacher, c=None)

    def error(epsilon: float, power: int = 2) -> float:
        start = t + epsilon * (s - t)
        goal = jump(net, x - (epsilon * d)[:, None] * v, start, s).detach()
        loss = (d**-power * (jump(net, x, t, s) - goal).square().sum(1)).mean()
        return away(gradient(loss, net) / (2 * epsilon), limit)

    assert falls_in_proportion(error)
    assert error(1e-3, power=1) > 0.3


def test_ayf_lmd_is_the_limit_of_its_discrete_loss(net: SmallNet, batch: tuple[Tensor, ...], teacher: Net) -> None:
    """Check it at the end: the map to s' = s + epsilon (t - s), and from there one Euler step of the teacher to s."""
    x0, x1, t, s = batch
    x, d = LINEAR.interpolate(x0, x1, t), t - s
    limit = 0.5 * of(ayf_lmd, net, x0, x1, t, s, teacher=teacher, c=None)

    def error(epsilon: float, sign: float = 1.0) -> float:
        end = s + epsilon * d
        f = jump(net, x, t, end).detach()
        goal = f - sign * (epsilon * d)[:, None] * teacher(f, t=end, s=end, y=None)
        loss = ((jump(net, x, t, s) - goal).square().sum(1) / d**2).mean()
        return away(gradient(loss, net) / (2 * epsilon), limit)

    assert falls_in_proportion(error)
    assert error(1e-3, sign=-1.0) > 0.3, "the teacher's step goes down in time"


def test_ayf_emd_tends_to_flow_matching_as_s_tends_to_t(net: SmallNet, batch: tuple[Tensor, ...], teacher: Net) -> None:
    """Check it for w = 1 / d^2 alone: times d, i.e. w = 1 / d, the gradient vanishes instead."""
    x0, x1, t, _ = batch
    x = LINEAR.interpolate(x0, x1, t)
    residual = net(x, t, t) - teacher(x, t=t, s=t, y=None)
    limit = gradient(residual.square().sum(1).mean(), net)

    def error(d: float, power: int = 0) -> float:
        return away(d**power * of(ayf_emd, net, x0, x1, t, t - d, teacher=teacher, c=None), limit)

    assert falls_in_proportion(error)
    assert error(1e-3, power=1) > 0.9
    assert error(1e-3, power=-1) > 100


def test_at_s_equal_t_meanflow_is_flow_matching(net: SmallNet, batch: tuple[Tensor, ...]) -> None:
    x0, x1, t, s = batch
    expected = WIDTH * of(flow_matching, net, x0, x1, t)
    assert away(of(meanflow, net, x0, x1, t, t, p=0.0), expected) < 1e-10
    assert away(of(meanflow, net, x0, x1, t, s, p=0.0), expected) > 1e-2


def test_ayf_emd_at_s_0_is_continuous_consistency(net: SmallNet, batch: tuple[Tensor, ...], teacher: Net) -> None:
    x0, x1, t, s = batch
    x = LINEAR.interpolate(x0, x1, t)
    limit = 2 * consistency_gradient(net, x, t, 0 * s, teacher(x, t=t, s=t, y=None), 1 / t)
    options: dict[str, Any] = {"teacher": teacher, "c": None}
    assert away(of(ayf_emd, net, x0, x1, t, 0 * s, **options), limit) < 1e-10
    assert away(WIDTH * of(scm, net, x0, x1, t, **options), limit) < 1e-10
    assert away(of(ayf_emd, net, x0, x1, t, s, **options), limit) > 1e-2


def test_meanflows_gradient_is_that_of_ayf_emd_at_weight_1_over_d(
    net: SmallNet, batch: tuple[Tensor, ...], teacher: Net
) -> None:
    expected = of(ayf_emd, net, *batch, teacher=teacher, c=None)
    assert away(of(meanflow, net, *batch, teacher=teacher, p=0.0), expected) < 1e-12
    for mutant in ({"warmup": 0.9, "c": None}, {"c": 0.1}):
        assert away(of(ayf_emd, net, *batch, teacher=teacher, **mutant), expected) > 1e-2
    d = batch[2] - batch[3]
    x = LINEAR.interpolate(*batch[:3])
    w = teacher(x, t=batch[2], s=batch[2], y=None)
    assert away(2 * consistency_gradient(net, x, *batch[2:], w, 1 / d), expected) < 1e-10
    assert away(2 * consistency_gradient(net, x, *batch[2:], w), expected) > 0.1, "at another weight it is not"


# 5. FACM's consistency term is MeanFlow's at s = 0


def test_facm_is_meanflow_at_s_0(net: SmallNet, batch: tuple[Tensor, ...], teacher: Net) -> None:
    """Check it without clamp, with the whole tangent (p large), a flat weight (c large), and an anchor that is met."""
    x0, x1, _, _ = batch
    t, c = torch.full((ROWS,), 0.7, dtype=torch.float64), 1e8

    def anchored(x: Tensor, t: Tensor, s: Tensor, y: Tensor | None = None) -> Tensor:
        return teacher(x, t=t, s=s, y=y) if torch.equal(t, s) else net(x, t, s)

    def term(**options: Any) -> Tensor:
        given = {"p": 1e3, "c": c, "clamp": 1e6} | options
        loss, _ = facm(anchored, x0, x1, t, teacher=teacher, **given)
        return gradient(loss, net) * c**0.5 * WIDTH / math.cos(0.5 * math.pi * 0.3)

    expected = of(meanflow, net, x0, x1, t, 0 * t, teacher=teacher, p=0.0)
    assert away(term(), expected) < 1e-6
    assert away(term(p=0.5), expected) > 0.1, "its target takes a share of the tangent only"
    assert away(term(clamp=0.1), expected) > 0.1
    assert away(term(), of(meanflow, net, x0, x1, t, 0.5 * t, teacher=teacher, p=0.0)) > 1e-2


# 6. The same zero, another gradient: stop-gradient against full


def test_full_and_stopped_gradients_vanish_together_and_differ_elsewhere(
    net: SmallNet, batch: tuple[Tensor, ...], law: Gaussian
) -> None:
    x0, x1, t, s = batch
    x, d = LINEAR.interpolate(x0, x1, t), (t - s)[:, None]
    v = law.velocity(x, t)
    bend = nn.Linear(WIDTH, WIDTH, bias=False).double()

    def full(model: Net, owner: nn.Module, end: bool) -> Tensor:
        if end:
            f, rate = jvp(lambda s: jump(model, x, t, s), (s,), (1.0,), tangent_grad=True)
            return gradient((rate - law.velocity(f, s)).square().sum(1).mean(), owner)
        return gradient(along(model, x, t, s, v, tangent_grad=True)[1].square().sum(1).mean(), owner)

    def stopped(model: Net, owner: nn.Module, end: bool) -> Tensor:
        options: dict[str, Any] = {"teacher": lambda x, t, s, y=None: law.velocity(x, t), "c": None}
        return gradient((ayf_lmd if end else ayf_emd)(model, x0, x1, t, s, **options)[0], owner)

    for end in (False, True):
        a, b = (kind(net, net, end) for kind in (full, stopped))
        assert torch.nn.functional.cosine_similarity(a, b, dim=0) < 0.99
        for size, vanish in ((0.0, True), (0.3, False)):
            nn.init.constant_(bend.weight, size)
            exact = lambda x, t, s, y=None: law.average_velocity(x, t, s) + bend(x) * t[:, None]  # noqa: E731
            norms = [float(kind(exact, bend, end).norm()) for kind in (full, stopped)]
            assert max(norms) < 1e-10 if vanish else min(norms) > 1e-2
    assert d.min() > 0


def test_full_gradient_is_the_limit_without_stop_gradient(
    net: SmallNet, batch: tuple[Tensor, ...], law: Gaussian
) -> None:
    """Check that grad L / epsilon^2 tends to the gradient of E d^2 |D_v f|^2, without a factor 2."""
    x0, x1, t, s = batch
    x, d = LINEAR.interpolate(x0, x1, t), t - s
    v = law.velocity(x, t)
    rate = along(net, x, t, s, v, tangent_grad=True)[1]
    limit = gradient((d**2 * rate.square().sum(1)).mean(), net)

    def error(epsilon: float, factor: float = 1.0) -> float:
        moved = jump(net, x - (epsilon * d)[:, None] * v, t - epsilon * d, s)
        loss = (jump(net, x, t, s) - moved).square().sum(1).mean()
        return away(gradient(loss, net) / (factor * epsilon**2), limit)

    assert falls_in_proportion(error)
    assert error(1e-3, factor=2.0) > 0.4


# 7. alpha-Flow's ends


def test_alpha_flow_goes_from_flow_matching_to_meanflow(net: SmallNet, batch: tuple[Tensor, ...]) -> None:
    """Check that with a flat weight (c large) its gradient is a^2 / c times that of the residual over a."""
    x0, x1, t, s = batch
    c, w = 1e8, x1 - x0
    end = of(meanflow, net, *batch, p=0.0)
    start = gradient((net(LINEAR.interpolate(x0, x1, t), t, s) - w).square().sum(1).mean(), net)

    def scaled(a: float) -> Tensor:
        return of(alpha_flow, net, *batch, alpha=a, c=c) * c / (a**2 or 1)

    assert away(scaled(1.0), start) < 1e-6
    assert falls_in_proportion(lambda a: away(scaled(a), end))
    assert away(scaled(0.0), end) < 1e-6
    assert away(scaled(0.5), end) > 1e-2
    assert away(scaled(1.0), end) > 0.03


# 8. Shortcut's error in f is d^2 times its error in u


def test_shortcuts_error_of_the_map_is_d_squared_times_that_of_the_velocity(
    net: SmallNet, batch: tuple[Tensor, ...]
) -> None:
    x0, x1, t, s = batch
    x, m, d = LINEAR.interpolate(x0, x1, t), 0.5 * (t + s), t - s
    of_map = (jump(net, x, t, s) - jump(net, jump(net, x, t, m), m, s)).square().sum(1)
    of_velocity = WIDTH * shortcut(net, x0, x1, t, 0.5 * d)[1]["rows"]["raw_error"]
    torch.testing.assert_close(of_map.detach(), d**2 * of_velocity, rtol=1e-8, atol=1e-14)
    assert ((of_map - d * of_velocity).abs() > 0.2 * of_map).all()


# 9. One particle of IMM is a consistency model


def test_imm_with_one_particle_is_consistency_with_the_norm_unsquared(net: SmallNet, batch: tuple[Tensor, ...]) -> None:
    """Check Laplace's kernel at a small sharpness k: MMD^2 = 2 (1 - exp(-k n / D)), about 2 k n / D for the norm n."""
    x0, x1, _, _ = batch
    t = torch.full((ROWS,), 0.8, dtype=torch.float64)
    r, k = t - 0.2, 1e-6
    given = of(imm, net, x0, x1, t, r, 0 * t, group=1, sharpness=k) * WIDTH / (2 * k * imm_weight(LINEAR, t)[0])
    assert away(given, of(consistency, net, x0, x1, t, r, distance="huber", c=1e-9)) < 1e-5
    assert away(given, of(consistency, net, x0, x1, t, r, distance="l2")) > 0.1
    several = of(imm, net, x0, x1, t, r, 0 * t, group=4, sharpness=k) * WIDTH / (2 * k * imm_weight(LINEAR, t)[0])
    assert away(several, given) > 0.1, "with four particles it compares laws"
