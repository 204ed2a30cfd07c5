"""LayerNorm, RMSNorm and their modulated forms, whose primal and tangent run as one kernel.

    xh = (x - mean) rstd                 t_xh = rstd (t_x - mean t_x - xh mean(xh∘t_x))      RMSNorm: without the means
    y = (xh∘w + b)∘(1 + scale) + shift   t_y by the product rule

All of them are one op, `torch.ops.fastdistill.norm`. Derivation and backward passes: kernels/README.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdistill.ops import _choice, _dense
from fastdistill.ops._dual import DualOp, Spec, Tensors

MAX_TRITON_WIDTH = 8192


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    impl: str = "auto",
) -> Tensor:
    """`torch.nn.functional.layer_norm`, one kernel for primal and tangent under forward AD.

    Args:
        x: (..., *normalized_shape), float64, float32, bfloat16 or float16; statistics are taken in float32 or better.
        normalized_shape: the trailing dimensions to normalise over.
        weight, bias: of shape `normalized_shape`, or None.
        eps: added to the variance.
        impl: "auto" | "torch" | "triton"; an explicit choice never falls back.

    Returns:
        x's shape and dtype.

    Equivalent to:
        F.layer_norm(x, normalized_shape, weight, bias, eps)
    """
    return _Call(x, normalized_shape, weight, bias, None, None, eps, False, impl).run()


def layer_norm_jvp(
    x: Tensor,
    t_x: Tensor | None,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    t_weight: Tensor | None = None,
    t_bias: Tensor | None = None,
    tangent_grad: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """LayerNorm and its directional derivative; tangents have their primals' shapes, None is zero.

    With `tangent_grad=False` gradients flow through `y` only and nothing is saved for `t_y`.

    Returns:
        (y, t_y), both of x's shape and dtype.

    Equivalent to:
        torch.func.jvp(lambda x, w, b: F.layer_norm(x, normalized_shape, w, b, eps), (x, w, b), (t_x, t_w, t_b))
    """
    call = _Call(x, normalized_shape, weight, bias, None, None, eps, False, impl)
    return call.pair(t_x, t_weight, t_bias, None, None, tangent_grad)


def rms_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """`torch.nn.functional.rms_norm`, one kernel for primal and tangent under forward AD.

    Arguments as in `layer_norm`; `eps=None` is the machine epsilon of x's dtype, as in PyTorch.

    Equivalent to:
        F.rms_norm(x, normalized_shape, weight, eps)
    """
    return _Call(x, normalized_shape, weight, None, None, None, _default_eps(x, eps), True, impl).run()


def rms_norm_jvp(
    x: Tensor,
    t_x: Tensor | None,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    t_weight: Tensor | None = None,
    tangent_grad: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """RMSNorm and its directional derivative; tangents have their primals' shapes, None is zero.

    Equivalent to:
        torch.func.jvp(lambda x, w: F.rms_norm(x, normalized_shape, w, eps), (x, w), (t_x, t_w))
    """
    call = _Call(x, normalized_shape, weight, None, None, None, _default_eps(x, eps), True, impl)
    return call.pair(t_x, t_weight, None, None, None, tangent_grad)


def ada_layer_norm(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    impl: str = "auto",
) -> Tensor:
    """LayerNorm over the last dimension, then the modulation of adaptive LayerNorm (DiT, Peebles & Xie 2023, §3.2).

    Args:
        x: (..., C).
        scale, shift: as many dimensions as x, each broadcastable to it: (B, 1, C) for one vector per example.
        weight, bias: (C,), or None.
        eps: added to the variance.
        impl: "auto" | "torch" | "triton"; an explicit choice never falls back.

    Returns:
        x's shape and dtype.

    Equivalent to:
        F.layer_norm(x, x.shape[-1:], weight, bias, eps) * (1 + scale) + shift
    """
    return _Call(x, x.shape[-1:], weight, bias, scale, shift, eps, False, impl).run()


def ada_layer_norm_jvp(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    t_x: Tensor | None,
    t_scale: Tensor | None = None,
    t_shift: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    *,
    t_weight: Tensor | None = None,
    t_bias: Tensor | None = None,
    tangent_grad: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`ada_layer_norm` and its directional derivative; tangents have their primals' shapes, None is zero.

    Equivalent to:
        torch.func.jvp(ada_layer_norm, (x, scale, shift, weight, bias), (t_x, t_scale, t_shift, t_weight, t_bias))
    """
    call = _Call(x, x.shape[-1:], weight, bias, scale, shift, eps, False, impl)
    return call.pair(t_x, t_weight, t_bias, t_scale, t_shift, tangent_grad)


class _Call:
    """One call: arguments checked by name and brought to x (B, T, C), weight (C,), scale (B|1, T|1, C)."""

    def __init__(
        self,
        x: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None,
        bias: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        eps: float,
        rms: bool,
        impl: str,
    ) -> None:
        _choice.check_tensor("x", x)
        if isinstance(normalized_shape, int):
            raise TypeError(f"normalized_shape: expected a sequence such as ({normalized_shape},), got an int")
        self.normalized = tuple(normalized_shape)
        if not self.normalized or tuple(x.shape[-len(self.normalized) :]) != self.normalized:
            raise ValueError(
                f"normalized_shape: expected the last dimensions of x {tuple(x.shape)}, got {self.normalized}"
            )
        self.named = [("x", x), ("weight", weight), ("bias", bias), ("scale", scale), ("shift", shift)]
        for name, value in self.named[1:3]:
            if value is not None and tuple(value.shape) != self.normalized:
                raise ValueError(f"{name}: expected shape {self.normalized}, got {tuple(value.shape)}")
        for name, value in self.named[3:]:
            if value is not None:
                _check_modulation(name, value, x)
        for name, value in self.named[1:]:
            if value is not None:
                _choice.check_tensor(name, value)
                _choice.check_like(name, value, "x", x, dtype=False)
        _choice.check_impl(impl, x.device)
        self.x, self.attrs = x, (float(eps), rms, impl)

    def run(self) -> Tensor:
        primals = [self._canonical(name, value) for name, value in self.named]
        (y,) = NORM(primals, self.attrs, _choice.tangent_grad())
        assert y is not None
        return y.reshape(self.x.shape)

    def pair(
        self,
        t_x: Tensor | None,
        t_weight: Tensor | None,
        t_bias: Tensor | None,
        t_scale: Tensor | None,
        t_shift: Tensor | None,
        tangent_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        given = (t_x, t_weight, t_bias, t_scale, t_shift)
        checked = _choice.checked_tangents(
            [(name, value, t) for (name, value), t in zip(self.named, given)], tangent_grad
        )
        primals = [self._canonical(name, value) for name, value in self.named]
        tangents = [self._canonical(name, t) for (name, _), t in zip(self.named, checked)]
        (y,), (t_y,) = NORM.pair(primals, tangents, self.attrs, tangent_grad)
        return y.reshape(self.x.shape), t_y.reshape(self.x.shape)

    def _canonical(self, name: str, value: Tensor | None) -> Tensor | None:
        """x as (B, T, C), T the tokens that share a modulation; scale and shift as (B|1, T|1, C)."""
        if value is None:
            return None
        if name in ("weight", "bias"):
            return value.flatten()
        rows, kept = self.x.dim() - len(self.normalized), value.dim() - len(self.normalized)
        value = value.flatten(kept) if len(self.normalized) > 1 else value
        if rows == 0:
            return value[None, None]
        if rows == 1:
            return value.unsqueeze(1)
        if rows == 2:
            return value
        tokens = value.shape[1:rows]
        if name in ("scale", "shift") and tokens.numel() != 1:
            value = value.expand(-1, *self.x.shape[1:rows], -1)
        return value.flatten(1, rows - 1)


def _check_modulation(name: str, value: Tensor, x: Tensor) -> None:
    fits = value.dim() == x.dim() and value.shape[-1] == x.shape[-1]
    if not fits or any(a not in (1, b) for a, b in zip(value.shape, x.shape)):
        raise ValueError(
            f"{name}: expected {x.dim()} dimensions that broadcast to x {tuple(x.shape)} with the full last one, "
            f"such as (B, 1, {x.shape[-1]}); got {tuple(value.shape)}"
        )


def _default_eps(x: Tensor, eps: float | None) -> float:
    _choice.check_tensor("x", x)
    return torch.finfo(x.dtype).eps if eps is None else eps


def choose(x: Tensor, impl: str) -> str:
    """The implementation that runs: "torch" or "triton"."""
    if impl != "auto":
        return impl
    triton_runs = x.device.type == "cuda" and x.dtype != torch.float64 and x.shape[-1] <= MAX_TRITON_WIDTH
    return "triton" if triton_runs and _choice.triton_problem(x.device) is None else "torch"


def _forward(
    primals: Tensors, tangents: Tensors, attrs: Sequence[Any], tangent_grad: bool
) -> tuple[Tensors, Tensors, Tensors]:
    x, weight, bias, scale, shift = primals
    t_x, t_weight, t_bias, t_scale, t_shift = tangents
    eps, rms, impl = attrs
    assert x is not None
    y, t_y, mean, rstd = _choice.implementation("norm", choose(x, impl)).norm_forward(
        x, t_x, weight, t_weight, bias, t_bias, scale, t_scale, shift, t_shift, eps=eps, rms=rms
    )
    return (y,), (t_y,), (mean, rstd)


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
    (dy,), (dt_y,), (y,), (mean, rstd) = d_outs, dt_outs, outs, residuals
    dy = torch.zeros_like(y) if dy is None and y is not None else dy
    pairs = [x for pair in zip(primals, tangents) for x in pair]
    grads: Tensors = _choice.implementation("norm", "torch").norm_backward(
        dy, dt_y, *pairs, mean, rstd, rms=attrs[1], needs=tuple(needs)
    )
    return grads


def _native(primals: Tensors, attrs: Sequence[Any]) -> Tensors | None:
    """PyTorch's own norm, where no implementation was asked for by name and one dtype runs through.

    A modulated 16-bit norm is not among them: composed, it would round three times where the fused one rounds once.
    """
    x, weight, bias, scale, shift = primals
    eps, rms, impl = attrs
    assert x is not None
    if impl != "auto" or any(p is not None and p.dtype != x.dtype for p in primals):
        return None
    if (scale is not None or shift is not None) and x.dtype in (torch.bfloat16, torch.float16):
        return None
    width = x.shape[-1:]
    with _choice.without_autocast(x.device):
        y = F.rms_norm(x, width, weight, eps) if rms else F.layer_norm(x, width, weight, bias, eps)
        y = y if scale is None else y * (1 + scale)
        return (y if shift is None else y + shift,)


def _specs(
    primals: Tensors, tangents: Tensors, attrs: Sequence[Any], tangent_grad: bool
) -> tuple[Sequence[Spec], Sequence[Spec]]:
    x = primals[0]
    assert x is not None
    statistic = torch.float64 if x.dtype == torch.float64 else torch.float32
    row = (tuple(x.shape[:2]), statistic)
    return [(tuple(x.shape), x.dtype)], [None if attrs[1] else row, row]


def _math(primals: Any, tangents: Any, attrs: Sequence[Any]) -> tuple[Tensors, Tensors]:
    y, t_y = _dense.norm_dual(primals, tangents, attrs[0], attrs[1])
    return (y,), (t_y,)


def _math_backward(
    d_outs: Tensors, dt_outs: Tensors, primals: Any, tangents: Any, attrs: Sequence[Any], needs: list[bool]
) -> Tensors:
    return _dense.norm_dual_backward(d_outs[0], dt_outs[0], primals, tangents, attrs[0], attrs[1], needs)


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
)
