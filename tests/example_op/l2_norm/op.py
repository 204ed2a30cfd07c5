"""Register the L2 norm as a dispatcher op under the dual protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdistill.ops.l2_norm.second_order import l2_norm_dual, l2_norm_dual_backward
from fastdistill.ops.protocol import dispatch
from fastdistill.ops.protocol.dual_op import DualOp, Spec, Tensors
from fastdistill.ops.protocol.pair import Needs, Pairs


def choose(x: Tensor, impl: str) -> str:
    """Return the implementation that runs: "torch" or "triton"."""
    if impl != "auto":
        return impl
    triton_runs = x.device.type == "cuda" and x.dtype != torch.float64
    return "triton" if triton_runs and dispatch.triton_problem(x.device) is None else "torch"


def _module(inputs: Pairs, attrs: Sequence[Any]) -> Any:
    return dispatch.implementation("l2_norm", choose(inputs[0].primal, attrs[1]))


def _forward(inputs: Pairs, attrs: Sequence[Any], tangent_grad: bool) -> tuple[Pairs, Tensors]:
    results: tuple[Pairs, Tensors] = _module(inputs, attrs).l2_norm_forward(inputs, eps=attrs[0])
    return results


def _backward(cotangents: Pairs, inputs: Pairs, saved: Any, attrs: Sequence[Any], needs: Needs) -> Pairs:
    module = _module(inputs, attrs)
    grads: Pairs = module.l2_norm_backward(cotangents, inputs, saved, eps=attrs[0], needs=needs)
    return grads


def _native(primals: Sequence[Any], attrs: Sequence[Any]) -> None:
    """Return None: PyTorch has no such op."""


def _specs(inputs: Pairs, attrs: Sequence[Any], tangent_grad: bool) -> tuple[Sequence[Spec], Sequence[Spec]]:
    x = inputs[0].primal
    return [(tuple(x.shape), x.dtype)], []


L2_NORM = DualOp(
    name="l2_norm",
    primals=("x",),
    outputs=("y",),
    attrs="float eps, str impl",
    residuals=(),
    forward=_forward,
    backward=_backward,
    math=l2_norm_dual,
    math_backward=l2_norm_dual_backward,
    native=_native,
    specs=_specs,
    saves_outputs=False,
)
