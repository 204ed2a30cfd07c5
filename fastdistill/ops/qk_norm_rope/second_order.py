"""Give the formulas of the norm and rotation of queries and keys for derivatives of any order, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdistill.ops.norm import second_order
from fastdistill.ops.protocol.dual_op import Tensors
from fastdistill.ops.protocol.pair import Needs, Pairs, flat, paired
from fastdistill.ops.qk_norm_rope.eager import rotate


def _pairs(primals: Tensors, tangents: Tensors) -> list[Tensor | None]:
    """Arguments of an implementation: primals with their tangents, cos and sin, which have none."""
    for name, t in zip(("cos", "sin"), tangents[6:]):
        if t is not None:
            raise ValueError(f"{name}: expected a constant, got a tensor with a tangent")
    return [*(x for pair in zip(primals[:6], tangents[:6]) for x in pair), *primals[6:]]


def _math(inputs: Pairs, attrs: Sequence[Any]) -> Pairs:
    primals, tangents = zip(*inputs)
    """The formulas of the forward, differentiable any number of times."""
    norm, eps, interleaved, _ = attrs
    dtype = primals[0].dtype
    _pairs(primals, tangents)
    outs, t_outs = [], []
    for side in range(2):
        y, t_y = _wide(primals[side]), _wide(tangents[side])
        if norm != "none":
            (weight, bias), (t_weight, t_bias) = ((_wide(x[2 + side]), _wide(x[4 + side])) for x in (primals, tangents))
            y, t_y = second_order.norm_dual(
                (y, weight, bias, None, None), (t_y, t_weight, t_bias, None, None), eps, norm == "rms"
            )
        assert y is not None
        outs.append(_turned(y, primals, interleaved).to(dtype))
        t_outs.append(None if t_y is None else _turned(t_y, primals, interleaved).to(dtype))
    if any(t is not None for t in t_outs):
        t_outs = [torch.zeros_like(y) if t is None else t for y, t in zip(outs, t_outs)]
    return paired(outs, t_outs)


def _math_backward(cotangents: Pairs, inputs: Pairs, attrs: Sequence[Any], needs: Needs) -> Pairs:
    (d_outs, dt_outs), (primals, tangents), needs = zip(*cotangents), zip(*inputs), flat(needs)
    """The formulas of both backward passes."""
    norm, eps, interleaved, _ = attrs
    grads: list[Tensor | None] = [None] * 16
    for side in range(2):
        wide = (_wide(d_outs[side]), _wide(dt_outs[side]))
        dy, dt_y = (None if d is None else _turned(d, primals, interleaved, back=True) for d in wide)
        at = [side, 2 + side, 4 + side]
        if norm == "none":
            grads[side], grads[8 + side] = dy, dt_y
            continue
        point, direction = ((*(_wide(x[i]) for i in at), None, None) for x in (primals, tangents))
        wanted = [*(needs[i] for i in at), False, False, *(needs[8 + i] for i in at), False, False]
        found = second_order.norm_dual_backward(dy, dt_y, point, direction, eps, norm == "rms", wanted)
        for i, of_primal, of_tangent in zip(at, found[:3], found[5:8]):
            grads[i], grads[8 + i] = of_primal, of_tangent
    grads = [
        None if not need or like is None else torch.zeros_like(like) if grad is None else grad.to(like.dtype)
        for grad, like, need in zip(grads, [*primals, *primals], needs, strict=True)
    ]
    return paired(grads[:8], grads[8:])


def _turned(x: Tensor, primals: Any, interleaved: bool, back: bool = False) -> Tensor:
    cos, sin = (None if a is None else a.to(x.dtype) for a in primals[6:])
    return x if cos is None or sin is None else rotate(x, cos, -sin if back else sin, interleaved)


def _wide(x: Tensor | None) -> Tensor | None:
    """16-bit tensors in float32."""
    return None if x is None else x.to(torch.promote_types(x.dtype, torch.float32))
