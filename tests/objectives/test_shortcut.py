"""Shortcut models: jumps of 2 delta from two jumps of delta, and flow matching on the other rows."""

from __future__ import annotations

import torch

from fastdistill.objectives import flow_matching, psd, shortcut
from tests.objectives.cases import ROWS, SmallNet, assert_same_gradient, random_batch


def test_it_is_psd_at_the_midpoint() -> None:
    net, target, (x0, x1, times) = SmallNet(), SmallNet(), random_batch()
    ours, mine = shortcut(net, x0, x1, times["t"], times["delta"], target=target)
    theirs, other = psd(net, x0, x1, times["t"], times["s"], target=target)
    assert_same_gradient(ours, theirs, net)
    torch.testing.assert_close(mine["rows"]["s"], other["rows"]["s"])
    assert mine["distinct_share"] == 0.75


def test_without_jumps_it_is_flow_matching() -> None:
    net, (x0, x1, times) = SmallNet(), random_batch()
    ours, metrics = shortcut(net, x0, x1, times["t"], 0 * times["t"])
    assert_same_gradient(ours, flow_matching(net, x0, x1, times["t"])[0], net)
    assert metrics["distinct_share"] == 0


def test_error_of_velocities_is_the_maps_over_the_square_of_the_jump() -> None:
    net, (x0, x1, _) = SmallNet(), random_batch()
    t, delta = torch.full((ROWS,), 0.75, dtype=torch.float64), torch.full((ROWS,), 0.125, dtype=torch.float64)
    x = 0.25 * x0 + 0.75 * x1
    one = x - 0.25 * net(x, t, t - 0.25)
    half = x - 0.125 * net(x, t, t - 0.125)
    two = half - 0.125 * net(half, t - 0.125, t - 0.25)
    loss, _ = shortcut(net, x0, x1, t, delta)
    torch.testing.assert_close(loss, (one - two).square().mean() / 0.25**2)
