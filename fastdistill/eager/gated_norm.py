"""The step between two blocks, in plain PyTorch: r = x + gate∘h, then a norm of r, with tangents and both backwards.

r is kept in float32 (float64 for float64) between the two halves, whatever it is returned in. The rest is
`fastdistill.eager.norm`, whose gradients of its rows join those of r itself: at their sum dr, dx = dr, dh = gate∘dr and
dgate is the sum of h∘dr; the tangents' by the product rule.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistill.eager.norm import _fresh, _sum, norm_backward, norm_forward


def gated_norm_forward(
    x: Tensor,
    t_x: Tensor | None,
    h: Tensor,
    t_h: Tensor | None,
    gate: Tensor | None,
    t_gate: Tensor | None,
    weight: Tensor | None,
    t_weight: Tensor | None,
    bias: Tensor | None,
    t_bias: Tensor | None,
    scale: Tensor | None,
    t_scale: Tensor | None,
    shift: Tensor | None,
    t_shift: Tensor | None,
    *,
    eps: float,
    rms: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None, Tensor]:
    """r = x + gate∘h and its modulated norm y, with their tangents: (r, t_r, y, t_y, mean, rstd).

    x, h (B, T, C), any strides; the gate as scale and shift, (B or 1, T or 1, C), or None for one. r, t_r have x's
    dtype, y, t_y have h's; all is computed in float32 (float64 for float64). The rest is as in `norm_forward`. Both
    tangents are None without any, and neither with one.

    Equivalent to: `torch.func.jvp(reference.gated_residual_ada_norm, (x, h, gate, ...), (t_x, t_h, t_gate, ...))`.
    """
    r, t_r = _residual(x, t_x, h, t_h, gate, t_gate)
    of_norm = (weight, t_weight, bias, t_bias, scale, t_scale, shift, t_shift)
    y, t_y, mean, rstd = norm_forward(r, t_r, *of_norm, eps=eps, rms=rms)
    if t_y is not None:
        t_r = x.new_zeros(x.shape) if t_r is None else _fresh(t_r, x)
        t_y = t_y.to(h.dtype)
    return r.to(x.dtype).contiguous(), t_r, y.to(h.dtype), t_y, mean, rstd


def gated_norm_backward(
    dr: Tensor | None,
    dt_r: Tensor | None,
    dy: Tensor | None,
    dt_y: Tensor | None,
    x: Tensor,
    t_x: Tensor | None,
    h: Tensor,
    t_h: Tensor | None,
    gate: Tensor | None,
    t_gate: Tensor | None,
    weight: Tensor | None,
    t_weight: Tensor | None,
    bias: Tensor | None,
    t_bias: Tensor | None,
    scale: Tensor | None,
    t_scale: Tensor | None,
    shift: Tensor | None,
    t_shift: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    *,
    rms: bool,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of <dr, r> + <dt_r, t_r> + <dy, y> + <dt_y, t_y>.

    In the order (x, h, gate, weight, bias, scale, shift), then of their tangents; `needs` says which of the fourteen,
    the others are None. Each has the shape and dtype of its argument. Any cotangent may be None, but not all; without
    dt_r and dt_y no tangent is read.
    """
    if all(d is None for d in (dr, dt_r, dy, dt_y)):
        raise ValueError("dr: expected a tensor where dt_r, dy and dt_y are None, got None")
    if dt_r is None and dt_y is None:
        t_x = t_h = t_gate = t_weight = t_bias = t_scale = t_shift = None
    r, t_r = _residual(x, t_x, h, t_h, gate, t_gate)
    of_norm = (weight, t_weight, bias, t_bias, scale, t_scale, shift, t_shift)
    before, t_before = any(needs[:3]), any(needs[7:10])
    found: list[Tensor | None] = [None] * 10
    if dy is not None or dt_y is not None:
        wanted = (before or t_before, *needs[3:7], dt_y is not None and (before or t_before), *needs[10:])
        found = list(norm_backward(dy, dt_y, r, t_r, *of_norm, mean, rstd, rms=rms, needs=wanted))
    dr, dt_r = (_sum(found[i], None if d is None else d.to(r.dtype)) for i, d in ((0, dr), (5, dt_r)))
    rows, t_rows, factor, t_factor = (None if a is None else a.to(r.dtype) for a in (h, t_h, gate, t_gate))
    dh, dt_h = (d if factor is None else _product(d, factor) for d in (dr, dt_r))
    dh = _sum(dh, _product(dt_r, t_factor))
    dgate, dt_gate = _sum(_product(dr, rows), _product(dt_r, t_rows)), _product(dt_r, rows)
    grads = [dr, dh, dgate, *found[1:5], dt_r, dt_h, dt_gate, *found[6:]]
    likes = [x, h, gate, weight, bias, scale, shift] * 2
    return tuple(_gradient(grad, like, need) for grad, like, need in zip(grads, likes, needs, strict=True))


def _residual(
    x: Tensor, t_x: Tensor | None, h: Tensor, t_h: Tensor | None, gate: Tensor | None, t_gate: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """r and its tangent, in float32 or better."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, h.dtype), torch.float32)
    x, h = x.to(dtype), h.to(dtype)
    t_x, t_h, gate, t_gate = (None if a is None else a.to(dtype) for a in (t_x, t_h, gate, t_gate))
    t_r = _sum(t_x, _product(t_gate, h))
    if gate is None:
        return x + h, _sum(t_r, t_h)
    return torch.addcmul(x, gate, h), _sum(t_r, _product(gate, t_h))


def _product(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    return None if x is None or y is None else x * y
