"""ESD: the gradient that it keeps, and whose velocity it follows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastdistill.objectives import esd, meanflow
from tests.objectives.cases import WIDTH, SmallNet, assert_same_gradient, random_batch
from tests.objectives.descent import Case, diagonal, share

TAUGHT = {"esd": {}}
FROM_DATA = {"esd": {}}
DESCENT = {
    # The residual is 3 theta d^2 e. What moves with a gradient is d^2 e of u, and 2 d^2 e of d du/dt.
    "esd": Case("esd", lambda g, d: 2 * 3 * d**2 * 3 * d**2),
    "esd, through the tangent": Case("esd", lambda g, d: 2 * 3 * d**2 * 3 * d**2, options={"through": "tangent"}),
    "esd, through nothing": Case("esd", lambda g, d: 2 * d**2 * 3 * d**2, options={"through": "nothing"}),
    "esd, diagonal": Case("esd", lambda g, d: 2 * share(g), diagonal),
}


def test_esd_off_the_diagonal_is_meanflow_with_its_own_velocity_as_teacher() -> None:
    net, (x0, x1, times) = SmallNet(), random_batch()
    loss, _ = esd(net, x0, x1, times["t"], times["r"], through="nothing")
    other, _ = meanflow(net, x0, x1, times["t"], times["r"], p=0.0, teacher=lambda x, t, s, y: net(x, t, s))
    assert_same_gradient(WIDTH * loss, other, net)


def esd_by_hand(net: SmallNet, carrier: SmallNet, x: Tensor, t: Tensor, s: Tensor, through: str) -> Tensor:
    """Return u - v + (t - s) (du/dt + (du/dx) v) by PyTorch's own derivatives; v and (du/dx) v of `carrier`."""
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
    """Check that a target gives v, and (du/dx) v too where that has no gradient while du/dt has one."""
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
