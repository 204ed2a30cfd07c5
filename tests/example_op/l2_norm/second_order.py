"""Give the formulas of the L2 norm for derivatives of any order, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastdistill.ops.protocol.pair import Needs, Pair, Pairs, add


def normalized(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return y and the reciprocal of the length."""
    r = (x.square().sum(-1, keepdim=True) + eps).rsqrt()
    return x * r, r


def project(u: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Return Π(u) = r (u - y <y, u>): the tangent's map, and the gradient's."""
    return r * (u - y * (y * u).sum(-1, keepdim=True))


def tangent(x: Tensor, t_x: Tensor | None, eps: float) -> tuple[Tensor, Tensor | None]:
    """Return y and t_y = Π(t_x)."""
    y, r = normalized(x, eps)
    return y, None if t_x is None else project(t_x, y, r)


def gradients(x: Tensor, t_x: Tensor | None, dy: Tensor | None, dt_y: Tensor | None, eps: float) -> Pair:
    """Return dx = Π(dy) + D_x <dt_y, Π(t_x)> and dt_x = Π(dt_y)."""
    y, r = normalized(x, eps)
    dx = None if dy is None else project(dy, y, r)
    if dt_y is None:
        return Pair(dx)
    if t_x is not None:
        along, other = (y * t_x).sum(-1, keepdim=True), (y * dt_y).sum(-1, keepdim=True)
        both = (dt_y * t_x).sum(-1, keepdim=True)
        moved = project(dt_y, y, r) * along + project(t_x, y, r) * other + r * y * (both - along * other)
        dx = add(dx, -r * moved)
    return Pair(dx, project(dt_y, y, r))


def l2_norm_dual(inputs: Pairs, attrs: Sequence[Any]) -> list[Pair]:
    """Return (y, t_y)."""
    (x, t_x) = inputs[0]
    return [Pair(*tangent(x, t_x, attrs[0]))]


def l2_norm_dual_backward(cotangents: Pairs, inputs: Pairs, attrs: Sequence[Any], needs: Needs) -> list[Pair]:
    """Return (dx, dt_x)."""
    found = gradients(*inputs[0], *cotangents[0], attrs[0])
    return [Pair(*(grad if need else None for grad, need in zip(found, needs[0])))]
