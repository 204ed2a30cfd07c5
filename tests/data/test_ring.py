"""Check the ring against the exact law of the same name."""

from __future__ import annotations

import torch

from fastdistill.data import Ring
from fastdistill.eval import exact


def test_the_ring_is_the_one_whose_flow_is_known() -> None:
    """Check that the data set has the modes, radius and width of the exact law, and that its points follow that law."""
    points, law = Ring().batch(0, 0, 20_000)[0], exact.Ring()
    assert law.means.shape == (Ring.modes, 2)
    torch.testing.assert_close(law.means.norm(dim=1), torch.full((Ring.modes,), Ring.radius, dtype=torch.float64))
    assert law.std == Ring.std
    nearest = torch.cdist(points.double(), law.means).min(dim=1)
    assert nearest.indices.bincount().float().div(len(points)).sub(1 / 8).abs().max() < 0.01
    assert abs(nearest.values.square().mean().div(2).sqrt().item() - law.std) < 0.005
