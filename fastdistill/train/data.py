"""Datasets that ship with their packages, and the randomness of a run.

Everything random that a training step consumes (which rows, times, noise, dropped labels) is a pure function of
`(seed, stream, step)`: nothing has to be saved to resume exactly, and a step can be replayed alone.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def generator_at(seed: int, stream: str, step: int = 0) -> torch.Generator:
    """A CPU generator that depends on its arguments only; streams are independent of each other.

    The three are hashed because torch's CPU generator keeps 32 bits of its seed: neighbouring steps must not collide.
    """
    digest = hashlib.sha256(f"{seed}/{stream}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


@dataclass(frozen=True)
class Batch:
    """One training batch, on the device of the network."""

    x0: Tensor  # (B, ...) data
    x1: Tensor  # (B, ...) noise
    y: Tensor | None  # (B,) int64 labels; None where the data has no classes
    null: int  # the label that stands for "no label": the number of classes
    undropped: Tensor | None = None  # (B,) int64: the labels as they were before some of y became null


class Digits:
    """scikit-learn's 1,797 handwritten digits, (1, 8, 8) in [-1, 1], with their labels.

    The split is fixed: within each class, in the order of the file, every sixth image is held out (1,502 train,
    295 held out). It uses no random numbers, so that no library version can change it.
    """

    name = "digits"
    shape = (1, 8, 8)
    num_classes = 10

    def __init__(self) -> None:
        from sklearn.datasets import load_digits  # here: it takes a second to import

        images, labels = load_digits(return_X_y=True)
        x = torch.from_numpy(images.astype(np.float32)).view(-1, *self.shape) / 8 - 1  # 0..16 -> [-1, 1]
        y = torch.from_numpy(labels.astype(np.int64))
        held_out = torch.zeros(len(y), dtype=torch.bool)
        for label in range(self.num_classes):
            held_out[(y == label).nonzero()[5::6]] = True
        self.x, self.y = x[~held_out], y[~held_out]
        self.held_out_x, self.held_out_y = x[held_out], y[held_out]

    def batch(self, seed: int, step: int, size: int) -> tuple[Tensor, Tensor]:
        """Rows without replacement: epoch after epoch, each in a new order; a batch may span two epochs.

        Args:
            seed: the run's seed.
            step: counts from 0.
            size: rows in a batch.

        Returns:
            x0 (size, 1, 8, 8) float32 and y (size,) int64.
        """
        rows = epoch_rows(len(self.x), seed, step, size)
        return self.x[rows], self.y[rows]


class Ring:
    """Eight Gaussians on a circle in the plane, without labels: endless samples of a law known in closed form."""

    name = "ring"
    shape = (2,)
    num_classes = 0
    modes, radius, std = 8, 2.0, 0.2

    def batch(self, seed: int, step: int, size: int) -> tuple[Tensor, None]:
        """Fresh points, x0 (size, 2) float32."""
        generator = generator_at(seed, "ring", step)
        angle = torch.randint(self.modes, (size,), generator=generator) * (2 * math.pi / self.modes)
        centre = self.radius * torch.stack([angle.cos(), angle.sin()], dim=1)
        return centre + self.std * torch.randn(size, 2, generator=generator), None


Dataset = Digits | Ring
DATASETS: dict[str, type[Dataset]] = {"digits": Digits, "ring": Ring}


def epoch_rows(total: int, seed: int, step: int, size: int) -> Tensor:
    """Row numbers (size,) of the batch at this step of an endless series of seeded permutations of `total` rows."""
    rows: list[Tensor] = []
    position, end = step * size, (step + 1) * size
    while position < end:
        epoch, offset = divmod(position, total)
        order = torch.randperm(total, generator=generator_at(seed, "epoch", epoch))
        rows.append(order[offset : offset + end - position])
        position += len(rows[-1])
    return torch.cat(rows)


def drop_labels(y: Tensor, share: float, null: int, generator: torch.Generator) -> Tensor:
    """Replace each label by `null` ("no label") with probability `share`: the training of classifier-free guidance."""
    return torch.where(torch.rand(y.shape, generator=generator) < share, null, y)
