"""Register the gated residual with its norm as a dispatcher op under the dual protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdistill.ops.gated_norm import second_order
from fastdistill.ops.norm.op import choose, native_norm
from fastdistill.ops.protocol import context, dispatch
from fastdistill.ops.protocol.dual_op import DualOp, Spec, Tensors
from fastdistill.ops.protocol.pair import Needs, Pairs


def _choose(x: Tensor, h: Tensor, impl: str) -> str:
    return "torch" if impl == "auto" and h.dtype == torch.float64 else choose(x, impl)


def _module(inputs: Pairs, impl: str) -> Any:
    return dispatch.implementation("gated_norm", _choose(inputs[0].primal, inputs[1].primal, impl))


def _forward(inputs: Pairs, attrs: Sequence[Any], tangent_grad: bool) -> tuple[Pairs, Tensors]:
    eps, rms, impl = attrs
    results: tuple[Pairs, Tensors] = _module(inputs, impl).gated_norm_forward(inputs, eps=eps, rms=rms)
    return results


def _backward(cotangents: Pairs, inputs: Pairs, saved: Any, attrs: Sequence[Any], needs: Needs) -> Pairs:
    _, rms, impl = attrs
    module = _module(inputs, impl)
    grads: Pairs = module.gated_norm_backward(cotangents, inputs, saved, rms=rms, needs=needs)
    return grads


def _native(primals: Sequence[Any], attrs: Sequence[Any]) -> Tensors | None:
    """Call PyTorch's own ops, where no implementation was asked for by name and nothing is narrower than float32."""
    x, h, gate, weight, bias, scale, shift = primals
    eps, rms, impl = attrs
    if impl != "auto" or x.dtype.itemsize < 4 or any(p is not None and p.dtype != x.dtype for p in primals):
        return None
    with context.without_autocast(x.device):
        r = x + (h if gate is None else gate * h)
        y = native_norm(r, weight, bias, eps, rms)
        y = y if scale is None else y * (1 + scale)
        return r, y if shift is None else y + shift


def _specs(inputs: Pairs, attrs: Sequence[Any], tangent_grad: bool) -> tuple[Sequence[Spec], Sequence[Spec]]:
    (x, _), (h, _), *_ = inputs
    row = (tuple(x.shape[:2]), torch.promote_types(torch.promote_types(x.dtype, h.dtype), torch.float32))
    return [(tuple(x.shape), x.dtype), (tuple(x.shape), h.dtype)], [None if attrs[1] else row, row]


def _math(inputs: Pairs, attrs: Sequence[Any]) -> Pairs:
    return second_order.gated_norm_dual(inputs, attrs[0], attrs[1])


def _math_backward(cotangents: Pairs, inputs: Pairs, attrs: Sequence[Any], needs: Needs) -> Pairs:
    return second_order.gated_norm_dual_backward(cotangents, inputs, attrs[0], attrs[1], needs)


GATED_NORM = DualOp(
    name="gated_norm",
    primals=("x", "h", "gate?", "weight?", "bias?", "scale?", "shift?"),
    outputs=("r", "y"),
    attrs="float eps, bool rms, str impl",
    residuals=("mean", "rstd"),
    forward=_forward,
    backward=_backward,
    math=_math,
    math_backward=_math_backward,
    native=_native,
    specs=_specs,
    broadcastable=frozenset({"gate", "scale", "shift"}),
    unfoldable=frozenset({"weight", "bias"}),
    saves_outputs=False,
)
