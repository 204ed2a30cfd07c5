"""Register linear layers as a dispatcher op under the dual protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastdistill.ops.linear import eager, second_order
from fastdistill.ops.protocol import context
from fastdistill.ops.protocol import torch_functions as F
from fastdistill.ops.protocol.dual_op import DualOp, Spec, Tensors
from fastdistill.ops.protocol.pair import Needs, Pairs


def _forward(inputs: Pairs, attrs: Sequence[Any], tangent_grad: bool) -> tuple[Pairs, Tensors]:
    return eager.linear_forward(inputs)


def _backward(
    cotangents: Pairs, inputs: Pairs, saved: tuple[Pairs, Tensors], attrs: Sequence[Any], needs: Needs
) -> Pairs:
    return eager.linear_backward(cotangents, inputs, saved, needs=needs)


def _math(inputs: Pairs, attrs: Sequence[Any]) -> Pairs:
    return second_order.linear_dual(inputs)


def _math_backward(cotangents: Pairs, inputs: Pairs, attrs: Sequence[Any], needs: Needs) -> Pairs:
    return second_order.linear_dual_backward(cotangents, inputs, needs=needs)


def _native(primals: Tensors, attrs: Sequence[Any]) -> Tensors | None:
    x, weight, bias = primals
    assert x is not None and weight is not None
    with context.without_autocast(x.device):
        return (F.linear(x, weight, bias),)


def _specs(inputs: Pairs, attrs: Sequence[Any], tangent_grad: bool) -> tuple[Sequence[Spec], Sequence[Spec]]:
    (x, _), (weight, _), _ = inputs
    return [((*x.shape[:-1], weight.shape[0]), x.dtype)], []


LINEAR = DualOp(
    name="linear",
    primals=("x", "weight", "bias?"),
    outputs=("y",),
    attrs="str impl",
    residuals=(),
    forward=_forward,
    backward=_backward,
    math=_math,
    math_backward=_math_backward,
    native=_native,
    specs=_specs,
    unfoldable=frozenset({"weight", "bias"}),
    saves_outputs=False,
)
