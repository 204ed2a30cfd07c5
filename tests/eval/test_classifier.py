"""Test the classifier that measures: it is good enough, the same each time, and kept safely."""

from __future__ import annotations

from pathlib import Path

import torch

from fastdistill.eval.classifier import FEATURES, cached_classifier, train_classifier
from fastdistill.eval.digits import DigitJudge


def test_it_knows_digits_that_it_has_not_seen(judge: DigitJudge) -> None:
    digits = judge.digits
    assert judge.classifier.accuracy(digits.held_out_x, digits.held_out_y) >= 0.98
    assert judge.classifier.features(digits.x[:3]).shape == (3, FEATURES)


def test_the_same_seed_gives_the_same_weights_and_leaves_the_random_state_alone(judge: DigitJudge) -> None:
    x, y = judge.digits.x[:200], judge.digits.y[:200]
    state = torch.get_rng_state()
    first, second, other = (train_classifier(x, y, seed=seed, epochs=1).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_it_is_trained_once_and_read_afterwards(tmp_path: Path, judge: DigitJudge) -> None:
    x, y, path = judge.digits.x[:100], judge.digits.y[:100], tmp_path / "new" / "classifier.safetensors"
    trained = cached_classifier(path, x, y)
    written = path.stat().st_mtime_ns
    stored = cached_classifier(path, x, y)
    assert path.stat().st_mtime_ns == written
    assert torch.equal(stored(x), trained(x))
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_file_that_is_damaged_or_from_other_data_is_replaced(tmp_path: Path, judge: DigitJudge) -> None:
    x, y, path = judge.digits.x[:100], judge.digits.y[:100], tmp_path / "classifier.safetensors"
    path.write_bytes(b"truncated")
    trained = cached_classifier(path, x, y)
    assert torch.equal(cached_classifier(path, x, y)(x), trained(x))
    other = cached_classifier(path, x[:50], y[:50])
    assert not torch.equal(other(x), trained(x))
