"""Easy consistency tuning: its weight by noise level makes it the same on every path."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastdistill.objectives import adapters, consistency, ect
from fastdistill.paths import EDM, FM, LINEAR, VE, Path, carry_time
from tests.objectives.cases import ROWS, WIDTH, SmallNet, assert_same_gradient, random_batch
from tests.objectives.descent import Case


def noise_level(t: Tensor) -> Tensor:
    return t / (1 - t)


FROM_DATA = {"ect": {"c": 0.1}}
DESCENT = {
    "ect": Case(
        "ect",
        lambda g, d: WIDTH * d**3 * (d**3 - g.times["r"] ** 3) / 0.1 / (noise_level(d) - noise_level(g.times["r"])),
        taught=False,
        options={"c": 0.1},
    ),
}


def test_it_is_the_same_loss_on_the_linear_and_on_edms_path() -> None:
    """Check that a change of time and scale carries the network, so f(x, t, 0) differs only by the path's start."""
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


@pytest.mark.parametrize("path", [EDM(), VE(), FM(0.1)], ids=lambda path: type(path).__name__)
def test_rows_that_reach_down_to_no_noise_learn_the_clean_data(path: Path) -> None:
    """Check it over all of sigma(t), also on paths that start at some noise; the others in the batch are as before."""
    net, (x0, x1, times) = SmallNet(), random_batch()
    t, clean = times["t"], torch.arange(ROWS) % 2 == 0
    r = torch.where(clean, 0.0, times["r"])
    jump = path.interpolate(x0, x1, t) - t[:, None] * net(path.interpolate(x0, x1, t), t, 0 * t)
    level = path.beta(t) / path.alpha(t)
    whole, _ = ect(net, x0, x1, t, r, path=path, c=1e-9)
    others, _ = ect(net, *(value[~clean] for value in (x0, x1, t, r)), path=path, c=1e-9)
    denoising = ((jump - x0).norm(dim=1) / level)[clean].mean()
    torch.testing.assert_close(whole, 0.5 * (denoising + others), rtol=1e-7, atol=0)
