"""Check that digits are scaled and split, and that batches follow from seed and step."""

from __future__ import annotations

import pytest
import torch

from fastdistill.data import Digits, Ring


@pytest.fixture(scope="module")
def digits() -> Digits:
    """Load the digits once."""
    return Digits()


def test_digits_are_scaled_and_split_by_class(digits: Digits) -> None:
    """Check that there are 1,797 images in [-1, 1], and that a sixth of each class is held out."""
    assert digits.x.shape[1:] == digits.held_out_x.shape[1:] == (1, 8, 8)
    assert len(digits.x) + len(digits.held_out_x) == 1797
    assert digits.x.min() == digits.held_out_x.min() == -1
    assert digits.x.max() == digits.held_out_x.max() == 1
    train, held_out = digits.y.bincount(), digits.held_out_y.bincount()
    assert torch.equal(held_out, (train + held_out) // 6)


def test_no_held_out_image_is_trained_on(digits: Digits) -> None:
    """Check that the training images and the held-out images have none in common."""
    train = {image.numpy().tobytes() for image in digits.x}
    assert not any(image.numpy().tobytes() in train for image in digits.held_out_x)


def test_a_batch_is_a_pure_function_of_seed_and_step(digits: Digits) -> None:
    """Check that order and object don't matter, and that another seed or step gives another batch."""
    for dataset, twin in ((digits, Digits()), (Ring(), Ring())):
        later, first = dataset.batch(1, 5, 16)[0], dataset.batch(1, 0, 16)[0]
        assert torch.equal(twin.batch(1, 0, 16)[0], first)
        assert torch.equal(twin.batch(1, 5, 16)[0], later)
        assert not torch.equal(first, later)
        assert not torch.equal(dataset.batch(2, 0, 16)[0], first)
