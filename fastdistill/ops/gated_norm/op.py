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
from fastdistill.ops.protocol.pair import Needs, Pairs, flat, paired


def _choose(x: Tensor, h: Tensor, impl: str) -> str:
    return "torch" if impl == "auto" and h.dtype == torch.float64 else choose(x, impl)


def _forward(inputs: Pairs, attrs: Sequence[Any], tangent_grad: bool) -> tuple[Pairs, Tensors]:
    primals, tangents = zip(*inputs)
    (x, h, *_), (eps, rms, impl) = primals, attrs
    assert x is not None and h is not None
    pairs = [a for pair in zip(primals, tangents) for a in pair]
    implementation = dispatch.implementation("gated_norm", _choose(x, h, impl))
    r, t_r, y, t_y, mean, rstd = implementation.gated_norm_forward(*pairs, eps=eps, rms=rms)
    return paired([r, y], [t_r, t_y]), (mean, rstd)


def _backward(
    cotangents: Pairs, inputs: Pairs, saved: tuple[Pairs, Tensors], attrs: Sequence[Any], needs: Needs
) -> Pairs:
    (d_outs, dt_outs), (primals, tangents), residuals = zip(*cotangents), zip(*inputs), saved[1]
    needs = flat(needs)
    (dr, dy), (dt_r, dt_y), (x, h, *_), (_, rms, impl) = d_outs, dt_outs, primals, attrs
    assert x is not None and h is not None
    pairs = [a for pair in zip(primals, tangents) for a in pair]
    implementation = dispatch.implementation("gated_norm", _choose(x, h, impl))
    grads: Tensors = implementation.gated_norm_backward(
        dr, dt_r, dy, dt_y, *pairs, *residuals, rms=rms, needs=tuple(needs)
    )
    return paired(grads[:7], grads[7:])


def _native(primals: Tensors, attrs: Sequence[Any]) -> Tensors | None:
    """PyTorch's own ops, where no implementation was asked for by name and nothing is narrower than float32."""
    x, h, gate, weight, bias, scale, shift = primals
    eps, rms, impl = attrs
    assert x is not None and h is not None
    if impl != "auto" or x.dtype.itemsize < 4 or any(p is not None and p.dtype != x.dtype for p in primals):
        return None
    with context.without_autocast(x.device):
        r = x + (h if gate is None else gate * h)
        y = native_norm(r, weight, bias, eps, rms)
        y = y if scale is None else y * (1 + scale)
        return r, y if shift is None else y + shift


def _specs(inputs: Pairs, attrs: Sequence[Any], tangent_grad: bool) -> tuple[Sequence[Spec], Sequence[Spec]]:
    primals = [x for x, _ in inputs]
    x, h, *_ = primals
    assert x is not None and h is not None
    row = (tuple(x.shape[:2]), torch.promote_types(torch.promote_types(x.dtype, h.dtype), torch.float32))
    return [(tuple(x.shape), x.dtype), (tuple(x.shape), h.dtype)], [None if attrs[1] else row, row]


def _math(inputs: Pairs, attrs: Sequence[Any]) -> Pairs:
    primals, tangents = zip(*inputs)
    return paired(*second_order.gated_norm_dual(primals, tangents, attrs[0], attrs[1]))


def _math_backward(cotangents: Pairs, inputs: Pairs, attrs: Sequence[Any], needs: Needs) -> Pairs:
    (d_outs, dt_outs), (primals, tangents), needs = zip(*cotangents), zip(*inputs), flat(needs)
    grads = second_order.gated_norm_dual_backward(d_outs, dt_outs, primals, tangents, attrs[0], attrs[1], needs)
    return paired(grads[:7], grads[7:])


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
