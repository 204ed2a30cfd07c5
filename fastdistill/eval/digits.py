"""How good generated digits are: measured against the real ones, beside references that give a number its meaning.

A distance alone says little, so the same is measured of resampled real digits (`bootstrap`: what copying them would
give), of unseen real digits (`held_out`), of one Gaussian a class (`class_gaussian`, which no network should lose to in
the end) and of `noise`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fastdistill.eval.classifier import cached_classifier
from fastdistill.eval.metrics import (
    frechet_distance,
    nearest_neighbour_ratio,
    precision_recall,
    sliced_wasserstein,
    two_sample_accuracy,
)
from fastdistill.train import TrainConfig
from fastdistill.train.data import Digits, generator_at
from fastdistill.train.sampling import OWN, Sampling, draw

Row = dict[str, float]


class DigitJudge:
    """Measures sets of images (N, 1, 8, 8) in [-1, 1] against the real digits; deterministic, on the CPU.

    Args:
        folder: where the classifier is kept, as `classifier.safetensors`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.digits = folder, Digits()
        self.x = torch.cat((self.digits.x, self.digits.held_out_x))
        self.y = torch.cat((self.digits.y, self.digits.held_out_y))
        self.classifier = cached_classifier(folder / "classifier.safetensors", self.digits.x, self.digits.y)
        self._references: dict[tuple[int | None, int], dict[str, Row]] = {}

    def labels(self, count: int | None = None) -> Tensor:
        """Labels (count,) int64 in the real frequencies, sorted; None: as many as there are real digits."""
        count = count or len(self.y)
        return self.y.sort().values[torch.arange(count) * len(self.y) // count]

    def measure(self, x: Tensor, y: Tensor, seconds: float, real: Tensor | None = None) -> Row:
        """The four numbers of a row of the table.

        Args:
            x: the images; y: the labels that they are meant to show.
            seconds: that it took to make all of them.
            real: what to compare them with; None: all real digits.
        """
        real = self.x if real is None else real
        return {
            "frechet": frechet_distance(self.classifier.features(x), self.classifier.features(real)),
            "accuracy": self.classifier.accuracy(x, y),
            "sliced_wasserstein": sliced_wasserstein(x.flatten(1), real.flatten(1)),
            "seconds_per_sample": seconds / len(x),
        }

    def check(self, x: Tensor) -> Row:
        """What a Fréchet distance can't tell: precision, recall, and whether images x are copies of the training set.

        Precision, recall and the two-sample accuracy `c2st` (0.5: can't be told from real ones) are those of the
        classifier's features. The nearest-neighbour ratio, in pixels, is 1 for images as far from the training set as
        unseen digits are, and 0 for copies.
        """
        features, real = self.classifier.features(x), self.classifier.features(self.x)
        precision, recall = precision_recall(features, real)
        train, held_out = self.digits.x.flatten(1), self.digits.held_out_x.flatten(1)
        ratio = nearest_neighbour_ratio(x.flatten(1), train, held_out)
        c2st = two_sample_accuracy(features, real)
        return {"precision": precision, "recall": recall, "c2st": c2st, "nearest_neighbour_ratio": ratio}

    def references(self, count: int | None = None, *, seed: int = 0) -> dict[str, Row]:
        """The same four numbers for what is no network's work, `count` images each.

        Held-out digits are compared with the training digits: a set that holds them would make them look too good.
        """
        if (count, seed) not in self._references:
            self._references[count, seed] = self._measure_references(self.labels(count), seed)
        return self._references[count, seed]

    def _measure_references(self, y: Tensor, seed: int) -> dict[str, Row]:
        bootstrap, seconds = _timed(lambda: self._resample(y, generator_at(seed, "bootstrap")))
        gaussian, gaussian_seconds = _timed(lambda: self._draw_gaussians(y, generator_at(seed, "class gaussian")))
        noise, noise_seconds = _timed(lambda: torch.randn(bootstrap.shape, generator=generator_at(seed, "noise")))
        return {
            "bootstrap": self.measure(bootstrap, y, seconds),
            "held_out": self.measure(self.digits.held_out_x, self.digits.held_out_y, 0.0, real=self.digits.x),
            "class_gaussian": self.measure(gaussian, y, gaussian_seconds),
            "noise": self.measure(noise, y, noise_seconds),
        }

    def _resample(self, y: Tensor, generator: torch.Generator) -> Tensor:
        """Real digits with these labels, drawn with replacement."""
        drawn = self.x.new_empty(len(y), *self.x.shape[1:])
        for label in range(self.digits.num_classes):
            rows, pool = y == label, self.x[self.y == label]
            drawn[rows] = pool[torch.randint(len(pool), (int(rows.sum()),), generator=generator)]
        return drawn

    def _draw_gaussians(self, y: Tensor, generator: torch.Generator) -> Tensor:
        """For each label, draws from the Gaussian that fits its training images."""
        drawn = self.x.new_empty(len(y), *self.x.shape[1:])
        for label in range(self.digits.num_classes):
            rows, pool = y == label, self.digits.x[self.digits.y == label].flatten(1).double()
            variances, axes = torch.linalg.eigh(torch.cov(pool.T))
            noise = torch.randn(int(rows.sum()), len(axes), generator=generator, dtype=torch.double)
            images = pool.mean(0) + noise * variances.clamp(min=0).sqrt() @ axes.T
            drawn[rows] = images.to(drawn).view(-1, *drawn.shape[1:])
        return drawn


@torch.no_grad()
def evaluate_network(
    net: nn.Module,
    config: TrainConfig,
    judge: DigitJudge,
    steps: Sequence[int],
    *,
    count: int | None = None,
    how: Sampling = OWN,
    seed: int = 0,
) -> tuple[dict[str, Row], dict[str, Row]]:
    """Generate with each number of steps, always from the same noise; the rows and the checks, by number of steps.

    Args:
        net, config: as `load_run` returns them.
        steps: of the sampler.
        count: of images; None: as many as there are real digits.
        how: which sampler, guidance and gamma.
    """
    device = next(net.parameters()).device
    labels = judge.labels(count)
    y = labels.to(device)
    x1 = torch.randn(len(y), *judge.x.shape[1:], generator=generator_at(seed, "evaluate")).to(device)
    draw(net, config, x1[:8], y[:8], 1, how)  # pays for what a first call sets up
    rows, checks = {}, {}
    for number in steps:
        started = time.perf_counter()
        x = draw(net, config, x1, y, number, how, seed=seed).cpu()
        rows[str(number)] = judge.measure(x, labels, time.perf_counter() - started)
        checks[str(number)] = judge.check(x)
    return rows, checks


def _timed(make: Callable[[], Tensor]) -> tuple[Tensor, float]:
    started = time.perf_counter()
    made = make()
    return made, time.perf_counter() - started
