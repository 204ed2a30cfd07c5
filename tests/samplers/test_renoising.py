"""Check samplers that add fresh noise: their extremes, the law that they keep, and the formulas of their papers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill import samplers
from fastdistill.paths import LINEAR, OTCFM, Path
from fastdistill.samplers import average_velocity, consistency, gamma
from tests.samplers.fields import EVERY_PATH, exact_net, on


@EVERY_PATH
@pytest.mark.parametrize("steps", [1, 3, [1.0, 0.6, 0.1, 0.0]])
def test_gamma_extremes_are_the_flow_map_and_consistency(path: Path, steps: samplers.Steps) -> None:
    """Check gamma = 0 and gamma = 1, and that gamma = 0.5 differs from both."""
    law, x1 = on(path), torch.randn(32, 2, dtype=torch.float64)
    x, net = path.prior(x1), exact_net(law)

    def draw(amount: float) -> Tensor:
        return gamma(net, x, steps, gamma=amount, path=path, generator=torch.Generator().manual_seed(7))

    assert torch.equal(draw(0.0), average_velocity(net, x, steps))
    renoised = consistency(net, x, steps, path=path, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(draw(1.0), renoised, rtol=1e-10, atol=1e-10)
    if steps != 1:
        assert (draw(0.5) - draw(0.0)).abs().max() > 0.01
        assert (draw(0.5) - draw(1.0)).abs().max() > 0.01


@EVERY_PATH
@pytest.mark.parametrize("amount", [0.4, 0.9, 1.0])
def test_renoising_leaves_the_law_as_it_is(path: Path, amount: float) -> None:
    """Check mean and covariance: a jump from exact samples ends in samples of p_s for every gamma.

    A planted error in the amount of noise is seen.
    """
    law, count = on(path), 60_000
    t = torch.tensor(0.8, dtype=torch.float64)
    x = path.alpha(t) * law.sample(count) + path.beta(t) * torch.randn(count, 2, dtype=torch.float64)
    for s, wrong in ((0.5, 1.3), (0.0, None)):
        end = torch.tensor(s, dtype=torch.float64)
        covariance = path.alpha(end).square() * law.covariance + path.beta(end).square() * torch.eye(2)
        root = torch.linalg.inv(torch.linalg.cholesky(covariance))

        def off(x: Tensor, end: Tensor = end, root: Tensor = root) -> float:
            white = (x - path.alpha(end) * law.mean) @ root.T
            return max(white.mean(0).abs().max().item(), (white.T.cov() - torch.eye(2)).abs().max().item())

        moved = gamma(exact_net(law), x, [0.8, s], gamma=amount, path=path)
        assert off(moved) < 0.04
        if wrong is not None:
            extra = path.beta(end) * math.sqrt(wrong**2 - 1) * amount
            assert off(moved + extra * torch.randn_like(moved)) > 0.04


def test_consistency_on_the_linear_path_is_the_papers_loop() -> None:
    """Compare with x0 = f(x, t, 0); x = (1 - s) x0 + s noise, with fresh noise in each step."""
    law, x = on(LINEAR), torch.randn(8, 2, dtype=torch.float64)
    seen: list[float] = []

    def net(x: Tensor, t: Tensor, s: Tensor, y: Tensor | None = None) -> Tensor:
        seen.extend((t[0].item(), s[0].item()))
        return law.average_velocity(x, t, s)

    found = consistency(net, x, 3, generator=torch.Generator().manual_seed(1))
    assert seen == pytest.approx([1, 0, 2 / 3, 0, 1 / 3, 0])
    generator = torch.Generator().manual_seed(1)
    for t, s in ((1, 2 / 3), (2 / 3, 1 / 3), (1 / 3, 0)):
        x0 = x - t * law.average_velocity(x, torch.full((8,), t).double(), torch.zeros(8).double())
        x = x0 if s == 0 else (1 - s) * x0 + s * torch.randn(8, 2, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(found, x)


def test_gamma_on_the_linear_path_is_the_papers_formula() -> None:
    """Compare with r/(1-r) = (1 - gamma^2)^(1/2) s/(1-s); x_s = ((1-s)/(1-r)) f(x_t, t, r) + gamma s noise."""
    law, x = on(LINEAR), torch.randn(8, 2, dtype=torch.float64)
    odds = math.sqrt(1 - 0.36) * 0.3 / 0.7
    r = odds / (1 + odds)
    f = law.flow_map(x, torch.full((8,), 0.9).double(), torch.full((8,), r).double())
    noise = torch.randn(8, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = gamma(exact_net(law), x, [0.9, 0.3], gamma=0.6, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(found, 0.7 / (1 - r) * f + 0.6 * 0.3 * noise)


def test_fresh_noise_is_refused_on_a_path_with_coupled_pairs() -> None:
    """Check a path on which x_s given x0 isn't alpha x0 plus independent noise.

    A single jump adds no noise, and is allowed.
    """
    path, x1 = OTCFM(), torch.randn(3, 2)
    options: dict[str, Any]
    for name, options in (("consistency", {}), ("gamma", {"gamma": 0.5})):
        with pytest.raises(ValueError, match=r"^path: fresh noise expects .* got OTCFM, coupled by optimal_transport"):
            samplers.sample(name, lambda x, t, s, y: x, x1, 2, path=path, **options)
        one = samplers.sample(name, lambda x, t, s, y: 0.25 * x, x1, 1, path=path, **options)
        torch.testing.assert_close(one, 0.75 * x1)
