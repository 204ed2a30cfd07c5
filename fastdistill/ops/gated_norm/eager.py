"""Compute r = x + gate∘h and a norm of r in plain PyTorch, with tangents and both backward passes.

r is kept in float32 (float64 for float64) between the two halves, whatever it is returned in. The rest is
`fastdistill.ops.norm.eager`, whose gradients of its rows join those of r itself: at their sum dr, dx = dr, dh = gate∘dr
and dgate is the sum of h∘dr; the tangents' by the product rule.
"""

from __future__ import annotations

from typing import Any

import torch

from fastdistill.ops.norm.eager import Statistics, backward_block, forward_block, plan
from fastdistill.ops.protocol.pair import (
    ABSENT,
    Needs,
    Pair,
    Pairs,
    add,
    add_product,
    cast,
    moves,
    times,
    without_tangents,
)
from fastdistill.ops.protocol.row_blocks import (
    Gradients,
    Rows,
    accumulator_dtype,
    memories,
    part,
    parts,
    row_blocks,
)


def gated_norm_forward(inputs: Pairs, *, eps: float, rms: bool) -> tuple[list[Pair], Statistics]:
    """Return r = x + gate∘h and its modulated norm y, with tangents: (((r, t_r), (y, t_y)), (mean, rstd)).

    Args:
        inputs: the pairs of x and h (B, T, C), of any strides, of the gate, as scale and shift (B or 1, T or 1, C) or
            None for one, and of weight, bias, scale and shift as in `norm_forward`.
        eps, rms: as there.

    Returns:
        r, t_r in x's dtype, y, t_y in h's, the rest as there; all is computed in float32 (float64 for float64). Both
        tangents are None without any, and neither with one.

    Equivalent to:
        `torch.func.jvp(reference.gated_residual_ada_norm, (x, h, gate, ...), (t_x, t_h, t_gate, ...))`
    """
    (x, _), (h, _), *_ = inputs
    dtype, taken = accumulator_dtype(x, h), memories(inputs)
    r, t_r = (Rows(x.shape, x.dtype, x.device) for _ in range(2))
    y, t_y = (Rows(x.shape, h.dtype, x.device) for _ in range(2))
    mean, rstd = (Rows(x.shape[:-1], dtype, x.device) for _ in range(2))
    for at in row_blocks(x):
        block = parts(inputs, at)
        of_r = _residual(block, dtype)
        of_y, *statistics = forward_block([of_r, *block[3:]], eps=eps, rms=rms, dtype=dtype)
        for result, found in zip((r, t_r, y, t_y, mean, rstd), (*of_r, *of_y, *statistics), strict=True):
            if found is not None:
                result.put(found, at, taken)
    if t_y.whole is not None and t_r.whole is None:
        t_r.whole = x.new_zeros(x.shape)
    return [Pair(r.whole, t_r.whole), Pair(y.whole, t_y.whole)], (mean.whole, rstd.whole)


def gated_norm_backward(
    cotangents: Pairs, inputs: Pairs, saved: tuple[Any, Statistics], *, rms: bool, needs: Needs
) -> list[Pair]:
    """Return the gradients of <dr, r> + <dt_r, t_r> + <dy, y> + <dt_y, t_y>, in pairs as `needs`.

    Args:
        cotangents: (dr, dt_r) and (dy, dt_y). Any may be None, but not all; without dt_r and dt_y no tangent is read.
        inputs, rms: as in `gated_norm_forward`.
        saved: its outputs, which aren't read, and mean and rstd.
        needs: which gradients are wanted, in the order of the inputs; the others are None.

    Returns:
        (dx, dt_x), (dh, dt_h), (dgate, dt_gate), ..., each in the shape and dtype of its argument.

    Raises:
        ValueError: there is no cotangent.
    """
    if all(d is None for pair in cotangents for d in pair):
        raise ValueError("dr: expected a tensor where dt_r, dy and dt_y are None, got None")
    primal = not moves(cotangents)
    inputs = without_tangents(inputs) if primal else inputs
    (x, _), *_, (scale, _), (shift, _) = inputs
    mean, rstd = saved[1]
    assert rstd is not None
    grads = Gradients(inputs, needs, x, cotangents)
    blocks, centred = plan(x, scale, shift, mean, rstd, primal=primal)
    for at in blocks:
        statistics = (part(mean, at), part(rstd, at))
        options: dict[str, Any] = {"rms": rms, "needs": needs, "centred": centred}
        grads.put(_gradients(parts(cotangents, at), parts(inputs, at), statistics, **options), at)
    return grads.results()


def _gradients(
    cotangents: Pairs, inputs: Pairs, statistics: Statistics, *, rms: bool, needs: Needs, centred: bool
) -> list[Pair]:
    """Return the gradients at some rows; None is zero, or was not asked for."""
    of_r, of_y = cotangents
    dtype: Any = None if statistics[1] is None else statistics[1].dtype
    before = [any(need) for need in zip(*needs[:3])]
    found = [ABSENT] * 5
    if of_y.primal is not None or of_y.tangent is not None:
        wanted = [(any(before), of_y.tangent is not None and any(before)), *needs[3:]]
        rows = [_residual(inputs, dtype), *inputs[3:]]
        found = backward_block(of_y, rows, statistics, rms=rms, needs=wanted, centred=centred)
    dr, dt_r = (add(grad, cast(d, dtype)) for grad, d in zip(found[0], of_r))
    (h, t_h), (gate, t_gate) = (Pair(cast(x, dtype), cast(t, dtype)) for x, t in inputs[1:3])
    dh, dt_h = (d if gate is None else times(d, gate) for d in (dr, dt_r))
    dh = add(dh, times(dt_r, t_gate))
    of_gate = ABSENT if gate is None else Pair(add(times(dr, h), times(dt_r, t_h)), times(dt_r, h))
    return [Pair(dr, dt_r), Pair(dh, dt_h), of_gate, *found[1:]]


def _residual(inputs: Pairs, dtype: torch.dtype) -> Pair:
    """Return r and its tangent, in `dtype`."""
    (x, t_x), (h, t_h), (gate, t_gate) = (Pair(cast(x, dtype), cast(t, dtype)) for x, t in inputs[:3])
    if gate is None:
        return Pair(x + h, add(t_x, t_h))
    return Pair(torch.addcmul(x, gate, h), add_product(add_product(t_x, t_gate, h), gate, t_h))
