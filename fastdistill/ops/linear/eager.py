"""Linear layers whose tangent costs one matmul: a weight without a tangent is not multiplied by its zeros.

    y = x Wᵀ + b      t_y = t_x Wᵀ + x t_Wᵀ + t_b

`torch.func.jvp` of `F.linear` runs three matmuls even where only x moves: the third one by a weight of zeros, slower
than the others, with about a millisecond of Python beside it. Here it runs two, or [x; t_x] Wᵀ as one where rows are so
few that reading the weight is what costs. benchmarks/results/NOTES.md has the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdistill.ops.protocol import torch_functions as F
from fastdistill.ops.protocol.pair import Needs, Pair, Pairs, add_matmul, matmul, needed, transposed


def linear_forward(inputs: Pairs) -> tuple[tuple[Pair], tuple[()]]:
    """Return a linear layer and its tangent: ((y, t_y),), and no residuals.

    Args:
        inputs: the pairs of x (..., K), with one dimension or more before the last, of the weight (N, K) and of the
            bias, (N,) or None; all of one dtype.

    Returns:
        y, t_y (..., N), in memory of their own. t_y is None without any tangent.

    Equivalent to:
        torch.func.jvp of F.linear(x, weight, bias)
    """
    (x, t_x), (weight, t_weight), (bias, t_bias) = inputs
    shape, rows, t_rows = (*x.shape[:-1], len(weight)), _rows(x), _rows(t_x)
    if t_rows is not None and joins(len(rows), weight.shape[1], len(weight)):
        both = rows.new_zeros(2 * len(rows), len(weight))
        if bias is not None:
            both[: len(rows)] = bias
        if t_bias is not None:
            both[len(rows) :] = t_bias
        both.addmm_(torch.cat([rows, t_rows]), weight.t())
        y, t_y = both[: len(rows)].clone(), both[len(rows) :].clone()  # so that y does not keep t_y's memory
    else:
        y = F.linear(rows, weight, bias)
        t_y = None if t_rows is None else F.linear(t_rows, weight, t_bias)
    if t_y is not None:
        t_y = add_matmul(t_y, rows, transposed(t_weight))
    elif t_weight is not None:
        t_y = F.linear(rows, t_weight, t_bias)
    elif t_bias is not None:
        t_y = t_bias.expand(len(rows), -1).clone()
    return (Pair(_whole(y, shape), None if t_y is None else _whole(t_y, shape)),), ()


def linear_backward(
    cotangents: Pairs, inputs: Pairs, saved: tuple[Pairs, Sequence[Tensor | None]], *, needs: Needs
) -> list[Pair]:
    """Return the gradients of <dy, y> + <dt_y, t_y>, in pairs as `needs`.

    Args:
        cotangents: (dy, dt_y); None is zero.
        inputs: as in `linear_forward`.
        saved: what it returned, of which nothing is read.
        needs: which gradients of x, the weight, the bias and of their tangents are wanted; the others are None.

    Returns:
        (dx, dt_x), (dweight, dt_weight), (dbias, dt_bias), each in its primal's shape and dtype.
    """
    ((dy, dt_y),) = (map(_rows, pair) for pair in cotangents)
    (x, t_x), (weight, t_weight), _ = inputs
    (need_x, need_t_x), (need_weight, need_t_weight), (need_bias, need_t_bias) = needs
    rows, t_rows = _rows(x), _rows(t_x)
    dx, dt_x = _times_matrix(dy if need_x else None, dt_y if need_t_x else None, weight)
    gradients = [
        Pair(add_matmul(dx, dt_y, t_weight) if need_x else None, dt_x),
        Pair(
            add_matmul(matmul(transposed(dy), rows), transposed(dt_y), t_rows) if need_weight else None,
            matmul(transposed(dt_y), rows) if need_t_weight else None,
        ),
        Pair(
            None if dy is None or not need_bias else dy.sum(0),
            None if dt_y is None or not need_t_bias else dt_y.sum(0),
        ),
    ]
    return needed(gradients, inputs, needs)


def joins(rows: int, summed: int, columns: int) -> bool:
    """Return whether (2 rows, summed) by (summed, columns) is worth stacking operands and parting results.

    That moves four times the rows' elements; reading the matrix once instead of twice saves the matrix.
    """
    return 4 * rows * (summed + columns) <= summed * columns


def _times_matrix(x: Tensor | None, t_x: Tensor | None, matrix: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return x matrix and t_x matrix, (rows, summed) by (summed, columns), as one product where that is worth it."""
    if x is None or t_x is None or not joins(len(x), *matrix.shape):
        return matmul(x, matrix), matmul(t_x, matrix)
    both = torch.cat([x, t_x]) @ matrix
    return both[: len(x)].clone(), both[len(x) :].clone()


def _rows(x: Tensor | None) -> Any:
    """Return (..., K) as (rows, K)."""
    return None if x is None else x.flatten(0, -2)


def _whole(y: Tensor, shape: Sequence[int]) -> Tensor:
    """Return rows in the shape of the result; no view, which autograd would not let the user change in place."""
    return y if y.dim() == len(shape) else torch.ops.aten._unsafe_view(y, shape)
