"""GELU, SiLU and their gated forms, with their tangents and both backward passes, in plain PyTorch.

    y = phi(x) up      t_y = phi' t_x up + phi t_up      without up: up = 1, t_up = 0

Derivation and second derivatives: kernels/README.md, in the names used here.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

FAR = 20.0  # beyond it phi is the identity or zero in float32, and a polynomial of x only overflows
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
    if up is None:
        value, t_y = (phi(x, kind), None) if t_x is None else _both(t_x, x, kind)
        return value.contiguous(), None if t_y is None else t_y.contiguous()
    dtype = torch.promote_types(x.dtype, torch.float32)
    rows, factor = x.to(dtype), up.to(dtype)
    value, t_y = (phi(rows, kind), None) if t_x is None else _both(t_x.to(dtype), rows, kind)
    t_y = None if t_y is None else t_y.mul_(factor)
    if t_up is not None:
        t_y = value * t_up if t_y is None else t_y.addcmul_(value, t_up.to(dtype))
    y = value.mul_(factor).to(x.dtype).contiguous()
    return y, None if t_y is None else t_y.to(x.dtype).contiguous()


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
    dtype, like = torch.promote_types(x.dtype, torch.float32), x
    x = x.to(dtype)
    dy, dt_y, t_x, up, t_up = (None if z is None else z.to(dtype) for z in (dy, dt_y, t_x, up, t_up))
    h = _product(dt_y, up)  # the cotangent of phi' t_x; that of phi is g
    dx = dup = None
    if needs[0]:
        g = _product(dy, up)
        if t_up is not None and dt_y is not None:
            g = dt_y * t_up if g is None else torch.addcmul(g, dt_y, t_up)
        dx = None if g is None else _along(g, x, kind)
        if t_x is not None and h is not None:
            bend = curvature(x, kind).mul_(t_x)
            dx = bend.mul_(h) if dx is None else dx.addcmul_(bend, h)
    value = phi(x, kind) if needs[1] or needs[3] else None
    if needs[1]:
        dup = None if dy is None or value is None else dy * value
        if t_x is not None and dt_y is not None:
            moved = _along(t_x, x, kind)
            dup = moved.mul_(dt_y) if dup is None else dup.addcmul_(moved, dt_y)
    dt_x = _along(h, x, kind) if needs[2] and h is not None else None
    dt_up = dt_y * value if needs[3] and dt_y is not None and value is not None else None
    return tuple(
        None if not need else like.new_zeros(like.shape) if z is None else z.to(like.dtype).contiguous()
        for z, need in zip((dx, dup, dt_x, dt_up), needs, strict=True)
    )


def phi(x: Tensor, kind: str) -> Tensor:
    """The activation itself."""
    return F.silu(x) if kind == "silu" else F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


def _along(u: Tensor, x: Tensor, kind: str) -> Tensor:
    """phi'(x) u: PyTorch's own backward, in one pass, but for the tanh, where it loses digits in the tail."""
    if kind == "gelu_tanh":
        _, slope = _logistic_and_slope(x)
        return slope.mul_(u).to(x.dtype)
    aten = torch.ops.aten
    return aten.silu_backward(u, x) if kind == "silu" else aten.gelu_backward(u, x, approximate="none")


def _both(u: Tensor, x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """phi(x) and phi'(x) u."""
    if kind != "gelu_tanh":
        return phi(x, kind), _along(u, x, kind)
    p, slope = _logistic_and_slope(x)
    return p.mul_(x).to(x.dtype), slope.mul_(u).to(x.dtype)


def _logistic_and_slope(x: Tensor) -> tuple[Tensor, Tensor]:
    """For GELU's tanh: p = logistic(v), and phi' = p (1 + x q v'), q = logistic(-v)."""
    near = x.to(torch.promote_types(x.dtype, torch.float32)).clamp(-FAR, FAR)
    square = near.square()
    v = torch.addcmul(near, near, square, value=CUBIC).mul_(SPREAD)
    p, q = torch.sigmoid(v), torch.sigmoid(v.neg())
    return p, square.mul_(3 * CUBIC * SPREAD).add_(SPREAD).mul_(near).mul_(q).add_(1).mul_(p)


def curvature(x: Tensor, kind: str) -> Tensor:
    """phi''(x)."""
    near = x.clamp(-FAR, FAR)
    if kind == "gelu":
        square = near.square()
        return torch.exp(-square / 2).mul_((2 - square) / math.sqrt(2 * math.pi))
    if kind == "silu":
        p = torch.sigmoid(x)
        q = 1 - p
        return torch.sub(q, p).mul_(x).add_(2).mul_(q.mul_(p))
    v1 = SPREAD * (1 + 3 * CUBIC * near.square())
    v = SPREAD * near * (1 + CUBIC * near.square())
    p, q = torch.sigmoid(v), torch.sigmoid(-v)
    bend = (q - p).mul_(v1.square()).add_(near, alpha=6 * CUBIC * SPREAD)
    return p.mul_(q).mul_(bend.mul_(near).add_(v1, alpha=2))


def _product(x: Tensor | None, factor: Tensor | None) -> Tensor | None:
    """x * factor, where an x of None is zero and a factor of None is one."""
    return x if x is None or factor is None else x * factor
