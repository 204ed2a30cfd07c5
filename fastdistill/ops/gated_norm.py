"""The fused step between two transformer blocks: the gated residual and the modulated norm of it.

    r = x + gate∘h                       t_r = t_x + t_gate∘h + gate∘t_h
    y = (rh∘w + b)∘(1 + scale) + shift   t_y as of any norm, rh being r normalised

One op with two outputs, `torch.ops.fastdistill.gated_norm`. Derivation and backward passes: kernels/README.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdistill.ops import _choice, _dense
from fastdistill.ops import _functional as F
from fastdistill.ops._dual import DualOp, Spec, Tensors
from fastdistill.ops._norm import Call, check_modulation, choose


def gated_residual_ada_norm(
    x: Tensor,
    gate: Tensor | None,
    h: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    rms: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The gated residual of one block and the modulated norm before the next: both results in one kernel.

    The residual stream x and the block's output h may differ in dtype: a float32 stream beside bfloat16 blocks halves
    the error of a network's tangent. Statistics are taken of the sum before it is rounded.

    Args:
        x: (..., C), the residual stream.
        h: x's shape, what the block adds.
        gate, scale, shift: as many dimensions as x, each broadcastable to it: (B, 1, C) for one vector per example;
            or None, for a gate of one, a scale and a shift of zero.
        weight, bias: (C,), or None.
        eps: added to the variance.
        rms: RMSNorm instead of LayerNorm.
        impl: "auto" | "torch" | "triton"; an explicit choice never falls back.

    Returns:
        (r, y): r in x's dtype, y in h's.

    Equivalent to:
        r = x + gate * h
        y = F.layer_norm(r, r.shape[-1:], weight, bias, eps) * (1 + scale) + shift
    """
    return _Call(x, h, gate, weight, bias, scale, shift, eps, rms, impl).run()


def gated_residual_ada_norm_jvp(
    x: Tensor,
    gate: Tensor | None,
    h: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    t_x: Tensor | None,
    t_gate: Tensor | None = None,
    t_h: Tensor | None = None,
    t_scale: Tensor | None = None,
    t_shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    t_weight: Tensor | None = None,
    t_bias: Tensor | None = None,
    rms: bool = False,
    tangent_grad: bool = False,
    impl: str = "auto",
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """`gated_residual_ada_norm` and its directional derivative: ((r, y), (t_r, t_y)).

    Tangents have their primals' shapes, None is zero. With `tangent_grad=False` gradients flow through r and y only.

    Equivalent to:
        torch.func.jvp(gated_residual_ada_norm, (x, gate, h, scale, shift), (t_x, t_gate, t_h, t_scale, t_shift))
    """
    call = _Call(x, h, gate, weight, bias, scale, shift, eps, rms, impl)
    return call.both((t_x, t_h, t_gate, t_weight, t_bias, t_scale, t_shift), tangent_grad)


class _Call(Call):
    """As its parent, with h like x and the gate like scale and shift."""

    def __init__(
        self,
        x: Tensor,
        h: Tensor,
        gate: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        eps: float,
        rms: bool,
        impl: str,
    ) -> None:
        _choice.check_tensor("x", x)
        super().__init__(x, x.shape[-1:], weight, bias, scale, shift, eps, rms, impl)
        _choice.check_tensor("h", h)
        _choice.check_like("h", h, "x", x, dtype=False)
        if h.shape != x.shape:
            raise ValueError(f"h: expected shape {tuple(x.shape)} as x, got {tuple(h.shape)}")
        if gate is not None:
            _choice.check_tensor("gate", gate)
            _choice.check_like("gate", gate, "x", x, dtype=False)
            check_modulation("gate", gate, x)
        self.named[1:1] = [("h", h), ("gate", gate)]

    def run(self) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """r and y of (possibly dual) tensors."""
        r, y = GATED_NORM(
            [self._canonical(name, value) for name, value in self.named], self.attrs, _choice.tangent_grad()
        )
        assert r is not None and y is not None
        return r.reshape(self.x.shape), y.reshape(self.x.shape)

    def both(
        self, given: Sequence[Tensor | None], tangent_grad: bool
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """((r, y), (t_r, t_y)) along explicit tangents, in the order of `named`."""
        checked = _choice.checked_tangents(
            [(name, value, t) for (name, value), t in zip(self.named, given)], tangent_grad
        )
        primals = [self._canonical(name, value) for name, value in self.named]
        tangents = [self._canonical(name, t) for (name, _), t in zip(self.named, checked)]
        outs, t_outs = GATED_NORM.pair(primals, tangents, self.attrs, tangent_grad)
        r, y, t_r, t_y = (x.reshape(self.x.shape) for x in (*outs, *t_outs))
        return (r, y), (t_r, t_y)


def _choose(x: Tensor, h: Tensor, impl: str) -> str:
    return "torch" if impl == "auto" and h.dtype == torch.float64 else choose(x, impl)


def _forward(
    primals: Tensors, tangents: Tensors, attrs: Sequence[Any], tangent_grad: bool
) -> tuple[Tensors, Tensors, Tensors]:
    (x, h, *_), (eps, rms, impl) = primals, attrs
    assert x is not None and h is not None
    pairs = [a for pair in zip(primals, tangents) for a in pair]
    implementation = _choice.implementation("gated_norm", _choose(x, h, impl))
    r, t_r, y, t_y, mean, rstd = implementation.gated_norm_forward(*pairs, eps=eps, rms=rms)
    return (r, y), (t_r, t_y), (mean, rstd)


def _backward(
    d_outs: Tensors,
    dt_outs: Tensors,
    primals: Tensors,
    tangents: Tensors,
    outs: Tensors,
    t_outs: Tensors,
    residuals: Tensors,
    attrs: Sequence[Any],
    needs: Sequence[bool],
) -> Tensors:
    (dr, dy), (dt_r, dt_y), (x, h, *_), (_, rms, impl) = d_outs, dt_outs, primals, attrs
    assert x is not None and h is not None
    pairs = [a for pair in zip(primals, tangents) for a in pair]
    implementation = _choice.implementation("gated_norm", _choose(x, h, impl))
    grads: Tensors = implementation.gated_norm_backward(
        dr, dt_r, dy, dt_y, *pairs, *residuals, rms=rms, needs=tuple(needs)
    )
    return grads


def _native(primals: Tensors, attrs: Sequence[Any]) -> Tensors | None:
    """PyTorch's own ops, where no implementation was asked for by name and nothing is narrower than float32."""
    x, h, gate, weight, bias, scale, shift = primals
    eps, rms, impl = attrs
    assert x is not None and h is not None
    if impl != "auto" or x.dtype.itemsize < 4 or any(p is not None and p.dtype != x.dtype for p in primals):
        return None
    with _choice.without_autocast(x.device):
        r = x + (h if gate is None else gate * h)
        y = F.rms_norm(r, r.shape[-1:], weight, eps) if rms else F.layer_norm(r, r.shape[-1:], weight, bias, eps)
        y = y if scale is None else y * (1 + scale)
        return r, y if shift is None else y + shift


def _specs(
    primals: Tensors, tangents: Tensors, attrs: Sequence[Any], tangent_grad: bool
) -> tuple[Sequence[Spec], Sequence[Spec]]:
    x, h, *_ = primals
    assert x is not None and h is not None
    row = (tuple(x.shape[:2]), torch.promote_types(torch.promote_types(x.dtype, h.dtype), torch.float32))
    return [(tuple(x.shape), x.dtype), (tuple(x.shape), h.dtype)], [None if attrs[1] else row, row]


def _math(primals: Any, tangents: Any, attrs: Sequence[Any]) -> tuple[Tensors, Tensors]:
    return _dense.gated_norm_dual(primals, tangents, attrs[0], attrs[1])


def _math_backward(
    d_outs: Tensors, dt_outs: Tensors, primals: Any, tangents: Any, attrs: Sequence[Any], needs: list[bool]
) -> Tensors:
    return _dense.gated_norm_dual_backward(d_outs, dt_outs, primals, tangents, attrs[0], attrs[1], needs)


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
