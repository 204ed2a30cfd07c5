"""Classifier-free guidance of samples, by two evaluations: of velocities, and of the jumps of a map."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistill.samplers.steps import Net, Velocity, guidance_input


def guided(
    net: Net,
    y: Tensor | None = None,
    scale: float = 1.0,
    null: int | None = None,
    *,
    g: float | Tensor | None = None,
) -> Velocity:
    """Return the network's instantaneous velocity, with classifier-free guidance: v_null + scale (v_y - v_null).

    Scale 1 is the plain conditional velocity (unconditional for y = None) and costs one evaluation a call; any other
    scale needs y and costs two, as one call on a doubled batch.

    Args:
        y: (B,) int64 labels, or None.
        null: the label that stands for "no label", i.e. the number of classes.
        g: guidance scale for a network that takes it as an input, a number or (B,); None passes none. It excludes
            any other `scale` than 1.

    Source: Ho and Salimans 2022, arXiv:2207.12598, where our scale is their 1 + w.
    """
    if scale == 1:
        return lambda x, t: net(x, t=t, s=t, y=y, **guidance_input(x, g))
    both = guided_map(net, scale, check_guidable(y, scale, null, g))
    return lambda x, t: both(x, t=t, s=t, y=y)


def guided_map(net: Net, scale: float, null: int) -> Net:
    """Return the network whose average velocity is u_null + scale (u_y - u_null), from one call on a doubled batch.

    Its jump is f_null + scale (f_y - f_null) as well, of the ends, which is IMM's guidance. It isn't where the guided
    flow leads: the two agree for s -> t alone, so that methods which learn a guided flow have guidance in their target.

    Args:
        net: trained with and without labels; called as net(x, t=t, s=s, y=y).
        null: the label that stands for "no label", i.e. the number of classes.

    Source: Zhou et al. 2025 (IMM), arXiv:2503.07565, the paragraph on classifier-free guidance.
    """

    def average(x: Tensor, t: Tensor, s: Tensor, y: Tensor) -> Tensor:
        u_label, u_null = conditional_pair(net, x, t, s, y, null)
        return u_null + scale * (u_label - u_null)

    return average


def conditional_pair(net: Net, x: Tensor, t: Tensor, s: Tensor, y: Tensor, null: int) -> tuple[Tensor, Tensor]:
    """Return the velocities from t to s with labels y and with no label, each (B, ...), from one doubled batch."""
    x, t, s, y = torch.cat((x, x)), torch.cat((t, t)), torch.cat((s, s)), torch.cat((y, torch.full_like(y, null)))
    u_label, u_null = net(x, t=t, s=s, y=y).chunk(2)
    return u_label, u_null


def check_guidable(y: Tensor | None, scale: float, null: int | None, g: float | Tensor | None) -> int:
    """Return the null label; raise a ValueError where guidance at this scale isn't possible."""
    if g is not None:
        raise ValueError(f"scale: expected 1 for a network that takes guidance as an input, got {scale} and g")
    if y is None or null is None:
        raise ValueError(f"y, null: expected labels and the null label for guidance at scale {scale}, got None")
    return null
