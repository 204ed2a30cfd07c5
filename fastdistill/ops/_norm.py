"""The op behind all norms, `torch.ops.fastdistill.norm`: its dual protocol, and what its public functions share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdistill.ops import _choice, _dense
from fastdistill.ops import _functional as F
from fastdistill.ops._dual import DualOp, Spec, Tensors

MAX_TRITON_WIDTH = 8192


class Call:
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
        first: str = "x",
    ) -> None:
        _choice.check_tensor(first, x)
        if isinstance(normalized_shape, int):
            raise TypeError(f"normalized_shape: expected a sequence such as ({normalized_shape},), got an int")
        self.normalized = tuple(normalized_shape)
        if not self.normalized or tuple(x.shape[-len(self.normalized) :]) != self.normalized:
            raise ValueError(
                f"normalized_shape: expected the last dimensions of {first} {tuple(x.shape)}, got {self.normalized}"
            )
        self.named = [("x", x), ("weight", weight), ("bias", bias), ("scale", scale), ("shift", shift)]
        for name, value in self.named[1:]:
            if value is not None:
                _choice.check_tensor(name, value)
                _choice.check_like(name, value, first, x, dtype=False)
        for name, value in self.named[1:3]:
            if value is not None and tuple(value.shape) != self.normalized:
                raise ValueError(f"{name}: expected shape {self.normalized}, got {tuple(value.shape)}")
        for name, value in self.named[3:]:
            if value is not None:
                check_modulation(name, value, x)
        _choice.check_impl(impl, x.device)
        self.x, self.attrs = x, (_choice.number("eps", eps), rms, impl)

    def run(self) -> Tensor:
        """The norm of (possibly dual) tensors."""
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
        """The norm and its tangent along explicit ones."""
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
        if name in ("gate", "scale", "shift") and tokens.numel() != 1:
            value = value.expand(-1, *self.x.shape[1:rows], -1)
        return value.flatten(1, rows - 1)


def check_modulation(name: str, value: Tensor, x: Tensor) -> None:
    """Refuse a modulation that doesn't broadcast to x."""
    fits = value.dim() == x.dim() and value.shape[-1] == x.shape[-1]
    if not fits or any(a not in (1, b) for a, b in zip(value.shape, x.shape)):
        raise ValueError(
            f"{name}: expected {x.dim()} dimensions that broadcast to x {tuple(x.shape)} with the full last one, "
            f"such as (B, 1, {x.shape[-1]}); got {tuple(value.shape)}"
        )


def default_eps(x: Tensor, eps: float | None, name: str = "x") -> float:
    """PyTorch's eps of an RMSNorm: where none is given, that of the dtype."""
    _choice.check_tensor(name, x)
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
    (dy,), (dt_y,), (x, *_), (mean, rstd), (_, rms, impl) = d_outs, dt_outs, primals, residuals, attrs
    assert x is not None
    pairs = [x for pair in zip(primals, tangents) for x in pair]
    grads: Tensors = _choice.implementation("norm", choose(x, impl)).norm_backward(
        dy, dt_y, *pairs, mean, rstd, rms=rms, needs=tuple(needs)
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
    composed = scale is not None or shift is not None or (rms and bias is not None)
    if composed and x.dtype in (torch.bfloat16, torch.float16):
        return None
    with _choice.without_autocast(x.device):
        y = native_norm(x, weight, bias, eps, rms)
        y = y if scale is None else y * (1 + scale)
        return (y if shift is None else y + shift,)


def native_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool) -> Tensor:
    """PyTorch's own norm over the last dimension; its RMSNorm takes no bias, which is added here."""
    if not rms:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    y = F.rms_norm(x, x.shape[-1:], weight, eps)
    return y if bias is None else y + bias


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
    saves_outputs=False,
)
