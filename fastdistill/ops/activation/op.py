"""Register activations as a dispatcher op under the dual protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdistill.ops.activation import eager
from fastdistill.ops.activation.second_order import _math, _math_backward
from fastdistill.ops.protocol import dispatch
from fastdistill.ops.protocol.dual_op import DualOp, Spec, Tensors
from fastdistill.ops.protocol.pair import Needs, Pairs, flat, paired


def choose(x: Tensor, impl: str) -> str:
    """The implementation that runs: "torch" or "triton"."""
    if impl != "auto":
        return impl
    triton_runs = x.device.type == "cuda" and x.dtype != torch.float64
    return "triton" if triton_runs and dispatch.triton_problem(x.device) is None else "torch"


def _forward(inputs: Pairs, attrs: Sequence[Any], tangent_grad: bool) -> tuple[Pairs, Tensors]:
    primals, tangents = zip(*inputs)
    (x, up), (t_x, t_up), (kind, impl) = primals, tangents, attrs
    assert x is not None
    module = dispatch.implementation("activation", choose(x, impl))
    y, t_y = module.activation_forward(x, t_x, up, t_up, kind=kind)
    return paired([y], [t_y]), ()


def _backward(
    cotangents: Pairs, inputs: Pairs, saved: tuple[Pairs, Tensors], attrs: Sequence[Any], needs: Needs
) -> Pairs:
    (d_outs, dt_outs), (primals, tangents) = zip(*cotangents), zip(*inputs)
    needs = flat(needs)
    (dy,), (dt_y,), (x, up), (t_x, t_up), (kind, impl) = d_outs, dt_outs, primals, tangents, attrs
    assert x is not None
    module = dispatch.implementation("activation", choose(x, impl))
    grads: Tensors = module.activation_backward(dy, dt_y, x, t_x, up, t_up, kind=kind, needs=tuple(needs))
    return paired(grads[:2], grads[2:])


def _native(primals: Tensors, attrs: Sequence[Any]) -> Tensors | None:
    """PyTorch's own activation, where no implementation was asked for by name.

    The gated forms are not among them where ours is one kernel, or rounds once and PyTorch twice.
    """
    (x, up), (kind, impl) = primals, attrs
    assert x is not None
    narrow = x.dtype in (torch.bfloat16, torch.float16)
    if impl != "auto" or (up is not None and (narrow or choose(x, impl) == "triton")):
        return None
    y = eager.phi(x, kind)
    return (y if up is None else y * up,)


def _specs(inputs: Pairs, attrs: Sequence[Any], tangent_grad: bool) -> tuple[Sequence[Spec], Sequence[Spec]]:
    primals = [x for x, _ in inputs]
    x = primals[0]
    assert x is not None
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
