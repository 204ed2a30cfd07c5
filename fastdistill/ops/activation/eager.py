"""GELU, SiLU and their gated forms, with their tangents and both backward passes, in plain PyTorch.

    y = phi(x) up      t_y = phi' t_x up + phi t_up      without up: up = 1, t_up = 0

phi' u is what PyTorch's own backward kernel computes in one pass, but for GELU's tanh: there it takes 1 - tanh^2, and
loses the digits of the tails. What needs temporaries runs in blocks.
Derivation and second derivatives: kernels/README.md, in the names used here.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu  # bound here: a user may assign ours in their place

from fastdistill.ops.protocol.row_blocks import accumulator_dtype, elements

FAR = 9.5  # beyond it the curvature is zero in float64, and a polynomial of x only overflows
SPREAD = 2 * math.sqrt(2 / math.pi)
CUBIC = 0.044715


def activation_forward(
    x: Tensor, t_x: Tensor | None, up: Tensor | None, t_up: Tensor | None, *, kind: str
) -> tuple[Tensor, Tensor | None]:
    """(y, t_y) of y = phi(x) up, all of one shape, any strides; kind is "silu", "gelu" or "gelu_tanh".

    Both results are contiguous and of x's dtype; 16-bit arguments are computed in float32 and rounded once. t_y is None
    without any tangent.

    Equivalent to: `torch.func.jvp(lambda x, up: phi(x) * up, (x, up), (t_x, t_up))`.
    """
    if up is None and (kind != "gelu_tanh" or t_x is None):
        return phi(x, kind).contiguous(), None if t_x is None else along(t_x, x, kind).contiguous()
    y, t_y = _empty(x), None if t_x is None and t_up is None else _empty(x)
    for block in elements(x, t_x, up, t_up, y, t_y):
        _values(*block, kind=kind)
    return y, t_y


def _values(x: Any, t_x: Tensor | None, up: Tensor | None, t_up: Tensor | None, y: Any, t_y: Any, *, kind: str) -> None:
    """Write y = phi(x) up and its tangent."""
    x, up = _wide(x), None if up is None else _wide(up)
    if t_x is None:
        value, moved = phi(x, kind), None
    elif kind == "gelu_tanh":
        value, moved = _tanh_pair(x)
        value, moved = value.mul_(x), moved.mul_(t_x)
    else:
        value, moved = phi(x, kind), along(_wide(t_x), x, kind)
    if t_y is not None:
        _sum_into(t_y, _product(moved, up), None if t_up is None else value, t_up)
    _sum_into(y, value if up is None else None, value, up)


def activation_backward(
    dy: Tensor | None,
    dt_y: Tensor | None,
    x: Tensor,
    t_x: Tensor | None,
    up: Tensor | None,
    t_up: Tensor | None,
    *,
    kind: str,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of <dy, y> + <dt_y, t_y>: (dx, dup, dt_x, dt_up).

    `needs` says which of the four; the others are None. Each is contiguous and of x's shape and dtype. A cotangent of
    None is zero.
    """
    if up is None and dt_y is None and dy is not None and kind != "gelu_tanh":
        one = along(dy, x, kind).contiguous() if needs[0] else None
        return one, *(torch.zeros_like(x) if need else None for need in needs[1:])
    results = [_empty(x) if need else None for need in needs]
    for block in elements(dy, dt_y, x, t_x, up, t_up, *results):
        _gradients(*block, kind=kind)
    return tuple(results)


def _gradients(
    dy: Tensor | None,
    dt_y: Tensor | None,
    x: Any,
    t_x: Tensor | None,
    up: Tensor | None,
    t_up: Tensor | None,
    dx: Tensor | None,
    dup: Tensor | None,
    dt_x: Tensor | None,
    dt_up: Tensor | None,
    *,
    kind: str,
) -> None:
    """Write those gradients that are wanted. h is the cotangent of phi' t_x, g that of phi."""
    x = _wide(x)
    dy, dt_y, t_x, up, t_up = (None if z is None else _wide(z) for z in (dy, dt_y, t_x, up, t_up))
    h, slope = _product(dt_y, up), None
    if dt_y is not None:  # or else there is one product with it, which PyTorch has a kernel for
        slope = along(x.new_ones(()).expand(x.shape), x, kind)
    value = None if dup is None and dt_up is None else phi(x, kind)
    if dx is not None:
        g = _product(dy, up)
        if t_up is not None and dt_y is not None:
            g = dt_y * t_up if g is None else torch.addcmul(g, dt_y, t_up)
        bend = None if t_x is None or h is None else curvature(x, kind).mul_(t_x)
        moved = None if g is None else along(g, x, kind) if slope is None else slope * g
        _sum_into(dx, moved, bend, h)
    if dup is not None:
        moved = None if t_x is None or slope is None else slope * t_x
        _sum_into(dup, _product(dy, value), moved, dt_y)
    if dt_x is not None:
        _sum_into(dt_x, None, slope, h)
    if dt_up is not None:
        _sum_into(dt_up, None, value, dt_y)


def _sum_into(out: Tensor, x: Tensor | None, y: Tensor | None, factor: Tensor | None) -> None:
    """out = x + y * factor, where None is zero."""
    if y is not None and factor is not None:
        torch.mul(y, factor, out=out) if x is None else torch.addcmul(x, y, factor, out=out)
    elif x is not None:
        out.copy_(x)
    else:
        out.zero_()


def phi(x: Tensor, kind: str) -> Tensor:
    """The activation itself."""
    return silu(x) if kind == "silu" else gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


def along(u: Tensor, x: Tensor, kind: str) -> Tensor:
    """phi'(x) u."""
    if kind == "gelu_tanh":
        return _tanh_pair(x)[1].mul_(u)
    aten = torch.ops.aten
    return aten.silu_backward(u, x) if kind == "silu" else aten.gelu_backward(u, x, approximate="none")


def _tanh_pair(x: Tensor) -> tuple[Tensor, Tensor]:
    """For GELU's tanh, x in float32 or better: p = logistic(v), and phi' = p (1 + x q v'), q = logistic(-v)."""
    near = x.clamp(-FAR, FAR)
    cubic = torch.addcmul(near, near, near.square(), value=CUBIC)
    p = torch.mul(cubic, SPREAD).sigmoid_()
    q = torch.mul(cubic, -SPREAD).sigmoid_()
    bend = cubic.sub_(near, alpha=2 / 3).mul_(q)  # x v' = 3 v - 2 SPREAD x
    return p, torch.addcmul(p, p, bend, value=3 * SPREAD, out=q)


def curvature(x: Tensor, kind: str) -> Tensor:
    """phi''(x), in memory of its own."""
    if kind == "silu":
        p = torch.sigmoid(x)
        q = 1 - p
        bend = torch.sub(q, p).mul_(x).add_(2)
        return q.mul_(p).mul_(bend)
    near = x.clamp(-4 * FAR, 4 * FAR) if kind == "gelu" else x.clamp(-FAR, FAR)
    square = near.square()
    if kind == "gelu":
        density = torch.mul(square, -0.5, out=near).exp_()
        return square.mul_(-1 / math.sqrt(2 * math.pi)).add_(math.sqrt(2 / math.pi)).mul_(density)
    # With e = exp(-v): p = 1 / (1 + e), q = e p, q - p = (e - 1) p.
    e = torch.addcmul(near, near, square, value=CUBIC).mul_(-SPREAD).exp_()
    p = torch.add(e, 1).reciprocal_()
    v1 = square.mul_(3 * CUBIC * SPREAD).add_(SPREAD)
    bend = torch.sub(e, 1).mul_(p).mul_(v1).mul_(v1).add_(near, alpha=6 * CUBIC * SPREAD)
    bend.mul_(near).add_(v1, alpha=2)
    return e.mul_(p).mul_(p).mul_(bend)


def _product(x: Tensor | None, factor: Tensor | None) -> Tensor | None:
    """x * factor, where an x of None is zero and a factor of None is one."""
    return x if x is None or factor is None else x * factor


def _wide(x: Tensor) -> Tensor:
    return x.to(accumulator_dtype(x))


def _empty(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)
