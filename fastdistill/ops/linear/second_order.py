"""Give the formulas of linear layers for derivatives of any order, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from fastdistill.ops.protocol.pair import Needs, Pair, Pairs, add, matmul, needed, transposed


def linear_dual(inputs: Pairs) -> list[Pair]:
    """Return (y, t_y): y = x Wᵀ + b, t_y = t_x Wᵀ + x t_Wᵀ + t_b; no t_y without any tangent."""
    (x, t_x), (weight, t_weight), (bias, t_bias) = inputs
    y = x @ weight.mT
    t_y = add(matmul(t_x, weight.mT), matmul(x, transposed(t_weight)))
    t_y = add(t_y, None if t_bias is None else t_bias.expand(y.shape))
    return [Pair(y if bias is None else y + bias, t_y)]


def linear_dual_backward(cotangents: Pairs, inputs: Pairs, *, needs: Needs) -> list[Pair]:
    """Return the gradients of x, the weight, the bias and of their tangents, from the cotangents of y and t_y."""
    ((dy, dt_y),) = cotangents
    (x, t_x), (weight, t_weight), _ = inputs
    gradients = [
        Pair(add(matmul(dy, weight), matmul(dt_y, t_weight)), matmul(dt_y, weight)),
        Pair(add(_outer(dy, x), _outer(dt_y, t_x)), _outer(dt_y, x)),
        Pair(_sum_over_rows(dy), _sum_over_rows(dt_y)),
    ]
    return needed(gradients, inputs, needs)


def _outer(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Return the sum over all rows of their outer products: aᵀ b."""
    return None if a is None or b is None else a.flatten(0, -2).mT @ b.flatten(0, -2)


def _sum_over_rows(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.flatten(0, -2).sum(0)
