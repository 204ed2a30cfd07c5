"""Align Your Flow: EMD against MeanFlow, LMD against its gradient written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastdistill.objectives import ayf_emd, ayf_lmd, flow_matching, meanflow
from tests.objectives.cases import WIDTH, SmallNet, assert_same_gradient, gradients, random_batch
from tests.objectives.descent import Case, lagrangian

TAUGHT = {"ayf_emd": {}, "ayf_lmd": {}}
DESCENT = {
    "ayf_emd": Case("ayf_emd", lambda g, d: 2 * WIDTH * d**2 * 3 * d**2 / 0.1),
    "ayf_lmd": Case("ayf_lmd", lambda g, d: 2 * d**2 * lagrangian(g, d) / 0.1),
}


def test_emd_without_normalisation_has_meanflows_gradient_at_p_0() -> None:
    net, teacher, (x0, x1, times) = SmallNet(), SmallNet(), random_batch()
    options: dict[str, Any] = {"teacher": teacher}
    ours, metrics = ayf_emd(net, x0, x1, times["t"], times["s"], c=None, **options)
    theirs, other = meanflow(net, x0, x1, times["t"], times["s"], p=0.0, **options)
    assert_same_gradient(ours, theirs, net)
    torch.testing.assert_close(metrics["raw_error"], other["raw_error"])


def test_emd_is_flow_matching_to_the_teacher_where_s_is_t_and_where_warm_up_is_0() -> None:
    net, teacher, (x0, x1, times) = SmallNet(), SmallNet(), random_batch()
    t = times["t"]
    x = (1 - t)[:, None] * x0 + t[:, None] * x1
    ours, _ = ayf_emd(net, x0, x1, t, t, teacher=teacher, c=None)
    assert_same_gradient(ours, (net(x, t, t) - teacher(x, t, t).detach()).square().sum(1).mean(), net)
    ours, _ = ayf_emd(net, x0, x1, t, times["s"], teacher=teacher, c=None, warmup=0.0)
    assert_same_gradient(ours, (net(x, t, times["s"]) - teacher(x, t, t).detach()).square().sum(1).mean(), net)
    data, _ = flow_matching(net, x0, x1, t)
    assert data != ours


@pytest.mark.parametrize("c", [None, 0.1])
def test_lmds_gradient_is_the_papers(c: float | None) -> None:
    """Check sign(s - t) w' (df/dtheta)^T [d/ds f - v(f, s)] at w' = 1 / (t - s), times the 2 of a square; s < t."""
    net, teacher, (x0, x1, times) = SmallNet(), SmallNet(), random_batch()
    t, s = times["t"], times["r"]
    x = (1 - t)[:, None] * x0 + t[:, None] * x1
    f, df = torch.func.jvp(lambda s: x - (t - s)[:, None] * net(x, t, s), (s,), (torch.ones_like(s),))[:2]
    h = (df - teacher(f, s, s)).detach()
    if c is not None:
        h = h / (h.norm(dim=1, keepdim=True) + c)
    expected = 2 * (-1 / (t - s)[:, None] * f * h).sum(1).mean()
    ours, metrics = ayf_lmd(net, x0, x1, t, s, teacher=teacher, c=c)
    assert_same_gradient(ours, expected, net)
    assert metrics["tangent_norm"] > 0


def test_normalisation_bounds_each_row() -> None:
    net, teacher, (x0, x1, times) = SmallNet(), SmallNet(), random_batch()
    for method in (ayf_emd, ayf_lmd):
        loss, _ = method(net, 1e3 * x0, 1e3 * x1, times["t"], times["s"], teacher=teacher)
        assert loss < 1
        assert gradients(loss, net).isfinite().all()
