"""Define laws of one training time t in [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fastdistill.paths import Path


class TimeSampler(Protocol):
    """Draw `batch` times in [0, 1], float32, shape (batch,)."""

    def __call__(
        self, batch: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Tensor: ...


@dataclass(frozen=True)
class LogitNormal:
    """Draw sigmoid(N(mean, std^2)).

    Source: Esser et al. 2024, arXiv:2403.03206, section 3.1; MeanFlow takes mean -0.4.
    """

    mean: float = -0.4
    std: float = 1.0

    def __post_init__(self) -> None:
        check_normal(self.mean, self.std)

    def __call__(
        self, batch: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        return torch.sigmoid(self.mean + self.std * draw(torch.randn, batch, generator, device))


@dataclass(frozen=True)
class Uniform:
    """Draw uniformly from [low, high)."""

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"low, high: expected 0 <= low < high <= 1, got {self.low}, {self.high}")

    def __call__(
        self, batch: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        return self.low + (self.high - self.low) * draw(torch.rand, batch, generator, device)


@dataclass(frozen=True)
class Constant:
    """Return the same time for all; t = 1 trains a generator of one step."""

    value: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.value <= 1:
            raise ValueError(f"value: expected a time in [0, 1], got {self.value}")

    def __call__(
        self, batch: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        source = generator.device if device is None and generator is not None else device
        return torch.full((batch,), self.value, device=source, dtype=torch.float32)


@dataclass(frozen=True)
class ArctanLogNormal:
    """Draw t = (2 / pi) atan(e^N(mean, std^2) / sigma_data).

    This is sCM's law of its angle, with its sigma_data, for mean -1, std 1.4 (CIFAR-10) or -0.8, 1.6 (ImageNet 512). It
    is FACM's law for mean -0.8, std 1.6 and sigma_data 1.

    Source: Lu and Song 2025 (sCM), arXiv:2410.11081, section 4.2 and appendix G; Peng et al. 2025 (FACM),
    arXiv:2507.03738, with the constants of its code.
    """

    mean: float = -1.0
    std: float = 1.4
    sigma_data: float = 1.0

    def __post_init__(self) -> None:
        check_normal(self.mean, self.std)
        if not (math.isfinite(self.sigma_data) and self.sigma_data > 0):
            raise ValueError(f"sigma_data: expected a finite number > 0, got {self.sigma_data}")

    def __call__(
        self, batch: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        sigma = torch.exp(self.mean + self.std * draw(torch.randn, batch, generator, device))
        return torch.atan(sigma / self.sigma_data) / (0.5 * math.pi)


@dataclass(frozen=True)
class LogNormalLevel:
    """Draw the time at which a path's noise level beta / alpha is e^N(mean, std^2), or the path's nearer end.

    On `EDM()` this is EDM's law for mean -1.2, std 1.2, and ECT's and iCT's for mean -1.1, std 2.

    Source: Karras et al. 2022 (EDM), arXiv:2206.00364, table 1; Geng et al. 2025 (ECT), arXiv:2406.14548.
    """

    path: Path
    mean: float = -1.1
    std: float = 2.0

    def __post_init__(self) -> None:
        check_normal(self.mean, self.std)

    def __call__(
        self, batch: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        level = torch.exp(self.mean + self.std * draw(torch.randn, batch, generator, device))
        return time_of_level(self.path, level)


@dataclass(frozen=True)
class KarrasLevel:
    """Draw the time at which a path has Karras's noise level at a uniform share, in [low, high), of his grid.

    The grid is sigma = (a + share (b - a))^rho between a^rho, the larger of 0.002 and the path's least level, and
    b^rho, the smaller of 80 and the path's greatest. On `EDM()` the share is the time itself. DMD2 compares scores at
    low 0.02, high 0.98, and trains the fake score on the whole grid, which has 1,000 points there.
    Source: Yin et al. 2024 (DMD2), arXiv:2405.14867, with the constants of its code; EDM, arXiv:2206.00364, equation 5.
    """

    path: Path
    low: float = 0.02
    high: float = 0.98
    rho: float = 7.0

    def __post_init__(self) -> None:
        Uniform(self.low, self.high)
        if not (math.isfinite(self.rho) and self.rho >= 1):
            raise ValueError(f"rho: expected a finite number >= 1, got {self.rho}")

    def __call__(
        self, batch: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        share = Uniform(self.low, self.high)(batch, generator, device).double()
        least, most = level_of_time(self.path, torch.tensor([0.0, 1.0])).clamp(0.002, 80.0).tolist()
        start, end = least ** (1 / self.rho), most ** (1 / self.rho)
        return time_of_level(self.path, (start + (end - start) * share) ** self.rho)


@dataclass(frozen=True)
class ShiftedLevel:
    """Draw the time at which a path has the noise level shift q / (1 - q), with q uniform.

    This is the linear path's level at time shift q / (1 + (shift - 1) q). shift > 1 draws more noise; shift 1 is
    uniform on the linear path. rCM compares scores at shift 5.

    Source: Esser et al. 2024, arXiv:2403.03206, its shift of timesteps; Zheng et al. 2025 (rCM), arXiv:2510.08431, with
    the constant of its code.
    """

    path: Path
    shift: float = 5.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.shift) and self.shift > 0):
            raise ValueError(f"shift: expected a finite number > 0, got {self.shift}")

    def __call__(
        self, batch: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        q = draw(torch.rand, batch, generator, device).double()
        return time_of_level(self.path, self.shift * q / (1 - q))


def level_of_time(path: Path, t: Tensor) -> Tensor:
    """Return the noise level beta / alpha of a path at t, float64, of any shape; infinite where alpha is 0."""
    t = t.double()
    return path.beta(t) / path.alpha(t)


def time_of_level(path: Path, level: Tensor) -> Tensor:
    """Return the time, float32, at which a path's beta / alpha is `level` >= 0, or its nearer end; any shape."""
    return path.time_at(torch.atan(level.double())).float()


def check_normal(mean: float, std: float) -> None:
    """Raise a ValueError that names the argument unless these are the parameters of a normal law."""
    if not math.isfinite(mean):
        raise ValueError(f"mean: expected a finite number, got {mean}")
    if not (math.isfinite(std) and std > 0):
        raise ValueError(f"std: expected a finite number > 0, got {std}")


def draw(
    law: Callable[..., Tensor],
    batch: int,
    generator: torch.Generator | None,
    device: torch.device | str | None,
) -> Tensor:
    """Draw (batch,) float32 numbers on the generator's device and move them."""
    source = device if generator is None else generator.device
    return law(batch, generator=generator, device=source, dtype=torch.float32).to(source if device is None else device)
