"""Specify norms in plain PyTorch, differentiable in both modes: the truth."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-5,
    rms: bool = False,
) -> Tensor:
    """Apply LayerNorm (or RMSNorm) over the last dimension, then an affine map, then a modulation.

    y = (xh * weight + bias) * (1 + scale) + shift, where xh = (x - mean) * rstd, or x * rstd for `rms`; every part
    that is None is left out. x (..., C); weight, bias (C,); scale, shift broadcast against x.
    """
    centred = x if rms else x - x.mean(dim=-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    if scale is not None:
        y = y * (1 + scale)
    if shift is not None:
        y = y + shift
    return y


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Apply LayerNorm over `normalized_shape`. Equivalent to: `F.layer_norm(x, normalized_shape, ...)`."""
    flat = x.flatten(-len(normalized_shape))
    weight, bias = _flat(weight), _flat(bias)
    return norm(flat, weight, bias, eps=eps).reshape(x.shape)


def rms_norm(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """Apply RMSNorm over `normalized_shape`. Equivalent to: `F.rms_norm(x, normalized_shape, weight, eps)`."""
    flat = x.flatten(-len(normalized_shape))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return norm(flat, _flat(weight), eps=eps, rms=True).reshape(x.shape)


def ada_layer_norm(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Apply LayerNorm, modulated: norm(x) * (1 + scale) + shift over the last dimension (adaLN, arXiv:2212.09748).

    Equivalent to: `F.layer_norm(x, x.shape[-1:], weight, bias, eps) * (1 + scale) + shift`.
    """
    return norm(x, weight, bias, scale, shift, eps=eps)


def ada_rms_norm(
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Apply RMSNorm over the last dimension, modulated: norm(x) * (1 + scale) + shift.

    Equivalent to: `F.rms_norm(x, x.shape[-1:], weight, eps) * (1 + scale) + shift`.
    """
    return norm(x, weight, None, scale, shift, eps=eps, rms=True)


def _flat(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.flatten()
