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
from fastdistill.ops.protocol.dual_op import Tensors
from fastdistill.ops.protocol.pair import Needs, Pairs, flat, paired


def joins(rows: int, summed: int, columns: int) -> bool:
    """Whether (2 rows, summed) by (summed, columns) is worth stacking operands and parting results.

    That moves four times the rows' elements; reading the matrix once instead of twice saves the matrix.
    """
    return 4 * rows * (summed + columns) <= summed * columns


def _products(x: Tensor | None, t_x: Tensor | None, matrix: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """x matrix and t_x matrix, (rows, summed) by (summed, columns); None stays None."""
    if x is None or t_x is None or not joins(len(x), *matrix.shape):
        return None if x is None else x @ matrix, None if t_x is None else t_x @ matrix
    both = torch.cat([x, t_x]) @ matrix
    return both[: len(x)].clone(), both[len(x) :].clone()


def _forward(inputs: Pairs, attrs: Sequence[Any], tangent_grad: bool) -> tuple[Pairs, Tensors]:
    primals, tangents = zip(*inputs)
    (x, weight, bias), (t_x, t_weight, t_bias) = primals, tangents
    assert x is not None and weight is not None
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
    if t_weight is not None:
        t_y = F.linear(rows, t_weight, t_bias) if t_y is None else t_y.addmm_(rows, t_weight.t())
    elif t_y is None and t_bias is not None:
        t_y = t_bias.expand(len(rows), -1).clone()
    return paired([_whole(y, shape)], [None if t_y is None else _whole(t_y, shape)]), ()


def _whole(y: Tensor, shape: Sequence[int]) -> Tensor:
    """Rows in the shape of the result; no view, which autograd would not let the user change in place."""
    return y if y.dim() == len(shape) else torch.ops.aten._unsafe_view(y, shape)


def _backward(
    cotangents: Pairs, inputs: Pairs, saved: tuple[Pairs, Tensors], attrs: Sequence[Any], needs: Needs
) -> Pairs:
    (d_outs, dt_outs), (primals, tangents) = zip(*cotangents), zip(*inputs)
    needs = flat(needs)
    x, weight, _ = primals
    assert x is not None and weight is not None
    (dy, dt_y), (rows, t_rows) = (_rows(d_outs[0]), _rows(dt_outs[0])), (_rows(x), _rows(tangents[0]))
    t_weight = tangents[1]
    dx, dt_x = _products(dy if needs[0] else None, dt_y if needs[3] else None, weight)
    grads = [
        _sum_of_products(dx, dt_y, t_weight) if needs[0] else None,
        _sum_of_products(None if dy is None else dy.t() @ rows, _t(dt_y), t_rows) if needs[1] else None,
        None if dy is None or not needs[2] else dy.sum(0),
        dt_x,
        None if dt_y is None or not needs[4] else dt_y.t() @ rows,
        None if dt_y is None or not needs[5] else dt_y.sum(0),
    ]
    likes = (*primals, *primals)
    grads = [None if not need or like is None else _shaped(grad, like) for grad, like, need in zip(grads, likes, needs)]
    return paired(grads[:3], grads[3:])


def _sum_of_products(start: Tensor | None, a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """start + a b, where None is zero."""
    if a is None or b is None:
        return start
    return a @ b if start is None else start.addmm_(a, b)


def _shaped(grad: Tensor | None, like: Tensor) -> Tensor:
    return like.new_zeros(like.shape) if grad is None else grad.reshape(like.shape)


def _rows(x: Tensor | None) -> Any:
    return None if x is None else x.flatten(0, -2)


def _t(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.t()
