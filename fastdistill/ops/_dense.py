"""The ops' formulas in plain PyTorch, differentiable any number of times: what second derivatives take.

Attention is dense here, with memory N x M. Symbols and derivation: kernels/README.md. Masks arrive 4-D and
broadcastable to (B, H, N, M); scale and shift broadcastable to x.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEG_INF = float("-inf")


def attention_dual(
    primals: tuple[Tensor, Tensor, Tensor, Tensor | None],
    tangents: tuple[Tensor | None, ...],
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor | None]:
    """o = P v and t_o = P∘(T - mu) v + P t_v."""
    q, k, v, mask = primals
    t_v = _heads(tangents[2], q)
    p = _probabilities(q, k, mask, is_causal, scale)
    v = _repeated(v, q)
    out = p @ v
    z = _centred_tangent(p, primals, tangents, scale)
    terms = [x for x in (None if z is None else (p * z) @ v, None if t_v is None else p @ t_v) if x is not None]
    return out, sum(terms[1:], terms[0]) if terms else None


def attention_dual_backward(
    do: Tensor | None,
    dt_o: Tensor | None,
    primals: tuple[Tensor, Tensor, Tensor, Tensor | None],
    tangents: tuple[Tensor | None, ...],
    is_causal: bool,
    scale: float,
    needs: list[bool],
) -> list[Tensor | None]:
    """Gradients of (q, k, v, mask) and of their tangents, from the cotangents of o and t_o."""
    q, k, v, mask = primals
    t_q, t_k, t_v, _ = tangents
    kv_heads = k.shape[1]
    k, v, t_k, t_v = _repeated(k, q), _repeated(v, q), _heads(t_k, q), _heads(t_v, q)
    p = _probabilities(q, k, mask, is_causal, scale)
    z = _centred_tangent(p, (q, k, v, mask), (t_q, t_k, t_v, tangents[3]), scale)

    w = None if dt_o is None else dt_o @ v.mT
    d_t = None if w is None else _softmax_backward(p, w)  # dT = P∘(W - rowsum(P∘W))
    g = _add(None if do is None else do @ v.mT, None if t_v is None else _times(dt_o, t_v.mT))
    if w is not None and d_t is not None and z is not None:  # dS = P∘(G - delta) + dT∘Z
        delta = (p * w * z).sum(-1, keepdim=True)
        d_s = _add(None if g is None else _softmax_backward(p, g), d_t * z - p * delta)
    else:
        d_s = None if g is None else _softmax_backward(p, g)

    grads = [
        _scaled(_add(_times(d_s, k), _times(d_t, t_k)), scale),
        _scaled(_add(_times(_T(d_s), q), _times(_T(d_t), t_q)), scale),
        _add(_times(p.mT, do), None if z is None else _times((p * z).mT, dt_o)),
        d_s,
        _scaled(_times(d_t, k), scale),
        _scaled(_times(_T(d_t), q), scale),
        _times(p.mT, dt_o),
        d_t,
    ]
    results: list[Tensor | None] = []
    for i, (grad, x, need) in enumerate(zip(grads, [*primals, *primals], needs, strict=True)):
        if not need or x is None:
            results.append(None)
        elif grad is None:
            results.append(torch.zeros_like(x))
        elif i % 4 in (1, 2):  # keys and values: sum over the query heads of each group
            results.append(grad.unflatten(1, (kv_heads, -1)).sum(2))
        else:
            results.append(grad.sum_to_size(x.shape))
    return results


def _probabilities(q: Tensor, k: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    s = scale * (q @ _repeated(k, q).mT)
    if mask is not None:
        s = s.masked_fill(~mask, NEG_INF) if mask.dtype == torch.bool else s + mask
    if is_causal:
        keep = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).tril()
        s = s.masked_fill(~keep, NEG_INF)
    dead = (s == NEG_INF).all(-1, keepdim=True)
    return torch.softmax(s.masked_fill(dead, 0.0), -1).masked_fill(dead, 0.0)


def _centred_tangent(
    p: Tensor, primals: tuple[Tensor | None, ...], tangents: tuple[Tensor | None, ...], scale: float
) -> Tensor | None:
    """Z = T - rowsum(P∘T), T the tangent of the logits; None when no logit moves."""
    q, k = primals[:2]
    assert q is not None and k is not None
    t_q, t_k, _, t_mask = tangents
    t = None if t_q is None else scale * (t_q @ _repeated(k, q).mT)
    if t_k is not None:
        t = _add(t, scale * (q @ _repeated(t_k, q).mT))
    t = _add(t, t_mask)
    return None if t is None else t - (p * t).sum(-1, keepdim=True)


def _softmax_backward(p: Tensor, d_p: Tensor) -> Tensor:
    return p * (d_p - (p * d_p).sum(-1, keepdim=True))


def _repeated(x: Tensor, q: Tensor) -> Tensor:
    """Key heads repeated for grouped queries."""
    return x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _heads(x: Tensor | None, q: Tensor) -> Tensor | None:
    return None if x is None else _repeated(x, q)


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _times(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return None if a is None or b is None else a @ b


def _T(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.mT


def _scaled(x: Tensor | None, scale: float) -> Tensor | None:
    return None if x is None else scale * x


def norm_dual(
    primals: tuple[Tensor | None, ...], tangents: tuple[Tensor | None, ...], eps: float, rms: bool
) -> tuple[Tensor, Tensor | None]:
    """y = (xh∘w + b)∘(1 + scale) + shift and its tangent; primals are (x, weight, bias, scale, shift)."""
    h, t_h, *_ = _normalised(primals, tangents, eps, rms)
    _, _, _, scale, shift = primals
    _, _, _, t_scale, t_shift = tangents
    t_y = _add(t_h if scale is None or t_h is None else t_h * (1 + scale), _product(h, t_scale))
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
    t_h = _add(t_xh if t_xh is None or weight is None else t_xh * weight, _product(xh, t_weight))
    h = xh if weight is None else xh * weight
    return h if bias is None else h + bias, _add(t_h, t_bias), xh, t_xh, rstd


def _project(u: Tensor, xh: Tensor, rms: bool) -> Tensor:
    """Pi(u) = u - mean u - xh mean(xh∘u); RMSNorm leaves the mean out."""
    u = u if rms else u - u.mean(-1, keepdim=True)
    return u - xh * (xh * u).mean(-1, keepdim=True)


def _product(a: Tensor, b: Tensor | None) -> Tensor | None:
    return None if b is None else a * b
