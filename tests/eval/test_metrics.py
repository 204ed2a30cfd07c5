"""Test metrics against exact answers: Gaussians with given moments, shifts, repeated points, copies."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastdistill.eval.metrics import (
    frechet_distance,
    nearest_neighbour_ratio,
    precision_recall,
    sliced_wasserstein,
    two_sample_accuracy,
)

EXACT = 1e-9


def sample_with_moments(mean: Tensor, covariance: Tensor, count: int = 50) -> Tensor:
    """Return points whose sample mean and sample covariance are exactly these."""
    x = torch.randn(count, len(mean), dtype=torch.float64)
    x = x - x.mean(0)
    white = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    return mean + white @ torch.linalg.cholesky(covariance).T


def test_frechet_distance_of_gaussians_with_common_axes_is_exact() -> None:
    """Compare with |m - n|^2 plus the squared differences of the standard deviations."""
    mean, other = torch.tensor([1.0, -2.0, 0.5]).double(), torch.tensor([0.0, 1.0, 0.5]).double()
    std, other_std = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([2.0, 0.5, 3.0]).double()
    a = sample_with_moments(mean, torch.diag(std**2))
    b = sample_with_moments(other, torch.diag(other_std**2), count=80)
    expected = (mean - other).square().sum() + (std - other_std).square().sum()
    assert frechet_distance(a, b) == pytest.approx(float(expected), abs=EXACT)


def test_frechet_distance_of_gaussians_with_different_axes_is_exact() -> None:
    """Compare with the two-dimensional formula tr((A B)^1/2) = (tr A B + 2 (det A det B)^1/2)^1/2."""
    first, second = torch.tensor([[2.0, 0.9], [0.9, 1.0]]).double(), torch.tensor([[1.0, -0.6], [-0.6, 3.0]]).double()
    zero = torch.zeros(2, dtype=torch.float64)
    root = ((first @ second).trace() + 2 * (first.det() * second.det()).sqrt()).sqrt()
    expected = first.trace() + second.trace() - 2 * root
    found = frechet_distance(sample_with_moments(zero, first), sample_with_moments(zero, second))
    assert found == pytest.approx(float(expected), abs=EXACT)


def test_frechet_distance_ignores_order_and_who_comes_first() -> None:
    a, b = torch.randn(60, 5), torch.randn(70, 5) * 2 + 1
    assert frechet_distance(a[torch.randperm(60)], b) == pytest.approx(frechet_distance(a, b), abs=EXACT)
    assert frechet_distance(b, a) == pytest.approx(frechet_distance(a, b), abs=1e-8)
    assert frechet_distance(a, a) == pytest.approx(0, abs=EXACT)


def test_frechet_distance_takes_features_that_never_vary() -> None:
    """Check that a dead feature, which makes the covariance singular, adds the square of its shift alone."""
    a = torch.cat([torch.randn(30, 2), torch.zeros(30, 1)], 1)
    b = a + torch.tensor([0.0, 0.0, 3.0])
    assert frechet_distance(a, b) == pytest.approx(9, abs=1e-6)


def test_sliced_wasserstein_of_a_shift_on_the_line_is_the_shift() -> None:
    a = torch.randn(40, 1)
    assert sliced_wasserstein(a, a + 2.5) == pytest.approx(2.5, abs=1e-6)


def test_sliced_wasserstein_of_a_shift_in_the_plane_is_its_length_over_root_two() -> None:
    """Check the factor: the mean square of a unit direction's component along the shift is 1/2."""
    a = torch.randn(40, 2)
    found = sliced_wasserstein(a, a + torch.tensor([3.0, 4.0]), projections=20_000)
    assert found == pytest.approx(5 / math.sqrt(2), rel=0.02)


def test_sliced_wasserstein_of_sets_of_unequal_size_moves_the_mass() -> None:
    """Check that half of the point at 0 moves by 1, and that a repeated set is the same set."""
    assert sliced_wasserstein(torch.tensor([[0.0]]), torch.tensor([[0.0], [1.0]])) == pytest.approx(math.sqrt(0.5))
    a, b = torch.randn(6, 3), torch.randn(4, 3)
    assert sliced_wasserstein(a, a.repeat(3, 1)) == pytest.approx(0, abs=EXACT)
    assert sliced_wasserstein(a, b) == pytest.approx(sliced_wasserstein(a.repeat(2, 1), b.repeat(3, 1)), abs=EXACT)


def test_sliced_wasserstein_ignores_order_and_repeats_itself() -> None:
    a, b = torch.randn(50, 8), torch.randn(40, 8)
    assert sliced_wasserstein(a, b) == sliced_wasserstein(a, b)
    assert sliced_wasserstein(a.flip(0), b) == pytest.approx(sliced_wasserstein(a, b), abs=EXACT)
    assert sliced_wasserstein(a, b, seed=1) != sliced_wasserstein(a, b)


def test_copies_of_the_training_set_have_ratio_zero_and_unseen_data_one() -> None:
    train, held_out = torch.randn(60, 4), torch.randn(40, 4)
    assert nearest_neighbour_ratio(train[:20], train, held_out) == pytest.approx(0, abs=1e-6)
    assert nearest_neighbour_ratio(held_out, train, held_out) == 1


def test_precision_and_recall_tell_a_lost_mode_from_a_spurious_one() -> None:
    """Check precision and recall of samples from one of two real modes, and from the two and a third one."""
    modes = [torch.randn(40, 2) * 0.1 + 10 * shift for shift in range(3)]
    precision, recall = precision_recall(modes[0] + 1e-3, torch.cat(modes[:2]))
    assert precision > 0.9
    assert 0.4 < recall <= 0.5
    precision, recall = precision_recall(torch.cat(modes) + 1e-3, torch.cat(modes[:2]))
    assert 0.6 < precision < 0.7
    assert recall > 0.9


@pytest.mark.parametrize("metric", [frechet_distance, sliced_wasserstein, precision_recall])
@pytest.mark.parametrize(
    ("shape", "other", "complaint"),
    [((9,), (9, 2), "first set"), ((9, 2), (0, 2), "second set"), ((9, 2), (9, 3), "same dimension")],
)
def test_sets_that_do_not_fit_are_refused(metric: object, shape: tuple, other: tuple, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        metric(torch.zeros(shape), torch.zeros(other))  # type: ignore[operator]


def test_values_that_are_not_finite_are_refused() -> None:
    """Check that a generator that diverged can't pass as a number."""
    with pytest.raises(ValueError, match="second set: expected finite"):
        frechet_distance(torch.zeros(9, 2), torch.full((9, 2), torch.nan))
    with pytest.raises(ValueError, match="projections"):
        sliced_wasserstein(torch.zeros(9, 2), torch.zeros(9, 2), projections=0)


@pytest.mark.parametrize("neighbours", [1, 5])
def test_two_sample_accuracy_is_a_half_for_one_law_one_apart_and_zero_for_copies(neighbours: int) -> None:
    """Check unequal sizes too; copies need one neighbour, as each point's own copy is then its nearest other."""
    a, b = torch.randn(600, 3), torch.randn(400, 3)
    assert two_sample_accuracy(a, b, neighbours=neighbours) == pytest.approx(0.5, abs=0.08)
    assert two_sample_accuracy(a, b + 20, neighbours=neighbours) == 1
    assert two_sample_accuracy(a, a.clone()) == 0


def test_two_sample_accuracy_refuses_what_has_no_majority() -> None:
    a = torch.randn(10, 3)
    with pytest.raises(ValueError, match=r"^neighbours: expected an odd number >= 1, got 2"):
        two_sample_accuracy(a, a, neighbours=2)
    with pytest.raises(ValueError, match=r"^second set: .* got \(1, 3\)"):
        two_sample_accuracy(a, a[:1])
