"""Give the formulas of attention for derivatives of any order, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdistill.ops.protocol import torch_functions as F
from fastdistill.ops.protocol.pair import Needs, Pair, Pairs, accumulated, add, flat, matmul, paired, times, transposed

NEG_INF = float("-inf")
CuSeqlens = tuple[Tensor, Tensor, int, int] | None


def attention_dual(
    inputs: Pairs, *, window: tuple[int, int], lower_right: bool, cu_seqlens: CuSeqlens, scale: float
) -> list[Pair]:
    """Return (o, t_o) and (lse, mu): o = P v, t_o = P∘(T - mu) v + P t_v; no t_o and mu without any tangent."""
    dtype = inputs[0].primal.dtype
    primals, tangents = (accumulated(part) for part in zip(*inputs))
    (q, k, v, mask), (_, _, t_v, _) = primals, tangents
    p, lse = _probabilities(q, k, mask, _visible(q, k, window, lower_right, cu_seqlens), scale)
    o = (p @ _repeated(v, q)).to(dtype)
    t = _tangent_of_logits(primals, tangents, scale)
    if t is None and t_v is None:
        return [Pair(o), Pair(lse)]
    mu = torch.zeros_like(lse) if t is None else (p * t).sum(-1)
    t_o = None if t is None else (p * (t - mu[..., None])) @ _repeated(v, q)
    t_o = add(t_o, matmul(p, _heads(t_v, q)))
    return [Pair(o, None if t_o is None else t_o.to(dtype)), Pair(lse, mu)]


def attention_dual_backward(
    cotangents: Pairs,
    inputs: Pairs,
    *,
    window: tuple[int, int],
    lower_right: bool,
    cu_seqlens: CuSeqlens,
    scale: float,
    needs: Needs,
) -> list[Pair]:
    """Return the gradients of q, k, v, mask and of their tangents, from the cotangents of o, t_o, lse and mu."""
    likes = [x for x, _ in inputs] + [x if t is None else t for x, t in inputs]
    primals, tangents = (accumulated(part) for part in zip(*inputs))
    (q, k, v, mask), (t_q, t_k, t_v, _) = primals, tangents
    kv_heads = k.shape[1]
    p, lse = _probabilities(q, k, mask, _visible(q, k, window, lower_right, cu_seqlens), scale)
    t = _tangent_of_logits(primals, tangents, scale)
    k, v, t_k, t_v = _repeated(k, q), _repeated(v, q), _heads(t_k, q), _heads(t_v, q)
    do, d_lse, dt_o, d_mu = accumulated(flat(cotangents))
    d_lse, d_mu = (None if x is None else torch.where(lse == NEG_INF, 0.0, x)[..., None] for x in (d_lse, d_mu))
    z = None if t is None else t - (p * t).sum(-1, keepdim=True)

    w = None if dt_o is None else dt_o @ v.mT
    d_t = add(None if w is None else _softmax_backward(p, w), times(p, d_mu))  # dT = P∘(W - rowsum(P∘W) + d_mu)
    g = add(None if do is None else do @ v.mT, None if t_v is None else matmul(dt_o, t_v.mT))
    d_s = add(None if g is None else _softmax_backward(p, g), times(p, d_lse))
    if d_t is not None and z is not None:  # dS = P∘(G - delta) + dT∘Z
        d_s = add(d_s, d_t * z if w is None else d_t * z - p * (p * w * z).sum(-1, keepdim=True))

    grads = [
        times(add(matmul(d_s, k), matmul(d_t, t_k)), scale),
        times(add(matmul(transposed(d_s), q), matmul(transposed(d_t), t_q)), scale),
        add(matmul(p.mT, do), None if z is None else matmul((p * z).mT, dt_o)),
        d_s,
        times(matmul(d_t, k), scale),
        times(matmul(transposed(d_t), q), scale),
        matmul(p.mT, dt_o),
        d_t,
    ]
    results: list[Tensor | None] = []
    for i, (grad, x, need) in enumerate(zip(grads, likes, flat(needs), strict=True)):
        if not need or x is None:
            results.append(None)
        elif grad is None:
            results.append(torch.zeros_like(x))
        elif i % 4 in (1, 2):  # keys and values: sum over the query heads of each group
            results.append(grad.unflatten(1, (kv_heads, -1)).sum(2).to(x.dtype))
        else:
            results.append(grad.sum_to_size(x.shape).to(x.dtype))
    return paired(results[:4], results[4:])


def _visible(q: Tensor, k: Tensor, window: tuple[int, int], lower_right: bool, cu_seqlens: CuSeqlens) -> Tensor | None:
    """Return which key each query sees, (N, M), within its own sequence and window; None: every one."""
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
    """Return P and lse; zeros and -inf for a query that sees no key."""
    s = scale * (q @ _repeated(k, q).mT)
    if mask is not None:
        s = s.masked_fill(~mask, NEG_INF) if mask.dtype == torch.bool else s + mask
    if visible is not None:
        s = s.masked_fill(~visible, NEG_INF)
    dead = (s == NEG_INF).all(-1, keepdim=True)
    s = s.masked_fill(dead, 0.0)
    lse = torch.logsumexp(s, -1).masked_fill(dead.squeeze(-1), NEG_INF)
    return torch.softmax(s, -1).masked_fill(dead, 0.0), lse


def _tangent_of_logits(primals: Sequence[Any], tangents: Sequence[Tensor | None], scale: float) -> Tensor | None:
    """Return T; None when no logit moves."""
    q, k, *_ = primals
    t_q, t_k, _, t_mask = tangents
    t = None if t_q is None else scale * (t_q @ _repeated(k, q).mT)
    if t_k is not None:
        t = add(t, scale * (q @ _repeated(t_k, q).mT))
    return add(t, t_mask)


def _softmax_backward(p: Tensor, d_p: Tensor) -> Tensor:
    return p * (d_p - (p * d_p).sum(-1, keepdim=True))


def _repeated(x: Tensor, q: Tensor) -> Tensor:
    """Return key heads repeated for grouped queries."""
    return x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _heads(x: Tensor | None, q: Tensor) -> Tensor | None:
    return None if x is None else _repeated(x, q)
