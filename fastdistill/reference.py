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
    *,
    window: tuple[int, int] = (-1, -1),
    lower_right: bool = False,
) -> Tensor:
    """Scaled dot-product attention.

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
    """Logarithm of the sum of exp(logits), (B, H, N), of `attention` with these arguments.

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
    """Attention within each of Z packed sequences.

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
    """Which of m keys each of n queries sees through a window, (N, M) bool; see `attention`."""
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
    """exp(logits - row_max) and row_max.

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
    """Key heads, each repeated for the queries that share it."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


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


def silu(x: Tensor) -> Tensor:
    """x logistic(x). Equivalent to: `F.silu(x)`."""
    return x * torch.sigmoid(x)


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """x Phi(x), or its approximation by "tanh". Equivalent to: `F.gelu(x, approximate=approximate)`."""
    if approximate == "tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + torch.erf(x * math.sqrt(0.5)))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer, arXiv:2002.05202)."""
    return silu(gate) * up


def geglu(gate: Tensor, up: Tensor, approximate: str = "none") -> Tensor:
    """gelu(gate) * up (Shazeer, arXiv:2002.05202)."""
    return gelu(gate, approximate) * up


def ada_rms_norm(
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """RMSNorm over the last dimension, modulated: norm(x) * (1 + scale) + shift.

    Equivalent to: `F.rms_norm(x, x.shape[-1:], weight, eps) * (1 + scale) + shift`.
    """
    return norm(x, weight, None, scale, shift, eps=eps, rms=True)


def gated_residual_ada_norm(
    x: Tensor,
    gate: Tensor | None,
    h: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    rms: bool = False,
) -> tuple[Tensor, Tensor]:
    """The step between two blocks: r = x + gate * h, and `norm` of r with the rest. Returns (r, y).

    y has h's dtype, so that the residual stream x, r may be wider than what the blocks compute in.
    """
    r = x + (h if gate is None else gate * h)
    return r.to(x.dtype), norm(r, weight, bias, scale, shift, eps, rms).to(h.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b for x (..., K), W (N, K), b (N,). Equivalent to: `F.linear(x, weight, bias)`."""
    y = x @ weight.mT
    return y if bias is None else y + bias


def timestep_embedding(t: Tensor, dim: int, max_period: float = 10000) -> Tensor:
    """cos, then sin, of t at frequencies max_period^(-i / (dim // 2)); (..., dim) for t (...), a zero last if odd."""
    half = dim // 2
    steps = torch.arange(half, dtype=t.dtype, device=t.device)
    angles = t[..., None] * torch.exp(-math.log(max_period) / half * steps)
    zero = [torch.zeros_like(angles[..., :1])] * (dim % 2)
    return torch.cat([angles.cos(), angles.sin(), *zero], dim=-1)


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
    """`head_norm`, then `rotary`, of q (B, H, N, D) and of k (B, Hkv, M, D); without angles no rotation."""
    q, k = head_norm(q, q_weight, q_bias, norm, eps), head_norm(k, k_weight, k_bias, norm, eps)
    if cos is None or sin is None:
        return q, k
    return rotary(q, cos, sin, interleaved), rotary(k, cos, sin, interleaved)


def head_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, kind: str, eps: float) -> Tensor:
    """The "rms" or "layer" norm over the last dimension, or x itself for "none"."""
    return x if kind == "none" else norm(x, weight, bias, eps=eps, rms=kind == "rms")


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotary embedding (RoFormer, arXiv:2104.09864): each token's pairs of channels turn by its angles.

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


def _flat(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.flatten()
