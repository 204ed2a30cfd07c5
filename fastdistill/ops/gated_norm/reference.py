"""Specify the gated residual with its norm in plain PyTorch, differentiable in both modes: the truth."""

from __future__ import annotations

from torch import Tensor

from fastdistill.ops.norm.reference import norm


def gated_residual_ada_norm(
    x: Tensor,
    gate: Tensor | None,
    h: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    rms: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return (r, y), the step between two blocks: r = x + gate * h, and `norm` of r with the rest.

    y has h's dtype, so that the residual stream x, r may be wider than what the blocks compute in.
    """
    r = x + (h if gate is None else gate * h)
    return r.to(x.dtype), norm(r, weight, bias, scale, shift, eps, rms).to(h.dtype)
