"""Give the formulas of norms for derivatives of any order, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdistill.ops.protocol.pair import add, times


def norm_dual(
    primals: tuple[Tensor | None, ...], tangents: tuple[Tensor | None, ...], eps: float, rms: bool
) -> tuple[Tensor, Tensor | None]:
    """y = (xh∘w + b)∘(1 + scale) + shift and its tangent; primals are (x, weight, bias, scale, shift)."""
    h, t_h, *_ = _normalised(primals, tangents, eps, rms)
    _, _, _, scale, shift = primals
    _, _, _, t_scale, t_shift = tangents
    t_y = add(t_h if scale is None or t_h is None else t_h * (1 + scale), times(h, t_scale))
    y = h if scale is None else h * (1 + scale)
    t_y = add(t_y, t_shift)
    return y if shift is None else y + shift, None if t_y is None else t_y.expand_as(y)


def norm_dual_backward(
    dy: Tensor | None,
    dt_y: Tensor | None,
    primals: tuple[Tensor | None, ...],
    tangents: tuple[Tensor | None, ...],
    eps: float,
    rms: bool,
    needs: list[bool],
) -> list[Tensor | None]:
    """Gradients of (x, weight, bias, scale, shift) and of their tangents, from the cotangents of y and t_y."""
    x, weight, _, scale, _ = primals
    _, t_weight, _, t_scale, _ = tangents
    h, t_h, xh, t_xh, rstd = _normalised(primals, tangents, eps, rms)
    assert x is not None
    zero = torch.zeros_like(h)
    dy, dt_y = zero if dy is None else dy, zero if dt_y is None else dt_y
    t_h, t_xh = zero if t_h is None else t_h, zero if t_xh is None else t_xh

    one_plus = 1.0 if scale is None else 1 + scale
    dh = dy * one_plus if t_scale is None else dy * one_plus + dt_y * t_scale
    dt_h = dt_y * one_plus
    gain = 1.0 if weight is None else weight
    dxh = dh * gain if t_weight is None else dh * gain + dt_h * t_weight
    dt_xh = dt_h * gain

    a = zero[..., :1] if tangents[0] is None else (xh * tangents[0]).mean(-1, keepdim=True)
    c1, b = (xh * dt_xh).mean(-1, keepdim=True), (t_xh * dt_xh).mean(-1, keepdim=True)
    dt_x = rstd * _project(dt_xh, xh, rms)
    dx = rstd * (_project(dxh, xh, rms) - c1 * t_xh - b * xh) - rstd * a * dt_x
    grads = [dx, dh * xh + dt_h * t_xh, dh, dy * h + dt_y * t_h, dy, dt_x, dt_h * xh, dt_h, dt_y * h, dt_y]
    return [
        None if not need or like is None else grad.sum_to_size(like.shape)
        for grad, like, need in zip(grads, [*primals, *primals], needs, strict=True)
    ]


def _normalised(
    primals: tuple[Tensor | None, ...], tangents: tuple[Tensor | None, ...], eps: float, rms: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor]:
    """h = xh∘w + b and its tangent, xh and its tangent, rstd."""
    x, weight, bias, _, _ = primals
    t_x, t_weight, t_bias, _, _ = tangents
    assert x is not None
    centred = x if rms else x - x.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    xh = centred * rstd
    t_xh = None if t_x is None else rstd * _project(t_x, xh, rms)
    t_h = add(t_xh if t_xh is None or weight is None else t_xh * weight, times(xh, t_weight))
    h = xh if weight is None else xh * weight
    return h if bias is None else h + bias, add(t_h, t_bias), xh, t_xh, rstd


def _project(u: Tensor, xh: Tensor, rms: bool) -> Tensor:
    """Pi(u) = u - mean u - xh mean(xh∘u); RMSNorm leaves the mean out."""
    u = u if rms else u - u.mean(-1, keepdim=True)
    return u - xh * (xh * u).mean(-1, keepdim=True)
