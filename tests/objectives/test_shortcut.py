"""Shortcut models: jumps of 2 delta from two jumps of delta, and flow matching on the other rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastdistill.objectives import flow_matching, psd, shortcut
from fastdistill.times import dyadic_times
from tests.objectives.cases import ROWS, SmallNet, assert_same_gradient, random_batch
from tests.objectives.descent import Case, diagonal, halves, share

TAUGHT = {"shortcut": {"finest": None}}  # the finest halves are steps along the velocity, and exact as they get short
FROM_DATA = {"shortcut": {"finest": None}}
DESCENT = {
    "shortcut": Case("shortcut", halves),
    "shortcut, diagonal": Case("shortcut", lambda g, d: 2 * share(g), diagonal),
}


def test_it_is_psd_at_the_midpoint() -> None:
    net, target, (x0, x1, times) = SmallNet(), SmallNet(), random_batch()
    ours, mine = shortcut(net, x0, x1, times["t"], times["delta"], target=target, finest=None)
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


@pytest.mark.parametrize("finest", [4, 16, 128])
def test_target_is_asked_only_what_some_row_trains(finest: int) -> None:
    """Check that each condition (t, gap) of the target is one at which the student has a row."""
    x0, x1 = torch.randn(2, 4096, 2)
    t, delta = dyadic_times(4096, 0.5, finest=finest)
    conditions: dict[str, set[float]] = {"student": set(), "target": set()}

    def listening(who: str) -> object:
        def net(x: Tensor, t: Tensor, s: Tensor, y: Tensor | None = None) -> Tensor:
            conditions[who].update((t - s).tolist())
            return x

        return net

    shortcut(listening("student"), x0, x1, t, delta, target=listening("target"), finest=finest)  # type: ignore[arg-type]
    assert conditions["student"] == {0.0} | {2.0**-k for k in range(finest.bit_length() - 1)}
    assert conditions["target"] == conditions["student"] - {1.0}
    shortcut(listening("student"), x0, x1, t, delta, target=listening("target"), finest=None)  # type: ignore[arg-type]
    assert 1 / finest in conditions["target"] - conditions["student"], "what nothing trains"


def test_finest_halves_are_steps_along_the_velocity() -> None:
    net, (x0, x1, _) = SmallNet(), random_batch()
    t, delta = torch.full((ROWS,), 0.75, dtype=torch.float64), torch.full((ROWS,), 0.125, dtype=torch.float64)
    x = 0.25 * x0 + 0.75 * x1
    first = net(x, t, t)
    goal = (first + net(x - 0.125 * first, t - 0.125, t - 0.125)) / 2
    loss, _ = shortcut(net, x0, x1, t, delta, finest=8)
    assert_same_gradient(loss, (net(x, t, t - 0.25) - goal.detach()).square().mean(), net)
    longer, _ = shortcut(net, x0, x1, t, delta, finest=16)
    assert_same_gradient(longer, shortcut(net, x0, x1, t, delta, finest=None)[0], net)


def test_halves_off_the_grid_are_refused() -> None:
    net, (x0, x1, times) = SmallNet(), random_batch()
    with pytest.raises(ValueError, match=r"^delta: expected times 0 or at least 1 / finest = 1/4 .*, got 0\.0"):
        shortcut(net, x0, x1, times["t"], 0.1 * times["t"], finest=4)
    with pytest.raises(ValueError, match=r"^finest: expected None or a number of steps, at least 1, got 0$"):
        shortcut(net, x0, x1, times["t"], 0 * times["t"], finest=0)
