"""Register norms as a dispatcher op under the dual protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdistill.ops.norm import second_order
from fastdistill.ops.protocol import context, dispatch
from fastdistill.ops.protocol import torch_functions as F
from fastdistill.ops.protocol.dual_op import DualOp, Spec, Tensors
from fastdistill.ops.protocol.pair import Needs, Pairs


def choose(x: Tensor, impl: str) -> str:
    """Return the implementation that runs: "torch" or "triton"."""
    if impl != "auto":
        return impl
    fits = x.dtype != torch.float64 and x.shape[-1] <= dispatch.limit("WIDEST_ROW")
    triton_runs = x.device.type == "cuda" and fits
    return "triton" if triton_runs and dispatch.triton_problem(x.device) is None else "torch"


def _module(x: Tensor, impl: str) -> Any:
    return dispatch.implementation("norm", choose(x, impl))


def _forward(inputs: Pairs, attrs: Sequence[Any], tangent_grad: bool) -> tuple[Pairs, Tensors]:
    eps, rms, impl = attrs
    results: tuple[Pairs, Tensors] = _module(inputs[0].primal, impl).norm_forward(inputs, eps=eps, rms=rms)
    return results


def _backward(cotangents: Pairs, inputs: Pairs, saved: Any, attrs: Sequence[Any], needs: Needs) -> Pairs:
    _, rms, impl = attrs
    module = _module(inputs[0].primal, impl)
    grads: Pairs = module.norm_backward(cotangents, inputs, saved, rms=rms, needs=needs)
    return grads


def _native(primals: Sequence[Any], attrs: Sequence[Any]) -> Tensors | None:
    """Call PyTorch's own norm, where no implementation was asked for by name and one dtype runs through.

    A modulated 16-bit norm is not among them: composed, it would round three times where the fused one rounds once.
    """
    x, weight, bias, scale, shift = primals
    eps, rms, impl = attrs
    if impl != "auto" or any(p is not None and p.dtype != x.dtype for p in primals):
        return None
    composed = scale is not None or shift is not None or (rms and bias is not None)
    if composed and x.dtype in (torch.bfloat16, torch.float16):
        return None
    with context.without_autocast(x.device):
        y = native_norm(x, weight, bias, eps, rms)
        y = y if scale is None else y * (1 + scale)
        return (y if shift is None else y + shift,)


def native_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool) -> Tensor:
    """Return PyTorch's own norm over the last dimension; its RMSNorm takes no bias, which is added here."""
    if not rms:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    y = F.rms_norm(x, x.shape[-1:], weight, eps)
    return y if bias is None else y + bias


def _specs(inputs: Pairs, attrs: Sequence[Any], tangent_grad: bool) -> tuple[Sequence[Spec], Sequence[Spec]]:
    x = inputs[0].primal
    row = (tuple(x.shape[:2]), torch.float64 if x.dtype == torch.float64 else torch.float32)
    return [(tuple(x.shape), x.dtype)], [None if attrs[1] else row, row]


def _math(inputs: Pairs, attrs: Sequence[Any]) -> Pairs:
    return [second_order.norm_dual(inputs, attrs[0], attrs[1])]


def _math_backward(cotangents: Pairs, inputs: Pairs, attrs: Sequence[Any], needs: Needs) -> Pairs:
    return second_order.norm_dual_backward(cotangents[0], inputs, attrs[0], attrs[1], needs)


NORM = DualOp(
    name="norm",
    primals=("x", "weight?", "bias?", "scale?", "shift?"),
    outputs=("y",),
    attrs="float eps, bool rms, str impl",
    residuals=("mean", "rstd"),
    forward=_forward,
    backward=_backward,
    math=_math,
    math_backward=_math_backward,
    native=_native,
    specs=_specs,
    broadcastable=frozenset({"scale", "shift"}),
    unfoldable=frozenset({"weight", "bias"}),
    saves_outputs=False,
)
