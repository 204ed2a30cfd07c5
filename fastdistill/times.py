"""Laws of the training times: t alone, or pairs (t, s) with 0 <= s <= t <= 1.

Every draw takes a `torch.Generator`, so that a batch is a pure function of the generator's seed. Numbers are drawn
on the generator's device and then moved, so that a CPU generator gives the same times on every device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class TimeSampler(Protocol):
    """Draws `batch` times in [0, 1], float32, shape (batch,)."""

    def __call__(
        self, batch: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Tensor: ...


@dataclass(frozen=True)
class LogitNormal:
    """sigmoid(N(mean, std^2)). Source: Esser et al. 2024, arXiv:2403.03206, section 3.1; mean -0.4 is MeanFlow's."""

    mean: float = -0.4
    std: float = 1.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.mean):
            raise ValueError(f"mean: expected a finite number, got {self.mean}")
        if not (math.isfinite(self.std) and self.std > 0):
            raise ValueError(f"std: expected a finite number > 0, got {self.std}")

    def __call__(
        self, batch: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        return torch.sigmoid(self.mean + self.std * _draw(torch.randn, batch, generator, device))


@dataclass(frozen=True)
class Uniform:
    """Uniform on [low, high)."""

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"low, high: expected 0 <= low < high <= 1, got {self.low}, {self.high}")

    def __call__(
        self, batch: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        return self.low + (self.high - self.low) * _draw(torch.rand, batch, generator, device)


def pair_times(
    batch: int,
    sampler: TimeSampler,
    distinct: float,
    *,
    end_sampler: TimeSampler | None = None,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw (t, s), each (batch,) float32: t the larger and s the smaller of two independent draws.

    The first `distinct_rows(batch, distinct)` rows keep s; the others get s = t, where the average velocity is the
    instantaneous one. Those rows keep the larger draw as their t, so that t has one law on all rows. (Two draws that
    round to the same float32 leave a distinct row with s = t; the objectives are right there too.)

    Args:
        sampler: law of both draws, or of the first one when `end_sampler` is given.
        distinct: the share of rows with s != t, in [0, 1]. MeanFlow's text calls this the ratio of r != t.
        end_sampler: law of the second draw, e.g. `LogitNormal(-4, 1.6)` to see more pairs that end near the data.

    Source: Geng et al. 2025 (MeanFlow), arXiv:2505.13447, section 4.3 "Sampling time steps (r, t)".
    """
    count = distinct_rows(batch, distinct)
    first = sampler(batch, generator, device)
    second = (end_sampler or sampler)(batch, generator, device)
    t = torch.maximum(first, second)
    return t, torch.cat((torch.minimum(first, second)[:count], t[count:]))


def distinct_rows(batch: int, distinct: float) -> int:
    """How many leading rows of `pair_times` have s != t: `round(distinct * batch)`, a half going to the even side."""
    if not 0 <= distinct <= 1:
        raise ValueError(f"distinct: expected a share in [0, 1], got {distinct}")
    return round(distinct * batch)


def _draw(
    law: Callable[..., Tensor],
    batch: int,
    generator: torch.Generator | None,
    device: torch.device | str | None,
) -> Tensor:
    source = device if generator is None else generator.device
    return law(batch, generator=generator, device=source, dtype=torch.float32).to(source if device is None else device)
