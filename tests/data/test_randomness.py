"""Check the randomness of a run: epochs, dropped labels, independent streams."""

from __future__ import annotations

import pytest
import torch

from fastdistill.data import drop_labels, epoch_rows, generator_at


@pytest.mark.parametrize(("total", "size"), [(10, 4), (10, 10), (10, 25), (7, 1)])
def test_each_epoch_sees_every_row_once(total: int, size: int) -> None:
    """Check that batches cut an endless series of permutations, also across epochs."""
    rows = torch.cat([epoch_rows(total, 0, step, size) for step in range(total)])
    for epoch in rows.split(total):
        assert torch.equal(epoch.sort().values, torch.arange(total))
    if size < total:
        assert not torch.equal(rows[:total], rows[total : 2 * total]) or size == 1


def test_labels_are_dropped_at_their_share() -> None:
    """Check that dropped labels become the null label, and the others stay."""
    y = torch.arange(10_000) % 10
    dropped = drop_labels(y, 0.1, 10, generator_at(0, "labels"))
    assert 0.08 < (dropped == 10).float().mean() < 0.12
    assert torch.equal(dropped[dropped != 10], y[dropped != 10])
    assert torch.equal(drop_labels(y, 0.0, 10, generator_at(0, "labels")), y)
    assert (drop_labels(y, 1.0, 10, generator_at(0, "labels")) == 10).all()


def test_streams_and_steps_are_independent() -> None:
    """Check that neighbouring arguments give uncorrelated numbers."""
    draws = torch.stack(
        [torch.randn(1000, generator=generator_at(s, name, k)) for s in (0, 1) for name in ("a", "b") for k in (0, 1)]
    )
    assert (torch.corrcoef(draws) - torch.eye(8)).abs().max() < 0.15
