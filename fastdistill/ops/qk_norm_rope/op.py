"""Register the norm and rotation of queries and keys as a dispatcher op under the dual protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdistill.ops.protocol import dispatch
from fastdistill.ops.protocol.dual_op import DualOp, Spec, Tensors
from fastdistill.ops.protocol.pair import Needs, Pairs, flat, paired
from fastdistill.ops.qk_norm_rope.second_order import _math, _math_backward, _pairs

MAX_TRITON_HEAD = 512


def choose(q: Tensor, impl: str) -> str:
    """The implementation that runs: "torch" or "triton"."""
    if impl != "auto":
        return impl
    triton_runs = q.device.type == "cuda" and q.dtype != torch.float64 and q.shape[-1] <= MAX_TRITON_HEAD
    return "triton" if triton_runs and dispatch.triton_problem(q.device) is None else "torch"


def _forward(inputs: Pairs, attrs: Sequence[Any], tangent_grad: bool) -> tuple[Pairs, Tensors]:
    primals, tangents = zip(*inputs)
    norm, eps, interleaved, impl = attrs
    assert primals[0] is not None
    implementation = dispatch.implementation("qk_norm_rope", choose(primals[0], impl))
    q, t_q, k, t_k = implementation.qk_norm_rope_forward(
        *_pairs(primals, tangents), norm=norm, eps=eps, interleaved=interleaved
    )
    return paired([q, k], [t_q, t_k]), ()


def _backward(
    cotangents: Pairs, inputs: Pairs, saved: tuple[Pairs, Tensors], attrs: Sequence[Any], needs: Needs
) -> Pairs:
    (d_outs, dt_outs), (primals, tangents) = zip(*cotangents), zip(*inputs)
    needs = flat(needs)
    norm, eps, interleaved, impl = attrs
    assert primals[0] is not None
    cotangents = [d for pair in zip(d_outs, dt_outs) for d in pair]
    implementation = dispatch.implementation("qk_norm_rope", choose(primals[0], impl))
    grads = implementation.qk_norm_rope_backward(
        *cotangents,
        *_pairs(primals, tangents),
        norm=norm,
        eps=eps,
        interleaved=interleaved,
        needs=(*needs[:6], *needs[8:14]),
    )
    return paired([*grads[:6], None, None], [*grads[6:], None, None])


def _native(primals: Tensors, attrs: Sequence[Any]) -> Tensors | None:
    """PyTorch has no such op."""
    return None


def _specs(inputs: Pairs, attrs: Sequence[Any], tangent_grad: bool) -> tuple[Sequence[Spec], Sequence[Spec]]:
    primals = [x for x, _ in inputs]
    return [(tuple(x.shape), x.dtype) for x in primals[:2] if x is not None], []


QK_NORM_ROPE = DualOp(
    name="qk_norm_rope",
    primals=("q", "k", "q_weight?", "k_weight?", "q_bias?", "k_bias?", "cos?", "sin?"),
    outputs=("q_out", "k_out"),
    attrs="str norm, float eps, bool interleaved, str impl",
    residuals=(),
    forward=_forward,
    backward=_backward,
    math=_math,
    math_backward=_math_backward,
    native=_native,
    specs=_specs,
    broadcastable=frozenset({"cos", "sin"}),
    unfoldable=frozenset({"q_weight", "k_weight", "q_bias", "k_bias"}),
    saves_outputs=False,
)
