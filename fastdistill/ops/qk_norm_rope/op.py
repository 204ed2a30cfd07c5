"""Register the norm and rotation of queries and keys as a dispatcher op under the dual protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdistill.ops.protocol import dispatch
from fastdistill.ops.protocol.dual_op import DualOp, Spec, Tensors
from fastdistill.ops.protocol.pair import Needs, Pairs
from fastdistill.ops.qk_norm_rope.second_order import check_angles, qk_norm_rope_dual, qk_norm_rope_dual_backward


def choose(q: Tensor, impl: str) -> str:
    """Return the implementation that runs: "torch" or "triton"."""
    if impl != "auto":
        return impl
    fits = q.dtype != torch.float64 and q.shape[-1] <= dispatch.limit("WIDEST_ROTATED_HEAD")
    triton_runs = q.device.type == "cuda" and fits
    return "triton" if triton_runs and dispatch.triton_problem(q.device) is None else "torch"


def _module(inputs: Pairs, impl: str) -> Any:
    return dispatch.implementation("qk_norm_rope", choose(inputs[0].primal, impl))


def _options(attrs: Sequence[Any]) -> dict[str, Any]:
    return dict(zip(("norm", "eps", "interleaved"), attrs))


def _forward(inputs: Pairs, attrs: Sequence[Any], tangent_grad: bool) -> tuple[Pairs, Tensors]:
    check_angles(inputs)
    results: tuple[Pairs, Tensors] = _module(inputs, attrs[-1]).qk_norm_rope_forward(inputs, **_options(attrs))
    return results


def _backward(cotangents: Pairs, inputs: Pairs, saved: Any, attrs: Sequence[Any], needs: Needs) -> Pairs:
    check_angles(inputs)
    module = _module(inputs, attrs[-1])
    grads: Pairs = module.qk_norm_rope_backward(cotangents, inputs, saved, **_options(attrs), needs=needs)
    return grads


def _native(primals: Tensors, attrs: Sequence[Any]) -> Tensors | None:
    """Return None: PyTorch has no such op."""
    return None


def _specs(inputs: Pairs, attrs: Sequence[Any], tangent_grad: bool) -> tuple[Sequence[Spec], Sequence[Spec]]:
    return [(tuple(x.shape), x.dtype) for x, _ in inputs[:2]], []


QK_NORM_ROPE = DualOp(
    name="qk_norm_rope",
    primals=("q", "k", "q_weight?", "k_weight?", "q_bias?", "k_bias?", "cos?", "sin?"),
    outputs=("q_out", "k_out"),
    attrs="str norm, float eps, bool interleaved, str impl",
    residuals=(),
    forward=_forward,
    backward=_backward,
    math=qk_norm_rope_dual,
    math_backward=qk_norm_rope_dual_backward,
    native=_native,
    specs=_specs,
    broadcastable=frozenset({"cos", "sin"}),
    unfoldable=frozenset({"q_weight", "k_weight", "q_bias", "k_bias"}),
    saves_outputs=False,
)
