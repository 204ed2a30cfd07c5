"""Give the formulas of the norm and rotation of queries and keys for derivatives of any order, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdistill.ops.norm import second_order
from fastdistill.ops.protocol.pair import ABSENT, Needs, Pair, Pairs, cast, moves
from fastdistill.ops.qk_norm_rope.eager import rotate


def check_angles(inputs: Pairs) -> None:
    """Raise ValueError where an angle moves."""
    for name, (_, tangent) in zip(("cos", "sin"), inputs[6:]):
        if tangent is not None:
            raise ValueError(f"{name}: expected a constant, got a tensor with a tangent")


def qk_norm_rope_dual(inputs: Pairs, attrs: Sequence[Any]) -> list[Pair]:
    """Return (q_out, t_q_out) and (k_out, t_k_out)."""
    norm, eps, interleaved, _ = attrs
    check_angles(inputs)
    dtype, outs = inputs[0].primal.dtype, []
    for side in range(2):
        y, weight, bias = _wide(inputs[side:6:2])
        if norm != "none":
            y = second_order.norm_dual([y, weight, bias, ABSENT, ABSENT], eps, norm == "rms")
        outs.append(Pair(*(None if x is None else _turned(x, inputs, interleaved).to(dtype) for x in y)))
    if moves(outs):
        outs = [Pair(y, torch.zeros_like(y) if t is None else t) for y, t in outs]
    return outs


def qk_norm_rope_dual_backward(cotangents: Pairs, inputs: Pairs, attrs: Sequence[Any], needs: Needs) -> list[Pair]:
    """Return the gradients of the inputs and of their tangents; cos and sin have none."""
    norm, eps, interleaved, _ = attrs
    grads = [ABSENT] * 8
    for side in range(2):
        (wide,) = _wide([cotangents[side]])
        of_y = Pair(*(None if d is None else _turned(d, inputs, interleaved, back=True) for d in wide))
        if norm == "none":
            grads[side] = of_y
            continue
        rows, none = [*_wide(inputs[side:6:2]), ABSENT, ABSENT], (False, False)
        wanted = [*needs[side:6:2], none, none]
        found = second_order.norm_dual_backward(of_y, rows, eps, norm == "rms", wanted)
        grads[side:6:2] = found[:3]
    return [
        Pair(*(_filled(grad, like, need) for grad, need in zip(pair, wanted)))
        for pair, (like, _), wanted in zip(grads, inputs, needs, strict=True)
    ]


def _filled(grad: Tensor | None, like: Tensor | None, need: bool) -> Tensor | None:
    if not need or like is None:
        return None
    return torch.zeros_like(like) if grad is None else grad.to(like.dtype)


def _turned(x: Tensor, inputs: Pairs, interleaved: bool, back: bool = False) -> Tensor:
    cos, sin = (cast(a, x.dtype) for a, _ in inputs[6:])
    return x if cos is None or sin is None else rotate(x, cos, -sin if back else sin, interleaved)


def _wide(pairs: Pairs) -> list[Pair]:
    """Return 16-bit tensors in float32."""
    return [Pair(*(None if x is None else x.to(torch.promote_types(x.dtype, torch.float32)) for x in p)) for p in pairs]
