"""Probability paths x_t = alpha(t) x0 + beta(t) x1 from data x0 (t = 0) to Gaussian noise x1 (t = 1)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


def expand_time(t: Tensor, x: Tensor) -> Tensor:
    """Give times of shape (B,) or () the trailing axes that broadcast them against x (B, ...)."""
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


class Path(ABC):
    """A schedule and its derivatives, all elementwise in t; the rest follows from these four."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """The coefficient of the data: 1 at t = 0 and 0 at t = 1."""

    @abstractmethod
    def beta(self, t: Tensor) -> Tensor:
        """The coefficient of the noise: 0 at t = 0 and 1 at t = 1."""

    @abstractmethod
    def d_alpha(self, t: Tensor) -> Tensor:
        """The derivative of alpha."""

    @abstractmethod
    def d_beta(self, t: Tensor) -> Tensor:
        """The derivative of beta."""

    def interpolate(self, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        """The state x_t = alpha(t) x0 + beta(t) x1; x0, x1 (B, ...) and t (B,) or ()."""
        t = expand_time(t, x0)
        return self.alpha(t) * x0 + self.beta(t) * x1

    def velocity(self, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        """The conditional velocity d_alpha(t) x0 + d_beta(t) x1, the time derivative of `interpolate`.

        Its mean given x_t is the marginal velocity that carries the data's law to the noise's.
        Source: Lipman et al. 2023, arXiv:2210.02747, theorems 1 and 2; Albergo et al. 2023, arXiv:2303.08797.
        """
        t = expand_time(t, x0)
        return self.d_alpha(t) * x0 + self.d_beta(t) * x1


@dataclass(frozen=True)
class Linear(Path):
    """The straight path x_t = (1 - t) x0 + t x1, whose conditional velocity is x1 - x0 at every t.

    Source: Liu et al. 2023 (rectified flow), arXiv:2209.03003, equation 1, with time reversed.
    """

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def beta(self, t: Tensor) -> Tensor:
        return t

    def d_alpha(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def d_beta(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)


@dataclass(frozen=True)
class Cosine(Path):
    """The variance-preserving path x_t = cos(pi t / 2) x0 + sin(pi t / 2) x1.

    Source: Albergo and Vanden-Eijnden 2023, arXiv:2209.15571, the trigonometric interpolant, with time reversed.
    """

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(0.5 * math.pi * t)

    def beta(self, t: Tensor) -> Tensor:
        return torch.sin(0.5 * math.pi * t)

    def d_alpha(self, t: Tensor) -> Tensor:
        return -0.5 * math.pi * self.beta(t)

    def d_beta(self, t: Tensor) -> Tensor:
        return 0.5 * math.pi * self.alpha(t)


LINEAR = Linear()  # the default everywhere
