"""Specify the norm and rotation of queries and keys in plain PyTorch, differentiable in both modes: the truth."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistill.ops.norm.reference import norm


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    norm: str = "rms",
    eps: float = 1e-6,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Apply `head_norm`, then `rotary`, to q (B, H, N, D) and to k (B, Hkv, M, D); without angles no rotation."""
    q, k = head_norm(q, q_weight, q_bias, norm, eps), head_norm(k, k_weight, k_bias, norm, eps)
    if cos is None or sin is None:
        return q, k
    return rotary(q, cos, sin, interleaved), rotary(k, cos, sin, interleaved)


def head_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, eps: float) -> Tensor:
    """Apply the "rms" or "layer" norm over the last dimension, or return x itself for "none"."""
    return x if kind == "none" else norm(x, weight, bias, eps=eps, rms=kind == "rms")


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Turn each token's pairs of channels by its angles: rotary embedding (RoFormer, arXiv:2104.09864).

    x (..., H, N, D); cos, sin (N or more, D/2), or (B, N or more, D/2). Pairs are channels 2i and 2i + 1 if
    interleaved, else i and i + D/2.
    """
    cos, sin = (a[..., : x.shape[-2], :] for a in (cos, sin))
    if cos.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]
    if interleaved:
        u, v = x[..., 0::2], x[..., 1::2]
    else:
        u, v = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    u, v = u * cos - v * sin, u * sin + v * cos
    return torch.stack((u, v), dim=-1).flatten(-2) if interleaved else torch.cat((u, v), dim=-1)
