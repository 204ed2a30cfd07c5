"""Every op in plain, decomposed PyTorch: the specification that all implementations are tested against.

Nothing here is fused, so each function can be differentiated any number of times, in forward and in reverse mode.
`torch.nn.functional.layer_norm` is deliberately absent: in torch 2.13 the reverse mode of its forward mode is wrong.
Computations run in the dtype of the inputs; pass float64 for a truth, the tested dtype for a baseline.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Scaled dot-product attention.

    q (B, H, N, D), k (B, Hkv, M, D), v (B, Hkv, M, Dv) with H a multiple of Hkv (grouped queries); returns
    (B, H, N, Dv). `attn_mask` broadcasts to (B, H, N, M): bool (True = attend) or additive float. `is_causal` lets
    query i see keys j <= i, and combines with the mask. A row that sees no key gives zeros. `scale` defaults to
    1/sqrt(D).

    Equivalent to: `F.scaled_dot_product_attention(q, k, v, attn_mask, is_causal=is_causal, scale=scale,
    enable_gqa=True)` wherever that is defined.
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    logits = q @ k.mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        logits = logits + attn_mask
    elif attn_mask is not None:
        logits = logits.masked_fill(~attn_mask, -math.inf)
    if is_causal:
        visible = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).tril()
        logits = logits.masked_fill(~visible, -math.inf)
    # The row maximum only guards against overflow: the result does not depend on it, so it carries no derivative.
    row_max = logits.detach().amax(dim=-1, keepdim=True)
    weights = torch.exp(logits - row_max.masked_fill(row_max == -math.inf, 0.0))
    total = weights.sum(dim=-1, keepdim=True)
    return (weights / total.masked_fill(total == 0, 1.0)) @ v


def norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-5,
    rms: bool = False,
) -> Tensor:
    """LayerNorm (or RMSNorm) over the last dimension, then an affine map, then a modulation.

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
    """LayerNorm over the trailing `normalized_shape`. Equivalent to: `F.layer_norm(x, normalized_shape, ...)`."""
    flat = x.flatten(-len(normalized_shape))
    weight, bias = _flat(weight), _flat(bias)
    return norm(flat, weight, bias, eps=eps).reshape(x.shape)


def rms_norm(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """RMSNorm over the trailing `normalized_shape`. Equivalent to: `F.rms_norm(x, normalized_shape, weight, eps)`."""
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
    """LayerNorm over the last dimension, modulated: norm(x) * (1 + scale) + shift (DiT, arXiv:2212.09748, adaLN).

    Equivalent to: `F.layer_norm(x, x.shape[-1:], weight, bias, eps) * (1 + scale) + shift`.
    """
    return norm(x, weight, bias, scale, shift, eps=eps)


def _flat(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.flatten()
