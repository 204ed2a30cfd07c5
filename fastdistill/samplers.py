"""Samplers: from noise at t = 1 to data at t = 0, in equal steps.

They run in the caller's gradient mode (wrap them in `torch.no_grad()` to generate). Times reach the network as (B,)
tensors in float32, or float64 for a float64 state.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Net = Callable[..., Tensor]  # net(x, t=t, s=s, y=y) -> the average velocity from t to s; s = t: the instantaneous one
Velocity = Callable[[Tensor, Tensor], Tensor]  # velocity(x, t)


def euler(velocity: Velocity, x: Tensor, steps: int) -> Tensor:
    """Integrate dx/dt = velocity(x, t) from t = 1 to 0 at first order; x (B, ...); `steps` evaluations."""
    for t, s in _intervals(steps):
        x = x - (t - s) * velocity(x, _times(x, t))
    return x


def heun(velocity: Velocity, x: Tensor, steps: int) -> Tensor:
    """Integrate dx/dt = velocity(x, t) from t = 1 to 0 at second order; x (B, ...); 2 `steps` evaluations.

    Source: Karras et al. 2022 (EDM), arXiv:2206.00364, algorithm 1, without its Euler step at the end: here the
    velocity is finite at t = 0.
    """
    for t, s in _intervals(steps):
        v = velocity(x, _times(x, t))
        v_end = velocity(x - (t - s) * v, _times(x, s))
        x = x - (t - s) * 0.5 * (v + v_end)
    return x


def average_velocity(net: Net, x: Tensor, steps: int = 1, y: Tensor | None = None) -> Tensor:
    """Jump along the learned flow map, x_s = x_t - (t - s) u(x_t, t, s): one-step generation for steps = 1.

    With the exact u any number of steps gives the exact flow map. `steps` evaluations.
    Source: Geng et al. 2025 (MeanFlow), arXiv:2505.13447, algorithm 2 (there for one step).
    """
    for t, s in _intervals(steps):
        x = x - (t - s) * net(x, t=_times(x, t), s=_times(x, s), y=y)
    return x


def guided(net: Net, y: Tensor | None = None, scale: float = 1.0, null: int | None = None) -> Velocity:
    """The network's instantaneous velocity, with classifier-free guidance: v_null + scale (v_y - v_null).

    Scale 1 is the plain conditional velocity (unconditional for y = None) and costs one evaluation a call; any other
    scale needs y and costs two, as one call on a doubled batch.

    Args:
        y: (B,) int64 labels, or None.
        null: the label that stands for "no label", i.e. the number of classes.

    Source: Ho and Salimans 2022, arXiv:2207.12598, equation 6, where our scale is their 1 + w.
    """
    if scale == 1:
        return lambda x, t: net(x, t=t, s=t, y=y)
    if y is None or null is None:
        raise ValueError(f"y, null: expected labels and the null label for guidance at scale {scale}, got None")

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        v_label, v_null = conditional_pair(net, x, t, y, null)
        return v_null + scale * (v_label - v_null)

    return velocity


def conditional_pair(net: Net, x: Tensor, t: Tensor, y: Tensor, null: int) -> tuple[Tensor, Tensor]:
    """The instantaneous velocities with labels y and with no label, from one call on the doubled batch."""
    x, t, y = torch.cat((x, x)), torch.cat((t, t)), torch.cat((y, torch.full_like(y, null)))
    v_label, v_null = net(x, t=t, s=t, y=y).chunk(2)
    return v_label, v_null


def _intervals(steps: int) -> list[tuple[float, float]]:
    if steps < 1:
        raise ValueError(f"steps: expected at least 1, got {steps}")
    return [((steps - i) / steps, (steps - i - 1) / steps) for i in range(steps)]


def _times(x: Tensor, t: float) -> Tensor:
    return torch.full((len(x),), t, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
