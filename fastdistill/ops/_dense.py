"""The ops' formulas in plain PyTorch, differentiable any number of times: what second derivatives take.

Attention is dense here, with memory N x M. Symbols and derivation: kernels/README.md. Masks arrive 4-D and
broadcastable to (B, H, N, M); scale and shift broadcastable to x.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdistill.ops import _functional as F

NEG_INF = float("-inf")

Primals = tuple[Tensor, Tensor, Tensor, Tensor | None]
CuSeqlens = tuple[Tensor, Tensor, int, int] | None
Tangents = tuple[Tensor | None, ...]


def attention_dual(
    primals: Primals,
    tangents: Tangents,
    window: tuple[int, int],
    lower_right: bool,
    cu_seqlens: CuSeqlens,
    scale: float,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, Tensor | None]]:
    """((o, lse), (t_o, mu)): o = P v, t_o = P∘(T - mu) v + P t_v; no t_o and mu without any tangent."""
    dtype = primals[0].dtype
    q, k, v, mask = _accumulated(primals)
    tangents = _accumulated(tangents)
    p, lse = _probabilities(q, k, mask, _visible(q, k, window, lower_right, cu_seqlens), scale)
    o = (p @ _repeated(v, q)).to(dtype)
    t = _tangent_of_logits((q, k, v, mask), tangents, scale)
    t_v = _heads(tangents[2], q)
    if t is None and t_v is None:
        return (o, lse), (None, None)
    mu = torch.zeros_like(lse) if t is None else (p * t).sum(-1)
    t_o = None if t is None else (p * (t - mu[..., None])) @ _repeated(v, q)
    t_o = _add(t_o, None if t_v is None else p @ t_v)
    return (o, lse), (None if t_o is None else t_o.to(dtype), mu)


def attention_dual_backward(
    do: Tensor | None,
    dt_o: Tensor | None,
    d_lse: Tensor | None,
    d_mu: Tensor | None,
    primals: Primals,
    tangents: Tangents,
    window: tuple[int, int],
    lower_right: bool,
    cu_seqlens: CuSeqlens,
    scale: float,
    needs: list[bool],
) -> list[Tensor | None]:
    """Gradients of (q, k, v, mask) and of their tangents, from the cotangents of o, t_o, lse and mu."""
    likes = [*primals, *primals[:3], primals[3] if tangents[3] is None else tangents[3]]
    q, k, v, mask = _accumulated(primals)
    kv_heads = k.shape[1]
    p, lse = _probabilities(q, k, mask, _visible(q, k, window, lower_right, cu_seqlens), scale)
    t_q, t_k, t_v, t_mask = _accumulated(tangents)
    k, v, t_k, t_v = _repeated(k, q), _repeated(v, q), _heads(t_k, q), _heads(t_v, q)
    do, dt_o, d_lse, d_mu = _accumulated((do, dt_o, d_lse, d_mu))
    d_lse, d_mu = (None if x is None else torch.where(lse == NEG_INF, 0.0, x)[..., None] for x in (d_lse, d_mu))
    t = _tangent_of_logits((q, k, v, mask), (t_q, t_k, t_v, t_mask), scale)
    z = None if t is None else t - (p * t).sum(-1, keepdim=True)

    w = None if dt_o is None else dt_o @ v.mT
    d_t = _add(None if w is None else _softmax_backward(p, w), _times(p, d_mu))  # dT = P∘(W - rowsum(P∘W) + d_mu)
    g = _add(None if do is None else do @ v.mT, None if t_v is None else _matmul(dt_o, t_v.mT))
    d_s = _add(None if g is None else _softmax_backward(p, g), _times(p, d_lse))
    if d_t is not None and z is not None:  # dS = P∘(G - delta) + dT∘Z
        d_s = _add(d_s, d_t * z if w is None else d_t * z - p * (p * w * z).sum(-1, keepdim=True))

    grads = [
        _times(_add(_matmul(d_s, k), _matmul(d_t, t_k)), scale),
        _times(_add(_matmul(_T(d_s), q), _matmul(_T(d_t), t_q)), scale),
        _add(_matmul(p.mT, do), None if z is None else _matmul((p * z).mT, dt_o)),
        d_s,
        _times(_matmul(d_t, k), scale),
        _times(_matmul(_T(d_t), q), scale),
        _matmul(p.mT, dt_o),
        d_t,
    ]
    results: list[Tensor | None] = []
    for i, (grad, x, need) in enumerate(zip(grads, likes, needs, strict=True)):
        if not need or x is None:
            results.append(None)
        elif grad is None:
            results.append(torch.zeros_like(x))
        elif i % 4 in (1, 2):  # keys and values: sum over the query heads of each group
            results.append(grad.unflatten(1, (kv_heads, -1)).sum(2).to(x.dtype))
        else:
            results.append(grad.sum_to_size(x.shape).to(x.dtype))
    return results


def _visible(q: Tensor, k: Tensor, window: tuple[int, int], lower_right: bool, cu_seqlens: CuSeqlens) -> Tensor | None:
    """Which key each query sees, (N, M): within its own sequence and window. None: every query sees every key."""
    (n, m), (left, right) = (q.shape[2], k.shape[2]), window
    if cu_seqlens is None and left < 0 and right < 0:
        return None
    i, j = torch.arange(n, device=q.device)[:, None], torch.arange(m, device=q.device)
    shift: Tensor | int = m - n if lower_right else 0
    visible = torch.ones(n, m, dtype=torch.bool, device=q.device)
    if cu_seqlens is not None:
        cu_n, cu_m, *_ = cu_seqlens
        of_i, of_j = (torch.bucketize(x, cu, right=True) - 1 for x, cu in ((i, cu_n), (j, cu_m)))
        count = len(cu_n) - 1
        visible = (of_i == of_j) & (of_i >= 0) & (of_i < count)
        if lower_right:
            shift = F.pad(cu_m.diff() - cu_n.diff(), (0, 1))[of_i.clamp(min=0)]
        i, j = i - cu_n[of_i.clamp(min=0)], j - cu_m[of_j.clamp(min=0)]
    if left >= 0:
        visible = visible & (j >= i + shift - left)
    if right >= 0:
        visible = visible & (j <= i + shift + right)
    return visible


def _probabilities(
    q: Tensor, k: Tensor, mask: Tensor | None, visible: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """P and lse; zeros and -inf for a query that sees no key."""
    s = scale * (q @ _repeated(k, q).mT)
    if mask is not None:
        s = s.masked_fill(~mask, NEG_INF) if mask.dtype == torch.bool else s + mask
    if visible is not None:
        s = s.masked_fill(~visible, NEG_INF)
    dead = (s == NEG_INF).all(-1, keepdim=True)
    s = s.masked_fill(dead, 0.0)
    lse = torch.logsumexp(s, -1).masked_fill(dead.squeeze(-1), NEG_INF)
    return torch.softmax(s, -1).masked_fill(dead, 0.0), lse


def _tangent_of_logits(primals: Primals, tangents: Tangents, scale: float) -> Tensor | None:
    """T; None when no logit moves."""
    q, k, *_ = primals
    t_q, t_k, _, t_mask = tangents
    t = None if t_q is None else scale * (t_q @ _repeated(k, q).mT)
    if t_k is not None:
        t = _add(t, scale * (q @ _repeated(t_k, q).mT))
    return _add(t, t_mask)


def _softmax_backward(p: Tensor, d_p: Tensor) -> Tensor:
    return p * (d_p - (p * d_p).sum(-1, keepdim=True))


def _accumulated(tensors: Any) -> Any:
    """16-bit tensors in float32; masks and absent ones as they are."""
    low = (torch.bfloat16, torch.float16)
    return tuple(x.float() if x is not None and x.dtype in low else x for x in tensors)


def _repeated(x: Tensor, q: Tensor) -> Tensor:
    """Key heads repeated for grouped queries."""
    return x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _heads(x: Tensor | None, q: Tensor) -> Tensor | None:
    return None if x is None else _repeated(x, q)


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _times(a: Tensor | None, b: Tensor | float | None) -> Tensor | None:
    return None if a is None or b is None else a * b


def _matmul(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return None if a is None or b is None else a @ b


def _T(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.mT


def norm_dual(
    primals: tuple[Tensor | None, ...], tangents: tuple[Tensor | None, ...], eps: float, rms: bool
) -> tuple[Tensor, Tensor | None]:
    """y = (xh∘w + b)∘(1 + scale) + shift and its tangent; primals are (x, weight, bias, scale, shift)."""
    h, t_h, *_ = _normalised(primals, tangents, eps, rms)
    _, _, _, scale, shift = primals
    _, _, _, t_scale, t_shift = tangents
    t_y = _add(t_h if scale is None or t_h is None else t_h * (1 + scale), _times(h, t_scale))
    y = h if scale is None else h * (1 + scale)
    t_y = _add(t_y, t_shift)
    return y if shift is None else y + shift, None if t_y is None else t_y.expand_as(y)


def norm_dual_backward(
    dy: Tensor | None,
    dt_y: Tensor | None,
    primals: tuple[Tensor | None, ...],
    tangents: tuple[Tensor | None, ...],
    eps: float,
    rms: bool,
    needs: list[bool],
) -> list[Tensor | None]:
    """Gradients of (x, weight, bias, scale, shift) and of their tangents, from the cotangents of y and t_y."""
    x, weight, _, scale, _ = primals
    _, t_weight, _, t_scale, _ = tangents
    h, t_h, xh, t_xh, rstd = _normalised(primals, tangents, eps, rms)
    assert x is not None
    zero = torch.zeros_like(h)
    dy, dt_y = zero if dy is None else dy, zero if dt_y is None else dt_y
    t_h, t_xh = zero if t_h is None else t_h, zero if t_xh is None else t_xh

    one_plus = 1.0 if scale is None else 1 + scale
    dh = dy * one_plus if t_scale is None else dy * one_plus + dt_y * t_scale
    dt_h = dt_y * one_plus
    gain = 1.0 if weight is None else weight
    dxh = dh * gain if t_weight is None else dh * gain + dt_h * t_weight
    dt_xh = dt_h * gain

    a = zero[..., :1] if tangents[0] is None else (xh * tangents[0]).mean(-1, keepdim=True)
    c1, b = (xh * dt_xh).mean(-1, keepdim=True), (t_xh * dt_xh).mean(-1, keepdim=True)
    dt_x = rstd * _project(dt_xh, xh, rms)
    dx = rstd * (_project(dxh, xh, rms) - c1 * t_xh - b * xh) - rstd * a * dt_x
    grads = [dx, dh * xh + dt_h * t_xh, dh, dy * h + dt_y * t_h, dy, dt_x, dt_h * xh, dt_h, dt_y * h, dt_y]
    return [
        None if not need or like is None else grad.sum_to_size(like.shape)
        for grad, like, need in zip(grads, [*primals, *primals], needs, strict=True)
    ]


def gated_norm_dual(
    primals: tuple[Tensor | None, ...], tangents: tuple[Tensor | None, ...], eps: float, rms: bool
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, Tensor | None]]:
    """r = x + gate∘h and `norm_dual` of it; primals are (x, h, gate, weight, bias, scale, shift)."""
    x, h, *_ = primals
    assert x is not None and h is not None
    r, t_r = _residual(primals, tangents)
    y, t_y = norm_dual((r, *primals[3:]), (t_r, *tangents[3:]), eps, rms)
    if all(t is None for t in tangents):
        return (r.to(x.dtype), y.to(h.dtype)), (None, None)
    t_r, t_y = (torch.zeros_like(r) if t is None else t for t in (t_r, t_y))
    return (r.to(x.dtype), y.to(h.dtype)), (t_r.to(x.dtype), t_y.to(h.dtype))


def gated_norm_dual_backward(
    d_outs: Sequence[Tensor | None],
    dt_outs: Sequence[Tensor | None],
    primals: tuple[Tensor | None, ...],
    tangents: tuple[Tensor | None, ...],
    eps: float,
    rms: bool,
    needs: list[bool],
) -> list[Tensor | None]:
    """Gradients of (x, h, gate, weight, bias, scale, shift) and of their tangents, from the cotangents of (r, y)."""
    likes, (dr, dy), (dt_r, dt_y) = [*primals, *primals], d_outs, dt_outs
    r, t_r = _residual(primals, tangents)
    of_norm = [True, *needs[3:7], True, *needs[10:]]
    d_norm = norm_dual_backward(dy, dt_y, (r, *primals[3:]), (t_r, *tangents[3:]), eps, rms, of_norm)
    dr, dt_r = _add(dr, d_norm[0]), _add(dt_r, d_norm[5])
    _, h, gate, *_ = primals
    _, t_h, t_gate, *_ = tangents
    dh, dt_h = (d if gate is None else _times(d, gate) for d in (dr, dt_r))
    dh = _add(dh, _times(dt_r, t_gate))
    dgate = _add(_times(dr, h), _times(dt_r, t_h))
    grads = [dr, dh, dgate, *d_norm[1:5], dt_r, dt_h, _times(dt_r, h), *d_norm[6:]]
    return [
        None if not need or like is None or grad is None else grad.sum_to_size(like.shape).to(like.dtype)
        for grad, like, need in zip(grads, likes, needs, strict=True)
    ]


def _residual(primals: tuple[Tensor | None, ...], tangents: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor | None]:
    """r = x + gate∘h and its tangent."""
    x, h, gate, *_ = primals
    t_x, t_h, t_gate, *_ = tangents
    assert x is not None and h is not None
    t_r = _add(t_x, t_h if gate is None else _times(t_h, gate))
    return x + (h if gate is None else gate * h), _add(t_r, _times(h, t_gate))


def _normalised(
    primals: tuple[Tensor | None, ...], tangents: tuple[Tensor | None, ...], eps: float, rms: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor]:
    """h = xh∘w + b and its tangent, xh and its tangent, rstd."""
    x, weight, bias, _, _ = primals
    t_x, t_weight, t_bias, _, _ = tangents
    assert x is not None
    centred = x if rms else x - x.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    xh = centred * rstd
    t_xh = None if t_x is None else rstd * _project(t_x, xh, rms)
    t_h = _add(t_xh if t_xh is None or weight is None else t_xh * weight, _times(xh, t_weight))
    h = xh if weight is None else xh * weight
    return h if bias is None else h + bias, _add(t_h, t_bias), xh, t_xh, rstd


def _project(u: Tensor, xh: Tensor, rms: bool) -> Tensor:
    """Pi(u) = u - mean u - xh mean(xh∘u); RMSNorm leaves the mean out."""
    u = u if rms else u - u.mean(-1, keepdim=True)
    return u - xh * (xh * u).mean(-1, keepdim=True)
