"""Vectors of length one, whose primal and tangent run as one kernel."""

from __future__ import annotations

from torch import Tensor

from fastdistill.ops.l2_norm.op import L2_NORM
from fastdistill.ops.protocol import checks, context, dispatch
from fastdistill.ops.protocol.pair import Pair


def l2_norm(x: Tensor, eps: float = 1e-6, *, impl: str = "auto") -> Tensor:
    """Return x (..., C) over its length, differentiable in forward mode.

    Equivalent to:
        x * (x.square().sum(-1, keepdim=True) + eps).rsqrt()
    """
    checks.check_tensor("x", x)
    dispatch.check_impl(impl, x.device)
    (y,) = L2_NORM((_rows(x),), (checks.number("eps", eps), impl), context.tangent_grad())
    assert y is not None
    return y.reshape(x.shape)


def l2_norm_jvp(
    x: Tensor, t_x: Tensor | None, eps: float = 1e-6, *, tangent_grad: bool = False, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Return the L2 norm and its directional derivative; a tangent of None is zero.

    Equivalent to:
        torch.func.jvp(l2_norm, (x,), (t_x,))
    """
    checks.check_tensor("x", x)
    dispatch.check_impl(impl, x.device)
    (t_x,) = checks.checked_tangents([("x", x, t_x)], tangent_grad)
    inputs = [Pair(_rows(x), None if t_x is None else _rows(t_x))]
    ((y, t_y),) = L2_NORM.pair(inputs, (checks.number("eps", eps), impl), tangent_grad)
    return y.reshape(x.shape), t_y.reshape(x.shape)


def _rows(x: Tensor) -> Tensor:
    """Return x with at least two dimensions: the first may be mapped."""
    return x if x.dim() > 1 else x[None]
