"""ESD, LSD, PSD and TVM: the map follows the velocity that its own diagonal learns."""

from __future__ import annotations

import torch

from fastdistill.objectives import esd, flow_matching, lsd, meanflow, psd, tvm
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
    loss, _ = esd(net, x0, x1, times["t"], times["r"])
    other, _ = meanflow(net, x0, x1, times["t"], times["r"], p=0.0, teacher=lambda x, t, s, y: net(x, t, s))
    assert_same_gradient(WIDTH * loss, other, net)


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
