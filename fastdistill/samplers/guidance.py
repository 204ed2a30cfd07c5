"""Guide samples without a classifier: evaluate a velocity or a map twice, with a label and without one."""

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

    Scale 1 is the plain conditional velocity, or the unconditional one if y is None, and takes one evaluation a call.
    Any other scale needs y and takes two evaluations, as one call on a doubled batch.

    Args:
        y: labels (B,) int64, or None.
        null: the label that stands for "no label"; it equals the number of classes.
        g: the guidance scale, a number or (B,), for a network that takes it as an input; None passes none. With g,
            `scale` must be 1.

    Source: Ho and Salimans 2022, arXiv:2207.12598; our scale is 1 + w there.
    """
    if scale == 1:
        return lambda x, t: net(x, t=t, s=t, y=y, **guidance_input(x, g))
    both = guided_map(net, scale, check_guidable(y, scale, null, g))
    return lambda x, t: both(x, t=t, s=t, y=y)


def guided_map(net: Net, scale: float, null: int) -> Net:
    """Return the network whose average velocity is u_null + scale (u_y - u_null), from one call on a doubled batch.

    So the ends of its jumps are f_null + scale (f_y - f_null), which is the guidance of IMM. They are not the ends of
    the guided flow: the two agree only as s -> t. Methods that learn a guided flow have guidance in their target
    instead.

    Args:
        net: a network trained with and without labels, called as net(x, t=t, s=s, y=y).
        null: the label that stands for "no label"; it equals the number of classes.

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
    """Return the null label, or raise a ValueError if guidance at this scale isn't possible."""
    if g is not None:
        raise ValueError(f"scale: expected 1 for a network that takes guidance as an input, got {scale} and g")
    if y is None or null is None:
        raise ValueError(f"y, null: expected labels and the null label for guidance at scale {scale}, got None")
    return null
