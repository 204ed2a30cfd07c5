"""Check guidance by every sampler, as an input of the network and by two evaluations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill import samplers
from fastdistill.paths import EDM
from fastdistill.samplers import SPECS, average_velocity, conditional_pair, consistency, euler, gamma, guided, heun
from tests.samplers.fields import LabelField, defaults

MAPS = [name for name, spec in SPECS.items() if not spec.follows_velocity]


class GuidedField:
    """Network that takes guidance as an input: u = g x."""

    def __call__(self, x: Tensor, t: Tensor, s: Tensor, y: Tensor | None = None, *, g: Tensor) -> Tensor:
        assert g.shape == x.shape[:1]
        return g[:, None] * x


@pytest.mark.parametrize("name", SPECS)
def test_guidance_as_an_input_reaches_the_network(name: str) -> None:
    x = torch.ones(3, 2, dtype=torch.float64)
    options: dict[str, Any] = defaults(name)
    one = samplers.sample(name, GuidedField(), x, 1, g=0.25, **options)
    rows = samplers.sample(name, GuidedField(), x, 1, g=torch.tensor([0.25, 0.5, 0.0]), **options)
    torch.testing.assert_close(rows[0], one[0], rtol=1e-5, atol=0)
    assert len(set(rows[:, 0].tolist())) == 3
    torch.testing.assert_close(rows[2], x[2])
    with pytest.raises(ValueError, match=r"^g: expected a number or shape \(3,\), got \(2,\)"):
        samplers.sample(name, GuidedField(), x, 1, g=torch.ones(2), **options)


def test_sampling_by_name_starts_from_the_paths_prior_and_guides_where_it_can() -> None:
    path, net, x, y = EDM(0.1, 10.0), LabelField(), torch.randn(3, 2), torch.tensor([0, 1, 2])
    found = samplers.sample("euler", net, x, 2, y, path=path, scale=2.0, null=3)
    assert torch.equal(found, euler(guided(net, y, 2.0, 3), 10 * x, 2))
    with pytest.raises(ValueError, match=r"^sampler: expected one of euler, .* got 'ddim'"):
        samplers.sample("ddim", net, x)


@pytest.mark.parametrize("name", MAPS)
def test_guidance_of_a_map_extrapolates_its_jumps(name: str) -> None:
    """Check that jumps end at f_null + scale (f_y - f_null), and that each step makes one call on a doubled batch."""
    y, x1, rows = torch.tensor([0, 1, 2]), torch.randn(3, 2), []

    def net(x: Tensor, t: Tensor, s: Tensor, y: Tensor) -> Tensor:
        rows.append(len(x))
        return (0.1 + 0.2 * y)[:, None] * x + s[:, None]

    options: dict[str, Any] = defaults(name)

    def draw(net: samplers.Net, **guidance: Any) -> Tensor:
        seeded = torch.Generator().manual_seed(3)
        return samplers.sample(name, net, x1, 2, y, generator=seeded, **guidance, **options)

    def by_hand(x: Tensor, t: Tensor, s: Tensor, y: Tensor) -> Tensor:
        ends = [x - (t - s)[:, None] * net(x, t, s, label) for label in (y, torch.full_like(y, 3))]
        return (x - ends[1] - 2.5 * (ends[0] - ends[1])) / (t - s)[:, None]

    found = draw(net, scale=2.5, null=3)
    assert rows == [6, 6]
    torch.testing.assert_close(found, draw(by_hand))
    assert torch.equal(draw(net, scale=1.0, null=3), draw(net))
    assert (found - draw(net)).abs().min() > 1e-4
    with pytest.raises(ValueError, match=r"^y, null: expected labels .* at scale 2.5"):
        samplers.sample(name, net, x1, scale=2.5, null=3, **options)
    with pytest.raises(ValueError, match=r"^scale: expected 1 for a network that takes guidance as an input"):
        samplers.sample(name, net, x1, 1, y, scale=2.5, null=3, g=2.0, **options)


def test_guidance_extrapolates_from_no_label_to_the_label() -> None:
    net, x, t, y = LabelField(), torch.randn(3, 2), torch.rand(3), torch.tensor([0, 1, 2])
    v = guided(net, y, scale=2.5, null=3)(x, t)
    v_label, v_null = net(x, t, t, y), net(x, t, t, None)
    torch.testing.assert_close(v, v_null + 2.5 * (v_label - v_null))
    torch.testing.assert_close(conditional_pair(net, x, t, t, y, 3), (v_label, v_null))
    assert net.rows[0] == 6


def test_guidance_at_scale_one_is_the_plain_velocity_at_one_evaluation() -> None:
    net, x, t, y = LabelField(), torch.randn(3, 2), torch.rand(3), torch.tensor([0, 1, 2])
    assert torch.equal(guided(net, y)(x, t), net(x, t, t, y))
    assert torch.equal(guided(net)(x, t), net(x, t, t, None))
    assert net.rows == [3, 3, 3, 3]


def test_bad_arguments_are_refused_by_name() -> None:
    samplers: tuple[Callable[..., Tensor], ...] = (euler, heun, average_velocity)
    for sampler in samplers:
        with pytest.raises(ValueError, match=r"^steps: expected at least 1, got 0"):
            sampler(LabelField(), torch.randn(3, 2), 0)
        for times in ([1.0], [0.5, 0.5], [0.5, 1.0], [1.5, 0.0], [1.0, -0.1], [math.nan, 0.0]):
            with pytest.raises(ValueError, match=r"^steps: expected two or more falling times in \[0, 1\], got"):
                sampler(LabelField(), torch.randn(3, 2), times)
    with pytest.raises(ValueError, match=r"^steps: expected times that end at 0, got 0.5"):
        consistency(LabelField(), torch.randn(3, 2), [1.0, 0.5])
    for amount in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"^gamma: expected in \[0, 1\]"):
            gamma(LabelField(), torch.randn(3, 2), gamma=amount)
    with pytest.raises(ValueError, match=r"^scale: expected 1 for a network that takes guidance"):
        guided(LabelField(), torch.tensor([0]), scale=2.0, null=3, g=2.0)
    with pytest.raises(ValueError, match=r"^y, null: expected labels"):
        guided(LabelField(), scale=2.0, null=3)
    with pytest.raises(ValueError, match=r"^y, null: expected labels"):
        guided(LabelField(), torch.tensor([0]), scale=2.0)
