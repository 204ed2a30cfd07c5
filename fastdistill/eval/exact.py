"""Data laws whose velocity, and flow map, are known: what objectives, samplers and trained networks are held against.

t = 0 is data, t = 1 noise. States are (B, D); times are (B,) or (). Everything is computed in the state's dtype: use
float64 to check an identity.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdistill.paths import LINEAR, Path, expand_time


class Gaussian:
    """Data N(mean, covariance), where everything has a closed form, on any path.

    x_t is N(alpha m, C_t) with C_t = alpha^2 S + beta^2 I. Conditioning gives the velocity
    v = E[d_alpha x0 + d_beta x1 | x_t] = d_alpha m + (1/2) (dC_t/dt) C_t^-1 (x - alpha m), and since every C_t has
    the axes of S, its flow is f(x, t, s) = alpha_s m + (C_s C_t^-1)^(1/2) (x - alpha_t m).

    Args:
        mean: (D,). covariance: (D, D), symmetric and positive semidefinite; zero is a single point.
    """

    def __init__(self, mean: Tensor, covariance: Tensor, path: Path = LINEAR) -> None:
        if covariance.shape != (*mean.shape, *mean.shape) or mean.ndim != 1:
            raise ValueError(f"covariance: expected (D, D) for a mean (D,), got {covariance.shape} and {mean.shape}")
        self.mean, self.path = mean, path
        self._eigenvalues, self._axes = torch.linalg.eigh(covariance)

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """The marginal velocity v(x, t); x (B, D)."""
        t = expand_time(t, x)
        path = self.path
        half_rate = path.alpha(t) * path.d_alpha(t) * self._eigenvalues + path.beta(t) * path.d_beta(t)
        return path.d_alpha(t) * self.mean + self._scale(x - path.alpha(t) * self.mean, half_rate / self._variance(t))

    def flow_map(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The solution at s of dx/dt = v that passes through x at t; x (B, D)."""
        t, s = expand_time(t, x), expand_time(s, x)
        root = (self._variance(s) / self._variance(t)).sqrt()
        return self.path.alpha(s) * self.mean + self._scale(x - self.path.alpha(t) * self.mean, root)

    def average_velocity(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """u(x, t, s) = (x - f(x, t, s)) / (t - s), and v(x, t) where s = t; about eps / (t - s) accurate."""
        return _average(x, self.flow_map(x, t, s), self.velocity(x, t), t, s)

    def _variance(self, t: Tensor) -> Tensor:
        """The eigenvalues of C_t."""
        return self.path.alpha(t).square() * self._eigenvalues + self.path.beta(t).square()

    def _scale(self, x: Tensor, factors: Tensor) -> Tensor:
        """Multiply rows by the symmetric matrix with these eigenvalues on the covariance's axes."""
        return (x @ self._axes * factors) @ self._axes.T


class GaussianMixture:
    """Data from K isotropic Gaussians of equal weight: closed-form velocity, flow map by Runge-Kutta.

    Args:
        means: (K, D). std: the standard deviation of each component.
    """

    def __init__(self, means: Tensor, std: float, path: Path = LINEAR) -> None:
        if means.ndim != 2:
            raise ValueError(f"means: expected shape (K, D), got {tuple(means.shape)}")
        if not std > 0:
            raise ValueError(f"std: expected > 0, got {std}")
        self.means, self.std, self.path = means, std, path

    def sample(self, count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Data x0 (count, D) float32 and the component of each row (count,) int64, on the generator's device."""
        device = self.means.device if generator is None else generator.device
        labels = torch.randint(len(self.means), (count,), generator=generator, device=device)
        noise = torch.randn(count, self.means.shape[1], generator=generator, device=device)
        return self.means.to(noise)[labels] + self.std * noise, labels

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """The marginal velocity v(x, t): the components' own, averaged by their posterior given x; x (B, D)."""
        path, means = self.path, self.means.to(x)
        t = expand_time(t, x)
        alpha, beta, d_alpha, d_beta = path.alpha(t), path.beta(t), path.d_alpha(t), path.d_beta(t)
        variance = (alpha * self.std).square() + beta.square()
        offsets = x[:, None] - alpha[..., None] * means  # (B, K, D)
        posterior = (-offsets.square().sum(2) / (2 * variance)).softmax(1)  # (B, K)
        half_rate = (alpha * d_alpha * self.std**2 + beta * d_beta) / variance
        mean = posterior @ means
        return d_alpha * mean + half_rate * (x - alpha * mean)

    def flow_map(self, x: Tensor, t: Tensor, s: Tensor, steps: int = 100) -> Tensor:
        """The solution at s of dx/dt = v that passes through x at t, by the classical fourth-order method; x (B, D)."""
        h = (s - t) / steps
        width = expand_time(h, x)
        for i in range(steps):
            now = t + i * h
            k1 = self.velocity(x, now)
            k2 = self.velocity(x + 0.5 * width * k1, now + 0.5 * h)
            k3 = self.velocity(x + 0.5 * width * k2, now + 0.5 * h)
            k4 = self.velocity(x + width * k3, now + h)
            x = x + width / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return x

    def average_velocity(self, x: Tensor, t: Tensor, s: Tensor, steps: int = 100) -> Tensor:
        """u(x, t, s) = (x - f(x, t, s)) / (t - s), and v(x, t) where s = t."""
        return _average(x, self.flow_map(x, t, s, steps), self.velocity(x, t), t, s)


class Ring(GaussianMixture):
    """Gaussians at equal angles on a circle in the plane: the smallest data with a curved flow and separate modes."""

    def __init__(self, modes: int = 8, radius: float = 2.0, std: float = 0.2, path: Path = LINEAR) -> None:
        angles = torch.arange(modes, dtype=torch.float64) * (2 * math.pi / modes)
        super().__init__(radius * torch.stack((angles.cos(), angles.sin()), 1), std, path)


def _average(x: Tensor, f: Tensor, v: Tensor, t: Tensor, s: Tensor) -> Tensor:
    gap = expand_time(t - s, x)
    return torch.where(gap == 0, v, (x - f) / torch.where(gap == 0, 1, gap))
