"""Check the arguments of a norm, refuse by name those that don't fit, and bring them to the form that the op takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fastdistill.ops.norm.op import NORM
from fastdistill.ops.protocol import checks, context, dispatch
from fastdistill.ops.protocol.pair import paired


class Call:
    """Call of a norm: arguments checked by name and brought to x (B, T, C), weight (C,), scale (B|1, T|1, C)."""

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
        checks.check_tensor(first, x)
        if isinstance(normalized_shape, int):
            raise TypeError(f"normalized_shape: expected a sequence such as ({normalized_shape},), got an int")
        if not isinstance(normalized_shape, Iterable):
            got = type(normalized_shape).__name__
            raise TypeError(f"normalized_shape: expected a sequence such as {tuple(x.shape[-1:])}, got {got}")
        self.normalized = tuple(normalized_shape)
        if not self.normalized or tuple(x.shape[-len(self.normalized) :]) != self.normalized:
            raise ValueError(
                f"normalized_shape: expected the last dimensions of {first} {tuple(x.shape)}, got {self.normalized}"
            )
        self.named = [("x", x), ("weight", weight), ("bias", bias), ("scale", scale), ("shift", shift)]
        for name, value in self.named[1:]:
            if value is not None:
                checks.check_tensor(name, value)
                checks.check_like(name, value, first, x, dtype=False)
        for name, value in self.named[1:3]:
            if value is not None and tuple(value.shape) != self.normalized:
                raise ValueError(f"{name}: expected shape {self.normalized}, got {tuple(value.shape)}")
        for name, value in self.named[3:]:
            if value is not None:
                check_modulation(name, value, x)
        dispatch.check_impl(impl, x.device)
        self.x, self.attrs = x, (checks.number("eps", eps), rms, impl)

    def run(self) -> Tensor:
        """Return the norm of (possibly dual) tensors."""
        primals = [self._canonical(name, value) for name, value in self.named]
        (y,) = NORM(primals, self.attrs, context.tangent_grad())
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
        """Return the norm and its tangent along explicit ones."""
        given = (t_x, t_weight, t_bias, t_scale, t_shift)
        checked = checks.checked_tangents(
            [(name, value, t) for (name, value), t in zip(self.named, given)], tangent_grad
        )
        primals = [self._canonical(name, value) for name, value in self.named]
        tangents = [self._canonical(name, t) for (name, _), t in zip(self.named, checked)]
        ((y, t_y),) = NORM.pair(paired(primals, tangents), self.attrs, tangent_grad)
        return y.reshape(self.x.shape), t_y.reshape(self.x.shape)

    def _canonical(self, name: str, value: Tensor | None) -> Tensor | None:
        """Return x as (B, T, C), T the tokens that share a modulation; scale and shift as (B|1, T|1, C)."""
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
    """Return the eps of an RMSNorm as PyTorch has it: where none is given, that of the dtype."""
    checks.check_tensor(name, x)
    return torch.finfo(x.dtype).eps if eps is None else eps
