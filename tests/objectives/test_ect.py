"""Easy consistency tuning: its weight by noise level makes it the same on every path."""

from __future__ import annotations

import torch

from fastdistill.objectives import adapters, consistency, ect
from fastdistill.paths import EDM, LINEAR, carry_time
from tests.objectives.cases import SmallNet, assert_same_gradient, random_batch


def test_it_is_the_same_loss_on_the_linear_and_on_edms_path() -> None:
    """A change of time and scale carries the network; f(x, t, 0) then only differs by where the path starts."""
    net, (x0, x1, times) = SmallNet(), random_batch()
    path = EDM(1e-9, 20.0, 2.0)
    t, r = carry_time(LINEAR, path, times["t"]), carry_time(LINEAR, path, times["r"])
    ours, _ = ect(net, x0, x1, times["t"], times["r"])
    theirs, _ = ect(adapters.on_path(net, LINEAR, path), x0, x1, t, r, path=path)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def test_it_is_consistency_by_pseudo_huber_over_the_gap_of_noise_levels() -> None:
    net, target, (x0, x1, times) = SmallNet(), SmallNet(), random_batch()
    t, r = times["t"], times["r"]
    ours, _ = ect(net, x0, x1, t, r, c=0.1, target=target)
    gap = lambda t, r: 1 / (t / (1 - t) - r / (1 - r))  # noqa: E731
    theirs, _ = consistency(net, x0, x1, t, r, distance="huber", c=0.1, weight=gap, target=target)
    assert_same_gradient(ours, theirs, net)
    norm, metrics = ect(net, x0, x1, t, r)
    length = (metrics["rows"]["raw_error"] * 3).sqrt() * (t - r)
    torch.testing.assert_close(norm.detach(), (length * gap(t, r)).mean(), rtol=1e-4, atol=0)
