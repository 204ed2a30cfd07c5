"""Load scikit-learn's handwritten digits, a set of images that needs no download."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastdistill.data.randomness import epoch_rows


class Digits:
    """Give the 1,797 handwritten digits of scikit-learn, (1, 8, 8) in [-1, 1], with their labels.

    The split is fixed: within each class, in the order of scikit-learn's file, every sixth image is held out. This
    leaves 1,501 images to train on and holds 296 out. The split uses no random numbers, so that no library version can
    change it.
    """

    shape = (1, 8, 8)
    num_classes = 10
    judge = "fastdistill.eval.digits:DigitJudge"

    def batch(self, seed: int, step: int, size: int) -> tuple[Tensor, Tensor]:
        """Return rows without replacement; every epoch has a new order, and a batch may span two epochs."""
        rows = epoch_rows(len(self.x), seed, step, size)
        return self.x[rows], self.y[rows]

    @property
    def x(self) -> Tensor:
        """Return the training images, (1501, 1, 8, 8)."""
        return self._parts[0]

    @property
    def y(self) -> Tensor:
        """Return the labels of the training images, (1501,) int64."""
        return self._parts[1]

    @property
    def held_out_x(self) -> Tensor:
        """Return the images that no network is trained on, (296, 1, 8, 8)."""
        return self._parts[2]

    @property
    def held_out_y(self) -> Tensor:
        """Return the labels of the images that no network is trained on, (296,) int64."""
        return self._parts[3]

    @functools.cached_property
    def _parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        import numpy as np
        from sklearn.datasets import load_digits  # This takes a second, so only the first use pays.

        images, labels = load_digits(return_X_y=True)
        x = torch.from_numpy(images.astype(np.float32)).view(-1, *self.shape) / 8 - 1  # from 0..16 to [-1, 1]
        y = torch.from_numpy(labels.astype(np.int64))
        held_out = torch.zeros(len(y), dtype=torch.bool)
        for label in range(self.num_classes):
            held_out[(y == label).nonzero()[5::6]] = True
        return x[~held_out], y[~held_out], x[held_out], y[held_out]


DATA_SET = Digits
