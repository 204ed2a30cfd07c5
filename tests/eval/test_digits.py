"""Check that the judge of digits ranks what it measures rightly, and always gives the same numbers."""

from __future__ import annotations

import pytest
import torch

from fastdistill.eval import digits
from fastdistill.eval.digits import DigitJudge


def test_labels_have_the_frequencies_of_the_real_ones(judge: DigitJudge) -> None:
    assert len(judge.labels()) == 6 * len(judge.digits.held_out_y) == 6 * 296
    assert (judge.labels().bincount() - 6 * judge.digits.held_out_y.bincount()).abs().max() <= 6
    assert (judge.labels(100).bincount() - 10).abs().max() <= 1


def test_references_stand_in_the_order_of_what_they_know(judge: DigitJudge) -> None:
    """Check the order: digits drawn again, then Gaussians fitted to them, then noise; unseen digits are far from noise.

    Unseen digits are nearer than those drawn again: they are spread evenly over the data, and none is there twice.
    """
    rows = judge.references()
    assert rows["held_out"]["frechet"] < rows["bootstrap"]["frechet"] < 0.02 * rows["noise"]["frechet"]
    assert rows["bootstrap"]["frechet"] < rows["class_gaussian"]["frechet"] < 0.02 * rows["noise"]["frechet"]
    assert rows["bootstrap"]["sliced_wasserstein"] < rows["class_gaussian"]["sliced_wasserstein"]
    assert min(rows[name]["accuracy"] for name in ("bootstrap", "held_out", "class_gaussian")) > 0.95
    assert rows["noise"]["accuracy"] < 0.3


def test_references_are_the_same_for_the_same_seed(judge: DigitJudge) -> None:
    def numbers(seed: int) -> list[float]:
        rows = judge.references(200, seed=seed)
        return [row[metric] for row in rows.values() for metric in ("frechet", "accuracy", "sliced_wasserstein")]

    assert numbers(0) == numbers(0)
    assert numbers(0) != numbers(1)


def test_every_reference_is_as_many_images_as_any_other_row(judge: DigitJudge, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check sets of 296 images, the number of held-out digits, and smaller ones; 400 images are two sets of 200."""
    seen: list[tuple[int, int]] = []
    right = digits.frechet_distance

    def frechet(a: torch.Tensor, b: torch.Tensor) -> float:
        seen.append((len(a), len(b)))
        return right(a, b)

    monkeypatch.setattr(digits, "frechet_distance", frechet)
    for count, size in ((None, 296), (100, 100), (400, 200)):
        seen.clear()
        judge.references(count, seed=5)
        assert set(seen) == {(size, 1501)}
        assert judge.set_size(len(judge.labels(count))) == size


def test_the_training_digits_are_as_far_from_themselves_as_a_set_of_them_is(judge: DigitJudge) -> None:
    """Check that the training digits are measured in sets; all of them at once would be at distance zero."""
    order = judge.y.argsort(stable=True)
    x, y = judge.x[order], judge.y[order]
    row = judge.measure(x, y, seconds=2 * len(x))
    parts = [judge.measure(x[first::6], y[first::6], 0.0) for first in range(6)]
    assert row["frechet"] == pytest.approx(sum(part["frechet"] for part in parts) / 6)
    assert 1 < row["frechet"] < 10
    whole = digits.frechet_distance(*[judge.classifier.features(judge.x)] * 2)
    assert whole < 1e-6
    assert row["accuracy"] > 0.99
    assert row["seconds_per_sample"] == 2


def test_checks_unmask_copies_of_the_training_set(judge: DigitJudge) -> None:
    copies, unseen = judge.check(judge.digits.x[:200]), judge.check(judge.digits.held_out_x)
    assert copies["nearest_neighbour_ratio"] < 1e-3
    assert unseen["nearest_neighbour_ratio"] == 1
    assert copies["precision"] == 1
