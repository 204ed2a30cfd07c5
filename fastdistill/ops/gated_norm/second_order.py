"""Give the formulas of the gated residual with its norm for derivatives of any order, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdistill.ops.norm.second_order import norm_dual, norm_dual_backward
from fastdistill.ops.protocol.pair import add, times


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
    dr, dt_r = add(dr, d_norm[0]), add(dt_r, d_norm[5])
    _, h, gate, *_ = primals
    _, t_h, t_gate, *_ = tangents
    dh, dt_h = (d if gate is None else times(d, gate) for d in (dr, dt_r))
    dh = add(dh, times(dt_r, t_gate))
    dgate = add(times(dr, h), times(dt_r, t_h))
    grads = [dr, dh, dgate, *d_norm[1:5], dt_r, dt_h, times(dt_r, h), *d_norm[6:]]
    return [
        None if not need or like is None or grad is None else grad.sum_to_size(like.shape).to(like.dtype)
        for grad, like, need in zip(grads, likes, needs, strict=True)
    ]


def _residual(primals: tuple[Tensor | None, ...], tangents: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor | None]:
    """r = x + gate∘h and its tangent."""
    x, h, gate, *_ = primals
    t_x, t_h, t_gate, *_ = tangents
    assert x is not None and h is not None
    t_r = add(t_x, t_h if gate is None else times(t_h, gate))
    return x + (h if gate is None else gate * h), add(t_r, times(h, t_gate))
