"""The step between two blocks, in plain PyTorch: r = x + gate∘h, then a norm of r, with tangents and both backwards.

r is kept in float32 (float64 for float64) between the two halves, whatever it is returned in. The rest is
`fastdistill.ops.norm.eager`, whose gradients of its rows join those of r itself: at their sum dr, dx = dr, dh = gate∘dr
and dgate is the sum of h∘dr; the tangents' by the product rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdistill.ops.norm.eager import _multiply_add, _sum, backward_block, forward_block, plan
from fastdistill.ops.protocol.row_blocks import Gradients, Rows, accumulator_dtype, memory, part, row_blocks


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
    dtype = accumulator_dtype(x, h)
    arguments = (x, t_x, h, t_h, gate, t_gate, weight, t_weight, bias, t_bias, scale, t_scale, shift, t_shift)
    taken = {memory(a) for a in arguments if a is not None}
    r, t_r = (Rows(x.shape, x.dtype, x.device) for _ in range(2))
    y, t_y = (Rows(x.shape, h.dtype, x.device) for _ in range(2))
    mean, rstd = (Rows(x.shape[:-1], dtype, x.device) for _ in range(2))
    for at in row_blocks(x):
        parts: list[Any] = [part(a, at) for a in arguments]
        of_r = _residual(*parts[:6], dtype=dtype)
        of_y = forward_block(*of_r, *parts[6:], eps=eps, rms=rms, dtype=dtype)
        for result, found in zip((r, t_r, y, t_y, mean, rstd), (*of_r, *of_y), strict=True):
            if found is not None:
                result.put(found, at, taken)
    if t_y.whole is not None and t_r.whole is None:
        t_r.whole = x.new_zeros(x.shape)
    assert r.whole is not None and y.whole is not None and rstd.whole is not None
    return r.whole, t_r.whole, y.whole, t_y.whole, mean.whole, rstd.whole


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
    arguments = (dr, dt_r, dy, dt_y, x, t_x, h, t_h, gate, t_gate)
    of_norm = (weight, t_weight, bias, t_bias, scale, t_scale, shift, t_shift, mean, rstd)
    grads = Gradients((x, h, gate, weight, bias, scale, shift), needs, x, (dr, dt_r, dy, dt_y))
    blocks, centred = plan(x, scale, shift, mean, rstd, primal=dt_r is None and dt_y is None)
    for at in blocks:
        parts: list[Any] = [part(a, at) for a in (*arguments, *of_norm)]
        options: dict[str, Any] = {"rms": rms, "needs": needs, "centred": centred, "dtype": rstd.dtype}
        grads.put(_gradients(*parts[:10], of_norm=parts[10:], **options), at)
    return grads.results()


def _gradients(
    dr: Tensor | None,
    dt_r: Tensor | None,
    dy: Tensor | None,
    dt_y: Tensor | None,
    x: Tensor | None,
    t_x: Tensor | None,
    h: Tensor | None,
    t_h: Tensor | None,
    gate: Tensor | None,
    t_gate: Tensor | None,
    *,
    of_norm: Sequence[Tensor | None],
    rms: bool,
    needs: tuple[bool, ...],
    centred: bool,
    dtype: torch.dtype,
) -> tuple[Tensor | None, ...]:
    """The fourteen gradients at some rows; None is zero, or was not asked for."""
    before, t_before = any(needs[:3]), any(needs[7:10])
    found: Sequence[Tensor | None] = [None] * 10
    if dy is not None or dt_y is not None:
        wanted = (before or t_before, *needs[3:7], dt_y is not None and (before or t_before), *needs[10:])
        of_r = _residual(x, t_x, h, t_h, gate, t_gate, dtype=dtype)
        found = backward_block(dy, dt_y, *of_r, *of_norm, rms=rms, needs=wanted, centred=centred)
    dr, dt_r = (_sum(found[i], None if d is None else d.to(dtype)) for i, d in ((0, dr), (5, dt_r)))
    rows, t_rows, factor, t_factor = (None if a is None else a.to(dtype) for a in (h, t_h, gate, t_gate))
    dh, dt_h = (d if factor is None else _product(d, factor) for d in (dr, dt_r))
    dh = _sum(dh, _product(dt_r, t_factor))
    dgate = dt_gate = None
    if gate is not None:
        dgate, dt_gate = _sum(_product(dr, rows), _product(dt_r, t_rows)), _product(dt_r, rows)
    return (dr, dh, dgate, *found[1:5], dt_r, dt_h, dt_gate, *found[6:])


def _residual(
    x: Any,
    t_x: Tensor | None,
    h: Any,
    t_h: Tensor | None,
    gate: Tensor | None,
    t_gate: Tensor | None,
    *,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """r and its tangent, in `dtype`."""
    x, h = x.to(dtype), h.to(dtype)
    t_x, t_h, gate, t_gate = (None if a is None else a.to(dtype) for a in (t_x, t_h, gate, t_gate))
    r = x + h if gate is None else torch.addcmul(x, gate, h)
    t_r = t_x if t_gate is None else _multiply_add(t_x, t_gate, h)
    if gate is None or t_h is None:
        return r, _sum(t_r, t_h)
    return r, _multiply_add(t_r, gate, t_h)


def _product(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    return None if x is None or y is None else x * y
