"""Datasets and the randomness of a run."""

from __future__ import annotations

import pytest
import torch

from fastdistill.data import Digits, Ring, drop_labels, epoch_rows, generator_at
from fastdistill.eval import exact


@pytest.fixture(scope="module")
def digits() -> Digits:
    """Loaded once."""
    return Digits()


def test_digits_are_scaled_and_split_by_class(digits: Digits) -> None:
    """1,797 images in [-1, 1]; a sixth of each class is held out."""
    assert digits.x.shape[1:] == digits.held_out_x.shape[1:] == (1, 8, 8)
    assert len(digits.x) + len(digits.held_out_x) == 1797
    assert digits.x.min() == digits.held_out_x.min() == -1
    assert digits.x.max() == digits.held_out_x.max() == 1
    train, held_out = digits.y.bincount(), digits.held_out_y.bincount()
    assert torch.equal(held_out, (train + held_out) // 6)


def test_no_held_out_image_is_trained_on(digits: Digits) -> None:
    """The two sets share no image."""
    train = {image.numpy().tobytes() for image in digits.x}
    assert not any(image.numpy().tobytes() in train for image in digits.held_out_x)


def test_a_batch_is_a_pure_function_of_seed_and_step(digits: Digits) -> None:
    """Asked in any order, from any object; another seed or step gives another one."""
    for dataset, twin in ((digits, Digits()), (Ring(), Ring())):
        later, first = dataset.batch(1, 5, 16)[0], dataset.batch(1, 0, 16)[0]
        assert torch.equal(twin.batch(1, 0, 16)[0], first)
        assert torch.equal(twin.batch(1, 5, 16)[0], later)
        assert not torch.equal(first, later)
        assert not torch.equal(dataset.batch(2, 0, 16)[0], first)


@pytest.mark.parametrize(("total", "size"), [(10, 4), (10, 10), (10, 25), (7, 1)])
def test_each_epoch_sees_every_row_once(total: int, size: int) -> None:
    """Batches cut an endless series of permutations, also across epochs."""
    rows = torch.cat([epoch_rows(total, 0, step, size) for step in range(total)])
    for epoch in rows.split(total):
        assert torch.equal(epoch.sort().values, torch.arange(total))
    if size < total:
        assert not torch.equal(rows[:total], rows[total : 2 * total]) or size == 1


def test_labels_are_dropped_at_their_share() -> None:
    """Dropped ones become the null label, the others stay."""
    y = torch.arange(10_000) % 10
    dropped = drop_labels(y, 0.1, 10, generator_at(0, "labels"))
    assert 0.08 < (dropped == 10).float().mean() < 0.12
    assert torch.equal(dropped[dropped != 10], y[dropped != 10])
    assert torch.equal(drop_labels(y, 0.0, 10, generator_at(0, "labels")), y)
    assert (drop_labels(y, 1.0, 10, generator_at(0, "labels")) == 10).all()


def test_streams_and_steps_are_independent() -> None:
    """Neighbouring arguments give uncorrelated numbers."""
    draws = torch.stack(
        [torch.randn(1000, generator=generator_at(s, name, k)) for s in (0, 1) for name in ("a", "b") for k in (0, 1)]
    )
    assert (torch.corrcoef(draws) - torch.eye(8)).abs().max() < 0.15


def test_the_ring_is_the_one_whose_flow_is_known() -> None:
    """Same modes, radius and width as the exact law; its points lie there."""
    points, law = Ring().batch(0, 0, 20_000)[0], exact.Ring()
    assert law.means.shape == (Ring.modes, 2)
    torch.testing.assert_close(law.means.norm(dim=1), torch.full((Ring.modes,), Ring.radius, dtype=torch.float64))
    assert law.std == Ring.std
    nearest = torch.cdist(points.double(), law.means).min(dim=1)
    assert nearest.indices.bincount().float().div(len(points)).sub(1 / 8).abs().max() < 0.01
    assert abs(nearest.values.square().mean().div(2).sqrt().item() - law.std) < 0.005
