"""ESD, LSD, PSD and TVM: the map follows the velocity that its own diagonal learns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastdistill.objectives import Guidance, esd, flow_matching, lsd, meanflow, psd, tvm
from tests.objectives.cases import ROWS, WIDTH, SmallNet, assert_same_gradient, random_batch


def test_on_the_diagonal_all_three_are_flow_matching() -> None:
    net, (x0, x1, times) = SmallNet(), random_batch()
    t = times["t"]
    for method in (esd, lsd, psd):
        loss, metrics = method(net, x0, x1, t, t)
        assert_same_gradient(loss, flow_matching(net, x0, x1, t)[0], net)
        assert metrics["distinct_share"] == 0


def test_esd_off_the_diagonal_is_meanflow_with_its_own_velocity_as_teacher() -> None:
    net, (x0, x1, times) = SmallNet(), random_batch()
    loss, _ = esd(net, x0, x1, times["t"], times["r"], through="nothing")
    other, _ = meanflow(net, x0, x1, times["t"], times["r"], p=0.0, teacher=lambda x, t, s, y: net(x, t, s))
    assert_same_gradient(WIDTH * loss, other, net)


def esd_by_hand(net: SmallNet, carrier: SmallNet, x: Tensor, t: Tensor, s: Tensor, through: str) -> Tensor:
    """The residual u - v + (t - s) (du/dt + (du/dx) v) by PyTorch's own derivatives; v and (du/dx) v of `carrier`."""
    v = carrier(x, t, t).detach()
    zero, one = torch.zeros_like(x), torch.ones_like(t)
    u, by_time = torch.func.jvp(net, (x, t, s), (zero, one, 0 * one))
    _, by_state = torch.func.jvp(carrier, (x, t, s), (v, 0 * one, 0 * one))
    kept = {
        "time": by_time + by_state.detach(),
        "tangent": by_time + by_state,
        "nothing": (by_time + by_state).detach(),
    }
    return u - v + (t - s)[:, None] * kept[through]


@pytest.mark.parametrize("with_target", [False, True], ids=["own", "target"])
@pytest.mark.parametrize("through", ["time", "tangent", "nothing"])
def test_esd_keeps_the_gradient_that_it_says(through: str, with_target: bool) -> None:
    """A target gives v, and (du/dx) v too where that has no gradient while du/dt has one."""
    net, (x0, x1, times) = SmallNet(), random_batch()
    target = SmallNet() if with_target else None
    t, s, x = times["t"], times["r"], (1 - times["t"])[:, None] * x0 + times["t"][:, None] * x1
    loss, metrics = esd(net, x0, x1, t, s, target=target, through=through)
    if with_target and through != "time":
        v = target(x, t, t).detach()
        u, whole = torch.func.jvp(net, (x, t, s), (v, torch.ones_like(t), torch.zeros_like(t)))
        residual = u - v + (t - s)[:, None] * (whole if through == "tangent" else whole.detach())
    else:
        residual = esd_by_hand(net, target or net, x, t, s, through)
    assert_same_gradient(loss, residual.square().mean(), net)
    torch.testing.assert_close(metrics["raw_error"], residual.detach().square().mean())
    others = [esd(net, x0, x1, t, s, through=other)[0] for other in ("time", "tangent", "nothing")]
    torch.testing.assert_close(others, [others[0]] * 3)


def test_tvm_asks_its_average_for_both_velocities_of_guidance() -> None:
    """w = v_hat + (scale - 1) (v_hat - u*(x_s, s, s, null)), and the student is asked without a label nowhere."""
    net, target, (x0, x1, times) = SmallNet(), SmallNet(), random_batch()
    t, s, y, null = times["t"], times["r"], torch.arange(ROWS) % 3, torch.full((ROWS,), 3)

    def labelled(x: Tensor, t: Tensor, s: Tensor, y: Tensor) -> Tensor:
        assert not (y == 3).any()
        return net(x, t, s, y)

    _, metrics = tvm(labelled, x0, x1, t, s, y=y, target=target, guidance=Guidance(2.5, null=3))
    x_s = (1 - s)[:, None] * x0 + s[:, None] * x1
    w = 2.5 * (x1 - x0) - 1.5 * target(x_s, s, s, null)
    torch.testing.assert_close(metrics["anchor_error"], (net(x_s, s, s, y) - w).square().mean().detach())


def test_tvms_factor_multiplies_both_residuals() -> None:
    net, (x0, x1, times) = SmallNet(), random_batch()
    t, s = times["t"], times["r"]
    plain, metrics = tvm(net, x0, x1, t, s)
    half, same = tvm(net, x0, x1, t, s, factor=0.5)
    assert_same_gradient(half, plain, net, 0.25)
    assert metrics["raw_error"] == same["raw_error"] and metrics["anchor_error"] == same["anchor_error"]
    rows = torch.where(torch.arange(ROWS) < ROWS // 2, 1.0, 0.0).double()
    first = slice(ROWS // 2)
    assert_same_gradient(
        tvm(net, x0, x1, t, s, factor=rows)[0], tvm(net, x0[first], x1[first], t[first], s[first])[0], net, 0.5
    )


def test_lsd_and_tvms_first_term_are_one_and_tvm_anchors_at_the_end() -> None:
    net, target, (x0, x1, times) = SmallNet(), SmallNet(), random_batch()
    t, s = times["t"], times["r"]
    terminal, _ = lsd(net, x0, x1, t, s, target=target)
    anchor, _ = flow_matching(net, x0, x1, s)
    both, metrics = tvm(net, x0, x1, t, s, target=target)
    assert_same_gradient(both, terminal + anchor, net)
    torch.testing.assert_close(metrics["anchor_error"], anchor.detach())


def test_psd_meets_at_the_midpoint_of_each_row() -> None:
    """A midpoint by row is that number's in each of them, and rows with s = t have none."""
    net, (x0, x1, times) = SmallNet(), random_batch()
    t, s = times["t"], times["s"]
    midpoint = torch.where(torch.arange(ROWS) % 2 == 0, 0.25, 0.6).double()
    _, mixed = psd(net, x0, x1, t, s, midpoint=midpoint)
    errors = {a: psd(net, x0, x1, t, s, midpoint=a)[1]["rows"]["raw_error"] for a in (0.25, 0.6)}
    order = torch.cat(((t != s).nonzero(), (t == s).nonzero())).squeeze(1)
    expected = torch.where(midpoint[order] == 0.25, errors[0.25], errors[0.6])
    torch.testing.assert_close(mixed["rows"]["raw_error"], expected)
    assert (errors[0.25] - errors[0.6]).abs().max() > 1e-5
