"""Define the paths that have a name in the literature; times are in [0, 1], with 0 = data and 1 = noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastdistill.paths.base import Path, check_number

Schedule = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Linear(Path):
    """Straight path x_t = (1 - t) x0 + t x1, whose conditional velocity is x1 - x0 at every t.

    Source: Liu et al. 2023 (rectified flow), arXiv:2209.03003, with time reversed.
    """

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def beta(self, t: Tensor) -> Tensor:
        return t

    def d_alpha(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def d_beta(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def slopes(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        one = torch.ones_like(t - s)
        return -one, one

    def time_at(self, angle: Tensor) -> Tensor:
        return angle.sin() / (angle.sin() + angle.cos())


@dataclass(frozen=True)
class FM(Path):
    """Straight path of flow matching's first paper, which keeps a bit of noise: beta(t) = sigma + (1 - sigma) t.

    p_t(x | x0) = N((1 - t) x0, (sigma + (1 - sigma) t)^2 I), and v = (1 - sigma) x1 - x0, which is
    ((1 - sigma) x_t - x0) / (sigma + (1 - sigma) t). At t = 0 the state is x0 plus noise of deviation sigma.
    Source: Lipman et al. 2023, arXiv:2210.02747, equations 20 and 21, with time reversed and their sigma_min for sigma.
    """

    sigma: float = 1e-4

    def __post_init__(self) -> None:
        check_number("sigma", self.sigma, 0, 1)

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def beta(self, t: Tensor) -> Tensor:
        return self.sigma + (1 - self.sigma) * t

    def d_alpha(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def d_beta(self, t: Tensor) -> Tensor:
        return torch.full_like(t, 1 - self.sigma)

    def slopes(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        one = torch.ones_like(t - s)
        return -one, (1 - self.sigma) * one

    def time_at(self, angle: Tensor) -> Tensor:
        sin, cos = angle.sin(), angle.cos()
        return ((sin - self.sigma * cos) / (sin + (1 - self.sigma) * cos)).clamp(0, 1)


@dataclass(frozen=True)
class Cosine(Path):
    """Variance-preserving path that interpolates by angles: x_t = cos(pi t / 2) x0 + sin(pi t / 2) x1.

    Source: Albergo and Vanden-Eijnden 2023, arXiv:2209.15571, the trigonometric interpolant, with time reversed.
    """

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(0.5 * math.pi * t)

    def beta(self, t: Tensor) -> Tensor:
        return torch.sin(0.5 * math.pi * t)

    def d_alpha(self, t: Tensor) -> Tensor:
        return -0.5 * math.pi * torch.sin(0.5 * math.pi * t)

    def d_beta(self, t: Tensor) -> Tensor:
        return 0.5 * math.pi * torch.cos(0.5 * math.pi * t)

    def slopes(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        middle, chord = 0.25 * math.pi * (t + s), 0.5 * math.pi * torch.sinc(0.25 * (t - s))
        return -chord * torch.sin(middle), chord * torch.cos(middle)

    def time_at(self, angle: Tensor) -> Tensor:
        return angle / (0.5 * math.pi)


@dataclass(frozen=True)
class TrigFlow(Path):
    """Path of sCM, x = cos(a) x0 + sin(a) z, whose noise z = sigma_data x1 has the data's scale; a = pi t / 2.

    sCM's time is the angle a in [0, pi/2]; a velocity by t is pi/2 times one by a.
    Source: Lu and Song 2025 (sCM), arXiv:2410.11081, section 3.
    """

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        check_number("sigma_data", self.sigma_data, 1e-12)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(0.5 * math.pi * t)

    def beta(self, t: Tensor) -> Tensor:
        return self.sigma_data * torch.sin(0.5 * math.pi * t)

    def d_alpha(self, t: Tensor) -> Tensor:
        return -0.5 * math.pi * torch.sin(0.5 * math.pi * t)

    def d_beta(self, t: Tensor) -> Tensor:
        return 0.5 * math.pi * self.sigma_data * torch.cos(0.5 * math.pi * t)

    def slopes(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        alpha, beta = Cosine().slopes(t, s)
        return alpha, self.sigma_data * beta

    def time_at(self, angle: Tensor) -> Tensor:
        return torch.atan2(angle.sin(), self.sigma_data * angle.cos()) / (0.5 * math.pi)


@dataclass(frozen=True)
class EDM(Path):
    """Variance-exploding path x_t = x0 + sigma(t) x1, which has EDM's warped noise levels.

    sigma(t) = (sigma_min^(1/rho) + t (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho: equal steps of t are EDM's steps.
    rho = 1 with sigma_min = 0 is EDM's own time, sigma = sigma_max t. The path starts at sigma_min, not at the data,
    and ends at x0 + sigma_max x1, so `prior` is off by the data over sigma_max. alpha(1) is 1: methods that need pure
    noise at t = 1 don't fit.
    Source: Karras et al. 2022 (EDM), arXiv:2206.00364, equation 5 and table 1.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        check_number("sigma_min", self.sigma_min, 0)
        check_number("rho", self.rho, 1)
        check_number("sigma_max", self.sigma_max, self.sigma_min)
        if self.sigma_max == self.sigma_min:
            raise ValueError(f"sigma_max: expected more than sigma_min, {self.sigma_min}, got {self.sigma_max}")

    @property
    def _line(self) -> tuple[float, float]:
        start, end = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return start, end - start

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def beta(self, t: Tensor) -> Tensor:
        start, width = self._line
        return (start + width * t) ** self.rho

    def d_alpha(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def d_beta(self, t: Tensor) -> Tensor:
        start, width = self._line
        return self.rho * width * (start + width * t) ** (self.rho - 1)

    def time_of(self, sigma: Tensor) -> Tensor:
        """Return the time with noise level sigma, of any shape; a level beyond the path gives its nearer end."""
        start, width = self._line
        return ((sigma.clamp(self.sigma_min, self.sigma_max) ** (1 / self.rho) - start) / width).clamp(0, 1)

    def time_at(self, angle: Tensor) -> Tensor:
        return self.time_of(angle.tan().where(angle < 0.5 * math.pi - 1e-12, torch.full_like(angle, self.sigma_max)))


@dataclass(frozen=True)
class VE(Path):
    """Variance-exploding path x_t = x0 + sigma(t) x1, whose noise is geometric: sigma_min (sigma_max/sigma_min)^t.

    Its ends are as EDM's: neither the data at t = 0 nor pure noise at t = 1.
    Source: Song et al. 2021, arXiv:2011.13456, section 3.4.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        check_number("sigma_min", self.sigma_min, 1e-12)
        check_number("sigma_max", self.sigma_max, self.sigma_min)
        if self.sigma_max == self.sigma_min:
            raise ValueError(f"sigma_max: expected more than sigma_min, {self.sigma_min}, got {self.sigma_max}")

    @property
    def _rate(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def beta(self, t: Tensor) -> Tensor:
        return self.sigma_min * torch.exp(self._rate * t)

    def d_alpha(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def d_beta(self, t: Tensor) -> Tensor:
        return self._rate * self.beta(t)

    def time_of(self, sigma: Tensor) -> Tensor:
        """Return the time with noise level sigma, of any shape; a level beyond the path gives its nearer end."""
        return ((sigma.clamp(self.sigma_min, self.sigma_max) / self.sigma_min).log() / self._rate).clamp(0, 1)

    def time_at(self, angle: Tensor) -> Tensor:
        return self.time_of(angle.tan().where(angle < 0.5 * math.pi - 1e-12, torch.full_like(angle, self.sigma_max)))


@dataclass(frozen=True)
class _Noised(Path):
    """Path between pairs that adds noise of fixed deviation sigma: x_t = a(t) x0 + b(t) x1 + sigma e.

    Its `interpolate` and `velocity` are those of the pair; `alpha` and `beta` describe x_t given x0 alone, where x1 is
    unit noise: beta = (b^2 + sigma^2)^(1/2), and the marginal velocity that follows from them is the same.
    """

    sigma: float = 0.0
    pair: ClassVar[Path] = Linear()

    def __post_init__(self) -> None:
        check_number("sigma", self.sigma, 0)

    @property
    def stochastic(self) -> bool:
        return self.sigma > 0

    def alpha(self, t: Tensor) -> Tensor:
        return self.pair.alpha(t)

    def beta(self, t: Tensor) -> Tensor:
        return (self.pair.beta(t).square() + self.sigma**2).sqrt() if self.sigma else self.pair.beta(t)

    def d_alpha(self, t: Tensor) -> Tensor:
        return self.pair.d_alpha(t)

    def d_beta(self, t: Tensor) -> Tensor:
        return self.pair.beta(t) * self.pair.d_beta(t) / self.beta(t) if self.sigma else self.pair.d_beta(t)

    def slopes(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        alpha, beta = self.pair.slopes(t, s)
        if self.sigma:
            beta = beta * (self.pair.beta(t) + self.pair.beta(s)) / (self.beta(t) + self.beta(s))
        return alpha, beta

    def interpolate(self, x0: Tensor, x1: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return the state a(t) x0 + b(t) x1 + sigma noise, for x0, x1, noise (B, ...) and t (B,) or ().

        Without `noise`, unit noise is drawn from torch's global generator, as dropout does.
        """
        x = self.pair.interpolate(x0, x1, t)
        if not self.sigma:
            return x
        return x + self.sigma * (torch.randn_like(x) if noise is None else noise)

    def velocity(self, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        """Return the pair's velocity, which is the time derivative of `interpolate` at fixed noise."""
        return self.pair.velocity(x0, x1, t)


@dataclass(frozen=True)
class ICFM(_Noised):
    """Independent conditional flow matching, where p_t(x | x0, x1) = N((1 - t) x0 + t x1, sigma^2 I) and v = x1 - x0.

    sigma = 0 is rectified flow, the linear path.
    Source: Tong et al. 2023, arXiv:2302.00482, its I-CFM, with time reversed.
    """


@dataclass(frozen=True)
class OTCFM(_Noised):
    """ICFM on pairs (x0, x1) that minibatch optimal transport couples, which makes the marginal paths straighter.

    The path itself is ICFM's; `fastdistill.couplings.optimal_transport` couples the pairs before `interpolate`. `alpha`
    and `beta` describe x_t given x0 for an *independent* x1. With the coupling x1 is no longer unit noise given x0, so
    the path's score and noise predictions don't follow from them.

    Source: Tong et al. 2023, arXiv:2302.00482, its OT-CFM; Pooladian et al. 2023, arXiv:2304.14772.
    """

    coupling: ClassVar[str] = "optimal_transport"


@dataclass(frozen=True)
class VPSI(_Noised):
    """Variance-preserving stochastic interpolant, which has the law N(cos(pi t/2) x0 + sin(pi t/2) x1, sigma^2 I).

    sigma = 0 is `Cosine`.
    Source: Albergo and Vanden-Eijnden 2023, arXiv:2209.15571; with sigma: Tong et al. 2023, arXiv:2302.00482.
    """

    pair: ClassVar[Path] = Cosine()


class Gaussian(Path):
    """Path that any two schedules define: p_t(x | x0) = N(alpha(t) x0, beta(t)^2 I).

    Its velocity is (d_alpha - d_beta alpha / beta) x0 + (d_beta / beta) x_t = d_alpha x0 + d_beta x1.

    Args:
        alpha, beta: elementwise, differentiable functions of t on [0, 1]; beta > 0 inside.
        d_alpha, d_beta: derivatives of both; None takes them by autograd, and given ones are compared with autograd.

    Raises:
        ValueError: a schedule is not elementwise, not finite or, for beta, not positive; or a derivative is wrong.
    """

    def __init__(
        self, alpha: Schedule, beta: Schedule, d_alpha: Schedule | None = None, d_beta: Schedule | None = None
    ) -> None:
        self._alpha, self._beta = alpha, beta
        self._d_alpha, self._d_beta = d_alpha or _derivative(alpha), d_beta or _derivative(beta)
        t = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)
        for name, value, rate in (("alpha", alpha, self._d_alpha), ("beta", beta, self._d_beta)):
            if not callable(value):
                raise ValueError(f"{name}: expected a function of t, got {type(value).__name__}")
            out = value(t)
            if not isinstance(out, Tensor) or out.shape != t.shape or not bool(out.isfinite().all()):
                raise ValueError(f"{name}: expected finite values of the shape of t on (0, 1), got {out}")
            truth, given = _derivative(value)(t), rate(t)
            if given.shape != t.shape or not torch.allclose(given, truth, rtol=1e-6, atol=1e-6):
                raise ValueError(f"d_{name}: expected the derivative of {name}, off by {(given - truth).abs().max()}")
        if not bool((beta(t) > 0).all()):
            raise ValueError(f"beta: expected > 0 on (0, 1), got {beta(t).min().item()}")

    def alpha(self, t: Tensor) -> Tensor:
        return self._alpha(t)

    def beta(self, t: Tensor) -> Tensor:
        return self._beta(t)

    def d_alpha(self, t: Tensor) -> Tensor:
        return self._d_alpha(t)

    def d_beta(self, t: Tensor) -> Tensor:
        return self._d_beta(t)


def _derivative(schedule: Schedule) -> Schedule:
    # Reverse mode also works inside a driver of forward mode, and under no_grad.
    return torch.func.grad(lambda t: schedule(t).sum())
