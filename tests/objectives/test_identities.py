"""Check the identities as building blocks: each is the derivative or the jump that it says, and fits the exact flow."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastdistill.jvp import jvp
from fastdistill.objectives.identities import (
    eulerian,
    eulerian_residual,
    evaluate,
    flow_map,
    lagrangian,
    semigroup_target,
)
from fastdistill.paths import LINEAR, Cosine, Path, TrigFlow
from tests.objectives.cases import EXACT, ROWS, SmallNet, exact_net, gaussian_law, random_batch

PATHS = [pytest.param(path, id=type(path).__name__) for path in (LINEAR, Cosine(), TrigFlow())]


@pytest.mark.parametrize("path", PATHS)
def test_all_three_hold_at_the_exact_flow(path: Path) -> None:
    law, (x0, x1, times) = gaussian_law(path), random_batch()
    net, t, s = exact_net(law), times["t"], times["s"]
    x, d = path.interpolate(x0, x1, t), (t - s)[:, None]
    v = law.velocity(x, t)
    u, du_dt = eulerian(net, x, t, s, v, jvp=jvp)
    assert eulerian_residual(u, du_dt, v, t, s).abs().max() < EXACT
    u, du_ds = lagrangian(net, x, t, s, jvp=jvp)
    f = flow_map(net, x, t, s)
    assert (f - law.flow_map(x, t, s)).abs().max() < EXACT
    assert (u - d * du_ds - law.velocity(f, s)).abs().max() < EXACT
    for fraction in (0.0, 0.3, torch.rand(ROWS, dtype=torch.float64), 1.0):
        assert (semigroup_target(net, x, t, s, fraction) - u).abs().max() < EXACT


def test_eulerian_residual_is_minus_the_rate_of_the_map_and_has_gradient_by_u_only() -> None:
    net, (x0, x1, times) = SmallNet(), random_batch()
    t, s, w = times["t"], times["s"], x1 - x0
    u, du_dt = eulerian(net, x0, t, s, w, jvp=jvp)
    rate = torch.func.jvp(lambda x, t: flow_map(net, x, t, s), (x0, t), (w, torch.ones_like(t)))[1]
    torch.testing.assert_close(eulerian_residual(u, du_dt, w, t, s), -rate)
    torch.testing.assert_close(eulerian_residual(u, du_dt, w, t, s, 0.0), u - w)
    leaf, tangent = u.detach().requires_grad_(), du_dt.clone().requires_grad_()
    eulerian_residual(leaf, tangent, w, t, s).sum().backward()
    assert torch.equal(leaf.grad, torch.ones_like(leaf))
    assert tangent.grad is None


def test_semigroup_target_has_no_gradient_and_keeps_the_states_dtype() -> None:
    net, (x0, _, times) = SmallNet(), random_batch()
    low = lambda x, t, s, y: net(x, t, s).bfloat16()  # noqa: E731
    target = semigroup_target(low, x0, times["t"], times["s"], 0.5)
    assert target.dtype == torch.float64
    assert not target.requires_grad


def test_g_is_passed_only_where_there_is_one() -> None:
    x, t = torch.randn(3, 2), torch.rand(3)
    plain = lambda x, t, s, y: x  # noqa: E731

    def scaled(x: Tensor, t: Tensor, s: Tensor, y: Tensor | None, g: Tensor) -> Tensor:
        return x * g[:, None]

    assert torch.equal(evaluate(plain, x, t, t), x)
    assert torch.equal(evaluate(scaled, x, t, t, g=t), x * t[:, None])
