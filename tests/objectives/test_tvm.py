"""TVM: guidance, weights and the anchor at the end."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistill.objectives import Guidance, tvm
from tests.objectives.cases import ROWS, WIDTH, SmallNet, assert_same_gradient, random_batch
from tests.objectives.descent import Case, diagonal, lagrangian

TAUGHT = {"tvm": {}}
FROM_DATA = {"tvm": {}}
DESCENT = {
    "tvm": Case("tvm", lambda g, d: 2 * 3 * d**2 * lagrangian(g, d) / WIDTH),
    "tvm, anchor": Case("tvm", lambda g, d: 2 + 0 * d, diagonal),
}


def test_tvm_asks_its_average_for_both_velocities_of_guidance() -> None:
    """Check w = v_hat + (scale - 1) (v_hat - u*(x_s, s, s, null)); the student is asked without a label nowhere."""
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
