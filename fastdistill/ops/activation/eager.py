"""GELU, SiLU and their gated forms, with their tangents and both backward passes, in plain PyTorch.

    y = phi(x) up      t_y = phi' t_x up + phi t_up      without up: up = 1, t_up = 0

phi' u is what PyTorch's own backward kernel computes in one pass, but for GELU's tanh: there it takes 1 - tanh^2, and
loses the digits of the tails. What needs temporaries runs in blocks.
Derivation and second derivatives: kernels/README.md, in the names used here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu  # bound here: a user may assign ours in their place

from fastdistill.ops.protocol.pair import (
    ABSENT,
    Needs,
    Pair,
    Pairs,
    accumulated,
    affine,
    cast,
    moves,
    needed,
    paired,
    times,
    write_add_product,
)
from fastdistill.ops.protocol.row_blocks import accumulator_dtype, elements

FAR = 9.5  # beyond it the curvature is zero in float64, and a polynomial of x only overflows
SPREAD = 2 * math.sqrt(2 / math.pi)
CUBIC = 0.044715


def activation_forward(inputs: Pairs, *, kind: str) -> tuple[tuple[Pair], tuple[()]]:
    """Return y = phi(x) up and its tangent: ((y, t_y),), and no residuals.

    Args:
        inputs: the pairs of x and of up, all of one shape and dtype, any strides; up of None is one.
        kind: "silu", "gelu" or "gelu_tanh".

    Returns:
        y, t_y, contiguous and of x's dtype; 16-bit arguments are computed in float32 and rounded once. t_y is None
        without any tangent.

    Equivalent to:
        torch.func.jvp(lambda x, up: phi(x) * up, (x, up), (t_x, t_up))
    """
    (x, t_x), (up, t_up) = inputs
    if up is None and (kind != "gelu_tanh" or t_x is None):
        return (Pair(phi(x, kind).contiguous(), None if t_x is None else along(t_x, x, kind).contiguous()),), ()
    y, t_y = _empty(x), _empty(x) if moves(inputs) else None
    for block in elements(x, t_x, up, t_up, y, t_y):
        *given, written = paired(block[::2], block[1::2])
        _write_values(given, written, kind)
    return (Pair(y, t_y),), ()


def _write_values(inputs: Pairs, outputs: Pair, kind: str) -> None:
    """Write y = phi(x) up and its tangent."""
    (x, t_x), (up, t_up), (y, t_y) = *inputs, outputs
    dtype = accumulator_dtype(x)
    x, up = cast(x, dtype), cast(up, dtype)
    if t_x is None:
        value, moved = phi(x, kind), None
    elif kind == "gelu_tanh":
        value, moved = _tanh_pair(x)
        value, moved = value.mul_(x), moved.mul_(t_x)
    else:
        value, moved = phi(x, kind), along(cast(t_x, dtype), x, kind)
    if t_y is not None:
        write_add_product(t_y, moved if up is None else times(moved, up), value, t_up)
    write_add_product(y, value if up is None else None, value, up)


def activation_backward(
    cotangents: Pairs,
    inputs: Pairs,
    saved: tuple[Pairs, Sequence[Tensor | None]],
    *,
    kind: str,
    needs: Needs,
) -> list[Pair]:
    """Return the gradients of <dy, y> + <dt_y, t_y>, in pairs as `needs`.

    Args:
        cotangents: (dy, dt_y); None is zero, and one of the two is there.
        inputs, kind: as in `activation_forward`.
        saved: what it returned, of which nothing is read.
        needs: which gradients of x, up and of their tangents are wanted; the others are None.

    Returns:
        (dx, dt_x), (dup, dt_up), each contiguous and of x's shape and dtype.
    """
    ((dy, dt_y),), ((x, t_x), (up, t_up)) = cotangents, inputs
    if up is None and dt_y is None and dy is not None and kind != "gelu_tanh":
        return needed([Pair(along(dy, x, kind).contiguous() if needs[0][0] else None), ABSENT], inputs, needs)
    gradients = [Pair(*[_empty(x) if need else None for need in wants]) for wants in needs]
    for block in elements(dy, dt_y, x, t_x, up, t_up, *gradients[0], *gradients[1]):
        cotangent, *given = paired(block[::2], block[1::2])
        _write_gradients(cotangent, given[:2], given[2:], kind)
    return gradients


def _write_gradients(cotangent: Pair, inputs: Pairs, gradients: Pairs, kind: str) -> None:
    """Write those gradients that are wanted. h is the cotangent of phi' t_x, g that of phi."""
    (dy, dt_y), (x, t_x), up = (Pair(*accumulated(pair)) for pair in (cotangent, *inputs))
    (dx, dt_x), (dup, dt_up) = gradients
    # h = dt_y up and g = dy up + dt_y t_up are a product rule, too.
    h, g = affine(Pair(dt_y, dy), up) if dx is not None else affine(Pair(dt_y), Pair(up.primal))
    slope = None
    if dt_y is not None:  # or else there is one product with it, which PyTorch has a kernel for
        slope = along(x.new_ones(()).expand(x.shape), x, kind)
    value = None if dup is None and dt_up is None else phi(x, kind)
    if dx is not None:
        bend = None if t_x is None or h is None else curvature(x, kind).mul_(t_x)
        moved = None if g is None else along(g, x, kind) if slope is None else slope * g
        write_add_product(dx, moved, bend, h)
    if dup is not None:
        moved = times(slope, t_x)
        write_add_product(dup, times(dy, value), moved, dt_y)
    if dt_x is not None:
        write_add_product(dt_x, None, slope, h)
    if dt_up is not None:
        write_add_product(dt_up, None, value, dt_y)


def phi(x: Tensor, kind: str) -> Tensor:
    """Return the activation itself."""
    return silu(x) if kind == "silu" else gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


def along(u: Tensor, x: Tensor, kind: str) -> Tensor:
    """Return phi'(x) u."""
    if kind == "gelu_tanh":
        return _tanh_pair(x)[1].mul_(u)
    aten = torch.ops.aten
    return aten.silu_backward(u, x) if kind == "silu" else aten.gelu_backward(u, x, approximate="none")


def _tanh_pair(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return p = logistic(v) and phi' = p (1 + x q v'), q = logistic(-v), of GELU's tanh; x in float32 or better."""
    near = x.clamp(-FAR, FAR)
    cubic = torch.addcmul(near, near, near.square(), value=CUBIC)
    p = torch.mul(cubic, SPREAD).sigmoid_()
    q = torch.mul(cubic, -SPREAD).sigmoid_()
    bend = cubic.sub_(near, alpha=2 / 3).mul_(q)  # x v' = 3 v - 2 SPREAD x
    return p, torch.addcmul(p, p, bend, value=3 * SPREAD, out=q)


def curvature(x: Tensor, kind: str) -> Tensor:
    """Return phi''(x), in memory of its own."""
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


def _empty(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=like.device)
