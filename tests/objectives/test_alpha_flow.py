"""Check alpha-Flow between trajectory flow matching and MeanFlow."""

from __future__ import annotations

import pytest
import torch

from fastdistill.objectives import alpha_flow, meanflow
from tests.objectives.cases import WIDTH, SmallNet, assert_same_gradient, gradients, random_batch
from tests.objectives.descent import Case

TAUGHT = {"alpha_flow": {"alpha": 0.0}}
FROM_DATA = {"alpha_flow": {"alpha": 0.0}}
DESCENT = {
    # The second part of the target is off by (1 - a)^2 d^2 e, as it jumps from t - a d; the loss has a factor a.
    "alpha-flow": Case(
        "alpha_flow",
        lambda g, d: 0.5 * 2 * WIDTH * d**2 * (1 - 0.5**3) * d**2 / 1e-3,
        taught=False,
        options={"alpha": 0.5},
    ),
    "alpha-flow at 0": Case("alpha_flow", lambda g, d: 2 * WIDTH * d**2 * 3 * d**2 / 1e-3, options={"alpha": 0.0}),
}


def test_at_0_it_is_meanflow() -> None:
    net, (x0, x1, times) = SmallNet(), random_batch()
    ours, metrics = alpha_flow(net, x0, x1, times["t"], times["s"], alpha=0.0)
    theirs, _ = meanflow(net, x0, x1, times["t"], times["s"], p=1.0, c=1e-3)
    assert_same_gradient(ours, theirs, net)
    assert "tangent_norm" in metrics


def test_at_1_all_pairs_regress_the_velocity() -> None:
    net, (x0, x1, times) = SmallNet(), random_batch()
    t, s, x = times["t"], times["s"], (1 - times["t"])[:, None] * x0 + times["t"][:, None] * x1
    error = (net(x, t, s) - (x1 - x0)).square().sum(1)
    ours, _ = alpha_flow(net, x0, x1, t, s, alpha=1.0)
    assert_same_gradient(ours, (error / (error.detach() + 1e-3)).mean(), net)


def test_its_target_is_a_step_along_w_and_then_its_own_jump() -> None:
    net, target, (x0, x1, times) = SmallNet(), SmallNet(), random_batch()
    t, s, a, w = times["t"], times["s"], 0.3, x1 - x0
    x, step = (1 - t)[:, None] * x0 + t[:, None] * x1, a * (t - s)
    goal = a * w + (1 - a) * target(x - step[:, None] * w, t - step, s)
    goal, share = torch.where((t == s)[:, None], w, goal), torch.where(t == s, 1.0, torch.tensor(a, dtype=t.dtype))
    error = (net(x, t, s) - goal.detach()).square().sum(1)
    ours, metrics = alpha_flow(net, x0, x1, t, s, alpha=a, target=target, c=0.1)
    assert_same_gradient(ours, (share * error / (error.detach() + 0.1)).mean(), net)
    torch.testing.assert_close(metrics["raw_error"], (error.detach() / share**2).mean() / 3)


@pytest.mark.parametrize("alpha", [0.0, 0.005, 0.5, 1.0])
def test_rows_with_equal_times_are_flow_matching_of_weight_one_at_any_alpha(alpha: float) -> None:
    """Check it with a target that they never ask, and next to rows whose own weight is alpha."""
    net, target, (x0, x1, times) = SmallNet(), SmallNet(), random_batch()
    t, s = times["t"], times["s"]
    x = (1 - t)[:, None] * x0 + t[:, None] * x1
    error = (net(x, t, t) - (x1 - x0)).square().sum(1)
    plain = torch.where(t == s, error / (error.detach() + 1e-3), 0.0).mean()
    _, metrics = alpha_flow(net, x0, x1, t, s, alpha=alpha, target=target)
    assert_same_gradient(metrics["terms"]["anchor"], plain, net)


def test_clamp_bounds_the_target_of_the_rows_apart_alone() -> None:
    """Check every element of the bracket; MeanFlow's target at alpha = 0 has no bound."""
    net, (x0, x1, times) = SmallNet(), random_batch()
    t, s, a, bound = times["t"], times["s"], 0.5, 0.7
    x, w, step = (1 - t)[:, None] * x0 + t[:, None] * x1, x1 - x0, a * (t - s)
    goal = (a * w + (1 - a) * net(x - step[:, None] * w, t - step, s)).clamp(-bound, bound)
    error = (net(x, t, s) - torch.where((t == s)[:, None], w, goal).detach()).square().sum(1)
    share = torch.where(t == s, 1.0, torch.tensor(a, dtype=t.dtype))
    ours, _ = alpha_flow(net, x0, x1, t, s, alpha=a, clamp=bound)
    assert_same_gradient(ours, (share * error / (error.detach() + 1e-3)).mean(), net)
    assert ours != alpha_flow(net, x0, x1, t, s, alpha=a)[0]
    assert alpha_flow(net, x0, x1, t, s, alpha=0.0, clamp=bound)[0] == alpha_flow(net, x0, x1, t, s, alpha=0.0)[0]


def test_its_terms_are_the_rows_apart_and_on_the_diagonal() -> None:
    """Check them as MeanFlow's: their sum is the loss, and each has the gradient of its own rows."""
    net, (x0, x1, times) = SmallNet(), random_batch()
    t, s = times["t"], times["s"]
    for name, rows in (("distillation", t != s), ("anchor", t == s)):
        loss, metrics = alpha_flow(net, x0, x1, t, s, alpha=0.3)
        torch.testing.assert_close(sum(metrics["terms"].values()), loss)
        share = rows.double().mean()
        alone, _ = alpha_flow(net, x0[rows], x1[rows], t[rows], s[rows], alpha=0.3)
        assert 0 < share < 1
        assert_same_gradient(metrics["terms"][name], share * alone, net)


def test_small_alpha_has_meanflows_gradient_where_errors_outweigh_the_offset() -> None:
    """Check a e / (e + c) with e = a^2 |MeanFlow's residual|^2: its gradient tends to MeanFlow's for c << e."""
    net, (x0, x1, times) = SmallNet(), random_batch()
    truth = gradients(meanflow(net, x0, x1, times["t"], times["r"], p=1.0, c=1e-12)[0], net)
    away = []
    for alpha in (0.02, 0.01):
        loss, _ = alpha_flow(net, x0, x1, times["t"], times["r"], alpha=alpha, c=1e-12)
        away.append(((gradients(loss, net) - truth).norm() / truth.norm()).item())
    assert away[1] < 0.05
    assert 1.7 < away[0] / away[1] < 2.3
