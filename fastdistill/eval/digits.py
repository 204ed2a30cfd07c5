"""Measure how good generated digits are, against the real ones and beside references that give a number its meaning.

A distance alone says little, so four references are measured in the same way:

    bootstrap        training digits drawn again at random; copies of them would score the same.
    held_out         real digits that no network was trained on.
    class_gaussian   samples of one Gaussian for each class, which a finished network should beat.
    noise            plain noise.

The Fréchet distance of few samples is larger than that of many, even if both come from one law. So every number, of
networks and of references, compares n images with the same 1,501 training digits, and n is at most 296, the number of
held-out digits. More images are measured in equal sets, and their numbers are averaged; the default is six sets of 296.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdistill.data import Digits, generator_at
from fastdistill.eval.classifier import cached_classifier
from fastdistill.eval.metrics import (
    frechet_distance,
    nearest_neighbour_ratio,
    precision_recall,
    sliced_wasserstein,
    two_sample_accuracy,
)
from fastdistill.train import TrainConfig
from fastdistill.train.sampling import OWN, Sampling, draw

Row = dict[str, float]
SETS = 6  # Six sets of 296 images are about as many as all real digits.


class DigitJudge:
    """Judge sets of images (N, 1, 8, 8) in [-1, 1] against the training digits, deterministically and on the CPU.

    Args:
        folder: the folder that keeps the classifier, as `classifier.safetensors`.
        digits: the data set; None makes one.
    """

    headline = ("frechet", "accuracy")
    training_steps = 4000

    def __init__(self, folder: Path, digits: Digits | None = None) -> None:
        self.folder, self.digits = folder, digits or Digits()
        self.x, self.y = self.digits.x, self.digits.y
        self.unseen = len(self.digits.held_out_y)
        self.classifier = cached_classifier(folder / "classifier.safetensors", self.digits.x, self.digits.y)
        self._references: dict[tuple[int | None, int], dict[str, Row]] = {}

    def evaluate(
        self, net: nn.Module, config: TrainConfig, steps: Sequence[int], *, count: int | None, how: Sampling, seed: int
    ) -> dict[str, Any]:
        """Return rows and references as every judge does (`fastdistill.eval.judges.Judge`), and also `checks`."""
        samples = len(self.labels(count))
        rows, checks = evaluate_network(net, config, self, steps, count=count, how=how, seed=seed)
        known = self.references(count, seed=seed)
        return {
            "samples": samples, "set": self.set_size(samples), "steps": rows, "checks": checks, "references": known,
        }  # fmt: skip

    def labels(self, count: int | None = None) -> Tensor:
        """Return sorted labels (count,) int64 in the frequencies of the training digits.

        Args:
            count: the number of labels; None takes `SETS` times the number of held-out digits.
        """
        count = count or SETS * self.unseen
        return self.y.sort().values[torch.arange(count) * len(self.y) // count]

    def set_size(self, count: int) -> int:
        """Return the size of a set if there are `count` images in all; it is at most the number of held-out digits."""
        return count // self._number_of_sets(count)

    def measure(self, x: Tensor, y: Tensor, seconds: float) -> Row:
        """Return the four numbers of a row of the table.

        Args:
            x: the images.
            y: the labels that the images are meant to show.
            seconds: the time that it took to make all images.
        """
        real = self.classifier.features(self.x)
        rows = [
            {
                "frechet": frechet_distance(self.classifier.features(part), real),
                "accuracy": self.classifier.accuracy(part, labels),
                "sliced_wasserstein": sliced_wasserstein(part.flatten(1), self.x.flatten(1)),
            }
            for part, labels in zip(self._sets(x), self._sets(y), strict=True)
        ]
        return _mean(rows) | {"seconds_per_sample": seconds / len(x)}

    def check(self, x: Tensor) -> Row:
        """Return what a Fréchet distance can't tell: precision, recall, and whether images are copies of real ones.

        Precision, recall and the two-sample accuracy `c2st` compare features of the classifier; a `c2st` of 0.5 means
        that the images can't be told from the training digits. The nearest-neighbour ratio compares pixels. It is 1 for
        images as far from the training digits as held-out digits are, and 0 for copies.
        """
        real, rows = self.classifier.features(self.x), []
        for part in self._sets(x):
            features = self.classifier.features(part)
            precision, recall = precision_recall(features, real)
            ratio = nearest_neighbour_ratio(part.flatten(1), self.x.flatten(1), self.digits.held_out_x.flatten(1))
            c2st = two_sample_accuracy(features, real)
            rows.append({"precision": precision, "recall": recall, "c2st": c2st, "nearest_neighbour_ratio": ratio})
        return _mean(rows)

    def _sets(self, x: Tensor) -> list[Tensor]:
        """Divide images or labels, sorted by label, into equal sets with like labels; see `set_size`."""
        number = self._number_of_sets(len(x))
        return [x[first::number] for first in range(number)]

    def _number_of_sets(self, count: int) -> int:
        return -(-count // self.unseen)

    def references(self, count: int | None = None, *, seed: int = 0) -> dict[str, Row]:
        """Return the same four numbers for each reference.

        Args:
            count: the number of images of each reference; None takes `SETS` times the number of held-out digits. The
                reference `held_out` has one set alone, of the size of all other sets.
            seed: the seed of the references' randomness.
        """
        if (count, seed) not in self._references:
            self._references[count, seed] = self._measure_references(self.labels(count), seed)
        return self._references[count, seed]

    def _measure_references(self, y: Tensor, seed: int) -> dict[str, Row]:
        bootstrap, seconds = _timed(lambda: self._resample(y, generator_at(seed, "bootstrap")))
        gaussian, gaussian_seconds = _timed(lambda: self._draw_gaussians(y, generator_at(seed, "class gaussian")))
        noise, noise_seconds = _timed(lambda: torch.randn(bootstrap.shape, generator=generator_at(seed, "noise")))
        kept = self._spread(self.set_size(len(y)), self.digits.held_out_y)
        return {
            "bootstrap": self.measure(bootstrap, y, seconds),
            "held_out": self.measure(self.digits.held_out_x[kept], self.digits.held_out_y[kept], 0.0),
            "class_gaussian": self.measure(gaussian, y, gaussian_seconds),
            "noise": self.measure(noise, y, noise_seconds),
        }

    def training_digits(self) -> tuple[Tensor, Tensor]:
        """Return as many training digits as there are held-out ones, evenly from all classes, with their labels."""
        kept = self._spread(self.unseen, self.y)
        return self.x[kept], self.y[kept]

    @staticmethod
    def _spread(count: int, y: Tensor) -> Tensor:
        """Return the indices of `count` labels at even distances in the sorted labels y."""
        return y.argsort(stable=True)[torch.arange(count) * len(y) // count]

    def _resample(self, y: Tensor, generator: torch.Generator) -> Tensor:
        """Return training digits with these labels, drawn with replacement."""
        drawn = self.x.new_empty(len(y), *self.x.shape[1:])
        for label in range(self.digits.num_classes):
            rows, pool = y == label, self.x[self.y == label]
            drawn[rows] = pool[torch.randint(len(pool), (int(rows.sum()),), generator=generator)]
        return drawn

    def _draw_gaussians(self, y: Tensor, generator: torch.Generator) -> Tensor:
        """Return images with these labels, each drawn from the Gaussian that fits the training images of its label."""
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
    """Generate with each number of steps from the same noise, and return the rows and the checks by number of steps.

    Args:
        net, config: network and configuration, as `load_run` returns them.
        judge: the judge that measures.
        steps: the numbers of sampling steps.
        count: the number of images; None takes `SETS` times the number of held-out digits.
        how: the sampler with its parameters and its guidance.
        seed: the seed of all noise.
    """
    device = next(net.parameters()).device
    labels = judge.labels(count)
    y = labels.to(device)
    x1 = torch.randn(len(y), *judge.x.shape[1:], generator=generator_at(seed, "evaluate")).to(device)
    draw(net, config, x1[:8], y[:8], 1, how)  # The first call sets things up, which must not be timed.
    rows, checks = {}, {}
    for number in steps:
        started = time.perf_counter()
        x = draw(net, config, x1, y, number, how, seed=seed).cpu()
        rows[str(number)] = judge.measure(x, labels, time.perf_counter() - started)
        checks[str(number)] = judge.check(x)
    return rows, checks


def _mean(rows: Sequence[Row]) -> Row:
    """Return the mean of each metric."""
    return {metric: statistics.fmean(row[metric] for row in rows) for metric in rows[0]}


def _timed(make: Callable[[], Tensor]) -> tuple[Tensor, float]:
    started = time.perf_counter()
    made = make()
    return made, time.perf_counter() - started
