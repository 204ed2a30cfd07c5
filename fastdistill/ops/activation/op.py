"""Register activations as a dispatcher op under the dual protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdistill.ops.activation import eager, second_order
from fastdistill.ops.protocol import dispatch
from fastdistill.ops.protocol.dual_op import DualOp, Spec, Tensors
from fastdistill.ops.protocol.pair import Needs, Pairs


def choose(x: Tensor, impl: str) -> str:
    """Return the implementation that runs: "torch" or "triton"."""
    if impl != "auto":
        return impl
    triton_runs = x.device.type == "cuda" and x.dtype != torch.float64
    return "triton" if triton_runs and dispatch.triton_problem(x.device) is None else "torch"


def _module(inputs: Pairs, impl: str) -> Any:
    """Return the module of the implementation that runs."""
    return dispatch.implementation("activation", choose(inputs[0][0], impl))


def _forward(inputs: Pairs, attrs: Sequence[Any], tangent_grad: bool) -> tuple[Pairs, Tensors]:
    kind, impl = attrs
    results: tuple[Pairs, Tensors] = _module(inputs, impl).activation_forward(inputs, kind=kind)
    return results


def _backward(
    cotangents: Pairs, inputs: Pairs, saved: tuple[Pairs, Tensors], attrs: Sequence[Any], needs: Needs
) -> Pairs:
    kind, impl = attrs
    module = _module(inputs, impl)
    gradients: Pairs = module.activation_backward(cotangents, inputs, saved, kind=kind, needs=needs)
    return gradients


def _math(inputs: Pairs, attrs: Sequence[Any]) -> Pairs:
    return second_order.activation_dual(inputs, kind=attrs[0])


def _math_backward(cotangents: Pairs, inputs: Pairs, attrs: Sequence[Any], needs: Needs) -> Pairs:
    return second_order.activation_dual_backward(cotangents, inputs, kind=attrs[0], needs=needs)


def _native(primals: Tensors, attrs: Sequence[Any]) -> Tensors | None:
    """Return what PyTorch's own activation gives, where no implementation was asked for by name.

    The gated forms are left to ours where ours is one kernel, or rounds once and PyTorch twice.
    """
    (x, up), (kind, impl) = primals, attrs
    assert x is not None
    narrow = x.dtype in (torch.bfloat16, torch.float16)
    if impl != "auto" or (up is not None and (narrow or choose(x, impl) == "triton")):
        return None
    y = eager.phi(x, kind)
    return (y if up is None else y * up,)


def _specs(inputs: Pairs, attrs: Sequence[Any], tangent_grad: bool) -> tuple[Sequence[Spec], Sequence[Spec]]:
    x, _ = inputs[0]
    return [(tuple(x.shape), x.dtype)], []


ACTIVATION = DualOp(
    name="activation",
    primals=("x", "up?"),
    outputs=("y",),
    attrs="str kind, str impl",
    residuals=(),
    forward=_forward,
    backward=_backward,
    math=_math,
    math_backward=_math_backward,
    native=_native,
    specs=_specs,
    saves_outputs=False,
)
