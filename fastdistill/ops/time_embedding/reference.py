"""Specify the time embedding in plain PyTorch, differentiable in both modes: the truth."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000) -> Tensor:
    """Return cos, then sin, of t at frequencies max_period^(-i / (dim // 2)).

    The result is (..., dim) for t (...), with a zero last if dim is odd.
    """
    half = dim // 2
    steps = torch.arange(half, dtype=t.dtype, device=t.device)
    angles = t[..., None] * torch.exp(-math.log(max_period) / half * steps)
    zero = [torch.zeros_like(angles[..., :1])] * (dim % 2)
    return torch.cat([angles.cos(), angles.sin(), *zero], dim=-1)
