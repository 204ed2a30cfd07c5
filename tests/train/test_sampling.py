"""Samples: pure functions of the seed, with or without labels and guidance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastdistill.train import ConfigError, generate
from fastdistill.train.run import build_network
from tests.train.conftest import MakeConfig


class Recorder(torch.nn.Module):
    """A network that stays at zero and remembers its labels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.labels: list[Tensor | None] = []

    def forward(self, x: Tensor, t: Tensor, s: Tensor, y: Tensor | None = None) -> Tensor:
        self.labels.append(y)
        return x * self.weight


def test_a_seed_gives_the_same_samples_and_another_seed_others(tiny: MakeConfig) -> None:
    """And the caller's generator plays no part."""
    config = tiny()
    net = build_network(config)
    first = generate(net, config, 5)
    torch.manual_seed(99)
    assert torch.equal(generate(net, config, 5), first)
    assert not torch.equal(generate(net, config, 5, seed=1), first)
    assert first.shape == (5, 2)


def test_labels_are_one_class_or_all_in_turn(tiny_digits: MakeConfig) -> None:
    """Steps count the calls."""
    net, config = Recorder(), tiny_digits()
    generate(net, config, 12, steps=3)
    generate(net, config, 2, label=7)
    assert [y.tolist() for y in net.labels if y is not None] == [[*range(10), 0, 1]] * 3 + [[7, 7]]


def test_guidance_pairs_labels_with_none(tiny_digits: MakeConfig) -> None:
    """On one doubled batch."""
    net = Recorder()
    generate(net, tiny_digits(), 2, label=3, guidance=2.0)
    assert net.labels[0] is not None
    assert net.labels[0].tolist() == [3, 3, 10, 10]


def test_what_a_run_cannot_serve_is_named(tiny: MakeConfig, tiny_digits: MakeConfig) -> None:
    """Labels outside the classes, labels without classes, guidance where none was learnt."""
    net, ring, digits = Recorder(), tiny(), tiny_digits()
    undropped = tiny_digits(data={"name": "digits"})
    meanflow = tiny_digits(method={"name": "meanflow"})
    with pytest.raises(ConfigError, match="label: expected one of 0 to 9, got 10"):
        generate(net, digits, 1, label=10)
    with pytest.raises(ConfigError, match="label: expected none, because ring has no labels, got 0"):
        generate(net, ring, 1, label=0)
    with pytest.raises(ConfigError, match="guidance: the run never learnt"):
        generate(net, undropped, 1, guidance=2.0)
    with pytest.raises(ConfigError, match="guidance: a meanflow network has its guidance built in"):
        generate(net, meanflow, 1, guidance=2.0)
