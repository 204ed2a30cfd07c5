"""The judge of digits puts what it measures in the right order, and always says the same."""

from __future__ import annotations

import torch

from fastdistill.eval.digits import DigitJudge


def test_labels_have_the_frequencies_of_the_real_ones(judge: DigitJudge) -> None:
    assert torch.equal(judge.labels().bincount(), judge.y.bincount())
    assert (judge.labels(100).bincount() - 10).abs().max() <= 1


def test_references_stand_in_the_order_of_what_they_know(judge: DigitJudge) -> None:
    """Resampled real digits, then Gaussians fitted to them, then noise; unseen digits far nearer than noise."""
    rows = judge.references()
    assert rows["bootstrap"]["frechet"] < rows["held_out"]["frechet"] < 0.02 * rows["noise"]["frechet"]
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


def test_the_real_digits_themselves_are_at_distance_zero(judge: DigitJudge) -> None:
    row = judge.measure(judge.x, judge.y, seconds=2 * len(judge.x))
    assert row["frechet"] < 1e-6
    assert row["sliced_wasserstein"] < 1e-6
    assert row["accuracy"] > 0.99
    assert row["seconds_per_sample"] == 2


def test_checks_unmask_copies_of_the_training_set(judge: DigitJudge) -> None:
    copies, unseen = judge.check(judge.digits.x[:200]), judge.check(judge.digits.held_out_x)
    assert copies["nearest_neighbour_ratio"] < 1e-3
    assert unseen["nearest_neighbour_ratio"] == 1
    assert copies["precision"] == 1
