"""Embed a time by sines and cosines, in float32.

It is a plain function of PyTorch's own ops. It has no dispatcher op, and so its room has neither op.py nor eager.py nor
second_order.py: the formula is short, PyTorch's derivatives of it are already exact, and (B, dim) numbers cost nothing.

    e = [cos(f t), sin(f t)]      t_e = f t_t [-sin(f t), cos(f t)]      f_i = max_period^(-i / (dim / 2))
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdistill.ops.protocol import checks


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000) -> Tensor:
    """Return cosines, then sines, of t at `dim // 2` frequencies from 1 down towards 1 / max_period (ADM, DiT, SiT).

    Args:
        t: (...), of any dtype. Times in [0, 1] are scaled by the caller, as in `timestep_embedding(1000 * t, 256)`.
        dim: of the result; an odd one leaves a zero in the end.
        max_period: the period of the lowest frequency over 2 pi.

    Returns:
        (..., dim) float32, or float64 for a float64 t: 16-bit numbers could not tell the times of 1000 steps apart.

    Equivalent to:
        the `timestep_embedding` of openai/guided-diffusion and facebookresearch/DiT, which takes (B,)
    """
    angles, _ = _angles(t, dim, max_period)
    return _padded([angles.cos(), angles.sin()], dim)


def timestep_embedding_jvp(t: Tensor, t_t: Tensor | None, dim: int, max_period: float = 10000) -> tuple[Tensor, Tensor]:
    """Return `timestep_embedding` and its directional derivative, differentiable in t and t_t; t_t of None is zero.

    Equivalent to:
        torch.func.jvp(lambda t: timestep_embedding(t, dim, max_period), (t,), (t_t,))
    """
    angles, frequencies = _angles(t, dim, max_period)
    cos, sin = angles.cos(), angles.sin()
    e = _padded([cos, sin], dim)
    if t_t is None:
        return e, torch.zeros_like(e)
    checks.check_tensor("t_t", t_t)
    if t_t.shape != t.shape:
        raise ValueError(f"t_t: expected shape {tuple(t.shape)} as t, got {tuple(t_t.shape)}")
    speeds = t_t.to(angles.dtype).unsqueeze(-1) * frequencies
    return e, _padded([-speeds * sin, speeds * cos], dim)


def _angles(t: Tensor, dim: int, max_period: float) -> tuple[Tensor, Tensor]:
    """Return f t and f, in float32 or better; f is rounded once, since the angles inherit its error times t."""
    if not isinstance(t, Tensor):
        raise TypeError(f"t: expected a tensor, got {type(t).__name__}")
    if t.is_complex():
        raise TypeError(f"t: expected real numbers, got {t.dtype}")
    dim, max_period = checks.whole("dim", dim, least=2), checks.number("max_period", max_period)
    if not 0 < max_period < math.inf:
        raise ValueError(f"max_period: expected a positive number, got {max_period}")
    dtype = torch.promote_types(t.dtype, torch.float32)
    exponents = torch.arange(dim // 2, device=t.device, dtype=torch.float64) / (dim // 2)
    frequencies = torch.exp(-math.log(max_period) * exponents).to(dtype)
    return t.to(dtype).unsqueeze(-1) * frequencies, frequencies


def _padded(parts: list[Tensor], dim: int) -> Tensor:
    """Return the parts beside each other, and a zero last if dim is odd."""
    if dim % 2:
        parts = [*parts, torch.zeros_like(parts[0][..., :1])]
    return torch.cat(parts, dim=-1)
