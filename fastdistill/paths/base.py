"""Define what every probability path has in common: a schedule, its derivatives, and what follows from them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

# Gauss-Legendre nodes and weights on [0, 1] are exact for polynomials of degree 15.
_QUADRATURE = tuple(
    (0.5 + sign * 0.5 * node, 0.5 * weight)
    for node, weight in (
        (0.1834346424956498, 0.3626837833783620),
        (0.5255324099163290, 0.3137066458778873),
        (0.7966664774136267, 0.2223810344533745),
        (0.9602898564975363, 0.1012285362903763),
    )
    for sign in (-1, 1)
)
_NEAR = 0.1  # Times closer than this are averaged by quadrature, others by a difference.


def expand_time(t: Tensor, x: Tensor) -> Tensor:
    """Give times of shape (B,) or () the trailing axes that broadcast them against x (B, ...)."""
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


class Path(ABC):
    """Schedule with its derivatives, all elementwise in t on [0, 1], from which all other methods follow.

    Given x0, the state at t has the law N(alpha(t) x0, beta(t)^2 I). Most paths reach the data at t = 0, alpha = 1 and
    beta = 0, and unit noise at t = 1, alpha = 0 and beta = 1; those that do not say so.
    """

    coupling: ClassVar[str] = "independent"
    """How x0 and x1 are paired before `interpolate`: a name in `fastdistill.couplings.COUPLINGS`."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Return the coefficient of the data, which falls with t."""

    @abstractmethod
    def beta(self, t: Tensor) -> Tensor:
        """Return the standard deviation of the noise, which rises with t."""

    @abstractmethod
    def d_alpha(self, t: Tensor) -> Tensor:
        """Return the derivative of alpha."""

    @abstractmethod
    def d_beta(self, t: Tensor) -> Tensor:
        """Return the derivative of beta."""

    @property
    def stochastic(self) -> bool:
        """Return whether `interpolate` adds noise of its own, so that two calls differ."""
        return False

    def interpolate(self, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        """Return the state x_t = alpha(t) x0 + beta(t) x1, for x0, x1 (B, ...) and t (B,) or ()."""
        t = expand_time(t, x0)
        return self.alpha(t) * x0 + self.beta(t) * x1

    def velocity(self, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        """Return the conditional velocity d_alpha(t) x0 + d_beta(t) x1, the time derivative of `interpolate`.

        Its mean given x_t is the marginal velocity, which carries the law of the data to that of the noise.

        Source: Lipman et al. 2023, arXiv:2210.02747, theorems 1 and 2; Albergo et al. 2023, arXiv:2303.08797.
        """
        t = expand_time(t, x0)
        return self.d_alpha(t) * x0 + self.d_beta(t) * x1

    def prior(self, x1: Tensor) -> Tensor:
        """Return the state from which sampling starts at t = 1, beta(1) x1, for unit noise x1 (B, ...).

        This is exact where alpha(1) = 0. A path with alpha(1) > 0 (EDM, VE) neglects the data against the noise there.
        """
        return self.beta(torch.ones((), dtype=torch.float64, device=x1.device)).to(x1.dtype) * x1

    def slopes(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean slopes (alpha(t) - alpha(s)) / (t - s), and those of beta; where s = t, the derivatives.

        The slopes are accurate to a few rounding errors however close the times are. Distant times take a difference,
        near ones a Gauss-Legendre quadrature of the derivative. Paths override this where a closed form exists.
        """
        gap = t - s
        near = gap.abs() < _NEAR
        safe = torch.where(near, torch.ones_like(gap), gap)
        means = []
        for value, rate in ((self.alpha, self.d_alpha), (self.beta, self.d_beta)):
            mean = sum((w * rate(s + node * gap) for node, w in _QUADRATURE), torch.zeros_like(gap))
            means.append(torch.where(near, mean, (value(t) - value(s)) / safe))
        return means[0], means[1]

    def angle(self, t: Tensor) -> Tensor:
        """Return the noise level as an angle, atan2(beta, alpha), in [0, pi/2]; it determines how a state is mixed."""
        return torch.atan2(self.beta(t), self.alpha(t))

    def time_at(self, angle: Tensor) -> Tensor:
        """Return the time with this noise level, the inverse of `angle`; differentiable, for angles of any shape.

        Without a closed form this bisects. An angle beyond the path gives the nearer end.
        """
        with torch.no_grad():
            low, high = torch.zeros_like(angle), torch.ones_like(angle)
            for _ in range(60 if angle.dtype == torch.float64 else 30):
                middle = 0.5 * (low + high)
                below = self.angle(middle) < angle
                low, high = torch.where(below, middle, low), torch.where(below, high, middle)
            t = 0.5 * (low + high)
            alpha, beta = self.alpha(t), self.beta(t)
            rate = (alpha * self.d_beta(t) - self.d_alpha(t) * beta) / (alpha.square() + beta.square())
            outside = (angle < self.angle(torch.zeros_like(t))) | (angle > self.angle(torch.ones_like(t)))
            inverse = torch.where(outside | (rate == 0), 0.0, 1 / torch.where(rate == 0, 1.0, rate))
            anchor = self.angle(t)
        # One step of Newton changes the value by a rounding error only, and gives it the derivative with respect to
        # `angle`.
        return t + torch.where(inverse == 0, 0.0, (angle - anchor) * inverse)


def check_number(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Raise a ValueError that names the argument unless it is a finite number in [low, high]."""
    if not (math.isfinite(value) and low <= value <= high):
        bounds = f">= {low:g}" if high == math.inf else f"in [{low:g}, {high:g}]"
        raise ValueError(f"{name}: expected a finite number {bounds}, got {value}")
