"""Give samplers their common parts: the times of the steps, a jump along a flow map, and fresh noise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastdistill.paths import Path

Net = Callable[..., Tensor]  # net(x, t=t, s=s, y=y) -> average velocity from t to s; instantaneous if s = t
Velocity = Callable[[Tensor, Tensor], Tensor]  # velocity(x, t)
Steps = int | Sequence[float]


def intervals(steps: Steps) -> list[tuple[float, float]]:
    """Return the start and end (t, s) of each step: `steps` equal steps from 1 to 0, or those between given times."""
    if isinstance(steps, int):
        if steps < 1:
            raise ValueError(f"steps: expected at least 1, got {steps}")
        return [((steps - i) / steps, (steps - i - 1) / steps) for i in range(steps)]
    times = [float(t) for t in steps]
    falling = all(t > s for t, s in itertools.pairwise(times))
    if len(times) < 2 or not falling or not (times[0] <= 1 and times[-1] >= 0):
        raise ValueError(f"steps: expected two or more falling times in [0, 1], got {times}")
    return list(itertools.pairwise(times))


def times_of(x: Tensor, t: float) -> Tensor:
    """Return the time t for every row, (B,), in the state's dtype, or in float32 if the state's is narrower."""
    return torch.full((len(x),), t, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))


def jump(net: Net, x: Tensor, t: float, s: float, y: Tensor | None, g: float | Tensor | None) -> Tensor:
    """Return x_t - (t - s) u(x_t, t, s), the end of a jump along the learned flow map."""
    return x - (t - s) * net(x, t=times_of(x, t), s=times_of(x, s), y=y, **guidance_input(x, g))


def guidance_input(x: Tensor, g: float | Tensor | None) -> dict[str, Tensor]:
    """Return the keywords of a network that takes a guidance scale: g (B,), or none if g is None."""
    if g is None:
        return {}
    if isinstance(g, Tensor) and g.shape not in ((), x.shape[:1]):
        raise ValueError(f"g: expected a number or shape ({len(x)},), got {tuple(g.shape)}")
    return {"g": times_of(x, 1.0) * g}


def level(path: Path, t: float) -> tuple[float, float]:
    """Return alpha and beta at one time, computed in float64 on the CPU."""
    time = torch.tensor(t, dtype=torch.float64)
    return path.alpha(time).item(), path.beta(time).item()


def renoise(path: Path, r: float, s: float) -> tuple[float, float]:
    """Return (shrink, added) for r < s, so that x_s given x_r alone is distributed as N(shrink x_r, added^2 I)."""
    if path.coupling != "independent":
        raise ValueError(
            f"path: fresh noise expects one whose x0 and x1 are independent, got {type(path).__name__}, coupled by "
            f"{path.coupling}; average_velocity and the samplers of velocities fit it"
        )
    (alpha, beta), (alpha_s, beta_s) = level(path, r), level(path, s)
    shrink = alpha_s / alpha
    return shrink, math.sqrt(max(beta_s**2 - (shrink * beta) ** 2, 0.0))


def fresh_noise(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return unit noise like x, drawn on the generator's device, or on that of x if there is no generator."""
    device = x.device if generator is None else generator.device
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.randn(x.shape, generator=generator, device=device, dtype=dtype).to(x)
