"""Give the formulas of the gated residual with its norm for derivatives of any order, in plain PyTorch."""

from __future__ import annotations

import torch

from fastdistill.ops.norm.second_order import norm_dual, norm_dual_backward
from fastdistill.ops.protocol.pair import Needs, Pair, Pairs, accumulated, add, affine, moves, times


def gated_norm_dual(inputs: Pairs, eps: float, rms: bool) -> list[Pair]:
    """Return r = x + gate∘h and its norm y, each with its tangent, of x, h, gate, weight, bias, scale, shift."""
    dtypes, inputs = [pair.primal.dtype for pair in inputs[:2]], [Pair(*accumulated(pair)) for pair in inputs]
    r = affine(inputs[1], inputs[2], inputs[0])
    y = norm_dual([r, *inputs[3:]], eps, rms)
    outputs = list(zip((r, y), dtypes))
    if not moves(inputs):
        return [Pair(primal.to(dtype)) for (primal, _), dtype in outputs]
    moving = [(primal, torch.zeros_like(primal) if t is None else t, dtype) for (primal, t), dtype in outputs]
    return [Pair(primal.to(dtype), t.to(dtype)) for primal, t, dtype in moving]


def gated_norm_dual_backward(cotangents: Pairs, inputs: Pairs, eps: float, rms: bool, needs: Needs) -> list[Pair]:
    """Return the gradients of the inputs and of their tangents, from the cotangents of r and y."""
    (dr, dt_r), of_y = (Pair(*accumulated(pair)) for pair in cotangents)
    wide = [Pair(*accumulated(pair)) for pair in inputs]
    _, (h, t_h), (gate, t_gate), *_ = wide
    rows = [affine(wide[1], wide[2], wide[0]), *wide[3:]]
    of_rows, *of_norm = norm_dual_backward(of_y, rows, eps, rms, [(True, True), *needs[3:]])
    dr, dt_r = add(dr, of_rows.primal), add(dt_r, of_rows.tangent)
    dh, dt_h = (d if gate is None else times(d, gate) for d in (dr, dt_r))
    dh = add(dh, times(dt_r, t_gate))
    dgate = add(times(dr, h), times(dt_r, t_h))
    grads = [Pair(dr, dt_r), Pair(dh, dt_h), Pair(dgate, times(dt_r, h)), *of_norm]
    return [
        Pair(
            *(
                None if not need or like is None or grad is None else grad.sum_to_size(like.shape).to(like.dtype)
                for grad, need in zip(pair, wanted)
            )
        )
        for pair, (like, _), wanted in zip(grads, inputs, needs, strict=True)
    ]
