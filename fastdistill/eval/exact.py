"""Define data laws with known velocity and flow map, to check objectives, samplers and trained networks.

t = 0 is data, t = 1 noise. States are (B, D); times are (B,) or (). Everything is computed in the state's dtype: use
float64 to check an identity.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdistill.paths import LINEAR, OTCFM, Path, convert, expand_time


class Gaussian:
    """Data law N(mean, covariance), for which everything has a closed form, on any path.

    x_t is N(alpha m, C_t) with C_t = alpha^2 S + beta^2 I. Conditioning gives the velocity
    v = E[d_alpha x0 + d_beta x1 | x_t] = d_alpha m + (1/2) (dC_t/dt) C_t^-1 (x - alpha m), and since every C_t has
    the axes of S, its flow is f(x, t, s) = alpha_s m + (C_s C_t^-1)^(1/2) (x - alpha_t m).

    On a path coupled by optimal transport the pairs are those of the exact transport, x0 = m + S^(1/2) x1, which a
    minibatch's coupling tends to as it grows: then C_t = (a S^(1/2) + b I)^2 + sigma^2 I, with a, b of the pair.

    Args:
        mean: (D,). covariance: (D, D), symmetric and positive semidefinite; zero is a single point.
    """

    def __init__(self, mean: Tensor, covariance: Tensor, path: Path = LINEAR) -> None:
        if mean.ndim != 1 or covariance.shape != (*mean.shape, *mean.shape):
            raise ValueError(f"covariance: expected (D, D) for a mean (D,), got {covariance.shape} and {mean.shape}")
        eigenvalues, self._axes = torch.linalg.eigh(covariance)
        rounding = 100 * torch.finfo(eigenvalues.dtype).eps * eigenvalues.abs().max()
        if not torch.allclose(covariance, covariance.mT) or bool((eigenvalues < -rounding).any()):
            raise ValueError("covariance: expected a symmetric and positive semidefinite matrix, got one that isn't")
        self.mean, self.covariance, self.path = mean, covariance, path
        self._eigenvalues = eigenvalues.clamp_min(0)
        self._pair: Path = path
        self._sigma: float | None = None  # It is a number only on a path coupled by optimal transport.
        if isinstance(path, OTCFM):
            self._pair, self._sigma = path.pair, path.sigma
        else:
            _refuse_coupling(path)

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the marginal velocity v(x, t); x (B, D)."""
        t = expand_time(t, x)
        rates = self._pair.d_alpha(t), self._pair.d_beta(t)
        half_rate = 0.5 * self._slope_of_variance(t, t, rates) / self._variance(t)
        return self.path.d_alpha(t) * self.mean + self._scale(x - self.path.alpha(t) * self.mean, half_rate)

    def flow_map(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Return the solution at s of dx/dt = v that passes through x at t; x (B, D)."""
        t, s = expand_time(t, x), expand_time(s, x)
        root = (self._variance(s) / self._variance(t)).sqrt()
        return self.path.alpha(s) * self.mean + self._scale(x - self.path.alpha(t) * self.mean, root)

    def average_velocity(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Return u(x, t, s) = (x - f(x, t, s)) / (t - s), or v(x, t) where s = t, to a few rounding errors.

        The formula is u = a m + (dC / (C_t + (C_s C_t)^(1/2))) (x - alpha_t m), with the mean slopes a of alpha and dC
        of C.
        """
        t, s = expand_time(t, x), expand_time(s, x)
        slopes = self._pair.slopes(t, s)
        variance = self._variance(t)
        rate = self._slope_of_variance(t, s, slopes) / (variance + (self._variance(s) * variance).sqrt())
        return slopes[0] * self.mean + self._scale(x - self.path.alpha(t) * self.mean, rate)

    def data(self, x: Tensor, t: Tensor) -> Tensor:
        """Return E[x0 | x_t = x], of the shape of x; paths with a coupling are refused."""
        return convert(self.path, x, t, self.velocity(x, t), "v", "x0")

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the gradient of log p_t at x, of the shape of x."""
        t = expand_time(t, x)
        return -self._scale(x - self.path.alpha(t) * self.mean, 1 / self._variance(t))

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw data x0 (count, D) in the dtype of the mean, on the generator's device."""
        device = self.mean.device if generator is None else generator.device
        noise = torch.randn(count, len(self.mean), generator=generator, device=device, dtype=self.mean.dtype)
        return self.mean.to(device) + self._scale(noise.to(self.mean.device), self._eigenvalues.sqrt()).to(device)

    def _variance(self, t: Tensor) -> Tensor:
        """Return the eigenvalues of C_t."""
        if self._sigma is not None:
            return self._root(t).square() + self._sigma**2
        return self.path.alpha(t).square() * self._eigenvalues + self.path.beta(t).square()

    def _slope_of_variance(self, t: Tensor, s: Tensor, slopes: tuple[Tensor, Tensor]) -> Tensor:
        """Return the eigenvalues of (C_t - C_s) / (t - s) from the slopes of both schedules between t and s."""
        path, (fall, rise) = self.path, slopes
        if self._sigma is not None:
            return (self._root(t) + self._root(s)) * (fall * self._eigenvalues.sqrt() + rise)
        return (path.alpha(t) + path.alpha(s)) * fall * self._eigenvalues + (path.beta(t) + path.beta(s)) * rise

    def _root(self, t: Tensor) -> Tensor:
        """Return the eigenvalues of a(t) S^(1/2) + b(t) I, which takes x1 to x_t - a m under optimal transport."""
        return self._pair.alpha(t) * self._eigenvalues.sqrt() + self._pair.beta(t)

    def _scale(self, x: Tensor, factors: Tensor) -> Tensor:
        """Multiply rows by the symmetric matrix with these eigenvalues on the covariance's axes."""
        return (x @ self._axes * factors) @ self._axes.T


class GaussianMixture:
    """Data law of K isotropic Gaussians with equal weight; the velocity has a closed form, the flow map is integrated.

    Args:
        means: (K, D).
        std: the standard deviation of each component.
    """

    def __init__(self, means: Tensor, std: float, path: Path = LINEAR) -> None:
        if means.ndim != 2:
            raise ValueError(f"means: expected shape (K, D), got {tuple(means.shape)}")
        if not std > 0:
            raise ValueError(f"std: expected > 0, got {std}")
        _refuse_coupling(path)
        self.means, self.std, self.path = means, std, path

    def sample(self, count: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw data x0 (count, D) float32 and the component of each row (count,) int64, on the generator's device."""
        device = self.means.device if generator is None else generator.device
        labels = torch.randint(len(self.means), (count,), generator=generator, device=device)
        noise = torch.randn(count, self.means.shape[1], generator=generator, device=device)
        return self.means.to(noise)[labels] + self.std * noise, labels

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the marginal velocity v(x, t): the components' own, averaged by their posterior given x; x (B, D)."""
        path, means = self.path, self.means.to(x)
        t = expand_time(t, x)
        alpha, beta, d_alpha, d_beta = path.alpha(t), path.beta(t), path.d_alpha(t), path.d_beta(t)
        variance = (alpha * self.std).square() + beta.square()
        offsets = x[:, None] - alpha[..., None] * means  # (B, K, D)
        posterior = (-offsets.square().sum(2) / (2 * variance)).softmax(1)  # (B, K)
        half_rate = (alpha * d_alpha * self.std**2 + beta * d_beta) / variance
        mean = posterior @ means
        return d_alpha * mean + half_rate * (x - alpha * mean)

    def data(self, x: Tensor, t: Tensor) -> Tensor:
        """Return E[x0 | x_t = x], of the shape of x."""
        return convert(self.path, x, t, self.velocity(x, t), "v", "x0")

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the gradient of log p_t at x, of the shape of x."""
        return convert(self.path, x, t, self.velocity(x, t), "v", "score")

    def flow_map(self, x: Tensor, t: Tensor, s: Tensor, steps: int = 100) -> Tensor:
        """Integrate dx/dt = v from x at t to s by the classical fourth-order Runge-Kutta method; x (B, D)."""
        return self._integrate(x, t, s, steps)[0]

    def average_velocity(self, x: Tensor, t: Tensor, s: Tensor, steps: int = 100) -> Tensor:
        """Return u(x, t, s) = (x - f(x, t, s)) / (t - s), or v(x, t) where s = t, as the mean slope of the integration.

        So times that are near each other cost no accuracy.
        """
        return self._integrate(x, t, s, steps)[1]

    def _integrate(self, x: Tensor, t: Tensor, s: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """Return where the flow ends, and the mean of the slopes on the way."""
        if steps < 1:
            raise ValueError(f"steps: expected at least 1, got {steps}")
        h = (s - t) / steps
        width, total = expand_time(h, x), torch.zeros_like(x)
        for i in range(steps):
            now = t + i * h
            k1 = self.velocity(x, now)
            k2 = self.velocity(x + 0.5 * width * k1, now + 0.5 * h)
            k3 = self.velocity(x + 0.5 * width * k2, now + 0.5 * h)
            k4 = self.velocity(x + width * k3, now + h)
            slope = (k1 + 2 * k2 + 2 * k3 + k4) / 6
            x, total = x + width * slope, total + slope
        return x, total / steps


class Ring(GaussianMixture):
    """Gaussians that stand at equal angles on a circle: the smallest data with a curved flow and separate modes."""

    def __init__(self, modes: int = 8, radius: float = 2.0, std: float = 0.2, path: Path = LINEAR) -> None:
        angles = torch.arange(modes, dtype=torch.float64) * (2 * math.pi / modes)
        super().__init__(radius * torch.stack((angles.cos(), angles.sin()), 1), std, path)


def _refuse_coupling(path: Path) -> None:
    if path.coupling != "independent":
        raise ValueError(f"path: expected one with independent pairs, got {type(path).__name__} ({path.coupling})")
