"""Specify attention in plain PyTorch, differentiable in both modes: the truth."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    window: tuple[int, int] = (-1, -1),
    lower_right: bool = False,
) -> Tensor:
    """Compute scaled dot-product attention.

    q (B, H, N, D), k (B, Hkv, M, D), v (B, Hkv, M, Dv) with H a multiple of Hkv (grouped queries); returns
    (B, H, N, Dv). `attn_mask` broadcasts to (B, H, N, M): bool (True = attend) or additive float. `window`
    (left, right) lets query i see keys i + shift - left ... i + shift + right, -1 being no limit on that side; shift
    is M - N if `lower_right`, so that the last query meets the last key, else 0. `is_causal` is right = 0. Mask and
    window combine. A row that sees no key gives zeros. `scale` defaults to 1/sqrt(D).

    Equivalent to: `F.scaled_dot_product_attention(q, k, v, attn_mask, is_causal=is_causal, scale=scale,
    enable_gqa=True)` wherever that is defined.
    """
    weights, _ = _weights(q, k, attn_mask, is_causal, scale, window, lower_right)
    total = weights.sum(dim=-1, keepdim=True)
    return (weights / total.masked_fill(total == 0, 1.0)) @ _repeated(v, q)


def attention_lse(
    q: Tensor,
    k: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    window: tuple[int, int] = (-1, -1),
    lower_right: bool = False,
) -> Tensor:
    """Return the logarithm of the sum of exp(logits), (B, H, N), of `attention` with these arguments.

    A row that sees no key has -inf, with all derivatives 0. The tangent is mu, the logits' tangent averaged with the
    weights of the attention.
    """
    weights, row_max = _weights(q, k, attn_mask, is_causal, scale, window, lower_right)
    total = weights.sum(dim=-1)
    return row_max.squeeze(-1) + total.masked_fill(total == 0, 1.0).log()


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    window: tuple[int, int] = (-1, -1),
    lower_right: bool = False,
) -> Tensor:
    """Compute attention within each of Z packed sequences.

    q (T, H, D), k (Tk, Hkv, D), v (Tk, Hkv, Dv); returns (T, H, Dv). The queries of sequence z are the tokens
    cu_seqlens_q[z] ... cu_seqlens_q[z + 1] - 1, its keys likewise; both (Z + 1,). Tokens before the first and after
    the last sequence give zeros. Window and alignment hold within each sequence.
    """
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    before, after = starts_q[0], q.shape[0] - starts_q[-1]
    parts = [q.new_zeros(before, q.shape[1], v.shape[2])]
    for z in range(len(starts_q) - 1):
        queries, keys = slice(starts_q[z], starts_q[z + 1]), slice(starts_k[z], starts_k[z + 1])
        one = [x.transpose(0, 1)[None] for x in (q[queries], k[keys], v[keys])]
        o = attention(one[0], one[1], one[2], None, is_causal, scale, window=window, lower_right=lower_right)
        parts.append(o[0].transpose(0, 1))
    return torch.cat([*parts, q.new_zeros(after, q.shape[1], v.shape[2])])


def band(n: int, m: int, window: tuple[int, int], lower_right: bool, device: torch.device | str = "cpu") -> Tensor:
    """Return which of m keys each of n queries sees through a window, (N, M) bool; see `attention`."""
    i = torch.arange(n, device=device)[:, None] + (m - n if lower_right else 0)
    j, (left, right) = torch.arange(m, device=device), window
    visible = torch.ones(n, m, dtype=torch.bool, device=device)
    if left >= 0:
        visible &= j >= i - left
    if right >= 0:
        visible &= j <= i + right
    return visible


def _weights(
    q: Tensor,
    k: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    window: tuple[int, int],
    lower_right: bool,
) -> tuple[Tensor, Tensor]:
    """Return exp(logits - row_max) and row_max.

    The row maximum only guards against overflow: no result depends on it, so it carries no derivative.
    """
    logits = q @ _repeated(k, q).mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        logits = logits + attn_mask
    elif attn_mask is not None:
        logits = logits.masked_fill(~attn_mask, -math.inf)
    left, right = window
    if is_causal:
        right = 0
    if left >= 0 or right >= 0:
        visible = band(q.shape[2], k.shape[2], (left, right), lower_right, q.device)
        logits = logits.masked_fill(~visible, -math.inf)
    row_max = logits.new_full((*logits.shape[:-1], 1), -math.inf)
    if k.shape[2]:
        row_max = logits.detach().amax(dim=-1, keepdim=True)
    return torch.exp(logits - row_max.masked_fill(row_max == -math.inf, 0.0)), row_max


def _repeated(x: Tensor, q: Tensor) -> Tensor:
    """Return the key heads, each repeated for the queries that share it."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)
